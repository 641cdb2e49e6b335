"""Training: what each stage moves, that a run is a function of its options, and that it says what went wrong."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import memory
import train
import weights
import world
from cli import UserError
from model import Block, LlamaConfig, VLMConfig, rotary

TINY = {"batch_size": 4, "steps": 4, "dtype": "float32", "log_every": 1000, "muon_lr": 4e-3, "val_every": 2,
        "allow_random_llm": True}
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
    assert all(row.keys() >= {"loss", "lr", "grad_norm", "tokens_per_s", "mfu", "data_wait", "peak_gb", "eta_s"} for row in rows)
    assert all(0 <= row["data_wait"] <= 1 and row["mfu"] is None and row["peak_gb"] > 0.1 for row in rows) and rows[-1]["eta_s"] == 0
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


def stopped(given, mesh, number, at):
    """Run stage 2 with a signal that arrives in 0-based step `at`; the exit code."""
    def kicked(*args, step=train.train_step, count=[0]):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), number)
        return step(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, "train_step", kicked)
        train.run_stage(given, 2, mesh)
    return end.value.code


def test_a_signal_ends_the_run_after_its_step_with_the_state_saved(run, mesh, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        out = tmp_path / str(code)
        assert stopped(stage_2(run, out, steps=6), mesh, number, 2) == code
        steps = len(log_of(out, 2))
        assert 2 <= steps <= 3 and os.listdir(out / "stage2" / "state") == [f"step_{steps:06d}"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_stopped_run_is_neither_lost_nor_continued_with_other_options(run, mesh, tmp_path):
    given = stage_2(run, tmp_path, steps=6)
    stopped(given, mesh, signal.SIGTERM, 2)
    state = sorted((tmp_path / "stage2" / "state").rglob("*"))
    with pytest.raises(UserError, match="stopped after step 3: --resume goes on"):
        train.run_stage(given, 2, mesh)
    for name, value in (("lr", 1.0), ("seed", 7), ("batch_size", 2), ("tune", "peft")):
        with pytest.raises(UserError, match=f"--resume: the run had --{name} "):
            train.run_stage(given | {"resume": True, name: value}, 2, mesh)
    with pytest.raises(UserError, match="has taken 3 steps, more than --steps 2"):
        train.run_stage(given | {"resume": True, "steps": 2}, 2, mesh)
    assert sorted((tmp_path / "stage2" / "state").rglob("*")) == state
    train.run_stage(given | {"resume": True, "micro_batch_size": 2, "save_every": 7}, 2, mesh)
    assert len(log_of(tmp_path, 2)) == 6


def test_states_rotate_and_the_last_good_one_outlives_a_full_disk(run, mesh, tmp_path, monkeypatch, capfd):
    states, seen = tmp_path / "stage2" / "state", []
    saved, save = train.save_state, train.dcp.save

    def look(*args):
        fault = saved(*args)
        seen.append((sorted(os.listdir(states)), fault))
        return fault

    def full(state, checkpoint_id):
        if checkpoint_id.endswith("step_000003.tmp"):
            with open(os.path.join(checkpoint_id, "__0_0.distcp"), "w") as f:
                f.write("half")
            raise train.CheckpointException("", {0: (OSError(28, "No space left on device"), None)})
        save(state, checkpoint_id=checkpoint_id)

    monkeypatch.setattr(train, "save_state", look)
    monkeypatch.setattr(train.dcp, "save", full)
    os.makedirs(states / "step_000001.tmp")  # a kill in the middle of a save left it
    trained(stage_2(run, tmp_path, steps=6, save_every=1, keep=2), 2, mesh)
    names = [[f"step_{n:06d}" for n in kept] for kept in ([1], [1, 2], [1, 2], [2, 4], [4, 5])]
    assert [n for n, _ in seen] == names
    assert [bool(fault) for _, fault in seen] == [False, False, True, False, False]
    assert "No space left on device" in seen[2][1]
    assert capfd.readouterr().err.count("training goes on, the states saved before are kept") == 1


def damaged(run, out):
    """A copy of a run's data in which the picture of record 1 is none; (options of stage 2 on it, that record's id)."""
    shutil.copytree(f"{run}/world", out / "world")
    record = json.load(open(out / "world" / "instruct.json"))[1]
    with open(out / "world" / "images" / record["image"], "wb") as f:
        f.write(b"no picture")
    return stage_2(run, out / "run", data=f"{out}/world/instruct.json", images=f"{out}/world/images", batch_size=20), record


@pytest.mark.parametrize("more", [{}, {"cache_features": False}, {"cache_features": False, "workers": 1}])
def test_a_bad_picture_is_an_error_of_one_line_or_gives_its_place_to_the_next_record(run, mesh, tmp_path, capfd, more):
    given, record = damaged(run, tmp_path)
    given |= more
    with pytest.raises(UserError, match="unreadable picture") as error:
        train.run_stage(given, 2, mesh)
    assert record["image"] in str(error.value) and "\n" not in str(error.value)
    job = train.stage_1_or_2(train.complete(given | {"skip_bad_images": True}, 2))
    assert job.batch([0, 1]).records[1].startswith("record 2 ") and len(job.skipped) == 1
    if more:
        train.run_stage(given | {"skip_bad_images": True}, 2, mesh)  # 4 steps of 20 of 40 records: twice over
        assert log_of(tmp_path / "run", 2)[-1]["skipped_images"] >= 2
        assert "2 times a picture could not be read" in capfd.readouterr().err


def test_a_llama_that_guesses_is_refused_before_stage_1(run, mesh, tmp_path):
    given = {"out": str(tmp_path), **TINY, "data": f"{run}/world/captions.json", "images": f"{run}/world/images",
             "val": f"{run}/world/validation_captions.json", "vision": f"{run}/stage0/clip", "llm": f"{run}/stage0/llm"}
    o = train.complete(given | {"allow_random_llm": False}, 1)
    job = train.stage_1_or_2(o)
    assert sum(job.tokens(b) for b in job.text) > 100 and all((b.ids >= 0).all() for b in job.text)
    torch.nn.init.zeros_(job.model.llm.lm_head.weight)
    with pytest.raises(UserError, match=r"loss on the answers is 6\.4\d per token, mere guessing gives 6\.46"):
        train.check_reads(job, job.model, mesh)
    ids = torch.cat([b.target[b.target >= 0] for b in job.text]).unique()
    known = torch.full((job.model.cfg.llm.vocab,), 0.0).index_fill(0, ids, 1.0)
    job.loss = lambda model, batch: torch.nn.functional.cross_entropy(
        (known * 5).expand(len(batch.target), -1), batch.target, reduction="sum")  # knows which words occur, no more
    train.check_reads(job, job.model, mesh)


def test_the_memory_of_weights_gradients_and_optimiser_is_foreseen_to_the_byte(run, mesh, tmp_path):
    for tune in ("full", "peft"):
        o = train.complete(stage_2(run, tmp_path, tune=tune, dtype="bfloat16"), 2)
        job = train.stage_1_or_2(o)
        train.freeze(job.model, train.TRAINS[2, tune], torch.bfloat16)
        model = train.shard(job.model, mesh, torch.bfloat16)
        opts = train.optimisers(model, o)
        batch = job.batch(range(4))
        for opt in opts:
            opt.zero_grad = lambda *a: None
        train.train_step(job, model, opts, [batch], 0, o, mesh)
        local = lambda t: (t.to_local() if hasattr(t, "to_local") else t).numel() * t.element_size()
        real = (sum(local(p) for p in model.parameters()), sum(local(p.grad) for p in model.parameters() if p.grad is not None),
                sum(local(t) for opt in opts for kept in opt.state.values() for t in kept.values()))
        assert memory.state(model, opts, 1) == real
        parts = [memory.state(model, opts, ranks)[0] for ranks in (2, 4)]
        assert real[0] / 2 <= parts[0] <= real[0] / 2 * 1.01 and real[0] / 4 <= parts[1] <= real[0] / 4 * 1.02


def test_a_run_that_cannot_fit_is_refused_with_advice(run, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "room", lambda device: 10e6)
    with pytest.raises(UserError, match="needs about 0.[2-9] GB, the cpu has 0.0: a smaller --micro_batch_size"):
        train.run_stage(stage_2(run, tmp_path, batch_size=32), 2, mesh)


@pytest.mark.parametrize("plain, trains", [(False, True), (True, True), (False, False)])
def test_the_activations_of_a_block_are_what_autograd_keeps(plain, trains):
    cfg = VLMConfig(llm=LlamaConfig(width=64, depth=1, heads=4, kv_heads=2, hidden=160, vocab=10), language_expert="none")
    block = Block(cfg.llm).bfloat16().requires_grad_(trains)
    block.self_attn.plain = plain
    x = torch.randn(2, 48, 64, dtype=torch.bfloat16, requires_grad=True)
    kept, own = {}, {p.untyped_storage().data_ptr() for p in block.parameters()}
    keep = lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = block(x, *rotary(torch.arange(48)[None], 16, 10000.0))
    real = sum(size for at, size in kept.items() if at not in own)
    foreseen = memory.activations(cfg, 2, 48, 0, 0, 2, trains, plain)
    assert out.requires_grad and abs(foreseen / real - 1) < 0.06, (foreseen, real)


@pytest.mark.parametrize("which", ["selective", "full"])
def test_checkpointing_leaves_the_run_as_it_is(run, mesh, tmp_path, which):
    rows = []
    for name in ("none", which):
        trained(stage_2(run, tmp_path / name, steps=2, checkpointing=name), 2, mesh)
        rows.append([(row["loss"], row["grad_norm"]) for row in log_of(tmp_path / name, 2)])
    assert rows[0] == rows[1]


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
        (["--preset", "9b"], "expected one of toy, 7b, 13b, 1b"),
        (["--stage", "1", "--out", run, "--overwrite", "--data", "no.json", "--pictures", "40"], "no.json"),
        (["--stage", "1", "--out", run, "--overwrite", "--images", "nowhere", "--pictures", "40"], "--images nowhere: there is no such"),
    ]:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        monkeypatch.setattr(train, "start_world", lambda device: train.init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match=expected):
            train.run()


@pytest.mark.slow
def test_the_main_job_runs_from_nothing_to_scores(tmp_path):
    words = ("--pictures", 60, "--steps", 4, "--batch_size", 8, "--allow_random_llm", "--out", tmp_path)
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
    words = ["--stage", "1", "--steps", "3", "--batch_size", "8", "--dtype", "float32", "--pictures", "40", "--allow_random_llm"]
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


def launch(ranks, *words):
    """train.py under torchrun, to be waited for."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "29512"]
    return subprocess.Popen([*command, os.path.join(HERE, "train.py"), *map(str, words)], stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def words_of(given):
    """Options as words of a command line."""
    return ["--stage", "2"] + [w for k, v in given.items() for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]


@pytest.mark.slow
def test_twenty_kills_at_random_times_lose_nothing(run, tmp_path):
    given = stage_2(run, "", steps=70, save_every=1, pictures=40, val_every=1000)
    quiet = call("train.py", *words_of(given | {"out": tmp_path / "quiet"}))
    assert quiet.returncode == 0, quiet.stderr[-2000:]
    out, rng, kills = tmp_path / "loud", random.Random(0), 0
    given, log = given | {"out": out}, out / "stage2" / "log.jsonl"
    lines = lambda: len(open(log).readlines()) if os.path.exists(log) else 0
    while kills < 20:
        words = words_of(given | ({"resume": True} if train.saved_steps(out / "stage2" / "state") else {}))
        process = subprocess.Popen([sys.executable, os.path.join(HERE, "train.py"), *words], stderr=subprocess.DEVNULL,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        before = max(train.saved_steps(out / "stage2" / "state"), default=0)
        due = before + rng.choice([1, 2, 3])
        while process.poll() is None and max(train.saved_steps(out / "stage2" / "state"), default=0) < due:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        assert process.poll() is None
        process.kill()
        process.wait()
        kills += 1
        assert max(train.saved_steps(out / "stage2" / "state")) >= due
    done = call("train.py", *words_of(given | {"resume": True}))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [[(r["step"], r["loss"], r["grad_norm"]) for r in log_of(tmp_path / name, 2)] for name in ("quiet", "loud")]
    assert rows[0] == rows[1] and len(rows[0]) == 70
    files = [open(tmp_path / name / "stage2" / "model.safetensors", "rb").read() for name in ("quiet", "loud")]
    assert files[0] == files[1] and not (out / "stage2" / "state").exists()


@pytest.mark.slow
def test_two_ranks_end_together(run, tmp_path):
    given, record = damaged(run, tmp_path)
    given |= {"pictures": 40, "cache_features": False, "workers": 1}
    began = time.time()
    failed = launch(2, *words_of({k: v for k, v in given.items() if v is not False}), "--no_cache_features")
    text = failed.communicate(timeout=170)[1]
    assert failed.returncode == 1 and text.count("unreadable picture") == 1 and "Traceback" not in text.split("error:")[0]
    assert record["image"] in text and time.time() - began < 170

    out = tmp_path / "stopped"
    process = launch(2, *words_of(stage_2(run, out, steps=500, pictures=40)))
    log = out / "stage2" / "log.jsonl"
    while process.poll() is None and not (os.path.exists(log) and len(open(log).readlines()) > 2):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[1]
    assert text.count("stopped by SIGTERM after step") == 1
    assert train.saved_steps(out / "stage2" / "state") == [len(log_of(out, 2))]
    on_one = call("train.py", *words_of(stage_2(run, out, steps=len(log_of(out, 2)) + 2, pictures=40, resume=True)))
    assert on_one.returncode == 0, on_one.stderr[-2000:]
