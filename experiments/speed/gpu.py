"""The parts of ../gpu_check.py: each yields rows, so that what was measured stays if it is stopped.
"""
import copy
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time

import torch

from benchmarks.run import commit
from cli import UserError
from experiments.bench import device_name, Options
from experiments.processes import environment, last_line, ROOT
from experiments.speed import correct, loading, models, shapes
from experiments.speed.clock import copy_bandwidth, matmul_rate, row
from experiments.speed.shapes import EXPERTS, NO_EXPERTS
from experiments.speed.stages import train_stages
from inference.captured import CapturedStep
from training.costs import peak_rate
from training.plan import GB, room
from weights import load

PACKAGES = "torch", "triton", "transformers", "tokenizers", "numpy", "pytest"
# A part of a run of the toy is done when this is there
TOY = {"world": ["world/world.json"], "stage 0": ["stage0/clip/config.json",
                                                  "stage0/llm/config.json"],
       "stage 1": ["stage1/config.json"], "stage 2": ["stage2/config.json"],
       "scores": ["scores.json"]}


def has(*packages):
    """Whether all are installed; else a line names those that are not."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out: there is no {', '.join(missing)}", flush=True)
    return not missing


def bench_options(o, what, **more):
    """Options of bench.py; in bfloat16 unless told otherwise."""
    given = {"size": o.size, "device": o.device, "dtype": "bfloat16", "rounds": 5, **more}
    return Options(what=what, peak=False, **given)


# ---- The machine, and what must hold on it


def machine(o):
    """What it is and what it can do: bytes/s of copying, FLOP/s of products of matrices."""
    versions = {name: importlib.metadata.version(name) if importlib.util.find_spec(name) else None
                for name in PACKAGES}
    rates = {dtype: matmul_rate(o.device, getattr(torch, dtype))
             for dtype in ("bfloat16", "float32")}
    found = {"device": device_name(o.device), "memory_gb": room(o.device) / GB,
             "versions": {"python": platform.python_version(), **versions}, "commit": commit(),
             "copy_bandwidth": copy_bandwidth(o.device), "matmul_rate": rates}
    print(f"{found['device']}, torch {versions['torch']}: copies "
          f"{found['copy_bandwidth'] / 1e12:.3g} TB/s, multiplies {rates['bfloat16'] / 1e12:.4g} "
          f"TFLOP/s in bf16, {rates['float32'] / 1e12:.3g} in fp32", flush=True)
    yield found


def correctness(o):
    size = "small" if o.device == "cuda" else "tiny"
    yield from correct.rows(bench_options(o, "prefill", size=size, dtype="float32"))


def tests(o):
    """The tests that know this device."""
    if not has("pytest", "xdist", "transformers", "sentencepiece"):
        yield {"what": "tests", "result": None}
        return
    words = ["-n", "0", "-p", "no:cacheprovider", "tests/test_inference.py", "-k", o.device]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, env=environment())
    print(done.stdout, flush=True)
    result = done.stdout.splitlines()[-1].strip("= ")
    yield {"what": "tests", "result": result, "ok": done.returncode == 0}


# ---- Answers


def with_captured_step(model):
    """The same model, with the same weights and a captured step."""
    model = copy.copy(model)
    model.step = CapturedStep(model)
    return model


def compare(case, runs, o):
    """Yield a row of the first of some runs against each other one."""
    spent = models.time_runs(runs, case, o)
    first, *others = runs
    each = models.DECODED if case.job == "decode" else 1
    for name in others or [first]:
        what = "experts" if case.is_cost else case.job
        found = row(what, case.title(), {side: spent[side] for side in (first, name)},
                    unit=models.UNITS[case.job], each=each, floor=models.floor(case, o),
                    is_cost=case.is_cost, size=o.size)
        seconds = found["ours"]["median"] / 1e3
        if case.job == "decode":
            found["tokens_per_s"] = case.rows / seconds
        elif rate := peak_rate(o):  # of the data sheet; the share is of the measured rate
            found["mfu"] = found["share"] * matmul_rate(o.device, o.torch_dtype) / rate
        yield found


def answers(o, job, rows=1, other="transformers"):
    """Rows of prefill or decode, without experts: ours, decoding captured and eager, and theirs."""
    o, case = bench_options(o, job), models.Case(job, rows, None, (NO_EXPERTS, other))
    model = shapes.build(NO_EXPERTS, o)
    ours = {"captured": with_captured_step(model)} if job == "decode" else {}
    ours["eager"] = model
    runs = {name: models.JOBS[job][0](side, NO_EXPERTS, case, o) for name, side in ours.items()}
    if has("transformers") and models.usable((*runs, other), o)[-1] == other:
        theirs = shapes.build_theirs(o, model, share=True)
        runs[other] = models.JOBS[job][1](theirs, other, case, o)
        models.CHECKS[job]({NO_EXPERTS: runs[next(iter(runs))], other: runs[other]},
                           {NO_EXPERTS: model, other: theirs}, case, o)
    yield from compare(case, runs, o)


def prefill(o):
    for rows in (1, 8):
        yield from answers(o, "prefill", rows)


def decode(o):
    yield from answers(o, "decode")


def static_cache(o):
    """Against transformers' best, which compiles for a minute."""
    yield from answers(o, "decode", other="transformers, static cache")


