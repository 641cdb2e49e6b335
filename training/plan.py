"""The plan of a run, printed before its first step: what it trains, and how much memory it needs.

    weights      what a rank keeps of each parameter: its rows, in fp32 if trained, else in o.dtype
    gradients    fp32, of what trains
    optimiser    AdamW: two fp32 moments, and a counter for each tensor; Muon: one moment
    gathered     what FSDP holds whole while blocks run: the root's parameters, one or two blocks,
                 and gradients that are not reduced yet
    activations  what the forward pass keeps for the backward pass, and what that needs for a block
    update       after the backward pass: the root's gradients before they are reduced; Muon's work

The first three are exact; the others follow from the shapes of tensors. The estimate leaves out the
process itself, the tower while it runs, mapped files and second copies while the model is sharded,
and freed memory that an allocator keeps. CUDA's allocator keeps little. The C library's, on a CPU,
may keep as much as the activations again: MALLOC_MMAP_THRESHOLD_=131072 in the environment makes
it return memory at once, which costs time. FLOPs are in costs.py. Next: train.py, which prints it.
"""
import collections
import dataclasses
import os
import re
import resource
import sys
import textwrap
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from cli import UserError
from data import IGNORE
from model import Block
from training.costs import (expert_weights, generated_weights, GUIDED, kv_width, source_of,
                            vlora_of)
from training.distributed import local_world
from training.feed import padded, TrainDataset
from training.muon import Muon
from training.options import title
from vlora import Generator

GB = 1e9


@dataclass
class Estimate:
    """Bytes on one rank."""
    weights: int
    gradients: int
    optimiser: int
    gathered: int = 0
    activations: int = 0
    update: int = 0
    once: bool = True  # one micro-batch a step: gradients grow while activations shrink

    @property
    def total(self):
        """The peak: at the end of the last forward pass, or when all gradients are there."""
        forward = self.gathered + self.activations + (0 if self.once else self.gradients)
        return self.weights + self.optimiser + max(forward, self.gradients + self.update)


# ---- Exact: weights, gradients, optimiser


