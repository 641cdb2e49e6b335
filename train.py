"""Training: stages 0, 1 and 2 as presets of one loop, sharded with FSDP2 at every world size.

    python train.py                                   the toy: stand-ins, alignment, instruction tuning, then scores
    torchrun --nproc_per_node 8 train.py --stage 1 --preset 7b --vision CLIP --llm VICUNA --data J.json --images DIR

A stage is a `Job` (model, data, loss, what to write at the end) made by `stage_0` or `stage_1_or_2`; `train` runs it. What trains
in which stage is said in TRAINS. A run's folder holds log.jsonl, state/ while it lasts, and the checkpoint when it is done.
"""
import contextlib
import dataclasses
import json
import math
import os
import shutil
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
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_state_dict,
                                                     set_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import eval
import toy
import weights
import world
from cli import UserError, main, parse
from data import MULTIPLE, SYSTEM, Conversations, Layout, Order, collate, open_image, pixels, train_tokenizer
from hypernet import HyperNetwork
from model import Attention, Block, CLIP, VisionAttention, VisionBlock
from muon import Muon

# What each stage trains, by prefix of the parameters' names; everything else is frozen (paper §3, "training").
TRAINS = {
    (0, "full"): ("",),
    (0, "peft"): ("",),
    (1, "full"): ("projector.",),
    (1, "peft"): ("projector.",),
    (2, "full"): ("projector.", "llm."),
    (2, "peft"): ("projector.", "llm.hypernet.", "llm.guidance_norm.", "llm.expert."),
}

# LLaVA-1.5's recipe (scripts/v1_5/pretrain.sh and finetune.sh), which HyperLLaVA §4 keeps: batch 32 and 16 on each of 8 GPUs.
LLAVA = {
    1: dict(template="plain", aspect="crop", batch_size=256, micro_batch_size=32, lr=1e-3, epochs=1),
    2: dict(template="v1", aspect="pad", batch_size=128, micro_batch_size=16, lr=2e-5, epochs=1),
}
PRESETS = {
    "7b": LLAVA,
    "13b": LLAVA,
    "toy": {
        0: dict(batch_size=32, lr=2e-3, muon_lr=8e-3, steps=600, schedule="wsd", clip=1.0),
        1: dict(template="plain", batch_size=32, lr=3e-3, steps=250, schedule="wsd", clip=1.0),
        2: dict(template="v1", batch_size=32, lr=2e-3, muon_lr=4e-3, steps=1100, schedule="wsd", clip=1.0),
    },
}
TOY = dict(vision="stage0/clip", llm="stage0/llm", system="", aspect="pad", expert_embed=16, group_by_length=True, cache_features=True,
           attention="plain", log_every=20, val_every=300, save_every=200)


@dataclass
class Options:
    """Train HyperLLaVA. Without --stage: the toy from nothing to its scores. Options left out are the preset's."""
    stage: int | None = None         # 0: the toy's stand-ins; 1: align the projector; 2: instruction tuning
    preset: Literal["toy", "7b", "13b"] = "toy"  # recipe: batch, learning rate, steps, template
    vision: str | None = None        # stage 1: folder or hub name of a CLIP
    llm: str | None = None           # stage 1: folder or hub name of a Llama
    data: str | None = None          # LLaVA's JSON file
    images: str | None = None        # folder that its pictures' paths start from
    val: str | None = None           # JSON file for the held-out loss, pictures in the same folder
    out: str = "out/toy"             # a run's folder; stage N writes OUT/stageN
    init: str | None = None          # stage 2: checkpoint to start from (OUT/stage1)
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
    dtype: Literal["bfloat16", "float32"] | None = None  # of the computation; none: bf16 where it is fast
    device: Literal["cuda", "cpu"] | None = None  # none: cuda if there is one
    workers: int = 0                 # processes that prepare batches
    log_every: int = 1               # steps between printed lines; log.jsonl gets every step
    val_every: int = 100             # steps between held-out losses
    save_every: int = 1000           # steps between saved states

    def __post_init__(self):
        for name in ("steps", "epochs", "batch_size", "micro_batch_size", "pictures", "log_every", "val_every", "save_every"):
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


def total(value, mesh):
    """A number summed over all ranks."""
    t = torch.tensor(float(value), device=mesh.device_type, dtype=torch.float64 if mesh.device_type == "cpu" else torch.float32)
    dist.all_reduce(t)
    return t.item()


# ---- Data order: f(seed, epoch, step) and nothing else


class Feed(Dataset):
    """The micro-batches of this rank, in order: item k is micro-batch k % accumulation of step k // accumulation.

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
        return self.job.batch(rows[first:first + self.o.micro_batch_size])


# ---- State: what a run needs to go on


def state_of(model, opts):
    """Model and optimiser state of what trains, as torch.distributed.checkpoint wants it."""
    part, optim = get_state_dict(model, opts, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": part, "optim": optim}


def save_state(folder, step, model, opts):
    """Write folder/step_NNNNNN whole or not at all, then drop all others."""
    path = os.path.join(folder, f"step_{step:06d}")
    dcp.save(state_of(model, opts), checkpoint_id=path + ".tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(path + ".tmp", path)
        for other in os.listdir(folder):
            if other != os.path.basename(path):
                shutil.rmtree(os.path.join(folder, other))
    dist.barrier()


def saved_steps(folder):
    """Steps with a whole saved state, ascending."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(n.removeprefix("step_")) for n in names if n.startswith("step_") and not n.endswith(".tmp"))


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


