"""Multiple choice: ScienceQA, SEED-Bench, MMBench with its rotations, CCBench, MMMU.

Next: judged.py.
"""
import collections
import functools
import os
import re
from string import ascii_uppercase

from benchmarks.questions import entry, records
from benchmarks.report import mean_score, unanswered
from cli import UserError
from formats.json_files import read_json_object

ROTATED = 10**6  # MMBench: question n again, its options rotated, has the index n + 1,000,000 k


def kind_letter(text, letters):
    """The letter that an answer means: alone, before a mark, or after "answer is"; else None."""
    text = text.strip()
    for pattern in (r"\W*([A-Za-z])\W*$", r"\W*([A-Z])[.):,]", r".*\banswer(?: is|:)\W*([A-Z])\b"):
        found = re.match(pattern, text, re.DOTALL)
        if found and found[1].upper() in letters:
            return found[1].upper()
    return None


# ---- ScienceQA


def scienceqa_letter(text):
    """A letter, or a letter with ". " and more, or the only "The answer is X."; "A." is refused."""
    if text in tuple("ABCDE"):
        return text
    if re.match(r"[A-E]\. ", text):
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def score_scienceqa(questions, texts, root, strict):
    """Accuracy on the questions with a picture; what is not answered falls out of them."""
    folder = os.path.join(root, "scienceqa")
    path, splits = (os.path.join(folder, name) for name in ("problems.json", "pid_splits.json"))
    problems, ids = read_json_object(path), read_json_object(splits, "test")
    answers = {q.id: (q, text) for q, text in zip(questions, texts) if text is not None}
    everything, pictured = [], []
    for id in ids:
        q, text = answers.get(id, (None, "FAILED"))
        problem = entry(problems, id, path, splits, "choices", "answer")
        letters = "ABCDE"[:len(problem["choices"])]
        letter = kind_letter(text, letters) if strict else scienceqa_letter(text)
        right = letter is not None and letters.find(letter) == problem["answer"]
        everything.append(float(right))
        if q is not None and q.image is not None:
            pictured.append(float(right))
    if not pictured:
        raise UserError("no question with a picture has an answer")
    notes = unanswered(questions, texts, "counted wrong, and not as questions with a picture")
    return mean_score(pictured, {"all": everything}, notes)


# ---- SEED-Bench


def score_seed(questions, texts, root, strict):
    """Accuracy on all questions, pictures and videos; an answer must equal the letter."""
    path = os.path.join(root, "seed_bench/SEED-Bench.json")
    rows = records(path, "questions", "question_id", "question_type_id", "data_type", "answer")
    names = {number: name for name, number in read_json_object(path, "question_type").items()}
    answers = {str(q.id): text for q, text in zip(questions, texts)}
    values, kinds = [], collections.defaultdict(list)
    for row in rows:
        text = answers.get(str(row["question_id"])) or ""
        values.append(float((kind_letter(text, "ABCD") if strict else text) == row["answer"]))
        for kind in (row["data_type"], names[row["question_type_id"]]):
            kinds[kind].append(values[-1])
    known = {str(row["question_id"]): row for row in rows}
    for q in questions:
        entry(known, str(q.id), path, q.label)
    more = len(known) - len(questions)
    notes = unanswered(questions, texts, "counted wrong")
    if more:
        notes.append(f"{more} questions of {path} are not in the question file: counted wrong")
    return mean_score(values, kinds, notes)


# ---- MMBench, CCBench, MMMU


def infer_option(text, letters):
    """VLMEvalKit's search for a letter: a word among the last four, or after "answer is"."""
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", text).split()
    found = [letter for letter in letters if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - 5:
        return found[0]
    if not found and "Z" in words:  # what its judge says for "none of these"
        return "Z"
    said = re.search(r"answer\s+is\s+\**([ABCD])", text, re.IGNORECASE)
    return said[1].upper() if said and said[1].upper() in letters else None


def infer(text, options):
    """VLMEvalKit's exact matching: the letter, else the only option whose text is in the answer.

    options  {letter: text}
    """
    letter = infer_option(text, options)
    if letter or len(text.lower()) > 2 * sum(map(len, options.values())):
        return letter
    found = [c for c, option in options.items() if option.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def options_and_answer(question):
    """({letter: text}, the right letter) of a table's row."""
    options = {c: question.row[c] for c in ascii_uppercase if question.row.get(c) is not None}
    return options, question.row["answer"]


def open_as_choice(question):
    """`options_and_answer` for MMMU: a question without options gets its answer as A, others as B.
    """
    options, answer = options_and_answer(question)
    if "A" not in options:
        options |= {"A": answer, "B": "Other Answers"}
    return options, answer if answer in tuple(ascii_uppercase) else "A"


def score_table(questions, texts, root, strict, choices=options_and_answer):
    """Accuracy; of a question with rotations, all must be right. By split and category, too."""
    unanswered(questions, texts)
    right, first = collections.defaultdict(list), {}
    for q, text in zip(questions, texts):
        if q.row["answer"] is None:
            raise UserError(f"{q.label}: lacks its answer")
        options, answer = choices(q)
        letter = strict and kind_letter(text, options) or infer(text, options)
        number = q.id % ROTATED if isinstance(q.id, int) else q.id
        right[number].append(letter == answer)
        if number == q.id:
            first[number] = q
    values, kinds = [], collections.defaultdict(list)
    for number, q in first.items():
        values.append(float(all(right[number])))
        for column in ("split", "l2-category", "category"):
            if q.row.get(column) is not None:
                kinds[f"{column}: {q.row[column]}"].append(values[-1])
    several = sum("pictures" in q.row for q in questions)
    notes = [f"{several} questions have several pictures, of which the model reads the first"]
    return mean_score(values, kinds, notes if several else ())


score_mmmu = functools.partial(score_table, choices=open_as_choice)


def submit_table(questions, texts, root):
    """Rows of the sheet that MMBench's server takes; the first holds the names of the columns."""
    left_out = ("hint", "category", "source", "comment", "l2-category")
    columns = [name for name in questions[0].row if name not in left_out]
    rows = [[q.id if name == "index" else q.row[name] for name in columns] for q in questions]
    return [row[:6] + [text] + row[6:]
            for row, text in zip([columns, *rows], ["prediction", *texts])]
