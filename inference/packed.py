"""A model for a CPU: matrices in oneDNN's own layout, and products together with what follows them.

For a few rows, as in decoding, F.linear reads a matrix at a third of the speed of the memory (AMD
EPYC, docs/speed.md); oneDNN's kernels on a packed matrix reach two thirds. `pack` replaces modules
of a model in place. The results are those of model.py up to rounding. Next: captured.py, for GPUs.
"""
import functools
import os
import platform

import torch
import torch.nn.functional as F
from torch import nn

from hypernet import Expert
from model import (attend, Attention, merge_heads, MLP, RMSNorm, rotate, split_heads,
                   VisionAttention, VisionMLP)

ROWS = 64  # the layout is chosen for so many rows; it serves one row and a thousand well, too


class PackedLinear(nn.Module):
    """An nn.Linear with weight float[outputs, inputs] and bias float[outputs] or None."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        self.bias = None if bias is None else bias.detach()

    def forward(self, x, activation="none"):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, activation, [], "")

    def times(self, x, other):
        """The layer's output times `other`."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, "mul")


def pack_linear(*linears):
    """The PackedLinear of an nn.Linear, or of several that read the same input, with their outputs
    side by side.
    """
    weight = torch.cat([linear.weight for linear in linears])
    biases = [linear.bias for linear in linears if linear.bias is not None]
    return PackedLinear(weight, torch.cat(biases) if biases else None)


class PackedAttention(nn.Module):
    """model.Attention with one product for q, k and v."""

    def __init__(self, module):
        super().__init__()
        self.head_dim = module.head_dim
        self.qkv_proj = pack_linear(module.q_proj, module.k_proj, module.v_proj)
        self.o_proj = pack_linear(module.o_proj)
        self.heads, self.kv_heads = (linear.out_features // self.head_dim
                                     for linear in (module.q_proj, module.k_proj))

    def forward(self, x, cos, sin, layer_cache=None):
        qkv = split_heads(self.qkv_proj(x), self.head_dim)  # (B, heads + 2 kv_heads, T, K)
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = rotate(qk, cos, sin).split([self.heads, self.kv_heads], dim=1)
        mask = None
        if layer_cache is not None:
            k, v = layer_cache.update(k, v)
            mask = layer_cache.mask
        if layer_cache is not None and x.shape[1] == 1 and x.dtype == torch.bfloat16:
            out = attend_one(q, layer_cache)
        else:
            out = attend(q, k, v, mask, causal=mask is None and x.shape[1] > 1)
        return self.o_proj(merge_heads(out))


def attend_one(q, cache):
    """Attention of one token a row, q float[B, H, 1, K], over all slots of a LayerCache.

    In bf16 this takes a third of the time of the fused kernel. It also reads the slots that are not
    used yet, because a product of bf16 would copy a slice of them first.
    """
    unused = torch.arange(cache.keys.shape[2]) > cache.positions[:, None, None]  # (B, 1, 1, slots)
    bias = torch.zeros_like(unused, dtype=q.dtype).masked_fill(unused, float("-inf"))
    groups = q.reshape(len(q), cache.keys.shape[1], -1, q.shape[-1])      # the heads of each key
    scores = (groups * q.shape[-1] ** -0.5) @ cache.keys.mT + bias
    return (scores.softmax(-1) @ cache.values).view(q.shape)


class PackedMLP(nn.Module):
    """model.MLP; SiLU and the product with the gate happen inside the layers' products."""

    def __init__(self, module):
        super().__init__()
        self.gate_proj = pack_linear(module.gate_proj)
        self.up_proj = pack_linear(module.up_proj)
        self.down_proj = pack_linear(module.down_proj)

    def forward(self, x):
        return self.down_proj(self.up_proj.times(x, self.gate_proj(x, "swish")))


class PackedVisionAttention(nn.Module):
    """model.VisionAttention with one product for q, k and v."""

    def __init__(self, module):
        super().__init__()
        self.head_dim = module.head_dim
        self.qkv_proj = pack_linear(module.q_proj, module.k_proj, module.v_proj)
        self.out_proj = pack_linear(module.out_proj)

    def forward(self, x):
        q, k, v = split_heads(self.qkv_proj(x), self.head_dim).chunk(3, dim=1)
        return self.out_proj(merge_heads(attend(q, k, v, eager=x.dtype == torch.bfloat16)))


class PackedVisionMLP(nn.Module):
    """model.VisionMLP; the 1.702 of quick_gelu is multiplied into the weights."""

    def __init__(self, module):
        super().__init__()
        self.fc1 = PackedLinear(module.fc1.weight * 1.702, module.fc1.bias * 1.702)
        self.fc2 = PackedLinear(module.fc2.weight / 1.702, module.fc2.bias)

    def forward(self, x):
        return self.fc2(self.fc1(x, "swish"))


class PackedRMSNorm(nn.Module):
    """model.RMSNorm with the scale in fp32, in fewer operations than F.rms_norm takes on a CPU."""

    def __init__(self, module):
        super().__init__()
        self.weight, self.eps = module.weight, module.eps

    def forward(self, x):
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (size.square() / x.shape[-1] + self.eps).rsqrt()
        return (x * scale).to(x.dtype) * self.weight


def run_expert(expert, x, weights, use_id=None):
    """Like Expert.forward. One bf16 token a row is computed with sums, three times as fast."""
    if use_id is not None or x.shape[1] > 1 or x.dtype != torch.bfloat16:
        return type(expert).forward(expert, x, weights, use_id)
    down, up = weights                                                 # (B, 1, 2R, D), (B, 1, R, D)
    gate, value = (down * x[:, :, None]).sum(-1).chunk(2, dim=-1)      # (B, 1, R)
    return (up * (F.silu(gate) * value)[..., None]).sum(2)             # (B, 1, D)


PACKED = {Attention: PackedAttention, MLP: PackedMLP, RMSNorm: PackedRMSNorm,
          VisionAttention: PackedVisionAttention, VisionMLP: PackedVisionMLP}


def has_kernels(dtype):
    """Whether this machine has the kernels for a dtype."""
    x86 = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    return x86 and (dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()))


def can_pack(model):
    """Whether `pack` can and should be used: there are kernels, and the weights take less than a
    third of the machine's memory. Mapped from a file, they would take none; packed, they do.
    """
    if not has_kernels(model.llm.embed_tokens.weight.dtype) or not hasattr(os, "sysconf"):
        return False
    size = sum(p.nbytes for p in model.parameters())
    return size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 3


def pack_modules(module):
    """Replace modules below `module` by their packed forms, except those with LoRA or a ΔW inside.
    """
    for name, child in module.named_children():
        plain = all(type(part) is nn.Linear for part in child.children())
        if type(child) in PACKED and plain:
            setattr(module, name, PACKED[type(child)](child))
        else:
            pack_modules(child)


def pack(model):
    """Change a VLM for inference on a CPU, in place; returns it. A packed model stays as it is.

    It cannot be trained or saved any more.
    """
    pack_modules(model)
    for expert in (m for m in model.llm.modules() if isinstance(m, Expert)):
        expert.forward = functools.partial(run_expert, expert)
    if type(model.llm.lm_head) is nn.Linear:
        model.llm.lm_head = pack_linear(model.llm.lm_head)
    return model
