"""Questions about the scenes of world.py, in eight families, each with exactly one right answer.

    rng = np.random.default_rng(0)
    scene = sample_scene(rng, "train")
    print(caption(scene), conversation(scene, rng, turns=5))

Answers are balanced: knowing the question must not help to guess the answer. Next: files.py.
"""
import collections
import dataclasses
import re

from toy.world import (COLOURS, FAMILIES, HELD_OUT, LETTERS, PAIRS, pick, PLACES, Scene, SHAPES,
    shuffled, SIZES, unique_name)

PREPOSITIONS = {"left": "on the left", "right": "on the right", "centre": "in the centre"}
AT = tuple(PREPOSITIONS.get(place, f"at the {place}") for place in PLACES)
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COUNT_WEIGHTS = (1.0, 1.3, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0)  # few scenes offer a large count


# How often training asks each family. "tell", a description of one thing, is for training only.
SHARES = dict(colour=0.8, shape=1.1, count=2.7, exist=1.1, spatial=1.1, where=0.7, compare=0.9, read=0.4, tell=1.2)


# The truth of "A is left of B" depends on two things together: the relation in the question and the
# relation in the picture. If both are balanced, neither predicts the answer without the other, so
# no gradient points at either, and such questions are learnt late or never. Training (and only
# training) therefore mostly asks in one direction: a question with one of the RARE relations is
# turned round with probability TURNED.
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
# Only for experiments/: questions that change how the letter is mapped to the answer
SHIFTS = tuple(question + " Go on by {steps}." for question in TEMPLATES["read"])
STEPS = tuple(range(4))


@dataclasses.dataclass(frozen=True)
class Question:
    """`template` is the phrasing with its slots, `question` the same with the slots filled."""
    family: str
    template: str
    question: str
    answer: str


# ---- Captions


def phrases(scene, a="a ", the="the ", places=AT):
    """One phrase for each thing and for the letter, in raster order of their cells."""
    cells = {t.cell: f"{a}{t.size} {t.colour} {t.shape}" for t in scene.things}
    if scene.letter:
        cells[scene.letter_cell] = f"{the}letter {scene.letter}"
    return [f"{cells[cell]} {places[cell]}" for cell in sorted(cells)]


def caption(scene):
    """Everything in the scene in raster order, as one line of text: "a, b and c."."""
    *parts, last = phrases(scene)
    return ", ".join(parts) + f" and {last}."


def describe(scene, rng):
    """The scene in few words, for a model without pictures; half of the time in random order."""
    parts = phrases(scene, a="", the="", places=PLACES)
    return ", ".join(shuffled(rng, parts) if rng.random() < 0.5 else parts) + "."


def objects_in(text):
    """Counter of the (size, colour, shape) named in a caption, from the data or from a model."""
    pattern = rf"\b({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b"
    return collections.Counter(re.findall(pattern, text))


def ask_caption(scene, rng):
    """A request for the caption, as a Question of family "caption"."""
    request = pick(rng, CAPTION_REQUESTS)
    return Question("caption", request, request, caption(scene))


# ---- One function for each family: (template, its slots, answer), or None if it does not apply


def subjects(scene, split):
    """The things that a question may be about: in `combination` only those with a held-out pair."""
    return [t for t in scene.things if split != "combination" or t.held_out]


def named_pairs(scene, split):
    """Pairs of different things with unique names; the first may be the subject of a question."""
    return [(a, b) for a in subjects(scene, split) for b in scene.things
            if a != b and unique_name(scene, a) and unique_name(scene, b)]


def sized_pairs(scene, split):
    """Those of named_pairs that differ in size, where neither name contains the size."""
    return [(a, b) for a, b in named_pairs(scene, split)
            if a.size != b.size
            and a.size not in unique_name(scene, a) and b.size not in unique_name(scene, b)]


def attribute_question(scene, rng, split, attribute, given):
    """Ask for an attribute of a thing, identified by its place or by a unique attribute `given`."""
    values = [getattr(t, given) for t in scene.things]
    unique = [t for t in subjects(scene, split) if values.count(getattr(t, given)) == 1]
    for template in shuffled(rng, TEMPLATES[attribute]):
        choices = subjects(scene, split) if "{place}" in template else unique
        if choices:
            thing = pick(rng, choices)
            slots = {given: getattr(thing, given), "place": AT[thing.cell]}
            return template, slots, getattr(thing, attribute)
    return None


def colour_question(scene, rng, split):
    """The colour of a thing, identified by its shape or place."""
    return attribute_question(scene, rng, split, "colour", "shape")


def shape_question(scene, rng, split):
    """The shape of a thing, identified by its colour or place."""
    return attribute_question(scene, rng, split, "shape", "colour")


def count_question(scene, rng, split):
    """How many things: all, or of one colour or shape. The answer is chosen first, for balance."""
    template = pick(rng, TEMPLATES["count"])
    if "{" not in template:
        return template, {}, str(len(scene.things))
    attribute, kinds = ("colour", COLOURS) if "{colour}" in template else ("shape", SHAPES)
    values = [getattr(t, attribute) for t in scene.things]
    counts = {kind: values.count(kind) for kind in kinds}
    offered = sorted(set(counts.values()))
    answer = pick(rng, offered, [COUNT_WEIGHTS[n] for n in offered])
    kind = pick(rng, [k for k, n in counts.items() if n == answer])
    return template, {"colour": kind, "shapes": PLURALS.get(kind)}, str(answer)