def train_step(job, model, opts, batches, step, o, mesh):
    """One optimiser step over this rank's micro-batches: (loss per supervised token, gradient norm, positions), global.

    The loss is the sum over supervised tokens divided by their number in the *global* batch, so that accumulation and
    the number of ranks leave the gradients alone. (LLaVA takes the mean of each micro-batch's mean.)
    """
    tokens = total(sum(job.tokens(b) for b in batches), mesh)
    if tokens == 0:
        raise UserError(f"no supervised token in the batch of {', '.join(r for b in batches for r in b.records)}")
    summed = 0.0
    for batch in batches:
        loss = job.loss(model, batch.to(mesh.device_type)) / tokens
        (loss * dist.get_world_size()).backward()  # FSDP averages over ranks, the loss is a sum
        summed += loss.item()
    loss = total(summed, mesh)
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], o.clip or math.inf)
    norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise UserError(f"step {step}: loss {loss}, gradient norm {norm}, stopped before the update; "
                        f"records {', '.join(r for b in batches for r in b.records)}")
    for opt in opts:
        opt.step()
        opt.zero_grad()
    return loss, norm, total(sum(b.lengths.sum().item() for b in batches), mesh)


def cut_log(path, step):
    """Drop the lines of log.jsonl from `step` on: a resumed run writes them again."""
    lines = open(path).readlines() if os.path.exists(path) else []
    kept = lines[:step] if step else []  # a line a step, the last one perhaps cut off by a kill
    with open(path + ".tmp", "w") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)


def train(job, o, mesh):
    """Run a job for o.steps optimiser steps and write its checkpoint."""
    out, rank = stage_folder(o), dist.get_rank()
    o.steps = o.steps or math.ceil(o.epochs * len(job.lengths) / o.batch_size)
    for module in job.model.modules():
        if isinstance(module, (Attention, VisionAttention)):
            module.plain = o.attention == "plain"
    freeze(job.model, TRAINS[o.stage, o.tune], getattr(torch, o.dtype))
    model = shard(job.model, mesh, getattr(torch, o.dtype))
    opts = optimisers(model, o)
    if rank == 0:
        print(plan(model, job, o), file=sys.stderr)

    states, log_path = os.path.join(out, "state"), os.path.join(out, "log.jsonl")
    start = 0
    if o.resume:
        if not saved_steps(states):
            raise UserError(f"--resume: no saved state in {states}")
        start = saved_steps(states)[-1]
        load_state(states, start, model, opts)
    elif rank == 0:
        shutil.rmtree(states, ignore_errors=True)
    if rank == 0:
        cut_log(log_path, start)
    feed = Feed(job, o)
    loader = iter(DataLoader(feed, batch_size=None, sampler=range(start * feed.accumulation, len(feed)),
                             num_workers=o.workers))
    began = time.perf_counter()
    with open(log_path, "a") if rank == 0 else contextlib.nullcontext() as log, \
            tqdm(range(start, o.steps), f"stage {o.stage}", initial=start, total=o.steps, disable=rank > 0,
                 mininterval=1 if sys.stderr.isatty() else 15) as bar:
        for step in bar:
            batches = [next(loader) for _ in range(feed.accumulation)]
            factor = schedule(step, o)
            for opt, lr in zip(opts, (o.lr, o.muon_lr)):
                opt.param_groups[0]["lr"] = lr * factor
            loss, norm, positions = train_step(job, model, opts, batches, step, o, mesh)

            now = time.perf_counter()
            row = {"step": step, "loss": loss, "lr": o.lr * factor, "grad_norm": norm,
                   "tokens_per_s": positions / (now - began)}  # text and image tokens, without padding
            if job.held_out and (step + 1 == o.steps or (step + 1) % o.val_every == 0):
                row |= evaluate(job, model, mesh)
            began = time.perf_counter()
            if rank == 0:
                print(json.dumps(row), file=log, flush=True)
            if rank == 0 and (step % o.log_every == 0 or "held_out" in row):
                bar.write(line(row, o), file=sys.stderr)
            if (step + 1) % o.save_every == 0 and step + 1 < o.steps:
                save_state(states, step + 1, model, opts)
    tensors = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        dtype = getattr(torch, o.dtype)
        job.finish({k: v.to(dtype) for k, v in tensors.items()})
        shutil.rmtree(states, ignore_errors=True)
    dist.barrier()


