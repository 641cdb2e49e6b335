"""The toy world: scenes of coloured shapes, their splits, and their pictures, drawn with Pillow.

A picture is a 3x3 grid of cells. Two to five things (a shape, a colour, a size) and sometimes one
letter have a cell each. A `Scene` holds only the content; the look (aspect, exact colours, jitter,
background, noise) is drawn from a numpy Generator. Every scene belongs to exactly one split:
`combination` if it shows a colour-shape pair of HELD_OUT, else `train`, `validation` or `heldout`
by a hash of its content. Training neither shows nor names the pairs of HELD_OUT.

    rng = np.random.default_rng(0)
    scene = sample_scene(rng, "train")
    draw(scene, rng).save("scene.png")

Next: questions.py asks about scenes, files.py writes a whole world.
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
LETTERS = tuple("EHKLMOSTXZ")  # not A: in lower case it would be the article
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
FAMILIES = ("colour", "shape", "count", "exist", "spatial", "where", "compare", "read")
SPLITS = ("train", "validation", "heldout", "combination")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = frozenset((colour, SHAPES[(5 * i + 2) % 6]) for i, colour in enumerate(COLOURS))


ANCHORS = {  # a muted and the pure colour; drawn colours lie somewhere between the two
    "red": ((205, 50, 45), (255, 0, 0)), "orange": ((240, 130, 40), (255, 165, 0)),
    "yellow": ((235, 215, 60), (255, 255, 0)), "green": ((60, 180, 75), (0, 128, 0)),
    "cyan": ((60, 190, 205), (0, 255, 255)), "blue": ((55, 85, 205), (0, 0, 255)),
    "purple": ((145, 70, 190), (128, 0, 128)), "pink": ((245, 120, 185), (255, 192, 203)),
}
SUPERSAMPLING = 4
# Half of a square's side, half of a cross's arm, in diameters; turned by 10 degrees both still fit
SQUARE, ARM = 0.42, 0.16


def on_circle(radii, points):
    """`points` corners around the origin, the first at the top; the radii are used in turn."""
    angles = [2 * math.pi * i / points for i in range(points)]
    return [(radii[i % len(radii)] * math.sin(a), -radii[i % len(radii)] * math.cos(a))
            for i, a in enumerate(angles)]


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
    """The content of a picture: things in raster order and perhaps a letter.

    `seed` decides the look. It is not part of the content: scenes that differ only in it are equal.
    """
    things: tuple
    letter: str | None
    letter_cell: int | None
    seed: int = dataclasses.field(compare=False)


# ---- Scenes and splits


def pick(rng, items, weights=None):
    """One of `items` (a sequence), uniformly or in proportion to `weights`."""
    if weights is None:
        return items[int(rng.integers(len(items)))]
    remaining = rng.random() * sum(weights)
    for item, weight in zip(items, weights):
        remaining -= weight
        if remaining < 0:
            return item
    return items[-1]


def shuffled(rng, items):
    """The items of a sequence in random order, as a list."""
    return [items[i] for i in rng.permutation(len(items))]


def unique_name(scene, thing):
    """The shortest unique name, "red star" or "small red star"; None if there is none."""
    pair = thing.colour, thing.shape
    sizes = [t.size for t in scene.things if (t.colour, t.shape) == pair]
    if len(sizes) == 1:
        return f"{thing.colour} {thing.shape}"
    return f"{thing.size} {thing.colour} {thing.shape}" if sizes.count(thing.size) == 1 else None


def split_of(scene):
    """The split of a scene, decided by its content only: one of SPLITS."""
    if any(t.held_out for t in scene.things):
        return "combination"
    things = [(t.shape, t.colour, t.size, t.cell) for t in scene.things]
    content = things, scene.letter, scene.letter_cell
    digest = hashlib.sha256(repr(content).encode()).digest()
    share = int.from_bytes(digest[:6], "big") / 2 ** 48
    if share < 0.9:
        return "train"
    return "validation" if share < 0.95 else "heldout"


def palette(rng, split):
    """(ordinary pairs, held-out pairs) for a scene: all, or those of two colours and/or shapes."""
    colour, shape = pick(rng, sorted(HELD_OUT) if split == "combination" else PAIRS)
    colours, shapes = COLOURS, SHAPES
    if rng.random() < 0.45:
        colours = (colour, pick(rng, [c for c in COLOURS if c != colour]))
    if rng.random() < 0.45:
        shapes = (shape, pick(rng, [s for s in SHAPES if s != shape]))
    pairs = [(c, s) for c in colours for s in shapes]
    return [p for p in pairs if p not in HELD_OUT], [p for p in pairs if p in HELD_OUT]


def propose(rng, split, fewest=2, most=5):
    """A random scene of `fewest` to `most` things; its hash may belong to another split."""
    ordinary, held_out = palette(rng, split)
    count = int(rng.integers(fewest, most + 1))
    cells = rng.permutation(9)[:count + 1].tolist()
    special = count // 2 if split == "combination" else 0
    pairs = [pick(rng, held_out if i < special else ordinary) for i in range(count)]
    things = tuple(sorted(Thing(cell, shape, colour, pick(rng, SIZES))
                          for cell, (colour, shape) in zip(cells, pairs)))
    letter = pick(rng, LETTERS) if rng.random() < 0.55 else None
    return Scene(things, letter, cells[-1] if letter else None, int(rng.integers(2 ** 31)))


def sample_scene(rng, split, **counts):
    """A random scene of `split`.

    In `combination` half of its things are held-out pairs, and one of those has a unique name.

    counts  `fewest` and `most` things, to go beyond the counts of training
    Raises ValueError on an unknown split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(SPLITS)}")
    while True:
        scene = propose(rng, split, **counts)
        if split_of(scene) != split:
            continue
        held_out = [t for t in scene.things if t.held_out]
        if split != "combination" or any(unique_name(scene, t) for t in held_out):
            return scene


