"""Training: stages 0, 1 and 2 as presets of one loop, sharded with FSDP2 at every world size.

    python train.py                                   the toy: stand-ins, alignment, instruction tuning, then scores
    torchrun --nproc_per_node 8 train.py --stage 1 --preset 7b --vision CLIP --llm VICUNA --data J.json --images DIR

A stage is a `Job` (model, data, loss, what to write at the end) made by `stage_0` or `stage_1_or_2`; `train` runs it. What trains
in which stage is said in TRAINS. A run's folder holds log.jsonl, state/ while it lasts, and the checkpoint when it is done.
"""
import contextlib
import dataclasses
import functools
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import eval
import memory
import toy
import weights
import world
from cli import UserError, main, parse
from data import (IGNORE, MULTIPLE, SYSTEM, TAG, Conversations, Layout, Order, collate, conversation, encode, open_image, pixels,
                  train_tokenizer)
from hypernet import HyperNetwork
from model import Attention, Block, CLIP, VisionAttention, VisionBlock
from muon import Muon

# What may differ between a run and its continuation. All else would make another run of it, see `first_step`.
FREE = {"out", "resume", "overwrite", "steps", "epochs", "log_every", "val_every", "save_every", "keep", "workers", "device",
        "micro_batch_size", "skip_bad_images", "allow_random_llm", "checkpointing"}

# What each stage trains, by prefix of the parameters' names; everything else is frozen (paper §3, "training").
TRAINS = {
    (0, "full"): ("",),
    (0, "peft"): ("",),
    (1, "full"): ("projector.",),
    (1, "peft"): ("projector.",),
    (2, "full"): ("projector.", "llm."),
    (2, "peft"): ("projector.", "llm.hypernet.", "llm.guidance_norm.", "llm.expert."),
}

# LLaVA-1.5's recipe, which HyperLLaVA §4 keeps: scripts/v1_5/pretrain.sh and finetune.sh, for 8 GPUs. Their other numbers are the
# defaults below: --lr_scheduler_type cosine, --warmup_ratio 0.03, --weight_decay 0, transformers' AdamW (0.9, 0.999, 1e-8), no
# clipping (zero2.json and zero3.json name none), --model_max_length 2048, --bf16.
LLAVA = {
    1: dict(template="plain",          # --version plain
            aspect="crop",             # no --image_aspect_ratio: CLIP's processor crops
            batch_size=256, micro_batch_size=32,  # --per_device_train_batch_size 32, --gradient_accumulation_steps 1
            lr=1e-3, epochs=1,         # --learning_rate, --num_train_epochs
            checkpointing="full",      # --gradient_checkpointing
            workers=4),                # --dataloader_num_workers
    2: dict(template="v1", aspect="pad",          # --version v1, --image_aspect_ratio pad
            batch_size=128, micro_batch_size=16,  # --per_device_train_batch_size 16, --gradient_accumulation_steps 1
            lr=2e-5, epochs=1,
            group_by_length=True,      # --group_by_modality_length; here by length alone
            checkpointing="full", workers=4),
}
# TinyLlama and CLIP-L on one card of 24 GB: the same recipe, in bites that fit.
SMALL = {stage: recipe | dict(micro_batch_size=size) for (stage, recipe), size in zip(LLAVA.items(), (16, 4))}
PRESETS = {
    "7b": LLAVA,
    "13b": LLAVA,
    "1b": SMALL,
    "toy": {
        0: dict(batch_size=32, lr=2e-3, muon_lr=12e-3, steps=640, schedule="wsd", clip=1.0),
        1: dict(template="plain", batch_size=32, lr=3e-3, steps=200, schedule="wsd", clip=1.0),
        2: dict(template="v1", batch_size=32, lr=2e-3, muon_lr=4e-3, steps=1000, schedule="wsd", clip=1.0),
    },
}
TOY = dict(vision="stage0/clip", llm="stage0/llm", system="", aspect="pad", expert_embed=16, group_by_length=True, cache_features=True,
           attention="plain", log_every=20, val_every=300, save_every=200)


