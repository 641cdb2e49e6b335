"""Answers to a task's questions: batched, shared out over ranks, resumable, in LLaVA's file format.

    NAME.jsonl          all answers, {"question_id", "prompt", "text", "answer_id", "model_id",
                        "metadata"} a line, in the order of the questions
    NAME.1of8.jsonl     what rank 0 of 8 has answered so far; removed when all have finished
    NAME.meta.json      the model and the options; answers of another model are never added to

The batches depend on the questions and on --batch_size only, not on the number of ranks.
Next: ../sample.py, whose `answer` does the work.
"""
import dataclasses
import functools
import glob
import hashlib
import io
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

from cli import UserError
from data import encode_conversation, open_image, pixels
from formats.answers import AnswerFile, check_settings
from formats.json_files import read_json_lines, write_json
from model import Batch
from sample import answer, free_positions, make_batch
from training.distributed import raise_on_all_ranks


def encode(question, checkpoint):
    """The `Sample` of a question."""
    turns = [*question.turns, (question.text, None)]
    return encode_conversation(turns, checkpoint.tokenizer, checkpoint.prompt_format(),
                               question.label, question.image)


def look(question, checkpoint):
    """Pixels float[3, S, S] of a question's picture."""
    image = question.image
    file = io.BytesIO(image) if isinstance(image, bytes) else image
    return pixels(open_image(file, f"{question.label}: its picture"), checkpoint.preprocess)


@torch.no_grad()
def likeliest(checkpoint, samples, visual, letters):
    """For each prompt, the one of its `letters` that is the likeliest answer: list[str].

    One prefill for all; then the options run one after the other in the same cache.
    """
    model, B = checkpoint.model, len(samples)
    options = [[checkpoint.tokenizer.encode(letter) for letter in some] for some in letters]
    batch = make_batch(samples, visual, model)
    weight, T = model.llm.embed_tokens.weight, batch.ids.shape[1]
    cache = model.new_cache(B, weight.device, weight.dtype)
    cache.reserve(T + max(len(ids) for some in options for ids in some))
    last = torch.arange(B, device=weight.device) * T + batch.lengths - 1
    first = model(dataclasses.replace(batch, at=last), cache).float().log_softmax(-1)  # (B, V)
    start = cache.lengths
    totals = first.new_full((B, max(map(len, options))), -torch.inf)
    for n in range(totals.shape[1]):
        rows = [b for b in range(B) if n < len(options[b])]
        some = [options[b][n] if b in rows else [0] for b in range(B)]
        length = torch.tensor([len(ids) for ids in some], device=weight.device)
        ids = torch.tensor([s + [0] * (max(map(len, some)) - len(s)) for s in some],
                           device=weight.device)
        total = first.gather(1, ids[:, :1])[:, 0]
        if ids.shape[1] > 1:
            cache.rewind(start)  # takes back the option before
            logits = model(Batch(ids[:, :-1], length - 1), cache).float().log_softmax(-1)
            more = logits.gather(2, ids[:, 1:, None])[..., 0]
            real = torch.arange(1, ids.shape[1], device=weight.device) < length[:, None]
            total = total + (more * real).sum(1)
        totals[rows, n] = total[rows]
    return [some[i] for some, i in zip(letters, totals.argmax(1).tolist())]


def reply(checkpoint, questions, choose, tokens):
    """[(answer, whether it was cut), ...] of questions that are answered together.

    choose  "likelihood": for questions with letters, which come first, the likeliest is taken
    """
    choices = sum(bool(q.letters) for q in questions) if choose == "likelihood" else 0
    if 0 < choices < len(questions):
        return [row for some in (questions[:choices], questions[choices:])
                for row in reply(checkpoint, some, choose, tokens)]
    samples = [encode(q, checkpoint) for q in questions]
    context = checkpoint.model.cfg.llm.context
    limits = [min(tokens, free_positions(s, 0, context)) for s in samples]
    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes in several threads at once
        pictured = [q for q in questions if q.image is not None]
        visual = list(pool.map(functools.partial(look, checkpoint=checkpoint), pictured))
    if choices:
        chosen = likeliest(checkpoint, samples, visual, [q.letters for q in questions])
        return [(letter, False) for letter in chosen]
    rows = answer(checkpoint, samples, visual, max(limits))
    return [(checkpoint.tokenizer.decode(ids[:n]).strip(), len(ids) >= n)
            for ids, n in zip(rows, limits)]


