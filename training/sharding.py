"""TODO"""
import functools

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from baselines import MatrixNetwork
from hypernet import HyperNetwork
from model import Block, CLIP, VisionBlock
from vlora import Generator


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


def compile_blocks(model):
    """Let torch.compile make the forward passes of all blocks, the tower's too. Blocks of one form share what it makes."""
    for block in (m for m in model.modules() if isinstance(m, (Block, VisionBlock))):
        block.forward = torch.compile(block.forward, dynamic=True)


def recompute(model, which):
    """Forget what a Llama block computed, and compute it again in the backward pass: each block, or every second one."""
    blocks = [] if which == "none" else model.llm.layers
    for block in blocks[1::2] if which == "selective" else blocks:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def gather_tensors(model, prefixes, dtype):
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