@dataclass
class Options:
    """Train HyperLLaVA. Without --stage: the toy from nothing to its scores. Options left out are the preset's."""
    stage: int | None = None         # 0: the toy's stand-ins; 1: align the projector; 2: instruction tuning
    preset: Literal["toy", "7b", "13b", "1b"] = "toy"  # recipe: batch, learning rate, steps, template
    vision: str | None = None        # stage 1, or an mm_projector.bin: folder or hub name of a CLIP
    llm: str | None = None           # the same of a Llama
    data: str | None = None          # LLaVA's JSON file
    images: str | None = None        # folder that its pictures' paths start from
    val: str | None = None           # JSON file for the held-out loss, pictures in the same folder
    out: str = "out/toy"             # a run's folder; stage N writes OUT/stageN
    init: str | None = None          # stage 2: checkpoint to start from (OUT/stage1), a LLaVA-1.5, or its mm_projector.bin
    resume: bool = False             # go on from the newest saved state of this stage
    overwrite: bool = False          # train a finished stage anew
    pictures: int = 16000            # the toy's training pictures, and as many texts
    seed: int = 0                    # of new weights and of the order of the data
    steps: int | None = None         # optimiser steps; from epochs if not given
    epochs: float | None = None      # passes over the data
    batch_size: int | None = None    # samples per optimiser step, over all ranks
    micro_batch_size: int | None = None  # samples a rank takes at once; the rest is accumulated
    lr: float | None = None          # peak learning rate of AdamW
    muon_lr: float | None = None     # peak learning rate of Muon for the matrices in blocks; none: AdamW for all
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up: a cosine to 0, or constant with a linear end
    warmup: float = 0.03             # share of the steps in which the rate rises
    cooldown: float = 0.4            # share of the steps in which wsd falls to 0
    clip: float | None = None        # largest gradient norm; none: not clipped, as LLaVA's
    tune: Literal["full", "peft"] = "full"  # stage 2: the Llama too, or experts and projector alone
    visual_expert: Literal["none", "1", "2", "both"] = "1"  # layers of the projector with an expert (Table 2)
    language_expert: Literal["none", "anterior", "posterior", "all"] = "posterior"  # blocks with one, from stage 2 on (Table 3)
    guidance_after: int | None = None  # blocks before language guidance is taken; none: half of them (Figure 3)
    guidance_pool: Literal["instruction", "prompt"] = "instruction"  # what it is averaged over: a turn's own text, or all of its prompt
    expert_embed: int = 64           # width of the guidance's embedding (Figure 4a)
    expert_rank: int = 16            # width of an expert's bottleneck (Figure 4b)
    template: Literal["plain", "v1"] = "v1"  # plain: picture and caption; v1: Vicuna's conversations
    system: str = SYSTEM             # text before the first turn of v1
    aspect: Literal["pad", "crop"] = "pad"  # make pictures square by padding or by cropping
    context: int | None = None       # longest sequence, image tokens included; none: the Llama's, 2048 at most
    group_by_length: bool = False    # samples of like length share a step, so that less is padded
    cache_features: bool = False     # run the frozen tower once per picture, before training; kept in memory
    attention: Literal["fused", "plain"] = "fused"  # plain is faster in bf16 on a CPU
    checkpointing: Literal["none", "selective", "full"] = "none"  # recompute every second block, or each, in the backward pass
    dtype: Literal["bfloat16", "float32"] | None = None  # of the computation; none: bf16 where it is fast
    device: Literal["cuda", "cpu"] | None = None  # none: cuda if there is one
    workers: int = 0                 # processes that prepare batches
    skip_bad_images: bool = False    # a record whose picture cannot be read gives its place to the next one in the file
    allow_random_llm: bool = False   # stage 1 with a Llama that knows no language, to rehearse
    log_every: int = 1               # steps between printed lines; log.jsonl gets every step
    val_every: int = 100             # steps between held-out losses
    save_every: int = 1000           # steps between saved states
    keep: int = 1                    # saved states to keep, the newest ones

    def __post_init__(self):
        for name in ("steps", "epochs", "batch_size", "micro_batch_size", "pictures", "log_every", "val_every",
                     "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name} {value}: expected more than 0")


@dataclass
class Job:
    """One stage: what the loop trains, on what, and what becomes of it."""
    model: nn.Module
    lengths: np.ndarray               # int64[samples], how long each of the training data's samples is
    batch: Callable                   # (rows) -> batch of the training data with those indices
    held_out: list                    # batches of the held-out data
    loss: Callable                    # (model, batch) -> loss summed over the batch's supervised tokens
    tokens: Callable                  # (batch) -> their number
    finish: Callable                  # ({name: tensor}) -> writes the finished checkpoint
    sample: Callable                  # (index) -> the Sample of the training data, without its picture
    text: list = dataclasses.field(default_factory=list)  # batches without pictures, to see whether a frozen Llama can read
    skipped: list = dataclasses.field(default_factory=list)  # what is wrong with pictures that `batch` did without


# ---- World and precision: the only lines that know where and in what they run


def pick_device(o):
    """cuda or cpu, as asked for or, without a word, cuda if there is one."""
    return weights.pick_device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def start_world(device):
    """Join torchrun's processes, or be a world of one; returns the mesh that parameters are sharded over."""
    if "WORLD_SIZE" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    else:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device, (dist.get_world_size(),))


def shard(model, mesh, dtype):
    """FSDP2: blocks, hypernetworks and the tower as units, then the root. Computes in `dtype`, reduces in fp32.

    A hypernetwork is called from many blocks, so it is a unit of its own that none of them owns.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in reversed(list(model.modules())):  # children before parents
        if isinstance(module, (Block, VisionBlock, HyperNetwork, CLIP)):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def recompute(model, which):
    """Forget what a Llama block computed, and compute it again in the backward pass: each block, or every second one."""
    for block in {"none": [], "selective": model.llm.layers[1::2], "full": model.llm.layers}[which]:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def freeze(model, prefixes, dtype):
    """Leave trainable what starts with one of `prefixes`, as fp32 masters; the rest is frozen, in `dtype`.

    "llm.expert." stands for the experts of all blocks.
    """
    for name, p in model.named_parameters():
        name = "llm.expert." if ".expert." in name and name.startswith("llm.") else name
        trains = name.startswith(prefixes)
        p.requires_grad_(trains)
        p.data = p.data.to(torch.float32 if trains else dtype)


# ---- Optimisation


def optimisers(model, o):
    """AdamW for all that trains or, with a muon_lr, Muon for the matrices inside blocks and AdamW for the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    in_block = lambda n, p: ".layers." in n and ".expert." not in n and p.ndim == 2
    matrices = [p for n, p in named if o.muon_lr and in_block(n, p)]
    rest = [p for n, p in named if not (o.muon_lr and in_block(n, p))]
    adam = torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, foreach=True)
    return [adam] + ([Muon(matrices, lr=o.muon_lr)] if matrices else [])


