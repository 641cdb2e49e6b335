"""The toy world: small pictures of coloured shapes drawn with Pillow, captions of them and questions about them.

A picture is a 3x3 grid of cells; two to five things (a shape, a colour, a size) and sometimes one letter sit in
cells of their own. `Scene` is the content only; the look (aspect, exact colours, jitter, ground, noise) is drawn
from a numpy Generator. Every scene belongs to exactly one split: `train`, `validation` and `heldout` by a hash of
its content, `combination` if it shows a colour-shape pair of HELD_OUT, which training neither shows nor mentions.

    rng = np.random.default_rng(0)
    scene = sample_scene(rng, "train")
    draw(scene, rng).save("scene.png")
    print(caption(scene), conversation(scene, rng, turns=5))

`write_world(folder)` writes pictures and conversations in LLaVA's JSON format.
"""
import collections
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import os
import pathlib
import re
import signal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("large", "small")
LETTERS = tuple("EHKLMOSTXZ")  # no A: lower-cased it would be the article
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
FAMILIES = ("colour", "shape", "count", "exist", "spatial", "where", "compare", "read")
SPLITS = ("train", "validation", "heldout", "combination")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = frozenset((colour, SHAPES[(5 * i + 2) % 6]) for i, colour in enumerate(COLOURS))

PREPOSITIONS = {"left": "on the left", "right": "on the right", "centre": "in the centre"}
AT = tuple(PREPOSITIONS.get(place, f"at the {place}") for place in PLACES)
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNT_WEIGHTS = (1.0, 1.3, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0)  # the larger a count, the fewer scenes offer it

# How often training asks for what; "tell", all there is to say about one thing, is asked in training only.
SHARES = {"colour": 0.8, "shape": 1.1, "count": 2.7, "exist": 1.1, "spatial": 1.1, "where": 0.7, "compare": 0.9, "read": 0.4,
          "tell": 1.2}

# Whether "is A left of B" is true depends on the relation that is asked for and on the one that holds, and on neither alone: while
# both are as likely as their opposites, no gradient points at either, and such questions are learnt late or never. So training,
# and training only, mostly asks in one direction: of the questions in the other, it turns so many round.
RARE, TURNED = ("right of", "below", "smaller"), 0.7

CAPTION_REQUESTS = ("Describe the image.", "What is in the picture?", "List everything you can see.",
                    "Give a description of the picture.", "What does the image show?")
TEMPLATES = {
    "colour": ("What colour is the {shape}?", "Which colour does the {shape} have?",
               "Name the colour of the {shape}.", "What colour is the thing {place}?",
               "Which colour does the thing {place} have?"),
    "shape": ("What shape is the {colour} thing?", "Which shape does the {colour} thing have?",
              "Name the shape of the {colour} thing.", "What shape is the thing {place}?",
              "Which shape does the thing {place} have?"),
    "count": ("How many things are there?", "How many {colour} things are there?", "How many {shapes} are there?",
              "What is the number of {colour} things?", "What is the number of {shapes}?"),
    "exist": ("Is there {a_thing}?", "Can you see {a_thing}?", "Does the picture show {a_thing}?",
              "Is {a_thing} in the picture?"),
    "spatial": ("Is the {first} {relation} the {second}?", "Does the {first} lie {relation} the {second}?",
                "Is it true that the {first} is {relation} the {second}?",
                "Would you say that the {first} is {relation} the {second}?"),
    "where": ("Where is the {thing}?", "Where can you see the {thing}?",
              "In which part of the picture is the {thing}?", "What is the position of the {thing}?"),
    "compare": ("Is the {first} {larger} than the {second}?", "Does the {first} look {larger} than the {second}?",
                "Is it true that the {first} is {larger} than the {second}?",
                "Would you say that the {first} is {larger} than the {second}?"),
    "read": ("Which letter is written here?", "What letter can you see?", "Read the letter in the picture.",
             "Which letter does the picture show?"),
    "tell": ("Describe the {thing}.", "Tell me about the {thing}.", "What can you say about the {thing}?",
             "What is {place}?", "What can you see {place}?", "Describe the thing {place}."),
}

