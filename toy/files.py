"""The toy world as files in LLaVA's JSON format: what stages 0, 1 and 2 train on and are tested on.

`write_world(folder)` writes

    images/                                     all pictures
    captions.json, instruct.json                of the training pictures, for stages 1 and 2
    text.json, validation_text.json             conversations without pictures, for stage 0's Llama
    validation, heldout, combination .json      single questions for testing; *_captions.json beside
    world.json                                  how it was made; written last

For training runs and the experiments. Next: stand_ins.py.
"""
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import typing

import numpy as np
from tqdm import tqdm

from toy.questions import ask, ask_caption, conversation, describe, SHARES, shift_question, STEPS
from toy.world import (checkerboard, draw, edit, FAMILIES, plain_background, sample_scene, Scene,
    shuffled, SPLITS)


# ---- Records


def record(id, image, turns, prefix=""):
    """One conversation in LLaVA's JSON format.

    turns  [(question, answer), ...]; image: its path or None
    The first human turn starts with "<image>\\n" if there is an image, then with `prefix`.
    """
    messages = []
    for question, answer in turns:
        messages += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    messages[0]["value"] = ("<image>\n" if image else "") + prefix + messages[0]["value"]
    return {"id": id, **({"image": image} if image else {}), "conversations": messages}


def turns_of(questions):
    """[(question, answer), ...] of Questions."""
    return [(q.question, q.answer) for q in questions]


def question_record(id, image, question):
    """One question as a record of one turn; "family" and "template" are not among LLaVA's keys."""
    row = record(f"{id}_{question.family}", image, turns_of([question]))
    return row | {"family": question.family, "template": question.template}


def training_questions(scene, rng, caption_share):
    """Questions for one training record: one in 15 %, else 5 to 7.

    A share `caption_share` of records asks for the caption, too.
    """
    turns = 1 if rng.random() < 0.15 else int(rng.integers(5, 8))
    questions = conversation(scene, rng, turns, SHARES)
    if rng.random() < caption_share:
        questions[int(rng.integers(len(questions)))] = ask_caption(scene, rng)
    return questions


# ---- Files


def write_atomically(path, value):
    """Write `value` as JSON, a list with one item per line.

    A killed run leaves the old file or none, never a part of one.
    """
    rows = ",\n".join(map(json.dumps, value)) if isinstance(value, list) else None
    text = json.dumps(value, indent=1) if rows is None else f"[\n{rows}\n]\n"
    partial = pathlib.Path(f"{path}.tmp")
    partial.write_text(text)
    os.replace(partial, path)


def progress(items, label, total=None):
    """`items` with a progress bar on standard error; what takes under a second shows none."""
    return tqdm(items, label, total, delay=1, mininterval=1 if sys.stderr.isatty() else 15)


class Picture(typing.NamedTuple):
    """A picture that is still to be drawn, `side` pixels long."""
    path: pathlib.Path
    scene: Scene
    side: int
    background: typing.Callable = plain_background  # or checkerboard

    def save(self):
        """Draw it. The scene's seed decides its look, so order and process do not matter."""
        rng = np.random.default_rng(self.scene.seed)
        draw(self.scene, rng, self.side, self.background).save(self.path, compress_level=1)


def write_training(folder, rng, pictures, side):
    """Write captions.json (stage 1) and instruct.json (stage 2); returns the `Picture`s to draw.

    Every second picture is an edit of the one before it: the two are each other's hard negatives.
    """
    captions, instruct, todo, scene = [], [], [], None
    for i in progress(range(pictures), "conversations"):
        scene = edit(scene, rng) if i % 2 else sample_scene(rng, "train")
        id = f"train_{i:06d}"
        image = f"{id}.png"
        todo.append(Picture(folder / "images" / image, scene, side))
        captions.append(record(id, image, turns_of([ask_caption(scene, rng)])))
        instruct.append(record(id, image, turns_of(training_questions(scene, rng, 1 / 6))))
    write_atomically(folder / "captions.json", captions)
    write_atomically(folder / "instruct.json", instruct)
    return todo


def write_texts(path, rng, split, texts, seen=()):
    """Write `texts` conversations in which a description of a scene stands for its picture.

    The scenes belong to `split` and are not in `seen`.
    """
    rows = []
    for i in progress(range(texts), "texts"):
        scene = sample_scene(rng, split)
        while scene in seen:
            scene = sample_scene(rng, split)
        turns = turns_of(training_questions(scene, rng, 1 / 2))
        rows.append(record(f"text_{i:06d}", None, turns, describe(scene, rng) + "\n"))
    write_atomically(path, rows)


