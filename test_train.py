"""Training: what each stage moves, that a run is a function of its options, and that it says what went wrong."""
import json
import os
import subprocess
import sys

import pytest
import torch

import train
import weights
import world
from cli import UserError

TINY = {"batch_size": 4, "steps": 4, "dtype": "float32", "log_every": 1000, "muon_lr": 4e-3, "val_every": 2}
HERE = os.path.dirname(os.path.abspath(__file__))


@pytest.fixture(scope="session")
def mesh():
    return train.start_world("cpu")


@pytest.fixture(scope="session")
def run(tmp_path_factory, mesh):
    """A folder with a tiny world and stages 0 and 1, hardly trained."""
    out = str(tmp_path_factory.mktemp("toy"))
    world.write_world(os.path.join(out, "world"), pictures=40, texts=40, test_pictures=6)
    for stage in (0, 1):
        train.run_stage({"out": out, **TINY}, stage, mesh)
    return out


def log_of(out, stage):
    return [json.loads(line) for line in open(os.path.join(out, f"stage{stage}", "log.jsonl"))]


def trained(given, stage, mesh):
    """(tensors before, tensors after) of a stage run on `given`, without writing its checkpoint."""
    o = train.complete(given, stage)
    os.makedirs(train.stage_folder(o), exist_ok=True)
    job = train.stage_0(o) if stage == 0 else train.stage_1_or_2(o)
    before = {n: p.detach().clone() for n, p in job.model.named_parameters()}
    after = {}
    job.finish = after.update
    train.train(job, o, mesh)
    return before, after


@pytest.mark.parametrize("stage, tune, moves", [
    (1, "full", ("projector.",)),
    (2, "full", ("projector.", "llm.")),
    (2, "peft", ("projector.", "llm.hypernet.", "llm.guidance_norm.", *(f"llm.layers.{n}.expert." for n in (2, 3)))),
])
def test_a_stage_moves_exactly_the_tensors_it_names(run, mesh, tmp_path, stage, tune, moves):
    given = {"out": str(tmp_path), "tune": tune, **TINY}
    given |= {"data": f"{run}/world/{'captions' if stage == 1 else 'instruct'}.json", "images": f"{run}/world/images",
              "val": f"{run}/world/validation.json", "vision": f"{run}/stage0/clip", "llm": f"{run}/stage0/llm"}
    given |= {"val": f"{run}/world/validation_captions.json"} if stage == 1 else {"init": f"{run}/stage1"}
    before, after = trained(given, stage, mesh)
    assert before.keys() == after.keys()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.startswith(moves)}


def test_stage_1_keeps_only_the_projector_and_names_its_sources(run):
    config = json.load(open(f"{run}/stage1/config.json"))
    names = {name for name, _, _ in weights.tensors(f"{run}/stage1")}
    assert names and all(name.startswith("projector.") for name in names)
    assert config["sources"]["llm"]["path"] == "../stage0/llm" and config["training"]["stage"] == 1
    loaded = weights.load(f"{run}/stage1")
    llm = {name: tensor for name, tensor, _ in weights.tensors(f"{run}/stage0/llm")}
    assert torch.equal(loaded.model.llm.embed_tokens.weight, llm["model.embed_tokens.weight"])


def test_the_log_has_a_line_a_step_with_the_held_out_loss_now_and_then(run):
    rows = log_of(run, 1)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert all(row.keys() >= {"loss", "lr", "grad_norm", "tokens_per_s"} for row in rows)
    assert [("held_out" in row) for row in rows] == [False, True, False, True]


def test_the_log_of_stage_2_tells_the_share_of_the_experts(run, mesh, tmp_path):
    trained(stage_2(run, tmp_path), 2, mesh)
    shares = [row["expert_share"] for row in log_of(tmp_path, 2) if "expert_share" in row]
    assert len(shares) == 2 and 0 < shares[0] < shares[1] < 1  # W_u starts at zero and grows


