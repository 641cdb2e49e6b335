"""Speed of training and loading: `python -m experiments.bench OPTIONS`.

    --train 7b --out DIR         trains both stages on random weights, without and with experts
    --make 7b --out DIR          writes a folder like llava-hf's: LLaVA-1.5's shapes, random weights
    --load DIR                   loads it with weights.load, then with transformers, a process each

The last line of standard output is one JSON object. --load needs Linux and transformers.
"""
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

import weights
from cli import check_numbers, main, MOST, parse, UserError
from data import Preprocess, SYSTEM
from experiments.processes import environment, last_line, read_log, ROOT
from formats.export import write_llama, write_llava, write_vision
from formats.json_files import write_json
from formats.sentencepiece import layout_of_llama
from formats.tokenizer import Tokenizer
from formats.weight_files import tensors, weight_files
from model import CLIP, Llama, LlamaConfig, VisionConfig, VLMConfig
from training.plan import foreseen_gb
from weights import build_empty


SHAPES = {  # CLIP and Llama
    "7b": (VisionConfig(), LlamaConfig(context=4096)),
    "13b": (VisionConfig(), LlamaConfig(5120, 40, 40, 40, 13824, context=4096)),
    "1b": (VisionConfig(), LlamaConfig(1536, 10, 12, 12, 4096)),  # 0.5 billion weights
    "tiny": (VisionConfig(28, 14, 32, 2, 2, 64), LlamaConfig(32, 4, 4, 4, 64, 400)),  # for tests
}
DATA = {1: "captions.json", 2: "chat.json"}
WARM = 2  # first steps of a stage, which are not counted


@dataclass
class Options:
    """Measure training (--train) or loading (--make a checkpoint, then --load it)."""
    train: Literal[(*SHAPES,)] | None = None  # train a model of this size with random weights
    steps: int = 12                       # of each stage; the first two are not counted
    save: bool = False                    # with --train: save the state once, 12 bytes a parameter
    make: Literal[(*SHAPES,)] | None = None  # write a checkpoint of this size with random weights
    out: str | None = None                # folder for --train or --make
    load: str | None = None               # folder to load in bfloat16, here and with transformers
    cold: bool = False                    # drop the folder's files from the system's cache first
    only: Literal["ours", "transformers"] | None = None  # load with one of the two, in this process
    micro_batch_size: int = 16            # samples that a rank processes at once

    def __post_init__(self):
        wanted = [bool(self.train), bool(self.make), bool(self.load)]
        if sum(wanted) != 1 or any(wanted[:2]) != bool(self.out):
            raise UserError("expected --train SIZE --out FOLDER, --make SIZE --out FOLDER, "
                            "or --load FOLDER")
        fewest = WARM + self.save + 1
        check_numbers(self, {"steps": (
            fewest, MOST, f"more than {fewest - 1}, {WARM} are not counted")})


# ---- A model with real shapes and random weights