def plan(model, job, o):
    """What is about to happen, in a line."""
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return (f"stage {o.stage}: {trains:,} parameters train, {frozen:,} are frozen; {len(job.lengths):,} samples, {o.steps:,} steps "
            f"of {o.batch_size}; {o.dtype} on {dist.get_world_size()} x {o.device}")


def line(row, o):
    """One aligned line of the log."""
    text = (f"stage {o.stage}  step {row['step'] + 1:5d}/{o.steps}  loss {row['loss']:7.4f}  lr {row['lr']:.2e}  "
            f"grad {row['grad_norm']:7.3f}  {row['tokens_per_s']:7.0f} tok/s")
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
               lambda tensors: toy.finish(tensors, tokenizer, stage_folder(o)))


def vlm_loss(model, batch):
    """Next-token loss summed over the supervised positions, the only ones that have logits."""
    logits = model(batch.ids, batch.visual, batch.pool_id, batch.use_id, batch.turns, batch.at)
    return F.cross_entropy(logits.float(), batch.target, reduction="sum")


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
            made = model.features(torch.stack([read(p, p) for p in some]).to(o.device, dtype)).cpu()
            found |= zip(some, made)
    model.vision.to("cpu")
    return lambda sample: found[sample.image]


def stage_1_or_2(o):
    """Alignment (1) or instruction tuning (2) of a VLM on LLaVA's data."""
    options = {k: getattr(o, k) for k in ("visual_expert", "language_expert", "guidance_after", "expert_embed", "expert_rank")}
    dtype = getattr(torch, o.dtype)
    if o.stage == 1:  # the language experts join in stage 2: nobody has asked anything yet
        options |= {"language_expert": "none", "guidance_after": None}
        parts = {"vision": o.vision, "llm": o.llm}
        model, tokenizer, preprocess = weights.assemble(*map(weights.resolve, parts.values()), options, dtype, o.seed)
        sources = {part: weights.source(name, stage_folder(o)) for part, name in parts.items()}
    else:
        point, sources = weights.load(o.init, dtype, options, o.seed), {}
        model, tokenizer, preprocess = point.model, point.tokenizer, point.preprocess
    preprocess = dataclasses.replace(preprocess, aspect=o.aspect)
    context = o.context or min(2048, model.cfg.llm.context)
    layout = Layout(o.template, o.system, model.cfg.vision.tokens, context, o.guidance_pool)
    data = [Conversations(path, o.images, tokenizer, layout) for path in (o.data, o.val) if path]
    picture = pictures(data, model, preprocess, o)
    blank = (model.cfg.vision.tokens, model.cfg.vision.width) if o.cache_features else (3, preprocess.size, preprocess.size)

    def batch(rows, source=data[0]):
        samples = [source[i] for i in rows]
        return collate(samples, [picture(s) for s in samples if s.image is not None], blank, multiple=MULTIPLE)

    held_out = [batch(range(i, min(i + 64, len(d))), d) for d in data[1:] for i in range(0, min(len(d), 512), 64)]

    def finish(tensors):
        kept = tensors if o.stage == 2 else {k: v for k, v in tensors.items() if k.startswith("projector.")}
        weights.save(stage_folder(o), model.cfg, kept, tokenizer, preprocess, o.system, o.stage,
                     sources, dataclasses.asdict(o))

    return Job(model, data[0].lengths, batch, held_out, vlm_loss, lambda b: b.trained, finish)


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
    o = complete(given, stage)
    out = stage_folder(o)
    if dist.get_rank() == 0:
        os.makedirs(out, exist_ok=True)
    dist.barrier()
    torch.manual_seed(o.seed)
    job = stage_0(o) if stage == 0 else stage_1_or_2(o)
    train(job, o, mesh)


def run():
    given = parse(Options)
    o = Options(**given)
    began = time.perf_counter()
    mesh = start_world(pick_device(o))
    if o.stage not in (None, 0, 1, 2) or (o.preset != "toy" and o.stage not in (1, 2)):
        raise UserError(f"--stage {o.stage} with preset {o.preset}: expected 1 or 2; the toy also has 0, or none for all")
    if o.stage is not None and finished(o.out, o.stage) and not o.overwrite:
        raise UserError(f"{os.path.join(o.out, f'stage{o.stage}')} is finished: --overwrite trains it anew")
    if o.stage is None and o.overwrite:
        raise UserError("--overwrite goes with --stage; to train all anew, name another folder with --out")
    if o.stage is not None:
        complete(given, o.stage)  # mistakes show before any work
    if o.preset == "toy" and dist.get_rank() == 0:
        world.write_world(os.path.join(o.out, "world"), o.pictures, side=toy.VISION.image_size, texts=o.pictures,
                          test_pictures=min(250, o.pictures))
    dist.barrier()
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
    except SystemExit as end:  # a user's error or Ctrl-C: say so, and leave without waiting for the other ranks
        if not dist.is_initialized():
            raise
        print(end.code if isinstance(end.code, str) else "", file=sys.stderr, flush=True)
        os._exit(end.code if isinstance(end.code, int) else 1)
    leave()
