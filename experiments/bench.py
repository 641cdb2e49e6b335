"""How fast training is; how long a model takes to load, here and in transformers; how much of a batch is padding.

    python bench.py --train 7b --out DIR    trains both stages for some steps on random weights, with experts and without
    python bench.py --make 7b --out DIR     a folder like llava-hf's with the true shapes of LLaVA-1.5 and random weights
    python bench.py --load DIR              loads it in a fresh process with weights.load, in another with transformers
    python bench.py --padding J.json --llm DIR  the share of padding in batches put together at random, as LLaVA does, and as here

The last line of standard output is one JSON object. `--load` needs Linux, and transformers.
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
from tqdm import tqdm

import weights
from cli import main, parse, UserError
from data import Conversations, Preprocess, PromptFormat, SYSTEM
from formats.export import write_llama, write_llava, write_vision
from formats.folders import resolve
from formats.json_files import write_json
from formats.sentencepiece import layout_of_llama
from formats.tokenizer import Tokenizer
from formats.weight_files import split_shards, tensors, weight_files, write_file
from model import CLIP, Llama, LlamaConfig, VisionConfig, VLMConfig
from training.feed import BatchSampler, padding_share
from training.plan import foreseen_gb
from weights import build_empty


SHAPES = {  # CLIP and Llama
    "7b": (VisionConfig(), LlamaConfig(context=4096)),
    "13b": (VisionConfig(), LlamaConfig(5120, 40, 40, 40, 13824, context=4096)),
    "1b": (VisionConfig(), LlamaConfig(1536, 10, 12, 12, 4096)),  # half a billion, for a quick try
    "tiny": (VisionConfig(28, 14, 32, 2, 2, 64), LlamaConfig(32, 4, 4, 4, 64, 400)),  # to try the program
}
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
WARM = 2  # steps of a run that are not counted


@dataclass
class Options:
    """Measure how training runs (--train), how a checkpoint loads (first --make one, then --load it), how orders pad (--padding)."""
    train: Literal[(*SHAPES,)] | None = None  # train a model of this size, its weights random
    steps: int = 12                       # of each stage, the first two not counted
    save: bool = False                    # with --train: save the state once, too: 12 bytes of disk for each trained parameter
    make: Literal[(*SHAPES,)] | None = None  # write a folder with a model of this size, its weights random
    out: str | None = None                # the folder of either
    dtype: Literal["bfloat16", "float16"] = "bfloat16"  # of its weights
    format: Literal["safetensors", "bin"] = "safetensors"  # of its files
    load: str | None = None               # folder to load in bfloat16, here and with transformers
    cold: bool = False                    # drop the folder's files from the system's cache before each time
    only: Literal["ours", "transformers"] | None = None  # measure one of them, in this process
    padding: str | None = None            # JSON file of training data to put batches together from
    llm: str | None = None                # folder or hub name of a Llama, for its tokenizer
    image_tokens: int = 576               # positions of a picture
    ranks: int = 8                        # that take a step's samples together
    micro_batch_size: int = 16            # samples that a rank takes at once

    def __post_init__(self):
        wanted = [bool(self.train), bool(self.make), bool(self.load), bool(self.padding)]
        if sum(wanted) != 1 or any(wanted[:2]) != bool(self.out) or bool(self.padding) != bool(self.llm):
            raise UserError("say --train SIZE --out FOLDER, --make SIZE --out FOLDER, --load FOLDER, or --padding FILE --llm FOLDER")
        if self.steps <= WARM + self.save:
            raise UserError(f"--steps {self.steps}: expected more than {WARM + self.save}, {WARM} are not counted")
        if min(self.ranks, self.micro_batch_size) < 1:
            raise UserError(f"--ranks {self.ranks}, --micro_batch_size {self.micro_batch_size}: expected more than 0")


# ---- Making a model of which only the shapes are real


def made_up_tokenizer(ids):
    """A `Tokenizer` of that many ids laid out like Llama's, with words that mean nothing."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    names += [f"▁{i}" for i in range(ids - len(names))]
    inner = layout_of_llama({name: i for i, name in enumerate(names)}, [])
    inner.add_special_tokens(names[:3])
    return Tokenizer(inner)


