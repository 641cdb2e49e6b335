"""The question files of the benchmarks, as their authors distribute them.

    read_jsonl     LLaVA's: a line {"question_id", "image", "text", "category"} for each question
    read_scienceqa LLaVA's JSON list of conversations, for ScienceQA
    read_tsv       MMBench and VLMEvalKit: a table with the pictures in it, as base64
    read_val       the annotations of VQAv2 and VizWiz, for their validation sets
    read_own       anyone's data in LLaVA's training format

Each takes (task, root) and returns the `Question`s in the order of the file. Every error names file
and line. Next: tasks.py.
"""
import ast
import base64
import csv
import os
import re
from dataclasses import dataclass, field
from string import ascii_uppercase

from cli import UserError
from data import TAG, image_path, record_name, turns_of_record
from formats.json_files import read_json, read_json_lines, read_json_list, read_json_object

WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
LETTER_CN = "\n请直接回答选项字母。"
# What pandas takes for a missing value when the official tools read a table
MISSING = frozenset(("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND",
                     "1.#QNAN", "<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"))


@dataclass
class Question:
    """One question of a benchmark."""
    id: object                  # question_id of the answers file, int or str
    prompt: str                 # prompt of the answers file, as LLaVA's scripts write it
    text: str                   # what the model reads; begins with the tag if there is a picture
    image: str | bytes | None   # path of the picture, or the bytes of its file
    label: str                  # its place, "FILE line N", for messages
    row: dict                   # the record that it was read from
    letters: str = ""           # the letters of its options
    turns: list = field(default_factory=list)  # [(question, answer), ...] before it


def checked(row, label, *fields):
    """`row`; UserError unless it is a JSON object with these fields."""
    for name in fields:
        if not isinstance(row, dict) or name not in row:
            raise UserError(f"{label}: lacks {name!r}: is it the right file?")
    return row


def entry(table, key, path, label, *fields):
    """table[key], checked; UserError if `path`, which the table was read from, has none for a
    question."""
    if key not in table:
        raise UserError(f"{label}: {path} has nothing about {key}")
    return checked(table[key], f"{path}: {key}", *fields)


def records(path, key, *fields):
    """The list below `key` of a JSON file, each record checked."""
    return [checked(row, f"{path}: record {i} of {key!r}", *fields)
            for i, row in enumerate(read_json_object(path, key))]


def tagged(text, image):
    """`text` below the picture's tag, as LLaVA's scripts put it: nothing is stripped."""
    return text if image is None else f"{TAG}\n{text}"


def read_jsonl(task, root):
    """UserError if a line is not a question of this task: by `Task.fits`, and by the suffix."""
    questions, folder = [], os.path.join(root, task.images)
    for label, row in read_json_lines(os.path.join(root, task.questions)):
        row = row if isinstance(row, dict) else {}
        id, image, text = row.get("question_id"), row.get("image"), row.get("text")
        fits = isinstance(id, int | str) and isinstance(image, str) and isinstance(text, str)
        if not (fits and re.fullmatch(task.fits, f"{id} {image} {row.get('category', '')}")
                and text.endswith(task.suffix)):
            raise UserError(f"{label}: not a question of {task.title}: is it another task's file?")
        # The options of SEED-Bench stand in the text, a line each
        letters = "".join(re.findall(r"^([A-Z])\. ", text, re.MULTILINE)) \
            if task.suffix == LETTER else ""
        image = image_path(folder, image, label)
        questions.append(Question(id, text, tagged(text, image), image, label, row, letters))
    return questions


def read_scienceqa(task, root):
    """The prompt of the answers file includes the tag and the suffix, which are added here."""
    path, questions = os.path.join(root, task.questions), []
    for i, row in enumerate(read_json_list(path)):
        label = f"{path} {record_name(row, i)}"
        (question, _), *more = turns_of_record(row, label)
        if more or not isinstance(row.get("id"), str):
            raise UserError(f"{label}: not a question of {task.title}")
        image = row.get("image")
        image = image and image_path(os.path.join(root, task.images), image, label)
        text = tagged(question.replace(TAG, "").strip() + task.suffix, image)
        letters = "".join(re.findall(r"^([A-E])\. ", question, re.MULTILINE))
        questions.append(Question(row["id"], text, text, image, label, row, letters))
    return questions


# ---- Tables


