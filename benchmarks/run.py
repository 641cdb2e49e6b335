"""Run tasks: read the questions, answer them, score the answers, keep and show the scores.

Next: tasks.py, the table; answering.py; report.py.
"""
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import torch.distributed as dist

from benchmarks.answering import answer_all, check, read_answers
from benchmarks.questions import read_own
from benchmarks.report import unanswered
from benchmarks.tasks import TASKS, Task
from benchmarks.vqa import score_own
from cli import check_numbers, MOST, UserError
from formats.json_files import read_bytes, read_json_object, write_json
from formats.lora import fingerprints
from formats.xlsx import write_xlsx
from inference.prepare import ready_for_answers
from training.distributed import DistributedUserError, raise_on_all_ranks, set_device
from weights import fast_dtype, load, pick_device


@dataclass
class Options:
    """Score a checkpoint on benchmarks, the toy's own first of all."""
    # what to score
    model: str = "out/toy/stage2"     # folder or hub name of the checkpoint
    base: str | None = None           # of a LoRA: the model below it; none: the one that it names
    task: Literal["all", *TASKS] | None = None  # benchmark to run; all: every one that is found
                                      # under --root; none: the toy, or --data
    list: bool = False                # only print what each task needs and where it comes from
    # files
    root: str = "eval"                # folder of the benchmarks, laid out as LLaVA's eval.zip
    data: str | None = None           # your own questions, a JSON file in LLaVA's format;
                                      # for the toy, its folder; none: world/ beside the model
    images: str | None = None         # folder of the pictures of --data; none: that of the file
    out: str | None = None            # folder for the results; none: eval/ beside the model
    answers: str | None = None        # score this file of answers, in LLaVA's format; no model runs
    # how
    choose: Literal["generate", "likelihood"] = "generate"  # how an option is chosen: the model
                                      # writes its letter, or the likeliest letter is taken
    strict: bool = False              # score a second time: joined by id, answers read kindly
    batch_size: int = 8               # questions answered together
    device: Literal["cuda", "mps", "cpu"] | None = None  # none: the first of these that exists
    dtype: Literal["bfloat16", "float32"] | None = None  # none: bfloat16 where it is fast

    def __post_init__(self):
        check_numbers(self, {"batch_size": (1, MOST, "at least 1")})
        if self.task is None:
            self.task = "own" if self.data and not os.path.isdir(self.data) else "toy"
        if self.answers is not None and self.task in ("all", "toy"):
            raise UserError("--answers is the file of one task: name it with --task")
        if self.data is not None and self.task not in ("own", "toy"):
            raise UserError(f"--data goes without --task, or with the toy, not with {self.task}")
        if self.images is not None and self.task != "own":
            raise UserError("--images is the folder of your own pictures: it goes with --data")
        if self.task == "toy" and (self.strict or self.choose != "generate" or self.device
                                   or self.dtype):
            raise UserError("--strict, --choose, --device and --dtype are for benchmarks: name one "
                            "with --task")


def own_task(o):
    """The Task of --data."""
    images = o.images or os.path.dirname(o.data) or "."
    return Task("your questions", o.data, read=lambda task, root: read_own(o.data, images),
                score=score_own, metric="exact match", tokens=1024)


def results_folder(o):
    """--out; else that of --answers, or eval/ beside a checkpoint; for a hub name, one under out/.
    """
    if o.out is not None or o.answers is not None:
        return o.out or os.path.dirname(o.answers) or "."
    name = os.path.normpath(o.model)
    beside = os.path.dirname(os.path.abspath(name)) if os.path.isdir(name) \
        else os.path.join("out", os.path.basename(name))
    return os.path.join(beside, "eval")


def stem_of(name, o):
    """How the names of a task's files begin: with --answers, also with the name of that file, if it
    is not that of the task: one folder may hold the answers of several models."""
    given = os.path.splitext(os.path.basename(o.answers or name))[0]
    return name if given == name else f"{name}.{given}"


