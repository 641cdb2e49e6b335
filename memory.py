"""How much memory a training step takes on each rank, foreseen from shapes before the first step.

    weights       what a rank keeps of each parameter: its rows, in fp32 if trained, else in the dtype of the computation
    gradients     fp32, of what trains
    optimiser     AdamW: two fp32 moments and a counter a tensor; Muon: one moment
    gathered      what FSDP holds whole for a while: the root's parameters, two blocks, and gradients on their way to the ranks
    activations   what the forward pass keeps for the backward pass

The first three are exact, the others count the tensors that autograd saves. train.py prints the plan and refuses what cannot fit.
"""
import os
from dataclasses import dataclass

import torch

from model import Block
from muon import Muon

GB = 1e9


@dataclass
class Estimate:
    """Bytes on one rank."""
    weights: int
    gradients: int
    optimiser: int
    gathered: int
    activations: int

    @property
    def total(self):
        return self.weights + self.gradients + self.optimiser + self.gathered + self.activations


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


def gathered(model, size):
    """Bytes that FSDP holds beyond the shards, at its peak in the backward pass; `size`: bytes of a number in the computation.

    size * (root + 2 blocks) for parameters: the root stays whole from forward to backward, and while a block works the next
    arrives. (size + 4) * the larger of the two for a unit's gradient, and its fp32 copy that is being reduced.
    """
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    block = max(sum(p.numel() for p in b.parameters()) for b in blocks)
    inside = {id(p) for unit in [*blocks, getattr(model, "vision", None)] if unit is not None for p in unit.parameters()}
    root = [p for p in model.parameters() if id(p) not in inside]
    trained = max(sum(p.numel() for p in root if p.requires_grad),
                  max(sum(p.numel() for p in b.parameters() if p.requires_grad) for b in blocks))
    return size * (sum(p.numel() for p in root) + 2 * block) + (size + 4) * trained


def activations(cfg, samples, length, supervised, pictures, size, trains_llm, plain=False, checkpointing="none",
                device="cpu"):
    """Bytes kept for the backward pass of a micro-batch of a VLM, and of its logits.

    cfg  VLMConfig; samples and pictures of a micro-batch; length: positions of a sample; supervised: tokens of a sample
    size  bytes of a number; plain: attention keeps its scores; checkpointing: none|selective|full

    With D, F, V of the Llama, KV = kv_heads * head width (D for `plain`), a block keeps numbers per position
        4 D + 2 KV + 4 F    both norms' outputs, q, k, v, what attention found; gate, SiLU, up and their product
        2 D + 2 KV + 3 F    if it is frozen: a product with a frozen matrix does not need its input again
    and for each of two norms D of its input on cuda; a cpu spells a norm out in fp32: 8 D bytes, 4 D if frozen. `plain` keeps
    T scores a head; an expert 9 R numbers a position, and its weights twice, 6 R D a sample.
    A checkpointed block keeps D, its input; one at a time is whole again. The head takes size + 12 bytes for each of V logits
    of a supervised position: logits, their fp32 copy, log-softmax and its gradient. A picture takes C + 3 D per patch.
    """
    llm, tokens = cfg.llm, samples * length
    D, F, kv = llm.width, llm.hidden, llm.width if plain else llm.kv_heads * (llm.width // llm.heads)
    norm = size * D if device == "cuda" else (8 if trains_llm else 4) * D
    block = tokens * (2 * norm + size * ((4 * D + 4 * F if trains_llm else 2 * D + 3 * F) + 2 * kv))
    block += plain * size * samples * llm.heads * length ** 2
    expert = len(cfg.expert_blocks()) * size * samples * cfg.expert_rank * (9 * length + 6 * D)
    bare = {"none": 0, "selective": llm.depth // 2, "full": llm.depth}[checkpointing]
    blocks = (llm.depth - bare) * block + bare * size * tokens * D + (block if bare == llm.depth else 0)
    head = samples * supervised * llm.vocab * (size + 12)
    return blocks + expert + head + size * pictures * cfg.vision.tokens * (cfg.vision.width + 3 * D)


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