def schedule(step, o):
    """The factor on the learning rate at 0-based `step`: rises in the warm-up, then a cosine, or flat and a linear end.

    The first step has factor 0 under cosine, as in LLaVA's trainer.
    """
    warm = math.ceil(o.warmup * o.steps)
    if step < warm:
        return (step + (o.schedule == "wsd")) / warm
    if o.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, o.steps - warm)))
    return min(1.0, (o.steps - step) / max(1, o.cooldown * o.steps))


def total(values, mesh):
    """list[float]: each of some numbers, summed over all ranks."""
    t = torch.tensor(values, device=mesh.device_type, dtype=torch.float64 if mesh.device_type == "cpu" else torch.float32)
    dist.all_reduce(t)
    return t.tolist()


# ---- Ending together: what one rank meets, all of them must hear of, or they wait for it in their next collective


class Agreed(UserError):
    """A user's error that all ranks raise, in the same words."""


def gather(value):
    """What each rank brings, a list by rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def agreed(work):
    """The result of work() on this rank; if it is a user's error on any, Agreed with the first of them on all."""
    result = fault = None
    try:
        result = work()
    except (UserError, OSError) as error:
        fault = str(error)
    faults = [f for f in gather(fault) if f is not None]
    if faults:
        raise Agreed(faults[0])
    return result


class Signals:
    """SIGTERM and Ctrl-C while it is entered: noted in `got`, for the loop to look at between two steps.

    torchrun passes a signal on that a terminal has sent already, so that only a later Ctrl-C ends the process at once.
    """

    def __enter__(self):
        self.got, self.when = 0, 0.0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        if self.got and number == signal.SIGINT and time.monotonic() - self.when > 2:
            raise KeyboardInterrupt
        if not self.got:
            self.got, self.when = number, time.monotonic()

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- Data order: f(seed, epoch, step) and nothing else


class Feed(Dataset):
    """The micro-batches of this rank, in order: item k is micro-batch k % accumulation of step k // accumulation.

    An item is (the batch or a UserError, what is wrong with the pictures that were skipped in it).
    A step's samples are the same whatever the world: micro-batch j of the step goes to rank j % world.
    """

    def __init__(self, job, o):
        self.job, self.o = job, o
        self.order = Order(len(job.lengths), o.seed, o.batch_size, job.lengths if o.group_by_length else None)
        self.accumulation = o.batch_size // (o.micro_batch_size * dist.get_world_size())

    def __len__(self):
        return self.o.steps * self.accumulation

    def __getitem__(self, k):
        step, turn = divmod(k, self.accumulation)
        rows = self.order.step(step)
        first = (turn * dist.get_world_size() + dist.get_rank()) * self.o.micro_batch_size
        self.job.skipped.clear()
        try:
            return self.job.batch(rows[first:first + self.o.micro_batch_size]), list(self.job.skipped)
        except UserError as error:  # handed over like a batch: raised in a worker, it would arrive inside a traceback
            return error, []


# ---- State: what a run needs to go on


