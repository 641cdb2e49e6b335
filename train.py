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
import multiprocessing.connection
import os
import re
import shutil
import signal
import sys
import threading
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
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import eval
import memory
import toy
import weights
import world
from cli import UserError, main, parse
from data import (IGNORE, MULTIPLE, SYSTEM, TAG, Conversations, Layout, Order, collate, conversation, encode, encode_prompt,
                  open_image, padding, pixels, train_tokenizer)
from flops import flops, tuning
from hypernet import HyperNetwork
from model import Attention, Block, Cache, CLIP, generate, RMSNorm, VisionAttention, VisionBlock
from muon import Muon
from sources import GUIDED, MatrixNetwork
from vlora import Generator, VLoRAConfig

# The options that are fields of VLMConfig
EXPERTS = ("visual_expert", "language_expert", "guidance_after", "expert_embed", "expert_rank", "weight_source")

ANSWER = 32  # tokens of an answer in the log

# What may differ between a run and its continuation. All else would make another run of it, see `first_step`.
FREE = {"out", "resume", "overwrite", "steps", "epochs", "log_every", "val_every", "save_every", "keep", "workers", "device",
        "micro_batch_size", "skip_bad_images", "allow_random_llm", "checkpointing", "compile", "replicate"}

# What each stage trains, by prefix of the parameters' names; everything else is frozen (paper §3, "training"; VLoRA §4.1).
TRAINS = {
    (0, "full"): ("",),
    (0, "peft"): ("",),
    (1, "full"): ("projector.", "perceptual."),
    (1, "peft"): ("projector.", "perceptual."),
    (2, "full"): ("projector.", "perceptual.", "llm."),
    (2, "peft"): ("projector.", "perceptual.", "llm.hypernet.", "llm.guidance_norm.", "llm.expert."),
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
# TinyLlama and CLIP-L on one card of 24 GB: the same recipe, in bites that fit, by stage.
BITES = {1: dict(micro_batch_size=16), 2: dict(micro_batch_size=4)}
PARTS = ("clip", "llm")  # of stage 0, which need nothing of one another
PRESETS = {
    "7b": LLAVA,
    "13b": LLAVA,
    "1b": LLAVA,
    "toy": {
        "clip": dict(batch_size=64, lr=2e-3, muon_lr=15e-3, steps=450, schedule="wsd", clip=1.0),  # of pairs of pictures
        "llm": dict(batch_size=32, lr=2e-3, muon_lr=12e-3, steps=500, schedule="wsd", clip=1.0),
        1: dict(template="plain", batch_size=32, lr=3e-3, steps=200, schedule="wsd", clip=1.0),
        2: dict(template="v1", batch_size=32, lr=2e-3, muon_lr=4e-3, steps=780, schedule="wsd", clip=1.0,
                cache_features=True),  # stage 1 sees less than half of the pictures, and each of them once
    },
}
# Where VLoRA's recipe differs: its paper's §4.1, and the authors' pretrain.sh and finetune.sh, for 8 GPUs
VLORA = {
    1: dict(batch_size=768, micro_batch_size=96,  # --per_device_train_batch_size 96; §4.1 the same, for 40,000 steps on 30 M pairs
            lr=5e-5),                             # of CapsFusion: --steps 40000. The script has one epoch of all 113 M
    2: dict(lr=2e-5,                              # the script's; the paper says 5e-5. Batch 128 in both
            workers=32),                          # --dataloader_num_workers
}
VLORA_TOY = dict(lr=1e-3, vlora_every=1, vlora_rank=16, vlora_embed=128, vlora_depth=2, vlora_heads=4)  # at 3e-3 stage 1 jumps
VLORA_STEPS = {1: 300, 2: 1000}  # of the toy: it learns more slowly
TOY = dict(vision="stage0/clip", llm="stage0/llm", system="", aspect="pad", expert_embed=16, group_by_length=True,
           kernels="plain", log_every=20, val_every=300, save_every=200)


@dataclass
class Options:
    """Train HyperLLaVA, or VLoRA. Without --stage: the toy from nothing to its scores. Options left out are the preset's."""
    stage: int | None = None         # 0: the toy's stand-ins; 1: align the projector; 2: instruction tuning
    part: Literal["clip", "llm"] | None = None  # stage 0: which of the stand-ins; none: both
    method: Literal["hyperllava", "vlora"] = "hyperllava"  # pictures as tokens, beside experts; or as weights of the Llama
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
    weight_source: Literal["hyper", "static", "latent", "mlp", "lora"] = "hyper"  # where experts' weights come from (Tables 5, 6)
    vlora_sites: str = "qkvom"       # which weights VLoRA's pictures change: of attention, and m, the FFN (its Table 3)
    vlora_every: int = 4             # of so many blocks, they change the last
    vlora_rank: int = 64             # rank of a change (Table 4)
    vlora_embed: int = 512           # width of the generators
    vlora_depth: int = 8             # blocks of a generator (Table 5)
    vlora_heads: int = 16            # heads of its attention
    template: Literal["plain", "v1"] = "v1"  # plain: picture and caption; v1: Vicuna's conversations
    system: str = SYSTEM             # text before the first turn of v1
    aspect: Literal["pad", "crop"] = "pad"  # make pictures square by padding or by cropping
    context: int | None = None       # longest sequence, image tokens included; none: the Llama's, 2048 at most
    group_by_length: bool = False    # samples of like length share a step, so that less is padded
    cache_features: bool = False     # run the frozen tower once per picture, before training; kept in memory
    kernels: Literal["fused", "plain"] = "fused"  # attention and RMS norms; plain is faster in bf16 on a CPU
    checkpointing: Literal["none", "selective", "full"] = "none"  # recompute every second block, or each, in the backward pass
    compile: bool = False            # let torch.compile make the blocks faster: minutes at the start, and a C++ compiler
    replicate: int = 1               # copies of the sharded state, a divisor of the ranks: with one a node, each shards within itself
    dtype: Literal["bfloat16", "float32"] | None = None  # of the computation; none: bf16 where it is fast
    device: Literal["cuda", "cpu"] | None = None  # none: cuda if there is one
    workers: int = 0                 # processes that prepare batches
    skip_bad_images: bool = False    # a record whose picture cannot be read gives its place to the next one in the file
    allow_random_llm: bool = False   # stage 1 with a Llama that knows no language, to rehearse
    log_every: int = 1               # steps between printed lines; log.jsonl gets every step
    val_every: int = 100             # steps between held-out losses, and answers to one held-out question
    save_every: int = 1000           # steps between saved states
    keep: int = 1                    # saved states to keep, the newest ones

    def __post_init__(self):
        for name in ("steps", "epochs", "batch_size", "micro_batch_size", "pictures", "log_every", "val_every",
                     "save_every", "keep", "replicate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name} {value}: expected more than 0")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: expected 0 to 2**63")


@dataclass
class Job:
    """One stage: what the loop trains, on what, and what becomes of it."""
    model: nn.Module
    lengths: np.ndarray               # int64[samples], how long each of the training data's samples is
    batch: Callable                   # (rows) -> batch of the training data with those indices
    held_out: list                    # batches of this rank's share of the held-out data, as many as on the other ranks
    loss: Callable                    # (model, batch) -> loss summed over the batch's supervised tokens
    tokens: Callable                  # (batch) -> their number
    finish: Callable                  # ({name: tensor}) -> writes the finished checkpoint
    sample: Callable | None           # (index) -> the Sample of the training data, without its picture; None: there are none
    text: list = dataclasses.field(default_factory=list)  # batches without pictures, to see whether a frozen Llama can read
    skipped: list = dataclasses.field(default_factory=list)  # what is wrong with pictures that `batch` did without
    keeps: tuple = ("",)              # prefixes of the names of the tensors that `finish` gets
    pictured: np.ndarray | None = None  # bool[samples], which of the training data are about a picture; None: all alike
    shown: Callable | None = None     # (function of a prompt to ids) -> str, the answer to one question; None: nothing to ask
    asked: str = ""                   # what that question is, and the answer that the data has


# ---- World and precision: the only lines that know where and in what they run


def pick_device(o):
    """cuda or cpu, as asked for or, without a word, cuda if there is one."""
    return weights.pick_device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def start_world(device, replicate=1):
    """Join torchrun's processes, or be a world of one; returns the mesh that parameters are sharded over.

    With `replicate`, one of two dimensions: as many copies of what is sharded within each. torchrun counts ranks node by
    node, so that with a copy for each node only gradients travel between them, and only what is left when a node has summed its own.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for tensors in a CPU's memory: steps of the toy take a tenth less
    if "WORLD_SIZE" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    else:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = dist.get_world_size()
    if replicate == 1:
        return init_device_mesh(device, (ranks,))
    if ranks % replicate:
        raise Agreed(f"--replicate {replicate}: the number of ranks, {ranks}, is not a multiple of it")
    return init_device_mesh(device, (replicate, ranks // replicate), mesh_dim_names=("replicate", "shard"))


def shard(model, mesh, dtype):
    """FSDP2: blocks, hypernetworks, VLoRA's generators and the tower as units, then the root. Computes in `dtype`, reduces in fp32.

    A hypernetwork is called from many blocks, so it is a unit of its own that none of them owns. What joins the generators
    is none: it hands out its own parameters, which must still be there when the blocks use them.

    The units are made without storage, and each rank then gets its own rows of every parameter, as fp32 masters of what trains
    and in `dtype` of what is frozen: of weights that are mapped from files it reads and casts no others.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    whole = {name: p.detach() for name, p in model.named_parameters()}
    model.to("meta")
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    for module in reversed(list(model.modules())):  # children before parents
        if module is model or isinstance(module, (Block, VisionBlock, HyperNetwork, MatrixNetwork, Generator, CLIP)):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    state = {}
    for name, p in model.named_parameters():
        first = -(-len(p) // mesh.shape[-1]) * mesh.get_coordinate()[-1]  # FSDP deals rows out as torch.chunk does
        rows = whole.pop(name)[first:first + len(p.to_local())].to(mesh.device_type, p.dtype, copy=True)
        state[name] = DTensor.from_local(rows, mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
    model.load_state_dict(state, assign=True)
    return model


def compiled(model):
    """Let torch.compile make the forward passes of all blocks, the tower's too. Blocks of one form share what it makes."""
    for block in (m for m in model.modules() if isinstance(m, (Block, VisionBlock))):
        block.forward = torch.compile(block.forward, dynamic=True)


def recompute(model, which):
    """Forget what a Llama block computed, and compute it again in the backward pass: each block, or every second one."""
    blocks = [] if which == "none" else model.llm.layers
    for block in blocks[1::2] if which == "selective" else blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def freeze(model, prefixes):
    """Leave trainable what starts with one of `prefixes`.

    "llm.expert." stands for the experts of all blocks, and for LoRA in their place.
    """
    for name, p in model.named_parameters():
        name = "llm.expert." if re.match(r"llm\..*\.(expert|lora)\.", name) else name
        p.requires_grad_(name.startswith(prefixes))


# ---- Optimisation


def optimisers(model, o):
    """AdamW for all that trains or, with a muon_lr, Muon for the matrices inside blocks and AdamW for the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    in_block = lambda n, p: ".layers." in n and not re.search(r"\.(expert|lora)\.", n) and p.ndim == 2
    matrices = [p for n, p in named if o.muon_lr and in_block(n, p)]
    rest = [p for n, p in named if not (o.muon_lr and in_block(n, p))]
    adam = torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
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


def deaf(worker):
    """Let a process that prepares batches hear its parent alone: terminals and torchrun signal all, and it is needed to the end."""
    numbers = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def listen():
        while signal.sigwaitinfo(numbers).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


# ---- Data order: f(seed, epoch, step) and nothing else


class Feed(Dataset):
    """The micro-batches of this rank, in order: item k is micro-batch k % accumulation of step k // accumulation.

    An item is (the batch or a UserError, what is wrong with the pictures that were skipped in it).
    A step's samples are the same whatever the world: micro-batch j of the step goes to rank j % world.
    """

    def __init__(self, job, o):
        self.job, self.o = job, o
        self.order = Order(len(job.lengths), o.seed, o.batch_size, job.lengths if o.group_by_length else None, job.pictured)
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
    for n, block in enumerate(m for m in model.modules() if isinstance(m, Block)):
        if getattr(block, "expert", None) is not None:
            norms = {}
            handles.append(block.mlp.register_forward_hook(
                lambda m, i, out, norms=norms: norms.update(ffn=out.float().norm())))
            handles.append(block.expert.register_forward_hook(
                lambda m, i, out, norms=norms, n=n: ratios.update({n: (out.float().norm() / norms["ffn"]).item()})))
    return ratios, lambda: [h.remove() for h in handles]


def reply(model, prompt, o):
    """Ids of the model's greedy answer to the prompt of a batch of one.

    It is always ANSWER tokens long, whatever ends it: ranks whose arithmetic differs must still run the model as often.
    """
    cache = Cache(model.cfg.llm, 1, 0, o.device, getattr(torch, o.dtype))
    return generate(model, prompt.to(o.device), ANSWER, eos=-1, cache=cache)[0]


@torch.no_grad()
def evaluate(job, model, o, mesh):
    """What the log says now and then, as far as there is data for it.

    held_out      loss per token of the held-out data
    expert_share  |E_L| / |FFN| averaged over the blocks with an expert
    answer        to `Job.asked`
    """
    found = {}
    with torch.compiler.set_stance("force_eager") if o.compile else contextlib.nullcontext():  # many shapes, each met but rarely
        if job.held_out:
            ratios, remove = shift_ratio(model)
            summed = [job.loss(model, batch.to(mesh.device_type)).item() for batch in job.held_out]
            loss, tokens = total([sum(summed), sum(map(job.tokens, job.held_out))], mesh)
            remove()
            found = {"held_out": loss / tokens} | ({"expert_share": sum(ratios.values()) / len(ratios)} if ratios else {})
        if job.shown:
            found["answer"] = job.shown(lambda prompt: reply(model, prompt, o))
    return found


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
        if isinstance(module, (Attention, VisionAttention, RMSNorm)):
            module.plain = o.kernels == "plain"
    freeze(model, TRAINS[o.stage, o.tune])
    if o.compile:
        compiled(model)
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


def tensors_of(model, prefixes, dtype):
    """{name: plain CPU tensor in `dtype`} of the parameters that start with one of `prefixes`, on rank 0; {} on the others.

    One at a time: together, in fp32, they may be more than a machine holds beside the rest of the state.
    """
    found = {}
    model.reshard()  # after an evaluation the root is still whole
    for name, p in model.named_parameters():
        if name.startswith(prefixes):
            tensor = p.detach().full_tensor()
            found |= {name: tensor.to("cpu", dtype)} if dist.get_rank() == 0 else {}
    return found


def keep_state(folder, steps, model, opts, o, stop, bar):
    """Save the state after so many steps -> the seconds that took.

    A failure is a warning; after the signal `stop` it is an error, else the run ends.
    """
    began = time.perf_counter()
    fault = save_state(folder, steps, model, opts, o)
    if fault and stop:
        raise Agreed(f"stopped by {signal.Signals(stop).name}, and {fault}")
    if fault and dist.get_rank() == 0:
        bar.write(f"warning: {fault}; training goes on, the states saved before are kept", file=sys.stderr)
    if stop:
        if dist.get_rank() == 0:
            bar.write(f"stopped by {signal.Signals(stop).name} after step {steps}, state saved: --resume goes on", file=sys.stderr)
        sys.exit(130 if stop == signal.SIGINT else 0)
    return time.perf_counter() - began


def start_run(job, model, opts, states, log_path, o, mesh):
    """Go on from the newest of the saved `states`, or begin anew -> (the first step to take, pictures skipped before it, on rank 0)."""
    start = agreed(lambda: first_step(o))
    if start:
        load_state(states, start, model, opts)
    elif dist.get_rank() == 0:
        shutil.rmtree(states, ignore_errors=True)
    if o.stage == 1 and not start and not o.allow_random_llm:
        check_reads(job, model, mesh)
    return start, cut_log(log_path, start).get("skipped_images", 0) if dist.get_rank() == 0 else 0


def loaded(feed, start, o):
    """An iterator over the micro-batches of a `Feed` from step `start` on, prepared by --workers processes."""
    return iter(DataLoader(feed, batch_size=None, sampler=range(start * feed.accumulation, len(feed)), num_workers=o.workers,
                           multiprocessing_context="fork" if o.workers else None, worker_init_fn=deaf))


def train(job, o, mesh):
    """Run a job for o.steps optimiser steps and write its checkpoint."""
    out, rank = stage_folder(o), dist.get_rank()
    o.steps = o.steps or math.ceil(o.epochs * len(job.lengths) / o.batch_size)
    model, opts = prepared(job.model, o, mesh)
    text = agreed(lambda: plan(model, opts, job, o))
    if rank == 0:
        print(text, file=sys.stderr)

    states, log_path = os.path.join(out, "state"), os.path.join(out, "log.jsonl")
    start, skipped = start_run(job, model, opts, states, log_path, o, mesh)
    feed = Feed(job, o)
    loader = loaded(feed, start, o)
    first = began = time.perf_counter()
    saving = 0.0  # seconds, before this step
    with open(log_path, "a") if rank == 0 else contextlib.nullcontext() as log, \
            tqdm(range(start, o.steps), title(o), initial=start, total=o.steps, disable=rank > 0,
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
            row |= ({"skipped_images": skipped} if skipped else {}) | ({"save_s": saving} if saving else {})
            if step + 1 == o.steps or (step + 1) % o.val_every == 0:
                row |= evaluate(job, model, o, mesh)
            if rank == 0:
                print(json.dumps(row), file=log, flush=True)
            if rank == 0 and (step % o.log_every == 0 or {"held_out", "answer"} & row.keys()):
                bar.write(line(row, o), file=sys.stderr)
            saving = 0.0
            if done.stop or (step + 1) % o.save_every == 0 and step + 1 < o.steps:
                saving = keep_state(states, step + 1, model, opts, o, done.stop, bar)
            began = time.perf_counter()
    if skipped and rank == 0:
        print(f"{skipped} times a picture could not be read and the next record took its place", file=sys.stderr)
    tensors = tensors_of(model, job.keeps, getattr(torch, o.dtype))
    agreed(lambda: job.finish(tensors) if rank == 0 else None)
    if rank == 0:
        shutil.rmtree(states, ignore_errors=True)
    dist.barrier()


def part_of(name):
    """What the plan calls the part of the model that a parameter belongs to."""
    words = name.split(".")
    if "hypernet" in words:
        return "hypernet"
    return "experts" if {"expert", "expert_1", "expert_2", "guidance_norm", "lora"} & set(words) else words[0]


def foreseen(model, opts, samples, o):
    """The memory.Estimate of a step, taking each of its samples for as long as the longest of some."""
    size, shards = getattr(torch, o.dtype).itemsize, dist.get_world_size() // o.replicate
    estimate = memory.Estimate(*memory.state(model, opts, shards))
    if o.stage > 0:  # the toy's stand-ins are small, and no VLM
        estimate.once = o.batch_size == o.micro_batch_size * dist.get_world_size()
        estimate.gathered, reduced = memory.gathered(model, size, shards)
        estimate.update = max(reduced, memory.muon(opts, shards))
        estimate.activations = memory.activations(
            model.cfg, o.micro_batch_size, max(len(s.ids) for s in samples), max(map(supervised, samples)), o.micro_batch_size,
            size, TRAINS[o.stage, o.tune] == TRAINS[2, "full"] or model.cfg.weight_source == "lora", o.kernels == "plain",
            o.checkpointing, o.device)  # LoRA needs again what a frozen product does not
    return estimate


def padding_share(job, o):
    """The share of padding in some steps of the run, from all over it."""
    order, steps = Feed(job, o).order, max(1, 1024 // o.batch_size)
    rows = [order.step(step) for step in range(0, o.steps, max(1, o.steps // steps))[:steps]]
    batches = np.reshape(rows, (-1, o.micro_batch_size))
    lengths = np.zeros(len(job.lengths), np.int64)
    lengths[batches] = [[len(job.sample(i).ids) for i in batch] for batch in batches.tolist()]
    return padding(lengths, batches)


def supervised(sample):
    return int((sample.labels != IGNORE).sum())


def plan(model, opts, job, o):
    """What is about to happen, on one screen. Raises UserError if it needs more memory than there is."""
    parts = {}
    for name, p in model.named_parameters():
        parts.setdefault(part_of(name), [0, 0])[0 if p.requires_grad else 1] += p.numel()
    n, ranks = len(job.lengths), dist.get_world_size()
    some = [job.sample(i) for i in range(0, n, max(1, n // 256))] if job.sample else []
    epochs = o.steps * o.batch_size / n
    text = [f"{title(o)}: {n:,} samples, {o.steps:,} steps of {o.batch_size} ({epochs:.2f} epochs), "
            f"{o.dtype} on {ranks} x {o.device}{f' in {o.replicate} copies' if o.replicate > 1 else ''}, "
            f"{o.micro_batch_size} samples a rank at once"]
    text += [f"  {part:<12} {a:>14,} trained {b:>14,} frozen" for part, (a, b) in parts.items()]
    if some:
        text += [f"  supervised tokens: about {np.mean([*map(supervised, some)]) * o.steps * o.batch_size:,.0f} (from {len(some)} samples)",
                 f"  padding: about {padding_share(job, o):.0%} of the positions"]
    text += [f"  asked every {o.val_every} steps: {job.asked}"] if job.asked else []
    estimate = foreseen(model, opts, some, o)
    shares = ", ".join(f"{f.name} {getattr(estimate, f.name) / memory.GB:.2f}" for f in dataclasses.fields(estimate) if f.name != "once")
    text.append(f"  memory of a rank, GB: {shares}; at its peak {estimate.total / memory.GB:.2f}")
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
    l = model.cfg.llm
    passes = 3 if TRAINS[o.stage, o.tune] == TRAINS[2, "full"] else 2
    n, square, turns = batch.lengths.sum().item(), (batch.lengths ** 2).sum().item(), batch.ids.shape[0] * batch.turns
    kv = l.kv_heads * (l.width // l.heads)
    block = l.width * (2 * l.width + 2 * kv + 3 * l.hidden)
    found = l.depth * (passes * 2 * n * block + 3 * 2 * square * l.width) + passes * 2 * batch.trained * l.width * l.vocab
    found += 3 * tuning(model.cfg, n, turns if model.cfg.weight_source in GUIDED else 1)
    count, pictures = flops(dataclasses.replace(model.cfg, language_expert="none"), 1), len(batch.visual)
    if batch.visual.ndim == 4:
        found += pictures * count["vision"]
    if model.cfg.vlora is not None:
        return found + 3 * (pictures * count["generator"] + n * count["branches"])
    return found + 3 * pictures * (count["projector"] + count["experts"])


def line(row, o):
    """One aligned line of the log."""
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    left = f"{row['eta_s'] // 3600:.0f}:{row['eta_s'] % 3600 // 60:02.0f}:{row['eta_s'] % 60:02.0f}"
    text = (f"{title(o)}  step {row['step'] + 1:5d}/{o.steps}  loss {row['loss']:7.4f}  lr {row['lr']:.2e}  "
            f"grad {row['grad_norm']:7.3f}  {row['tokens_per_s']:7.0f} tok/s  MFU {mfu}  data {row['data_wait']:4.0%}  "
            f"{row['peak_gb']:.1f} GB  {left} left")
    extra = [("held_out", "held out"), ("expert_share", "|E_L|/|FFN|")]
    text += "".join(f"  {label} {row[key]:.4f}" for key, label in extra if key in row)
    return text + (f"  says {json.dumps(row['answer'], ensure_ascii=False)}" if "answer" in row else "")


# ---- The stages


def folder_of(out, stage, part=None):
    """Where a stage, or a part of stage 0, writes."""
    return os.path.join(out, f"stage{stage}", *([part] if part else []))


def stage_folder(o):
    return folder_of(o.out, o.stage, o.part)


def title(o):
    """What a stage, or a part of one, is called in all that is printed."""
    return f"stage {o.stage} {o.part}" if o.part else f"stage {o.stage}"


def stage_0(o):
    """The toy's CLIP, or its Llama, from the toy world; see toy.py."""
    folder, out = os.path.join(o.out, "world"), stage_folder(o)
    tokenizer = train_tokenizer(toy.words(folder), toy.LLAMA.vocab)
    cuts = lambda n: [range(i, min(i + o.batch_size, n)) for i in range(0, n, o.batch_size)]
    if o.part == "clip":
        data, val = (toy.Captions(folder, file, tokenizer) for file in ("captions.json", "validation_captions.json"))
        return Job(toy.StandInCLIP(), np.ones(len(data), np.int64), data.batch, [val.batch(cut) for cut in cuts(len(val))],
                   toy.contrast_loss, lambda b: len(b.pixels), lambda tensors: toy.write_clip(tensors, out), None)
    layout = Layout("v1", o.system, toy.VISION.tokens, toy.LLAMA.context)
    data, val = (Conversations(os.path.join(folder, file), folder, tokenizer, layout) for file in ("text.json", "validation_text.json"))
    batch = lambda rows, source=data: collate([source[i] for i in rows], [], (toy.VISION.tokens, toy.VISION.width), multiple=MULTIPLE)
    return Job(toy.StandInLlama(), data.lengths, batch, [batch(cut, val) for cut in cuts(len(val))], toy.language_loss,
               lambda b: b.trained, lambda tensors: toy.write_llm(tensors, tokenizer, out), lambda i: data[i])


def vlm_loss(model, batch):
    """Next-token loss summed over the supervised positions, the only ones that have logits."""
    logits = model(batch.ids, batch.visual, batch.pool_id, batch.use_id, batch.turns, batch.at, picture=batch.picture, tag=batch.tag)
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
    dtype, found = getattr(torch, o.dtype), {}
    model.vision.to(o.device, dtype)
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


def dealt(cuts, make):
    """Batches made of this rank's share of `cuts`, as many as on other ranks: where one is short, a batch that supervises nothing."""
    batches = [make(cut) for cut in cuts[dist.get_rank()::dist.get_world_size()]]
    if len(batches) < -(-len(cuts) // dist.get_world_size()):
        other = make(cuts[0])
        batches.append(dataclasses.replace(other, target=torch.full_like(other.target, IGNORE)))
    return batches


def question(data, picture, blank, o):
    """(Job.shown, Job.asked) of the first record whose first question is about a picture that can be read; (None, "") if none is."""
    for i in range(len(data)):
        sample, turns = data[i], conversation(data.record(i), f"record {i}")
        fits = (sample.labels[sample.use_id <= 0] != IGNORE).any()  # the context did not cut the first answer
        if sample.image is None or TAG not in turns[0][0] or not fits or o.skip_bad_images and not readable(sample.image):
            continue
        prompt = encode_prompt([], turns[0][0], data.tokenizer, data.layout, sample.image, sample.record)
        batch, eos = collate([prompt], [picture(sample)], blank), data.tokenizer.eos

        def shown(ids_of):
            ids = ids_of(batch)
            text = data.tokenizer.decode(ids[:ids.index(eos)] if eos in ids else ids)
            return text.split("\n")[0] if o.template == "plain" else text

        asked = turns[0][0].replace(TAG, "").strip() if o.template == "v1" else ""
        said = [sample.image, *(json.dumps(text, ensure_ascii=False) for text in (asked, turns[0][1]) if text)]
        return shown, ", due ".join([": ".join(said[:-1]), said[-1]])
    return None, ""


def text_batches(data, blank, context, o):
    """The first conversations as text alone, in the form that Llamas which answer are trained on: see `check_reads`."""
    layout, samples = Layout("v1", o.system, 0, context), []
    for i in range(min(32, len(data))):
        turns = [(q.replace(TAG, "").strip(), a) for q, a in conversation(data.record(i), f"record {i}")]
        samples.append(encode(turns, data.tokenizer, layout, f"record {i}"))
    return [collate(samples[i:i + 8], [], blank, multiple=MULTIPLE) for i in range(0, len(samples), 8)]


def form(o):
    """The fields of VLMConfig that the options choose."""
    if o.method == "vlora":
        vlora = VLoRAConfig(o.vlora_sites, o.vlora_every, o.vlora_rank, o.vlora_embed, o.vlora_depth, o.vlora_heads)
        return {"visual_expert": "none", "language_expert": "none", "vlora": vlora}
    chosen = {k: getattr(o, k) for k in EXPERTS}
    if o.stage == 1:  # the language experts join in stage 2: nobody has asked anything yet
        chosen |= {"language_expert": "none", "guidance_after": None}
    return chosen


def stage_1_or_2(o):
    """Alignment (1) or instruction tuning (2) of a VLM on LLaVA's data."""
    options, dtype = form(o), getattr(torch, o.dtype)
    projector = weights.projector_file(o.init) if o.stage == 2 else None  # LLaVA's own stage 1 leaves no more than that
    if projector and o.method == "vlora":
        raise UserError(f"--init {o.init}: a projector, which VLoRA has none of; stage 2 wants a checkpoint of stage 1")
    if o.stage == 1 or projector:
        parts = {"vision": o.vision, "llm": o.llm}
        folders = [weights.resolve(name) for name in parts.values()]
        model, tokenizer, preprocess = weights.assemble(*folders, options, dtype, o.seed, projector, cast=False)
        sources = {part: weights.source(name, stage_folder(o)) for part, name in parts.items() if o.stage == 1}
    else:
        point, sources = weights.load(o.init, dtype, options, o.seed, cast=False), {}
        model, tokenizer, preprocess = point.model, point.tokenizer, point.preprocess
    preprocess = dataclasses.replace(preprocess, aspect=o.aspect)
    context = o.context or min(2048, model.cfg.llm.context)
    layout = Layout(o.template, o.system, model.cfg.image_tokens, context, o.guidance_pool)
    if not os.path.isdir(o.images):
        raise UserError(f"--images {o.images}: there is no such folder")
    data = [Conversations(path, o.images, tokenizer, layout) for path in (o.data, o.val) if path]
    picture = pictures(data, model, preprocess, o)
    blank = (model.cfg.vision.tokens, model.cfg.vision.width) if o.cache_features else (3, preprocess.size, preprocess.size)

    skipped = []

    def batch(rows, source=data[0]):
        pairs = [with_picture(source, i, picture, skipped if o.skip_bad_images else None) for i in rows]
        return collate([s for s, _ in pairs], [p for _, p in pairs if p is not None], blank, multiple=MULTIPLE)

    held_out = dealt([range(i, min(i + o.micro_batch_size, 512, len(d)))
                      for d in data[1:] for i in range(0, min(len(d), 512), o.micro_batch_size)], lambda rows: batch(rows, data[1]))
    shown, asked = question(data[-1], picture, blank, o)

    def finish(tensors):
        weights.save(stage_folder(o), model.cfg, tensors, tokenizer, preprocess, o.system, o.stage,
                     sources, dataclasses.asdict(o))

    features = (model.cfg.vision.tokens, model.cfg.vision.width)
    text = text_batches(data[0], features, context, o) if o.stage == 1 and not o.allow_random_llm else []
    return Job(model, data[0].lengths, batch, held_out, vlm_loss, lambda b: b.trained, finish, lambda i: data[0][i], text, skipped,
               ("",) if o.stage == 2 else TRAINS[1, o.tune], data[0].pictured, shown, asked)


def parts_of(o, stage):
    """The parts of a stage that are to be trained: of stage 0 those asked for, None of the others, which have none."""
    return [None] if stage else [o.part] if o.part else list(PARTS)


def finished(out, stage, part=None):
    """Whether a stage's checkpoint, or that of a part, is there, be it set aside because the save of its successor was killed.

    Without a `part`, stage 0 is finished if all of its parts are.
    """
    if stage == 0 and part is None:
        return all(finished(out, stage, part) for part in PARTS)
    folder = folder_of(out, stage, part)
    return any(os.path.exists(os.path.join(place, "config.json")) for place in (folder, f"{folder}.old"))


def complete(given, stage):
    """The options of one stage: what the user gave, then the preset's, then the defaults; UserError if they do not fit."""
    o = Options(**given)
    others = {*EXPERTS, "guidance_pool"} if o.method == "vlora" else {name for name in given if name.startswith("vlora_")}
    if given.keys() & others:
        raise UserError(f"--{min(given.keys() & others)} is no option of --method {o.method}")
    preset = dict(PRESETS[o.preset].get(o.part or stage, {})) | (TOY if o.preset == "toy" else {})
    if o.method == "vlora" and stage > 0:  # the stand-ins are the same for both
        preset |= VLORA_TOY | {"steps": VLORA_STEPS[stage]} if o.preset == "toy" else VLORA[stage]
    if o.preset == "1b":
        preset |= BITES[stage]
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
    compilers = [os.environ.get("CXX", "g++")] if o.device == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if o.compile and not any(map(shutil.which, compilers)):
        raise UserError(f"--compile needs a compiler, and {' or '.join(compilers)} is not there: install one, or leave it out")
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


def toy_world(out, pictures):
    """Write the toy's world into OUT/world, unless it is there."""
    world.write_world(os.path.join(out, "world"), pictures, side=toy.VISION.image_size, texts=pictures, test_pictures=min(250, pictures))


def check(given):
    """UserError for what can be seen to be wrong before any work."""
    o = Options(**given)
    if o.stage not in (None, 0, 1, 2) or (o.preset != "toy" and o.stage not in (1, 2)):
        raise UserError(f"--stage {o.stage} with preset {o.preset}: expected 1 or 2; the toy also has 0, or none for all")
    if o.part and o.stage != 0:
        raise UserError(f"--part {o.part}: only stage 0 has parts, say --stage 0")
    if o.stage is not None and finished(o.out, o.stage, o.part) and not o.overwrite:
        raise UserError(f"{folder_of(o.out, o.stage, o.part)} is finished: --overwrite trains it anew")
    if o.stage is None and o.overwrite:
        raise UserError("--overwrite goes with --stage; to train all anew, name another folder with --out")
    if o.stage is not None:
        left = [part for part in parts_of(o, o.stage) if o.overwrite or not finished(o.out, o.stage, part)]
        first_step(complete(given | {"part": left[0]}, o.stage))


def leave():
    """End the process. gloo's threads may abort an ordinary exit after all work is done (torch 2.13), so skip it."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def launch(work):
    """Do the work of this process and end it, with the exit code of cli.main."""
    try:
        main(work)
    except SystemExit as end:  # an error, a signal or --help: leave without waiting for the other ranks
        alike = isinstance(end.__context__, Agreed) or not dist.is_initialized()
        if isinstance(end.code, str) and not (alike and int(os.environ.get("RANK", 0))):
            print(end.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(end.code, str) else end.code or 0)
    except RuntimeError as error:
        if not (isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or "/gloo/" in str(error)):
            raise
        print(f"error: rank {os.environ['RANK']} ends, for another rank is gone: what that or torchrun said tells why. "
              f"--resume goes on from the last saved state", file=sys.stderr, flush=True)
        os._exit(1)
    leave()


def unfinished(given, stage):
    """The options of what is still to be run of a stage, by part; it goes on from a saved state where --resume wants that."""
    o, runs = Options(**given), []
    for part in parts_of(o, stage):
        folder = folder_of(o.out, stage, part)
        if not finished(o.out, stage, part) or (o.overwrite and stage == o.stage):
            runs.append(given | {"part": part, "resume": o.resume and bool(saved_steps(os.path.join(folder, "state")))})
        elif dist.get_rank() == 0:
            print(f"{folder} is finished, skipped", file=sys.stderr)
    return runs


def alone(given, stage, threads):
    """One of the runs of `side_by_side`: a world of one, in a process that does not outlive its parent."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which `launch` would leave behind
    torch.set_num_threads(threads)
    launch(lambda: run_stage(given, stage, start_world("cpu")))


def side_by_side(runs, stage):
    """Run the parts of a stage at once, each in a process with its share of the cores.

    They need nothing of one another, and small products gain little from a second core: two parts on a core each take less time
    than one after the other on both. A signal, or the failure of a part, ends all of them, as a signal ends any run.
    """
    agreed(lambda: [first_step(complete(given, stage)) for given in runs])  # what is wrong is said here, once
    threads = max(1, torch.get_num_threads() // len(runs))
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit OpenMP's state, but not its threads
    parts = {given["part"]: spawn.Process(target=alone, args=(given, stage, threads)) for given in runs}
    failed, told = None, False
    with Signals() as signals:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: until a part can save, a terminal's Ctrl-C is its parent's affair
        for process in parts.values():
            process.start()
        signal.signal(signal.SIGINT, signals.note)
        while running := [process for process in parts.values() if process.is_alive()]:
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=0.5)
            failed = failed or next((name for name, process in parts.items() if process.exitcode), None)
            if (signals.got or failed) and not told:
                told = True
                for process in running:
                    process.terminate()
    if any(process.exitcode == 1 for process in parts.values()):
        sys.exit(1)  # it has said why
    if signals.got:
        print(f"stopped by {signal.Signals(signals.got).name}", file=sys.stderr)
        sys.exit(130 if signals.got == signal.SIGINT else 0)
    if failed and parts[failed].exitcode > 0:
        sys.exit(parts[failed].exitcode)  # a Ctrl-C that met it alone, say
    if failed:
        raise UserError(f"stage {stage} {failed} was ended by {signal.Signals(-parts[failed].exitcode).name}")
    if not all(finished(Options(**given).out, stage, given["part"]) for given in runs):
        sys.exit(0)  # a signal met one of them alone, which has said so


def run():
    given = parse(Options)
    o = Options(**given)
    began = time.perf_counter()
    mesh = start_world(pick_device(o), o.replicate)
    agreed(lambda: check(given))
    if o.preset == "toy":
        agreed(lambda: dist.get_rank() or toy_world(o.out, o.pictures))
    stand_ins = o.preset == "toy" and o.stage in (None, 1) and not given.keys() >= {"vision", "llm"}
    for stage in [0] * stand_ins + ([1, 2] if o.stage is None else [o.stage]):
        runs = unfinished(given, stage)
        if len(runs) > 1 and mesh.device_type == "cpu" and "WORLD_SIZE" not in os.environ and torch.get_num_threads() > 1:
            side_by_side(runs, stage)
        else:
            for one in runs:
                run_stage(one, stage, mesh)
    if o.stage is None and dist.get_rank() == 0:
        eval.toy_scores(os.path.join(o.out, "stage2"), os.path.join(o.out, "world"), o.out, began)


if __name__ == "__main__":
    launch(run)
