"""Muon: momentum whose update is made (nearly) orthogonal, matrix by matrix.

The toy trains its blocks with it. The method is Keller Jordan's,
https://kellerjordan.github.io/posts/muon/. On one process our update equals that of
`torch.optim.Muon` bit for bit. We do not use that class: with sharded tensors (DTensor) it
communicates inside every product and fails if the rows do not divide evenly among the ranks.
Here each rank gathers the whole update, orthogonalises all matrices of one shape at once, and
keeps its own rows. Next: train.py, which decides what Muon trains.
"""
from collections import defaultdict

import torch
from torch.distributed.tensor import distribute_tensor, DTensor, Shard

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # a, b, c of the quintic


def orthogonalise(g, steps=5):
    """float[n, rows, columns] -> the same with singular values in about 0.7 .. 1.2.

    Newton-Schulz iteration in bf16: a step takes every singular value s to a s + b s^3 + c s^5.
    """
    a, b, c = COEFFICIENTS
    tall = g.shape[-2] > g.shape[-1]
    x = g.bfloat16().mT if tall else g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        quintic = torch.baddbmm(square, square, square, beta=b, alpha=c)  # b x x' + c (x x')^2
        x = torch.baddbmm(x, quintic, x, beta=a)  # a x + (b x x' + c (x x')^2) x
    return (x.mT if tall else x).to(g.dtype)


def local(tensor):
    """The rows of a tensor that this rank holds: all of them if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def apply_whole(function, rows, p):
    """Apply `function` to matrices of which each rank holds some rows.

    rows     float[n, rows of this rank, columns], n matrices sharded like `p`
    returns  this rank's rows of function(float[n, all rows, columns])
    """
    if not isinstance(p, DTensor):
        return function(rows)
    placements = [Shard(1) if place.is_shard() else place for place in p.placements]
    shape, stride = (len(rows), *p.shape), (p.numel(), p.shape[1], 1)
    stack = DTensor.from_local(rows, p.device_mesh, placements, run_check=False,
                               shape=torch.Size(shape), stride=stride)
    result = function(stack.full_tensor())  # the same on every rank, so nothing is sent back
    return distribute_tensor(result, p.device_mesh, placements, src_data_rank=None).to_local()


class Muon(torch.optim.Optimizer):
    """For 2-D weights inside blocks. Embeddings, heads, norms and biases belong to AdamW.

    A good lr is about 10 times that of AdamW.
    """

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):  # torch.distributed.checkpoint passes a closure
        for group in self.param_groups:
            same_shape = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    same_shape[p.shape].append(p)
            for shape, params in same_shape.items():
                momenta = torch.stack([self.nesterov(p, group["momentum"]) for p in params])
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, apply_whole(orthogonalise, momenta, params[0])):
                    local(p).sub_(update, alpha=scale)

    def nesterov(self, p, decay):
        """This rank's rows of the Nesterov momentum of `p`, updated with its gradient."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum, grad = local(state["momentum"]), local(p.grad)
        momentum.lerp_(grad, 1 - decay)
        return grad.lerp(momentum, decay)
