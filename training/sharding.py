"""How a model is laid out for training: sharded with FSDP2, compiled, recomputed; and gathered
again.
"""
import functools

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from baselines import LoRA, MatrixNetwork
from hypernet import HyperNetwork
from model import Attention, Block, CLIP, RMSNorm, VisionAttention, VisionBlock
from vlora import Generator

UNITS = (Block, VisionBlock, CLIP, HyperNetwork, MatrixNetwork, Generator)


def shard(model, mesh, dtype):
    """FSDP2: the UNITS, then the root. Computes in `dtype`, reduces gradients in fp32.

    A hypernetwork is called from many blocks, so it is a unit of its own. VLoRA's PerceptualWeights
    is not one: it hands out its own parameters, which must still be there when the blocks use them.

    The units are made without storage. Then each rank gets its own rows of every parameter: fp32
    masters of what trains, `dtype` for what is frozen. So a rank reads and casts only its own rows
    of weights that are mapped from files.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    whole = {name: p.detach() for name, p in model.named_parameters()}
    model.to("meta")
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    for module in reversed(list(model.modules())):  # children before parents
        if module is model or isinstance(module, UNITS):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    state = {}
    for name, p in model.named_parameters():
        # FSDP gives each rank a chunk of rows, as torch.chunk cuts them.
        first = -(-len(p) // mesh.shape[-1]) * mesh.get_coordinate()[-1]
        rows = whole.pop(name)[first:first + len(p.to_local())]
        rows = rows.to(mesh.device_type, p.dtype, copy=True)
        state[name] = DTensor.from_local(rows, mesh, p.placements, run_check=False,
                                         shape=p.shape, stride=p.stride())
    model.load_state_dict(state, assign=True)
    return model


def set_modules(model, *, eager, dropout):
    """eager: attention and norms are written out instead of calling fused kernels (--kernels).
    dropout: share of LoRA's inputs that is dropped while gradients are computed (--lora_dropout).
    """
    for module in model.modules():
        if isinstance(module, (Attention, VisionAttention, RMSNorm)):
            module.eager = eager
        elif isinstance(module, LoRA):
            module.dropout = dropout


def compile_blocks(model):
    """Compile the forward passes of all blocks, the tower's too. Blocks of one shape share the
    code.
    """
    for block in (m for m in model.modules() if isinstance(m, (Block, VisionBlock))):
        block.forward = torch.compile(block.forward, dynamic=True)


def recompute(model, which):
    """Activation checkpointing: recompute each Llama block in the backward pass, or every second
    one.

    which  none|selective|full
    """
    step = {"none": None, "selective": 2, "full": 1}[which]
    for block in model.llm.layers[step - 1::step] if step else ():
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def gather_tensors(model, prefixes, dtype):
    """{name: plain CPU tensor in `dtype`} of the parameters whose names start with one of
    `prefixes`, on rank 0; {} on the others.

    Parameters are gathered one at a time: together, in fp32, they may not fit beside the rest.
    """
    tensors = {}
    model.reshard()  # after an evaluation the root is still whole
    for name, p in model.named_parameters():
        if name.startswith(prefixes):
            tensor = p.detach().full_tensor()
            if dist.get_rank() == 0:
                tensors[name] = tensor.to("cpu", dtype)
    return tensors