def meaningless_tokenizer(ids):
    """A Tokenizer with Llama's layout and so many ids, most of them numbers as words."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    names += [f"▁{i}" for i in range(ids - len(names))]
    inner = layout_of_llama({name: i for i, name in enumerate(names)}, [])
    inner.add_special_tokens(names[:3])
    return Tokenizer(json.loads(inner.to_str()))


def random_like(state):
    """Random tensors with the shapes and dtypes of `state`, a dict: views of a few numbers.

    They overlap, so a tensor takes memory only while it is written. Each begins at another number.
    """
    pool = torch.empty(2**18, dtype=next(iter(state.values())).dtype).normal_(0, 0.02)
    views = {}
    for start, (name, t) in enumerate(state.items()):
        numbers = pool + 1 if "norm" in name and name.endswith("weight") else pool
        views[name] = numbers.as_strided(t.shape, (2,) * t.ndim, start)
    return views


def make(o):
    vision, llm = SHAPES[o.make]
    torch.manual_seed(0)
    model = build_empty(VLMConfig(vision, llm, "none", "none")).bfloat16()
    model.load_state_dict(random_like(model.state_dict()), assign=True)
    preprocess = Preprocess(vision.image_size)
    write_llava(o.out, model, meaningless_tokenizer(llm.vocab), preprocess, SYSTEM)
    files = [path for path, _ in weight_files(o.out)]
    size = sum(map(os.path.getsize, files))
    print(json.dumps({"folder": o.out, "bytes": size, "files": len(files)}))


# ---- Loading


def memory(field):
    """Resident bytes of this process, mapped files included: VmRSS now, VmHWM at the peak."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def measure(o):
    """Load in this process; print seconds, and the peak of memory above that of the imports."""
    if o.only == "transformers":
        from transformers import LlavaForConditionalGeneration, logging  # only needed here
        logging.disable_progress_bar()

        def load():
            return LlavaForConditionalGeneration.from_pretrained(o.load, dtype=torch.bfloat16)
    else:
        def load():
            return weights.load(o.load, torch.bfloat16).model
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets VmHWM to VmRSS
    baseline, began = memory("VmRSS"), time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    for p in model.parameters():  # one number of each 4 KiB page: mapped pages are not read yet
        p.detach().flatten()[::4096 // p.element_size()].sum()
    print(json.dumps({"load_s": loaded - began, "touch_s": time.perf_counter() - loaded,
                      "peak_bytes": memory("VmHWM") - baseline}))


def prepare(files, cold):
    """Drop files from the system's cache, or read them into it as far as there is room."""
    for path in files:
        with open(path, "rb", buffering=0) as f:
            if cold:
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while not cold and f.read(2**24):
                pass


def compare(o):
    """Measure both loaders, each in a process of its own."""
    files = [path for path, _ in weight_files(o.load)]
    size = 2 * sum(tensor.numel() for _, tensor, _ in tensors(o.load))  # bytes in bfloat16
    found = {"folder": o.load, "bytes": size, "cold": o.cold}
    for loader in ("ours", "transformers"):
        prepare(files, o.cold)
        began = time.perf_counter()
        command = [sys.executable, "-m", "experiments.bench", "--load", o.load, "--only", loader]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment())
        if done.returncode:
            raise UserError(f"{loader} could not load {o.load} (exit code {done.returncode})")
        r = json.loads(done.stdout.splitlines()[-1])
        r |= {"process_s": time.perf_counter() - began, "peak": r["peak_bytes"] / size}
        found[loader] = r
        print(f"{loader:<13} loads in {r['load_s']:.2f} s, reads all pages in {r['touch_s']:.2f} s "
              f"more, {r['process_s']:.1f} s with start and imports; "
              f"peak {r['peak']:.3f} x {size / 1e9:.2f} GB", flush=True)
    print(json.dumps(found))


# ---- Training


def write_data(folder, samples):
    """FOLDER/images of 640 x 480, JSON files with numbers for words, as many as LLaVA's have."""
    rng = np.random.default_rng(0)
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    for i in range(64):  # smooth, like photographs: a JPEG decoder needs longer for noise
        rough = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = rough.resize((640, 480), Image.Resampling.BICUBIC)
        smooth.save(os.path.join(folder, "images", f"{i}.jpg"))

    def words(least, most):
        return " ".join(map(str, rng.integers(10, 100, rng.integers(least, most))))

    def record(i, turns):
        messages = [{"from": who, "value": text}
                    for turn in turns for who, text in zip(("human", "gpt"), turn)]
        messages[0]["value"] = f"<image>\n{messages[0]['value']}".strip()
        return {"id": str(i), "image": f"{i % 64}.jpg", "conversations": messages}

    captions = [record(i, [("", words(8, 30))]) for i in range(samples)]
    chats = [record(i, [(words(8, 40), words(5, 120)) for _ in range(rng.integers(1, 7))])
             for i in range(samples)]
    for stage, records in ((1, captions), (2, chats)):
        write_json(os.path.join(folder, DATA[stage]), records)


def write_parts(folder, size):
    """FOLDER/clip and FOLDER/llm in Hugging Face's layout, with random weights."""
    vision, llm = SHAPES[size]
    vision = dataclasses.replace(vision, depth=vision.depth + 1)  # with the block that LLaVA skips
    torch.manual_seed(0)
    with torch.device("meta"):
        clip = CLIP(vision).to(torch.bfloat16)
        llama = Llama(VLMConfig(vision, llm, "none", "none")).to(torch.bfloat16)
        norm = torch.empty(vision.width, dtype=torch.bfloat16)
    tower = clip.state_dict() | {"post_layernorm.weight": norm, "post_layernorm.bias": norm}
    preprocess = Preprocess(vision.image_size)
    write_vision(os.path.join(folder, "clip"), random_like(tower), vision, preprocess)
    write_llama(os.path.join(folder, "llm"), random_like(llama.state_dict()), llm,
                meaningless_tokenizer(llm.vocab))


