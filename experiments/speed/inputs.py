"""Pictures to pixels, against CLIPImageProcessor; conversations to ids and labels, against LLaVA's
way.
"""
import importlib.util
import io
import os
import re
import tempfile

import numpy as np
import torch
from PIL import Image

import data
from data import encode, IGNORE, IMAGE, open_image, pad_square, Preprocess, PromptFormat, TAG
from experiments.processes import ROOT
from experiments.speed.clock import alternate, row
from formats.export import write_llava_tokenizer
from formats.tokenizer import train_tokenizer

EACH = 10  # pictures or conversations in a round


# ---- Pictures


def photograph(rng):
    """A random PIL image of 640 x 480: smooth, because a JPEG decoder needs longer for noise."""
    rough = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return rough.resize((640, 480), Image.Resampling.BICUBIC)


def jpegs(n):
    """The bytes of n pictures."""
    rng, files = np.random.default_rng(0), [io.BytesIO() for _ in range(n)]
    for file in files:
        photograph(rng).save(file, "JPEG")
    return [file.getvalue() for file in files]


def our_pixels(file, prep):
    return data.pixels(open_image(io.BytesIO(file), "the picture"), prep)


def their_pixels(file, prep, processor):
    """LLaVA's way: for "pad", a square of the mean colour first."""
    image = Image.open(io.BytesIO(file)).convert("RGB")
    if prep.aspect == "pad":
        image = pad_square(image, prep.mean)
    return processor(image, return_tensors="pt")["pixel_values"][0]


def processors():
    """{name: transformers' processor for 336 px}."""
    import transformers  # takes seconds
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    size = dict(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    found = {"CLIPImageProcessor on Pillow": CLIPImageProcessorPil(**size)}
    if importlib.util.find_spec("torchvision"):
        found["CLIPImageProcessor on torchvision"] = transformers.CLIPImageProcessor(**size)
    else:
        print("CLIPImageProcessor on torchvision is left out: there is no torchvision")
    return found


def pixel_rows(o):
    """A row for each processor, of pictures that are cropped and of pictures that are padded."""
    files, rows = jpegs(EACH), []
    for name, processor in processors().items():
        for aspect in ("crop", "pad"):
            prep = Preprocess(336, aspect=aspect)
            sides = {"ours": lambda: [our_pixels(file, prep) for file in files],
                     name: lambda: [their_pixels(file, prep, processor) for file in files]}
            for a, b in zip(sides["ours"](), sides[name]()):  # torchvision resizes otherwise
                assert (a - b).abs().mean() < (1e-5 if "Pillow" in name else 0.02), name
            rows.append(row("pixels", f"640 x 480 JPEG, {aspect}", alternate(sides, o.rounds),
                            unit="ms a picture", each=EACH,
                            aim="at least 1.3 x" if "Pillow" in name else None))
    return rows


# ---- Conversations


def docs_tokenizer():
    """(Tokenizer of 4,000 ids, list of words), both from this repository's documentation."""
    folder, texts = os.path.join(ROOT, "docs"), []
    for name in sorted(os.listdir(folder)):
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            texts += f.read().split("\n\n")
    return train_tokenizer(texts, 4000), sorted(set(re.findall(r"[A-Za-z]+", " ".join(texts))))


def conversations(n, words, turns=20):
    """n conversations [(question, answer), ...] of random words, so that no cache has them."""
    rng = np.random.default_rng(0)

    def text(least, most):
        return " ".join(rng.choice(words, rng.integers(least, most))) + "."

    found = [[(text(8, 20), text(10, 60)) for _ in range(turns)] for _ in range(n)]
    return [[(f"{TAG}\n{q}" if i == 0 else q, a) for i, (q, a) in enumerate(c)] for c in found]


def ids_with_image(text, tokenizer):
    """LLaVA's tokenizer_image_token: each piece is encoded with <s>, which only the first keeps."""
    first, *rest = [tokenizer(piece).input_ids for piece in text.split(TAG)]
    return first + [id for piece in rest for id in [IMAGE, *piece[1:]]]


def llavas_way(turns, tokenizer, system):
    """(ids, labels), int64[T], of a conversation as LLaVA's preprocess_v1 makes them, in its form
    for Llama's legacy tokenizer.

    The whole text is encoded. Then each turn, and each turn up to its answer, is encoded again, to
    find where the labels begin and end. A picture is one position.
    """
    text = f"{system} " + "".join(f"USER: {q} ASSISTANT: {a}</s>" for q, a in turns)
    ids = torch.tensor(ids_with_image(text, tokenizer))
    labels = ids.clone()
    labels[:1], at = IGNORE, 1
    for turn in text.split("</s>")[:-1]:
        prompt = turn.split(" ASSISTANT: ")[0] + " ASSISTANT: "
        length = len(ids_with_image(turn, tokenizer))  # <s> counts for the </s> that was split off
        asked = len(ids_with_image(prompt, tokenizer)) - 2  # without <s> and the last space
        labels[at:at + asked], at = IGNORE, at + length
    labels[at:] = IGNORE
    if at != len(ids):
        labels[:] = IGNORE
    return ids, labels


def their_tokenizer(tokenizer):
    """transformers' fast tokenizer with the vocabulary of a `Tokenizer`."""
    import transformers  # takes seconds
    with tempfile.TemporaryDirectory() as folder:
        write_llava_tokenizer(folder, tokenizer, 2**20)
        return transformers.PreTrainedTokenizerFast.from_pretrained(folder)


def token_rows(o):
    tokenizer, words = docs_tokenizer()
    layout, theirs = PromptFormat(image_tokens=1, context=2**20), their_tokenizer(tokenizer)

    def ours(turns):
        return encode(turns, tokenizer, layout, "the conversation", "picture")

    known = conversations(EACH * (o.rounds + 2), words)
    for turns in known[:EACH]:
        sample, (ids, labels) = ours(turns), llavas_way(turns, theirs, layout.system)
        assert sample.ids.tolist() == ids.tolist() and sample.labels.tolist() == labels.tolist()
    new = {name: iter(known[EACH:]) for name in ("ours", "LLaVA's way")}
    sides = {"ours": lambda: [ours(next(new["ours"])) for _ in range(EACH)],
             "LLaVA's way": lambda: [llavas_way(next(new["LLaVA's way"]), theirs, layout.system)
                                     for _ in range(EACH)]}
    return [row("tokens", "20 turns", alternate(sides, o.rounds), unit="ms a conversation",
                each=EACH, aim="at least 5 x")]
