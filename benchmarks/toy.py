"""Tasks and their scorers: `python eval.py --model out/toy/stage2 --task toy`.

The toy's task asks every question of the held-out splits as a single turn, greedily, through the `generate` of sample.py, and counts
exact matches. It writes scores.json and gallery.png beside the checkpoint's folder, and prints a table.
"""
import collections
import dataclasses
import os
import time
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from benchmarks.ablation import experts_off, experts_swapped
from data import collate, encode_prompt, load_records, open_image, pixels
from model import generate
from toy.files import write_atomically
from toy.questions import objects_in
from toy.world import FAMILIES
from weights import load

BATCH = 128  # questions answered at once


@dataclass
class Question:
    """One question of a test split, as a single turn about one picture."""
    family: str
    template: str
    text: str
    answer: str
    image: str


def load_questions(folder, split):
    """The questions of folder/SPLIT.json."""
    return [Question(r["family"], r["template"], r["conversations"][0]["value"], r["conversations"][1]["value"],
                     os.path.join(folder, "images", r["image"]))
            for r in load_records(os.path.join(folder, f"{split}.json"))]


class Answerer:
    """A checkpoint that answers questions about pictures; each picture goes through the tower once."""

    def __init__(self, checkpoint, max_new_tokens=72):
        self.model, self.tokenizer, self.preprocess = checkpoint.model.eval(), checkpoint.tokenizer, checkpoint.preprocess
        self.layout = checkpoint.prompt_format()
        self.max_new_tokens, self.features = max_new_tokens, {}

    @torch.no_grad()
    def show(self, name, image):
        """Let the tower see a PIL image, which questions then call by `name`."""
        seen = pixels(image, self.preprocess)[None].to(self.model.llm.embed_tokens.weight.dtype)
        self.features[name] = self.model.features(seen)[0]  # (N, C)

    def look(self, name):
        """Features float[N, C] of a picture; one not shown before is opened by its path."""
        if name not in self.features:
            self.show(name, open_image(name, name))
        return self.features[name]

    def __call__(self, questions, name):
        """The answers, list[str], in order."""
        answers = []
        for i in tqdm(range(0, len(questions), BATCH), name, mininterval=5):
            some = questions[i:i + BATCH]
            samples = [encode_prompt([], q.text, self.tokenizer, self.layout, q.image) for q in some]
            batch = collate(samples, [self.look(q.image) for q in some], None)
            ids = generate(self.model, batch, self.max_new_tokens, self.tokenizer.eos)
            answers += [self.tokenizer.decode(row).strip() for row in ids]
        return answers


# ---- Scores


def exact(questions, answers):
    """{"n", "mean", "families": {family: accuracy}}; the mean is over families, of exact matches."""
    right = collections.defaultdict(list)
    for q, a in zip(questions, answers):
        right[q.family].append(a == q.answer)
    families = {f: sum(right[f]) / len(right[f]) for f in dict.fromkeys((*FAMILIES, *right)) if right[f]}
    return {"n": len(questions), "mean": sum(families.values()) / len(families), "families": families}


def majority(questions, known):
    """The answer that is commonest among the `known` questions of the same template: what can be had without looking."""
    answers = collections.defaultdict(collections.Counter)
    for q in known:
        answers[q.template][q.answer] += 1
    return [answers[q.template].most_common(1)[0][0] for q in questions]


def exchanged(questions):
    """The same questions about another picture: each picture's questions go to the next one."""
    images = list(dict.fromkeys(q.image for q in questions))
    after = dict(zip(images, images[1:] + images[:1]))
    return [dataclasses.replace(q, image=after[q.image]) for q in questions]


def object_f1(questions, answers):
    """F1 of the (size, colour, shape) that captions name, over all captions together."""
    hit = told = true = 0
    for q, a in zip(questions, answers):
        said, there = objects_in(a), objects_in(q.answer)
        hit, told, true = hit + (said & there).total(), told + said.total(), true + there.total()
    return 2 * hit / max(1, told + true)


def score(model, folder, out, began):
    """Score a toy checkpoint on all splits; write out/scores.json and out/gallery.png; print the table.

    began  time.perf_counter() when the run that "seconds" counts began
    """
    checkpoint = load(model)
    os.makedirs(out, exist_ok=True)
    answer = Answerer(checkpoint)
    asked = {split: load_questions(folder, split) for split in ("heldout", "combination")}
    captions = [q for q in asked["heldout"] if q.family == "caption"]
    asked = {split: [q for q in questions if q.family != "caption"] for split, questions in asked.items()}
    held = asked["heldout"]

    answers = answer(held, "heldout")
    splits = {"heldout": exact(held, answers),
              "combination": exact(asked["combination"], answer(asked["combination"], "combination")),
              "shuffled": exact(held, answer(exchanged(held), "shuffled")),
              "majority": exact(held, majority(held, load_questions(folder, "validation")))}
    with experts_off(checkpoint.model):
        splits["experts_off"] = exact(held, answer(held, "experts off"))
    with experts_swapped(checkpoint.model):
        splits["experts_swapped"] = exact(held, answer(held, "experts swapped"))
    f1 = object_f1(captions, answer(captions, "captions"))
    gallery(held, answers, os.path.join(out, "gallery.png"))
    scores = {"seconds": round(time.perf_counter() - began, 1), "splits": splits, "captions": {"object_f1": f1}}
    write_atomically(os.path.join(out, "scores.json"), scores)
    print(table(scores))


def table(scores):
    """The scores as aligned text, in per cent."""
    lines = [f"{'split':16s}" + "".join(f"{f:>9s}" for f in FAMILIES) + f"{'mean':>9s}{'n':>7s}"]
    for name, s in scores["splits"].items():
        cells = "".join(f"{100 * s['families'].get(f, float('nan')):9.1f}" for f in FAMILIES)
        lines.append(f"{name:16s}{cells}{100 * s['mean']:9.1f}{s['n']:7d}")
    lines.append(f"captions: object F1 {100 * scores['captions']['object_f1']:.1f}    {scores['seconds']:.0f} s")
    return "\n".join(lines)


def gallery(questions, answers, path, columns=4, rows=3, scale=4):
    """A sheet of pictures, each with three of its questions, the answer in green if right and in red, with the truth, if not."""
    shown = collections.defaultdict(list)
    for q, a in zip(questions, answers):
        shown[q.image].append((q.text.removeprefix("<image>\n"), a, q.answer))
    images = list(shown)[::max(1, len(shown) // (columns * rows))][:columns * rows]
    shown = {image: shown[image][i % 3::3][:3] for i, image in enumerate(images)}
    side, font = max(max(open_image(image, image).size) for image in images) * scale, ImageFont.load_default(13)
    wide, high = 30 + max(side, *(round(font.getlength(text)) for said in shown.values() for text, *_ in said)), side + 125
    sheet = Image.new("RGB", (columns * wide, rows * high), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = i % columns * wide + 10, i // columns * high + 10
        picture = open_image(image, image)
        sheet.paste(picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST), (x, y))
        for j, (text, answer, truth) in enumerate(shown[image]):
            top, right = y + side + 5 + 34 * j, answer == truth
            pen.text((x, top), text, "black", font)
            pen.text((x, top + 15), answer if right else f"{answer}   (truth: {truth})", "green" if right else "red", font)
    sheet.save(path)
