"""Training: what each stage moves, that a run is a function of its options, and that it says what
went wrong.
"""
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from PIL import Image
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import formats.weight_files
import sample
import toy.files
import toy.stand_ins
import toy.world
import train
import training.checks
import training.costs
import training.distributed
import training.feed
import training.muon
import training.options
import training.parts
import training.plan
import training.sharding
import training.state
import weights
from baselines import BaselineConfig, MatrixExpert, MatrixNetwork
from cli import UserError
from data import collate, IGNORE, IMAGE, MULTIPLE, pixels, Sample
from hypernet import Expert, HyperNetwork
from model import Block, generate, LlamaConfig, MLP, rotary, rotate, VisionConfig, VLM, VLMConfig
from tests.programs import HERE, Program, start_ranks, succeeds, words_of
from training.feed import (BatchSampler, deal, Question, split_across_ranks, TrainDataset,
                           VLMData)


TINY = {"batch_size": 4, "steps": 4, "dtype": "float32", "log_every": 1000, "muon_lr": 4e-3,
        "val_every": 2,
        "allow_random_llm": True}


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(Question, "LENGTH", 3)


@pytest.fixture(scope="session")
def run(tmp_path_factory, mesh):
    """A folder with a tiny world and stages 0 and 1, hardly trained."""
    out = str(tmp_path_factory.mktemp("toy"))
    toy.files.write_world(os.path.join(out, "world"), pictures=40, texts=40, test_pictures=6)
    for stage, part in ((0, "clip"), (0, "llm"), (1, None)):
        train.run_stage({"out": out, "part": part, **TINY}, stage, mesh)
    return out


def log_of(out, stage, part=None):
    return [json.loads(line) for line in open(
        os.path.join(training.options.folder_of(out, stage, part), "log.jsonl"))]


def trained(given, number, mesh):
    """(tensors before, tensors after) of a stage run on `given`, without writing its checkpoint."""
    o = training.options.complete(given, number)
    os.makedirs(training.options.stage_folder(o), exist_ok=True)
    stage = train.vlm_stage(o)
    before = {n: p.detach().clone() for n, p in stage.model.named_parameters()}
    after = {}
    stage.write, stage.keeps = after.update, ("",)
    train.train(stage, o, mesh)
    return before, after


@pytest.mark.parametrize("stage, tune, moves", [
    (1, "full", ("projector.",)),
    (2, "full", ("projector.", "llm.")),
    (2, "peft", ("projector.", "llm.hypernet.", "llm.guidance_norm.",
                 *(f"llm.layers.{n}.expert." for n in (2, 3)))),
])
def test_a_stage_moves_exactly_the_tensors_it_names(run, mesh, tmp_path, stage, tune, moves):
    given = {"out": str(tmp_path), "tune": tune, **TINY}
    given |= {"data": f"{run}/world/{'captions' if stage == 1 else 'instruct'}.json",
              "images": f"{run}/world/images",
              "val": f"{run}/world/validation.json", "vision": f"{run}/stage0/clip",
              "llm": f"{run}/stage0/llm"}
    given |= {"val": f"{run}/world/validation_captions.json"} if stage == 1 else {
        "init": f"{run}/stage1"}
    before, after = trained(given, stage, mesh)
    assert before.keys() == after.keys()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.startswith(moves)}


def test_stage_1_keeps_only_the_projector_and_names_its_sources(run):
    config = json.load(open(f"{run}/stage1/config.json"))
    names = {name for name, _, _ in formats.weight_files.tensors(f"{run}/stage1")}
    assert names and all(name.startswith("projector.") for name in names)
    assert config["sources"]["llm"]["path"] == "../stage0/llm" and config["training"]["stage"] == 1
    loaded = weights.load(f"{run}/stage1")
    llm = {name: tensor for name, tensor, _ in formats.weight_files.tensors(f"{run}/stage0/llm")}
    assert torch.equal(loaded.model.llm.embed_tokens.weight, llm["model.embed_tokens.weight"])


def test_the_log_has_a_line_a_step_with_the_validation_loss_now_and_then(run):
    rows = log_of(run, 1)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row.keys() >= {"loss", "lr", "grad_norm", "tokens_per_s", "mfu", "data_wait",
                              "peak_gb", "eta_s"} for row in rows)
    assert all(0 <= row["data_wait"] <= 1 and row["mfu"] is None and row["peak_gb"] > 0.1
               for row in rows) and rows[-1]["eta_s"] == 0
    assert [("val_loss" in row) for row in rows] == [False, True, False, True]


def test_the_log_of_stage_2_tells_the_share_of_the_experts(run, mesh, tmp_path):
    trained(stage_2(run, tmp_path), 2, mesh)
    shares = [row["expert_share"] for row in log_of(tmp_path, 2) if "expert_share" in row]
    assert len(shares) == 2 and 0 < shares[0] < shares[1]  # W_u starts at zero and grows


def test_the_log_answers_a_validation_question_as_the_checkpoint_will_and_leaves_training_alone(
    run, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(Question, "LENGTH", 12)
    for name, more in (("seldom", {"val_every": 100}),
                       ("often", {"val_every": 1, "checkpointing": "full"})):
        train.run_stage(stage_2(run, tmp_path / name, **more), 2, mesh)
    seldom, often = (log_of(tmp_path / name, 2) for name in ("seldom", "often"))
    assert [(r["loss"], r["grad_norm"]) for r in seldom] == [(r["loss"], r["grad_norm"])
                                                             for r in often]
    files = [open(tmp_path / name / "stage2" / "model.safetensors", "rb").read()
             for name in ("seldom", "often")]
    assert files[0] == files[1] and ["answer" in r
                                     for r in seldom] == [False] * 3 + [True] and all(
                                     "answer" in r for r in often)

    record = json.load(open(f"{run}/world/validation.json"))[0]
    o = sample.Options(max_new_tokens=12, dtype="float32", device="cpu")
    chat = sample.Chat(weights.load(str(tmp_path / "often" / "stage2")),
                       Image.open(f"{run}/world/images/{record['image']}"), o)
    said = "".join(chat.ask(record["conversations"][0]["value"].replace("<image>", "").strip()))
    assert said == often[-1]["answer"] == seldom[-1]["answer"] != often[0]["answer"]


def test_the_answer_ends_where_the_model_ended_it_though_all_ranks_go_on(run, mesh, tmp_path,
                                                                         monkeypatch):
    o = training.options.complete(stage_2(run, tmp_path), 2)
    stage, tokenizer = train.vlm_stage(o), weights.load(f"{run}/stage1").tokenizer
    record = json.load(open(f"{run}/world/validation.json"))[0]
    words = tokenizer.encode("a red star")
    prompts, found, question = [], [], stage.question
    answer = lambda: question.answer(stage.model, o.device, torch.float32)
    for ids in (words + [tokenizer.eos] + words, words):
        monkeypatch.setattr(training.feed, "generate", lambda model, prompt, *_,
                            **__: prompts.append(prompt) or [ids])
        assert answer() == "a red star" and record["image"] in str(question)
    assert len(prompts[0].ids) == 1 and (prompts[0].target == IGNORE).all()
    assert json.dumps(record["conversations"][1]["value"]) in str(
        question) and question.truth == record["conversations"][1]["value"]
    stage.model.llm.lm_head.weight.data.zero_()  # all logits are equal: always id 0
    monkeypatch.setattr(training.feed, "generate", lambda *args,
                        **more: found.extend(generate(*args, **more)) or found)
    with torch.no_grad():
        answer()
    assert found == [[0] * Question.LENGTH]


def test_validation_data_is_dealt_to_the_ranks_in_batches_of_like_number(monkeypatch):
    for cuts, ranks in ((5, 2), (2, 4), (4, 4), (9, 4)):
        shares = []
        for rank in range(ranks):
            monkeypatch.setattr(dist, "get_rank", lambda: rank)
            monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
            blank = Sample(*[np.zeros(3, np.int64)] * 4, 1, None, "")
            make = lambda cut: dataclasses.replace(collate([blank], [], (1, 1)), at=torch.arange(2),
                                                   target=torch.full((2,), cut))
            shares.append(split_across_ranks([*range(cuts)], make))
        assert len({len(share) for share in shares}) == 1
        assert sorted(b.target[0].item() for share in shares for b in share
                      if b.trained) == [*range(cuts)]


def stage_2(run, out, **more):
    return {"out": str(out), "init": f"{run}/stage1", "data": f"{run}/world/instruct.json",
            "val": f"{run}/world/validation.json", "images": f"{run}/world/images", **TINY, **more}


def test_accumulation_leaves_the_run_as_it_is(run, mesh, tmp_path):
    losses = []
    for micro in (4, 1):
        trained(stage_2(run, tmp_path / str(micro), micro_batch_size=micro), 2, mesh)
        losses.append([(row["loss"], row["grad_norm"]) for row in log_of(tmp_path / str(micro), 2)])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-4)


PLACES = {  # stage, options
    "stage 1, none": (1, {"visual_expert": "none"}),
    "stage 1, static": (1, {"weight_source": "static"}), "stage 1, generated": (1, {}),
    "stage 2, none": (2, {"visual_expert": "none", "language_expert": "none"}),
    "stage 2, static": (2, {"weight_source": "static"}),
    "stage 2, generated": (2, {})}


# for each rank, the rows of each of its micro-batches
WAYS = {1: ([[[0, 1, 2, 3]]], [[[0, 1], [2, 3]]], [[[0], [1], [2], [3]]]),
        2: ([[[0, 1]], [[2, 3]]], [[[0], [2]], [[3], [1]]])}


def gradients(out, mesh):
    """Write OUT/PLACE.pt for each of PLACES: a list of {name: gradient of a step}, one for each way
    to distribute four samples.
    """
    for place, (stage, options) in PLACES.items():
        found = []
        for ranks in WAYS[dist.get_world_size()]:
            o = training.options.complete(
                {"out": os.path.join(out, place.split(", ")[1]), "batch_size": 4,
                 "dtype": "float32", "device": "cpu",
                                "data": os.path.join(out, f"stage{stage}.json"),
                                "images": os.path.join(out, "images"),
                                "val": None, "vision": os.path.join(out, "clip"),
                                "llm": os.path.join(out, "llm"),
                                "allow_random_llm": True, **options}, stage)
            built = train.vlm_stage(o)
            # what starts at zero would hide what is behind it
            for name, p in built.model.named_parameters():
                if not p.any():
                    p.data = torch.randn(p.shape,
                                         generator=torch.Generator().manual_seed(len(name))) / 20
            model, opts = train.setup_model(built.model, o, mesh)
            for opt in opts:
                opt.step = opt.zero_grad = lambda: None
            train.train_step(model, opts,
                             [built.data.batch(rows) for rows in ranks[dist.get_rank()]], 0, o,
                             mesh)
            found.append({name: p.grad.full_tensor() for name,
                          p in model.named_parameters() if p.requires_grad})
        if dist.get_rank() == 0:
            torch.save(found, os.path.join(out, f"{place} on {dist.get_world_size()}.pt"))


