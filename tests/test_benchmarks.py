"""The scorers: the toy's counts, table and gallery, the ways to take the experts away; the
benchmarks' rules, each with a case computed by hand.
"""
import dataclasses
import json
import os
import re
import shlex
import shutil
import zipfile
from xml.etree import ElementTree

import numpy as np
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
from benchmarks import choices, judged, report, vqa, yes_no
from benchmarks.questions import LETTER, LETTER_CN, Question
from benchmarks.tasks import TASKS
from data import encode_prompt
from formats.xlsx import write_xlsx
from tests.benchmark_files import make_eval, png
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


@torch.no_grad()
def test_experts_of_one_part_can_be_off_alone():
    model, batch = trained(visual_expert="both", language_expert="all"), whole_batch()
    embedded, plain = model.embed(batch), static(model)
    assert not torch.equal(plain.embed(batch), embedded)
    with benchmarks.ablation.experts_off(model.llm):
        assert torch.equal(model.embed(batch), embedded)
        assert torch.equal(model.llm(embedded, batch), plain.llm(embedded, batch))


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
    assert benchmarks.toy.majority(ASKED, ASKED[:3]) == ["red"] * 3 + [""] * 2


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
        run, mesh, capsys, monkeypatch):
    monkeypatch.setattr("eval.start_world", lambda device: None)  # `mesh` has started it
    monkeypatch.setenv("RANK", "1")  # left by a cluster
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


# ---- Benchmarks: short answers


@pytest.mark.parametrize("text, normal", [
    ("The dog's ball", "dog 's ball"), ("U.S.A.", "usa"), ("t-shirt", "t shirt"), ("1,000", "1000"),
    ("None", "0"), ("A.", ""), ("12:30 pm", "12:30 pm"), ("dont", "don't"), ("3.5", "3.5"),
    ("red/white", "red white"), ("red / white", "red white"), ("Ten men", "10 men"), ("", ""),
    ("what?!", "what"), ("yall'd've", "y'all'd've"), ("x\ny\tz", "x y z"), ("3. 5", "3 5"),
    ("." * 40 + "a", "." * 8 + "a")])  # only 32 periods are deleted
def test_the_evalai_processor_normalises_as_it_does(text, normal):
    assert vqa.evalai(text) == normal


def test_strict_normalising_deletes_all_periods_but_those_between_digits():
    assert vqa.evalai("." * 40 + "it 3.5.", strict=True) == "it 3.5"
    assert vqa.evalai("4.") == "4" == vqa.evalai("4.", strict=True)
    assert vqa.evalai("a.5") == "a.5" and vqa.evalai("a.5", strict=True) == "a5"


def test_an_annotator_agrees_with_the_other_nine():
    shares = [vqa.agreement("x", ["x"] * n + ["y"] * (10 - n)) for n in range(11)]
    assert shares == pytest.approx([0, 0.3, 0.6, 0.9] + [1] * 7)


def test_vqa_normalises_only_where_annotators_disagree():
    assert vqa.vqa_accuracy("a dog.", ["dog"] * 10) == 0
    assert vqa.vqa_accuracy("a dog.", ["dog"] * 9 + ["cat"]) == 1
    assert vqa.vqa_accuracy(" dog\n", ["dog"] * 10) == 1


def texts_for(questions, answer):
    return [answer(q) for q in questions]


