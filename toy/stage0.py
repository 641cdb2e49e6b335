"""What train.py needs of the toy: its world, the parts of stage 0, its final scores.

    write_toy_world(out, pictures)           makes OUT/world
    part = stand_in("clip", o.out)           a model, its data, and how to write it
    score_toy(out, began)                    scores OUT/stage2

Next: stand_ins.py for the models, files.py for the world, benchmarks/toy.py for the scores.
"""
import os
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.toy import score
from data import PromptFormat
from formats.tokenizer import train_tokenizer
from toy.files import write_world
from toy.stand_ins import (Captions, LLAMA, StandInCLIP, StandInLlama, Texts, VISION, words,
    write_clip, write_llm)


@dataclass
class StandIn:
    """A part of stage 0, to be trained."""
    model: StandInCLIP | StandInLlama  # loss(batch) is summed over batch.trained
    data: Captions | Texts             # lengths int64[n], batch(rows), sample (None for pictures)
    held_out: Captions | Texts
    write: Callable                    # ({name: tensor}, folder) writes the trained model


def world_folder(out):
    """Where the world of the run `out` is."""
    return os.path.join(out, "world")


def write_toy_world(out, pictures):
    """Write OUT/world with so many training pictures and as many texts, unless it is there."""
    write_world(world_folder(out), pictures, side=VISION.image_size, texts=pictures,
                test_pictures=min(250, pictures))


def stand_in(part, out, system=""):
    """The `StandIn` "clip" or "llm" for the world of the run `out`.

    system  text before the first turn of the Llama's conversations
    """
    folder = world_folder(out)
    tokenizer = train_tokenizer(words(folder), LLAMA.vocab)
    if part == "clip":
        data, held_out = (Captions(folder, file, tokenizer)
                          for file in ("captions.json", "validation_captions.json"))
        return StandIn(StandInCLIP(), data, held_out, write_clip)
    layout = PromptFormat("v1", system, VISION.tokens, LLAMA.context)
    data, held_out = (Texts(os.path.join(folder, file), folder, tokenizer, layout)
                      for file in ("text.json", "validation_text.json"))

    def write(tensors, folder):
        write_llm(tensors, tokenizer, folder)

    return StandIn(StandInLlama(), data, held_out, write)


def score_toy(out, began):
    """Score OUT/stage2 on OUT/world, as `python eval.py` does.

    began  time.perf_counter() at the start of the run
    """
    score(os.path.join(out, "stage2"), world_folder(out), out, began)
