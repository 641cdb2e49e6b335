"""How much memory a training step takes on each rank, foreseen from shapes before the first step.

    weights       what a rank keeps of each parameter: its rows, in fp32 if trained, else in the dtype of the computation
    gradients     fp32, of what trains
    optimiser     AdamW: two fp32 moments and a counter a tensor; Muon: one moment
    gathered      what FSDP holds whole while blocks run: the root's parameters, a block or two, gradients on their way
    activations   what the forward pass keeps for the backward pass, and what the backward pass makes of one block
    update        what there is when the activations are gone: the root's gradients on their way, then Muon's matrices

The first three are exact, the others count tensors. Not counted: the process itself, the tower while it runs, the mapped
files and a second copy of rows that the ranks do not divide, both while the model is dealt out, what an allocator keeps of freed memory. The caching one of cuda rounds a little; the C library's, on a CPU, may keep as much again as
the activations, unless MALLOC_MMAP_THRESHOLD_=131072 in the environment makes it return them at once, at a cost in time.
train.py prints the plan and refuses what cannot fit.
"""
import collections
import dataclasses
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from cli import UserError
from data import IGNORE
from model import Block
from training.feed import padding_share, TrainDataset
from training.muon import Muon
from training.options import title
from baselines import weight_source
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
    once: bool = True  # a step is one micro-batch: gradients come as activations go. Else the first one's are there already

    @property
    def total(self):
        """The peak: at the end of the forward pass, or when the gradients are whole."""
        kept = 0 if self.once else self.gradients
        return self.weights + self.optimiser + max(kept + self.gathered + self.activations, self.gradients + self.update)


