"""TODO"""
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import signal

import numpy as np

from toy.questions import ask, ask_caption, conversation, describe, SHARES, shift_question, STEPS
from toy.world import checks, draw, edit, FAMILIES, ground, sample_scene, some, SPLITS


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


def write_atomically(path, value):
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
    write_atomically(folder / "captions.json", captions)
    write_atomically(folder / "instruct.json", instruct)
    return drawn


def write_texts(folder, file, rng, split, texts, seen):
    """Write conversations over descriptions of scenes of `split` which are not in `seen`."""
    rows = []
    while len(rows) < texts:
        scene = sample_scene(rng, split)
        if scene not in seen:
            turns = pairs_of(training_turns(scene, rng, 1 / 2))
            rows.append(record(f"text_{len(rows):06d}", None, turns, describe(scene, rng) + "\n"))
    write_atomically(folder / file, rows)


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
    write_atomically(folder / f"{name}.json", rows)
    write_atomically(folder / f"{name}_captions.json", [row for row in rows if row["family"] == "caption"])
    return drawn


def write_unseen(folder, seed=0, side=56, pictures=100):
    """Beside a world, write two further test splits: `grounds`, on a checkerboard, and `numbers`, of six or seven things."""
    folder = pathlib.Path(folder)
    drawn = write_test(folder, np.random.default_rng([seed, 5]), "heldout", pictures, side, "grounds", checks)
    drawn += write_test(folder, np.random.default_rng([seed, 6]), "heldout", pictures, side, "numbers", fewest=6, most=7)
    for picture in drawn:
        save_picture(*picture)


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
        write_atomically(folder / name, rows)


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
    write_atomically(folder / "world.json", stamp)
    return True