def scored(root, name, answer, strict=False):
    """The Score of a task; answer: function of a question."""
    task = TASKS[name]
    questions = task.read(task, root)
    return task.score(questions, texts_for(questions, answer), root, strict)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with small files of all benchmarks."""
    root = tmp_path_factory.mktemp("eval")
    make_eval(str(root))
    return str(root)


def test_textvqa_is_joined_by_picture_and_question(files):
    assert scored(files, "textvqa", lambda q: "RED").headline() == 100
    assert scored(files, "textvqa", lambda q: "blue").headline() == 100  # 4 of 10
    assert scored(files, "textvqa", lambda q: "blue thing").headline() == 0
    half = scored(files, "textvqa", lambda q: "red" if "Brand 1" in q.prompt else None)
    assert half.headline() == 100 and "9 of 20" in half.notes[0] and len(half.groups[0]) == 11


def test_gqa_and_vqa_are_scored_by_kind(files):
    gqa = scored(files, "gqa", lambda q: "Yes.." if q.id[-1] in "02468" else "the yes")
    assert gqa.headline() == 50 and gqa.details["open"] == 100 and gqa.details["binary"] == 0
    assert scored(files, "gqa", lambda q: "the yes", strict=True).headline() == 100
    task = TASKS["gqa"]
    questions = task.read(task, files)[1:]
    with pytest.raises(cli.UserError, match="1 of its questions are not .* among them 200"):
        task.score(questions, ["yes"] * 19, files, False)
    for name in ("vqav2_val", "vizwiz_val"):  # red 4 of 10, blue and green 3
        assert scored(files, name, lambda q: "Red").headline() == pytest.approx(100)
        assert scored(files, name, lambda q: "a blue!").headline() == pytest.approx(90)


def test_submissions_hold_all_ids_and_normalised_answers(files):
    for name, wanted in (("vqav2", {"question_id": 3, "answer": "2"}),
                         ("vizwiz", {"image": "VizWiz_test_00000003.jpg", "answer": "2"})):
        task = TASKS[name]
        questions = task.read(task, files)
        rows = task.submit[0](questions, ["Two!"] * 20, files)
        assert rows[3] == wanted
    assert vqa.submit_vqav2([], [], files)[-1] == {"question_id": 77, "answer": ""}
    for submit in (vqa.submit_vqav2, vqa.submit_vizwiz):
        with pytest.raises(cli.UserError, match="1 of 20 questions have no answer, the first is 5"):
            submit(questions, ["x"] * 5 + [None] + ["x"] * 14, files)


def test_own_answers_are_normalised_for_the_strict_score_only():
    asked = [Question(n, "", "", None, "", {"question": "Is it?", "answer": answer})
             for n, answer in enumerate(("B", "A dog", "3.5", "A"))]
    texts = ["B.", "dog", "35", ""]
    assert vqa.score_own(asked, texts, "", False).headline() == 0
    assert vqa.score_own(asked, texts, "", True).headline() == 50
    spaced = vqa.score_own(asked, [" B ", "A Dog ", "3.5", "a"], "", False)
    assert spaced.headline() == 50 and spaced.details["ignoring case"] == 100


# ---- Benchmarks: yes or no


@pytest.mark.parametrize("text, pope, mme, hallusion, kind", [
    ("yes", "yes", "yes", "yes", "yes"), ("No", "no", "no", "no", "no"),
    ("NO", "yes", "no", "no", "no"), ("", "yes", None, None, None),
    ("no.", "no", "no", "no", "no"), ("No, it is", "no", "no", "no", "no"),
    ("It is not. Yes", "no", None, "yes", "yes"), ("Yes. no", "yes", "yes", None, "yes"),
    (" a no", "no", None, "no", "no"), ("know", "yes", "no", None, None),
    ("Yes, no doubt", "no", "yes", None, "yes"), ("nothing", "yes", "no", None, None)])
def test_each_tool_reads_yes_and_no_in_its_own_way(text, pope, mme, hallusion, kind):
    assert yes_no.pope_answer(text) == pope and yes_no.mme_answer(text) == mme
    assert yes_no.hallusion_answer(text) == hallusion and yes_no.first_word(text) == kind


def test_pope_is_the_mean_f1_of_its_splits(files):
    truth = scored(files, "pope", lambda q: "yes" if int(q.id) % 2 else "no")
    assert truth.headline() == 100
    always = scored(files, "pope", lambda q: "yes")
    assert always.headline() == pytest.approx(200 / 3) and always.details["random yes"] == 100
    assert always.details["random precision"] == always.details["random accuracy"] == 50
    never = scored(files, "pope", lambda q: "no")
    assert never.headline() == 0 and never.details["popular accuracy"] == 50


def test_pope_pairs_by_order_and_strictly_by_id(files, tmp_path):
    shutil.copytree(os.path.join(files, "pope"), tmp_path / "pope")
    path = tmp_path / "pope/coco/coco_pope_random.json"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))  # one label less: the official tool pairs what follows
    right = {"answer": lambda q: "yes" if int(q.id) % 2 else "no"}
    official = scored(str(tmp_path), "pope", **right)
    assert official.details["random F1"] == 0 and "20 questions, but 19 labels" in official.notes[0]
    path.write_text("".join(reversed(lines)))
    assert scored(str(tmp_path), "pope", **right).details["random F1"] == 0
    assert scored(str(tmp_path), "pope", **right, strict=True).details["random F1"] == 100
    path.write_text(lines[0].replace("000000000000", "000000000009"))
    with pytest.raises(cli.UserError, match="line 21: .*coco_pope_random.json has no question"):
        scored(str(tmp_path), "pope", **right, strict=True)


def test_mme_counts_answers_and_pictures_with_both_right(files):
    perfect = scored(files, "mme", lambda q: "Yes." if "cat" in q.text else "No.")
    assert perfect.headline() == 2000 and perfect.details["cognition"] == 800
    always = scored(files, "mme", lambda q: "yes")
    assert always.headline() == 10 * 50 and always.details["OCR: accuracy+"] == 0
    late = scored(files, "mme", lambda q: "It: yes" if "cat" in q.text else "It: no")
    assert late.headline() == 0  # not within four characters
    task = TASKS["mme"]
    for left in (slice(1, None), slice(-1)):  # what follows must not be paired with another picture
        questions = task.read(task, files)[left]
        with pytest.raises(cli.UserError, match="MME has 1 questions about .*, expected 2"):
            task.score(questions, ["yes"] * len(questions), files, False)
    late = scored(files, "mme", lambda q: "It: yes" if "cat" in q.text else "It: no", strict=True)
    assert late.headline() == 2000


def test_hallusionbench_wants_all_questions_of_a_figure_or_text_right(files):
    perfect = scored(files, "hallusion", lambda q: q.row["answer"] + ".")
    assert perfect.details == {"aAcc": 100, "fAcc": 100, "qAcc": 100}
    # 20 questions with a picture; one figure has 2 of them, a text 3 (VD, and VS with its chart)
    one = scored(files, "hallusion",
                 lambda q: "?" if q.id == "H_VD_chart_0_0_0" else q.row["answer"])
    assert one.details["aAcc"] == 95 and one.details["fAcc"] == pytest.approx(500 / 6)
    assert one.details["qAcc"] == pytest.approx(300 / 4)
    assert one.headline() == pytest.approx(sum(one.details.values()) / 3)


# ---- Benchmarks: multiple choice


@pytest.mark.parametrize("text, scienceqa, infer, kind", [
    ("B", "B", "B", "B"), ("B.", None, "B", "B"), ("B. dog", "B", "B", "B"),
    (" b", None, None, "B"),
    ("(B)", None, "B", "B"), ("B is right", None, "B", None), ("The answer is B.", "B", "B", "B"),
    ("The answer is A. The answer is B.", None, "A", "B"), ("a dog", None, "B", None),
    ("the dog or the cat", None, None, None), ("B and so on and on and on", None, None, None),
    ("A B", None, None, None), ("", None, None, None), ("Z", None, "Z", None),
    ("F", None, None, None),
    ("answer is **b**", None, "B", None)])
def test_each_tool_reads_a_letter_in_its_own_way(text, scienceqa, infer, kind):
    options = {"A": "cat", "B": "dog", "C": "red car"}
    assert choices.scienceqa_letter(text) == scienceqa
    assert choices.infer(text, options) == infer and choices.kind_letter(text, options) == kind


def test_scienceqa_leaves_what_is_not_answered_out_of_the_questions_with_pictures(files):
    truth = lambda q: "AB"[int(q.id) % 2]  # noqa: E731
    assert scored(files, "scienceqa", truth).headline() == 100
    some = scored(files, "scienceqa", lambda q: None if q.id == "1" else truth(q))
    assert some.headline() == 100 and some.details["all"] == 95 and "counted wrong" in some.notes[0]
    wrong = scored(files, "scienceqa", lambda q: "D" if q.id == "1" else truth(q) + ".")
    assert wrong.headline() == 0  # "A." is refused, and D is not an option
    assert scored(files, "scienceqa", lambda q: truth(q) + ".", strict=True).headline() == 100


def test_seed_bench_wants_the_letter_and_nothing_else(files):
    truth = lambda q: "ABCD"[int(str(q.id).strip("v")) % 4]  # noqa: E731
    score = scored(files, "seed", truth)
    assert score.headline() == 100 and score.details.keys() == {"image", "video", "Scene", "Action"}
    dotted = scored(files, "seed", lambda q: truth(q) + "." * (q.id == 1))
    assert dotted.headline() == 95 and dotted.details["video"] == 100
    assert scored(files, "seed", lambda q: f"({truth(q)})", strict=True).headline() == 100


def test_mmbench_wants_all_rotations_right(files):
    right = scored(files, "mmbench", lambda q: q.row["answer"])
    assert right.headline() == 100 and len(right.groups[0]) == 20
    text = scored(files, "mmbench", lambda q: "a " + q.row[q.row["answer"]])
    assert text.headline() == 100  # the text of an option is as good as its letter
    once = scored(files, "mmbench", lambda q: "Z" if q.id == 10**6 + 3 else q.row["answer"])
    assert once.headline() == 95 and once.details["category: y"] == 90
    assert once.details["category: x"] == 100 == once.details["split: dev"] + 5
    # CCBench has no rotations: every row counts
    assert len(scored(files, "ccbench", lambda q: "A").groups[0]) == 30


def test_mmmu_asks_the_validation_split_and_takes_the_answer_of_an_open_question(files):
    score = scored(files, "mmmu", lambda q: q.row["answer"])
    assert score.headline() == 100 and len(score.groups[0]) == 22
    assert score.notes == ["1 questions have several pictures, of which the model reads the first"]
    task = TASKS["mmmu"]
    questions = {q.id: q for q in task.read(task, files)}
    assert questions["validation_Art_8"].image == png(8)
    assert questions["validation_Art_10"].image == png(2)
    open_one = next(q for q in questions.values() if not q.letters)
    assert open_one.text.endswith("\nAnswer the question directly.")
    assert choices.open_as_choice(open_one) == ({"A": "24", "B": "Other Answers"}, "A")


def test_tables_become_prompts_as_in_the_official_scripts(files):
    for name, suffix in (("mmbench", LETTER), ("mmbench_cn", LETTER_CN), ("ccbench", LETTER_CN),
                         ("mmmu", LETTER), ("hallusion", "")):
        task = TASKS[name]
        first = task.read(task, files)[1]
        assert first.text == f"<image>\n{first.prompt}{suffix}" and isinstance(first.image, bytes)
    task = TASKS["mmbench"]
    assert [q.prompt for q in task.read(task, files)[:2]] == [
        "What is 0?\nA. cat\nB. dog\nC. red car", "A hint.\nWhat is 1?\nA. cat\nB. dog\nC. red car"]


def test_the_sheet_for_mmbench_has_the_columns_of_the_server(files, tmp_path):
    task = TASKS["mmbench"]
    questions = task.read(task, files)
    rows = choices.submit_table(questions, ["<B> & \x07"] + ["C"] * 29, files)
    assert rows[0] == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    write_xlsx(tmp_path / "x.xlsx", rows)
    with zipfile.ZipFile(tmp_path / "x.xlsx") as file:
        assert file.testzip() is None and len(file.namelist()) == 5
        for name in file.namelist():
            ElementTree.fromstring(file.read(name))
        sheet = ElementTree.fromstring(file.read("xl/sheet1.xml"))
    cells = [["".join(cell.itertext()) for cell in row] for row in sheet[0]]
    assert cells[0] == rows[0] and len(cells) == 31
    assert cells[1] == ["0", "What is 0?", "cat", "dog", "red car", "none", "<B> & _x0007_", "A",
                        "dev"]


# ---- Benchmarks: judged answers


@pytest.mark.parametrize("text, scores", [
    ("8 7.5\nBecause", [8, 7.5]), ("8, 7", None), ("8,7", [8, 7]), ("8  7", None), ("8", None),
    ("Assistant 1: 8", None), ("x y", None), ("", None)])
def test_a_judgement_begins_with_two_numbers(text, scores):
    assert judged.two_scores(text) == scores


def judge(root, name, path, rows, strict=False):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASKS[name]
    return task.score(task.read(task, root), str(path), root, strict)


def test_llava_bench_is_the_ratio_of_the_means(files, tmp_path):
    rows = [{"question_id": i, "content": "8 6\nGood."} for i in range(20)]
    score = judge(files, "llava_bench", tmp_path / "j", rows)
    assert score.headline() == 75
    assert score.details == dict.fromkeys(("conv", "detail", "complex"), 75)
    rows[3]["content"] = "none"
    official = judge(files, "llava_bench", tmp_path / "j", rows)
    assert official.headline() == pytest.approx(100 * (19 * 6 - 1) / (19 * 8 - 1), abs=0.02)
    assert "line 4: the first line does not hold two numbers" in official.notes[0]
    assert judge(files, "llava_bench", tmp_path / "j", rows, strict=True).headline() == 75


def test_mm_vet_averages_grades_over_questions_runs_and_abilities(files, tmp_path):
    rows = [{"question_id": f"v1_{i}", "content": grade} for i in range(20)
            for grade in ("1.0", "0.5 |" if i % 2 else "1")]
    score = judge(files, "mm_vet", tmp_path / "j", rows)
    assert score.headline() == pytest.approx(87.5)
    assert score.details == {"math": 100, "ocr": 100, "rec": 75, "set: math+ocr": 100,
                             "set: rec": 75}
    for content in ("1.5", "good"):
        rows[6]["content"] = content
        with pytest.raises(cli.UserError, match=r"j line 7: .* a grade from 0 to 1"):
            judge(files, "mm_vet", tmp_path / "j", rows)


def test_requests_have_the_form_of_the_official_scripts(files):
    for name in ("llava_bench", "mm_vet"):
        task = TASKS[name]
        questions = task.read(task, files)
        requests = task.ask(questions, [f"ours {q.id}" for q in questions], files)
        assert len(requests) == 20 and "ours 3" in requests[3]["messages"][-1]["content"]
        if name == "llava_bench":
            assert requests[1]["messages"][1]["content"] == (
                "[Context]\none\ntwo\n\n[Question]\nWhat is 1?\n\n[Assistant 1]\nIt is 1.\n\n"
                "[End of Assistant 1]\n\n[Assistant 2]\nours 1\n\n[End of Assistant 2]\n\n"
                "[System]\nRate.\n\n")
        else:
            assert requests[1]["messages"][0]["content"] == (
                "Grade it.\n\nWhat is 1? | a <AND> b <OR> c | ours 1 | ")


# ---- Benchmarks: intervals


def test_an_interval_holds_the_score_and_narrows_with_the_number_of_questions():
    rng = np.random.default_rng(0)
    spans = []
    for n in (100, 10000):
        score = report.mean_score(rng.random(n) < 0.3)
        low, high = score.interval()
        assert low < score.headline() < high
        spans.append(high - low)
    assert spans[0] == pytest.approx(2 * 1.96 * 100 * (0.3 * 0.7 / 100) ** 0.5, rel=0.15)
    assert spans[1] == pytest.approx(spans[0] / 10, rel=0.2)
    assert report.mean_score([1.0] * 5).interval() == [100, 100]