def check(questions, task, pictures):
    """UserError if a task has no questions, if an id occurs twice, or if pictures are not there.

    pictures  whether they are needed
    """
    seen = {}
    if not questions:
        raise UserError(f"{task.questions}: no questions of {task.title}")
    for q in questions:
        key = (q.id, q.prompt) if task.repeats else q.id
        if key in seen:
            raise UserError(f"{q.label}: the same id as {seen[key]}, {q.id}")
        seen[key] = q.label
    paths = dict.fromkeys(q.image for q in questions if pictures and isinstance(q.image, str))
    lacking = [path for path in paths if not os.path.isfile(path)]
    if lacking:
        raise UserError(f"{len(lacking)} of {len(paths)} pictures are not there, "
                        f"the first is {lacking[0]}")


def share(questions, batch_size, rank, ranks):
    """This rank's questions: batches of similar length, dealt out in turn.

    The longest come first: one that does not fit ends the run at once, not after hours.
    """
    def key(q):
        return not q.letters, -len(q.text) - sum(len(told) for turn in q.turns for told in turn)

    order = sorted(questions, key=key)
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return [q for batch in batches[rank::ranks] for q in batch]


def line(question, text, settings):
    """An answer as LLaVA's scripts write it; the id depends on the model and the question only."""
    key = f"{settings['fingerprint']} {question.id} {question.prompt}"
    more = {"round_id": 0, "options": [question.row[c] for c in question.letters],
            "option_char": list(question.letters)} if "index" in question.row else {}
    return {"question_id": question.id, "prompt": question.prompt, "text": text, **more,
            "answer_id": hashlib.sha256(key.encode()).hexdigest()[:22],
            "model_id": os.path.basename(os.path.normpath(settings["model"])), "metadata": {}}


def answer_all(questions, path, settings, load, tokens):
    """Write the file `path` of all answers; what is there already is kept.

    load  function -> Checkpoint; called if an answer is missing
    """
    note, rank, ranks = f"{path[:-6]}.meta.json", dist.get_rank(), dist.get_world_size()
    raise_on_all_ranks(lambda: os.path.exists(path) and check_settings(path, note, settings))
    if os.path.exists(path):
        return
    mine = share(questions, settings["batch_size"], rank, ranks)
    places = [f"{path[:-6]}.{r + 1}of{ranks}.jsonl" for r in range(ranks)]
    rows = [(q.label, {"question_id": q.id, "prompt": q.prompt}) for q in mine]

    def open_part():
        other = set(glob.glob(f"{glob.escape(path[:-6])}.[0-9]*of[0-9]*.jsonl")) - set(places)
        if other:
            raise UserError(f"{min(other)} was begun on another number of ranks: go on with as "
                            "many, or remove it")
        return AnswerFile(places[rank], rows, settings)

    def answer_rows(some, i):
        return reply(load(), mine[i:i + len(some)], settings["choose"], tokens)

    part = raise_on_all_ranks(open_part)
    cut = raise_on_all_ranks(lambda: part.write(settings["batch_size"], answer_rows))
    if cut:
        print(f"rank {rank}: {cut} answers were cut at {tokens} tokens or the end of the context",
              file=sys.stderr)
    raise_on_all_ranks(lambda: rank or merge(questions, path, note, places, settings))


def merge(questions, path, note, places, settings):
    """One file of answers from those of the ranks, which are removed."""
    texts = {}
    for r, place in enumerate(places):
        some = share(questions, settings["batch_size"], r, len(places))
        for q, (_, row) in zip(some, read_json_lines(place), strict=True):
            texts[id(q)] = row["answer"]
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        for q in questions:
            f.write(json.dumps(line(q, texts[id(q)], settings)) + "\n")
    write_json(note, settings)
    os.replace(f"{path}.tmp", path)
    for place in places:
        os.remove(place)
        os.remove(f"{place[:-6]}.meta.json")


def read_answers(path, questions):
    """The answers in a file of LLaVA's format, list[str | None] in the order of the questions.

    Joined by id, and by prompt where ids repeat. UserError names the line: no answer, a second
    answer, an answer to another question.
    """
    unique = len({q.id for q in questions}) == len(questions)
    keys = [q.id if unique else (q.id, q.prompt) for q in questions]
    known, found = set(keys), {}
    for label, row in read_json_lines(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f'{label}: expected {{"question_id": id, "prompt": text, '
                            '"text": answer}')
        key = row.get("question_id") if unique else (row.get("question_id"), row.get("prompt"))
        if not isinstance(row.get("question_id"), int | str) or key not in known:
            raise UserError(f"{label}: an answer to a question that the task does not have, "
                            f"{row.get('question_id')}")
        if key in found:
            raise UserError(f"{label}: a second answer to {row['question_id']}")
        found[key] = row["text"]
    return [found.get(key) for key in keys]