def edit(scene, rng):
    """A training scene that differs from `scene` in one attribute of one thing, or in its letter.

    Raises ValueError if `scene` has two held-out things: one change cannot remove both.
    """
    if sum(t.held_out for t in scene.things) > 1:
        raise ValueError("a scene with two held-out things is never one change away from training")
    while True:
        attribute = pick(rng, ("colour", "shape", "size", "cell", "letter"))
        changed = change_attribute(scene, attribute, rng)
        if changed is not None and split_of(changed) == "train":
            return changed


def change_attribute(scene, attribute, rng):
    """`scene` with a new random value of `attribute`, "letter" or a field of one Thing.

    Returns None if the letter is to change and the scene has none.
    """
    seed = int(rng.integers(2 ** 31))
    if attribute == "letter":
        other = pick(rng, [x for x in LETTERS if x != scene.letter])
        return dataclasses.replace(scene, letter=other, seed=seed) if scene.letter else None
    i = int(rng.integers(len(scene.things)))
    taken = {t.cell for t in scene.things} | {scene.letter_cell}
    values = {"colour": COLOURS, "shape": SHAPES, "size": SIZES,
              "cell": [c for c in range(9) if c not in taken]}[attribute]
    old = getattr(scene.things[i], attribute)
    new = pick(rng, [value for value in values if value != old])
    thing = dataclasses.replace(scene.things[i], **{attribute: new})
    things = tuple(sorted(scene.things[:i] + (thing,) + scene.things[i + 1:]))
    return dataclasses.replace(scene, things=things, seed=seed)


# ---- Pictures. A `size` is (width, height) in pixels, a `colour` three numbers in 0..255.


def canvas_size(rng, side):
    """(width, height), the longer is `side`: a square in 40 %, else an aspect from 2:3 to 3:2."""
    if rng.random() < 0.4:
        return side, side
    aspect = math.exp(rng.uniform(-math.log(1.5), math.log(1.5)))
    return round(side * min(1, aspect)), round(side * min(1, 1 / aspect))


def sample_colours(rng, names):
    """float32[len(names), 3] in 0..255: a random shade of each named colour."""
    anchors = np.array([ANCHORS[name] for name in names], np.float32)
    mix = rng.random((len(names), 1), np.float32)
    mixed = anchors[:, 0] * mix + anchors[:, 1] * (1 - mix)
    return np.clip(mixed + rng.normal(0, 8, mixed.shape), 0, 255)


def background_colour(rng, colours):
    """A near-grey float[3] that differs clearly from all `colours`, if six attempts find one."""
    for _ in range(6):
        colour = rng.uniform(25, 245) + rng.uniform(-8, 8, 3)
        if ((colours - colour) ** 2).sum(1).min() > 90 ** 2:
            break
    return colour