def rows(p, ranks):
    """How many numbers of a parameter the fullest of `ranks` ranks keeps: FSDP deals out whole rows."""
    return -(-p.shape[0] // ranks) * (p.numel() // p.shape[0])


def state(model, optimisers, ranks):
    """(weights, gradients, optimiser state) in bytes on the fullest rank, exactly.

    A trained parameter with n numbers here takes 4 n, its gradient 4 n, AdamW 8 n + 4, Muon 4 n; a frozen one its dtype's size.
    """
    weights = sum(rows(p, ranks) * p.element_size() for p in model.parameters())
    gradients = sum(rows(p, ranks) * 4 for p in model.parameters() if p.requires_grad)
    moments = 0
    for optimiser in optimisers:
        for p in (p for group in optimiser.param_groups for p in group["params"]):
            moments += 4 * rows(p, ranks) if isinstance(optimiser, Muon) else 8 * rows(p, ranks) + 4
    return weights, gradients, moments


def count(params, trained=False):
    return sum(p.numel() for p in params if p.requires_grad or not trained)


def gathered(model, size, ranks):
    """(bytes that FSDP holds beyond the shards while blocks run, bytes when the root's gradients are reduced).

    size   bytes of a number in the computation

    While blocks run, size * (root + 2 blocks) for parameters: the root stays whole from forward to backward, and while a
    block works the next arrives, if there are several ranks. Of gradients there are, in a fp32 copy too, those of a block,
    and the head's, which wait for the root's. Then come the root's: size + 4 bytes, and the reduced ones beside those of
    earlier micro-batches. VLoRA's generators are units like blocks; the tower is done before the first block.
    """
    blocks = [list(m.parameters()) for m in model.modules() if isinstance(m, (Block, Generator))]
    inside = {id(p) for unit in [*blocks, model.vision.parameters()] for p in unit}
    root = [p for p in model.parameters() if id(p) not in inside]
    head = (model.llm.embed_tokens if model.llm.lm_head is None else model.llm.lm_head).parameters()
    running = size * (count(root) + (1 + (ranks > 1)) * max(map(count, blocks)) + count(head, trained=True))
    running += (size + 4) * max(count(b, trained=True) for b in blocks)
    return running, size * count(root) + (size + 4 + 4 / ranks) * count(root, trained=True)


def muon(optimisers, ranks=1):
    """Bytes that Muon takes for a moment: for the most numbers in matrices of one shape, whole on each rank, 10 a number.

    They are there in fp32, stacked and, in the iteration, in bf16 three times; and of several ranks each has its own rows again.
    """
    alike = collections.Counter()
    for optimiser in (opt for opt in optimisers if isinstance(opt, Muon)):
        for p in optimiser.param_groups[0]["params"]:
            alike[p.shape] += p.numel()
    return (10 if ranks == 1 else 10 + 4 / ranks) * max(alike.values(), default=0)


def backward(llm, tokens, supervised, size):
    """Bytes that the backward pass makes for a moment: of the head or then of a block, whichever is more.

    The head takes size + 12 bytes for each of V logits of a supervised position (logits, their fp32 copy, log-softmax and its
    gradient), a block 2 D + 2 F numbers per position.
    """
    return max(supervised * llm.vocab * (size + 12), size * tokens * 2 * (llm.width + llm.hidden))


def activations(cfg, samples, length, supervised, pictures, size, trains_llm, plain=False, checkpointing="none",
                device="cpu"):
    """Bytes kept for the backward pass of a micro-batch of a VLM, and what it makes itself.

    cfg  VLMConfig; samples and pictures of a micro-batch; length: positions of a sample; supervised: tokens of a sample
    size  bytes of a number; plain: attention and norms spelt out; checkpointing: none|selective|full

    With D, F, V of the Llama, KV = kv_heads * head width (D for `plain`), a block keeps numbers per position
        4 D + 2 KV + 4 F    both norms' outputs, q, k, v, what attention found; gate, SiLU, up and their product
        2 D + 2 KV + 3 F    if it is frozen: a product with a frozen matrix does not need its input again
    and for each of two norms D of its input, and D more of what its weight scales if that is trained and the norm `plain`; where
    it is neither that nor on cuda, it is spelt out in fp32: 8 D bytes, 4 D if frozen. `plain` attention keeps T scores a head; an
    expert 9 R numbers a position, and its weights twice, 6 R D a sample.
    A checkpointed block keeps D, its input; one at a time is whole again. A picture takes C + 3 D per patch. In VLoRA, with E of
    its generators and Q changed blocks, it takes C + 2 E per patch and for each generator's block 2 E per patch and 20 E per
    query; each site of a changed block keeps R a position, and D R a sample. `backward` comes on top.
    """
    llm, tokens = cfg.llm, samples * length
    D, F, kv = llm.width, llm.hidden, llm.width if plain else llm.kv_heads * (llm.width // llm.heads)
    norm = (1 + trains_llm) * size * D if plain else size * D if device == "cuda" else (8 if trains_llm else 4) * D
    block = tokens * (2 * norm + size * ((4 * D + 4 * F if trains_llm else 2 * D + 3 * F) + 2 * kv))
    block += plain * size * samples * llm.heads * length ** 2
    expert = len(cfg.expert_blocks()) * size * samples * cfg.expert_rank * (9 * length + 6 * D)
    bare = {"none": 0, "selective": llm.depth // 2, "full": llm.depth}[checkpointing]
    blocks = (llm.depth - bare) * block + bare * size * tokens * D + (block if bare == llm.depth else 0)
    spare = backward(llm, tokens, samples * supervised, size)
    N, C, vlora = cfg.vision.tokens, cfg.vision.width, getattr(cfg, "vlora", None)
    if vlora is None:
        return blocks + expert + spare + size * pictures * N * (C + 3 * D)
    E, Q, sites = vlora.embed, len(vlora.blocks(llm)), len(vlora.sites)
    generator = pictures * (N * (C + 2 * E) + sites * vlora.depth * E * (2 * N + 20 * Q))
    return blocks + spare + size * (generator + sites * Q * vlora.rank * (tokens + samples * D))


def room(device):
    """Bytes that all ranks on this machine's cpu, or this rank's cuda device, can have."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak(device):
    """Bytes that this process had at its fullest: allocated tensors on cuda, resident memory on a cpu."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def part_of(name):
    """What the plan calls the part of the model that a parameter belongs to."""
    words = name.split(".")
    if "hypernet" in words:
        return "hypernet"
    return "experts" if {"expert", "expert_1", "expert_2", "guidance_norm", "lora"} & set(words) else words[0]


def estimate_memory(model, opts, samples, o, trains_llm):
    """The memory.Estimate of a step, taking each of its samples for as long as the longest of some."""
    size, shards = getattr(torch, o.dtype).itemsize, dist.get_world_size() // o.replicate
    estimate = Estimate(*state(model, opts, shards))
    if o.stage > 0:  # the toy's stand-ins are small, and no VLM
        estimate.once = o.batch_size == o.micro_batch_size * dist.get_world_size()
        estimate.gathered, reduced = gathered(model, size, shards)
        estimate.update = max(reduced, muon(opts, shards))
        estimate.activations = activations(
            model.cfg, o.micro_batch_size, max(len(s.ids) for s in samples), max(map(supervised, samples)), o.micro_batch_size,
            size, trains_llm or weight_source(model.cfg) == "lora", o.kernels == "eager",
            o.checkpointing, o.device)  # LoRA needs again what a frozen product does not
    return estimate


def share_of_padding(job, o):
    """The share of padding in some steps of the run, from all over it."""
    order, steps = TrainDataset(job.data, o).sampler, max(1, 1024 // o.batch_size)
    rows = [order.step(step) for step in range(0, o.steps, max(1, o.steps // steps))[:steps]]
    batches = np.reshape(rows, (-1, o.micro_batch_size))
    lengths = np.zeros(len(job.data.lengths), np.int64)
    lengths[batches] = [[len(job.data.sample(i).ids) for i in batch] for batch in batches.tolist()]
    return padding_share(lengths, batches)


def supervised(sample):
    return int((sample.labels != IGNORE).sum())


def plan(model, opts, job, o, trains_llm):
    """What is about to happen, on one screen. Raises UserError if it needs more memory than there is."""
    parts = {}
    for name, p in model.named_parameters():
        parts.setdefault(part_of(name), [0, 0])[0 if p.requires_grad else 1] += p.numel()
    n, ranks = len(job.data.lengths), dist.get_world_size()
    some = [job.data.sample(i) for i in range(0, n, max(1, n // 256))] if job.data.sample else []
    epochs = o.steps * o.batch_size / n
    text = [f"{title(o)}: {n:,} samples, {o.steps:,} steps of {o.batch_size} ({epochs:.2f} epochs), "
            f"{o.dtype} on {ranks} x {o.device}{f' in {o.replicate} copies' if o.replicate > 1 else ''}, "
            f"{o.micro_batch_size} samples a rank at once"]
    text += [f"  {part:<12} {a:>14,} trained {b:>14,} frozen" for part, (a, b) in parts.items()]
    if some:
        text += [f"  supervised tokens: about {np.mean([*map(supervised, some)]) * o.steps * o.batch_size:,.0f} (from {len(some)} samples)",
                 f"  padding: about {share_of_padding(job, o):.0%} of the positions"]
    text += [f"  asked every {o.val_every} steps: {job.question}"] if job.question else []
    estimate = estimate_memory(model, opts, some, o, trains_llm)
    shares = ", ".join(f"{f.name} {getattr(estimate, f.name) / GB:.2f}" for f in dataclasses.fields(estimate) if f.name != "once")
    text.append(f"  memory of a rank, GB: {shares}; at its peak {estimate.total / GB:.2f}")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if o.device == "cpu" else 1
    if estimate.total * here > room(o.device):
        raise UserError(f"the run needs about {estimate.total * here / GB:.1f} GB, the {o.device} has "
                        f"{room(o.device) / GB:.1f}: a smaller --micro_batch_size or --checkpointing full makes "
                        f"activations smaller ({estimate.activations / GB:.1f}), more ranks or --tune peft the rest")
    return "\n".join(text)
