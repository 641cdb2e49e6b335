"""The scorers: the toy's counts, table and gallery, and the ways to take the experts away."""
import dataclasses
import json
import re
import shlex

import pytest
import torch
from PIL import Image

import benchmarks.ablation
import benchmarks.toy
import cli
import eval as evaluation
import sample
import toy.stage0
import toy.stand_ins
import toy.world
import weights
from data import encode_prompt
from tests.helpers import (batch_of, close, LAYOUT, logits_of, pictures, static, TOKENIZER, trained,
    TURNS, whole_batch)

torch.set_num_threads(1)


# ---- Experts off and swapped


places = pytest.mark.parametrize("visual, language", [
    ("both", "none"), ("none", "posterior"), ("both", "all")])


@places
@torch.no_grad()
def test_without_experts_the_logits_are_exactly_llavas_and_afterwards_all_is_as_before(
        visual, language):
    model, batch = trained(visual_expert=visual, language_expert=language), whole_batch()
    before, state = logits_of(model, batch), {n: p.clone() for n, p in model.state_dict().items()}
    with benchmarks.ablation.experts_off(model):
        assert torch.equal(logits_of(model, batch), logits_of(static(model), batch))
    after = model.state_dict()
    assert after.keys() == state.keys() and all(torch.equal(after[n], state[n]) for n in state)
    assert torch.equal(logits_of(model, batch), before)
    assert not close(before, logits_of(static(model), batch), 1e-2)


@places
@torch.no_grad()
def test_with_swapped_experts_a_row_runs_with_the_weights_made_for_another(visual, language):
    model = trained(visual_expert=visual, language_expert=language)
    asked = [encode_prompt([], q, TOKENIZER, LAYOUT, n)
             for q, n in ((TURNS[0][0], "a"), ("How many?", "b"))]
    batch = batch_of(asked, pictures(2))
    before = logits_of(model, batch)
    with benchmarks.ablation.experts_swapped(model):
        swapped = logits_of(model, batch)
        twins = logits_of(model, batch_of(asked[:1] * 2, pictures(1) * 2))
    alone = logits_of(model, batch_of(asked[:1], pictures(1)))
    for row, n in enumerate(batch.lengths):
        assert not close(swapped[row, n - 1], before[row, n - 1], 1e-3)
    assert close(twins[:1], alone)  # weights made for the same input are the same weights
    assert torch.equal(logits_of(model, batch), before)
    assert not any(part._forward_pre_hooks for part in model.modules())


# ---- Scores


def question(family, template, answer, image):
    return benchmarks.toy.PictureQuestion(family, template, f"<image>\n{template}", answer, image)


ASKED = [question("colour", "What colour is the {shape}?", "red", "1.png"),
         question("colour", "What colour is the {shape}?", "blue", "1.png"),
         question("colour", "What colour is the {shape}?", "red", "2.png"),
         question("count", "How many {shapes} are there?", "two", "2.png"),
         question("count", "How many things are there?", "three", "3.png")]