def plain_background(rng, colour, size):
    """The empty picture, PIL RGB: a flat colour in half of the cases, else a gentle gradient."""
    if rng.random() < 0.5:
        return Image.new("RGB", size, tuple(colour.clip(0, 255).astype(int).tolist()))
    angle, strength = rng.uniform(0, 2 * math.pi), rng.uniform(8, 30)
    x, y = (np.linspace(-1, 1, length) for length in size)
    ramp = strength * (math.cos(angle) * x[None, :] + math.sin(angle) * y[:, None])
    return Image.fromarray((ramp[:, :, None] + colour).clip(0, 255).astype(np.uint8))


def checkerboard(rng, colour, size):
    """A background of two tones that training never shows; 5 to 12 squares fit the width."""
    square, strength = size[0] * rng.uniform(1 / 12, 1 / 5), rng.uniform(15, 30)
    x, y = (np.arange(length) // square for length in size)
    sign = 2 * ((x[None, :] + y[:, None]) % 2) - 1
    return Image.fromarray((strength * sign[:, :, None] + colour).clip(0, 255).astype(np.uint8))


def jittered_centre(rng, cell, extent, size):
    """[x, y], a random centre for a thing `extent` wide: the thing stays within its cell."""
    centre = []
    for index, total in ((cell % 3, size[0]), (cell // 3, size[1])):
        slack = min(max(total / 3 - extent, 0) / 2, total / 12)
        centre.append((index + 0.5) * total / 3 + rng.uniform(-slack, slack))
    return centre


def draw_thing(pen, rng, thing, colour, size):
    """Draw one thing of an RGB `colour` into its cell of a canvas of `size`."""
    low, high = (0.86, 1.0) if thing.size == "large" else (0.56, 0.68)
    extent = rng.uniform(low, high) * min(size) / 3
    angle = math.radians(rng.uniform(-10, 10))
    x, y = jittered_centre(rng, thing.cell, extent, size)
    box = (x - extent / 2, y - extent / 2, x + extent / 2, y + extent / 2)
    if thing.shape == "circle":
        pen.ellipse(box, fill=colour)
    elif thing.shape == "ring":
        pen.ellipse(box, outline=colour, width=round(0.21 * extent))
    else:
        sin, cos = extent * math.sin(angle), extent * math.cos(angle)
        corners = [(x + cos * u - sin * v, y + sin * u + cos * v) for u, v in OUTLINES[thing.shape]]
        pen.polygon(corners, fill=colour)


@functools.lru_cache(maxsize=None)
def font_of(size):
    """(Pillow's own font, the height of its capitals) at `size` pixels; loading takes 1 ms."""
    font = ImageFont.load_default(size)
    left, top, right, bottom = font.getbbox("H", anchor="ls")
    return font, bottom - top


def draw_letter(pen, rng, scene, ink, size):
    """Write the letter of `scene` into its cell of a canvas of `size`, in the RGB colour `ink`."""
    extent = rng.uniform(0.9, 1.05) * min(size) / 3  # an em; a capital is 0.7 em high
    font, capital = font_of(round(extent))
    x, y = jittered_centre(rng, scene.letter_cell, extent, size)
    pen.text((x, y + capital / 2), scene.letter, ink, font, anchor="ms",
             stroke_width=round(0.03 * extent))


def draw(scene, rng, side=56, background=plain_background):
    """A picture of `scene`, PIL RGB, its longer side `side` pixels; `rng` decides its look."""
    size = canvas_size(rng, side)
    colours = sample_colours(rng, [t.colour for t in scene.things])
    grey = background_colour(rng, colours)
    big = size[0] * SUPERSAMPLING, size[1] * SUPERSAMPLING
    canvas = background(rng, grey, size).resize(big, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(canvas)
    for thing, colour in zip(scene.things, colours.astype(int).tolist()):
        draw_thing(pen, rng, thing, tuple(colour), big)
    if scene.letter:
        draw_letter(pen, rng, scene, (255,) * 3 if grey.mean() < 128 else (0,) * 3, big)
    picture = canvas.reduce(SUPERSAMPLING)
    if rng.random() < 0.3:
        return picture
    noise = rng.standard_normal((size[1], size[0], 3), np.float32)
    noise *= np.float32(rng.uniform(0, 5))
    return Image.fromarray((np.asarray(picture) + noise).round().clip(0, 255).astype(np.uint8))