def state_of(model, opts):
    """Model and optimiser state of what trains, as torch.distributed.checkpoint wants it."""
    part, optim = get_state_dict(model, opts, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": part, "optim": optim}


def save_state(folder, step, model, opts, o):
    """Write folder/step_NNNNNN whole or not at all, then drop all but the newest --keep of them.

    Returns why it could not be written, "" if it was: a full disk leaves the states that were there and ends nothing.
    Whatever ends in .tmp was cut off while it was written or removed.
    """
    path = os.path.join(folder, f"step_{step:06d}")

    def begin():
        if dist.get_rank() == 0:
            drop(folder, [name for name in os.listdir(folder) if name.endswith(".tmp")] if os.path.isdir(folder) else [])
            os.makedirs(path + ".tmp")
            with open(os.path.join(path + ".tmp", "options.json"), "w") as f:
                json.dump(dataclasses.asdict(o), f)

    def publish():
        if dist.get_rank() == 0:
            drop(folder, [os.path.basename(path)] if os.path.isdir(path) else [])
            os.replace(path + ".tmp", path)
            kept = [f"step_{n:06d}" for n in saved_steps(folder)[-o.keep:]]
            drop(folder, [name for name in os.listdir(folder) if name not in kept])

    try:
        agreed(begin)
        dcp.save(state_of(model, opts), checkpoint_id=path + ".tmp")
        agreed(publish)
        return ""
    except (Agreed, CheckpointException) as error:  # the same on all ranks
        if dist.get_rank() == 0:
            shutil.rmtree(path + ".tmp", ignore_errors=True)
        reasons = [str(e[0]) for e in error.failures.values()] if isinstance(error, CheckpointException) else [str(error)]
        return f"the state after step {step} could not be saved in {folder} ({reasons[0].splitlines()[0]})"


def drop(folder, names):
    """Remove what `save_state` wrote, by way of names that no longer count as saved."""
    for name in names:
        path = os.path.join(folder, name)
        gone = path.removesuffix(".tmp") + ".tmp"
        if path != gone:
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(path, gone)
        shutil.rmtree(gone)


def saved_steps(folder):
    """Steps with a whole saved state, ascending."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(n.removeprefix("step_")) for n in names if n.startswith("step_") and not n.endswith(".tmp")
                  and os.path.exists(os.path.join(folder, n, ".metadata")))


def first_step(o):
    """How many steps are done already: those of the newest saved state with --resume, else none.

    Raises UserError if there is none to resume, if it was made with other options, or if one would be lost.
    """
    states = os.path.join(stage_folder(o), "state")
    saved = saved_steps(states)
    if not o.resume:
        if saved and not o.overwrite:
            raise UserError(f"{states} holds a run that was stopped after step {saved[-1]}: --resume goes on with it, "
                            f"--stage {o.stage} --overwrite starts anew")
        return 0
    if not saved:
        raise UserError(f"--resume: no saved state in {states}")
    with open(os.path.join(states, f"step_{saved[-1]:06d}", "options.json")) as f:
        had = json.load(f)
    for name, value in dataclasses.asdict(o).items():
        if name not in FREE and had.get(name, value) != value:
            raise UserError(f"--resume: the run had --{name} {had[name]}, not {value}")
    if o.steps and saved[-1] > o.steps:
        raise UserError(f"--resume: the run has taken {saved[-1]} steps, more than --steps {o.steps}")
    return saved[-1]


def load_state(folder, step, model, opts):
    """Put the state saved after `step` steps, on any number of ranks, into model and optimisers."""
    state = state_of(model, opts)
    dcp.load(state, checkpoint_id=os.path.join(folder, f"step_{step:06d}"))
    set_state_dict(model, opts, model_state_dict=state["model"], optim_state_dict=state["optim"],
                   options=StateDictOptions(ignore_frozen_params=True, strict=False))


# ---- The loop


def shift_ratio(model):
    """{block: |E_L| / |FFN|} filled in by hooks as the model runs, and the hooks' removal: are the experts at work?"""
    ratios, handles = {}, []
    for n, block in enumerate(model.llm.layers):
        if getattr(block, "expert", None) is not None:
            norms = {}
            handles.append(block.mlp.register_forward_hook(
                lambda m, i, out, norms=norms: norms.update(ffn=out.float().norm())))
            handles.append(block.expert.register_forward_hook(
                lambda m, i, out, norms=norms, n=n: ratios.update({n: (out.float().norm() / norms["ffn"]).item()})))
    return ratios, lambda: [h.remove() for h in handles]


@torch.no_grad()
def evaluate(job, model, mesh):
    """Held-out loss per token, and |E_L| / |FFN| averaged over the blocks with an expert (none: left out)."""
    ratios, remove = shift_ratio(model)
    loss = tokens = 0.0
    for batch in job.held_out:
        batch = batch.to(mesh.device_type)
        loss, tokens = loss + job.loss(model, batch).item(), tokens + job.tokens(batch)
    remove()
    found = {"held_out": loss / tokens}
    return found | ({"expert_share": sum(ratios.values()) / len(ratios)} if ratios else {})


@dataclass
class Step:
    """What all ranks know of a step."""
    loss: float       # per supervised token
    norm: float       # of the gradient
    positions: float  # text and image tokens, without padding
    operations: float  # multiplications and additions, see `operations`
    skipped: float    # pictures that could not be read
    stop: int         # the signal that one of the ranks got before it, or 0


def fail(error):
    raise error


def named(batches, guilty=lambda: False):
    """The records of this step, by rank; those of the guilty ranks alone if there are any."""
    ranks = gather((guilty(), [r for b in batches for r in b.records]))
    some = any(bad for bad, _ in ranks)
    return "; ".join(f"rank {n}, records {', '.join(records)}" for n, (bad, records) in enumerate(ranks) if bad or not some)


def train_step(job, model, opts, batches, step, o, mesh, skipped=0, stop=0):
    """One optimiser step over this rank's micro-batches -> `Step`.

    batches  of this rank, or in place of one the UserError that making it met
    skipped  pictures that this rank did without; stop: the signal it got, or 0

    The loss is the sum over supervised tokens divided by their number in the *global* batch, so that accumulation and
    the number of ranks leave the gradients alone. (LLaVA takes the mean of each micro-batch's mean.) What the ranks must
    agree on besides, an error or a signal, travels with that number.
    """
    faults = [b for b in batches if isinstance(b, UserError)]
    whole = [b for b in batches if not isinstance(b, UserError)]
    tokens, positions, work, skips, failed, *signals = total(
        [sum(job.tokens(b) for b in whole), sum(b.lengths.sum().item() for b in whole),
         sum(operations(model, b, o) for b in whole) if o.stage else 0, skipped, len(faults),
         stop == signal.SIGTERM, stop == signal.SIGINT], mesh)
    if failed:
        agreed(lambda: fail(faults[0]) if faults else None)
    if tokens == 0:
        raise Agreed(f"step {step}: no supervised token in its batch of {named(batches)}")
    summed = 0.0
    for batch in batches:
        loss = job.loss(model, batch.to(mesh.device_type)) / tokens
        (loss * dist.get_world_size()).backward()  # FSDP averages over ranks, the loss is a sum
        summed += loss.item()
    loss, = total([summed], mesh)
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], o.clip or math.inf)
    norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise Agreed(f"step {step}: loss {loss}, gradient norm {norm}, stopped before the update; "
                     f"{named(batches, lambda: not math.isfinite(summed))}")
    for opt in opts:
        opt.step()
        opt.zero_grad()
    return Step(loss, norm, positions, work, skips, signal.SIGINT if signals[1] else signal.SIGTERM if signals[0] else 0)


@torch.no_grad()
def check_reads(job, model, mesh):
    """UserError if a frozen Llama does not know the language: the loss of answers, given questions, is near ln(vocab).

    That is what weights which were never loaded give, or someone else's. Stage 1 would then fit the projector to noise.
    """
    loss = sum(job.loss(model, b.to(mesh.device_type)).item() for b in job.text) / sum(job.tokens(b) for b in job.text)
    chance = math.log(model.cfg.llm.vocab)
    if not loss < 0.9 * chance:
        raise Agreed(f"the Llama does not know the language of the data: its loss on the answers is {loss:.2f} per token, mere "
                     f"guessing gives {chance:.2f}. Look at --llm, or rehearse with --allow_random_llm")