def table_rows(path, needed):
    """(label, {column: text}) of each row of a TSV; None for a missing value."""
    csv.field_size_limit(2**31 - 1)
    try:
        with open(path, encoding="utf-8", newline="") as f:
            reader = csv.DictReader(f, delimiter="\t")
            for name in needed:
                if name not in (reader.fieldnames or []):
                    raise UserError(f"{path} line 1: lacks the column {name}")
            for row in reader:
                label = f"{path} line {reader.line_num}"
                if None in row or None in row.values():
                    raise UserError(f"{label}: expected {len(reader.fieldnames)} columns")
                yield label, {name: None if text in MISSING else text
                              for name, text in row.items()}
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a table ({error})") from None


def decode_pictures(text, by_index, label):
    """The pictures of a row, bytes each: base64, a list of these, or the index of another row."""
    try:
        some = ast.literal_eval(text) if text.startswith("[") else [text]
        # A text of at most 64 characters is an index, as in VLMEvalKit
        return [base64.b64decode((len(one) <= 64 and by_index.get(one)) or one, validate=True)
                for one in some]
    except (SyntaxError, ValueError):  # binascii.Error is a ValueError
        raise UserError(f"{label}: `image` is not base64") from None


def option_letters(row, from_llava):
    """The letters of a row's options. For LLaVA, "none" counts as missing, and ends the list."""
    if not from_llava:
        return "".join(letter for letter in ascii_uppercase if row.get(letter) is not None)
    valid = [(row.get(c) or "nan").lower() not in ("nan", "none") for c in "ABCD"] + [False]
    return "ABCD"[:valid.index(False)]


def table_suffix(task, text, letters):
    """What to add to a question: the task's suffix, or what VLMEvalKit adds for LLaVA."""
    if task.suffix is not None:
        return task.suffix
    chinese = re.search("[\u4e00-\u9fff]", text)
    if letters:
        return LETTER_CN if chinese else LETTER
    return "\n请直接回答问题。" if chinese else "\nAnswer the question directly."


def read_tsv(task, root):
    """The prompt of the answers file lacks the suffix. Rows without a picture are left out; of
    several pictures the model reads the first.

    Of a task with a `split`, only the rows of that split are read.
    """
    needed = ("index", "image", "question", "answer")
    rows = list(table_rows(os.path.join(root, task.questions), needed))
    by_index = {row["index"]: row["image"] for _, row in rows}
    from_llava, questions = task.suffix in (LETTER, LETTER_CN), []
    for label, row in rows:
        image = row.pop("image")
        if image is None or (task.split and row.get("split") != task.split):
            continue
        if row["index"] is None or row["question"] is None:
            raise UserError(f"{label}: lacks its index or its question")
        letters = option_letters(row, from_llava)
        hint = [row["hint"]] if row.get("hint") not in (None, *["none"] * from_llava) else []
        body = "\n".join([*hint, row["question"], *(f"{c}. {row[c]}" for c in letters)])
        pictures = decode_pictures(image, by_index, label)
        if len(pictures) > 1:
            row["pictures"] = len(pictures)
        index = int(row["index"]) if row["index"].isdecimal() else row["index"]
        text = tagged(body + table_suffix(task, body, letters), pictures[0])
        questions.append(Question(index, body, text, pictures[0], label, row, letters))
    return questions


# ---- Annotations, and own data


def read_val(task, root):
    """VQAv2's official question file, or VizWiz' annotations, whose `row` holds its 10 answers."""
    path, questions, (key, name) = os.path.join(root, task.questions), [], task.picture
    rows = read_json(path)
    rows = rows if isinstance(rows, list) else checked(rows, path, "questions")["questions"]
    for i, row in enumerate(rows):
        label = f"{path} record {i}"
        checked(row, label, "question", key)
        image = image_path(os.path.join(root, task.images), name.format(row[key]), label)
        text = row["question"] + task.suffix
        questions.append(Question(row.get("question_id", i), text, tagged(text, image), image,
                                  label, row))
    return questions


def read_own(path, images):
    """Every answered question of a LLaVA JSON file, each with the true answers before it.

    Turn n of record i has the id "i/n".
    """
    questions = []
    for i, record in enumerate(read_json_list(path)):
        label = f"{path} {record_name(record, i)}"
        turns, image = turns_of_record(record, label), record.get("image")
        image = image and image_path(images, image, label)
        for n, (question, answer) in enumerate(turns):
            row = {"question": question.replace(TAG, "").strip(), "answer": answer}
            # A turn before that of the picture does not see it
            shown = image if any(TAG in q for q, _ in turns[:n + 1]) else None
            questions.append(Question(f"{i}/{n}", question, question, shown, label, row,
                                      turns=turns[:n]))
    return questions