def test_scores_are_the_mean_over_families_of_exact_matches():
    scores = benchmarks.toy.exact(ASKED, ["red", "red", "red", "two", "Three"])
    assert scores["n"] == 5 and scores["families"] == {"colour": pytest.approx(2 / 3), "count": 0.5}
    assert scores["mean"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert benchmarks.toy.exact(ASKED, [q.answer for q in ASKED])["mean"] == 1


def test_the_majority_answer_is_the_commonest_of_a_template():
    assert benchmarks.toy.majority(ASKED, ASKED) == ["red", "red", "red", "two", "three"]
    other = [dataclasses.replace(q, answer="blue") for q in ASKED]
    # Counted over the second list, not over the questions that are answered
    assert benchmarks.toy.majority(ASKED, other) == ["blue"] * 5


def test_exchanged_questions_are_the_same_questions_about_the_next_picture():
    other = benchmarks.toy.exchanged(ASKED)
    assert [q.image for q in other] == ["2.png", "2.png", "3.png", "3.png", "1.png"]
    assert [dataclasses.replace(q, image=was.image) for q, was in zip(other, ASKED)] == ASKED


def test_f1_counts_the_things_that_captions_name_with_their_number():
    two = "a large red circle on the left and a large red circle on the right"
    asked = [question("caption", "c", two, "1.png"),
             question("caption", "c", "a small blue ring", "2.png")]
    assert benchmarks.toy.object_f1(asked, [q.answer for q in asked]) == 1
    captions = ["one large red circle", "a small blue star and a small blue ring"]
    f1 = benchmarks.toy.object_f1(asked, captions)  # precision and recall are 2 of 3
    assert f1 == pytest.approx(2 / 3)
    f1 = benchmarks.toy.object_f1(asked, ["a large red circle"] * 2)
    assert f1 == pytest.approx(2 * 1 / (2 + 3))
    assert benchmarks.toy.object_f1(asked, ["", "nothing"]) == 0


# ---- The whole benchmark


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with a small world and a random checkpoint."""
    out = tmp_path_factory.mktemp("run")
    toy.stage0.make_world(str(out), 12)
    model = trained(torch.float32, seed=3)
    state = {name: p.detach() for name, p in model.named_parameters()}
    preprocess = dataclasses.replace(toy.stand_ins.PREPROCESS, size=28)
    weights.save(str(out / "stage2"), model.cfg, state, TOKENIZER, preprocess, "",
                 stage=2, sources={}, training={})
    return out


def printed_rows(text):
    """{name of a row of the table: its numbers}."""
    rows = (re.match(r"(\S+(?: \S+)*?) {2,}([\d. nan]+)$", line) for line in text.splitlines())
    return {row[1]: row[2].split() for row in rows if row}


def test_a_score_ends_with_a_table_of_100_columns_the_files_and_a_command_that_works(
        run, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["eval.py", f"--model={run / 'stage2'}"])
    cli.main(evaluation.run)
    out = capsys.readouterr().out
    scores, table = json.loads((run / "scores.json").read_text()), out.split("\n\n")[0]
    assert max(map(len, table.splitlines())) <= 100
    assert {*scores["splits"]} == {*benchmarks.toy.ROWS}
    rows = printed_rows(table)
    assert [*rows] == [
        "held-out pictures", "unseen colour-shape pairs", "pictures exchanged", "constant answer",
        "experts off", "experts swapped"]
    for key, row in scores["splits"].items():
        numbers = rows[benchmarks.toy.ROWS[key]]
        assert numbers[-2:] == [f"{100 * row['mean']:.1f}", str(row["n"])] and len(numbers) == 10
    for path in (run / "scores.json", run / "gallery.png", run / "stage2"):
        assert str(path) in out and path.exists()
    command = out.split("try ")[1].replace("\\\n", " ")
    words = shlex.split(command)
    assert words[:2] == ["python", "sample.py"]
    monkeypatch.setattr("sys.argv", [*words[1:], "--max_new_tokens=3", "--device=cpu"])
    cli.main(sample.run)


def test_full_scores_fit_the_table():
    families = dict.fromkeys(toy.world.FAMILIES, 1.0)
    splits = {key: {"n": 9999, "mean": 1.0, "families": families} for key in benchmarks.toy.ROWS}
    table = benchmarks.toy.table({"splits": splits, "captions": {"object_f1": 1}, "seconds": 1e5})
    assert max(map(len, table.splitlines())) <= 100


def test_the_gallery_shows_pictures_with_three_questions_each(run, tmp_path):
    questions = benchmarks.toy.load_questions(str(run / "world"), "heldout")
    answers = [q.answer if i % 2 else "?" for i, q in enumerate(questions)]
    benchmarks.toy.gallery(questions, answers, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as sheet:
        side = 4 * toy.stand_ins.VISION.image_size
        assert sheet.height == 3 * (side + 125) and sheet.width >= 4 * (side + 30)
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(2 ** 24)}
    assert {(0, 128, 0), (255, 0, 0)} <= colours  # green and red


def test_each_picture_goes_through_the_tower_once(run):
    checkpoint = weights.load(str(run / "stage2"))
    answerer, seen = benchmarks.toy.Answerer(checkpoint, max_new_tokens=2), []
    checkpoint.model.vision.register_forward_hook(lambda part, inputs, out: seen.append(len(out)))
    questions = benchmarks.toy.load_questions(str(run / "world"), "heldout")[:12]
    first = answerer(questions, "first")
    assert answerer(questions, "again") == first and len(first) == 12
    assert seen == [1] * len({q.image for q in questions})


def test_the_question_to_try_is_about_a_shape_and_answered_rightly():
    asked = [*ASKED, question("shape", "What shape is the {colour} thing?", "ring", "4.png")]
    right = [q.answer for q in asked]
    assert benchmarks.toy.example(asked, right) == asked[-1]
    assert benchmarks.toy.example(asked, ["?", *right[1:-1], "?"]) == asked[1]
    assert benchmarks.toy.example(asked, ["?"] * 6) == asked[-1]
