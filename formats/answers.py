"""The files of `sample.py --batch`: questions in, answers out, and a note of how they were made.

    x.jsonl               a line for each question: {"prompt": text, "image": path, ...}
    x.answers.jsonl       the same lines in the same order, each with its "answer"
    x.answers.meta.json   the model and the sampling options, written before the first answer

A run that was stopped goes on after the last whole line; the checks here keep it from adding to a
file that holds something else. Used by `answer_file` in sample.py.
"""
import json
import os
import sys

import torch.distributed as dist
from tqdm import tqdm

from cli import UserError
from formats.json_files import read_json_lines, read_json_object, write_json

REMEDY = "name another --out, or remove it"
OTHER = {"base": "of another --base", "questions": "to other questions"}  # hashes: not shown


def read_questions(path):
    """[(label, question), ...] of a JSON Lines file; UserError if it is empty, or a line cannot be
    used."""
    rows = read_json_lines(path)
    if not rows:
        raise UserError(f'{path}: no questions, expected lines like {{"prompt": text, ...}}')
    for label, row in rows:
        prompt = row.get("prompt") if isinstance(row, dict) else None
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f'{label}: expected {{"prompt": text, ...}}')
        if not isinstance(row.get("image"), str | None):
            raise UserError(f'{label}: "image" is {row["image"]!r}, expected the path of a picture')
        if "answer" in row:
            raise UserError(f'{label}: "answer" is where the answer will go: rename that key')
    return rows


def answer_line(question, answer):
    """bytes, the line of a question with its answer."""
    return json.dumps({**question, "answer": answer}, ensure_ascii=False).encode() + b"\n"


def count_answers(out, rows):
    """(answers in the file `out`, bytes of their lines); a half-written last line does not count.

    Raises UserError if a line is not an answer to the question in its place.
    """
    if not os.path.exists(out):
        return 0, 0
    with open(out, "rb") as f:
        *whole, rest = f.read().split(b"\n")  # rest: what follows the last newline
    for i, line in enumerate([*whole, rest]):
        # How the line has to start: all before the answer's text. One line too many fits nothing
        start = answer_line(rows[i][1], "")[:-3] if i < len(rows) else b"\n"
        if line[:len(start)] != (start if i < len(whole) else start[:len(line)]):
            raise UserError(f"{out} line {i + 1}: not the answer to that question: {REMEDY}")
    return len(whole), sum(len(line) + 1 for line in whole)


def check_settings(out, note, settings):
    """UserError unless the file `note` says that the answers in `out` were made with `settings`.

    "model" may differ, because a checkpoint may move; "fingerprint" stands for its weights.
    """
    if not os.path.exists(note):
        raise UserError(f"{note}, which says how {out} was made, is missing: {REMEDY}")
    noted = read_json_object(note)
    if noted.get("fingerprint") != settings["fingerprint"]:
        raise UserError(f"{out} holds answers of other weights ({noted.get('model')}): {REMEDY}")
    for name in settings.keys() - {"model"}:
        if noted.get(name) != settings[name]:
            made = f"made with --{name} {noted.get(name)}, not {settings[name]}"
            raise UserError(f"{out} holds answers {OTHER.get(name, made)}: {REMEDY}")


class AnswerFile:
    """The file `out` of answers to rows of (label, question); `done` of them are there already.

    settings  {"model": path, "fingerprint": of its weights, option: value, ...}
    Raises UserError if `out` holds anything else, or answers made with other settings.
    """

    def __init__(self, out, rows, settings):
        self.out, self.rows, self.settings = out, rows, settings
        self.note = f"{os.path.splitext(out)[0]}.meta.json"
        self.done, self.size = count_answers(out, rows)
        if self.done:
            check_settings(out, self.note, settings)

    def write(self, batch_size, answer_rows):
        """Append the missing answers, batch by batch; return how many were cut.

        answer_rows  function (rows, index of the first one) -> [(text, whether it was cut), ...]
        """
        if not self.done:
            write_json(self.note, self.settings)
        cut, pause = 0, 0.1 if sys.stderr.isatty() else 5  # seconds between states of the bar
        bar = tqdm(total=len(self.rows), initial=self.done, unit="answer", mininterval=pause,
                   # one bar for all ranks
                   disable=dist.is_initialized() and dist.get_rank() != 0)
        with open(self.out, "ab") as f, bar:
            f.truncate(self.size)
            for i in range(self.done, len(self.rows), batch_size):
                some = self.rows[i:i + batch_size]
                answers = answer_rows(some, i)
                lines = [answer_line(row, text) for (_, row), (text, _) in zip(some, answers)]
                f.write(b"".join(lines))
                f.flush()
                cut += sum(was_cut for _, was_cut in answers)
                bar.update(len(some))
        return cut