def cut_log(path, step):
    """Drop the lines of log.jsonl from `step` on: a resumed run writes them again. Returns the last one kept, or {}."""
    lines = open(path).readlines() if os.path.exists(path) else []
    kept = lines[:step] if step else []  # a line a step, the last one perhaps cut off by a kill
    with open(path + ".tmp", "w") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)
    return json.loads(kept[-1]) if kept else {}


def prepared(model, o, mesh):
    """(the model frozen where the stage does not train it, and sharded; its optimisers)."""
    for module in model.modules():
        if isinstance(module, (Attention, VisionAttention)):
            module.plain = o.attention == "plain"
    freeze(model, TRAINS[o.stage, o.tune], getattr(torch, o.dtype))
    recompute(model, o.checkpointing)
    model = shard(model, mesh, getattr(torch, o.dtype))
    return model, optimisers(model, o)


def row_of(done, step, seconds, waited, average, o):
    """A step's line in log.jsonl. `seconds` it took, of which it `waited` for data; `average`: seconds a step so far."""
    rate = peak_rate(o)
    return {"step": step, "loss": done.loss, "lr": o.lr * schedule(step, o), "grad_norm": done.norm,
            "tokens_per_s": done.positions / seconds,
            "mfu": done.operations / seconds / (rate * dist.get_world_size()) if rate and o.stage else None,
            "data_wait": waited / seconds, "peak_gb": memory.peak(o.device) / memory.GB,
            "eta_s": average * (o.steps - step - 1)}


def keep_state(folder, steps, model, opts, o, stop, bar):
    """Save the state after so many steps. A failure is a warning; after the signal `stop` it is an error, else the run ends."""
    fault = save_state(folder, steps, model, opts, o)
    if fault and stop:
        raise Agreed(f"stopped by {signal.Signals(stop).name}, and {fault}")
    if fault and dist.get_rank() == 0:
        bar.write(f"warning: {fault}; training goes on, the states saved before are kept", file=sys.stderr)
    if stop:
        if dist.get_rank() == 0:
            bar.write(f"stopped by {signal.Signals(stop).name} after step {steps}, state saved: --resume goes on", file=sys.stderr)
        sys.exit(130 if stop == signal.SIGINT else 0)


def train(job, o, mesh):
    """Run a job for o.steps optimiser steps and write its checkpoint."""
    out, rank = stage_folder(o), dist.get_rank()
    o.steps = o.steps or math.ceil(o.epochs * len(job.lengths) / o.batch_size)
    model, opts = prepared(job.model, o, mesh)
    text = agreed(lambda: plan(model, opts, job, o))
    if rank == 0:
        print(text, file=sys.stderr)

    states, log_path = os.path.join(out, "state"), os.path.join(out, "log.jsonl")
    start = agreed(lambda: first_step(o))
    if start:
        load_state(states, start, model, opts)
    elif rank == 0:
        shutil.rmtree(states, ignore_errors=True)
    if o.stage == 1 and not start and not o.allow_random_llm:
        check_reads(job, model, mesh)
    skipped = 0
    if rank == 0:
        skipped = cut_log(log_path, start).get("skipped_images", 0)
    feed = Feed(job, o)
    loader = iter(DataLoader(feed, batch_size=None, sampler=range(start * feed.accumulation, len(feed)),
                             num_workers=o.workers, multiprocessing_context="fork" if o.workers else None,
                             worker_init_fn=lambda n: signal.signal(signal.SIGINT, signal.SIG_IGN)))  # Ctrl-C reaches them too
    first = began = time.perf_counter()
    with open(log_path, "a") if rank == 0 else contextlib.nullcontext() as log, \
            tqdm(range(start, o.steps), f"stage {o.stage}", initial=start, total=o.steps, disable=rank > 0,
                 mininterval=1 if sys.stderr.isatty() else 15) as bar, Signals() as signals:
        for step in bar:
            asked = time.perf_counter()
            batches, bad = zip(*(next(loader) for _ in range(feed.accumulation)))
            waited = time.perf_counter() - asked
            for text in (text for texts in bad for text in texts):
                bar.write(f"skipped: {text}", file=sys.stderr)
            factor = schedule(step, o)
            for opt, lr in zip(opts, (o.lr, o.muon_lr)):
                opt.param_groups[0]["lr"] = lr * factor
            done = train_step(job, model, opts, batches, step, o, mesh, sum(map(len, bad)), signals.got)

            now = time.perf_counter()
            row = row_of(done, step, now - began, waited, (now - first) / (step + 1 - start), o)
            skipped += int(done.skipped)
            row |= {"skipped_images": skipped} if skipped else {}
            if job.held_out and (step + 1 == o.steps or (step + 1) % o.val_every == 0):
                row |= evaluate(job, model, mesh)
            began = time.perf_counter()
            if rank == 0:
                print(json.dumps(row), file=log, flush=True)
            if rank == 0 and (step % o.log_every == 0 or "held_out" in row):
                bar.write(line(row, o), file=sys.stderr)
            if done.stop or (step + 1) % o.save_every == 0 and step + 1 < o.steps:
                keep_state(states, step + 1, model, opts, o, done.stop, bar)
    if skipped and rank == 0:
        print(f"{skipped} times a picture could not be read and the next record took its place", file=sys.stderr)
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    agreed(lambda: job.finish({k: v.to(getattr(torch, o.dtype)) for k, v in tensors.items()}) if rank == 0 else None)
    if rank == 0:
        shutil.rmtree(states, ignore_errors=True)
    dist.barrier()


