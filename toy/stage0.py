"""All that train.py needs of the toy: its world, the stand-ins of stage 0, the scores at the end."""
import os

from benchmarks.toy import score
from data import Conversations, PromptFormat
from formats.tokenizer import train_tokenizer
from toy.files import write_world
from toy.stand_ins import (Captions, LLAMA, StandInCLIP, StandInLlama, VISION, words, write_clip,
                           write_llm)
from training.feed import VLMData


def make_world(out, pictures):
    """Write the toy's world into OUT/world, unless it is there."""
    write_world(os.path.join(out, "world"), pictures, side=VISION.image_size, texts=pictures,
                test_pictures=min(250, pictures))


def stage_0(part, world, out, system):
    """(model, training data, held-out data, write) of the stand-in `part`, clip or llm.

    world  folder of the world; out: folder that `write({name: tensor})` writes, in the Hugging Face layout
    """
    tokenizer = train_tokenizer(words(world), LLAMA.vocab)
    if part == "clip":
        data = [Captions(world, f"{split}captions.json", tokenizer) for split in ("", "validation_")]
        return StandInCLIP(), *data, lambda tensors: write_clip(tensors, out)
    prompt_format = PromptFormat("v1", system, VISION.tokens, LLAMA.context)
    files = [os.path.join(world, f"{split}text.json") for split in ("", "validation_")]
    data = [Conversations(file, world, tokenizer, prompt_format) for file in files]
    data = [VLMData(conversations, None, None) for conversations in data]
    return StandInLlama(), *data, lambda tensors: write_llm(tensors, tokenizer, out)


def finish(out, began):
    """Score the finished run in `out`; `began`: time.perf_counter() at its start."""
    score(os.path.join(out, "stage2"), os.path.join(out, "world"), out, began)