def judgements_or_texts(task, questions, texts, stem, root):
    """What is scored: the answers, or the path of the judgements; None if these are not there.

    Writes the judge's requests, and the file for the server. UserError if there are judgements, and
    requests of other answers.
    """
    if task.submit:
        make, ending = task.submit
        write = write_xlsx if ending == "xlsx" else write_json
        write(f"{stem}.submission.{ending}", make(questions, texts, root))
    if not task.ask:
        return texts
    unanswered(questions, texts)
    asked, judgements = f"{stem}.requests.jsonl", f"{stem}.judgements.jsonl"
    if os.path.exists(judgements) and not os.path.exists(asked):
        return judgements  # made elsewhere
    requests = "".join(json.dumps(one) + "\n" for one in task.ask(questions, texts, root)).encode()
    if not os.path.exists(judgements):
        with open(asked, "wb") as f:
            f.write(requests)
        return None
    if read_bytes(asked) != requests:
        raise UserError(f"{judgements} is about other answers: remove it, run this again, and send "
                        f"the new {asked} to the judge")
    return judgements


def content_of(questions):
    """A hash of what is asked: ids, prompts, turns before them, names and sizes of pictures (or
    their bytes)."""
    asked = [(q.id, q.prompt, q.turns,
              (os.path.basename(q.image), os.path.getsize(q.image)) if isinstance(q.image, str)
              else q.image) for q in questions]
    return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()[:16]


def run_task(name, o, out, settings, load_once):
    """{"score", "n", "interval", ...} of one task; "score" is None where a server or judge scores.
    """
    began = time.perf_counter()
    task = own_task(o) if name == "own" else TASKS[name]
    questions = raise_on_all_ranks(lambda: task.read(task, o.root))
    path = o.answers or os.path.join(out, f"{name}.jsonl")
    raise_on_all_ranks(lambda: check(questions, task, pictures=o.answers is None))
    if o.answers is None:
        settings = {**settings, "task": name, "questions": content_of(questions)}
        answer_all(questions, path, settings, load_once, task.tokens)
    return raise_on_all_ranks(lambda: None if dist.get_rank() else score_task(
        name, task, questions, path, o, out) | {"seconds": round(time.perf_counter() - began, 1)})


def score_task(name, task, questions, path, o, out):
    """The scores of a file of answers, as kept in scores.json."""
    texts = read_answers(path, questions)
    stem = os.path.join(out, stem_of(name, o))
    what = judgements_or_texts(task, questions, texts, stem, o.root)
    result = {"score": None, "n": len(questions), "metric": task.metric}
    if what is None or task.score is None:
        return result
    official = task.score(questions, what, o.root, False)
    result |= {"score": official.headline(), "interval": official.interval(),
               "details": official.details, "notes": official.notes}
    for note in official.notes:
        print(f"{name}: {note}", file=sys.stderr)
    if o.strict:
        strict = task.score(questions, what, o.root, True)
        result["strict"] = {"score": strict.headline(), "details": strict.details}
    return result


def commit():
    """The commit of this code, None outside a git checkout."""
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def keep(out, results, settings, o):
    """Write scores.json and return its path; the scores of other tasks stay if they are of the same
    weights. With --answers it is a file of its own.
    """
    path = os.path.join(out, f"scores.{stem_of(o.task, o)}.json" if o.answers else "scores.json")
    before = read_json_object(path) if os.path.exists(path) and not o.answers else {}
    same = all(before.get(name) == settings[name] for name in ("fingerprint", "base"))
    made = {"commit": commit(), "options": asdict(o)}
    tasks = (before.get("tasks", {}) if same else {}) | {
        name: result | made for name, result in results.items()}
    write_json(path, {"model": None if o.answers else o.model,
                      "fingerprint": settings["fingerprint"], "base": settings["base"],
                      "tasks": tasks})
    return path


