"""Answers that a judge grades: LLaVA-Bench (in the wild) and MM-Vet.

The program calls nobody. It writes the requests in the form of the official scripts, and scores a
file of judgements, JSON Lines with {"question_id", "content"}: what the judge said. The judges'
instructions are read from the official files that hold them. Next: answering.py.
"""
import ast
import collections
import os

import numpy as np

from benchmarks.questions import checked, entry
from benchmarks.report import Score
from cli import UserError
from formats.json_files import read_bytes, read_json_lines, read_json_object

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."


def read_judgements(path, questions, prefix=""):
    """[(label, question, text)] of a file of judgements; UserError names file and line."""
    known, found = {f"{prefix}{q.id}": q for q in questions}, []
    for label, row in read_json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("content"), str):
            raise UserError(f'{label}: expected {{"question_id": id, "content": text}}')
        if str(row.get("question_id")) not in known:
            raise UserError(f"{label}: there is no question {row.get('question_id')}")
        found.append((label, known[str(row["question_id"])], row["content"]))
    lacking = {q.id for q in questions} - {q.id for _, q, _ in found}
    if lacking:
        raise UserError(f"{path}: {len(lacking)} of {len(questions)} questions have no judgement, "
                        f"the first is {min(lacking)}")
    return found


# ---- LLaVA-Bench


def ask_llava_bench(questions, texts, root):
    """A request for each question: GPT-4's answer and ours, compared by the rule of its category.

    rule.json is llava/eval/table/rule.json of LLaVA's repository.
    """
    folder = os.path.join(root, "llava-bench-in-the-wild")
    rules = read_json_object(os.path.join(folder, "rule.json"))
    context = os.path.join(folder, "context.jsonl")
    captions = {checked(row, label, "image", "caption")["image"]: row["caption"]
                for label, row in read_json_lines(context)}
    path = os.path.join(folder, "answers_gpt4.jsonl")
    references = [checked(row, label, "text")["text"] for label, row in read_json_lines(path)]
    if len(references) != len(questions):
        raise UserError(f"{path}: expected {len(questions)} answers, one a line for each question")
    requests = []
    for q, reference, text in zip(questions, references, texts):
        caption = entry(captions, q.row["image"], context, q.label)
        rule = entry(rules, f"llava_bench_{q.row['category']}", "rule.json", q.label,
                     "role", "prompt")
        caption, role = caption if isinstance(caption, str) else "\n".join(caption), rule["role"]
        blocks = (f"[Context]\n{caption}", f"[Question]\n{q.row['text']}",
                  f"[{role} 1]\n{reference}", f"[End of {role} 1]",
                  f"[{role} 2]\n{text}", f"[End of {role} 2]", f"[System]\n{rule['prompt']}")
        content = "".join(f"{block}\n\n" for block in blocks)
        requests.append({"question_id": q.id, "model": "gpt-4-0314", "temperature": 0.2,
                         "max_tokens": 1024, "messages": [{"role": "system", "content": SYSTEM},
                                                          {"role": "user", "content": content}]})
    return requests


def two_scores(text):
    """The two numbers in the first line of a judgement, apart by a space or a comma, or None."""
    words = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        return [float(word) for word in words] if len(words) == 2 else None
    except ValueError:
        return None


def score_llava_bench(questions, judgements, root, strict):
    """100 mean(ours) / mean(GPT-4's). No two numbers: (-1, -1), which is averaged all the same."""
    pairs, kinds, notes = [], collections.defaultdict(list), []
    for label, q, text in read_judgements(judgements, questions):
        scores = two_scores(text)
        if scores is None:
            fate = "left out" if strict else "scored as (-1, -1), as LLaVA's script does"
            notes.append(f"{label}: the first line does not hold two numbers: {fate}")
        if scores is not None or not strict:
            pairs.append(scores or [-1.0, -1.0])
            kinds[q.row["category"]].append(pairs[-1])

    def ratio(means):
        theirs, ours = (round(float(mean), 3) for mean in means[0])  # as LLaVA's script does
        return 100 * ours / theirs

    details = {kind: float(ratio([np.mean(some, axis=0)])) for kind, some in kinds.items()}
    return Score([np.array(pairs)], ratio, details, notes)


# ---- MM-Vet


def mm_vet_prompt(path):
    """The text that the official evaluator assigns to `prompt`; the file is read, never run."""
    for node in ast.parse(read_bytes(path).decode()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "prompt":
            return ast.literal_eval(node.value)
    raise UserError(f"{path}: found no `prompt = ...`; expected mm-vet_evaluator.py of MM-Vet")


def ask_mm_vet(questions, texts, root):
    """A request for each question: its examples, then question, truth and answer in one row."""
    folder = os.path.join(root, "mm-vet")
    prompt = mm_vet_prompt(os.path.join(folder, "mm-vet_evaluator.py"))
    path = os.path.join(folder, "mm-vet.json")
    truth, requests = read_json_object(path), []
    for q, text in zip(questions, texts):
        row = entry(truth, f"v1_{q.id}", path, q.label, "question", "answer")
        answer = row["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        content = prompt + "\n" + " | ".join([row["question"], answer, text, ""])
        requests.append({"question_id": f"v1_{q.id}", "model": "gpt-4-0613", "temperature": 0.0,
                         "max_tokens": 3, "messages": [{"role": "user", "content": content}]})
    return requests


def score_mm_vet(questions, judgements, root, strict):
    """The mean grade, from 0 to 1, in per cent; also by capability and set of capabilities.

    Several judgements of a question are runs, and are averaged.
    """
    path = os.path.join(root, "mm-vet/mm-vet.json")
    truth = read_json_object(path)
    grades = collections.defaultdict(list)
    for label, q, text in read_judgements(judgements, questions, "v1_"):
        try:
            grade = float(text.split(" ")[0].strip())
        except ValueError:
            grade = -1
        if not 0 <= grade <= 1:
            raise UserError(f"{label}: {text!r} does not begin with a grade from 0 to 1")
        grades[q.id].append(grade)
    values, kinds = [], collections.defaultdict(list)
    for id, runs in grades.items():
        values.append(sum(runs) / len(runs))
        abilities = set(entry(truth, f"v1_{id}", path, judgements, "capability")["capability"])
        for kind in {*abilities, "set: " + "+".join(sorted(abilities))}:
            kinds[kind].append(values[-1])
    return Score([np.array(values)[:, None]], lambda means: 100 * means[0][0],
                 {kind: 100 * float(np.mean(some)) for kind, some in sorted(kinds.items())})


def submit_mm_vet(questions, texts, root):
    """The answers by id, as MM-Vet's own evaluator reads them."""
    return {f"v1_{q.id}": text for q, text in zip(questions, texts)}
