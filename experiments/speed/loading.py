"""Loading a folder like llava-hf's, with our weights.load and with transformers; and sample.py from
its start to its first token.
"""
import json
import os
import subprocess
import sys
import tempfile
import time

import torch

import weights
from cli import UserError
from data import Preprocess, SYSTEM
from experiments.processes import environment, ROOT
from experiments.speed.clock import alternate, reset_peak, resident, row
from experiments.speed.inputs import jpegs
from experiments.speed.shapes import BIG, meaningless_tokenizer, random_like, SHAPES
from formats.export import write_llava
from formats.folders import has_config
from formats.weight_files import tensors, weight_files
from model import VLMConfig
from training.plan import peak
from weights import build_empty

CHECKPOINT = os.path.join("out", "toy", "stage2")
TIMES = {"load_s": "loading", "touch_s": "then reading one number of every page",
         "process_s": "the whole process, with start and imports"}


def make(size, folder):
    """Write a folder like llava-hf's with a size's shapes and random weights, in bfloat16."""
    vision, llm = SHAPES[size]
    torch.manual_seed(0)
    model = build_empty(VLMConfig(vision, llm, "none", "none")).bfloat16()
    model.load_state_dict(random_like(model.state_dict()), assign=True)
    write_llava(folder, model, meaningless_tokenizer(llm.vocab), Preprocess(vision.image_size),
                SYSTEM)
    files = [path for path, _ in weight_files(folder)]
    print(f"{folder}: {sum(map(os.path.getsize, files)) / 1e9:.2f} GB in {len(files)} files")


def measure(folder, loader):
    """Load in this process, "ours" or "transformers": seconds, and the peak of memory above that of
    the imports.
    """
    if loader == "transformers":
        from transformers import LlavaForConditionalGeneration, logging  # only needed here
        logging.disable_progress_bar()

        def load():
            return LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    else:
        def load():
            return weights.load(folder, torch.bfloat16).model
    reset_peak("cpu")
    baseline, began = resident(), time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    for p in model.parameters():  # one number of each 4 KiB page: mapped pages are not read yet
        p.detach().flatten()[::4096 // p.element_size()].sum()
    return {"load_s": loaded - began, "touch_s": time.perf_counter() - loaded,
            "peak_bytes": peak("cpu") - baseline}


def measure_apart(folder, loader):
    """`measure` in a process of its own, and the seconds of that process."""
    code = ("import json, sys; from experiments.speed.loading import measure; "
            "print(json.dumps(measure(*sys.argv[1:])))")
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, folder, loader], stdout=subprocess.PIPE,
                          text=True, env=environment())
    if done.returncode:
        raise UserError(f"{loader} could not load {folder} (exit code {done.returncode})")
    return json.loads(done.stdout.splitlines()[-1]) | {"process_s": time.perf_counter() - began}


def prepare(files, cold):
    """Drop files from the system's cache, or read them into it as far as there is room."""
    for path in files:
        with open(path, "rb", buffering=0) as f:
            if cold:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and f.read(2**24):
                pass


def compare(folder, rounds, cold):
    """The rows of both loaders, each in a process of its own. `bytes` is the size in bfloat16."""
    files = [path for path, _ in weight_files(folder)]
    size = 2 * sum(tensor.numel() for _, tensor, _ in tensors(folder))
    found = {"ours": [], "transformers": []}
    for _ in range(rounds):
        for loader, results in found.items():
            prepare(files, cold)
            results.append(measure_apart(folder, loader))
    peaks = {loader: max(r["peak_bytes"] for r in results) for loader, results in found.items()}
    return [row("load", title, {loader: [r[key] for r in results]
                                for loader, results in found.items()}, unit="s",
                peaks=peaks if key == "load_s" else {}, folder=folder, bytes=size, cold=cold)
            for key, title in TIMES.items()]


def first_token(o):
    """The row of sample.py, from its start to the end of an answer of one token."""
    model = o.model or CHECKPOINT
    with tempfile.TemporaryDirectory() as folder:
        picture = os.path.join(folder, "x.jpg")
        with open(picture, "wb") as f:
            f.write(jpegs(1)[0])
        command = [sys.executable, os.path.join(ROOT, "sample.py"), picture,
                   "--prompt", "What is this?", "--max_new_tokens", "1", "--model", model,
                   "--device", o.device, "--dtype", o.dtype]

        def run():
            done = subprocess.run(command, capture_output=True, text=True, env=environment())
            if done.returncode:
                raise UserError(f"sample.py failed: {done.stderr.splitlines()[-1]}")

        spent = alternate({"sample.py": run}, o.rounds)
    return row("load", f"sample.py, start to first token of {model}", spent, unit="s",
               aim="at most 1.5 s on the toy")


def rows(o):
    """Loading the folder --out, which is made if it is not there; then sample.py."""
    if o.size in BIG and not o.out:
        raise UserError(f"--what load --size {o.size} writes a large checkpoint: "
                        "say where with --out FOLDER")
    with tempfile.TemporaryDirectory() as temporary:
        folder = o.out or os.path.join(temporary, "llava")
        if not has_config(folder):
            make(o.size, folder)
        found = compare(folder, o.rounds, o.cold)
    if o.model is None and not has_config(CHECKPOINT):
        print(f"sample.py is not timed: there is no {CHECKPOINT}, and no --model is given")
        return found
    return found + [first_token(o)]