def stage_2(run, out, **more):
    return {"out": str(out), "init": f"{run}/stage1", "data": f"{run}/world/instruct.json",
            "val": f"{run}/world/validation.json", "images": f"{run}/world/images", **TINY, **more}


def test_accumulation_leaves_the_run_as_it_is(run, mesh, tmp_path):
    losses = []
    for micro in (4, 1):
        trained(stage_2(run, tmp_path / str(micro), micro_batch_size=micro), 2, mesh)
        losses.append([(row["loss"], row["grad_norm"]) for row in log_of(tmp_path / str(micro), 2)])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_that_was_stopped_and_resumed_is_the_unbroken_run(run, mesh, tmp_path, monkeypatch, stage):
    def given(name):
        return stage_2(run, tmp_path / name, steps=6, save_every=2, val_every=100) | (
            {} if stage == 2 else {"data": f"{run}/world/captions.json", "vision": f"{run}/stage0/clip", "llm": f"{run}/stage0/llm",
                                   "val": f"{run}/world/validation_captions.json"})

    def stopping(*args, step=train.train_step, count=[0]):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return step(*args)

    for name in ("whole", "broken"):
        os.makedirs(tmp_path / name, exist_ok=True)
        os.symlink(f"{run}/world", tmp_path / name / "world")
    train.run_stage(given("whole"), stage, mesh)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopping)
        train.run_stage(given("broken"), stage, mesh)
    assert len(log_of(tmp_path / "broken", stage)) == 5 and not train.finished(str(tmp_path / "broken"), stage)
    train.run_stage(given("broken") | {"resume": True}, stage, mesh)

    whole, broken = (log_of(tmp_path / name, stage) for name in ("whole", "broken"))
    assert [(r["step"], r["loss"], r["grad_norm"]) for r in whole] == [(r["step"], r["loss"], r["grad_norm"]) for r in broken]
    folder = "stage0/llm" if stage == 0 else f"stage{stage}"
    files = [open(tmp_path / name / folder / "model.safetensors", "rb").read() for name in ("whole", "broken")]
    assert files[0] == files[1]
    assert not os.path.exists(tmp_path / "broken" / f"stage{stage}" / "state")


def test_a_new_state_replaces_whatever_an_older_run_left(run, mesh, tmp_path):
    states = tmp_path / "stage2" / "state"
    for name in ("step_000900", "step_000950.tmp"):
        os.makedirs(states / name)
    seen = []
    def look(*args, save=train.save_state):
        save(*args)
        seen.append(os.listdir(states))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_state", look)
        trained(stage_2(run, tmp_path, save_every=1, steps=3), 2, mesh)
    assert seen == [["step_000001"], ["step_000002"]]


def test_two_batches_are_learnt_by_heart(run, mesh, tmp_path):
    trained(stage_2(run, tmp_path, steps=60, batch_size=20), 2, mesh)  # 40 conversations
    losses = [row["loss"] for row in log_of(tmp_path, 2)]
    assert losses[0] > 3 and max(losses[-2:]) < 0.7


def test_a_loss_that_is_no_number_stops_the_run_before_the_update(run, mesh, tmp_path):
    o = train.complete(stage_2(run, tmp_path), 2)
    os.makedirs(train.stage_folder(o))
    job = train.stage_1_or_2(o)
    job.loss = lambda model, batch: train.vlm_loss(model, batch) * float("nan")
    with pytest.raises(UserError, match=r"step 0: loss nan.*record \d+ \(id train_"):
        train.train(job, o, mesh)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_learning_rate_rises_once_and_falls_to_nothing(schedule):
    o = train.Options(steps=1000, schedule=schedule, warmup=0.03)
    rates = [train.schedule(step, o) for step in range(1000)]
    assert rates[30] == max(rates) == 1 and all(a < b for a, b in zip(rates[:29], rates[1:30]))
    assert all(a >= b for a, b in zip(rates[30:], rates[31:])) and rates[-1] < 0.003
    assert rates[0] == (0 if schedule == "cosine" else 1 / 30)


