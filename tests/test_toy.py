"""The toy: splits, questions with one right answer, balanced answers, files, stand-ins."""
import collections
import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest
import torch
from PIL import Image

from toy import files, questions, stage0, stand_ins, world

HELD_OUT_NAMES = re.compile("|".join(" ".join(pair) for pair in sorted(world.HELD_OUT)))
TWO = (world.Thing(0, "star", "red", "large"), world.Thing(4, "ring", "blue", "small"))
COLUMN, ROW = {c: c % 3 for c in range(9)}, {c: c // 3 for c in range(9)}


def scenes(split, count, seed=0):
    """`count` random scenes of `split`."""
    rng = np.random.default_rng(seed)
    return [world.sample_scene(rng, split) for _ in range(count)]


def named(scene, text):
    """For each "[size] colour shape" in `text`, in order, the list of things that it fits."""
    sizes, colours, shapes = map("|".join, (world.SIZES, world.COLOURS, world.SHAPES))
    pattern = rf"(?:({sizes}) )?({colours}) ({shapes})\b"
    return [[t for t in scene.things
             if size in ("", t.size) and (t.colour, t.shape) == (colour, shape)]
            for size, colour, shape in re.findall(pattern, text)]


def word_in(words, text):
    """The only one of `words` in `text`, in the singular or the plural."""
    found = [w for w in words if re.search(rf"\b{w}(s|es)?\b", text)]
    assert len(found) == 1, (words, text)
    return found[0]


def looked_up(scene, q):
    """The answer to an attribute question; asserts that exactly one thing fits the question."""
    other = "shape" if q.family == "colour" else "colour"
    text = q.question.replace("Which shape", "").replace("What shape", "")
    if re.search(r"\b(at|on|in) the\b", text):
        place = re.search(r"\b(?:at|on|in) the (.*?)( have)?\?", text)[1]
        fits = [t for t in scene.things if t.cell == world.PLACES.index(place)]
    else:
        value = word_in(world.SHAPES if other == "shape" else world.COLOURS, text)
        fits = [t for t in scene.things if getattr(t, other) == value]
    assert len(fits) == 1, q
    return getattr(fits[0], q.family)


def counted(scene, q):
    """The answer to a count question."""
    for field, words in (("colour", world.COLOURS), ("shape", world.SHAPES)):
        if any(re.search(rf"\b{w}", q.question) for w in words):
            return str(sum(getattr(t, field) == word_in(words, q.question) for t in scene.things))
    return str(len(scene.things))


def true_of(q, first, second):
    """Whether the relation that a spatial or compare question names holds."""
    if q.family == "compare":
        assert first.size != second.size
        return ("larger" in q.question) == (first.size == "large")
    relation = word_in(("left of", "right of", "above", "below"), q.question)
    axis = COLUMN if relation.endswith("of") else ROW
    assert axis[first.cell] != axis[second.cell]
    return (axis[first.cell] < axis[second.cell]) == (relation in ("left of", "above"))


def derived(scene, q):
    """The answer to `q`, found from its text and the scene; asserts that names are unique."""
    if q.family in ("colour", "shape"):
        return looked_up(scene, q)
    if q.family == "count":
        return counted(scene, q)
    if q.family == "read":
        return scene.letter
    if q.family == "tell":
        place = re.search(r"\b((?:at|on|in) the .*?)[.?]", q.question)
        if place:
            found = [t for t in scene.things if questions.AT[t.cell] == place[1]]
        else:
            found = named(scene, q.question)[0]
        assert len(found) == 1, q
        end = f" {questions.AT[found[0].cell]}"
        return next(p for p in questions.phrases(scene) if p.endswith(end))
    fits = named(scene, q.question)
    if q.family == "exist":
        return "yes" if fits[0] else "no"
    assert all(len(f) == 1 for f in fits) and len(fits) == (1 if q.family == "where" else 2), q
    if q.family == "where":
        return world.PLACES[fits[0][0].cell]
    first, second = (f[0] for f in fits)
    return "yes" if true_of(q, *(f[0] for f in fits)) else "no"


@pytest.mark.parametrize("split", world.SPLITS)
def test_questions_are_unambiguous_and_answers_right(split):
    rng = np.random.default_rng(1)
    for scene in scenes(split, 250):
        for family in questions.SHARES:
            q = questions.ask(scene, family, rng, split)
            if q is not None:
                assert "{" not in q.question and q.answer == derived(scene, q), (scene, q)


@pytest.mark.parametrize("family", questions.SHARES)
def test_answers_are_balanced_and_phrasings_vary(family):
    rng = np.random.default_rng(2)
    found = [questions.ask(scene, family, rng) for scene in scenes("train", 400) for _ in range(2)]
    asked = [q for q in found if q]
    assert len(asked) > 300
    assert collections.Counter(q.answer for q in asked).most_common(1)[0][1] <= 0.55 * len(asked)
    assert {q.template for q in asked} == set(questions.TEMPLATES[family])
    assert len(questions.TEMPLATES[family]) >= 4


@pytest.mark.parametrize("split, low, high", [
    ("train", 0.1, 0.2), ("heldout", 0.4, 0.6), ("combination", 0.4, 0.6)])
def test_training_mostly_asks_in_one_direction_and_tests_in_both_alike(split, low, high):
    rng = np.random.default_rng(10)
    for family in ("spatial", "compare"):
        asked = [questions.ask(scene, family, rng, split) for scene in scenes(split, 600)]
        asked = [q for q in asked if q]
        rare = [q for q in asked if any(word in q.question for word in questions.RARE)]
        assert low < len(rare) / len(asked) < high
        for some in (rare, [q for q in asked if q not in rare]):  # the direction predicts nothing
            assert 0.35 < np.mean([q.answer == "yes" for q in some]) < 0.65


def test_no_answer_dominates_a_phrasing_of_count():
    rng = np.random.default_rng(3)
    answers = collections.defaultdict(collections.Counter)
    for scene in scenes("train", 1000):
        q = questions.ask(scene, "count", rng)
        answers[q.template][q.answer] += 1
    assert all(max(c.values()) <= 0.45 * c.total() for c in answers.values())
    assert set().union(*answers.values()) == set("012345")


def test_negatives_are_adversarial():
    rng = np.random.default_rng(4)
    overlaps = []
    for scene in scenes("train", 200):
        q = questions.ask(scene, "exist", rng)
        if q.answer == "no":
            colour, shape = word_in(world.COLOURS, q.question), word_in(world.SHAPES, q.question)
            overlaps.append(any(t.colour == colour for t in scene.things)
                            + any(t.shape == shape for t in scene.things))
    assert min(overlaps) >= 1 and np.mean(overlaps) > 1.6


def test_training_never_shows_or_names_a_held_out_pair():
    assert len(world.HELD_OUT) == len({c for c, _ in world.HELD_OUT}) == 8
    assert {s for _, s in world.HELD_OUT} == set(world.SHAPES)
    rng = np.random.default_rng(5)
    for scene in scenes("train", 400):
        scene = world.edit(scene, rng)
        texts = [questions.caption(scene), questions.describe(scene, rng)]
        texts += [q.question for q in questions.conversation(scene, rng, 7)]
        assert not any(t.held_out for t in scene.things)
        assert not HELD_OUT_NAMES.search(" ".join(texts))


def test_splits_share_no_scene_and_hold_their_shares():
    content = {split: set(scenes(split, 300)) for split in world.SPLITS}
    assert len(set().union(*content.values())) == sum(len(s) for s in content.values())
    assert all(world.split_of(scene) == split for split in world.SPLITS for scene in content[split])
    rng = np.random.default_rng(6)
    shares = collections.Counter(world.split_of(world.propose(rng, "train")) for _ in range(4000))
    assert 0.88 < shares["train"] / 4000 < 0.92 and 0.035 < shares["heldout"] / 4000 < 0.065
    with pytest.raises(ValueError, match="expected one of train"):
        world.sample_scene(rng, "test")


def test_the_split_is_the_same_on_every_machine():
    scene = world.Scene(TWO, "K", 8, 0)
    other = dataclasses.replace(scene, seed=9)
    assert world.split_of(scene) == world.split_of(other) == "validation"
    moved = [dataclasses.replace(scene, letter=x, letter_cell=c)
             for x in world.LETTERS for c in (1, 2, 3, 5, 6, 7, 8)]
    counts = collections.Counter(map(world.split_of, moved))
    assert counts == {"train": 58, "validation": 4, "heldout": 8}


def test_combination_questions_are_about_held_out_pairs():
    rng = np.random.default_rng(7)
    negatives = []
    for scene in scenes("combination", 200):
        for family in ("colour", "shape", "exist", "spatial", "where", "compare"):
            q = questions.ask(scene, family, rng, "combination")
            if q is None:
                continue
            if family in ("colour", "shape"):
                assert any(t.held_out and getattr(t, family) == q.answer for t in scene.things)
            elif q.answer == "no" and family == "exist":
                negatives.append(bool(HELD_OUT_NAMES.search(q.question)))
            else:
                assert named(scene, q.question)[0][0].held_out
    assert 0.3 < np.mean(negatives) < 0.7


def test_a_caption_names_everything_once():
    rng = np.random.default_rng(8)
    for scene in scenes("train", 100):
        expected = collections.Counter((t.size, t.colour, t.shape) for t in scene.things)
        for text in (questions.caption(scene), questions.describe(scene, rng)):
            assert questions.objects_in(text) == expected
            assert (f"letter {scene.letter} " in text) == (scene.letter is not None)
        # The description has the same content in fewer words, perhaps in another order
        short = [re.sub("^(a|the) ", "", p[:-len(at)]) + place for p in questions.phrases(scene)
                 for at, place in zip(questions.AT, world.PLACES) if p.endswith(f" {at}")]
        assert sorted(questions.describe(scene, rng).rstrip(".").split(", ")) == sorted(short)
    assert questions.caption(world.Scene(TWO, "K", 7, 0)) == (
        "a large red star at the top left, a small blue ring in the centre "
        "and the letter K at the bottom.")


def test_an_edit_changes_one_attribute():
    rng = np.random.default_rng(9)
    kinds = collections.Counter()
    for scene in scenes("train", 300):
        new = world.edit(scene, rng)
        assert world.split_of(new) == "train"
        gone, come = set(scene.things) - set(new.things), set(new.things) - set(scene.things)
        before, after = collections.Counter(scene.things), collections.Counter(new.things)
        fields = [f for a, b in zip(gone, come) for f in ("cell", "shape", "colour", "size")
                  if getattr(a, f) != getattr(b, f)] + ["letter"] * (scene.letter != new.letter)
        assert len(fields) == 1 and (after - before).total() <= 1
        assert scene.letter_cell == new.letter_cell
        assert len({t.cell for t in new.things} | {new.letter_cell}) == len(new.things) + 1
        assert list(new.things) == sorted(new.things)
        kinds[fields[0]] += 1
    assert len(kinds) == 5
    held = tuple(world.Thing(i, shape, colour, "large")
                 for i, (colour, shape) in enumerate(sorted(world.HELD_OUT)[:2]))
    with pytest.raises(ValueError, match="two held-out things"):
        world.edit(world.Scene(held, None, None, 0), rng)


def test_pictures_have_the_size_asked_for_and_both_orientations():
    rng = np.random.default_rng(10)
    for side in (24, 60):
        pictures = [world.draw(s, rng, side) for s in scenes("train", 60)]
        assert all(p.mode == "RGB" and max(p.size) == side for p in pictures)
        assert all(min(p.size) >= round(side / 1.5) for p in pictures)
        wider = [p.width - p.height for p in pictures]
        assert min(wider) < 0 < max(wider) and 0.2 < wider.count(0) / 60 < 0.65


def test_things_are_drawn_in_their_cells_in_their_colours():
    rng = np.random.default_rng(11)
    for scene in scenes("train", 60):
        pixels = np.asarray(world.draw(scene, rng), np.float32)
        height, width, _ = pixels.shape
        saturation = pixels.max(2) - pixels.min(2)
        for t in scene.things:
            rows, columns = (slice(round(i * total / 3), round((i + 1) * total / 3))
                             for i, total in ((ROW[t.cell], height), (COLUMN[t.cell], width)))
            vivid = pixels[rows, columns].reshape(-1, 3)[saturation[rows, columns].argmax()]
            muted, pure = map(np.array, world.ANCHORS[t.colour])
            assert distance_to_segment(vivid, muted, pure) < 60, (t, vivid)
        cells = {t.cell for t in scene.things}
        empty = next(c for c in range(9) if c not in cells)
        inside = saturation[ROW[empty] * height // 3 + 2:(ROW[empty] + 1) * height // 3 - 2,
                            COLUMN[empty] * width // 3 + 2:(COLUMN[empty] + 1) * width // 3 - 2]
        assert inside.mean() < 40


def distance_to_segment(point, start, end):
    """Euclidean distance of an RGB point from the segment between two others."""
    along = np.clip((point - start) @ (end - start) / ((end - start) @ (end - start)), 0, 1)
    return float(np.linalg.norm(point - start - along * (end - start)))


def test_conversations_do_not_repeat_and_follow_the_weights():
    rng = np.random.default_rng(12)
    for scene in scenes("train", 50):
        texts = [q.question for q in questions.conversation(scene, rng, 6)]
        assert len(set(texts)) == len(texts) == 6
        few = questions.conversation(scene, rng, 5, {"count": 3.0, "exist": 1.0, "read": 0.0})
        assert {q.family for q in few} <= {"count", "exist"}


def test_a_record_is_in_the_format_of_llava():
    turns = [("Where?", "top"), ("What?", "red")]
    row = files.record("7", "a.png", turns)
    assert row["image"] == "a.png"
    assert [t["from"] for t in row["conversations"]] == ["human", "gpt"] * 2
    assert [t["value"] for t in row["conversations"]] == ["<image>\nWhere?", "top", "What?", "red"]
    text = files.record("8", None, turns, prefix="a red star.\n")
    assert "image" not in text and text["conversations"][0]["value"] == "a red star.\nWhere?"


def contents(folder):
    """{name: bytes} of every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_world_is_deterministic_complete_and_written_once(tmp_path):
    small = dict(pictures=24, texts=30, test_pictures=6, side=24)
    assert files.write_world(tmp_path / "a", **small) and files.write_world(tmp_path / "b", **small)
    written = contents(tmp_path / "a")
    assert written == contents(tmp_path / "b") and not any(n.endswith(".tmp") for n in written)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert not files.write_world(tmp_path / "a", **small)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert files.write_world(tmp_path / "b", **small, seed=1)
    assert written["text.json"] != contents(tmp_path / "b")["text.json"]


def test_the_files_of_a_world(tmp_path):
    files.write_world(tmp_path, pictures=40, texts=60, test_pictures=6, side=24)
    rows = {p.stem: json.loads(p.read_text()) for p in tmp_path.glob("*.json")}
    assert len(rows["captions"]) == len(rows["instruct"]) == 40 and len(rows["text"]) == 60
    for row in rows["captions"] + rows["instruct"] + rows["validation"] + rows["combination"]:
        with Image.open(tmp_path / "images" / row["image"]) as picture:
            assert max(picture.size) == 24
        assert [("<image>\n" in t["value"]) for t in row["conversations"]].index(True) == 0
    for split in world.SPLITS[1:]:
        assert {r["family"] for r in rows[split]} == {*world.FAMILIES, "caption"}
        assert all(len(r["conversations"]) == 2 and r["template"] for r in rows[split])
        assert len({r["id"] for r in rows[split]}) == len(rows[split])
    turns = [len(r["conversations"]) // 2 for r in rows["instruct"] + rows["text"]]
    assert set(turns) == {1, 5, 6, 7}
    requests = [t["value"].split("\n")[-1] in questions.CAPTION_REQUESTS
                for r in rows["text"] for t in r["conversations"]]
    assert 18 <= sum(requests) <= 42
    trained = json.dumps([rows["captions"], rows["instruct"], rows["text"]])
    assert not HELD_OUT_NAMES.search(trained)
    assert HELD_OUT_NAMES.search(json.dumps(rows["combination"]))
    said = [r["conversations"][1]["value"].rstrip(".") for r in rows["captions"]]
    parts = [set(re.split(", | and (?=a |the )", text)) for text in said]
    assert all(len(b - a) <= 1 for a, b in zip(parts[::2], parts[1::2]))  # an edit of its neighbour
    assert any(len(b - a) > 1 for a, b in zip(parts[1::2], parts[2::2]))


def test_a_long_world_says_what_it_draws_and_how_far_it_is(tmp_path, capsys):
    files.write_world(tmp_path, pictures=8, texts=10, test_pictures=2, side=24)
    line, = capsys.readouterr().err.splitlines()
    assert line == (f"drawing the toy world in {tmp_path}: 8 pictures with conversations, "
                    "10 texts, 3 x 2 test pictures")
    bar = files.progress(range(3), "pictures")
    bar.delay = 0  # else it would show after a second
    assert list(bar) == [0, 1, 2] and bar.total == 3
    assert re.search("pictures: 100%.*3/3", capsys.readouterr().err)
    files.write_world(tmp_path, pictures=8, texts=10, test_pictures=2, side=24)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["world.py", "questions.py", "files.py"])
def test_a_world_is_drawn_anew_when_the_code_that_decides_it_changes(name, monkeypatch):
    before, read = files.code_digest(), pathlib.Path.read_bytes
    monkeypatch.setattr(pathlib.Path, "read_bytes",
                        lambda path: read(path) + b"#" * (path.name == name))
    assert files.code_digest() != before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a small world."""
    out = str(tmp_path_factory.mktemp("run"))
    stage0.make_world(out, 60)
    return out


@pytest.mark.parametrize("part, samples, trained", [("clip", 30, 4), ("llm", 60, None)])
def test_a_stand_in_has_a_loss_over_batches_of_its_data_and_is_written(part, samples, trained, run,
                                                                      tmp_path):
    torch.manual_seed(0)
    model, data, validation, write = stage0.stage_0(part, f"{run}/world", str(tmp_path / "x"), "")
    assert len(data) == len(data.lengths) == len(validation) == samples
    batch = data.batch([3, 1]).to("cpu")
    assert trained in (None, batch.trained) and len(batch.lengths) == len(batch.records)
    loss = model.loss(batch)
    assert loss.shape == () and 0.5 < loss.item() / batch.trained < 10
    if part == "llm":  # a sum over tokens: rows add up
        apart = sum(model.loss(data.batch([i])).item() for i in (3, 1))
        assert apart == pytest.approx(loss.item(), rel=1e-5)
        assert data.sample(3).ids.tolist() == batch.ids[0, :batch.lengths[0]].tolist()
    else:
        assert data.sample is None
    write(dict(model.named_parameters()))
    assert (tmp_path / "x" / "config.json").exists()


def test_a_phrase_competes_only_with_pictures_that_do_not_show_it():
    own = torch.tensor([[True, False], [True, True]])
    assert stand_ins.contrastive_loss(10.0 * own, own) < 1e-3
    # The only foreign pair is picture 0 with phrase 1. One of the three own pairs shares its
    # phrase, one its picture. Both lose by 10; the other pairs compete with nothing.
    loss = stand_ins.contrastive_loss(10.0 * ~own, own)
    assert loss.item() == pytest.approx(10 / 3, abs=1e-3)
