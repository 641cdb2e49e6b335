"""What do the experts contribute? Two ways to take it away, for the scorers and the tests.

experts_off      the model without generated weights
experts_swapped  the model with weights that were generated for another sample

Next: toy.py scores a model with both.
"""
import contextlib

from baselines import GatedExpert, LoRA, MatrixExpert, MatrixNetwork
from hypernet import Expert, HyperNetwork
from vlora import Generator, PerceptualWeights


@contextlib.contextmanager
def experts_off(model):
    """Within this context every generated shift is exactly zero: all up-projections are zero. Of a
    part, such as model.llm, only those in that part.

    VLoRA receives pictures only through generated weights, so it sees no picture then.
    """
    modules = list(model.modules())
    ups = [m.up.weight for m in modules if isinstance(m, (HyperNetwork, MatrixNetwork))]
    ups += [m.up for m in modules if isinstance(m, (Expert, MatrixExpert, LoRA))]
    ups += [m.Bs for m in modules if isinstance(m, PerceptualWeights)]
    saved = [up.detach().clone() for up in ups]
    for up in ups:
        up.data.zero_()
    try:
        yield
    finally:
        for up, old in zip(ups, saved):
            up.data.copy_(old)


def swap_rows(module, inputs):
    """A forward pre-hook that moves the last input by half a batch.

    That is the embedding e of a hypernetwork or of gates, or the row's picture for a generator of
    VLoRA.
    """
    *others, last = inputs
    return *others, last.roll(max(1, len(last) // 2), 0)


@contextlib.contextmanager
def experts_swapped(model):
    """Within this context each row runs with the weights of another row, half a batch away."""
    sources = HyperNetwork, MatrixNetwork, Generator
    modules = [module.project if isinstance(module, GatedExpert) else module
               for module in model.modules() if isinstance(module, (*sources, GatedExpert))]
    handles = [module.register_forward_pre_hook(swap_rows) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
