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
import dataclasses
import functools
import hashlib
import math

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


# ------------------------------------------------------------------------------------------------------- questions
# Each *_question returns (template, its slots, answer), or None where the scene has nothing to ask about.

def name(scene, thing):
    """The shortest unique name, "red star" or "small red star"; None if another thing has the same."""
    alike = [t.size for t in scene.things if (t.colour, t.shape) == (thing.colour, thing.shape)]
    if len(alike) == 1:
        return f"{thing.colour} {thing.shape}"
    return f"{thing.size} {thing.colour} {thing.shape}" if alike.count(thing.size) == 1 else None