def absent_pair(scene, rng, split):
    """A pair that the scene lacks although, if possible, it has both attributes; else one of them.

    Held-out pairs are named only in `combination`, and there half of the time.
    """
    colours, shapes = {t.colour for t in scene.things}, {t.shape for t in scene.things}
    present = {(t.colour, t.shape) for t in scene.things}
    held_out = split == "combination" and rng.random() < 0.5
    absent = [p for p in PAIRS if (p in HELD_OUT) == held_out and p not in present]
    overlap = [(c in colours) + (s in shapes) for c, s in absent]
    return pick(rng, [p for p, n in zip(absent, overlap) if n == max(overlap)])


def exist_question(scene, rng, split):
    """Whether there is a thing of some colour and shape; yes and no are equally likely."""
    yes = rng.random() < 0.5
    if yes:
        thing = pick(rng, subjects(scene, split))
        colour, shape = thing.colour, thing.shape
    else:
        colour, shape = absent_pair(scene, rng, split)
    article = "an" if colour == "orange" else "a"
    slots = {"a_thing": f"{article} {colour} {shape}"}
    return pick(rng, TEMPLATES["exist"]), slots, "yes" if yes else "no"


def relations(first, second):
    """The relations of OPPOSITE that hold between two things; none on an axis where they agree."""
    (y1, x1), (y2, x2) = divmod(first.cell, 3), divmod(second.cell, 3)
    across = [] if x1 == x2 else ["left of" if x1 < x2 else "right of"]
    return across + ([] if y1 == y2 else ["above" if y1 < y2 else "below"])


def spatial_question(scene, rng, split):
    """Whether a thing is left of, right of, above or below another; if not, the opposite holds."""
    pairs = named_pairs(scene, split)
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    true_relation = pick(rng, relations(first, second))  # never empty: cells differ
    yes = rng.random() < 0.5
    relation = true_relation if yes else OPPOSITE[true_relation]
    if split == "train" and relation in RARE and rng.random() < TURNED:
        first, second, relation = second, first, OPPOSITE[relation]
    slots = {"first": unique_name(scene, first), "second": unique_name(scene, second),
             "relation": relation}
    return pick(rng, TEMPLATES["spatial"]), slots, "yes" if yes else "no"


def where_question(scene, rng, split):
    """The cell of a thing: one of PLACES."""
    named = [t for t in subjects(scene, split) if unique_name(scene, t)]
    if not named:
        return None
    thing = pick(rng, named)
    return pick(rng, TEMPLATES["where"]), {"thing": unique_name(scene, thing)}, PLACES[thing.cell]


def compare_question(scene, rng, split):
    """Whether one thing is larger or smaller than another; neither name contains the size."""
    pairs = sized_pairs(scene, split)
    if not pairs:
        return None
    first, second = pick(rng, pairs)
    yes = rng.random() < 0.5
    larger = "larger" if (first.size == "large") == yes else "smaller"
    if split == "train" and larger in RARE and rng.random() < TURNED:
        first, second, larger = second, first, "larger"
    slots = {"first": unique_name(scene, first), "second": unique_name(scene, second),
             "larger": larger}
    return pick(rng, TEMPLATES["compare"]), slots, "yes" if yes else "no"


def tell_question(scene, rng, split):
    """A full description of a thing, identified by its name or place."""
    thing = pick(rng, subjects(scene, split))
    name = unique_name(scene, thing)
    template = pick(rng, [t for t in TEMPLATES["tell"] if name or "{place}" in t])
    answer, = phrases(Scene((thing,), None, None, 0))
    return template, {"thing": name, "place": AT[thing.cell]}, answer


def read_question(scene, rng, split):
    """Which letter there is."""
    return (pick(rng, TEMPLATES["read"]), {}, scene.letter) if scene.letter else None


ASK = dict(colour=colour_question, shape=shape_question, count=count_question, exist=exist_question,
           spatial=spatial_question, where=where_question, compare=compare_question,
           read=read_question, tell=tell_question)


def ask(scene, family, rng, split="train"):
    """A random Question of `family` about the scene, or None if the family does not apply to it.

    In split `combination` questions with a subject are about a held-out pair.
    Raises KeyError on an unknown family.
    """
    result = ASK[family](scene, rng, split)
    if result is None:
        return None
    template, slots, answer = result
    return Question(family, template, template.format(**slots), answer)


def conversation(scene, rng, turns, weights=None):
    """Up to `turns` different Questions about a training scene; fewer if it offers too few.

    weights  {family: weight}; families left out are not asked. None asks all alike.
    """
    families = tuple(weights or FAMILIES)
    shares = [weights[f] for f in families] if weights else None
    questions = {}  # by their text
    for _ in range(20 * turns):
        question = ask(scene, pick(rng, families, shares), rng)
        if question is not None:
            questions.setdefault(question.question, question)
        if len(questions) == turns:
            break
    return list(questions.values())


def shift_question(letter, steps, rng):
    """Ask for the letter that comes `steps` places after `letter` in LETTERS, which is a cycle."""
    template = pick(rng, SHIFTS)
    answer = LETTERS[(LETTERS.index(letter) + steps) % len(LETTERS)]
    return Question("shift", template, template.format(steps=steps), answer)