def test_gradients_are_the_same_whole_accumulated_and_on_two_ranks_one_of_which_has_text_alone(
    run, mesh, tmp_path):
    """The samples have 1 to 20 turns and 2 to 60 words; some have no picture."""
    for part in ("clip", "llm"):
        os.symlink(f"{run}/stage0/{part}", tmp_path / part)
    os.symlink(f"{run}/world/images", tmp_path / "images")
    names = sorted(os.listdir(f"{run}/world/images"))
    said = lambda *texts: [{"from": who, "value": text} for pair in texts for who,
                           text in zip(("human", "gpt"), pair)]
    turn = ("Is there a red circle?", "yes")
    captions = [{"image": name, "conversations": said(
        ("<image>", "a red circle and " * n + "a star"))} for name, n in zip(names, (0, 15, 3, 1))]
    talks = [{"image": names[0], "conversations": said(
        ("<image>\nWhat colour is the star?", "green"), *[turn] * 6)},
             {"image": names[1], "conversations": said(
             ("How many things are there?\n<image>", "3"))},
             {"conversations": said(*[turn, ("How many?", "5")] * 10)},
             {"conversations": said(("What colour?", "blue"))}]
    for stage, records in ((1, captions), (2, talks)):
        json.dump(records, open(tmp_path / f"stage{stage}.json", "w"))
    for place, (stage, options) in PLACES.items():
        if stage == 1:
            given = {**TINY, "steps": 1, "out": str(tmp_path / place.split(", ")[1]),
                     "data": str(tmp_path / "stage1.json"), "images": str(tmp_path / "images"),
                     "vision": str(tmp_path / "clip"), "llm": str(tmp_path / "llm"), "val": None,
                     **options}
            train.run_stage(given, 1, mesh)
    gradients(str(tmp_path), mesh)
    (tmp_path / "ranks.py").write_text(
        "import tests.test_training as t\n"
        f"t.gradients({str(tmp_path)!r}, t.training.distributed.start_world('cpu'))\n"
        "t.dist.barrier()\n")
    for rank in start_ranks(2, tmp_path / "ranks.py"):
        succeeds(rank)
    for place in PLACES:
        whole, *others = [way for ranks in WAYS
                          for way in torch.load(tmp_path / f"{place} on {ranks}.pt",
                                                weights_only=True)]
        assert len(others) == 4
        for name, expected in whole.items():
            largest = expected.abs().max()
            assert largest > 0, (place, name)
            for other in others:
                assert (other[name] - expected).abs().max() <= 1e-5 * largest, (place, name)


@pytest.mark.parametrize("stage, part", [(0, "clip"), (0, "llm"), (1, None), (2, None)])
def test_a_run_that_was_stopped_and_resumed_is_the_unbroken_run(run, mesh, tmp_path, monkeypatch,
                                                                stage, part):
    def given(name):
        return stage_2(run, tmp_path / name, steps=6, save_every=2, val_every=100, part=part) | (
            {} if stage == 2 else {"data": f"{run}/world/captions.json",
                                   "vision": f"{run}/stage0/clip", "llm": f"{run}/stage0/llm",
                                   "val": f"{run}/world/validation_captions.json"})

    def stopping(*args, step=train.train_step, count=[0], **more):
        count[0] += 1
        if count[0] == 6:
            raise KeyboardInterrupt
        return step(*args, **more)

    for name in ("whole", "broken"):
        os.makedirs(tmp_path / name, exist_ok=True)
        os.symlink(f"{run}/world", tmp_path / name / "world")
    train.run_stage(given("whole"), stage, mesh)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopping)
        train.run_stage(given("broken"), stage, mesh)
    assert len(log_of(tmp_path / "broken", stage, part)) == 5 and not training.options.finished(
        tmp_path / "broken", stage, part)
    train.run_stage(given("broken") | {"resume": True}, stage, mesh)

    whole, broken = (log_of(tmp_path / name, stage, part) for name in ("whole", "broken"))
    assert [(r["step"], r["loss"], r["grad_norm"])
            for r in whole] == [(r["step"], r["loss"], r["grad_norm"]) for r in broken]
    folders = [training.options.folder_of(tmp_path / name, stage, part)
               for name in ("whole", "broken")]
    files = [open(os.path.join(folder, "model.safetensors"), "rb").read() for folder in folders]
    assert files[0] == files[1]
    assert not os.path.exists(os.path.join(folders[1], "state"))


def test_a_new_state_replaces_whatever_an_older_run_left(run, mesh, tmp_path):
    states = tmp_path / "stage2" / "state"
    for name in ("step_000900", "step_000950.tmp"):
        os.makedirs(states / name)
    seen = []
    def look(*args, save=training.state.save_state):
        save(*args)
        seen.append(os.listdir(states))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.state, "save_state", look)
        trained(stage_2(run, tmp_path, save_every=1, steps=3), 2, mesh)
    assert seen == [["step_000001"], ["step_000002"]]


def stopped(given, mesh, number, at):
    """Run stage 2, send it a signal in 1-based step `at`, and return its exit code."""
    def kicked(*args, step=train.train_step, count=[0], **more):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), number)
        return step(*args, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(train, "train_step", kicked)
        train.run_stage(given, 2, mesh)
    return end.value.code


def test_a_signal_ends_the_run_after_its_step_with_the_state_saved(run, mesh, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGHUP, 0)):
        out = tmp_path / str(number)
        assert stopped(stage_2(run, out, steps=6), mesh, number, 2) == code
        steps = len(log_of(out, 2))
        assert 2 <= steps <= 3 and os.listdir(out / "stage2" / "state") == [f"step_{steps:06d}"]
    assert signal.getsignal(signal.SIGTERM) is before


def stopped_before(given, mesh, at):
    """Run stage 2, and send it SIGTERM while it waits for the data of the 1-based step `at`."""
    def kicked(*args, real=train.next_batches, count=[0]):
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "next_batches", kicked)
        train.run_stage(given, 2, mesh)


def test_a_state_that_is_there_already_is_not_written_again(run, mesh, tmp_path, monkeypatch):
    """A kill during the second write would leave no state."""
    given, save, written = stage_2(run, tmp_path, steps=6, save_every=2), dcp.save, []
    monkeypatch.setattr(dcp, "save", lambda state, checkpoint_id: (
        written.append(os.path.basename(checkpoint_id)), save(state, checkpoint_id=checkpoint_id)))
    stopped_before(given, mesh, 3)  # just saved
    assert written == ["step_000002.tmp"]
    stopped_before(given | {"resume": True}, mesh, 1)  # just loaded
    assert written == ["step_000002.tmp"]
    stopped_before(given | {"resume": True}, mesh, 2)
    assert written == ["step_000002.tmp", "step_000003.tmp"]
    assert os.listdir(tmp_path / "stage2/state") == ["step_000003"]


def test_an_old_state_that_cannot_be_removed_does_not_cost_the_new_one(run, mesh, tmp_path,
                                                                       monkeypatch):
    remove = shutil.rmtree

    def busy(path, ignore_errors=False):
        if str(path).endswith(".old.tmp") and not ignore_errors:
            raise OSError(39, "Directory not empty")
        remove(path, ignore_errors=ignore_errors)

    monkeypatch.setattr(training.state.shutil, "rmtree", busy)
    assert stopped(stage_2(run, tmp_path, steps=6, save_every=1), mesh, signal.SIGTERM, 3) == 0
    assert training.state.saved_steps(tmp_path / "stage2/state") == [len(log_of(tmp_path, 2))]


def test_only_its_parent_can_end_a_worker():
    """If it ignored its parent too, a process with an error would never end: at exit it terminates
    its workers and waits.
    """
    ready = multiprocessing.get_context("fork").Event()
    worker = multiprocessing.get_context("fork").Process(
        target=lambda: (training.distributed.ignore_signals(0), ready.set(), time.sleep(60)),
        daemon=True)
    worker.start()
    assert ready.wait(20)
    for name in ("TERM", "INT", "HUP"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


def test_a_batch_that_cannot_be_had_ends_the_run_with_its_state_saved(run, mesh, tmp_path,
                                                                     monkeypatch):
    errors = {2: UserError("no such picture"), 3: RuntimeError("DataLoader worker (pid 7) died")}

    def fail(self, k, real=TrainDataset.__getitem__):
        error = errors.pop(k, None)
        if isinstance(error, RuntimeError):
            raise error
        return (error, []) if error else real(self, k)

    monkeypatch.setattr(TrainDataset, "__getitem__", fail)
    given = stage_2(run, tmp_path, val_every=9)
    with pytest.raises(UserError, match=r"no such picture \(stage 2 stopped after step 2, "
                       r"state sa"):
        train.run_stage(given, 2, mesh)
    with pytest.raises(UserError, match="died. If the machine is out of memory, use "
                       "fewer --worker"):
        train.run_stage(given | {"resume": True}, 2, mesh)
    train.run_stage(given | {"resume": True}, 2, mesh)
    assert [row["step"] for row in log_of(tmp_path, 2)] == [1, 2, 3, 4]


class Slow:
    """Stands in for a TrainDataset of pictures in bytes; the third one never comes."""
    accumulation = 1

    def __len__(self):
        return 100

    def __getitem__(self, k):
        if k == 2:
            time.sleep(100)
        return torch.full((3, 2**16), k), []


def later(seconds, work):
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def loader_of(workers):
    return training.feed.make_loader(Slow(), 0, training.options.Options(workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", training.distributed.STOPS)
def test_a_signal_ends_the_wait_for_data(workers, number):
    loader, began = loader_of(workers), time.time()
    with training.distributed.Signals() as signals:
        batches, _ = training.feed.next_batches(loader, 2, signals)
        assert [b[0, 0].item() for b in batches] == [0, 1]
        later(0.3, lambda: os.kill(os.getpid(), number))
        for _ in range(2):  # also one that came before
            batches, messages = training.feed.next_batches(loader, 1, signals)
            assert isinstance(batches[0], UserError) and messages == []
    assert signals.got == number and time.time() - began < 20


def test_workers_send_batches_without_shared_memory_and_their_death_is_told_between_two_steps(
        monkeypatch):
    others, loader = {*multiprocessing.active_children()}, loader_of(2)
    with training.distributed.Signals() as signals:
        batches, _ = training.feed.next_batches(loader, 2, signals)
        assert not any(b.is_shared() for b in batches)
        later(0.3, ({*multiprocessing.active_children()} - others).pop().kill).join()
        time.sleep(0.5)  # amid a step: nothing is raised
        batches, _ = training.feed.next_batches(loader, 2, signals)
        assert "If the machine is out of memory" in str(batches[0])
    others, loader = {*multiprocessing.active_children()}, loader_of(2)
    with training.distributed.Signals() as signals:
        training.feed.next_batches(loader, 2, signals)
        later(0.3, ({*multiprocessing.active_children()} - others).pop().kill)
        batches, _ = training.feed.next_batches(loader, 1, signals)
        assert "If the machine is out of memory" in str(batches[0])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=9999))
    with pytest.raises(UserError, match="/dev/shm.*--shm-size 1g.*full.*--workers 0 needs none"):
        loader_of(1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**30))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="/dev/shm.*missing or read-only"):
        loader_of(1)


@pytest.mark.parametrize("output", [os.openpty, os.pipe])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_terminal_or_tee_that_is_gone_does_not_keep_a_run_from_saving(output, number):
    def work():
        with training.distributed.Signals() as signals:
            os.kill(os.getpid(), number)
            for _ in range(3):
                tqdm.write("a line", file=sys.stderr)
                print("a line", flush=True)
        sys.exit(7 if signals.got == number else 8)

    def child():
        reader, writer = output()
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(reader)
        os.close(writer)
        sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))
        training.distributed.main_distributed(work)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 7