SHIFTS = tuple(question + " Go on by {steps}." for question in TEMPLATES["read"])  # for ablate.py alone
STEPS = tuple(range(4))

ANCHORS = {  # a muted and the pure colour; what is drawn lies somewhere between the two
    "red": ((205, 50, 45), (255, 0, 0)), "orange": ((240, 130, 40), (255, 165, 0)),
    "yellow": ((235, 215, 60), (255, 255, 0)), "green": ((60, 180, 75), (0, 128, 0)),
    "cyan": ((60, 190, 205), (0, 255, 255)), "blue": ((55, 85, 205), (0, 0, 255)),
    "purple": ((145, 70, 190), (128, 0, 128)), "pink": ((245, 120, 185), (255, 192, 203)),
}
SUPERSAMPLING = 4
SQUARE, ARM = 0.42, 0.16  # half a square's side, half a cross's arm; 1 is the diameter: turned 10 degrees they fit


def on_circle(radii, points):
    """`points` corners around the origin, the first at the top, at the radii given in turn."""
    angles = [2 * math.pi * i / points for i in range(points)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a)) for i, a in enumerate(angles)]


OUTLINES = {  # corners in units of the thing's diameter
    "square": [(-SQUARE, -SQUARE), (SQUARE, -SQUARE), (SQUARE, SQUARE), (-SQUARE, SQUARE)],
    "triangle": on_circle((0.5,), 3),
    "star": on_circle((0.5, 0.19), 10),
    "cross": [(-ARM, -0.47), (ARM, -0.47), (ARM, -ARM), (0.47, -ARM), (0.47, ARM), (ARM, ARM),
              (ARM, 0.47), (-ARM, 0.47), (-ARM, ARM), (-0.47, ARM), (-0.47, -ARM), (-ARM, -ARM)],
}


@dataclasses.dataclass(frozen=True, order=True)
class Thing:
    """One coloured shape; `cell` counts 0..8 in raster order."""
    cell: int
    shape: str
    colour: str
    size: str

    @property
    def held_out(self):
        """Whether its colour-shape pair is kept out of training."""
        return (self.colour, self.shape) in HELD_OUT


@dataclasses.dataclass(frozen=True)
class Scene:
    """What a picture shows: things in raster order, perhaps a letter. `seed` is for its look and no part of it."""
    things: tuple
    letter: str | None
    letter_cell: int | None
    seed: int = dataclasses.field(compare=False)


@dataclasses.dataclass(frozen=True)
class Question:
    """`template` is the phrasing with its slots, `question` the same with the slots filled."""
    family: str
    template: str
    question: str
    answer: str


# ---------------------------------------------------------------------------------------------- scenes and splits

def pick(rng, items, weights=None):
    """One of `items` (a sequence), uniformly or in proportion to `weights`."""
    if weights is None:
        return items[int(rng.integers(len(items)))]
    mark = rng.random() * sum(weights)
    for item, weight in zip(items, weights):
        mark -= weight
        if mark < 0:
            return item
    return items[-1]