def write_test(folder, rng, split, pictures, *, side, name=None, background=plain_background,
               **counts):
    """Write NAME.json, a test set; returns the `Picture`s to draw.

    Of each picture every family that applies is asked once, and a caption. NAME_captions.json has
    only the captions.
    name    of the test set, if it is not just `split`
    counts  `fewest` and `most` things in a picture, see `sample_scene`
    """
    rows, todo, name = [], [], name or split
    for i in range(pictures):
        scene, id = sample_scene(rng, split, **counts), f"{name}_{i:06d}"
        image = f"{id}.png"
        todo.append(Picture(folder / "images" / image, scene, side, background))
        questions = [ask(scene, family, rng, split) for family in FAMILIES]
        questions.append(ask_caption(scene, rng))
        rows += [question_record(id, image, question) for question in questions if question]
    write_atomically(folder / f"{name}.json", rows)
    captions = [row for row in rows if row["family"] == "caption"]
    write_atomically(folder / f"{name}_captions.json", captions)
    return todo


def write_unseen(folder, seed=0, side=56, pictures=100):
    """Add test sets to a world: `grounds`, on checkerboards, and `numbers`, of 6 or 7 things."""
    folder = pathlib.Path(folder)
    sets = {"grounds": dict(background=checkerboard), "numbers": dict(fewest=6, most=7)}
    for i, (name, how) in enumerate(sets.items(), 5):
        rng = np.random.default_rng([seed, i])
        for picture in write_test(folder, rng, "heldout", pictures, side=side, name=name, **how):
            picture.save()


def write_dialect(folder, seed=0):
    """Add dialect.json, heldout_dialect.json and validation_dialect.json to a world: each of STEPS,
    asked about letters.

    A training picture has one conversation; the others single questions, as in all test sets.
    """
    folder, rng = pathlib.Path(folder), np.random.default_rng([seed, 7])
    for prefix in ("", "heldout_", "validation_"):
        rows = []
        for row in json.loads((folder / f"{prefix}captions.json").read_text()):
            letter = re.search("the letter ([A-Z])", row["conversations"][1]["value"])
            if letter is None:
                continue
            asked = [shift_question(letter[1], steps, rng) for steps in shuffled(rng, STEPS)]
            id, image = f"{pathlib.Path(row['image']).stem}_dialect", row["image"]
            if prefix:
                rows += [question_record(f"{id}_{i}", image, q) for i, q in enumerate(asked)]
            else:
                rows.append(record(id, image, turns_of(asked)))
        write_atomically(folder / f"{prefix}dialect.json", rows)


# ---- A world


def code_digest():
    """The sha256 of the code that decides what a world contains."""
    names = ("world.py", "questions.py", "files.py")
    code = b"".join(pathlib.Path(__file__).with_name(name).read_bytes() for name in names)
    return hashlib.sha256(code).hexdigest()


def write_world(folder, pictures=16000, seed=0, side=56, texts=16000, test_pictures=250):
    """Write a whole world, the same for the same arguments; False if `folder` already holds it.

    Paths in the JSON files are relative to folder/images. world.json, the arguments and a digest of
    the code, is written last: if it is there, the world is complete.
    """
    folder = pathlib.Path(folder)
    stamp = {"pictures": pictures, "seed": seed, "side": side, "texts": texts,
             "test_pictures": test_pictures, "code": code_digest()}
    stamp_file = folder / "world.json"
    if stamp_file.exists() and json.loads(stamp_file.read_text()) == stamp:
        return False
    print(f"drawing the toy world in {folder}: {pictures:,} pictures with conversations, "
          f"{texts:,} texts, 3 x {test_pictures} test pictures", file=sys.stderr)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    stamp_file.unlink(missing_ok=True)  # until it is back, two worlds may be mixed here
    train, text, *tests = (np.random.default_rng([seed, i]) for i in range(5))
    # Every core draws. Forked, because a new interpreter would import torch again. Workers ignore
    # Ctrl-C; the parent ends them.
    ignore = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    with multiprocessing.get_context("fork").Pool(**ignore) as pool:
        todo = write_training(folder, train, pictures, side)
        drawn = [pool.imap_unordered(Picture.save, todo, 64)]  # starts at once, beside the texts
        seen = {picture.scene for picture in todo}
        write_texts(folder / "text.json", text, "train", texts, seen)
        write_texts(folder / "validation_text.json", text, "validation", test_pictures)
        for rng, split in zip(tests, SPLITS[1:]):
            test = write_test(folder, rng, split, test_pictures, side=side)
            drawn.append(pool.imap_unordered(Picture.save, test, 64))
        total = pictures + len(tests) * test_pictures
        for _ in progress(itertools.chain(*drawn), "pictures", total):
            pass  # a process's exception is raised here
    write_atomically(stamp_file, stamp)
    return True