def write_random(folder, state, ending):
    """Write random tensors of the shapes and dtypes in `state`, a shard at a time: they are never all in memory.

    The numbers repeat themselves, from another place for each tensor: drawing seven billion takes minutes.
    """
    dtype = next(iter(state.values())).dtype
    pool = torch.empty(2**24, dtype=dtype).normal_(0, 0.02)

    def drawn(name):
        shape, start = state[name].shape, int(torch.randint(len(pool), ()))
        numbers = pool.roll(start).repeat(-(-shape.numel() // len(pool)))[:shape.numel()].view(shape)
        return numbers + 1 if "norm" in name and name.endswith("weight") else numbers.clone()

    files = split_shards(state).filename_to_tensors
    if ending == "bin":
        files = {f.replace("model", "pytorch_model").replace("safetensors", "bin"): names for f, names in files.items()}
    for file, names in files.items():
        path, shard = os.path.join(folder, file), {n: drawn(n) for n in names}
        torch.save(shard, path) if ending == "bin" else write_file(path, shard)
        del shard  # before the next one is drawn
    if len(files) > 1:
        index = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[ending] + ".index.json"
        weight_map = {name: file for file, names in files.items() for name in names}
        write_json(os.path.join(folder, index), {"metadata": {}, "weight_map": weight_map})


def make(o):
    vision, llm = SHAPES[o.make]
    torch.manual_seed(0)
    model = build_empty(VLMConfig(vision, llm, "none", "none")).to(getattr(torch, o.dtype))
    write_llava(o.out, model, made_up_tokenizer(llm.vocab), Preprocess(vision.image_size), SYSTEM,
                        lambda folder, state: write_random(folder, state, o.format))
    files = [path for path, _ in weight_files(o.out)]
    print(json.dumps({"folder": o.out, "bytes": sum(map(os.path.getsize, files)), "files": len(files)}))


# ---- Loading


def memory(field):
    """Bytes of this process: VmRSS, resident now, or VmHWM, the most that ever was. Pages mapped from files count."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field))


def measure(o):
    """Load in this process; print seconds and peak memory above that after the imports."""
    if o.only == "transformers":
        from transformers import LlavaForConditionalGeneration, logging  # only this comparison needs it
        logging.disable_progress_bar()
        load = lambda: LlavaForConditionalGeneration.from_pretrained(o.load, dtype=torch.bfloat16)
    else:
        load = lambda: weights.load(o.load, torch.bfloat16).model
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak starts anew from what is resident now
    baseline, began = memory("VmRSS"), time.perf_counter()
    model = load()
    loaded = time.perf_counter()
    for p in model.parameters():  # weights that are merely mapped are not there yet: read a number of every page of 4 KiB
        p.detach().flatten()[::4096 // p.element_size()].sum()
    print(json.dumps({"load_s": loaded - began, "touch_s": time.perf_counter() - loaded,
                      "peak_bytes": memory("VmHWM") - baseline}))


def prepare(files, cold):
    """Drop files from the system's cache, or read them so that as much of them is in it as there is room for."""
    for path in files:
        with open(path, "rb", buffering=0) as f:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED if cold else os.POSIX_FADV_NORMAL)
            while not cold and f.read(2**24):
                pass


def compare(o):
    """Measure both in processes of their own."""
    files = [path for path, _ in weight_files(o.load)]
    size = 2 * sum(tensor.numel() for _, tensor, _ in tensors(o.load))  # in bfloat16
    found = {"folder": o.load, "bytes": size, "cold": o.cold}
    for who in ("ours", "transformers"):
        prepare(files, o.cold)
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "experiments.bench", "--load", o.load, "--only", who], stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "PYTHONPATH": ROOT})
        if done.returncode:
            raise UserError(f"{who} could not load {o.load} (exit code {done.returncode})")
        found[who] = json.loads(done.stdout.splitlines()[-1])
        found[who] |= {"process_s": time.perf_counter() - began, "peak": found[who]["peak_bytes"] / size}
        print("{:<13} loads in {load_s:.2f} s, has every page read in {touch_s:.2f} s more, {process_s:.1f} s with start and imports; "
              "peak {peak:.3f} x {:.2f} GB".format(who, size / 1e9, **found[who]), flush=True)
    print(json.dumps(found))


# ---- Training


