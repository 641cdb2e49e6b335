"""TODO"""
import collections
import dataclasses
import re

from toy.world import (COLOURS, FAMILIES, HELD_OUT, LETTERS, name, PAIRS, pick, PLACES, SHAPES,
    SIZES, some)

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


@dataclasses.dataclass(frozen=True)
class Question:
    """`template` is the phrasing with its slots, `question` the same with the slots filled."""
    family: str
    template: str
    question: str
    answer: str


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


def shift_question(letter, steps, rng):
    """Which letter comes so many places after `letter` in LETTERS, the first again after the last: the question names the map."""
    template = pick(rng, SHIFTS)
    answer = LETTERS[(LETTERS.index(letter) + steps) % len(LETTERS)]
    return Question("shift", template, template.format(steps=steps), answer)
