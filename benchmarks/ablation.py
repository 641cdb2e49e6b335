"""TODO"""
import contextlib

from baselines import LoRA, MatrixExpert, MatrixNetwork
from hypernet import Expert, HyperNetwork
from vlora import Generator, PerceptualWeights


# ---- What the experts contribute: two ways to take it away


@contextlib.contextmanager
def experts_off(model):
    """Within this context every generated shift is exactly zero: no up-projection is left. A VLoRA is blind then."""
    ups = [m.up.weight for m in model.modules() if isinstance(m, (HyperNetwork, MatrixNetwork))]
    ups += [m.up for m in model.modules() if isinstance(m, (Expert, MatrixExpert, LoRA))]
    ups += [m.Bs for m in model.modules() if isinstance(m, PerceptualWeights)]
    kept = [up.detach().clone() for up in ups]
    for up in ups:
        up.data.zero_()
    try:
        yield
    finally:
        for up, old in zip(ups, kept):
            up.data.copy_(old)


@contextlib.contextmanager
def experts_swapped(model):
    """Within this context each row runs with the weights generated for another row, half a batch away."""
    half = lambda x: x.roll(max(1, len(x) // 2), 0)
    swap = lambda module, inputs: (*inputs[:-1], half(inputs[-1]))  # a hypernetwork's e, a generator's choice of picture
    handles = [m.register_forward_pre_hook(swap) for m in model.modules()
               if isinstance(m, (HyperNetwork, MatrixNetwork, Generator))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
