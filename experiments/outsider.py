"""Can a toy checkpoint answer about pictures drawn by other code? `python -m experiments.outsider`

The pictures look like the toy world's, but share no code with toy/world.py: flat ground, 200 to
800 px, not square, Pillow's named colours, saved as JPEG of quality 75. Each thing lies in another
ninth of the picture, as in that world; with --scattered things lie anywhere, which training never
shows. The questions are about colours, shapes and counts.
"""
import io
import math
import os
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from benchmarks.toy import Answerer, PictureQuestion
from cli import check_numbers, main, MOST, parse
from weights import load

COLOURS = ["red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"]
KINDS = ["circle", "square", "triangle", "star", "cross", "ring"]
NEVER = {("red", "triangle"), ("orange", "square"), ("yellow", "circle"), ("green", "ring"),
         ("cyan", "cross"), ("blue", "star"), ("purple", "triangle"),
         ("pink", "square")}  # pairs that no training picture shows
GROUNDS = ["white", "lightgray", "gray", "dimgray", "black", "whitesmoke", "darkgray"]


@dataclass
class Options:
    """Score a toy checkpoint on pictures drawn by other code."""
    model: str = "out/toy/stage2"  # checkpoint
    pictures: int = 20             # number of pictures
    seed: int = 0                  # of the pictures
    scattered: bool = False        # things lie anywhere, also across the borders of ninths
    out: str | None = None         # folder for the pictures; none: they are not saved

    def __post_init__(self):
        check_numbers(self, {"seed": (0, MOST, "0 or more")})


def draw_thing(pen, kind, x, y, r, colour):
    """Draw one thing of radius r around (x, y)."""
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


def random_centre(rng, r, width, height, ninth):
    """A centre for a thing of radius r in a ninth of the picture, or anywhere if it is None."""
    left = top = 0
    if ninth is not None:
        width, height = width / 3, height / 3
        left, top = ninth % 3 * width, ninth // 3 * height
    return rng.uniform(left + r, left + width - r), rng.uniform(top + r, top + height - r)


def random_picture(rng, scattered=False):
    """(PIL image, [(colour, kind), ...]) of 2 to 5 things that do not touch."""
    width = height = 0
    while width == height or not 0.66 < width / height < 1.5:
        width, height = rng.randint(200, 800), rng.randint(200, 800)
    image = Image.new("RGB", (width, height), rng.choice(GROUNDS))
    pen, placed, things = ImageDraw.Draw(image), [], []
    wanted, ninths = rng.randint(2, 5), rng.sample(range(9), 9)
    while len(things) < wanted:
        r = min(width, height) / 3 * rng.choice([0.27, 0.44])
        ninth = None if scattered else ninths[len(things)]
        x, y = random_centre(rng, r, width, height, ninth)
        thing = rng.choice(COLOURS), rng.choice(KINDS)
        apart = all(math.dist((x, y), p[:2]) > 1.15 * (r + p[2]) for p in placed)
        if thing not in NEVER and (apart or not scattered):
            draw_thing(pen, thing[1], x, y, r, thing[0])
            placed.append((x, y, r))
            things.append(thing)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    return Image.open(file).convert("RGB"), things


def questions(things, name):
    """Questions about kinds and colours that occur once, and about counts."""
    colours, kinds = zip(*things)
    asked = [("colour", f"What colour is the {k}?", c) for c, k in things if kinds.count(k) == 1]
    asked += [("shape", f"What shape is the {c} thing?", k)
              for c, k in things if colours.count(c) == 1]
    asked += [("count", "How many things are there?", str(len(things)))]
    asked += [("count", f"How many {c} things are there?", str(colours.count(c)))
              for c in sorted(set(colours))]
    return [PictureQuestion(family, family, text, answer, name) for family, text, answer in asked]


def run():
    o = Options(**parse(Options))
    if o.out:
        os.makedirs(o.out, exist_ok=True)
    answer, rng = Answerer(load(o.model)), random.Random(o.seed)
    asked = []
    for i in range(o.pictures):
        image, things = random_picture(rng, o.scattered)
        name = f"{i:03d}"
        answer.add_picture(name, image)
        asked += questions(things, name)
        if o.out:
            image.save(f"{o.out}/{name}.png")
    right = [(q.family, a == q.answer) for q, a in zip(asked, answer(asked, "outsider"))]
    right += [("all", hit) for _, hit in right]
    for family in ("colour", "shape", "count", "all"):
        hits = [hit for name, hit in right if name == family]
        share = f"{100 * sum(hits) / len(hits):5.1f} %" if hits else "-"
        print(f"{family:8s} {share:>7s}  of {len(hits)}")


if __name__ == "__main__":
    main(run)