def test_muon_makes_the_update_of_each_matrix_orthogonal():
    torch.manual_seed(0)
    wide, tall = torch.nn.Parameter(torch.randn(8, 32)), torch.nn.Parameter(torch.randn(32, 8))
    before = [p.detach().clone() for p in (wide, tall)]
    opt = train.Muon([wide, tall], lr=0.1)
    (wide.sum() + (wide * torch.randn(8, 32)).sum() + (tall * torch.randn(32, 8)).sum()).backward()
    opt.step()
    for p, old, scale in zip((wide, tall), before, (1, 2)):
        values = torch.linalg.svdvals((old - p.detach()) / (0.1 * scale))
        assert values.min() > 0.6 and values.max() < 1.3


def call(program, *words, **more):
    return subprocess.run([sys.executable, os.path.join(HERE, program), *map(str, words)], capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


def test_mistakes_on_the_command_line_end_in_one_line(run, tmp_path, monkeypatch, capsys):
    for words, expected in [
        (["--stag", "1"], "did you mean --stage?"),
        (["--steps", "many"], "--steps many: expected int"),
        (["--stage", "1", "--out", run], "is finished: --overwrite"),
        (["--stage", "2", "--out", str(tmp_path), "--preset", "7b"], "run --stage 1 first"),
        (["--stage", "1", "--out", str(tmp_path), "--preset", "7b"], "needs --vision, --llm, --data, --images"),
        (["--stage", "0", "--preset", "7b"], "expected 1 or 2"),
        (["--stage", "3"], "expected 1 or 2"),
        (["--steps", "0"], "--steps 0: expected more than 0"),
        (["--overwrite"], "--overwrite goes with --stage"),
        (["--stage", "2", "--out", str(tmp_path)], "run --stage 1 first"),
        (["--stage", "1", "--out", run, "--overwrite", "--batch_size", "9", "--micro_batch_size", "2", "--pictures", "40"],
         "batch_size 9 is not a multiple"),
        (["--stage", "1", "--out", run, "--overwrite", "--resume", "--pictures", "40"], "--resume: no saved state"),
        (["--preset", "9b"], "expected one of toy, 7b, 13b"),
    ]:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        monkeypatch.setattr(train, "start_world", lambda device: train.init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match=expected):
            train.run()


@pytest.mark.slow
def test_the_main_job_runs_from_nothing_to_scores(tmp_path):
    words = ("--pictures", 60, "--steps", 4, "--batch_size", 8, "--out", tmp_path)
    done = call("train.py", *words)
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.load(open(tmp_path / "scores.json"))
    assert scores["splits"].keys() == {"heldout", "combination", "shuffled", "majority", "experts_off", "experts_swapped"}
    assert set(scores["splits"]["heldout"]["families"]) == set(world.FAMILIES) and (tmp_path / "gallery.png").exists()
    before = os.path.getmtime(tmp_path / "stage2" / "config.json")
    again = call("train.py", *words)
    assert again.returncode == 0 and again.stderr.count("is finished, skipped") == 3
    assert os.path.getmtime(tmp_path / "stage2" / "config.json") == before

    picture = next((tmp_path / "world" / "images").iterdir())
    asked = call("sample.py", "--model", tmp_path / "stage2", "--image", picture, "--prompt", "How many things are there?")
    assert asked.returncode == 0 and asked.stdout.endswith("\n")


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one(run, tmp_path):
    words = ["--stage", "1", "--steps", "3", "--batch_size", "8", "--dtype", "float32", "--pictures", "40"]
    losses = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        os.makedirs(out)
        os.symlink(f"{run}/stage0", out / "stage0")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "29511",
                   os.path.join(HERE, "train.py"), *words, "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        losses.append([(r["loss"], r["grad_norm"]) for r in log_of(out, 1)])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4)