def test_sighup_stays_ignored_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with training.distributed.Signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.got == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("left, many", [({}, False), ({"WORLD_SIZE": "1"}, False), (
    {"WORLD_SIZE": "1", "RANK": "0"}, False), ({"RANK": "3"}, False), ({"WORLD_SIZE": "2"}, True)])
def test_a_world_of_one_needs_no_variables_and_one_that_cannot_join_ends_in_one_line(
        monkeypatch, left, many):
    def join(backend, timeout, **alone):
        assert bool(alone) != many
        raise RuntimeError("Unable to find address for: ib0\nmore")

    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(dist, "init_process_group", join)
    with pytest.raises(UserError, match="cannot be connected: Unable to find address for: ib0$"):
        training.distributed.start_world("cpu")


def test_fewer_gpus_than_processes_are_told_in_one_line_by_the_first_of_them(monkeypatch, capsys):
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    for rank, lines in ((0, 1), (1, 0), (3, 0)):
        for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": rank}.items():
            monkeypatch.setenv(name, str(value))
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(sys, "stdout", sys.stdout)
            patch.setattr(sys, "stderr", sys.stderr)
            training.distributed.main_distributed(lambda: training.distributed.start_world("cuda"))
        said = capsys.readouterr().err
        assert said.count("error: 4 processes need as many GPUs, this machine has 2: "
                          "--nproc_per_node 2\n") == len(said.splitlines()) == lines
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    training.distributed.set_device()
    monkeypatch.setenv("WORLD_SIZE", "1")  # the others were left by a cluster
    training.distributed.set_device()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK")
    with pytest.raises(UserError, match="LOCAL_RANK is not set, .*: start them with torchrun"):
        training.distributed.set_device()
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # a cluster shows each its own
    training.distributed.set_device()
    assert taken == [1, 0, 0]


def test_an_error_before_the_ranks_are_connected_is_printed_whatever_a_cluster_left_behind(
        monkeypatch, capsys):
    def fail():
        raise UserError("bad option")

    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    for size, lines in (("1", 1), ("2", 0)):
        for name, value in {"WORLD_SIZE": size, "RANK": "3", "LOCAL_RANK": "3"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit):
            training.distributed.main_distributed(fail)
        assert capsys.readouterr().err.count("error: bad option") == lines


def test_workers_end_with_their_parent_though_nobody_takes_their_batches():
    def parent(pids):
        loader = loader_of(2)
        next(loader)
        pids.send([worker.pid for worker in multiprocessing.active_children()])
        time.sleep(100)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=parent, args=(theirs,))
    process.start()
    workers, began = ours.recv(), time.time()
    process.kill()
    process.join()
    while left := [pid for pid in workers if os.path.exists(f"/proc/{pid}/exe")]:
        if time.time() - began > 15:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            pytest.fail("workers live on")
        time.sleep(0.1)


def test_a_presets_eager_kernels_are_for_a_cpu(monkeypatch, mesh):
    given = {"part": "clip"}
    assert training.options.complete(given, 0).kernels == "eager"
    monkeypatch.setattr(training.options, "device_of", lambda o: "cuda")
    assert training.options.complete(given, 0).kernels == "fused"
    assert training.options.complete(given | {"kernels": "eager"}, 0).kernels == "eager"
    # so a run can go on on another device
    assert {"device", "kernels"} <= training.options.CHANGEABLE


def test_a_stopped_run_is_neither_lost_nor_continued_with_other_options(run, mesh, tmp_path):
    given = stage_2(run, tmp_path, steps=6)
    stopped(given, mesh, signal.SIGTERM, 3)
    state = sorted((tmp_path / "stage2" / "state").rglob("*"))
    with pytest.raises(UserError, match="stopped after step 3: --resume goes on"):
        train.run_stage(given, 2, mesh)
    for name, value in (("lr", 1.0), ("seed", 7), ("batch_size", 2), ("tune", "peft")):
        with pytest.raises(UserError, match=f"--resume: the run had --{name} "):
            train.run_stage(given | {"resume": True, name: value}, 2, mesh)
    options = tmp_path / "stage2" / "state" / "step_000003" / "options.json"
    text = options.read_text()
    for version in ({}, {"version": 1}):
        options.write_text(json.dumps(
            {k: v for k, v in json.loads(text).items() if k != "version"} | version))
        with pytest.raises(UserError, match="saved by another version of this code, .*--overwrite"):
            train.run_stage(given | {"resume": True}, 2, mesh)
    options.write_text(text)
    with pytest.raises(UserError, match="has taken 3 steps, more than --steps 2"):
        train.run_stage(given | {"resume": True, "steps": 2}, 2, mesh)
    assert sorted((tmp_path / "stage2" / "state").rglob("*")) == state
    train.run_stage(given | {"resume": True, "micro_batch_size": 2, "save_every": 7}, 2, mesh)
    assert len(log_of(tmp_path, 2)) == 6


