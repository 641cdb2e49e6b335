"""eval.py on small files in each benchmark's layout: answers, resuming, ranks, errors."""
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import benchmarks.answering
import benchmarks.questions
import cli
import eval as evaluation
import tests.helpers
import toy.stand_ins
import weights
from benchmarks.answering import encode, likeliest, look, read_answers
from benchmarks.questions import read_own
from benchmarks.tasks import TASKS
from sample import make_batch
from tests.benchmark_files import make_eval, make_own, png, write
from tests.helpers import TOKENIZER

torch.set_num_threads(1)
HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with eval/, mine.json with pictures/, and the checkpoint run/stage2."""
    root = tmp_path_factory.mktemp("root")
    make_eval(str(root / "eval"))
    make_own(str(root))
    small = tests.helpers.LLAMA
    tests.helpers.LLAMA = dataclasses.replace(small, context=320)
    model = tests.helpers.trained(torch.float32, seed=3)
    tests.helpers.LLAMA = small
    state = {name: p.detach() for name, p in model.named_parameters()}
    preprocess = dataclasses.replace(toy.stand_ins.PREPROCESS, size=28)
    weights.save(str(root / "run/stage2"), model.cfg, state, TOKENIZER, preprocess, "",
                 stage=2, sources={}, training={})
    return root


@pytest.fixture
def run(root, mesh, monkeypatch, capsys):
    """Function: run eval.py with options; (exit code, what it printed, what it wrote to stderr)."""
    for name, task in TASKS.items():
        monkeypatch.setitem(TASKS, name, dataclasses.replace(task, tokens=6))
    monkeypatch.setattr("eval.start_world", lambda device: None)  # `mesh` has started it

    def run(*options):
        given = [f"--root={root / 'eval'}", f"--model={root / 'run/stage2'}", "--device=cpu"]
        monkeypatch.setattr("sys.argv", ["eval.py", *given, "--dtype=float32", *options])
        code = 0
        try:
            cli.main(evaluation.run)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()
    return run


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Answers


def test_an_answers_file_has_llavas_form(run, tmp_path):
    code, out, err = run("--task=scienceqa", f"--out={tmp_path}")
    assert code == 0 and "ScienceQA-IMG" in out
    rows = lines(tmp_path / "scienceqa.jsonl")
    assert [row["question_id"] for row in rows] == [str(i) for i in range(20)]
    assert rows[1].keys() == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert rows[1]["prompt"] == (
        "<image>\nContext: c\nWhich is 1?\nA. cat\nB. dog\n"
        "Answer with the option's letter from the given choices directly.")
    assert rows[1]["model_id"] == "stage2" and len({row["answer_id"] for row in rows}) == 20
    assert sorted(os.listdir(tmp_path)) == ["scienceqa.jsonl", "scienceqa.meta.json", "scores.json"]
    kept = json.loads((tmp_path / "scores.json").read_text())
    assert kept.keys() == {"model", "fingerprint", "base", "tasks"}
    one = kept["tasks"]["scienceqa"]
    assert one.keys() == {"score", "n", "metric", "interval", "details", "notes", "seconds",
                          "commit", "options"}


def test_answers_do_not_depend_on_the_batch_and_are_made_once(run, tmp_path, monkeypatch):
    for size in (1, 7):
        assert run("--task=gqa", f"--out={tmp_path / str(size)}", f"--batch_size={size}")[0] == 0
    one, seven = ((tmp_path / size / "gqa.jsonl").read_text() for size in "17")
    assert one == seven and len({row["text"] for row in lines(tmp_path / "1/gqa.jsonl")}) > 3
    monkeypatch.setattr(benchmarks.answering, "reply", None)  # a second run answers nothing
    again = ["--task=gqa", f"--out={tmp_path / '7'}", "--batch_size=7"]
    assert run(*again, "--strict")[0] == 0
    assert "strict" in json.loads((tmp_path / "7/scores.json").read_text())["tasks"]["gqa"]
    code, _, _ = run(*again, "--choose=likelihood")
    assert "holds answers made with --choose generate" in code


def test_a_stopped_run_goes_on_after_its_last_whole_answer(run, tmp_path, monkeypatch):
    assert run("--task=seed", f"--out={tmp_path / 'whole'}", "--batch_size=4")[0] == 0
    real, calls = benchmarks.answering.reply, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(benchmarks.answering, "reply", stopped)
    out = f"--out={tmp_path / 'cut'}"
    assert run("--task=seed", out, "--batch_size=4")[0] == 130
    part = tmp_path / "cut/seed.1of1.jsonl"
    assert len(lines(part)) == 8
    with open(part, "a") as f:
        f.write('{"question_id": ')  # a line that was being written
    assert run("--task=seed", out, "--batch_size=4")[0] == 0
    assert len(calls) == 6  # 2 batches, the stop, and the 3 that were missing
    for name in ("seed.jsonl", "seed.meta.json"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()
    os.rename(tmp_path / "cut/seed.jsonl", tmp_path / "cut/seed.2of4.jsonl")
    assert "begun on another number of ranks" in run("--task=seed", out, "--batch_size=4")[0]


def test_answers_of_another_model_are_refused(run, root, tmp_path):
    assert run("--task=mme", f"--out={tmp_path}")[0] == 0
    other = tmp_path / "other"
    shutil.copytree(root / "run/stage2", other)
    path = other / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, _, _ = run("--task=mme", f"--out={tmp_path}", f"--model={other}")
    assert re.fullmatch(r"error: .*mme.jsonl holds answers of other weights \(.*stage2\): .*", code)


@torch.no_grad()
def test_the_likeliest_option_is_that_of_a_forward_pass_for_each(root):
    checkpoint, tokenizer = weights.load(str(root / "run/stage2"), torch.float32), TOKENIZER
    task = TASKS["mmbench"]
    questions = task.read(task, str(root / "eval"))[:6]
    options = ["ABC", ["a red one", "yes"], ["no", "two of them"], "ABCD", "XYZ", ["three", "A"]]
    assert {len(tokenizer.encode(c)) for some in options for c in some} >= {1, 2, 3}
    samples = [encode(q, checkpoint) for q in questions]
    visual = [look(q, checkpoint) for q in questions]
    chosen = likeliest(checkpoint, samples, visual, options)
    for q, sample, picture, letters, letter in zip(questions, samples, visual, options, chosen):
        totals = []
        for c in letters:
            ids = tokenizer.encode(c)
            more = benchmarks.answering.encode_conversation(
                [(q.text, c)], tokenizer, checkpoint.prompt_format(), "", "x")
            assert more.ids.tolist() == sample.ids.tolist() + ids + [tokenizer.eos]
            batch = make_batch([more], [picture], checkpoint.model)
            logits = checkpoint.model(dataclasses.replace(batch, at=None))[0].log_softmax(-1)
            at = torch.arange(len(sample.ids) - 1, len(sample.ids) + len(ids) - 1)
            totals.append(logits[at, ids].sum().item())
        assert letter == letters[totals.index(max(totals))]
    alone = [likeliest(checkpoint, [s], [v], [o])[0] for s, v, o in zip(samples, visual, options)]
    assert alone == chosen


def test_a_prompt_is_llavas_to_the_token(root):
    checkpoint = weights.load(str(root / "run/stage2"), torch.float32)
    text = " What is it? "  # nothing is stripped, as in LLaVA's scripts
    question = benchmarks.questions.Question(
        0, text, benchmarks.questions.tagged(text, "x"), "x", "line 1", {})
    ids = encode(question, checkpoint).ids.tolist()
    after = TOKENIZER.encode("\n What is it?  ASSISTANT:")
    assert ids[-len(after):] == after and ids[-len(after) - 1] < 0


# ---- Own data, and all tasks


def test_own_data_is_scored_by_turn_case_and_first_word(run, root, tmp_path):
    shutil.copytree(root / "pictures", tmp_path / "p")
    given = [f"--data={root / 'mine.json'}", f"--images={root / 'pictures'}"]
    answers = [{"question_id": f"{i}/{n}", "prompt": "", "text": text}
               for i in range(20) for n, text in enumerate(("a cat", "yes" if i else "no"))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    code, out, _ = run(*given, f"--answers={tmp_path / 'a.jsonl'}")
    one = json.loads((tmp_path / "scores.own.a.json").read_text())["tasks"]["own"]
    assert code == 0 and one["score"] == 47.5 and one["n"] == 40
    assert one["details"] == {"ignoring case": 97.5, "ignoring case, what ...": 100,
                              "ignoring case, is ...": 95}
    assert json.loads((tmp_path / "scores.own.a.json").read_text())["fingerprint"] is None
    assert not (tmp_path / "scores.json").exists()  # that of a model's own answers stays


def test_a_turn_before_that_of_the_picture_does_not_see_it(root, tmp_path):
    turn = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    talk = turn("Hi.", "Hello.") + turn("<image>\nWhat is it?", "A cat.") + turn("Sure?", "Yes.")
    (tmp_path / "d.json").write_text(json.dumps([{"image": "x.png", "conversations": talk}]))
    asked = read_own(str(tmp_path / "d.json"), "images")
    assert [q.image for q in asked] == [None, "images/x.png", "images/x.png"]


def test_answers_to_other_questions_are_refused(run, root, tmp_path):
    for name in ("one", "two"):
        talk = [{"from": "human", "value": f"Is it {name}?"}, {"from": "gpt", "value": "yes"}]
        (tmp_path / f"{name}.json").write_text(json.dumps([{"conversations": talk}]))
    assert run(f"--data={tmp_path / 'one.json'}", f"--out={tmp_path}")[0] == 0
    code = run(f"--data={tmp_path / 'two.json'}", f"--out={tmp_path}")[0]
    assert "two.json" not in code and "holds answers to other questions" in code


def test_answers_go_on_wherever_the_files_are_now(run, root, tmp_path, monkeypatch):
    shutil.copytree(root / "eval/gqa", tmp_path / "eval/gqa")
    given = ["--task=gqa", f"--out={tmp_path / 'out'}"]
    assert run(*given, f"--root={tmp_path / 'eval'}")[0] == 0
    os.rename(tmp_path / "eval", tmp_path / "moved")
    monkeypatch.setattr(benchmarks.answering, "reply", None)  # the second run answers nothing
    assert run(*given, f"--root={tmp_path}/./moved")[0] == 0


def test_answers_about_other_pictures_of_the_same_names_are_refused(run, root, tmp_path):
    for name, more in (("a", b""), ("b", b"...")):
        write(str(tmp_path), f"{name}/0.png", png(0) + more)
    given = [f"--data={root / 'mine.json'}", f"--out={tmp_path / 'out'}"]
    assert run(*given, f"--images={tmp_path / 'a'}")[0] == 0
    assert "holds answers to other questions" in run(*given, f"--images={tmp_path / 'b'}")[0]


def test_judgements_of_other_answers_are_refused(run, tmp_path):
    grades = [{"question_id": f"v1_{i}", "content": "0.5"} for i in range(20)]
    for name in "ab":  # both files have the name of the task
        write(str(tmp_path), f"{name}/mm_vet.jsonl", [
            {"question_id": i, "prompt": f"What is {i}?", "text": name} for i in range(20)])
    given = ["--task=mm_vet", f"--out={tmp_path / 'out'}"]
    a, b = (f"--answers={tmp_path / name}/mm_vet.jsonl" for name in "ab")
    assert "send mm_vet.requests.jsonl" in run(*given, a)[1]
    write(str(tmp_path), "out/mm_vet.judgements.jsonl", grades)
    assert run(*given, a)[0] == 0
    assert "mm_vet.judgements.jsonl is about other answers: remove it" in run(*given, b)[0]
    write(str(tmp_path), "b/mm_vet.judgements.jsonl", grades)  # from elsewhere, without requests
    code, out, _ = run("--task=mm_vet", b)
    assert code == 0 and re.search(r"MM-Vet +mean grade +50.0", out)


def test_each_file_of_answers_has_requests_judgements_and_scores_of_its_own(run, tmp_path):
    for name in ("a", "profile"):
        write(str(tmp_path), f"{name}.jsonl", [
            {"question_id": i, "prompt": f"What is {i}?", "text": name} for i in range(20)])
        code, out, _ = run("--task=mm_vet", f"--answers={tmp_path / name}.jsonl")
        assert code == 0 and f"mm_vet: send mm_vet.{name}.requests.jsonl in" in out
        if name == "a":
            write(str(tmp_path), "mm_vet.a.judgements.jsonl",
                  [{"question_id": f"v1_{i}", "content": "0.5"} for i in range(20)])
            code, out, _ = run("--task=mm_vet", f"--answers={tmp_path / name}.jsonl")
            assert code == 0 and re.search(r"MM-Vet +mean grade +50.0", out)
    kept = [json.loads((tmp_path / f"scores.mm_vet.{name}.json").read_text())
            for name in ("a", "profile")]
    assert [one["tasks"]["mm_vet"]["score"] for one in kept] == [50, None]
    assert run("--task=mm_vet", f"--out={tmp_path}")[0] == 0  # "profile" holds no part of a rank's


@pytest.mark.parametrize("size", [1, 4, 20])
def test_with_likelihood_every_question_with_letters_gets_one_of_them(run, root, tmp_path, size):
    code, _, _ = run("--task=mmmu", "--choose=likelihood", f"--batch_size={size}",
                     f"--out={tmp_path}")
    assert code == 0
    letters = {q.id: q.letters for q in TASKS["mmmu"].read(TASKS["mmmu"], str(root / "eval"))}
    assert sorted({bool(some) for some in letters.values()}) == [False, True]
    for row in lines(tmp_path / "mmmu.jsonl"):
        some = letters[row["question_id"]]
        assert not some or row["text"] in tuple(some)


def test_the_longest_conversations_come_first():
    turn = lambda n: ("x" * n, "y" * n)
    asked = [benchmarks.questions.Question(n, "", "z", None, "", {}, turns=[turn(n)] * bool(n))
             for n in (3, 0, 9)]
    found = benchmarks.answering.share(asked, 2, 0, 1)
    assert [q.id for q in found] == [9, 3, 0]


def test_list_names_what_each_task_needs(capsys, monkeypatch):
    monkeypatch.setattr("eval.start_world", lambda device: None)
    monkeypatch.setattr("sys.argv", ["eval.py", "--list"])
    cli.main(evaluation.run)
    text = capsys.readouterr().out
    for name, task in TASKS.items():
        assert re.search(rf"^{name} +{re.escape(task.title)}; ", text, re.MULTILINE)
        assert all(path in text for path in (task.questions, *task.needs, task.source))


def test_all_runs_what_is_there_and_says_what_is_not(run, root, tmp_path):
    for folder in ("pope", "gqa", "mm-vet"):
        shutil.copytree(root / "eval" / folder, tmp_path / "eval" / folder)
    shutil.rmtree(tmp_path / "eval/gqa/data/images")
    options = ["--task=all", f"--root={tmp_path / 'eval'}", f"--out={tmp_path / 'out'}"]
    code, out, err = run(*options)
    assert code.startswith("error: 1 tasks failed. gqa: 20 of 20 pictures are not there, the first "
                           "is ") and "n0.jpg" in code
    assert "POPE" in out and "mm_vet: send mm_vet.requests.jsonl" in out
    assert f"vqav2: not there: {tmp_path / 'eval'}/vqav2/llava_vqav2" in err
    write(str(tmp_path), "out/mm_vet.judgements.jsonl",
          [{"question_id": f"v1_{i}", "content": "0.5"} for i in range(20)])
    code, out, _ = run(*options[:-1], f"--out={tmp_path / 'out'}", "--task=mm_vet")
    assert code == 0 and re.search(r"MM-Vet +mean grade +50.0  50.0 to 50.0", out)
    kept = json.loads((tmp_path / "out/scores.json").read_text())["tasks"]
    assert kept.keys() == {"pope", "mm_vet"}  # those of the run before stay


# ---- Errors


@pytest.mark.parametrize("task, file, old, new, message", [
    ("pope", "pope/llava_pope_test.jsonl", '"adversarial"', '"default"',
     r"llava_pope_test.jsonl line 1: not a question of POPE"),
    ("vizwiz", "vizwiz/llava_test.jsonl", "Unanswerable", "x", r"line 1: not a question of VizWiz"),
    ("mme", "MME/llava_mme.jsonl", '"question_id": "count', '"question_id": "color',
     r"llava_mme.jsonl line 3: not a question of MME"),
    ("seed", "seed_bench/llava-seed-bench.jsonl", "{", "[", r"line 1: not JSON"),
    ("mmbench", "mmbench/mmbench_dev_20230712.tsv", "answer", "Answer",
     r"mmbench_dev_20230712.tsv line 1: lacks the column answer"),
    ("ccbench", "CCBench.tsv", "iVBOR", "?VBOR", r"CCBench.tsv line 2: `image` is not base64"),
    ("ccbench", "CCBench.tsv", "\tdev\n", "\n", r"CCBench.tsv line 2: expected 14 columns"),
    ("scienceqa", "scienceqa/llava_test_CQM-A.json", '"gpt"', '"bot"',
     r"record 0 \(id 0\): message 1"),
    ("gqa", "gqa/data/questions1.2/testdev_balanced_questions.json", '"201"', '"x"',
     r"llava_gqa_testdev_balanced.jsonl line 2: .*_questions.json has nothing about 201"),
    ("textvqa", "textvqa/TextVQA_0.5.1_val.json", "brand 3", "x",
     r"line 4: .*val.json has nothing about .*"),
    ("textvqa", "textvqa/TextVQA_0.5.1_val.json", "data", "x", r"val.json: lacks 'data'.*"),
    ("vqav2", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", '"question_id": 3', '"question_id": 2',
     r"line 4: the same id as .* line 3, 2"),
    ("mme", "MME/llava_mme.jsonl", "a dog", "a cat", r"line 2: the same id as .* line 1, .*"),
    ("mme", "MME/MME_Benchmark_release_version/existence/questions_answers_YN/0000.txt",
     "\tYes", " Yes", r"0000.txt line 1: expected a question, a tab, and Yes or No"),
    ("pope", "pope/coco/coco_pope_random.json", None, "", r"coco_pope_random.json: file not found"),
    ("pope", "pope/coco/coco_pope_random.json", '"label"', '"x"', "line 1: lacks 'label': is it"),
    ("textvqa", "textvqa/TextVQA_0.5.1_val.json", '"answers"', '"x"',
     "TextVQA_0.5.1_val.json: record 0 of 'data': lacks 'answers'"),
    ("seed", "seed_bench/SEED-Bench.json", '"data_type"', '"x"',
     "SEED-Bench.json: record 0 of 'questions': lacks 'data_type'"),
    ("scienceqa", "scienceqa/problems.json", '"choices"', '"x"', "json: 0: lacks 'choices'"),
    ("gqa", "gqa/data/questions1.2/testdev_balanced_questions.json", '"answer"', '"x"',
     "_questions.json: 200: lacks 'answer'"),
    ("vqav2_val", "vqav2/v2_mscoco_val2014_annotations.json", '"answers"', '"x"',
     "annotations.json: record 0 of 'annotations': lacks 'answers'"),
    ("vqav2_val", "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", '"questions"', '"x"',
     "questions.json: lacks 'questions': is it the right file"),
    ("vizwiz_val", "vizwiz/val.json", '"question"', '"x"', "val.json record 0: lacks 'question'"),
    ("mmmu", "MMMU_DEV_VAL.tsv", None, "", r"MMMU_DEV_VAL.tsv: file not found"),
])
def test_a_bad_file_ends_in_one_line(run, root, tmp_path, task, file, old, new, message):
    given, top = tmp_path / "eval", file.split("/")[0]
    given.mkdir()
    (shutil.copytree if "/" in file else shutil.copy)(root / "eval" / top, given / top)
    path = given / file
    if old is None:
        path.unlink()
    else:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    questions = TASKS[task].read(TASKS[task], str(root / "eval"))
    write(str(tmp_path), "a.jsonl",
          [{"question_id": q.id, "prompt": q.prompt, "text": "x"} for q in questions])
    code, _, _ = run(f"--task={task}", f"--root={given}", f"--answers={tmp_path / 'a.jsonl'}")
    assert re.fullmatch(f"error: .*{message}.*", code), code


def test_a_bad_answers_file_names_the_line(root, tmp_path):
    task = TASKS["pope"]
    questions = task.read(task, str(root / "eval"))
    rows = [json.dumps({"question_id": q.id, "prompt": q.prompt, "text": "x"}) for q in questions]
    for bad, message in ((rows[0], "line 2: a second answer to 1"),
                         (rows[1][:-20], "line 2: not JSON"),
                         ('{"question_id": 99, "text": "x"}', "line 2: .* does not have, 99"),
                         ('{"question_id": 2}', "line 2: expected")):
        (tmp_path / "a").write_text("\n".join([rows[0], bad]))
        with pytest.raises(cli.UserError, match=f"a {message}"):
            read_answers(str(tmp_path / "a"), questions)
    (tmp_path / "a").write_text("\n".join(rows[:-1]))
    texts = read_answers(str(tmp_path / "a"), questions)
    assert texts == ["x"] * 59 + [None]
    with pytest.raises(cli.UserError, match="1 of 60 questions have no answer.* 20000020"):
        task.score(questions, texts, str(root / "eval"), False)


def test_empty_files_are_no_scores(run, root, tmp_path):
    shutil.copytree(root / "eval", tmp_path / "eval")
    write(str(tmp_path), "none.jsonl", "")
    given = [f"--root={tmp_path / 'eval'}", f"--answers={tmp_path / 'none.jsonl'}"]
    assert "no question has an answer" in run("--task=textvqa", *given)[0]
    assert "20 of 20 questions have no answer" in run("--task=vqav2", *given)[0]
    assert not (tmp_path / "vqav2.none.submission.json").exists()
    write(str(tmp_path), "eval/textvqa/llava_textvqa_val_v051_ocr.jsonl", "")
    assert "val_v051_ocr.jsonl: no questions of TextVQA" in run("--task=textvqa", *given)[0]
    write(str(tmp_path), "eval/pope/coco/coco_pope_random.json", "")
    rows = [{"question_id": q.id, "prompt": q.prompt, "text": "yes"}
            for q in TASKS["pope"].read(TASKS["pope"], str(root / "eval"))]
    write(str(tmp_path), "none.jsonl", rows)
    assert "POPE's split random has 20 questions, and 0 labels" in run("--task=pope", *given)[0]


def test_the_scores_of_tasks_that_are_done_outlive_an_error(run, root, tmp_path, monkeypatch):
    for folder in ("pope", "gqa"):
        shutil.copytree(root / "eval" / folder, tmp_path / "eval" / folder)
    monkeypatch.setitem(TASKS, "pope", dataclasses.replace(TASKS["pope"], score=lambda *_: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        run("--task=all", f"--root={tmp_path / 'eval'}", f"--out={tmp_path / 'out'}")
    assert json.loads((tmp_path / "out/scores.json").read_text())["tasks"].keys() == {"gqa"}


def test_options_that_do_not_fit_are_refused(run, root):
    for options, message in ((["--task=pope", "--root=nowhere"], "nowhere: there is no such"),
                             (["--batch_size=0"], "--batch_size 0: expected at least 1"),
                             (["--task=all", "--answers=x"], "--answers is the file of one task"),
                             (["--task=gqa", "--data=x"], "--data goes without --task"),
                             (["--images=x"], "--images is the folder of your own pictures"),
                             (["--task=toy", "--strict"],
                              "--strict, --choose, --device and --dtype are for bench"),
                             (["--task=all", f"--root={root / 'run'}"], "holds no benchmark")):
        assert message in run(*options)[0]


# ---- Ranks, and every task from end to end


@pytest.mark.slow
def test_every_task_runs_on_two_ranks_as_on_one(run, root, tmp_path):
    code, out, _ = run("--task=all", f"--out={tmp_path / 'one'}", "--strict")
    assert code == 0 and len(re.findall(r"^\S.* \d+\.\d  \d", out, re.MULTILINE)) == 13
    script = ("import dataclasses, eval, training.distributed\n"
              "from benchmarks.tasks import TASKS\n"
              "for name, task in TASKS.items(): TASKS[name] = dataclasses.replace(task, tokens=6)\n"
              "training.distributed.main_distributed(eval.run)")
    path = tmp_path / "two.py"
    path.write_text(script)
    env = {**os.environ, "PYTHONPATH": HERE, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         str(path), "--task=all", f"--root={root / 'eval'}", f"--out={tmp_path / 'two'}", "--dtype=float32",
         f"--model={root / 'run/stage2'}", "--device=cpu", "--strict"],
        capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    names = sorted(os.listdir(tmp_path / "one"))
    assert sorted(os.listdir(tmp_path / "two")) == names and len(names) == 2 * 17 + 8
    for name in names:
        if name != "scores.json" and not name.endswith("xlsx"):
            assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    one, two = (json.loads((tmp_path / n / "scores.json").read_text())["tasks"]
                for n in ("one", "two"))
    for name in one:
        assert one[name].pop("options")["out"] != two[name].pop("options")["out"]
        assert {**one[name], "seconds": 0} == {**two[name], "seconds": 0}


def test_the_model_is_made_ready_for_answers_once(run, tmp_path, monkeypatch):
    ready, real = [], evaluation.evaluate.__globals__["ready_for_answers"]
    monkeypatch.setitem(evaluation.evaluate.__globals__, "ready_for_answers",
                        lambda model: ready.append(model) or real(model))
    assert run("--task=scienceqa", f"--out={tmp_path}")[0] == 0
    assert len(ready) == 1