def some(rng, items, count):
    """`count` different ones of `items`, in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def split_of(scene):
    """The split a scene belongs to, by its content alone: one of SPLITS."""
    if any(t.held_out for t in scene.things):
        return "combination"
    content = [(t.shape, t.colour, t.size, t.cell) for t in scene.things], scene.letter, scene.letter_cell
    share = int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:6], "big") / 2 ** 48
    return "train" if share < 0.9 else "validation" if share < 0.95 else "heldout"


def palette(rng, split):
    """(ordinary pairs, held-out pairs) a scene may use: all, or those of two colours and/or of two shapes."""
    colour, shape = pick(rng, sorted(HELD_OUT)) if split == "combination" else pick(rng, PAIRS)
    colours, shapes = COLOURS, SHAPES
    if rng.random() < 0.45:
        colours = (colour, pick(rng, [c for c in COLOURS if c != colour]))
    if rng.random() < 0.45:
        shapes = (shape, pick(rng, [s for s in SHAPES if s != shape]))
    pairs = [(c, s) for c in colours for s in shapes]
    return [p for p in pairs if p not in HELD_OUT], [p for p in pairs if p in HELD_OUT]


def propose(rng, split, fewest=2, most=5):
    """A random scene of so many things, which need not hash to `split`."""
    ordinary, held = palette(rng, split)
    count = int(rng.integers(fewest, most + 1))
    cells = rng.permutation(9)[:count + 1].tolist()
    special = count // 2 if split == "combination" else 0
    pairs = [pick(rng, held if i < special else ordinary) for i in range(count)]
    things = tuple(sorted(Thing(cell, shape, colour, pick(rng, SIZES))
                          for cell, (colour, shape) in zip(cells, pairs)))
    letter = pick(rng, LETTERS) if rng.random() < 0.55 else None
    return Scene(things, letter, cells[-1] if letter else None, int(rng.integers(2 ** 31)))


def sample_scene(rng, split, **things):
    """A random scene of `split`; in `combination` half of its things are held-out pairs and one has a unique name.

    things  `fewest` and `most`, where there are to be others than training shows
    Raises ValueError on an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    while True:
        scene = propose(rng, split, **things)
        if split_of(scene) != split:
            continue
        if split != "combination" or any(t.held_out and name(scene, t) for t in scene.things):
            return scene


def edit(scene, rng):
    """A training scene that differs from `scene` in one attribute of one thing, or in which letter it is.

    Raises ValueError if `scene` has two held-out things: no single change makes a training scene of it.
    """
    if sum(t.held_out for t in scene.things) > 1:
        raise ValueError("a scene with two held-out things is never one change away from training")
    while True:
        changed = change(scene, pick(rng, ("colour", "shape", "size", "cell", "letter")), rng)
        if changed is not None and split_of(changed) == "train":
            return changed


def change(scene, attribute, rng):
    """`scene` with one `attribute` ("letter" or a field of Thing) drawn anew; None if it has no letter."""
    seed = int(rng.integers(2 ** 31))
    if attribute == "letter":
        other = pick(rng, [x for x in LETTERS if x != scene.letter])
        return dataclasses.replace(scene, letter=other, seed=seed) if scene.letter else None
    i = int(rng.integers(len(scene.things)))
    taken = {t.cell for t in scene.things} | {scene.letter_cell}
    choices = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "cell": [c for c in range(9) if c not in taken]}
    old = getattr(scene.things[i], attribute)
    new = dataclasses.replace(scene.things[i], **{attribute: pick(rng, [v for v in choices[attribute] if v != old])})
    things = tuple(sorted(scene.things[:i] + (new,) + scene.things[i + 1:]))
    return dataclasses.replace(scene, things=things, seed=seed)


# -------------------------------------------------------------------------------------------------------- pictures

def frame(rng, side):
    """(width, height) in pixels: the longer is `side`; square in 40 %, else an aspect between 2:3 and 3:2."""
    aspect = 1.0 if rng.random() < 0.4 else math.exp(rng.uniform(-math.log(1.5), math.log(1.5)))
    return round(side * min(1, aspect)), round(side * min(1, 1 / aspect))


def paint(rng, colours):
    """Float array (len(colours), 3), 0..255: what each named colour looks like this time."""
    anchors = np.array([ANCHORS[c] for c in colours], np.float32)
    mix = rng.random((len(colours), 1), np.float32)
    mixed = anchors[:, 0] * mix + anchors[:, 1] * (1 - mix)
    return np.clip(mixed + rng.normal(0, 8, mixed.shape), 0, 255)


def ground_colour(rng, paints):
    """A near-grey RGB array that stands out from every row of `paints`, if six attempts find one."""
    for _ in range(6):
        colour = rng.uniform(25, 245) + rng.uniform(-8, 8, 3)
        if ((paints - colour) ** 2).sum(1).min() > 90 ** 2:
            break
    return colour