def step_seconds(log, start, stop):
    """Mean seconds of the steps start .. stop - 1; eta_s has the mean of all steps so far."""
    spent = {n: n * log[n - 1]["eta_s"] / (len(log) - n) for n in (start, stop)}
    return (spent[stop] - spent[start]) / (stop - start)


def train_stage(o, stage, experts, world):
    """Run a stage by train.py, `experts` generated|none -> (its log, what it printed)."""
    folder, output = os.path.join(o.out, experts), os.path.join(o.out, f"{experts}_{stage}.txt")
    words = ["--stage", stage, "--preset", "1b" if o.train == "tiny" else o.train, "--out", folder,
             "--data", os.path.join(o.out, DATA[stage]), "--images", os.path.join(o.out, "images"),
             "--steps", o.steps, "--batch_size", 2 * world * o.micro_batch_size,
             "--micro_batch_size", o.micro_batch_size, "--overwrite"]
    if stage == 1:
        words += ["--vision", f"{o.out}/clip", "--llm", f"{o.out}/llm", "--allow_random_llm"]
    if experts == "none":
        words += ["--visual_expert", "none", "--language_expert", "none"]
    if o.save:
        words += ["--save_every", o.steps - 1]  # once
    launch = []
    if world > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    command = [sys.executable, *launch, os.path.join(ROOT, "train.py"), *map(str, words)]
    with open(output, "w") as f:
        done = subprocess.run(command, stdout=f, stderr=f)
    if done.returncode:
        raise UserError(f"stage {stage} failed with status {done.returncode}, see {output}: "
                        f"{last_line(output)}")
    with open(output) as f:
        text = f.read()
    if o.save and "training goes on, the states saved before are kept" in text:
        raise UserError(f"the state could not be saved, see {output}")
    return read_log(os.path.join(folder, f"stage{stage}")), text


def summarise(o, stage, experts, log, text):
    """What a stage's log tells, dict; also printed."""
    rows = log[WARM:]
    r = {"stage": stage, "experts": experts, "mfu": None, "foreseen_gb": foreseen_gb(text)}
    r |= {k: statistics.median(row[k] for row in rows) for k in ("tokens_per_s", "data_wait")}
    r["peak_gb"] = max(row["peak_gb"] for row in rows)
    if rows[0]["mfu"] is not None:
        r["mfu"] = statistics.median(row["mfu"] for row in rows)
    mfu = "" if r["mfu"] is None else f"MFU {r['mfu']:.1%}  "
    print(f"stage {stage}, experts {experts:<9}  {r['tokens_per_s']:8.0f} tokens/s  {mfu}"
          f"waiting for data {r['data_wait']:.1%}  peak {r['peak_gb']:.1f} GB, "
          f"foreseen {r['foreseen_gb']:.1f}", flush=True)
    if o.save:
        save_s, step_s = log[-1]["save_s"], step_seconds(log, WARM, o.steps - 1)
        r |= {"save_s": save_s, "save_share": save_s / (save_s + 1000 * step_s)}
        print(f"         saving the state takes {save_s:.1f} s; once in 1000 steps it is "
              f"{r['save_share']:.2%} of the time", flush=True)
    return r


def compare_training(o):
    """Train both stages for some steps, without and with generated experts; print the measurements.

    A step has two micro-batches on each rank: gradients accumulate, as in larger steps.
    """
    world = torch.cuda.device_count() or 1
    write_data(o.out, 2 * world * o.micro_batch_size * o.steps)
    write_parts(o.out, o.train)
    found = []
    for experts in ("none", "generated"):
        for stage in (1, 2):
            found.append(summarise(o, stage, experts, *train_stage(o, stage, experts, world)))
        shutil.rmtree(os.path.join(o.out, experts, "stage2"))  # 13 GB that are not needed
    for without, ours in zip(found[:2], found[2:]):
        cost = without["tokens_per_s"] / ours["tokens_per_s"] - 1
        print(f"stage {without['stage']}: experts cost {cost:.1%} of the time")
    print(json.dumps(found))


def run():
    o = Options(**parse(Options))
    if o.train:
        compare_training(o)
    elif o.make:
        make(o)
    elif o.only:
        measure(o)
    else:
        compare(o)


if __name__ == "__main__":
    main(run)