def show(results, out, o):
    """The table of scores beside the published ones, then what is left to do."""
    lines = [f"{'':20s}{'':15s}{'ours':>8s}  {'95 % interval':15s}{'n':>7s}{'LLaVA-1.5':>11s}"
             f"{'HyperLLaVA':>11s}{'VLoRA':>8s}"]

    def number(x):
        return "-" if x is None else f"{x:.1f}"

    for name, one in results.items():
        task = TASKS.get(name, Task("your questions", ""))
        span = " to ".join(map(number, one.get("interval", ())))
        theirs = [number(x) for x in task.published or (None,) * 3]
        lines.append(f"{task.title:20s}{one['metric']:15s}{number(one['score']):>8s}  {span:15s}"
                     f"{one['n']:7d}{theirs[0]:>11s}{theirs[1]:>11s}{theirs[2]:>8s}")
        if "strict" in one:
            lines.append(f"{'  strict':35s}{number(one['strict']['score']):>8s}")
    for name, one in results.items():
        stem = stem_of(name, o)
        if one["score"] is None and TASKS[name].ask:
            lines.append(f"{name}: send {stem}.requests.jsonl in {out} to the judge, save what it "
                         f"says as {stem}.judgements.jsonl, and run this again")
        elif one["score"] is None:
            lines.append(f"{name}: submit {stem}.submission.json in {out} ({TASKS[name].source})")
    return "\n".join(lines)


def found(o):
    """The tasks whose questions are under --root; prints those that are not."""
    names = [name for name in TASKS if name != "toy"]
    here = [n for n in names if os.path.exists(os.path.join(o.root, TASKS[n].questions))]
    for name in names:
        if name not in here and dist.get_rank() == 0:
            print(f"{name}: not there: {os.path.join(o.root, TASKS[name].questions)}",
                  file=sys.stderr)
    if not here:
        raise UserError(f"--root {o.root} holds no benchmark; --list says what each one needs")
    return here


def prepare(o):
    """(names of the tasks, settings that their answers are made with, folder of the results)."""
    if o.task != "own" and not os.path.isdir(o.root):
        raise UserError(f"--root {o.root}: there is no such folder")
    names, out = found(o) if o.task == "all" else [o.task], results_folder(o)
    weights = {"fingerprint": None, "base": None}
    if o.answers is None:
        weights = fingerprints(o.model, o.base)
    dtype = o.dtype or fast_dtype(pick_device(o.device))
    os.makedirs(out, exist_ok=True)
    return names, {"model": o.model, **weights, "choose": o.choose, "dtype": dtype,
                   "batch_size": o.batch_size}, out


def evaluate(o):
    """Run the tasks of the options; all but the toy on the ranks of torch.distributed.

    With --task all, a task that fails does not stop the others; they are named at the end.
    """
    if o.task == "toy":
        parent = os.path.dirname(os.path.abspath(o.model))
        world = o.data or os.path.join(parent, "world")
        if dist.get_rank() == 0:
            TASKS["toy"].score(o.model, world, o.out or parent, time.perf_counter(), o.base)
        return
    names, settings, out = raise_on_all_ranks(lambda: prepare(o))
    results, failed, device = {}, [], pick_device(o.device)
    if device == "cuda":
        raise_on_all_ranks(set_device)

    @functools.cache
    def load_once():
        checkpoint = load(o.model, getattr(torch, settings["dtype"]), base=o.base)
        ready_for_answers(checkpoint.model.to(device).eval())
        return checkpoint

    for name in names:
        try:
            results[name] = run_task(name, o, out, settings, load_once)
        except UserError as error:  # of all ranks
            if o.task != "all":
                raise
            failed.append(f"{name}: {error}")
        # now: what comes after may fail
        path = raise_on_all_ranks(
            lambda: None if dist.get_rank() else keep(out, results, settings, o))
    if dist.get_rank() == 0:
        print(show(results, out, o), f"\nscores      {path}", sep="\n")
    if failed:
        raise DistributedUserError(f"{len(failed)} tasks failed. {'; '.join(failed)}")