def test_a_run_goes_on_wherever_its_files_lie_but_not_with_others_under_their_names(
        run, mesh, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for name in ("world", "stage0", "stage1"):
        shutil.copytree(f"{run}/{name}", here / name)
    stopped(stage_2(here, here, steps=3), mesh, signal.SIGTERM, 2)
    os.rename(here, there)
    given = stage_2(f"{there}/../there", there, steps=3, resume=True)
    for name, file in (("data", "world/instruct.json"), ("val", "world/validation.json"),
                       ("init", "stage1/model.safetensors"), ("init", "stage1/tokenizer.json")):
        before = (there / file).read_bytes()
        (there / file).write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        training.state.digest.cache_clear()  # as in another process
        with pytest.raises(
                UserError, match=f"the run had --{name} with content .*, not with content"):
            train.run_stage(given, 2, mesh)
        (there / file).write_bytes(before)
    training.state.digest.cache_clear()
    train.run_stage(given, 2, mesh)
    assert len(log_of(there, 2)) == 3


def test_a_digest_finds_a_change_of_a_256th_of_a_weight_file_and_any_change_of_data(tmp_path):
    digest = training.state.digest.__wrapped__
    for name in ("a/model.safetensors", "b.json"):
        path = tmp_path / name
        os.makedirs(path.parent, exist_ok=True)
        whole = np.zeros(2**25, np.uint8)
        whole.tofile(path)
        asked = path if name == "b.json" else path.parent
        before, first, size = digest(str(asked)), 2**25 // 3, 1 if name == "b.json" else 2**17
        whole[first:first + size] = 1
        whole.tofile(path)
        assert digest(str(asked)) != before


def test_a_damaged_state_is_named_and_the_one_before_it_used(run, mesh, tmp_path, capfd):
    given = stage_2(run, tmp_path, steps=4, save_every=1, keep=2)
    stopped(given, mesh, signal.SIGTERM, 3)
    states = tmp_path / "stage2" / "state"
    os.symlink("gone", states / "step_000009")  # one that a run removes while it is listed
    for copy in ("step_000003.bak1", "step_000003_2"):
        shutil.copytree(states / "step_000003", states / copy)
    assert training.state.saved_steps(states) == [2, 3]
    os.remove(states / "step_000009")
    for name, harm in (("options.json", lambda path: os.truncate(path, 0)),
                       (".metadata", os.remove),
                       ("__0_0.distcp", lambda path: os.truncate(path, 999))):
        shutil.copytree(states, tmp_path / name)
        harm(tmp_path / name / "step_000003" / name)
        step, _, problems = training.state.newest_state(tmp_path / name)
        assert step == 2 and len(problems) == 1 and f"/step_000003/{name}: " in problems[0]
        harm(tmp_path / name / "step_000002" / name)
        with pytest.raises(UserError, match=f"step_000003/{name}: .*no older state is whole"):
            training.state.newest_state(tmp_path / name)

    path = states / "step_000003" / "__0_0.distcp"
    os.truncate(path, 999)
    log = tmp_path / "stage2" / "log.jsonl"
    lines = log.read_text().splitlines(True)
    log.write_text(lines[0] + lines[1][:30])
    capfd.readouterr()
    train.run_stage(given | {"resume": True, "keep": 1}, 2, mesh)
    said = capfd.readouterr().err
    assert f"warning: {path}: damaged, " in said and said.count("; going on after step 2") == 1
    assert f"warning: {log} lacks 1 of the first 2 steps" in said
    assert [row["step"] for row in log_of(tmp_path, 2)] == [1, 3, 4]


def test_states_rotate_and_the_last_good_one_outlives_a_full_disk(run, mesh, tmp_path, monkeypatch,
                                                                  capfd):
    states, seen = tmp_path / "stage2" / "state", []
    saved, save = training.state.save_state, dcp.save

    def look(*args):
        fault = saved(*args)
        seen.append((sorted(os.listdir(states)), fault))
        return fault

    def full(state, checkpoint_id):
        if checkpoint_id.endswith("step_000003.tmp"):
            with open(os.path.join(checkpoint_id, "__0_0.distcp"), "w") as f:
                f.write("half")
            raise CheckpointException("", {0: (OSError(28, "No space left on device"), None)})
        save(state, checkpoint_id=checkpoint_id)

    monkeypatch.setattr(training.state, "save_state", look)
    monkeypatch.setattr(dcp, "save", full)
    os.makedirs(states / "step_000001.tmp")  # a kill in the middle of a save left it
    (states / "step_notes.tmp").write_text("a user's")
    trained(stage_2(run, tmp_path, steps=6, save_every=1, keep=2), 2, mesh)
    names = [[f"step_{n:06d}" for n in kept] for kept in ([1], [1, 2], [1, 2], [2, 4], [4, 5])]
    assert [n for n, _ in seen] == [kept + ["step_notes.tmp"] for kept in names]
    assert [bool(fault) for _, fault in seen] == [False, False, True, False, False]
    # how long training waited, before this step
    assert ["save_s" in row for row in log_of(tmp_path, 2)] == [False] + 5 * [True]
    assert "No space left on device" in seen[2][1]
    assert capfd.readouterr().err.count("training goes on, older states are kept") == 1


def damaged(run, out):
    """Copy a run's data and damage the picture of record 1; returns (options of stage 2 on it, that
    record).
    """
    shutil.copytree(f"{run}/world", out / "world")
    record = json.load(open(out / "world" / "instruct.json"))[1]
    with open(out / "world" / "images" / record["image"], "wb") as f:
        f.write(b"no picture")
    return stage_2(run, out / "run", data=f"{out}/world/instruct.json",
                   images=f"{out}/world/images", batch_size=20), record


@pytest.mark.parametrize("more", [{}, {"cache_features": False},
                                  {"cache_features": False, "workers": 1}])
def test_a_bad_picture_is_an_error_of_one_line_or_gives_its_place_to_the_next_record(
    run, mesh, tmp_path, capfd, more):
    given, record = damaged(run, tmp_path)
    given |= more
    with pytest.raises(UserError, match="unreadable picture") as error:
        train.run_stage(given, 2, mesh)
    assert record["image"] in str(error.value) and "\n" not in str(error.value)
    data = train.vlm_stage(training.options.complete(given | {"skip_bad_images": True}, 2)).data
    assert data.batch([0, 1]).records[1].startswith("record 2 ") and len(data.take_skipped()) == 1
    capfd.readouterr()
    train.vlm_stage(training.options.complete(
        given | {"skip_bad_images": True, "val": given["data"]}, 2))
    assert "skipped in --val: record 1 " in capfd.readouterr().err
    if more:
        # 4 steps of 20 of 40 records: twice over
        train.run_stage(given | {"skip_bad_images": True, "overwrite": True}, 2, mesh)
        assert log_of(tmp_path / "run", 2)[-1]["skipped_images"] >= 2
        assert "2 pictures could not be read" in capfd.readouterr().err


def test_pictures_have_the_dtype_of_the_computation_which_changes_no_step(run, mesh, tmp_path,
                                                                          monkeypatch):
    losses = []
    for name in ("bfloat16", "float32"):
        monkeypatch.setattr(training.feed.Pictures, "read", lambda self, path, record: pixels(
            training.feed.open_image(path, record), self.preprocess).to(getattr(torch, name)))
        given = stage_2(run, tmp_path / name, dtype="bfloat16", cache_features=False, steps=2)
        train.run_stage(given, 2, mesh)
        losses.append([row["loss"] for row in log_of(tmp_path / name, 2)])
    assert losses[0] == losses[1]
    monkeypatch.undo()
    data = train.vlm_stage(training.options.complete(given, 2)).data
    assert data.batch([0]).visual.dtype == torch.bfloat16


def test_a_record_that_stands_in_for_another_is_not_longer(monkeypatch):
    """Or a micro-batch of many short records would suddenly be many times as large."""
    bad = {"b.png"}

    def load_picture(sample):
        if sample.image in bad:
            raise UserError(f"{sample.image} is bad")
        return torch.zeros(3, 2, 2)

    class Conversations(list):
        lengths = has_image = None

    arrays = [np.zeros(length, np.int64) for length in (20, 30, 33, 64, 32)]
    data = VLMData(Conversations(Sample(a, a, a, a, 1, f"{name}.png", f"record {name}", 1)
                                 for name, a in zip("abcde", arrays)), load_picture, None,
                                 skip=True)
    assert data.with_picture(1)[0].record == "record e"  # 30 and 32 positions are padded to 32
    assert data.with_picture(2)[0].record == "record c" and len(data.take_skipped()) == 1
    bad |= {"a.png", "e.png"}
    with pytest.raises(UserError, match="no record can stand in for record 1"):
        data.with_picture(1)


def test_a_llama_that_guesses_is_refused_before_stage_1(run, mesh, tmp_path):
    given = {"out": str(tmp_path), **TINY, "data": f"{run}/world/captions.json",
             "images": f"{run}/world/images",
             "val": f"{run}/world/validation_captions.json", "vision": f"{run}/stage0/clip",
             "llm": f"{run}/stage0/llm"}
    o = training.options.complete(given | {"allow_random_llm": False}, 1)
    stage = train.vlm_stage(o)
    model, texts = stage.model, stage.data.text_batches()
    assert sum(b.trained for b in texts) > 100 and all((b.ids >= 0).all() and not len(b.image_at)
                                                       for b in texts)
    torch.nn.init.zeros_(model.llm.lm_head.weight)
    with pytest.raises(UserError, match=r"loss 6\.4\d per token of text is near chance "
                                        r"\(6\.46\): is --llm pretrained\?"):
        training.checks.check_llm(model, texts, mesh)
    ids = torch.cat([b.target[b.target >= 0] for b in texts]).unique()
    known = torch.full((model.cfg.llm.vocab,), 0.0).index_fill(0, ids, 1.0)
    model.loss = lambda batch: torch.nn.functional.cross_entropy(
        # has learnt only which words occur
        (known * 5).expand(len(batch.target), -1), batch.target, reduction="sum")
    training.checks.check_llm(model, texts, mesh)
    for batch in texts:
        batch.target.fill_(IGNORE)
    with pytest.raises(UserError, match="--context is too small for every one of the first 32"):
        training.checks.check_llm(model, texts, mesh)


def test_validation_data_without_an_answer_is_refused_before_the_first_step(run, mesh, tmp_path):
    record = {"conversations": [{"from": "human", "value": "so " * 200},
                                {"from": "gpt", "value": "yes"}]}
    (tmp_path / "v.json").write_text(json.dumps([record] * 3))
    given = stage_2(run, tmp_path, val=str(tmp_path / "v.json"), context=100)
    with pytest.raises(UserError, match="--val: no answer of its first 512 records is within --c"):
        train.run_stage(given, 2, mesh)
    assert not (tmp_path / "stage2/log.jsonl").exists()


@pytest.mark.parametrize("given, words", [
    ({"llm": "no/such"}, "no/such"), ({"vision": "no/such"}, "no/such"),
    ({"guidance_after": 9}, "guidance_after 9"), ({"method": "vlora", "vlora_sites": "qz"}, "qz"),
    ({"weight_source": "lora"}, "must be none"), ({"data": "x.json"}, "needs --images"),
    ({"stage": 1, "llm": "no/such"}, "no/such")])
def test_the_toy_trains_no_stand_ins_for_options_that_do_not_fit(tmp_path, monkeypatch, given,
                                                                 words):
    (tmp_path / "x.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, os.path.join(HERE, "train.py"), *argv, "--device", "cpu"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and re.fullmatch(f"error: .*{words}.*\n", done.stderr), done.stderr
    assert not (tmp_path / "out").exists()


def test_the_memory_of_weights_gradients_and_optimiser_is_foreseen_to_the_byte(run, mesh, tmp_path):
    for tune in ("full", "peft"):
        o = training.options.complete(stage_2(run, tmp_path, tune=tune, dtype="bfloat16"), 2)
        stage = train.vlm_stage(o)
        train.freeze(stage.model, train.TRAINS[2, tune])
        model = training.sharding.shard(stage.model, mesh, torch.bfloat16)
        opts = train.make_optimisers(model, o)
        batch = stage.data.batch(range(4))
        for opt in opts:
            opt.zero_grad = lambda *a: None
        train.train_step(model, opts, [batch], 0, o, mesh)
        local = lambda t: (t.to_local() if hasattr(t, "to_local") else t).numel() * t.element_size()
        real = (sum(local(p) for p in model.parameters()),
                sum(local(p.grad) for p in model.parameters() if p.grad is not None),
                sum(local(t) for opt in opts for kept in opt.state.values() for t in kept.values()))
        assert training.plan.state(model, opts, 1) == real
        parts = [training.plan.state(model, opts, ranks)[0] for ranks in (2, 4)]
        assert real[0] / 2 <= parts[0] <= real[0] / 2 * 1.01 and real[0] / 4 <= parts[1] <= real[
            0] / 4 * 1.02


RANK_3_OF_4 = """
import sys
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
import train, weights, training.sharding
from formats.name_rules import OURS
from formats.weight_files import tensors
from torch.distributed.device_mesh import init_device_mesh
from model import LlamaConfig, VisionConfig, VLMConfig

class Read(TorchDispatchMode):
    numbers = 0  # copied out of tensors of half precision, which are the file's
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        source = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if source is not None and source.dtype == torch.half and isinstance(made, torch.Tensor):
            shared = made.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()
            self.numbers += 0 if made.is_meta or shared else source.numel()
        return made

vision = VisionConfig(width=20, depth=2, heads=2, hidden=80, image_size=56, patch=14)
# Of 402 rows the ranks have 101, 101, 101 and 99; of 9 they have 3, 3, 3 and none
llm = LlamaConfig(width=100, depth=2, heads=10, kv_heads=10, hidden=402, vocab=200)
model = weights.build_empty(VLMConfig(vision, llm, expert_embed=9))
(file, *dims), shapes = sys.argv[1:], {name: p.shape for name, p in model.named_parameters()}
save_file({name: torch.randn(shape).half() for name, shape in shapes.items()}, file)
weights.fill(model, [(file, OURS)])
dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
mesh = init_device_mesh("cpu", tuple(map(int, dims)),
                        mesh_dim_names=("replicate", "shard")[-len(dims):])
train.freeze(model, ("projector.", "llm.layers.1."))
with Read() as read:
    training.sharding.shard(model, mesh, torch.bfloat16)
rows = 0
for name, tensor, _ in tensors(file):
    ranks = int(dims[-1])
    p, mine = model.get_parameter(name), (tensor.chunk(ranks) + (tensor[:0],) * ranks)[ranks - 1]
    assert p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16), name
    assert torch.equal(p.to_local(), mine.to(p.dtype)), name
    rows += mine.numel()
assert 0 < read.numbers == rows, (read.numbers, rows)
print("right")
"""


@pytest.mark.parametrize("dims", [("4",), ("2", "2")], ids=["sharded", "in two copies"])
def test_a_rank_reads_and_casts_its_own_rows_of_the_files_and_no_others(tmp_path, dims):
    """Runs only the last of four ranks."""
    (tmp_path / "rank.py").write_text(RANK_3_OF_4)
    rank = Program(tmp_path / "rank.py", tmp_path / "model.safetensors", *dims)
    assert succeeds(rank)[0] == "right\n"


def test_a_run_that_cannot_fit_is_refused_with_advice(run, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(training.plan, "room", lambda device: 10e6)
    with pytest.raises(UserError, match="needs about 0.[2-9] GB, the cpu has 0.0: "
                                        "a smaller --micro_batch_size"):
        train.run_stage(stage_2(run, tmp_path, batch_size=32), 2, mesh)


# Llama and options of three models whose weights, gradients and optimiser state take a gigabyte or
# more
SIZES = {
    "all of the Llama, twice accumulated": (
        LlamaConfig(width=768, depth=8, heads=12, kv_heads=12, hidden=2048, vocab=8000),
        dict(stage=2, dtype="bfloat16", micro_batch_size=4, batch_size=8)),
    "a frozen Llama": (
        LlamaConfig(width=1280, depth=25, heads=10, kv_heads=5, hidden=3456, vocab=8000),
        dict(stage=2, tune="peft", dtype="bfloat16", micro_batch_size=4, batch_size=4,
             checkpointing="selective")),
    "the projector": (
        LlamaConfig(width=1024, depth=10, heads=8, kv_heads=8, hidden=2816, vocab=64000),
        dict(stage=1, dtype="float32", micro_batch_size=4, batch_size=4, checkpointing="full",
             kernels="eager")),
}


def rehearse(name, out):
    """Print [state, estimate, measured peak over what this process had at first] in bytes of two
    steps of a random model.
    """
    llm, options = SIZES[name]
    os.makedirs(init := os.path.join(out, "init"))
    o = training.options.Options(**options, lr=1e-4, steps=2, out=out, device="cpu", save_every=9,
                                 init=init if options["stage"] == 2 else None,
                                 allow_random_llm=True)
    os.makedirs(training.options.stage_folder(o))
    mesh, before = training.distributed.start_world("cpu"), training.plan.peak("cpu")
    torch.set_default_dtype(getattr(torch, o.dtype))
    vision = VisionConfig(image_size=112, width=256, depth=2, heads=4, hidden=512)
    model = VLM(VLMConfig(vision, llm, language_expert="posterior" if o.stage == 2 else "none"))
    torch.set_default_dtype(torch.float32)

    def sample(i, length=192, answer=48):
        ids = torch.randint(3, llm.vocab, (length,),
                            generator=torch.Generator().manual_seed(i)).numpy()
        ids[1:1 + vision.tokens] = IMAGE
        turn, told = ids * 0, ids * 0 + (range(length) >= ids * 0 + length - answer)
        return Sample(ids, np.where(told, ids, IGNORE), np.where(told, -1, turn), turn, 1, "a.png",
                      f"record {i}", 1)

    class Data:
        lengths, has_image = np.full(16, 192), np.ones(16, bool)
        take_skipped = staticmethod(list)

        def __len__(self):
            return 16

        def sample(self, i):
            return sample(i)

        def is_cut(self, i):
            return False

        def batch(self, rows):
            return collate([sample(i) for i in rows], [torch.randn(3, 112, 112) for _ in rows],
                           None)

    found, foresee = [], training.plan.estimate_memory
    training.plan.estimate_memory = lambda *a: found.append(foresee(*a)) or found[0]
    train.train(train.Stage(model, Data(), [], lambda tensors: None), o, mesh)
    state = found[0].weights + found[0].gradients + found[0].optimiser
    print(json.dumps([state, found[0].total, training.plan.peak("cpu") - before]), flush=True)
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("name", SIZES)
def test_the_memory_of_a_step_is_foreseen_within_15_percent(tmp_path, name):
    code = f"import tests.test_training as t; t.rehearse({name!r}, {str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1",
                               "MALLOC_MMAP_THRESHOLD_": "131072"})
    assert done.returncode == 0, done.stderr[-2000:]
    state, foreseen, measured = json.loads(done.stdout)
    assert state >= 1e9 and abs(foreseen / measured - 1) < 0.15, (state, foreseen, measured)


@pytest.mark.parametrize("eager, trains",
                         [(False, True), (True, True), (False, False), (True, False)])
def test_the_activations_of_a_block_are_what_autograd_keeps(eager, trains):
    cfg = VLMConfig(llm=LlamaConfig(width=64, depth=1, heads=4, kv_heads=2, hidden=160, vocab=10),
                    language_expert="none")
    block = Block(cfg.llm).bfloat16().requires_grad_(trains)
    for part in (block.self_attn, block.input_layernorm, block.post_attention_layernorm):
        part.eager = eager
    x = torch.randn(2, 48, 64, dtype=torch.bfloat16, requires_grad=True)
    kept, own = {}, {p.untyped_storage().data_ptr() for p in block.parameters()}
    keep = lambda t: kept.update({
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        angles = rotary(torch.arange(48)[None], 16, 10000.0)
        out = block(x, *(values.bfloat16() for values in angles))
    real = sum(size for at, size in kept.items() if at not in own)
    batch = training.plan.MicroBatch(2, 48, 0, 0)
    foreseen = (training.plan.activations(cfg, batch, size=2, trains_llm=trains, eager=eager)
                - training.plan.backward(cfg.llm, batch, 2))
    assert out.requires_grad and abs(foreseen / real - 1) < 0.06, (foreseen, real)


@pytest.mark.parametrize("source", ["hyper", "mlp"])
@pytest.mark.parametrize("turns", [1, 20])
def test_an_expert_keeps_the_weights_of_every_turn(source, turns):
    llm = LlamaConfig(width=64, depth=1, heads=4, kv_heads=2, hidden=160, vocab=10)
    kinds = (Expert, HyperNetwork) if source == "hyper" else (MatrixExpert, MatrixNetwork)
    expert, hypernet = kinds[0](64, 64, 64, 8, 16).bfloat16(), kinds[1](64, 64, 8, 16).bfloat16()
    x = torch.randn(2, 48, 64, dtype=torch.bfloat16, requires_grad=True)
    guidance = torch.randn(2, turns, 64, dtype=torch.bfloat16)
    own = {p.untyped_storage().data_ptr() for p in (x, guidance, *expert.parameters(),
                                                   *hypernet.parameters())}
    kept = {}
    keep = lambda t: kept.update({
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        expert(x, expert.weights(guidance, hypernet), torch.arange(96).view(2, 48) % turns)
    real = sum(size for at, size in kept.items() if at not in own)
    shape = training.plan.MicroBatch(2, 48, 0, 0, turns)
    with_expert, without = (training.plan.activations(
        BaselineConfig(llm=llm, language_expert=which, weight_source=source), shape, size=2,
        trains_llm=True) for which in ("all", "none"))
    expected = (with_expert - without) / 3  # twice as much again in the backward pass
    assert abs(expected / real - 1) < 0.15, (expected, real)


@pytest.mark.parametrize("which", ["selective", "full"])
def test_checkpointing_leaves_the_run_as_it_is(run, mesh, tmp_path, which):
    rows = []
    for name in ("none", which):
        trained(stage_2(run, tmp_path / name, steps=2, checkpointing=name), 2, mesh)
        rows.append([(row["loss"], row["grad_norm"]) for row in log_of(tmp_path / name, 2)])
    assert rows[0] == rows[1]


@pytest.mark.parametrize("which, runs", [("none", 4), ("selective", 6), ("full", 8)])
def test_checkpointing_computes_each_second_block_or_all_again(run, mesh, tmp_path, monkeypatch,
                                                               which, runs):
    o = training.options.complete(stage_2(run, tmp_path, checkpointing=which), 2)
    stage, seen, forward = train.vlm_stage(o), [], MLP.forward
    model, opts = train.setup_model(stage.model, o, mesh)
    monkeypatch.setattr(MLP, "forward", lambda self, x: seen.append(self) or forward(self, x))
    train.train_step(model, opts, [stage.data.batch(range(4))], 0, o, mesh)
    assert len(seen) == runs and len(set(seen)) == model.cfg.llm.depth == 4


@pytest.mark.parametrize("stage, tune", [(1, "full"), (2, "full"), (2, "peft")])
def test_the_operations_of_a_step_are_those_that_torch_counts(run, mesh, tmp_path, monkeypatch,
                                                              stage, tune):
    given = stage_2(run, tmp_path, tune=tune, cache_features=False)
    given |= {} if stage == 2 else {"data": f"{run}/world/captions.json",
                                    "val": f"{run}/world/validation_captions.json",
                                    "vision": f"{run}/stage0/clip", "llm": f"{run}/stage0/llm"}
    o = training.options.complete(given, stage)
    built = train.vlm_stage(o)
    model, opts = train.setup_model(built.model, o, mesh)
    monkeypatch.setattr(training.feed, "MULTIPLE", 1)
    batch = built.data.batch([3] * 4)  # without padding
    foreseen, (B, T) = training.costs.step_flops(model.cfg, batch,
                                                 (stage, tune) == (2, "full")), batch.ids.shape
    with FlopCounterMode(display=False) as counter:
        train.train_step(model, [], [batch], 0, o, mesh)
    # half of attention, which is causal
    masked = model.cfg.llm.depth * 3 * 2 * B * T ** 2 * model.cfg.llm.width
    expert = 3 * 2 * B * T * model.cfg.expert_rank * 3 * model.cfg.llm.width
    # every turn's weights are applied, a token's own are needed
    others = len(model.cfg.expert_blocks()) * (batch.turns - 1) * expert
    assert foreseen == pytest.approx(counter.get_total_flops() - masked - others, rel=0.02)


def test_two_batches_are_learnt_by_heart(run, mesh, tmp_path):
    with open(f"{run}/world/instruct.json") as f:
        (tmp_path / "some.json").write_text(json.dumps(json.load(f)[:8]))
    trained(stage_2(run, tmp_path, steps=30, data=str(tmp_path / "some.json"), val_every=100), 2,
            mesh)
    losses = [row["loss"] for row in log_of(tmp_path, 2)]
    assert losses[0] > 3 and max(losses[-2:]) < 0.7


def test_a_loss_that_is_no_number_stops_the_run_before_the_update(run, mesh, tmp_path):
    o = training.options.complete(stage_2(run, tmp_path), 2)
    os.makedirs(training.options.stage_folder(o))
    stage = train.vlm_stage(o)
    loss = stage.model.loss
    stage.model.loss = lambda batch: loss(batch) * float("nan")
    with pytest.raises(UserError, match=r"step 1: loss nan.*record \d+ \(id train_"):
        train.train(stage, o, mesh)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_learning_rate_rises_once_and_falls_to_nothing(schedule):
    o = training.options.Options(steps=1000, schedule=schedule, warmup=0.03)
    rates = [train.schedule(step, o) for step in range(1000)]
    assert rates[30] == max(rates) == 1 and all(a < b for a, b in zip(rates[:29], rates[1:30]))
    assert all(a >= b for a, b in zip(rates[30:], rates[31:])) and rates[-1] < 0.003
    assert rates[0] == (0 if schedule == "cosine" else 1 / 30)


def test_the_stand_in_llama_begins_by_looking_back():
    torch.manual_seed(0)
    llm, T = toy.stand_ins.StandInLlama().llm, 40
    block = llm.layers[0]
    x = block.input_layernorm(llm.embed_tokens(torch.randint(toy.stand_ins.LLAMA.vocab, (8, T))))
    turned = rotary(torch.arange(T)[None], block.self_attn.head_dim, toy.stand_ins.LLAMA.theta)
    q, k = (rotate(p(x).view(8, T, -1, block.self_attn.head_dim).transpose(1, 2), *turned)
            for p in (block.self_attn.q_proj, block.self_attn.k_proj))
    later = torch.ones(T, T).triu(1) > 0
    scores = (q @ k.mT * block.self_attn.head_dim ** -0.5).masked_fill(later, float("-inf"))
    weight = scores.softmax(-1)
    for head in range(toy.stand_ins.LLAMA.heads):
        assert weight[:, head].diagonal(-1 - head, dim1=-2, dim2=-1).mean() > 0.6


MUON_OF_4 = """
import sys, torch, torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
import training.muon as muon, training.distributed
mesh = training.distributed.start_world("cpu", replicate=int(sys.argv[1]))
torch.manual_seed(0)
shapes = (5, 3), (5, 3), (2, 7)  # of 4 ranks some have less, or nothing
values = [(torch.randn(shape), torch.randn(shape)) for shape in shapes]
places = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
whole, parts = [], []
for value, grad in values:
    whole.append(torch.nn.Parameter(value.clone()))
    parts.append(torch.nn.Parameter(distribute_tensor(value, mesh, places)))
    whole[-1].grad, parts[-1].grad = grad.clone(), distribute_tensor(grad, mesh, places)
optimisers = [muon.Muon(params, lr=0.1) for params in (whole, parts)]
for _ in range(2):
    for optimiser in optimisers:
        optimiser.step()
for p, part, (value, _) in zip(whole, parts, values):
    assert not torch.equal(p, value) and torch.equal(part.full_tensor(), p)
    assert isinstance(optimisers[1].state[part]["momentum"], DTensor)
dist.barrier()
"""


@pytest.mark.parametrize("copies", [1, 2])
def test_muon_takes_the_same_step_on_four_ranks_as_on_one(tmp_path, copies):
    (tmp_path / "muon.py").write_text(MUON_OF_4)
    for rank in start_ranks(4, tmp_path / "muon.py", copies):
        succeeds(rank)


def test_muon_on_one_process_takes_the_step_of_torchs_muon():
    torch.manual_seed(0)
    shapes = ((8, 32), (32, 8), (16, 16), (8, 32))
    ours = [torch.nn.Parameter(torch.full(shape, 0.5)) for shape in shapes]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    optimisers = training.muon.Muon(ours, lr=0.1), torch.optim.Muon(theirs, lr=0.1,
                                                                    weight_decay=0.0)
    for _ in range(3):
        for p, q in zip(ours, theirs):
            p.grad = q.grad = torch.randn(p.shape)
        for optimiser in optimisers:
            optimiser.step()
    for p, q in zip(ours, theirs):
        assert torch.allclose(p, q, atol=1e-3) and (p - 0.5).abs().max() > 0.1


def test_muon_makes_the_update_of_each_matrix_orthogonal():
    torch.manual_seed(0)
    wide, tall = torch.nn.Parameter(torch.randn(8, 32)), torch.nn.Parameter(torch.randn(32, 8))
    before = [p.detach().clone() for p in (wide, tall)]
    opt = training.muon.Muon([wide, tall], lr=0.1)
    (wide.sum() + (wide * torch.randn(8, 32)).sum() + (tall * torch.randn(32, 8)).sum()).backward()
    opt.step()
    for p, old, scale in zip((wide, tall), before, (1, 2)):
        values = torch.linalg.svdvals((old - p.detach()) / (0.1 * scale))
        assert values.min() > 0.6 and values.max() < 1.3


def test_mistakes_on_the_command_line_end_in_one_line(run, tmp_path, monkeypatch, capsys):
    for words, expected in [
        (["--stag", "1"], "did you mean --stage?"),
        (["--steps", "many"], "--steps many: expected int"),
        (["--stage", "1", "--out", run], "is finished: --overwrite"),
        (["--stage", "2", "--out", str(tmp_path), "--preset", "7b"], "run --stage 1 first"),
        (["--stage", "1", "--out", str(tmp_path), "--preset", "7b"],
         "needs --vision, --llm, --data, --images"),
        (["--stage", "0", "--preset", "7b"], "expected 1 or 2"),
        (["--stage", "3"], "expected 1 or 2"),
        (["--steps", "0"], "--steps 0: expected more than 0"),
        (["--seed", "-1"], "--seed -1: expected 0 to"),
        (["--part", "clip"], "--part clip: only stage 0 has parts"),
        (["--overwrite"], "--overwrite goes with --stage"),
        (["--stage", "2", "--out", str(tmp_path)], "run --stage 1 first"),
        (["--stage", "1", "--out", run, "--overwrite", "--batch_size", "9", "--micro_batch_size",
          "2", "--pictures", "40"],
         "batch_size 9 is not a multiple"),
        (["--stage", "1", "--out", run, "--overwrite", "--resume", "--pictures", "40"],
         "--resume: no saved state"),
        (["--preset", "9b"], "expected one of toy, 7b, 13b, 1b, 7b-lora, 13b-lora"),
        (["--stage", "1", "--out", run, "--overwrite", "--data", "no.json", "--pictures", "40"],
         "no.json"),
        (["--stage", "1", "--out", run, "--overwrite", "--images", "nowhere", "--pictures", "40"],
         "--images nowhere: folder not found"),
        (["--data", "no.json"], "--data no.json: file not found"),
        (["--out", str(tmp_path), "--resume"], "--resume: no saved state and no finished stage in"),
        (["--stage", "1", "--preset", "7b"],
         "stage 1 with preset 7b needs --vision, --llm, --data, --images"),
    ]:
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        monkeypatch.setattr(train, "start_world", lambda device,
                            replicate: init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match=expected):
            train.run()


@pytest.mark.parametrize("name, value, expected", [
    ("lr", 0.0, "more than 0"), ("lr", float("nan"), "more than 0"),
    ("muon_lr", float("inf"), "0 or more"),
    ("clip", -1.0, "0 or more"), ("warmup", 1.5, "0 to 1"), ("cooldown", -0.1, "0 to 1"),
    ("val_every", 0, "more than 0"), ("workers", -1, "0 or more"),
    ("guidance_after", -1, "0 or more"),
    ("context", 0, "more than 0"), ("vlora_rank", -4, "more than 0"),
    ("expert_embed", 0, "more than 0"),
    ("stage", -1, "1 or 2; the toy also has 0")])
def test_a_number_out_of_range_is_refused_by_name(name, value, expected):
    with pytest.raises(UserError, match=f"^--{name} {value}: expected {expected}$"):
        training.options.Options(**{name: value})


def test_the_ends_of_the_ranges_are_allowed():
    training.options.Options(lr=1e-12, warmup=0.0, cooldown=1.0, workers=0, seed=0,
                             guidance_after=0, steps=1)


def test_out_follows_the_preset():
    for preset in training.options.PRESETS:
        assert training.options.Options(preset=preset).out == os.path.join("out", preset)
    assert training.options.Options(preset="7b", out="runs/a").out == "runs/a"


def rates(preset, **given):
    """(rate of AdamW, of the projector) in stage 2."""
    values = training.options.preset_options(training.options.Options(preset=preset, **given), 2)
    return values["lr"], values.get("projector_lr")


def test_peft_takes_the_rates_of_llavas_lora_with_llavas_presets_only():
    assert rates("7b") == (2e-5, None) and rates("7b", tune="peft") == (2e-4, 2e-5)
    assert rates("1b", tune="peft") == rates("13b-lora") == (2e-4, 2e-5)
    assert rates("toy", tune="peft") == (2e-3, None)


def test_the_projector_and_its_expert_have_a_rate_of_their_own(run, mesh, tmp_path):
    """AdamW's first step moves every number by the rate, whatever its gradient."""
    options = dict(tune="peft", steps=1, lr=1e-3, projector_lr=1e-5, warmup=0.0, muon_lr=0.0)
    before, after = trained(stage_2(run, tmp_path, **options), 2, mesh)
    for name, old in before.items():
        step = (after[name] - old).abs().max().item()
        if name.startswith("projector."):
            assert 0 < step < 2e-5, name
        elif name.startswith("llm.") and step:
            assert 5e-4 < step < 2e-3, name


def test_presets_of_lora_are_neither_for_vlora_nor_for_the_whole_llama():
    for option, message in (({"method": "vlora"}, "--preset 7b-lora is no preset of --method vl"),
                            ({"tune": "full"}, "rates of LoRA, .* use 7b")):
        with pytest.raises(UserError, match=message):
            training.options.complete({"preset": "7b-lora", **option}, 1)
    training.options.check_method({"preset": "7b-lora", "lora_dropout": 0.1}, "hyperllava")
    with pytest.raises(UserError, match="--lora_dropout goes with --weight_source lora"):
        training.options.check_method({"preset": "7b", "lora_dropout": 0.1}, "hyperllava")


def test_training_goes_on_with_the_guidance_of_its_checkpoint(run, mesh, tmp_path):
    first = stage_2(run, tmp_path / "one", steps=1, guidance_pool="last")
    train.run_stage(first, 2, mesh)
    more = stage_2(run, tmp_path / "two", steps=1) | {"init": str(tmp_path / "one" / "stage2")}
    with pytest.raises(UserError, match="trained with --guidance_pool last, not instruction"):
        train.run_stage(more, 2, mesh)
    train.run_stage(more | {"guidance_pool": "last"}, 2, mesh)
    plain = stage_2(run, tmp_path / "plain", steps=1, language_expert="none")
    train.run_stage(plain, 2, mesh)  # it has no guidance of the Llama: any may follow
    after = stage_2(run, tmp_path / "after") | {"init": str(tmp_path / "plain/stage2")}
    train.build_model(training.options.complete(after | {"guidance_pool": "last"}, 2))


def test_the_help_names_the_values_of_every_preset_in_80_columns():
    lines = training.options.Options.help_epilog().splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    for tables in (training.options.PRESETS, training.options.VLORA_PRESETS):
        for stages in tables.values():
            for values in stages.values():
                assert ", ".join(f"{name}={value!r}" for name, value in values.items()) in text


def made_up_lengths(n):
    """(tokens, words, whether there is a picture) of n samples, as different as in LLaVA's 665K."""
    rng = np.random.default_rng(0)
    pictured = rng.random(n) < 0.94
    text = np.where(pictured, np.exp(rng.normal(5.0, 0.8, n)),
                    np.exp(rng.normal(6.3, 0.8, n))).astype(int) + 10
    tokens = np.minimum(text + 576 * pictured, 2048)
    return tokens, (text * rng.uniform(0.6, 0.9, n)).astype(int), pictured


def padding_of(tokens, batches):
    places = sum(len(b) * -(-int(tokens[b].max()) // MULTIPLE) * MULTIPLE for b in batches)
    return 1 - sum(int(tokens[b].sum()) for b in batches) / places


def test_the_order_by_length_leaves_little_padding():
    tokens, words, pictured = made_up_lengths(n := 20000)
    ours = BatchSampler(n, 0, 128, words, pictured)
    steps = ours.epoch(0)[:n // 128 * 128].reshape(-1, 128)
    assert 0.05 < padding_of(tokens, steps.reshape(-1, 16)) < 0.075
    together = BatchSampler(n, 0, 128, words).epoch(0)[:len(steps) * 128]  # the modalities
    assert padding_of(tokens, together.reshape(-1, 16)) > 0.085
    kinds = pictured[steps].mean(1)
    assert ((kinds > 0) & (kinds < 1)).sum() == 1 and 0.03 < (kinds == 0).mean() < 0.09
    assert sorted(ours.epoch(3)) == [*range(n)] and (ours.epoch(3) != ours.epoch(0)).any()
    assert ours.step(len(steps) + 5) == BatchSampler(n, 0, 128, words,
                                                     pictured).step(len(steps) + 5)


def test_the_order_by_modality_keeps_pictures_and_text_apart_and_is_random_within_them():
    tokens, words, pictured = made_up_lengths(n := 20000)
    ours = BatchSampler(n, 0, 128, None, pictured)
    for epoch in (0, 1):
        assert sorted(ours.epoch(epoch)) == [*range(n)]
    assert (ours.epoch(0) != ours.epoch(1)).mean() > 0.99
    steps = ours.epoch(0)[:n // 128 * 128].reshape(-1, 128)
    kinds = pictured[steps].mean(1)
    assert set(kinds[:-1]) == {0, 1} and 0 < kinds[-1] < 1  # what is left of both comes last
    assert 0.03 < (kinds == 0).mean() < 0.09 and (kinds[:len(kinds) // 2] == 0).any()
    # a step's mean length scatters as that of random samples does, not as with order length
    scatter = tokens[steps[kinds == 1]].mean(1).std() / (tokens[pictured].std() / 128 ** 0.5)
    assert 0.85 < scatter < 1.15


def test_dealing_finds_the_smallest_largest_micro_batch():
    rng = np.random.default_rng(0)
    for n, parts in ((6, 1), (6, 3), (7, 4), (8, 8), (9, 2)):
        for _ in range(20):
            sizes = rng.integers(1, 12, n)
            dealt = deal(sizes, parts)
            assert sorted(np.concatenate(dealt)) == [*range(n)]
            assert len(dealt) == parts and all(map(len, dealt))
            largest = lambda batches: max(len(b) * max(b) for b in batches)
            falling = sorted(sizes, reverse=True)
            cuts = ([0, *inner, n] for inner in itertools.combinations(range(1, n), parts - 1))
            best = min(largest([falling[i:j] for i, j in zip(cut, cut[1:])]) for cut in cuts)
            assert largest([sizes[part] for part in dealt]) == best


class Sizes:
    """Data whose samples have so many positions and no content."""

    def __init__(self, tokens, pictured):
        self.lengths, self.has_image = 4 * tokens, pictured
        self.ids = [np.full(n, IMAGE) for n in tokens]

    def __len__(self):
        return len(self.ids)

    def sample(self, i):
        turn = np.zeros_like(self.ids[i])
        return Sample(self.ids[i], self.ids[i], turn, turn, 1, None, f"record {i}")

    batch, take_skipped = staticmethod(list), staticmethod(list)


@pytest.mark.parametrize("batch_size, micro, ranks", [(128, 16, (1, 2, 8)), (128, 4, (1, 2, 8)),
                                                      (24, 4, (1, 2, 3))])
def test_a_step_has_the_same_micro_batches_on_any_number_of_ranks(monkeypatch, batch_size, micro,
                                                                  ranks):
    tokens, words, pictured = made_up_lengths(3000)
    o = training.options.Options(stage=2, order="modality", batch_size=batch_size, steps=20,
                                 micro_batch_size=micro)
    for world in ranks:
        monkeypatch.setattr(dist, "get_world_size", lambda: world)
        found = [[] for _ in range(o.steps)]
        for rank in range(world):
            monkeypatch.setattr(dist, "get_rank", lambda: rank)
            dataset = TrainDataset(Sizes(tokens, pictured), o)
            assert len(dataset) == o.steps * batch_size // micro // world
            for k in range(len(dataset)):
                found[k // dataset.accumulation].append(tuple(dataset[k][0]))
        for step, batches in enumerate(found):
            rows = sum(batches, ())
            assert (sorted(rows) == sorted(dataset.sampler.step(step))
                    and len(set(rows)) == len(rows))
        found = [sorted(batches) for batches in found]
        expected = found if world == ranks[0] else expected
        assert found == expected
    assert max(len(batch) for step in found for batch in step) > micro  # of short samples
    share = padding_of(tokens, [list(batch) for step in found for batch in step])
    assert share < 0.1 and padding_of(tokens, np.reshape(
        [dataset.sampler.step(step) for step in range(o.steps)], (-1, micro))) > 2 * share


def test_the_plan_foresees_the_largest_micro_batch_of_the_run(mesh):
    tokens, words, pictured = made_up_lengths(6400)
    o = training.options.Options(stage=2, order="modality", batch_size=64, micro_batch_size=8,
                                 steps=100)
    data = Sizes(tokens, pictured)
    dataset, shape = TrainDataset(data, o), training.plan.MicroBatch.of
    typical, longest = training.plan.typical_and_longest(dataset, o)
    foreseen = max(shape(batch).tokens for batch in typical + longest)
    real = [shape([data.sample(i) for i in rows]).tokens
            for step in range(o.steps) for rows in dataset.micro_batches(step)]
    assert len(typical) == 128 and 0.97 * max(real) < foreseen <= max(real)
    assert max(real) < 0.9 * 8 * tokens.max()  # a longest sample has few others beside it


def test_the_plan_tells_the_padding_of_the_run(run, mesh, tmp_path):
    data = json.load(open(f"{run}/world/instruct.json"))
    for record in data[::3]:
        record.pop("image")
        for message in record["conversations"]:
            message["value"] = message["value"].replace("<image>", "").strip()
    json.dump(data, open(tmp_path / "data.json", "w"))
    o = training.options.complete(
        stage_2(run, tmp_path, data=str(tmp_path / "data.json"), steps=20, batch_size=8,
                micro_batch_size=4), 2)
    data = train.vlm_stage(o).data
    dataset = TrainDataset(data, o)
    assert dataset.sampler.has_image.tolist() == [i % 3 > 0 for i in range(40)]
    batches = [dataset[k][0] for k in range(len(dataset))]
    real = 1 - sum(b.lengths.sum().item() for b in batches) / sum(b.ids.numel() for b in batches)
    typical, _ = training.plan.typical_and_longest(dataset, o)
    assert training.plan.share_of_padding(typical) == pytest.approx(real) and 0 < real < 0.5


def test_the_plan_tells_how_many_samples_the_context_cuts(run, mesh, tmp_path, capsys):
    records = json.load(open(f"{run}/world/instruct.json"))[:8]
    records[3]["conversations"] = records[3]["conversations"][:2] + [
        {"from": "human", "value": "Again?"}, {"from": "gpt", "value": "red" + " red" * 250}]
    json.dump(records, open(tmp_path / "data.json", "w"))
    o = training.options.complete(stage_2(run, tmp_path, data=str(tmp_path / "data.json")), 2)
    stage = train.vlm_stage(o)
    assert [stage.data.is_cut(i) for i in range(8)] == [i == 3 for i in range(8)]
    model, opts = train.setup_model(stage.model, o, mesh)
    training.plan.print_plan(model, opts, stage, o, True)
    assert "  cut by the context: 1 of 8 samples" in capsys.readouterr().err


def test_own_data_in_the_toy_needs_neither_its_world_nor_its_validation_data(tmp_path, mesh,
                                                                             monkeypatch):
    for name in ("init", "images"):
        (tmp_path / name).mkdir()
    (tmp_path / "init" / "config.json").write_text("{}")
    (tmp_path / "d.json").write_text("[]")
    own = {"out": str(tmp_path / "out"), "data": str(tmp_path / "d.json"),
           "init": str(tmp_path / "init")}
    with pytest.raises(UserError, match="stage 2 with preset toy needs --images"):
        training.options.complete(own, 2)
    own["images"] = str(tmp_path / "images")
    assert training.options.complete(own, 2).val is None
    assert training.options.complete(own | {"val": own["data"]}, 2).val == own["data"]
    drawn = []
    monkeypatch.setattr(train.toy, "make_world", lambda out, pictures: drawn.append(out))
    monkeypatch.setattr(train, "start_world", lambda device, replicate: mesh)
    monkeypatch.setattr(train, "run_stage", lambda *a: None)
    parts = ["--vision=v", "--llm=l"]
    for stage, words, world in ((2, [], False), (1, parts, False), (1, [], True), (0, [], True)):
        words = [f"--stage={stage}", *(f"--{k}={v}" for k, v in own.items()), *words]
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        monkeypatch.setattr(train, "run_parts_in_parallel", lambda *a: None)
        train.run()
        assert bool(drawn) == world
        drawn.clear()


def test_what_is_behind_transparency_is_chosen_in_training_and_kept(run, mesh, tmp_path):
    def stage_of(out, **more):
        o = training.options.complete(stage_2(run, tmp_path / out, **more), 2)
        return train.vlm_stage(o)

    stage = stage_of("b", background="white")
    assert stage.data.load_picture.preprocess.background == "white"
    stage.write({name: p.detach() for name, p in stage.model.named_parameters()})
    saved = f"{tmp_path}/b/stage2"
    assert weights.load(saved).preprocess.background == "white"
    assert stage_of("c", init=saved).data.load_picture.preprocess.background == "white"
    config = json.load(open(f"{saved}/config.json"))
    del config["preprocess"]["background"]  # from before there was a choice
    json.dump(config, open(f"{saved}/config.json", "w"))
    assert weights.load(saved).preprocess.background == "none"


def test_a_checkpoint_that_was_set_aside_counts_as_finished(run, tmp_path):
    shutil.copytree(f"{run}/stage1", tmp_path / "stage1.old")
    assert training.options.finished(str(tmp_path),
                                     1) and not training.options.finished(
                                     str(tmp_path), 2) and not training.options.finished(
                                     str(tmp_path), 0)
    with pytest.raises(UserError, match="stage1 is finished"):
        training.parts.check_options({"stage": 1, "out": str(tmp_path)})


def test_compile_without_a_compiler_is_one_clear_line(run, mesh, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError,
                       match=r"--compile needs a compiler, and g\+\+ is not there: install one"):
        training.options.complete(stage_2(run, tmp_path, compile=True), 2)
    training.options.complete(stage_2(run, tmp_path), 2)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None,
                    reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_as_plain_ones(run, mesh, tmp_path, monkeypatch):
    # no pool of processes forked from this one and its threads
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    rows = []
    for name, more in (("plain", {}), ("compiled", {"compile": True, "checkpointing": "full"})):
        train.run_stage(stage_2(run, tmp_path / name, steps=3, cache_features=False, val_every=1,
                                **more), 2, mesh)
        rows.append([(row["loss"], row["grad_norm"], row["val_loss"])
                     for row in log_of(tmp_path / name, 2)])
    assert np.allclose(rows[0], rows[1], rtol=1e-4)
    assert rows[0] != rows[1]  # other kernels did it


@pytest.mark.slow
def test_the_main_job_runs_from_nothing_to_scores(tmp_path):
    words = ("--pictures", 20, "--steps", 4, "--batch_size", 8, "--allow_random_llm", "--out",
             tmp_path)
    succeeds(Program("train.py", *words))
    scores = json.load(open(tmp_path / "scores.json"))
    assert scores["splits"].keys() == {"heldout", "combination", "shuffled", "majority",
                                       "experts_off", "experts_swapped"}
    assert set(scores["splits"]["heldout"]["families"]) == set(toy.world.FAMILIES) and (
        tmp_path / "gallery.png").exists()
    before = os.path.getmtime(tmp_path / "stage2" / "config.json")
    (tmp_path / "stage1" / "state" / "step_000002").mkdir(parents=True)  # left by a kill
    assert succeeds(Program("train.py", *words))[1].count("is finished, skipped") == 4
    assert not (tmp_path / "stage1" / "state").exists()
    assert os.path.getmtime(tmp_path / "stage2" / "config.json") == before

    picture = next((tmp_path / "world" / "images").iterdir())
    asked = succeeds(Program("sample.py", "--model", tmp_path / "stage2", "--image", picture,
                             "--prompt", "How many things are there?"))
    assert asked[0].endswith("\n")


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_as_one(run, tmp_path):
    words = ["--stage", "1", "--steps", "3", "--batch_size", "8", "--dtype", "float32",
             "--pictures", "40", "--allow_random_llm"]
    losses = []
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        os.makedirs(out)
        os.symlink(f"{run}/stage0", out / "stage0")
        for rank in start_ranks(ranks, "train.py", *words, "--out", out):
            succeeds(rank)
        losses.append([(r["loss"], r["grad_norm"]) for r in log_of(out, 1)])
    assert torch.allclose(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-4)


def launch(ranks, *words):
    """Start train.py under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               str(ranks)]
    return subprocess.Popen([*command, os.path.join(HERE, "train.py"), *map(str, words)],
                            stderr=subprocess.PIPE, text=True,
                            # whatever the host is called
                            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})


def rank_of(process, rank):
    """The id of a rank's process under torchrun."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            parent = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[1]
            if parent == str(process.pid) and f"RANK={rank}" in open(
                f"/proc/{pid}/environ").read().split("\0"):
                return int(pid)


def wait_for(process, out, lines):
    """Wait until the log of stage 2 has so many whole lines."""
    log, began = os.path.join(out, "stage2", "log.jsonl"), time.time()
    while not os.path.exists(log) or open(log).read().count("\n") < lines:
        assert process.poll() is None and time.time() - began < 200, (
            process.kill(), process.communicate(timeout=60)[1][-2000:])
        time.sleep(0.05)


@pytest.mark.slow
def test_a_state_of_two_ranks_goes_on_on_one_and_on_two_by_two_and_a_rank_that_dies_ends_the_other(
    run, mesh, tmp_path):
    given = stage_2(run, tmp_path / "two", preset="1b", batch_size=8, micro_batch_size=2, steps=200,
                    lr=1e-3, workers=0, keep=9,
                    save_every=4, val_every=1000, system="", expert_embed=16) | {"muon_lr": None}
    process = launch(2, *words_of(given))
    wait_for(process, tmp_path / "two", 26)
    os.kill(rank_of(process, 1), signal.SIGKILL)
    began = time.time()
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and time.time() - began < 60
    assert text.count("error: rank 0 stops because another rank is gone") == 1
    assert "Signal 9 (SIGKILL) received" in text
    saved = training.state.saved_steps(tmp_path / "two" / "stage2" / "state")
    assert saved[:6] == [4, 8, 12, 16, 20, 24]

    for name in ("one", "two_by_two"):
        shutil.copytree(tmp_path / "two", tmp_path / name)
        for step in saved[1:]:
            shutil.rmtree(tmp_path / name / "stage2" / "state" / f"step_{step:06d}")
        log = tmp_path / name / "stage2" / "log.jsonl"
        log.write_text("".join(open(log).readlines()[:4]))
    assert stopped(given | {"out": str(tmp_path / "one"), "resume": True}, mesh, signal.SIGTERM,
                   22) == 0
    process = launch(4, *words_of(
        given | {"out": str(tmp_path / "two_by_two"), "resume": True, "replicate": 2}))
    wait_for(process, tmp_path / "two_by_two", 26)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=120)[1]
    assert "4 processes on CPU in 2 copies, micro-batch 2" in text and text.count(
        "stopped by SIGTERM after step") == 1

    rows = [[r["loss"] for r in log_of(tmp_path / name, 2)[4:25]]
            for name in ("two", "one", "two_by_two")]
    for other in rows[1:]:
        assert len(other) == 21 and other[0] == pytest.approx(
            rows[0][0], rel=1e-6) and other == pytest.approx(rows[0], rel=1e-4)
    assert rows[0][0] - rows[0][-1] > 0.1  # something was learnt meanwhile


def start_parts(threads, out, steps, **more):
    """Start stage 0; its parts run side by side if there are two threads."""
    given = TINY | {"stage": 0, "steps": steps, "save_every": 1, "pictures": 40, "device": "cpu",
                    "out": out, **more}
    return subprocess.Popen([sys.executable, os.path.join(HERE, "train.py"), *words_of(given)],
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": str(threads)})


@pytest.mark.slow
def test_the_parts_of_stage_0_run_side_by_side_end_together_and_are_those_made_one_after_the_other(
    tmp_path):
    out = tmp_path / "beside"
    logs = [out / "stage0" / part / "log.jsonl" for part in training.options.PARTS]
    lines = lambda log: log.read_text().count("\n") if log.exists() else 0
    turns = start_parts(1, tmp_path / "turns", 6)
    text = turns.communicate(timeout=200)[1]
    assert turns.returncode == 0, text[-2000:]

    def under_way(process):  # both parts have taken a step
        began = time.time()
        while not all(lines(log) > before for log, before in zip(logs, had)):
            assert process.poll() is None and time.time() - began < 200, (
                process.kill(), process.communicate(timeout=60)[1][-2000:])
            time.sleep(0.01)

    had = [0, 0]
    process = start_parts(2, out, 400)
    under_way(process)
    process.terminate()
    text = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and text.count(
        "stopped by SIGTERM after step") == 2 and "leaked" not in text
    text = start_parts(2, out, 400).communicate(timeout=60)[1]
    assert text.count("error: ") == 1 and "--resume goes on with it" in text

    had = [lines(log) for log in logs]
    process = start_parts(2, out, 400, resume=True)
    under_way(process)
    process.kill()
    process.communicate(timeout=60)  # a child that lived on would keep its end of the pipe open
    assert all(training.state.saved_steps(log.parent / "state") for log in logs)

    done = start_parts(2, out, 6, overwrite=True)
    text = done.communicate(timeout=200)[1]
    assert done.returncode == 0, text[-2000:]
    for part in training.options.PARTS:
        files = [(folder / "stage0" / part / "model.safetensors").read_bytes()
                 for folder in (tmp_path / "turns", out)]
        assert files[0] == files[1]


@pytest.mark.slow
def test_a_part_that_fails_ends_the_other_and_so_does_ctrl_c_at_the_start(tmp_path):
    # a folder where a file should be
    os.makedirs(tmp_path / "stage0" / "llm" / "log.jsonl")
    process = start_parts(2, tmp_path, 400)
    text = process.communicate(timeout=100)[1]
    assert process.returncode == 1 and text.count("error: ") == 1 and "log.jsonl" in text.partition(
        "error: ")[2]
    # it was ended, too
    assert not (tmp_path / "stage0" / "clip" / "config.json").exists()

    shutil.rmtree(tmp_path / "stage0")
    process = start_parts(2, tmp_path, 400)
    while process.poll() is None and not open(
        f"/proc/{process.pid}/task/{process.pid}/children").read():
        time.sleep(0.1)  # until it starts the parts
    time.sleep(4)
    # perhaps before the parts can save: no traceback all the same
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=100)[1]
    assert process.returncode == 130 and "stopped by SIGINT" in text and "Traceback" not in text


def sleep_or_die(given, stage, mesh, place):
    """Stands in for train.run_stage in the next test."""
    if given["part"] == "llm":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(200)


@pytest.mark.slow
def test_the_part_that_was_killed_is_named_though_the_other_part_is_ended_too(mesh, tmp_path,
                                                                              capfd):
    runs = [{"out": str(tmp_path), "part": part} for part in training.options.PARTS]
    with pytest.raises(UserError, match="^stage 0 llm was ended by SIGKILL$"):
        training.parts.run_parts_in_parallel(sleep_or_die, runs, 0)


# what a run of all stages leaves, one after the other
UNITS = ("stage0/clip", "stage0/llm", "stage1", "stage2")


@pytest.mark.slow
def test_twelve_kills_at_random_times_in_all_stages_lose_nothing(tmp_path):
    given = TINY | {"stage": None, "steps": 20, "save_every": 1, "pictures": 16, "val_every": 8,
                    "out": tmp_path / "quiet"}
    succeeds(Program("train.py", *words_of(given)))
    out, rng = tmp_path / "loud", random.Random(0)

    def kept(unit):  # steps that will not be taken again
        return 20 if os.path.exists(out / unit / "config.json") else max(
            training.state.saved_steps(out / unit / "state"), default=0)

    for unit in (unit for unit in UNITS for _ in range(3)):
        process = Program("train.py", *words_of(given | {"out": out, "resume": out.exists()}))
        due, began = kept(unit) + rng.choice([1, 2, 3]), time.time()
        while process.poll() is None and kept(unit) < min(due, 20) and time.time() - began < 200:
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        assert process.poll() is None, process.communicate()[1][-2000:]
        process.kill()
        process.communicate()
        assert kept(unit) >= min(due, 20)
    succeeds(Program("train.py", *words_of(given | {"out": out, "resume": True})))
    for unit in UNITS:
        logs = [[json.loads(line) for line in open(tmp_path / name / unit / "log.jsonl")]
                for name in ("quiet", "loud")]
        rows = [[(r["step"], r["loss"], r["grad_norm"], r.get("val_loss")) for r in log]
                for log in logs]
        assert rows[0] == rows[1] and len(rows[0]) == 20
        files = [open(tmp_path / name / unit / "model.safetensors", "rb").read()
                 for name in ("quiet", "loud")]
        assert files[0] == files[1] and not (out / unit / "state").exists()


@pytest.mark.slow
def test_a_day_in_miniature(run, tmp_path):
    toy.files.write_world(str(tmp_path / "world"), pictures=150, texts=50, test_pictures=20)
    pictured, texts = (json.load(open(tmp_path / "world" / name))
                       for name in ("instruct.json", "text.json"))
    # texts are grouped: whole steps have no picture
    json.dump(pictured + texts, open(tmp_path / "world" / "data.json", "w"))
    given = stage_2(run, tmp_path / "quiet", preset="1b", steps=150, batch_size=2,
                    micro_batch_size=1, val_every=75, save_every=40,
                    lr=1e-3, muon_lr=None, checkpointing="none", workers=1, system="",
                    expert_embed=16, data=tmp_path / "world/data.json",
                    val=tmp_path / "world/validation.json", images=tmp_path / "world/images")
    # on one rank, which is the same and takes less time
    succeeds(Program("train.py", *words_of(given)))

    (tmp_path / "world" / "images" / pictured[1]["image"]).write_bytes(b"no picture")
    given |= {"out": tmp_path / "loud", "skip_bad_images": True}
    ranks = start_ranks(2, "train.py", *words_of(given))
    wait_for(ranks[0], tmp_path / "loud", 60)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    text = "".join(succeeds(rank, 60)[1] for rank in ranks)
    assert text.count("stopped by SIGTERM after step") == 1
    ranks = start_ranks(2, "train.py", *words_of(given | {"resume": True}))
    text = "".join(succeeds(rank, 600)[1] for rank in ranks)
    assert "pictures could not be read" in text, text[-2000:]

    quiet, loud = log_of(tmp_path / "quiet", 2), log_of(tmp_path / "loud", 2)
    assert [row["step"] for row in loud] == [row["step"] for row in quiet] == [*range(1, 151)]
    assert 1 <= loud[-1]["skipped_images"] <= 2  # one of 200 records, 300 samples
    last = lambda rows: sum(row["loss"] for row in rows[-50:]) / 50
    assert last(quiet) < 1 and abs(last(loud) - last(quiet)) < 0.1
    assert loud[-1]["val_loss"] == pytest.approx(quiet[-1]["val_loss"], rel=0.1)


@pytest.mark.slow
def test_two_ranks_end_together(run, tmp_path):
    given, record = damaged(run, tmp_path)
    given |= {"pictures": 40, "cache_features": False, "workers": 1}
    began = time.time()
    failed = launch(2, *words_of({k: v for k, v in given.items() if v is not False}),
                    "--no_cache_features")
    text = failed.communicate(timeout=170)[1]
    assert failed.returncode == 1 and text.count(
        "unreadable picture") == 1 and "Traceback" not in text.split("error:")[0]
    assert record["image"] in text and time.time() - began < 170

    out = tmp_path / "stopped"
    # the worker gets the signal, too
    process = launch(2, *words_of(stage_2(run, out, steps=500, pictures=40, workers=1)))
    wait_for(process, out, 3)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[1]
    assert text.count("stopped by SIGTERM after step") == 1
    assert training.state.saved_steps(out / "stage2" / "state") == [len(log_of(out, 2))]
    succeeds(Program("train.py", *words_of(
        stage_2(run, out, steps=len(log_of(out, 2)) + 2, pictures=40, resume=True))))