def made_up_data(folder, samples):
    """FOLDER/images, captions.json and chat.json: pictures of 640 x 480, and words that mean nothing, as many as LLaVA's data has about."""
    rng = np.random.default_rng(0)
    os.makedirs(os.path.join(folder, "images"), exist_ok=True)
    for i in range(64):  # smooth, as photographs are: noise takes a JPEG decoder longer
        rough = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        rough.resize((640, 480), Image.Resampling.BICUBIC).save(os.path.join(folder, "images", f"{i}.jpg"))

    def words(least, most):
        return " ".join(map(str, rng.integers(10, 100, rng.integers(least, most))))

    def record(i, turns):
        said = [{"from": who, "value": text} for pair in turns for who, text in zip(("human", "gpt"), pair)]
        said[0]["value"] = f"<image>\n{said[0]['value']}".strip()
        return {"id": str(i), "image": f"{i % 64}.jpg", "conversations": said}

    captions = [record(i, [("", words(8, 30))]) for i in range(samples)]
    chats = [record(i, [(words(8, 40), words(5, 120)) for _ in range(rng.integers(1, 7))]) for i in range(samples)]
    for name, records in (("captions", captions), ("chat", chats)):
        write_json(os.path.join(folder, f"{name}.json"), records)


def made_up_parts(folder, size):
    """FOLDER/clip and FOLDER/llm in Hugging Face's layout, their weights random."""
    vision, llm = SHAPES[size]
    vision = dataclasses.replace(vision, depth=vision.depth + 1)  # the last block, which LLaVA does not run
    torch.manual_seed(0)
    with torch.device("meta"):
        clip, llama = CLIP(vision).to(torch.bfloat16), Llama(llm, VLMConfig(vision, llm, "none", "none")).to(torch.bfloat16)
        norms = {f"post_layernorm.{n}": torch.empty(vision.width, dtype=torch.bfloat16) for n in ("weight", "bias")}
    random = lambda folder, state: write_random(folder, state, "safetensors")
    tokenizer = made_up_tokenizer(llm.vocab)
    write_vision(os.path.join(folder, "clip"), clip.state_dict() | norms, vision, Preprocess(vision.image_size), random)
    write_llama(os.path.join(folder, "llm"), llama.state_dict(), llm, tokenizer, random)


def step_seconds(log, start, stop):
    """Seconds a step takes, the mean of those from `start` to before `stop`: what a log says of the time left has the mean of all so far."""
    spent = lambda n: n * log[n - 1]["eta_s"] / (len(log) - n)
    return (spent(stop) - spent(start)) / (stop - start)


def rehearse(o):
    """Train some steps of both stages by train.py, with generated experts and with none, and say what its logs say."""
    world = torch.cuda.device_count() or 1
    batch = 2 * world * o.micro_batch_size  # accumulated once, as larger batches are many times
    made_up_data(o.out, batch * o.steps)
    made_up_parts(o.out, o.train)
    found = []
    for experts in ("none", "generated"):
        folder = os.path.join(o.out, experts)
        for stage, data in ((1, "captions"), (2, "chat")):
            words = ["--stage", stage, "--preset", "1b" if o.train == "tiny" else o.train, "--out", folder, "--steps", o.steps,
                     "--data", f"{o.out}/{data}.json", "--images", f"{o.out}/images", "--batch_size", batch,
                     "--micro_batch_size", o.micro_batch_size, "--overwrite"]
            words += ["--vision", f"{o.out}/clip", "--llm", f"{o.out}/llm", "--allow_random_llm"] if stage == 1 else []
            words += ["--visual_expert", "none", "--language_expert", "none"] if experts == "none" else []
            words += ["--save_every", o.steps - 1] if o.save else []  # once
            launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"] if world > 1 else []
            output = os.path.join(o.out, f"{experts}_{stage}.txt")
            with open(output, "w") as f:
                done = subprocess.run([sys.executable, *launch, os.path.join(ROOT, "train.py"), *map(str, words)], stdout=f, stderr=f)
            text = open(output).read()
            if done.returncode:
                raise UserError(f"stage {stage} ended with status {done.returncode}, see {output}: {text.strip().splitlines()[-1]}")
            with open(os.path.join(folder, f"stage{stage}", "log.jsonl")) as f:
                log = [json.loads(line) for line in f]
            rows = log[WARM:]
            of = lambda name: [row[name] for row in rows]
            found.append({"stage": stage, "experts": experts, "tokens_per_s": statistics.median(of("tokens_per_s")),
                          "mfu": statistics.median(of("mfu")) if rows[0]["mfu"] is not None else None,
                          "data_wait": statistics.median(of("data_wait")), "peak_gb": max(of("peak_gb")),
                          "foreseen_gb": foreseen_gb(text)})
            share = "n/a" if found[-1]["mfu"] is None else f"{found[-1]['mfu']:.1%}"
            print("stage {stage}, experts {experts:<9}  {tokens_per_s:8.0f} tokens/s  MFU {0:>5}  data {data_wait:.1%}  peak {peak_gb:.1f} GB, "
                  "foreseen {foreseen_gb:.1f}".format(share, **found[-1]), flush=True)
            if o.save:
                if "training goes on, the states saved before are kept" in text:
                    raise UserError(f"the state could not be saved, see {output}")
                save_s, step_s = log[-1]["save_s"], step_seconds(log, WARM, o.steps - 1)
                found[-1] |= {"save_s": save_s, "save_share": save_s / (save_s + 1000 * step_s)}
                print(f"         its state saved in {save_s:.1f} s: if every 1000 steps, {found[-1]['save_share']:.2%} of the time", flush=True)
        shutil.rmtree(os.path.join(folder, "stage2"))  # 13 GB that nobody wants
    for plain, ours in zip(found[:2], found[2:]):
        print(f"stage {plain['stage']}: experts cost {plain['tokens_per_s'] / ours['tokens_per_s'] - 1:.1%} of the time")
    print(json.dumps(found))


