"""Short answers: VQAv2, VizWiz, TextVQA, GQA, and anyone's own questions.

A prediction is right as far as annotators agree with it, after both were normalised. The rules are
those of the official scorers, with their slips: docs/benchmarks.md lists them. Next: yes_no.py.
"""
import collections
import os
import re

from benchmarks.questions import entry, records
from benchmarks.report import mean_score, unanswered
from cli import UserError
from formats.json_files import read_json_lines, read_json_object

NUMBERS = {"none": "0", **{word: str(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())}}
MARKS = ";/[]\"{}()=+\\_-><@`,?!"
# The official table lists the spellings of these words that lack one apostrophe
APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
    might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
    shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
    someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
    why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
    you've""".split()
CONTRACTIONS = {word[:i] + word[i + 1:]: word for word in APOSTROPHES
                for i, letter in enumerate(word) if letter == "'"} | {"somebody'd": "somebodyd"}


def split_marks(text, period=r"\.(?!\d)", count=32):
    """Punctuation by the rules of the VQA evaluation: deleted, or turned into a space.

    period  what is deleted of the periods. The official expression means to spare one after a
            digit, too, but its lookbehind is misspelt; and re.UNICODE is passed as the count, 32
    """
    out, thousands = text, re.search(r"\d,\d", text)
    for mark in MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_space or thousands else " ")
    return re.sub(period, "", out, count=count)


def plain_words(text):
    """Digits for number words, no articles, apostrophes where they belong."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ("a", "an", "the"))


def evalai(text, strict=False):
    """EvalAI's answer processor, for predictions and answers alike.

    strict  no slips: all periods are deleted but those between digits
    """
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    how = {"period": r"(?<!\d)\.|\.(?!\d)", "count": 0} if strict else {}
    return plain_words(split_marks(text, **how))


def agreement(prediction, answers):
    """Mean over the annotators of min(1, n / 3), n of the others having given the prediction."""
    n, size = answers.count(prediction), len(answers)
    return (n * min(1, (n - 1) / 3) + (size - n) * min(1, n / 3)) / size


def vqa_accuracy(prediction, answers):
    """The VQA evaluation's accuracy; it normalises only where the annotators disagree."""
    prediction, *answers = (text.replace("\n", " ").replace("\t", " ").strip()
                            for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = (plain_words(split_marks(text)) for text in (prediction, *answers))
    return agreement(prediction, answers)


def score_vqa(questions, texts, root, strict):
    """VQAv2 and VizWiz, validation: predictions as they would be submitted."""
    unanswered(questions, texts)
    path = os.path.join(root, "vqav2/v2_mscoco_val2014_annotations.json")
    answers = {q.id: q.row for q in questions if "answers" in q.row}
    if not answers:
        answers = {row["question_id"]: row
                   for row in records(path, "annotations", "question_id", "answers")}
    values, kinds = [], collections.defaultdict(list)
    for q, text in zip(questions, texts):
        row = entry(answers, q.id, path, q.label)
        given = [one["answer"] for one in row["answers"]]
        values.append(agreement(evalai(text, True), [evalai(a, True) for a in given]) if strict else
                      vqa_accuracy(evalai(text), given))
        kinds[row.get("answer_type", "all")].append(values[-1])
    return mean_score(values, kinds)


def textvqa_question(prompt):
    """The question in a prompt of LLaVA's file, without OCR tokens and suffix."""
    lines = prompt.split("\n")
    ocr_first = len(lines) == 3 and lines[0].startswith("Reference OCR token:")
    return lines[1 if ocr_first else 0].lower()


def score_textvqa(questions, texts, root, strict):
    """Joined by picture and question, as the official script does. Only what is answered counts."""
    path = os.path.join(root, "textvqa/TextVQA_0.5.1_val.json")
    answers = {(row["image_id"], row["question"].lower()): row["answers"]
               for row in records(path, "data", "image_id", "question", "answers")}
    values = []
    for q, text in zip(questions, texts):
        given = entry(answers, (q.id, textvqa_question(q.prompt)), path, q.label)
        if text is not None:
            values.append(agreement(evalai(text, strict), [evalai(a, strict) for a in given]))
    return mean_score(values, notes=unanswered(questions, texts, "left out"))


def score_gqa(questions, texts, root, strict):
    """Exact match with the answer, in lower case and without periods at the end."""
    unanswered(questions, texts)
    folder = os.path.join(root, "gqa/data")
    path = os.path.join(folder, "questions1.2/testdev_balanced_questions.json")
    if not os.path.exists(path):
        path = os.path.join(folder, "testdev_balanced_questions.json")
    truth, values, kinds = read_json_object(path), [], collections.defaultdict(list)
    for q, text in zip(questions, texts):
        row = entry(truth, q.id, path, q.label, "answer", "types", "isBalanced")
        text = text.rstrip(".").lower()
        right = evalai(text) == evalai(row["answer"]) if strict else text == row["answer"]
        values.append(float(right))
        structure = row["types"]["structural"]
        for kind in ("open" if structure == "query" else "binary", f"structural: {structure}",
                     f"semantic: {row['types']['semantic']}"):
            kinds[kind].append(values[-1])
    lacking = {id for id in truth if truth[id]["isBalanced"]} - {q.id for q in questions}
    if lacking:
        raise UserError(f"{path}: {len(lacking)} of its questions are not in the question file, "
                        f"among them {min(lacking)}")
    return mean_score(values, kinds)


def score_own(questions, texts, root, strict):
    """Exact match, strictly of normalised texts; ignoring case; and that by the question's first
    word."""
    def normal(text):
        return strict and evalai(text, True) or text.strip()  # nothing would be left of "A"

    unanswered(questions, texts)
    exact = [float(normal(text) == normal(q.row["answer"])) for q, text in zip(questions, texts)]
    kinds = collections.defaultdict(list)
    for q, text in zip(questions, texts):
        right = text.strip().lower() == q.row["answer"].strip().lower()
        first = (q.row["question"].split() or [""])[0].lower()
        for kind in ("ignoring case", f"ignoring case, {first} ..."):
            kinds[kind].append(float(right))
    return mean_score(exact, kinds)


# ---- Submissions


def submit_vqav2(questions, texts, root):
    """The answers to all ids of test2015: an empty one where the question was not asked."""
    unanswered(questions, texts)
    found = {q.id: evalai(text) for q, text in zip(questions, texts)}
    rows = read_json_lines(os.path.join(root, "vqav2/llava_vqav2_mscoco_test2015.jsonl"))
    return [{"question_id": row["question_id"], "answer": found.get(row["question_id"], "")}
            for _, row in rows]


def submit_vizwiz(questions, texts, root):
    """The answers by picture; every question must have one."""
    unanswered(questions, texts)
    return [{"image": q.row["image"], "answer": evalai(text)} for q, text in zip(questions, texts)]
