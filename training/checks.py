"""Checks of what a stage starts from, before its first step. Next: train.py, which calls them."""
import math

import torch

from training.distributed import DistributedUserError


@torch.no_grad()
def check_llm(model, batches, mesh):
    """UserError if the loss of a frozen Llama on answers is near that of chance, ln(vocab).

    Its weights are then random, or those of another model, and stage 1 would fit the projector to
    noise.
    """
    loss = sum(model.loss(b.to(mesh.device_type)).item() for b in batches)
    loss /= sum(b.trained for b in batches)
    chance = math.log(model.cfg.llm.vocab)
    if not loss < 0.9 * chance:
        raise DistributedUserError(
            f"loss {loss:.2f} per token of text is near chance ({chance:.2f}): "
            f"is --llm pretrained? For a test run with a random Llama, add --allow_random_llm")