# ---- Padding


def words(record):
    """LLaVA's measure of a record: the words of its messages."""
    return sum(len(message["value"].split()) for message in record["conversations"])


def llava_order(sizes, pictured, ranks, micro, rng):
    """LLaVA's --group_by_modality_length (llava/train/llava_trainer.py), with one step's samples as its megabatch.

    Records with and without a picture are grouped apart: shuffled, cut into steps, each sorted and dealt out so that the
    ranks' sums are about the same. The last step of each kind, whole or not, is left for the end.
    sizes int64[n], pictured bool[n]; returns int64[n]
    """
    steps, left = [], []
    for kind in (True, False):
        order = rng.permutation(np.flatnonzero(pictured == kind))
        cuts = [order[i:i + ranks * micro] for i in range(0, len(order), ranks * micro)]
        for cut in cuts[:-1]:
            chunks = [[] for _ in range(ranks)]
            for i in sorted(cut, key=lambda i: -sizes[i]):
                min((c for c in chunks if len(c) < micro), key=lambda c: sizes[c].sum() if c else 0).append(i)
            steps.append(np.concatenate(chunks))
        left += cuts[-1:]
    return np.concatenate([steps[i] for i in rng.permutation(len(steps))] + [np.sort(np.concatenate(left))]).astype(np.int64)


def compare_padding(o):
    """Put the batches of an epoch together in three ways and count padding, with the true lengths and data.collate's rounding."""
    tokenizer = Tokenizer.load(resolve(o.llm))
    data = Conversations(o.padding, "", tokenizer, PromptFormat(system=SYSTEM, image_tokens=o.image_tokens))
    lengths = np.array([len(data[i].ids) for i in tqdm(range(len(data)), "records", mininterval=5)])
    rng, size = np.random.default_rng(0), o.ranks * o.micro_batch_size
    ours = BatchSampler(len(data), 0, size, data.lengths, data.pictured)
    if len(data) < size:
        raise UserError(f"--padding {o.padding}: {len(data)} records, a step of {o.ranks} x {o.micro_batch_size} wants more")
    orders = {"random": rng.permutation(len(data)),
              "llava": llava_order(np.array([words(data.record(i)) for i in range(len(data))]), data.pictured, o.ranks,
                                   o.micro_batch_size, rng),
              "ours": ours.epoch(0)}
    found = {"records": len(data), "ranks": o.ranks, "micro_batch_size": o.micro_batch_size, "mean_length": lengths.mean()}
    for name, order in orders.items():
        batches = order[:len(data) // size * size].reshape(-1, o.micro_batch_size)
        steps = lengths[batches].max(1).reshape(-1, o.ranks)
        # the second number: how long the step's slowest rank works, relative to how long all would if nothing were padded
        found[name] = {"padding": padding_share(lengths, batches), "slowest": steps.max(1).sum() / lengths[batches].mean(1).sum() * o.ranks}
        print(f"{name:<8} padding {found[name]['padding']:.1%}, a step as long as {found[name]['slowest']:.2f} without any")
    print(json.dumps(found))


def run():
    o = Options(**parse(Options))
    rehearse(o) if o.train else compare_padding(o) if o.padding else make(o) if o.make else measure(o) if o.only else compare(o)


if __name__ == "__main__":
    main(run)
