"""Both stages of train.py on random weights and invented data, without experts and with them."""
import dataclasses
import os
import shutil
import statistics
import subprocess
import sys

import numpy as np
import torch

from cli import UserError
from data import Preprocess
from experiments.processes import last_line, read_log, ROOT
from experiments.speed.inputs import photograph
from experiments.speed.shapes import BIG, meaningless_tokenizer, random_like, SHAPES
from formats.export import write_llama, write_vision
from formats.json_files import write_json
from model import CLIP, Llama, VLMConfig
from training.plan import foreseen_gb

DATA = {1: "captions.json", 2: "chat.json"}
WARM = 2  # first steps of a stage, which are not counted


def write_data(folder, samples):
    """FOLDER/images of 640 x 480, JSON files with numbers for words, as many as LLaVA's have."""
    rng = np.random.default_rng(0)
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    for i in range(64):
        photograph(rng).save(os.path.join(folder, "images", f"{i}.jpg"))

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


def rows_of(o):
    """Samples of a micro-batch."""
    return o.batch_size or 16


def step_seconds(log, start, stop):
    """Mean seconds of the steps start .. stop - 1; eta_s has the mean of all steps so far."""
    spent = {n: n * log[n - 1]["eta_s"] / (len(log) - n) for n in (start, stop)}
    return (spent[stop] - spent[start]) / (stop - start)


def train_stage(o, stage, experts, world):
    """Run a stage by train.py, `experts` generated|none -> (its log, what it printed)."""
    folder, output = os.path.join(o.out, experts), os.path.join(o.out, f"{experts}_{stage}.txt")
    words = ["--stage", stage, "--preset", o.size if o.size in BIG else "1b", "--out", folder,
             "--device", o.device, "--dtype", o.dtype,
             "--data", os.path.join(o.out, DATA[stage]), "--images", os.path.join(o.out, "images"),
             "--steps", o.steps, "--batch_size", 2 * world * rows_of(o),
             "--micro_batch_size", rows_of(o), "--overwrite"]
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
    if o.save and "training goes on, older states are kept" in text:
        raise UserError(f"the state could not be saved, see {output}")
    return read_log(os.path.join(folder, f"stage{stage}")), text


def summarise(o, stage, experts, log, text):
    """What a stage's log tells, dict; also printed."""
    rows = log[WARM:]
    r = {"what": "stages", "stage": stage, "experts": experts, "mfu": None,
         "foreseen_gb": foreseen_gb(text)}
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


def train_stages(o):
    """Train both stages for some steps, without and with generated experts; yield what `summarise`
    tells of each.

    A step has two micro-batches on each rank: gradients accumulate, as in larger steps.
    """
    world = torch.cuda.device_count() if o.device == "cuda" else 1
    write_data(o.out, 2 * world * rows_of(o) * o.steps)
    write_parts(o.out, o.size)
    for experts in ("none", "generated"):
        for stage in (1, 2):
            yield summarise(o, stage, experts, *train_stage(o, stage, experts, world))
        shutil.rmtree(os.path.join(o.out, experts, "stage2"))  # 13 GB that are not needed


def compare_training(o):
    """The rows of `train_stages`; print what experts cost."""
    found = list(train_stages(o))
    for without, ours in zip(found[:2], found[2:]):
        cost = without["tokens_per_s"] / ours["tokens_per_s"] - 1
        print(f"stage {without['stage']}: experts cost {cost:.1%} of the time")
    return found
