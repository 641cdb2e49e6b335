"""Checks of what a stage starts from, before its first step. Next: train.py, which calls them."""
import math

import torch

from training.distributed import DistributedUserError, sum_over_ranks


@torch.no_grad()
def check_llm(model, batches, mesh):
    """UserError if the loss of a frozen Llama on answers is near that of chance, ln(vocab).

    Its weights are then random, or those of another model, and stage 1 would fit the projector to
    noise.
    """
    tokens = sum(b.trained for b in batches)
    if not tokens:
        raise DistributedUserError("--context is too small for every one of the first 32 answers")
    loss = sum(model.loss(b.to(mesh.device_type)).item() for b in batches) / tokens
    chance = math.log(model.cfg.llm.vocab)
    if not loss < 0.9 * chance:
        raise DistributedUserError(
            f"loss {loss:.2f} per token of text is near chance ({chance:.2f}): "
            f"is --llm pretrained? For a test run with a random Llama, add --allow_random_llm")


def check_val(batches, mesh):
    """UserError if no token of the validation data is supervised. batches: this rank's"""
    tokens, = sum_over_ranks([sum(b.trained for b in batches)], mesh)
    if batches and not tokens:
        raise DistributedUserError("--val: no answer of its first 512 records is within --context")