def ground(rng, colour, width, height):
    """The empty picture, (width, height) uint8 RGB: flat in half of the cases, else a gentle linear gradient."""
    if rng.random() < 0.5:
        return Image.new("RGB", (width, height), tuple(colour.clip(0, 255).astype(int).tolist()))
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(8, 30)
    x, y = np.linspace(-1, 1, width), np.linspace(-1, 1, height)
    ramp = strength * (math.cos(angle) * x[None, :] + math.sin(angle) * y[:, None])
    return Image.fromarray((ramp[:, :, None] + colour).clip(0, 255).astype(np.uint8))


def checks(rng, colour, width, height):
    """A ground that no training picture has: a checkerboard of two tones, its squares a twelfth to a fifth of the width."""
    size, strength = width * rng.uniform(1 / 12, 1 / 5), rng.uniform(15, 30)
    x, y = np.arange(width) // size, np.arange(height) // size
    sign = 2 * ((x[None, :] + y[:, None]) % 2) - 1
    return Image.fromarray((strength * sign[:, :, None] + colour).clip(0, 255).astype(np.uint8))


def centre_of(rng, cell, extent, width, height):
    """A jittered centre for something `extent` wide: it stays within its cell, its centre well within."""
    centre = []
    for index, total in ((cell % 3, width), (cell // 3, height)):
        slack = min(max(total / 3 - extent, 0) / 2, total / 12)
        centre.append((index + 0.5) * total / 3 + rng.uniform(-slack, slack))
    return centre


def draw_thing(pen, rng, thing, colour, width, height):
    """Draw one thing of RGB `colour` into its cell of a (width, height) canvas."""
    low, high = (0.86, 1.0) if thing.size == "large" else (0.56, 0.68)
    extent = rng.uniform(low, high) * min(width, height) / 3
    turn = math.radians(rng.uniform(-10, 10))
    x, y = centre_of(rng, thing.cell, extent, width, height)
    box = (x - extent / 2, y - extent / 2, x + extent / 2, y + extent / 2)
    if thing.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=colour, width=round(0.21 * extent))
    else:
        sin, cos = extent * math.sin(turn), extent * math.cos(turn)
        pen.polygon([(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in OUTLINES[thing.shape]], fill=colour)


@functools.lru_cache(maxsize=None)
def font_of(size):
    """Pillow's own font at `size` pixels and the height of its capitals; loading it takes a millisecond."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox("H", anchor="ls")
    return font, bottom - top


def draw_letter(pen, rng, letter, cell, light, width, height):
    """Write `letter` into its cell, white if `light` else black."""
    extent = rng.uniform(0.9, 1.05) * min(width, height) / 3  # an em, of which a capital takes seven tenths
    font, capital = font_of(round(extent))
    x, y = centre_of(rng, cell, extent, width, height)
    ink, bold = (255, 255, 255) if light else (0, 0, 0), round(0.03 * extent)
    pen.text((x, y + capital / 2), letter, ink, font, anchor="ms", stroke_width=bold)


def draw(scene, rng, side=56, ground=ground):
    """A picture of `scene`, PIL RGB, its longer side `side` pixels; everything about its look comes from `rng`."""
    width, height = frame(rng, side)
    paints = paint(rng, [t.colour for t in scene.things])
    colour = ground_colour(rng, paints)
    big = width * SUPERSAMPLING, height * SUPERSAMPLING
    canvas = ground(rng, colour, width, height).resize(big, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for thing, rgb in zip(scene.things, paints.astype(int).tolist()):
        draw_thing(pen, rng, thing, tuple(rgb), *big)
    if scene.letter:
        draw_letter(pen, rng, scene.letter, scene.letter_cell, colour.mean() < 128, *big)
    picture = canvas.reduce(SUPERSAMPLING)
    if rng.random() < 0.3:
        return picture
    noise = rng.standard_normal((height, width, 3), np.float32) * np.float32(rng.uniform(0, 5))
    return Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))


# -------------------------------------------------------------------------------------------------------- captions

def phrase(thing):
    """What a caption says of a thing."""
    return f"a {thing.size} {thing.colour} {thing.shape} {AT[thing.cell]}"


def phrases(scene):
    """One phrase for each thing and for the letter, in raster order of their cells."""
    found = [(t.cell, phrase(t)) for t in scene.things]
    if scene.letter:
        found.append((scene.letter_cell, f"the letter {scene.letter} {AT[scene.letter_cell]}"))
    return [phrase for _, phrase in sorted(found)]


def sentence(parts):
    """"a, b and c." of two or more parts."""
    return ", ".join(parts[:-1]) + " and " + parts[-1] + "."


def caption(scene):
    """Everything in the scene in raster order, as one line of text."""
    return sentence(phrases(scene))


def describe(scene, rng):
    """The scene as text for a model without eyes: its things in few words, half of the time in random order."""
    parts = [(t.cell, f"{t.size} {t.colour} {t.shape} {PLACES[t.cell]}") for t in scene.things]
    if scene.letter:
        parts.append((scene.letter_cell, f"letter {scene.letter} {PLACES[scene.letter_cell]}"))
    parts = [part for _, part in sorted(parts)]
    return ", ".join(some(rng, parts, len(parts)) if rng.random() < 0.5 else parts) + "."


def objects_in(text):
    """Counter of the (size, colour, shape) that a caption, ours or a model's, names."""
    return collections.Counter(re.findall(rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", text))


def ask_caption(scene, rng):
    """A request for the caption, as a Question of family "caption"."""
    request = pick(rng, CAPTION_REQUESTS)
    return Question("caption", request, request, caption(scene))


# ------------------------------------------------------------------------------------------------------- questions
# Each *_question returns (template, its slots, answer), or None where the scene has nothing to ask about.

def name(scene, thing):
    """The shortest unique name, "red star" or "small red star"; None if another thing has the same."""
    alike = [t.size for t in scene.things if (t.colour, t.shape) == (thing.colour, thing.shape)]
    if len(alike) == 1:
        return f"{thing.colour} {thing.shape}"
    return f"{thing.size} {thing.colour} {thing.shape}" if alike.count(thing.size) == 1 else None


def subjects(scene, split):
    """The things a question may be about: in `combination` only those with a held-out pair."""
    return [t for t in scene.things if split != "combination" or t.held_out]


def named_pairs(scene, split):
    """The pairs of different things with a unique name each, of which the first may be a question's subject."""
    return [(a, b) for a in subjects(scene, split) for b in scene.things if a != b and name(scene, a) and name(scene, b)]


def sized_pairs(scene, split):
    """Those of named_pairs that differ in size, which is a part of neither's name."""
    return [(a, b) for a, b in named_pairs(scene, split) if a.size != b.size and not (
        a.size in name(scene, a) or b.size in name(scene, b))]


def attribute_question(scene, rng, split, asked, given):
    """Ask for the attribute `asked` of a thing known by its place, or by `given` if that is unique."""
    values = [getattr(t, given) for t in scene.things]
    unique = [t for t in subjects(scene, split) if values.count(getattr(t, given)) == 1]
    for template in some(rng, TEMPLATES[asked], len(TEMPLATES[asked])):
        choices = subjects(scene, split) if "{place}" in template else unique
        if choices:
            thing = pick(rng, choices)
            return template, {given: getattr(thing, given), "place": AT[thing.cell]}, getattr(thing, asked)
    return None


def colour_question(scene, rng, split):
    """The colour of a thing known by its shape or place."""
    return attribute_question(scene, rng, split, "colour", "shape")


def shape_question(scene, rng, split):
    """The shape of a thing known by its colour or place."""
    return attribute_question(scene, rng, split, "shape", "colour")


def count_question(scene, rng, split):
    """How many things, of any kind or of one colour or shape; the answer is chosen first, for balance."""
    template = pick(rng, TEMPLATES["count"])
    if "{" not in template:
        return template, {}, str(len(scene.things))
    values = [t.colour if "{colour}" in template else t.shape for t in scene.things]
    counts = {v: values.count(v) for v in (COLOURS if "{colour}" in template else SHAPES)}
    offered = sorted(set(counts.values()))
    answer = pick(rng, offered, [COUNT_WEIGHTS[n] for n in offered])
    value = pick(rng, [v for v, n in counts.items() if n == answer])
    return template, {"colour": value, "shapes": PLURALS.get(value)}, str(answer)


def absent_pair(scene, rng, split):
    """A pair the scene lacks, both of whose attributes it has if possible, else one.

    Held-out pairs are never named, except in `combination`, and there half of the time.
    """
    colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
    present = {(t.colour, t.shape) for t in scene.things}
    held = split == "combination" and rng.random() < 0.5
    absent = [p for p in PAIRS if (p in HELD_OUT) == held and p not in present]
    overlap = [(c in colours) + (s in shapes) for c, s in absent]
    return pick(rng, [p for p, n in zip(absent, overlap) if n == max(overlap)])


def exist_question(scene, rng, split):
    """Is a colour-shape pair there; yes and no are equally likely."""
    yes = rng.random() < 0.5
    if yes:
        thing = pick(rng, subjects(scene, split))
        colour, shape = thing.colour, thing.shape
    else:
        colour, shape = absent_pair(scene, rng, split)
    article = "an" if colour == "orange" else "a"
    return pick(rng, TEMPLATES["exist"]), {"a_thing": f"{article} {colour} {shape}"}, "yes" if yes else "no"


def relations(first, second):
    """Those of OPPOSITE that hold between two things: none on an axis where their cells agree."""
    (y1, x1), (y2, x2) = divmod(first.cell, 3), divmod(second.cell, 3)
    across = [] if x1 == x2 else ["left of" if x1 < x2 else "right of"]
    return across + ([] if y1 == y2 else ["above" if y1 < y2 else "below"])


def spatial_question(scene, rng, split):
    """Is one thing left of, right of, above or below another; the false relation is the opposite of the true."""
    pairs = named_pairs(scene, split)
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    relation = pick(rng, relations(first, second))  # never empty: no two things share a cell
    yes = rng.random() < 0.5
    asked = relation if yes else OPPOSITE[relation]
    if split == "train" and asked in RARE and rng.random() < TURNED:
        first, second, asked = second, first, OPPOSITE[asked]
    slots = {"first": name(scene, first), "second": name(scene, second), "relation": asked}
    return pick(rng, TEMPLATES["spatial"]), slots, "yes" if yes else "no"


def where_question(scene, rng, split):
    """In which cell a thing is: one of PLACES."""
    named = [t for t in subjects(scene, split) if name(scene, t)]
    if not named:
        return None
    thing = pick(rng, named)
    return pick(rng, TEMPLATES["where"]), {"thing": name(scene, thing)}, PLACES[thing.cell]


def compare_question(scene, rng, split):
    """Is one thing larger or smaller than another; neither may need its size as a part of its name."""
    pairs = sized_pairs(scene, split)
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    yes = rng.random() < 0.5
    asked = "larger" if (first.size == "large") == yes else "smaller"
    if split == "train" and asked in RARE and rng.random() < TURNED:
        first, second, asked = second, first, "larger"
    slots = {"first": name(scene, first), "second": name(scene, second), "larger": asked}
    return pick(rng, TEMPLATES["compare"]), slots, "yes" if yes else "no"


def tell_question(scene, rng, split):
    """All there is to say about a thing known by its name or place."""
    thing = pick(rng, subjects(scene, split))
    known = name(scene, thing)
    template = pick(rng, [t for t in TEMPLATES["tell"] if known or "{place}" in t])
    return template, {"thing": known, "place": AT[thing.cell]}, phrase(thing)


def read_question(scene, rng, split):
    """Which letter is there."""
    return (pick(rng, TEMPLATES["read"]), {}, scene.letter) if scene.letter else None


ASK = dict(colour=colour_question, shape=shape_question, count=count_question, exist=exist_question,
           spatial=spatial_question, where=where_question, compare=compare_question, read=read_question,
           tell=tell_question)


def ask(scene, family, rng, split="train"):
    """A random Question of `family` about the scene, or None where the family does not apply to it.

    In split `combination` questions with a subject are about a held-out pair. Raises KeyError on no such family.
    """
    found = ASK[family](scene, rng, split)
    if found is None:
        return None
    template, slots, answer = found
    return Question(family, template, template.format(**slots), answer)


def conversation(scene, rng, turns, weights=None):
    """Up to `turns` Questions about a training scene, no two the same; fewer if it has not enough to ask about.

    `weights` is {family: weight}, families left out are not asked; None asks all alike.
    """
    families = tuple(weights or FAMILIES)
    shares = [weights[f] for f in families] if weights else None
    asked = {}
    for _ in range(20 * turns):
        question = ask(scene, pick(rng, families, shares), rng)
        if question is not None:
            asked.setdefault(question.question, question)
        if len(asked) == turns:
            break
    return list(asked.values())


# ----------------------------------------------------------------------------------------------------------- files

def record(id, image, turns, prefix=""):
    """One conversation in LLaVA's JSON format. `turns`: (question, answer) pairs; `image`: a path or None.

    The first human turn starts with "<image>\\n" if there is an image, then with `prefix`.
    """
    said = []
    for question, answer in turns:
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    said[0]["value"] = ("<image>\n" if image else "") + prefix + said[0]["value"]
    return {"id": id, **({"image": image} if image else {}), "conversations": said}


def pairs_of(questions):
    """[(question, answer)] of Questions."""
    return [(q.question, q.answer) for q in questions]


def write_json(path, value):
    """Write `value`, a list one item a line; a killed run leaves the old file or none, never half of one."""
    path, lines = pathlib.Path(path), ",\n".join(json.dumps(row) for row in value) if isinstance(value, list) else None
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(json.dumps(value, indent=1) if lines is None else f"[\n{lines}\n]\n")
    os.replace(partial, path)


def training_turns(scene, rng, caption_share):
    """Questions for one training record: one in 15 %, else 5-7; `caption_share` of records ask for the caption."""
    turns = 1 if rng.random() < 0.15 else int(rng.integers(5, 8))
    questions = conversation(scene, rng, turns, SHARES)
    if rng.random() < caption_share:
        questions[int(rng.integers(len(questions)))] = ask_caption(scene, rng)
    return questions


def save_picture(folder, image, scene, side, ground=ground):
    """Draw `scene` by its own seed into folder/images/`image`: it is the same in whatever order, and process, pictures are drawn."""
    picture = draw(scene, np.random.default_rng(scene.seed), side, ground)
    picture.save(folder / "images" / image, compress_level=1)


def write_training(folder, rng, pictures, side):
    """Write captions.json (stage 1) and instruct.json (stage 2) of the training pictures; returns what `save_picture` needs to draw those.

    Every odd picture is an edit of the one before it: neighbours are each other's hard negatives.
    """
    captions, instruct, drawn, scene = [], [], [], None
    for i in range(pictures):
        scene = edit(scene, rng) if i % 2 else sample_scene(rng, "train")
        id = f"train_{i:06d}"
        drawn.append((folder, f"{id}.png", scene, side))
        captions.append(record(id, f"{id}.png", pairs_of([ask_caption(scene, rng)])))
        instruct.append(record(id, f"{id}.png", pairs_of(training_turns(scene, rng, 1 / 6))))
    write_json(folder / "captions.json", captions)
    write_json(folder / "instruct.json", instruct)
    return drawn


def write_texts(folder, file, rng, split, texts, seen):
    """Write conversations over descriptions of scenes of `split` which are not in `seen`."""
    rows = []
    while len(rows) < texts:
        scene = sample_scene(rng, split)
        if scene not in seen:
            turns = pairs_of(training_turns(scene, rng, 1 / 2))
            rows.append(record(f"text_{len(rows):06d}", None, turns, describe(scene, rng) + "\n"))
    write_json(folder / file, rows)


def question_record(id, image, question):
    """One question as a record of one turn with, beyond LLaVA's keys, "family" and "template"."""
    return {**record(f"{id}_{question.family}", image, pairs_of([question])), "family": question.family, "template": question.template}


def write_test(folder, rng, split, pictures, side, name=None, ground=ground, **things):
    """Write SPLIT.json of a test split: each family that applies asked once of each picture, and a caption; returns as `write_training`.

    SPLIT_captions.json has the captions alone. A split that differs from `split` in its ground or number of things has a `name`.
    """
    rows, drawn, name = [], [], name or split
    for i in range(pictures):
        scene, id = sample_scene(rng, split, **things), f"{name}_{i:06d}"
        drawn.append((folder, f"{id}.png", scene, side, ground))
        questions = [ask(scene, family, rng, split) for family in FAMILIES] + [ask_caption(scene, rng)]
        rows += [question_record(id, f"{id}.png", question) for question in questions if question is not None]
    write_json(folder / f"{name}.json", rows)
    write_json(folder / f"{name}_captions.json", [row for row in rows if row["family"] == "caption"])
    return drawn


def write_unseen(folder, seed=0, side=56, pictures=100):
    """Beside a world, write two further test splits: `grounds`, on a checkerboard, and `numbers`, of six or seven things."""
    folder = pathlib.Path(folder)
    drawn = write_test(folder, np.random.default_rng([seed, 5]), "heldout", pictures, side, "grounds", checks)
    drawn += write_test(folder, np.random.default_rng([seed, 6]), "heldout", pictures, side, "numbers", fewest=6, most=7)
    for picture in drawn:
        save_picture(*picture)


def shift_question(letter, steps, rng):
    """Which letter comes so many places after `letter` in LETTERS, the first again after the last: the question names the map."""
    template = pick(rng, SHIFTS)
    answer = LETTERS[(LETTERS.index(letter) + steps) % len(LETTERS)]
    return Question("shift", template, template.format(steps=steps), answer)


def write_dialect(folder, seed=0):
    """Beside a world, write dialect.json and heldout_dialect.json: its pictures with a letter, each of STEPS asked for.

    One conversation a training picture; single questions, as in all test splits, a held-out one.
    """
    folder, rng = pathlib.Path(folder), np.random.default_rng([seed, 7])
    for file, name in (("captions.json", "dialect.json"), ("heldout_captions.json", "heldout_dialect.json")):
        rows = []
        for row in json.loads((folder / file).read_text()):
            found = re.search("the letter ([A-Z])", row["conversations"][1]["value"])
            if found is None:
                continue
            questions = [shift_question(found[1], steps, rng) for steps in some(rng, STEPS, len(STEPS))]
            id = f"{pathlib.Path(row['image']).stem}_dialect"
            rows += [record(id, row["image"], pairs_of(questions))] if name == "dialect.json" else [
                question_record(f"{id}_{i}", row["image"], question) for i, question in enumerate(questions)]
        write_json(folder / name, rows)


def write_world(folder, pictures=16000, seed=0, side=56, texts=16000, test_pictures=250):
    """Write a whole world, the same for the same arguments; returns False if `folder` already holds just that.

    Paths in the JSON files are relative to folder/images. world.json, the arguments and a digest of this file,
    is written last: where it is, the world is complete.
    """
    folder = pathlib.Path(folder)
    stamp = {"pictures": pictures, "seed": seed, "side": side, "texts": texts, "test_pictures": test_pictures,
             "code": hashlib.sha256(pathlib.Path(__file__).read_bytes()).hexdigest()}
    if (folder / "world.json").exists() and json.loads((folder / "world.json").read_text()) == stamp:
        return False
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "world.json").unlink(missing_ok=True)  # from here on the folder is a mixture, until the stamp is back
    train, text, *tests = (np.random.default_rng([seed, i]) for i in range(5))
    drawn = write_training(folder, train, pictures, side)
    # Every core draws. A fork, for a new interpreter would import all that its parent did; Ctrl-C is the parent's affair.
    with multiprocessing.get_context("fork").Pool(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        saved = [pool.starmap_async(save_picture, drawn, 64)]
        write_texts(folder, "text.json", text, "train", texts, {scene for _, _, scene, _ in drawn})
        write_texts(folder, "validation_text.json", text, "validation", test_pictures, ())
        for rng, split in zip(tests, SPLITS[1:]):
            saved.append(pool.starmap_async(save_picture, write_test(folder, rng, split, test_pictures, side), 64))
        for result in saved:
            result.get()  # raises what a process raised
    write_json(folder / "world.json", stamp)
    return True
