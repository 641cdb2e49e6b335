"""Does what the toy learnt carry over to pictures that others draw? `python outsider.py --model out/toy/stage2`

Pictures in the style of the toy world by code that shares nothing with world.py: flat ground, 200 to 800 px, not square, Pillow's
own named colours, saved as JPEG of quality 75. As in that world, things lie in different ninths of the picture; with --scattered,
which it never shows, they lie anywhere. Asks for colours, shapes and counts.
"""
import io
import math
import os
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from benchmarks.toy import Answerer, PictureQuestion
from cli import main, parse
from weights import load

NAMED = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
KINDS = ["circle", "square", "triangle", "star", "cross", "ring"]


NEVER = {("red", "triangle"), ("orange", "square"), ("yellow", "circle"), ("green", "ring"), ("cyan", "cross"), ("blue", "star"),
         ("purple", "triangle"), ("pink", "square")}  # the pairs that no training picture shows
GROUNDS = ["white", "lightgray", "gray", "dimgray", "black", "whitesmoke", "darkgray"]


@dataclass
class Options:
    """Score a toy checkpoint on pictures drawn by other code."""
    model: str = "out/toy/stage2"  # checkpoint
    pictures: int = 20             # how many to draw
    seed: int = 0                  # of the drawing
    scattered: bool = False        # things anywhere, across the borders of ninths too
    out: str | None = None         # folder to keep the pictures in; none: they are not kept


def shape(pen, kind, x, y, r, colour):
    """One thing of radius r around (x, y)."""
    if kind == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif kind == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=int(r * 0.4))
    elif kind == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif kind == "triangle":
        pen.regular_polygon((x, y, r), 3, fill=colour)
    elif kind == "cross":
        pen.rectangle((x - r, y - r / 3, x + r, y + r / 3), fill=colour)
        pen.rectangle((x - r / 3, y - r, x + r / 3, y + r), fill=colour)
    else:
        tips = [(r if i % 2 == 0 else 0.4 * r, math.pi * i / 5) for i in range(10)]
        pen.polygon([(x + d * math.sin(a), y - d * math.cos(a)) for d, a in tips], fill=colour)


def spot(chance, r, wide, high, ninth):
    """A centre for a thing of radius r within a ninth of the picture, or anywhere if that is None."""
    left, top, w, h = (0, 0, wide, high) if ninth is None else (ninth % 3 * wide / 3, ninth // 3 * high / 3, wide / 3, high / 3)
    return chance.uniform(left + r, left + w - r), chance.uniform(top + r, top + h - r)


def picture(chance, scattered=False):
    """(JPEG as PIL image, [(colour, kind), ...]) of 2 to 5 things that do not touch."""
    wide, high = chance.randint(200, 800), chance.randint(200, 800)
    while not 0.66 < wide / high < 1.5 or wide == high:
        wide, high = chance.randint(200, 800), chance.randint(200, 800)
    image = Image.new("RGB", (wide, high), chance.choice(GROUNDS))
    pen, placed, things = ImageDraw.Draw(image), [], []
    wanted, ninths = chance.randint(2, 5), chance.sample(range(9), 9)
    while len(things) < wanted:
        r = min(wide, high) / 3 * chance.choice([0.27, 0.44])
        x, y = spot(chance, r, wide, high, None if scattered else ninths[len(things)])
        thing = chance.choice(NAMED), chance.choice(KINDS)
        if thing not in NEVER and (not scattered or all(math.dist((x, y), p[:2]) > 1.15 * (r + p[2]) for p in placed)):
            shape(pen, thing[1], x, y, r, thing[0])
            placed.append((x, y, r))
            things.append(thing)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB"), things


def questions(things, name):
    """Colours of unique kinds, kinds of unique colours, and counts."""
    colours, kinds = zip(*things)
    found = [("colour", f"What colour is the {k}?", c) for c, k in things if kinds.count(k) == 1]
    found += [("shape", f"What shape is the {c} thing?", k) for c, k in things if colours.count(c) == 1]
    found += [("count", "How many things are there?", str(len(things)))]
    found += [("count", f"How many {c} things are there?", str(colours.count(c))) for c in sorted(set(colours))]
    return [PictureQuestion(family, family, text, answer, name) for family, text, answer in found]


def run():
    o = Options(**parse(Options))
    if o.out:
        os.makedirs(o.out, exist_ok=True)
    answer, chance = Answerer(load(o.model)), random.Random(o.seed)
    asked = []
    for i in range(o.pictures):
        image, things = picture(chance, o.scattered)
        name = f"{i:03d}"
        answer.add_picture(name, image)
        asked += questions(things, name)
        if o.out:
            image.save(f"{o.out}/{name}.png")
    said = answer(asked, "outsider")
    for family in ("colour", "shape", "count"):
        right = [a == q.answer for q, a in zip(asked, said) if q.family == family]
        print(f"{family:8s} {100 * sum(right) / len(right):5.1f} %  of {len(right)}")
    right = [a == q.answer for q, a in zip(asked, said)]
    print(f"{'all':8s} {100 * sum(right) / len(right):5.1f} %  of {len(right)}")


if __name__ == "__main__":
    main(run)
