"""Muon: momentum whose update, for each weight matrix, is made (nearly) orthogonal. An alternative to AdamW in train.py.

After Keller Jordan's https://kellerjordan.github.io/posts/muon/; `torch.optim.Muon` does the same one matrix at a time. Here
matrices of one shape go through the iteration as a stack, and the matrices may be sharded (DTensor): a rank gathers the
whole update, orthogonalises it, and keeps its own rows.
"""
from collections import defaultdict

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that drives singular values into 0.7 .. 1.2 within five steps


def orthogonalise(g, steps=5):
    """float[n, rows, columns] -> the same with singular values near 1, by Newton-Schulz iteration in bf16."""
    a, b, c = COEFFICIENTS
    x = g.bfloat16()
    x = x.mT if g.shape[-2] > g.shape[-1] else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        quintic = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, quintic, x, beta=a)  # a x + (b x x' + c (x x')²) x
    return (x.mT if g.shape[-2] > g.shape[-1] else x).to(g.dtype)


def own(p):
    """The rows of a tensor that this rank holds; all of them if it is not sharded."""
    return p.to_local() if isinstance(p, DTensor) else p


def everywhere(update, stack, p):
    """update(whole stack) of a stack float[n, own rows, columns] of matrices like `p`; returns this rank's rows of it again."""
    if not isinstance(p, DTensor):
        return update(stack)
    rows = [Shard(1) if place.is_shard() else place for place in p.placements]
    shape = torch.Size((len(stack), *p.shape))
    whole = DTensor.from_local(stack, p.device_mesh, rows, run_check=False, shape=shape, stride=(shape[1] * shape[2], shape[2], 1))
    found = DTensor.from_local(update(whole.full_tensor()), p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return found.redistribute(placements=rows).to_local()


class Muon(torch.optim.Optimizer):
    """For 2-D weights inside blocks; embeddings, heads, norms and biases belong to AdamW. lr is about 10 x an AdamW lr."""

    def __init__(self, params, lr, momentum=0.95):
        super().__init__(params, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure=None):  # the signature that torch.distributed.checkpoint calls
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[p.shape].append(p)
            for shape, params in alike.items():
                ahead = torch.stack([self.momentum(p, group["momentum"]) for p in params])
                updates = everywhere(orthogonalise, ahead, params[0])
                scale = group["lr"] * max(1, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, updates):
                    own(p).sub_(update, alpha=scale)

    def momentum(self, p, decay):
        """This rank's rows of the Nesterov momentum of a parameter, after taking in its gradient."""
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        mean, grad = own(state["momentum"]), own(p.grad)
        mean.lerp_(grad, 1 - decay)
        return grad.lerp(mean, decay)
