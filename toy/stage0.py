"""All that train.py needs of the toy: its world, the stand-ins of stage 0, the final scores.

Next: stand_ins.py for the models, files.py for the world, benchmarks/toy.py for the scores.
"""
import dataclasses
import os
import sys
import time

from benchmarks.toy import score
from cli import UserError
from data import Conversations, PromptFormat
from formats.configs import llama_config, vision_config
from formats.folders import resolve
from formats.tokenizer import train_tokenizer
from toy.files import write_world
from toy.stand_ins import (Captions, LLAMA, StandInCLIP, StandInLlama, VISION, words, write_clip,
    write_llm)
from training.feed import VLMData
from weights import make_config


def make_world(out, pictures):
    """Write OUT/world with `pictures` training pictures and as many texts, unless it is there."""
    write_world(os.path.join(out, "world"), pictures, side=VISION.image_size, texts=pictures,
                test_pictures=min(250, pictures))


def check_fit(o, given, model_options):
    """UserError if options do not fit CLIP and the Llama, before the toy makes what is not given
    of them.

    o              the options of stage 1; given: those that the user named
    model_options  function of a stage's options, see train.py
    """
    vision = vision_config(resolve(o.vision))[0] if "vision" in given else VISION
    llm = llama_config(resolve(o.llm)) if "llm" in given else LLAMA
    for stage in [o.stage] if "stage" in given else [1, 2]:
        make_config(vision, llm, **model_options(dataclasses.replace(o, stage=stage)))


def stage_0(part, world, out, system):
    """(model, training data, validation data, write) of the stand-in `part`, "clip" or "llm".

    world   folder of the world
    out     folder that write({name: tensor}) writes, in the Hugging Face layout
    system  text before the first turn of the Llama's conversations

    model.loss(batch) is a sum over batch.trained items; data has `lengths`, `batch` and `sample`.
    """
    tokenizer = train_tokenizer(words(world), LLAMA.vocab)
    if part == "clip":
        files = ("captions.json", "validation_captions.json")
        data = [Captions(world, file, tokenizer) for file in files]
        return StandInCLIP(), *data, lambda tensors: write_clip(tensors, out)
    layout = PromptFormat("v1", system, VISION.tokens, LLAMA.context)
    files = [os.path.join(world, file) for file in ("text.json", "validation_text.json")]
    conversations = [Conversations(file, world, tokenizer, layout) for file in files]
    data = [VLMData(part, load_picture=None, blank=None) for part in conversations]
    return StandInLlama(), *data, lambda tensors: write_llm(tensors, tokenizer, out)


# The parts of a whole run, and seconds of each on two cores of an AMD EPYC
SECONDS = {"world": 12, "stage 0": 264, "stage 1": 42, "stage 2": 306, "scores": 37}


class Progress:
    """Says which parts a whole run has, and after each part how long the rest will take."""

    def __init__(self, active):
        self.began, self.active = time.perf_counter(), active
        if active:
            print(f"this run makes: {', '.join(SECONDS)}", file=sys.stderr)

    def done(self, part):
        """A part is finished. The rest is estimated from the speed of this machine so far."""
        parts, elapsed = list(SECONDS), time.perf_counter() - self.began
        n = parts.index(part) + 1
        left = elapsed * sum(list(SECONDS.values())[n:]) / sum(list(SECONDS.values())[:n])
        if self.active:
            print(f"{part} is done ({n} of {len(parts)} parts) after {elapsed / 60:.1f} min; "
                  f"about {left / 60:.0f} min left", file=sys.stderr)


def finish(out, began, device):
    """Draw OUT/curves.png and score OUT/stage2 on OUT/world, as eval.py does.

    began   time.perf_counter() at the start of the run
    device  cuda or cpu, where the model answers
    """
    from training.curves import plot, read_runs  # only here: training itself needs no matplotlib
    try:
        plot(read_runs([out]), os.path.join(out, "curves.png"))
    except UserError as error:  # a log that is gone or damaged
        print(f"warning: no curves.png: {error}", file=sys.stderr)
    score(os.path.join(out, "stage2"), os.path.join(out, "world"), out, began, device=device)