def experts(o):
    """Generated experts against none: prefill and decode, by a captured step."""
    o = bench_options(o, "experts")
    sides = {kind: with_captured_step(shapes.build(kind, o)) for kind in (EXPERTS, NO_EXPERTS)}
    for job in ("prefill", "decode"):
        case = models.Case(job, 1, None, models.ON_OFF)
        runs = {kind: models.JOBS[job][0](side, kind, case, o) for kind, side in sides.items()}
        models.CHECKS[job](runs, sides, case, o)
        yield from compare(case, runs, o)


# ---- Training, loading


def toy(o):
    """The main job from nothing: seconds of each part, and the scores."""
    words = ["--pictures", 64, "--steps", 4] if o.size == "tiny" else []
    output, began = os.path.join(o.out, "toy.txt"), time.perf_counter()
    with open(output, "w") as f:
        job = subprocess.Popen([sys.executable, os.path.join(ROOT, "train.py"), "--out", o.out,
                                "--device", o.device, *map(str, words)], stdout=f, stderr=f)
    before = began
    for part, files in TOY.items():
        ended = False
        while not all(os.path.exists(os.path.join(o.out, file)) for file in files):
            if ended:
                raise UserError(f"train.py failed with status {job.returncode}: "
                                f"{last_line(output)}")
            time.sleep(0.1)
            ended = job.poll() is not None
        now = time.perf_counter()
        print(f"{part}: {now - before:.1f} s", flush=True)
        yield {"what": "toy", "case": part, "seconds": now - before}
        before = now
    job.wait()
    with open(os.path.join(o.out, "scores.json")) as f:
        means = {split: values["mean"] for split, values in json.load(f)["splits"].items()}
    total = time.perf_counter() - began
    print(f"in all {total:.1f} s, {means['heldout']:.1%} of held-out questions", flush=True)
    yield {"what": "toy", "case": "all", "seconds": total, "means": means}


def stages(o):
    """Both stages of train.py with full checkpointing: of 7B as many blocks as one GPU can train.
    """
    size, rows = ("7b8", 16) if o.size == "7b" else (o.size, 2)
    o = bench_options(o, "stages", size=size, out=o.out, steps=8 if rows == 16 else 4,
                      batch_size=rows)
    for found in train_stages(o):
        yield found | {"size": size, "micro_batch_size": rows}


def loads(o):
    """A checkpoint's way to memory, ours and transformers', and ours to the device."""
    folder = os.path.join(o.out, "llava")
    loading.make(o.size, folder)
    began = time.perf_counter()
    load(folder, torch.bfloat16).model.to(o.device)
    spent = [time.perf_counter() - began]
    yield row("load", f"to {o.device}", {"ours": spent}, unit="s")
    if has("transformers"):
        yield from loading.compare(folder, 1, False)


PARTS = {  # in order of their value: (function, the most seconds that it may take)
    "machine": (machine, 90), "correctness": (correctness, 90), "decode": (decode, 100),
    "prefill": (prefill, 80), "toy": (toy, 150), "stages": (stages, 180), "experts": (experts, 60),
    "tests": (tests, 60), "static_cache": (static_cache, 90), "loads": (loads, 90)}
