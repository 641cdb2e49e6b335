"""Ask a checkpoint about a picture: `python sample.py --image x.jpg --prompt "What colour is the star?"`.

The answer, and nothing else, goes to standard output as it is made; everything else to standard error.
"""
import glob
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

import weights
from cli import UserError, main, parse
from data import collate, encode_prompt, open_image, pixels
from model import stream


@dataclass
class Options:
    """Answer a question about a picture."""
    image: str | None = None            # the picture, any file that Pillow opens; none: a question without one
    prompt: str = "Describe the image."  # the question
    model: str | None = None            # checkpoint; none: the newest finished stage under out/
    temperature: float = 0.0            # 0: the likeliest token; higher: drawn at random
    top_p: float = 1.0                  # draw from the smallest set of tokens that has this probability
    max_new_tokens: int = 256           # longest answer
    seed: int = 0                       # of the draw
    device: Literal["cuda", "mps", "cpu"] | None = None  # none: the first of them that there is
    dtype: Literal["bfloat16", "float32"] | None = None  # of the computation; none: bfloat16 where it is fast

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: an answer has at least 1 token")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"--temperature {self.temperature} --top_p {self.top_p}: expected at least 0, and above 0 up to 1")


def newest(root="out"):
    """The checkpoint of stage 1 or 2 under `root` that was finished last; UserError if there is none."""
    found = glob.glob(os.path.join(root, "**", "stage[12]", "config.json"), recursive=True)
    if not found:
        raise UserError(f"no checkpoint under {root}/: run `python train.py` first, or name one with --model")
    return os.path.dirname(max(found, key=os.path.getmtime))


def prepare(checkpoint, question, image, o):
    """The batch of one prompt."""
    sample = encode_prompt([], question, checkpoint.tokenizer, checkpoint.layout(), o.image)
    context = checkpoint.model.cfg.llm.context
    if len(sample.ids) == context:
        raise UserError(f"the prompt fills the context of {context} positions: there is no room for an answer")
    return collate([sample], [] if image is None else [pixels(image, checkpoint.preprocess)],
                   (3, checkpoint.preprocess.size, checkpoint.preprocess.size))


def answer(checkpoint, batch, o):
    """Yield the answer piece by piece. A character of several tokens is held back until it is whole."""
    context = checkpoint.model.cfg.llm.context
    room = context - batch.ids.shape[1]
    generator = torch.Generator(batch.ids.device).manual_seed(o.seed)
    ids, shown = [], ""
    for token in stream(checkpoint.model, batch, min(o.max_new_tokens, room), checkpoint.tokenizer.eos,
                        o.temperature, o.top_p, generator):
        if token.item() != checkpoint.tokenizer.eos:
            ids.append(token.item())
        text = checkpoint.tokenizer.decode(ids)
        if text.startswith(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown):]
            shown = text
    yield text[len(shown):]
    if len(ids) == room < o.max_new_tokens:
        print(f"\nthe answer is cut at {room} tokens: the context holds {context} positions", file=sys.stderr)


def run():
    o = Options(**parse(Options))
    image = open_image(o.image, o.image) if o.image is not None else None  # before the weights: mistakes show at once
    device = weights.pick_device(o.device)
    name = o.model or newest()
    checkpoint = weights.load(name, getattr(torch, o.dtype or weights.fast_dtype(device)))
    checkpoint.model.to(device)
    batch = prepare(checkpoint, o.prompt, image, o).to(device)
    batch.visual = batch.visual.to(next(checkpoint.model.parameters()).dtype)
    print(f"{name} on {device}", file=sys.stderr)
    began = time.perf_counter()
    for piece in answer(checkpoint, batch, o):
        print(piece, end="", flush=True)
    print(flush=True)
    print(f"{time.perf_counter() - began:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main(run)