def part_of(name):
    """What the plan calls the part of the model that a parameter belongs to."""
    words = name.split(".")
    if "hypernet" in words:
        return "hypernet"
    return "experts" if {"expert", "expert_1", "expert_2", "guidance_norm"} & set(words) else words[0]


def plan(model, opts, job, o):
    """What is about to happen, on one screen. Raises UserError if it needs more memory than there is."""
    parts = {}
    for name, p in model.named_parameters():
        parts.setdefault(part_of(name), [0, 0])[0 if p.requires_grad else 1] += p.numel()
    n, ranks = len(job.lengths), dist.get_world_size()
    some = [job.sample(i) for i in range(0, n, max(1, n // 256))]
    trained = [int((s.labels != IGNORE).sum()) for s in some]
    epochs = o.steps * o.batch_size / n
    text = [f"stage {o.stage}: {n:,} samples, {o.steps:,} steps of {o.batch_size} ({epochs:.2f} epochs), "
            f"{o.dtype} on {ranks} x {o.device}, {o.micro_batch_size} samples a rank at once",
            f"  supervised tokens: about {np.mean(trained) * o.steps * o.batch_size:,.0f} (from {len(some)} samples)"]
    text += [f"  {part:<12} {a:>14,} trained {b:>14,} frozen" for part, (a, b) in parts.items()]
    weights_, gradients, moments = memory.state(model, opts, ranks)
    size = getattr(torch, o.dtype).itemsize
    estimate = memory.Estimate(weights_, gradients, moments, 0, 0)
    if o.stage > 0:  # the toy's stand-ins are small, and no VLM
        estimate.gathered = memory.gathered(model, size)
        estimate.activations = memory.activations(
            model.cfg, o.micro_batch_size, max(len(s.ids) for s in some), max(trained), o.micro_batch_size, size,
            TRAINS[o.stage, o.tune] == TRAINS[2, "full"], o.attention == "plain", o.checkpointing, o.device)
    shares = ", ".join(f"{name} {size / memory.GB:.2f}" for name, size in dataclasses.asdict(estimate).items())
    text.append(f"  memory of a rank, GB: {shares}; together {estimate.total / memory.GB:.2f}")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if o.device == "cpu" else 1
    if estimate.total * here > memory.room(o.device):
        raise UserError(f"the run needs about {estimate.total * here / memory.GB:.1f} GB, the {o.device} has "
                        f"{memory.room(o.device) / memory.GB:.1f}: a smaller --micro_batch_size or --checkpointing full makes "
                        f"activations smaller ({estimate.activations / memory.GB:.1f}), more ranks or --tune peft the rest")
    return "\n".join(text)


# Dense bf16 operations per second, from NVIDIA's data sheets, by the device's whole name or what comes before a "-" in it.
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA A10G": 70e12,
        "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}


def peak_rate(o):
    """Operations per second that the device can do in this dtype, or None where that is not known."""
    if o.device != "cuda" or o.dtype != "bfloat16":
        return None
    return PEAK.get(torch.cuda.get_device_name().split("-")[0])


def operations(model, batch, o):
    """Multiplications and additions that a VLM's step needs for a batch, without padding or what checkpointing repeats.

    A product with P weights takes 2 P a position forwards and 2 P for the gradient of its input, and as much again for that
    of trained weights. The frozen tower only goes forwards; a frozen Llama passes gradients on. Attention is causal.
    """
    v, l, r = model.cfg.vision, model.cfg.llm, model.cfg.expert_rank
    passes = 3 if TRAINS[o.stage, o.tune] == TRAINS[2, "full"] else 2
    n, square, sites = batch.lengths.sum().item(), (batch.lengths ** 2).sum().item(), len(model.cfg.expert_blocks())
    kv = l.kv_heads * (l.width // l.heads)
    block = l.width * (2 * l.width + 2 * kv + 3 * l.hidden)
    found = l.depth * (passes * 2 * n * block + 3 * 2 * square * l.width) + passes * 2 * batch.trained * l.width * l.vocab
    found += 3 * 2 * sites * 3 * r * l.width * (n + batch.ids.shape[0] * batch.turns * model.cfg.expert_embed)
    tokens, pictures = v.tokens + 1, len(batch.visual)
    if batch.visual.ndim == 4:
        found += pictures * v.depth * (2 * tokens * v.width * (4 * v.width + 2 * v.hidden) + 4 * tokens ** 2 * v.width)
    return found + 3 * 2 * pictures * v.tokens * l.width * (v.width + l.width)


def line(row, o):
    """One aligned line of the log."""
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    left = f"{row['eta_s'] // 3600:.0f}:{row['eta_s'] % 3600 // 60:02.0f}:{row['eta_s'] % 60:02.0f}"
    text = (f"stage {o.stage}  step {row['step'] + 1:5d}/{o.steps}  loss {row['loss']:7.4f}  lr {row['lr']:.2e}  "
            f"grad {row['grad_norm']:7.3f}  {row['tokens_per_s']:7.0f} tok/s  MFU {mfu}  data {row['data_wait']:4.0%}  "
            f"{row['peak_gb']:.1f} GB  {left} left")
    extra = [("held_out", "held out"), ("expert_share", "|E_L|/|FFN|")]
    return text + "".join(f"  {label} {row[key]:.4f}" for key, label in extra if key in row)


# ---- The stages


def stage_folder(o):
    return os.path.join(o.out, f"stage{o.stage}")


def stage_0(o):
    """The toy's CLIP and Llama, from the toy world; see toy.py."""
    folder = os.path.join(o.out, "world")
    tokenizer = train_tokenizer(toy.words(folder), toy.LLAMA.vocab)
    data = toy.StandInData(folder, "text.json", "captions.json", tokenizer, o.system)
    val = toy.StandInData(folder, "validation_text.json", "validation_captions.json", tokenizer, o.system)
    held_out = [val.batch(range(i, min(i + o.batch_size, len(val.texts)))) for i in range(0, len(val.texts), o.batch_size)]
    return Job(toy.StandIns(), data.texts.lengths, data.batch, held_out, toy.loss, lambda b: b.text.trained,
               lambda tensors: toy.finish(tensors, tokenizer, stage_folder(o)), lambda i: data.texts[i])


def vlm_loss(model, batch):
    """Next-token loss summed over the supervised positions, the only ones that have logits."""
    logits = model(batch.ids, batch.visual, batch.pool_id, batch.use_id, batch.turns, batch.at)
    return F.cross_entropy(logits.float(), batch.target, reduction="sum")


def readable(path):
    try:
        open_image(path, path)
        return True
    except UserError:
        return False


def pictures(data, model, preprocess, o):
    """A function from a sample to its picture: pixels float[3, S, S] or, with --cache_features, features float[N, C]."""
    read = lambda path, name: pixels(open_image(path, name), preprocess)
    if not o.cache_features:
        return lambda sample: read(sample.image, f"{sample.record}: {sample.image}")
    paths = sorted({p for d in data for p in d.pictures()})
    dtype = next(model.vision.parameters()).dtype
    found = {}
    model.vision.to(o.device)
    with torch.no_grad():
        for i in tqdm(range(0, len(paths), 64), "features", mininterval=5):
            some = paths[i:i + 64]
            if o.skip_bad_images:
                some = [p for p in some if readable(p)]
            if some:
                made = model.features(torch.stack([read(p, p) for p in some]).to(o.device, dtype)).cpu()
                found |= zip(some, made)
    model.vision.to("cpu")
    return lambda sample: found[sample.image] if sample.image in found else read(sample.image, f"{sample.record}: {sample.image}")


def with_picture(data, i, picture, skipped):
    """(sample i, its picture or None). With a list `skipped`, a sample whose picture cannot be read is replaced.

    By the next of the file, and so on, the first after the last: a rule that knows nothing of the run, so that a resumed
    one meets the same. What was wrong is added to the list.
    """
    for j in range(len(data)):
        sample = data[(i + j) % len(data)]
        try:
            return sample, None if sample.image is None else picture(sample)
        except UserError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    raise UserError("--skip_bad_images: not one picture of the data can be read")


def text_batches(data, blank, context, o):
    """The first conversations as text alone, in the form that Llamas which answer are trained on: see `check_reads`."""
    layout, samples = Layout("v1", o.system, 0, context), []
    for i in range(min(32, len(data))):
        turns = [(q.replace(TAG, "").strip(), a) for q, a in conversation(data.record(i), f"record {i}")]
        samples.append(encode(turns, data.tokenizer, layout, f"record {i}"))
    return [collate(samples[i:i + 8], [], blank, multiple=MULTIPLE) for i in range(0, len(samples), 8)]


def stage_1_or_2(o):
    """Alignment (1) or instruction tuning (2) of a VLM on LLaVA's data."""
    options = {k: getattr(o, k) for k in ("visual_expert", "language_expert", "guidance_after", "expert_embed", "expert_rank")}
    dtype = getattr(torch, o.dtype)
    projector = weights.projector_file(o.init) if o.stage == 2 else None  # LLaVA's own stage 1 leaves no more than that
    if o.stage == 1:  # the language experts join in stage 2: nobody has asked anything yet
        options |= {"language_expert": "none", "guidance_after": None}
    if o.stage == 1 or projector:
        parts = {"vision": o.vision, "llm": o.llm}
        folders = [weights.resolve(name) for name in parts.values()]
        model, tokenizer, preprocess = weights.assemble(*folders, options, dtype, o.seed, projector)
        sources = {part: weights.source(name, stage_folder(o)) for part, name in parts.items() if o.stage == 1}
    else:
        point, sources = weights.load(o.init, dtype, options, o.seed), {}
        model, tokenizer, preprocess = point.model, point.tokenizer, point.preprocess
    preprocess = dataclasses.replace(preprocess, aspect=o.aspect)
    context = o.context or min(2048, model.cfg.llm.context)
    layout = Layout(o.template, o.system, model.cfg.vision.tokens, context, o.guidance_pool)
    if not os.path.isdir(o.images):
        raise UserError(f"--images {o.images}: there is no such folder")
    data = [Conversations(path, o.images, tokenizer, layout) for path in (o.data, o.val) if path]
    picture = pictures(data, model, preprocess, o)
    blank = (model.cfg.vision.tokens, model.cfg.vision.width) if o.cache_features else (3, preprocess.size, preprocess.size)

    skipped = []

    def batch(rows, source=data[0]):
        pairs = [with_picture(source, i, picture, skipped if o.skip_bad_images else None) for i in rows]
        return collate([s for s, _ in pairs], [p for _, p in pairs if p is not None], blank, multiple=MULTIPLE)

    held_out = [batch(range(i, min(i + 64, len(d))), d) for d in data[1:] for i in range(0, min(len(d), 512), 64)]

    def finish(tensors):
        kept = tensors if o.stage == 2 else {k: v for k, v in tensors.items() if k.startswith("projector.")}
        weights.save(stage_folder(o), model.cfg, kept, tokenizer, preprocess, o.system, o.stage,
                     sources, dataclasses.asdict(o))

    features = (model.cfg.vision.tokens, model.cfg.vision.width)
    text = text_batches(data[0], features, context, o) if o.stage == 1 and not o.allow_random_llm else []
    return Job(model, data[0].lengths, batch, held_out, vlm_loss, lambda b: b.trained, finish, lambda i: data[0][i], text, skipped)


def finished(out, stage):
    """Whether a stage's checkpoint is there."""
    part = "llm/config.json" if stage == 0 else "config.json"
    return os.path.exists(os.path.join(out, f"stage{stage}", part))


def complete(given, stage):
    """The options of one stage: what the user gave, then the preset's, then the defaults; UserError if they do not fit."""
    o = Options(**given)
    preset = dict(PRESETS[o.preset].get(stage, {})) | (TOY if o.preset == "toy" else {})
    if o.preset == "toy":
        folder = os.path.join(o.out, "world")
        preset |= {"images": os.path.join(folder, "images")}
        preset |= {k: os.path.join(o.out, preset[k]) for k in ("vision", "llm")}
        if stage > 0:
            preset |= {"data": os.path.join(folder, "captions.json" if stage == 1 else "instruct.json"),
                       "val": os.path.join(folder, "validation_captions.json" if stage == 1 else "validation.json")}
    if stage == 2:
        preset |= {"init": os.path.join(o.out, "stage1")}
        if "init" not in given and not finished(o.out, 1):
            raise UserError(f"stage 2 starts from {preset['init']}, which is not there: "
                            f"run --stage 1 first, or name a checkpoint with --init")
    if "epochs" in given and "steps" not in given:
        preset.pop("steps", None)
    o = Options(**{**preset, **given, "stage": stage})
    needed = {0: (), 1: ("vision", "llm", "data", "images"), 2: ("init", "data", "images")}[stage]
    needed += ("vision", "llm") if stage == 2 and weights.projector_file(o.init) else ()
    missing = [f"--{name}" for name in needed if getattr(o, name) is None]
    if missing:
        raise UserError(f"stage {stage} with preset {o.preset} needs {', '.join(missing)}")
    o.device = pick_device(o)
    o.dtype = o.dtype or weights.fast_dtype(o.device)
    ranks = dist.get_world_size()
    o.micro_batch_size = min(o.micro_batch_size or o.batch_size, max(1, o.batch_size // ranks))
    if o.batch_size % (o.micro_batch_size * ranks):
        raise UserError(f"batch_size {o.batch_size} is not a multiple of micro_batch_size {o.micro_batch_size} x {ranks} ranks")
    return o


def run_stage(given, stage, mesh):
    """Train one stage and write its checkpoint."""
    o = agreed(lambda: complete(given, stage))
    agreed(lambda: (first_step(o), os.makedirs(stage_folder(o), exist_ok=True)))
    torch.manual_seed(o.seed)
    job = agreed(lambda: stage_0(o) if stage == 0 else stage_1_or_2(o))
    train(job, o, mesh)


def check(given):
    """UserError for what can be seen to be wrong before any work."""
    o = Options(**given)
    if o.stage not in (None, 0, 1, 2) or (o.preset != "toy" and o.stage not in (1, 2)):
        raise UserError(f"--stage {o.stage} with preset {o.preset}: expected 1 or 2; the toy also has 0, or none for all")
    if o.stage is not None and finished(o.out, o.stage) and not o.overwrite:
        raise UserError(f"{os.path.join(o.out, f'stage{o.stage}')} is finished: --overwrite trains it anew")
    if o.stage is None and o.overwrite:
        raise UserError("--overwrite goes with --stage; to train all anew, name another folder with --out")
    if o.stage is not None:
        first_step(complete(given, o.stage))


def run():
    given = parse(Options)
    o = Options(**given)
    began = time.perf_counter()
    mesh = start_world(pick_device(o))
    agreed(lambda: check(given))
    if o.preset == "toy":
        agreed(lambda: dist.get_rank() or world.write_world(
            os.path.join(o.out, "world"), o.pictures, side=toy.VISION.image_size, texts=o.pictures,
            test_pictures=min(250, o.pictures)))
    needed = [0, 1, 2] if o.stage is None else [0] * (o.preset == "toy" and o.stage == 1) + [o.stage]
    for stage in needed:
        if stage != o.stage and finished(o.out, stage):
            if dist.get_rank() == 0:
                print(f"stage {stage} is finished, skipped", file=sys.stderr)
            continue
        begun = saved_steps(os.path.join(o.out, f"stage{stage}", "state"))
        run_stage(given | {"resume": o.resume and (stage == o.stage or bool(begun))}, stage, mesh)
    if o.stage is None and dist.get_rank() == 0:
        eval.toy_scores(os.path.join(o.out, "stage2"), os.path.join(o.out, "world"), o.out, began)


def leave():
    """End the process. gloo's threads may abort an ordinary exit after all work is done (torch 2.13), so skip it."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    try:
        main(run)
    except SystemExit as end:  # an error, a signal or --help: leave without waiting for the other ranks
        alike = isinstance(end.__context__, Agreed) or not dist.is_initialized()
        if isinstance(end.code, str) and not (alike and int(os.environ.get("RANK", 0))):
            print(end.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(end.code, str) else end.code or 0)
    leave()