def local_size(p, ranks):
    """Numbers of a parameter on the rank that has most of them: FSDP splits by rows."""
    return -(-p.shape[0] // ranks) * (p.numel() // p.shape[0])


def state(model, optimisers, ranks):
    """(weights, gradients, optimiser state) in bytes on the rank that has most, exactly.

    Of a trained parameter with n numbers: weights 4 n, gradient 4 n, AdamW 8 n + 4 or Muon 4 n.
    """
    weights = sum(local_size(p, ranks) * p.element_size() for p in model.parameters())
    gradients = sum(4 * local_size(p, ranks) for p in model.parameters() if p.requires_grad)
    moments = 0
    for optimiser in optimisers:
        for p in (p for group in optimiser.param_groups for p in group["params"]):
            n = local_size(p, ranks)
            moments += 4 * n if isinstance(optimiser, Muon) else 8 * n + 4
    return weights, gradients, moments


# ---- From shapes: what is there for a moment


def count(params, trained=False):
    """How many numbers parameters have, or only those that train."""
    return sum(p.numel() for p in params if p.requires_grad or not trained)


def gathered(model, size, ranks):
    """(bytes that FSDP holds beside the shards while blocks run, bytes while the root is reduced).

    size   bytes of a number in the computation

    Parameters: the root's stay whole from forward to backward; while a block works, several ranks
    fetch the next one. Gradients, with an fp32 copy: those of one block; the head's wait for the
    root's. Then the root's: size + 4 bytes each, and the reduced ones beside those of earlier
    micro-batches. VLoRA's generators are units like blocks. The tower ends before the first block.
    """
    blocks = [list(m.parameters()) for m in model.modules() if isinstance(m, (Block, Generator))]
    inside = {id(p) for unit in [*blocks, model.vision.parameters()] for p in unit}
    root = [p for p in model.parameters() if id(p) not in inside]
    head = model.llm.embed_tokens if model.llm.lm_head is None else model.llm.lm_head
    largest, trained = max(map(count, blocks)), max(count(block, trained=True) for block in blocks)
    running = count(root) + (1 + (ranks > 1)) * largest + count(head.parameters(), trained=True)
    reduced = size * count(root) + (size + 4 + 4 / ranks) * count(root, trained=True)
    return size * running + (size + 4) * trained, reduced


def muon_bytes(optimisers, ranks=1):
    """Bytes of Muon's work on the shape with most numbers: 10 for each number, whole on each rank.

    Matrices of one shape are stacked in fp32 and, while it iterates, three times in bf16; each of
    several ranks adds its own rows.
    """
    sizes = collections.Counter()
    for optimiser in (opt for opt in optimisers if isinstance(opt, Muon)):
        for p in optimiser.param_groups[0]["params"]:
            sizes[p.shape] += p.numel()
    return (10 if ranks == 1 else 10 + 4 / ranks) * max(sizes.values(), default=0)


# ---- From shapes: activations


@dataclass
class MicroBatch:
    """The shape of the samples that a rank processes at once."""
    samples: int
    length: int      # positions of a sample, with image tokens and padding
    supervised: int  # supervised tokens, in all
    pictures: int    # in all
    turns: int = 1   # of a sample

    @property
    def tokens(self):
        return self.samples * self.length

    @classmethod
    def of(cls, samples):
        pictures = sum(sample.image is not None for sample in samples)
        return cls(len(samples), padded(max(len(sample.ids) for sample in samples)),
                   sum(map(supervised_tokens, samples)), pictures or 1,  # a blank one
                   max(sample.turns for sample in samples))


def backward(llm, batch, size, expert=0):
    """Bytes that the backward pass allocates for the head or for a block, the larger of the two.

    Head: size + 12 bytes for each of V logits at a supervised position (logits, their fp32 copy,
    log-softmax and its gradient). Block: 2 D + 2 F numbers per position, and twice the numbers that
    its expert keeps.
    """
    head = batch.supervised * llm.vocab * (size + 12)
    return max(head, size * (batch.tokens * 2 * (llm.width + llm.hidden) + 2 * expert))


def block_activations(llm, batch, size, trains, eager, device):
    """Bytes that a block of the Llama keeps for the backward pass; the arguments of `activations`.

    With KV the width of keys and values (D if eager), it keeps numbers per position:
        4 D + 2 KV + 4 F   outputs of both norms and attention, q, k, v; gate, SiLU, up, product
        2 D + 2 KV + 3 F   if it is frozen: its products do not need their inputs again
    Each norm keeps its input, D numbers; an eager one that trains D more. On a CPU the fused norm
    keeps fp32: 8 D bytes, 4 D if frozen. Eager attention keeps T scores per head and position.
    """
    D, F, kv = llm.width, llm.hidden, llm.width if eager else kv_width(llm)
    norm = size * D * (2 if eager and trains else 1)
    if not eager and device == "cpu":
        norm = (8 if trains else 4) * D
    linear = 4 * D + 4 * F if trains else 2 * D + 3 * F
    scores = llm.heads * batch.length if eager else 0
    return batch.tokens * (2 * norm + size * (linear + 2 * kv + scores))


def activations(cfg, batch, *, size, trains_llm, eager=False, checkpointing="none", device="cpu"):
    """Bytes that a VLM keeps for the backward pass of a MicroBatch, and those of that pass itself.

    size        bytes of a number
    trains_llm  whether the Llama's own products need their inputs again
    eager       attention and norms are written out; checkpointing: none|selective|full

    A checkpointed block keeps D numbers per position, its input; one at a time is whole again.
    A language expert keeps, for each turn, 4 R numbers per position (a whole matrix: D) and its
    weights per sample.
    A picture keeps C + 3 D numbers per patch. In VLoRA it keeps C + 2 E per patch and, for each
    block of a generator, 2 E per patch and 20 E per query; each changed matrix keeps R numbers per
    position and D R per sample.
    """
    llm, vlora, D, R = cfg.llm, vlora_of(cfg), cfg.llm.width, cfg.expert_rank
    bare = {"none": 0, "selective": llm.depth // 2, "full": llm.depth}[checkpointing]
    whole = max(1, llm.depth - bare)
    block = block_activations(llm, batch, size, trains_llm, eager, device)
    total = whole * block + bare * size * batch.tokens * D
    N, C = cfg.vision.tokens, cfg.vision.width
    if vlora is None:
        experts = -(-len(cfg.expert_blocks()) * whole // llm.depth)  # in blocks that are whole
        source = source_of(cfg)
        turns = min(experts, 1) * (batch.turns if source in GUIDED else 1)
        expert = turns * (batch.tokens * (D if source == "mlp" else 4 * R)
                          + batch.samples * expert_weights(source, D, D, R))
        total += backward(llm, batch, size, expert)
        return total + size * (experts * expert + batch.pictures * N * (C + 3 * D))
    E, Q = vlora.embed, len(vlora.blocks(llm))
    picture = N * (C + 2 * E) + len(vlora.sites) * vlora.depth * E * (2 * N + 20 * Q)
    branches = generated_weights(cfg) // D * (batch.tokens + batch.samples * D)
    return total + backward(llm, batch, size) + size * (batch.pictures * picture + branches)


# ---- What there is


def room(device):
    """Bytes that all ranks on this machine's CPU, or this rank's CUDA device, can have."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak(device):
    """Most bytes that this process has had: allocated tensors on CUDA, resident memory on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform != "linux":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as f:  # ru_maxrss would count the parent process, too
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


# ---- The plan


def estimate_memory(model, opts, batches, o, trains_llm):
    """The Estimate of a step with the largest of some MicroBatches."""
    size, shards = getattr(torch, o.dtype).itemsize, dist.get_world_size() // o.replicate
    estimate = Estimate(*state(model, opts, shards))
    if o.stage > 0:  # stage 0 trains the toy's small stand-ins, which are no VLM
        estimate.once = o.batch_size == o.micro_batch_size * dist.get_world_size()
        estimate.gathered, reduced = gathered(model, size, shards)
        estimate.update = max(reduced, muon_bytes(opts, shards))
        estimate.activations = max(activations(
            model.cfg, batch, size=size,
            trains_llm=trains_llm or source_of(model.cfg) == "lora",  # LoRA needs the same inputs
            eager=o.kernels != "fused", checkpointing=o.checkpointing, device=o.device)
            for batch in batches)
    return estimate


def typical_and_longest(dataset, o):
    """(micro-batches of steps from the whole run, micro-batches of its longest steps): each is
    [[Sample, ...], ...], of all ranks; about 1024 samples, and 512 with pictures and 512 without.

    To find the longest, at most 5,000 steps are compared by the sizes of their records, of which a
    token has about 4 bytes.
    """
    data, count = dataset.data, max(1, 1024 // o.batch_size)
    steps = range(0, o.steps, -(-o.steps // 5000))
    rows = np.array([dataset.sampler.step(step) for step in steps])
    sizes = np.minimum(data.lengths, 4 * (o.context or 2048))[rows].sum(1)
    longest = []
    for kind in (True, False):
        own = np.flatnonzero(data.has_image[rows].any(1) == kind)
        longest += [steps[i] for i in own[np.argsort(sizes[own])[-max(1, count // 2):]]]
    typical = range(0, o.steps, max(1, o.steps // count))[:count]
    return [[[data.sample(i) for i in batch] for step in some
             for batch in dataset.micro_batches(step)] for some in (typical, longest)]


def share_of_padding(batches):
    """The share of padding among the positions of batches, [[Sample, ...], ...]."""
    places = sum(MicroBatch.of(batch).tokens for batch in batches)
    return 1 - sum(len(sample.ids) for batch in batches for sample in batch) / places


def count_cut(data):
    """How many conversations the context cuts, of about 256 from the whole of the data, as text."""
    some = range(0, len(data), max(1, len(data) // 256))
    return f"{sum(map(data.is_cut, some))} of {len(some)} samples"


def supervised_tokens(sample):
    return int((sample.labels != IGNORE).sum())


def part_of(name):
    """The plan's name for the part of the model that a parameter belongs to."""
    words = name.split(".")
    if "hypernet" in words:
        return "hypernet"
    experts = {"expert", "expert_1", "expert_2", "guidance_norm", "lora"}
    return "experts" if experts & set(words) else words[0]


def part_lines(model):
    """How many parameters train and how many are frozen, a line for each part of the model."""
    parts = collections.defaultdict(lambda: [0, 0])
    for name, p in model.named_parameters():
        parts[part_of(name)][not p.requires_grad] += p.numel()
    return [f"  {part:<12} {trained:>14,} trained {frozen:>14,} frozen"
            for part, (trained, frozen) in parts.items()]


def memory_lines(estimate):
    """What is not zero of the estimate, then its peak, which `foreseen_gb` reads."""
    sizes = {k: v / GB for k, v in dataclasses.asdict(estimate).items() if k != "once"}
    shown = ", ".join(f"{name} {size:.2f}" for name, size in sizes.items() if size >= 0.005)
    return [f"  memory of a process, GB: {shown or 'hardly any'}",
            f"  at the peak {estimate.total / GB:.2f} GB of tensors, plus the process itself"]


def foreseen_gb(text):
    """The peak of tensors in GB that a printed plan foresees."""
    return float(re.search(r"at the peak ([\d.]+) GB of tensors", text)[1])


def check_memory(estimate, o):
    """UserError if the run needs more memory than there is."""
    here = local_world()[1] if o.device == "cpu" else 1  # processes that share the memory
    if estimate.total * here > room(o.device):
        raise UserError(
            f"the run needs about {estimate.total * here / GB:.1f} GB, the {o.device} has "
            f"{room(o.device) / GB:.1f}: a smaller --micro_batch_size or --checkpointing full "
            f"reduces activations ({estimate.activations / GB:.1f} GB), more ranks or --tune peft "
            f"the rest")


def plan(model, opts, stage, o, trains_llm):
    """What the run will do, on one screen; UserError if it needs more memory than there is."""
    n, ranks = len(stage.data), dist.get_world_size()
    seen, copies = o.steps * o.batch_size, f" in {o.replicate} copies" if o.replicate > 1 else ""
    text = [f"{title(o)}: {n:,} samples, {o.steps:,} steps of {o.batch_size} "
            f"({seen / n:.2f} epochs)",
            f"  {o.dtype}, {ranks} process{'es' * (ranks > 1)} on {o.device.upper()}{copies}, "
            f"micro-batch {o.micro_batch_size}", *part_lines(model)]
    batches = []
    if stage.data.sample:
        typical, longest = typical_and_longest(TrainDataset(stage.data, o), o)
        batches, samples = [*map(MicroBatch.of, typical + longest)], sum(typical, [])
        supervised = np.mean([*map(supervised_tokens, samples)]) * seen
        text += [f"  supervised tokens: about {supervised:,.0f} (from {len(samples)} samples)",
                 f"  padding: about {share_of_padding(typical):.0%} of the positions; about "
                 f"{max(batch.tokens for batch in batches):,} in the largest micro-batch",
                 f"  cut by the context: {count_cut(stage.data)}"]
    text += [f"  every {o.val_every} steps: {stage.question}"] if stage.question else []
    estimate = estimate_memory(model, opts, batches, o, trains_llm)
    check_memory(estimate, o)
    text += memory_lines(estimate)
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="    ") for line in text)


def print_plan(model, opts, stage, o, trains_llm):
    """Print the plan on rank 0. Raises UserError on all ranks as `plan` does."""
    text = plan(model, opts, stage, o, trains_llm)
    if dist.get_rank() == 0:
        print(text, file=sys.stderr)
