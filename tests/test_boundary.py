"""experiments/boundary.py: fair sizes, the same task for all, what is hidden, a stopped run."""
import collections
import json
import math

import pytest
import torch

import experiments.boundary as boundary
from cli import UserError
from experiments.boundary import (batch_of, build, cell, config, CONTROLS, difference, frequent,
                                  GATES, GATES_MORE, GENERATED, grid, GUIDED, Learner, LORA,
                                  make_rows, Options, operations, OPERATIONS, parameters,
                                  PARAMETERS, plain, pooled, replace, ROWS, Run, Runs, SCORED,
                                  sized, STATIC, TOLD, TOLD_MORE, TUNING, UNIT)
from formats.export import write_llama
from formats.tokenizer import train_tokenizer
from model import Llama, LlamaConfig
from tests.helpers import count_flops
from toy.stand_ins import LLAMA, static

WORDS = train_tokenizer([f"{a}{b}{c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"],
                        340)
SMALL = LlamaConfig(width=32, depth=4, heads=4, kv_heads=2, hidden=48, vocab=WORDS.vocab)
POINTS = [p for p in grid(Options()) if p.maps == 32]  # the number of maps changes no size
UNGUIDED = (STATIC, PARAMETERS, OPERATIONS, LORA)
FEW = Run(maps=4, rank=2, embed=4, steps=3, rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random Llama in Hugging Face's layout."""
    torch.manual_seed(0)
    llama = Llama(static(SMALL))
    for p in llama.parameters():
        torch.nn.init.normal_(p, std=(2 / p.shape[-1]) ** 0.5) if p.ndim == 2 else None
    path = str(tmp_path_factory.mktemp("llama"))
    write_llama(path, llama.state_dict(), SMALL, WORDS)
    return path


def size(measure, point, row):
    """A measure of a row at a point, on the toy's Llama."""
    return measure(sized(LLAMA, cell(point, row)), row)


def random_learner(run, folder):
    """A Learner whose adapters have random weights everywhere."""
    learner = Learner(run, folder)
    for p in learner.trained:
        torch.nn.init.normal_(p, std=0.5)
    return learner


@pytest.mark.parametrize("row, measure", [(PARAMETERS, parameters), (OPERATIONS, operations),
                                          (GATES_MORE, parameters), (TOLD_MORE, parameters)])
def test_rows_of_equal_size_have_it_within_2_percent_or_half_a_rank(row, measure):
    for point in POINTS:
        wanted = size(measure, point, GENERATED)
        rel = 0.02 if point.rank > 2 else 0.03  # half a rank of 15
        assert size(measure, point, row) == pytest.approx(wanted, rel=rel), point


@pytest.mark.parametrize("row", [UNIT, STATIC, TOLD, GATES])
def test_rows_of_the_same_rank_cost_the_same_on_a_further_token(row):
    for point in POINTS:
        cfg = sized(LLAMA, cell(point, row))
        assert cfg.expert_rank == point.rank
        assert operations(cfg, row, 1, 0) == size(
            lambda cfg, row: operations(cfg, row, 1, 0), point, GENERATED)


def test_lora_has_equal_parameters_up_to_half_a_rank():
    one, two = (parameters(config(LLAMA, Run(LORA), r, "lora"), LORA) for r in (1, 2))
    for point in POINTS:
        ours = size(parameters, point, GENERATED)
        sites = 1 if point.sites == "half" else 2
        assert abs(size(parameters, point, LORA) - ours) <= (two - one) / 2 / sites


@pytest.mark.parametrize("row", ROWS)
def test_sizes_are_those_of_the_model(row):
    cfg = sized(LLAMA, Run(row, rank=4))
    llama, x = build(cfg, row), torch.zeros(1, 3, LLAMA.width)
    added = sum(p.numel() for p in llama.parameters()) - sum(
        p.numel() for p in plain(LLAMA).parameters())
    assert added == parameters(cfg, row)
    counts = [count_flops(lambda: model(x, batch_of(1)), model)["Global"]
              for model in (llama, plain(LLAMA))]
    found = sum(counts[0].values()) - sum(counts[1].values())
    pooling = 2 * 3 * LLAMA.width if row in GUIDED else 0  # left out, as in training/costs.py
    assert found == operations(cfg, row) + pooling


def test_one_site_is_the_last_block():
    for row in ROWS:
        names = [name for name, _ in build(
            sized(LLAMA, Run(row, sites="last")), row).named_parameters()
                 if "expert" in name or "lora" in name]
        assert names and all(name.startswith("layers.3.") for name in names)


def test_names_are_no_symbols_and_maps_are_permutations():
    ids, answers = make_rows(Run(maps=16, seed=3), 400)
    names, symbols = ids[:, 1].unique(), ids[:, 2].unique()
    assert len(names) == len(symbols) == 16 and not set(names.tolist()) & set(symbols.tolist())
    assert ids[:, 1:].min() >= 259
    maps = {name: answers[ids[:, 1] == name] for name in names.tolist()}
    assert all(torch.equal(values.unique(), symbols) for values in maps.values())
    assert len({tuple(values.tolist()) for values in maps.values()}) == 16
    fewer = make_rows(Run(maps=4, seed=3), 400)
    assert torch.equal(fewer[0], ids[:64]) and torch.equal(fewer[1], answers[:64])


def test_the_best_accuracy_without_the_name_is_that_of_the_most_frequent_answers():
    run = Run(maps=8, seed=3)
    ids, answers = make_rows(run, 400)
    counts = collections.Counter(zip(ids[:, 2].tolist(), answers.tolist()))
    right = sum(max(n for (x, _), n in counts.items() if x == symbol)
                for symbol in ids[:16, 2].tolist())
    assert frequent(run, 400) == pytest.approx(100 * right / len(ids))
    assert frequent(replace(run, maps=1), 400) == 100


def test_a_tokenizer_that_is_too_small_ends_in_one_line():
    with pytest.raises(UserError, match="64 maps need 339 tokens, the tokenizer has 300"):
        make_rows(Run(maps=64), 300)


def test_rows_of_a_seed_see_the_same_maps_and_batches(folder):
    learners = [Learner(replace(FEW, row=row), folder) for row in ROWS]
    drawn = [[learner.draw() for _ in range(3)] for learner in learners]
    for learner, batches in zip(learners, drawn):
        assert torch.equal(learner.ids, learners[0].ids)
        assert torch.equal(learner.answers, learners[0].answers)
        assert all(map(torch.equal, batches, drawn[0]))
    other = Learner(replace(FEW, seed=5), folder)
    assert not torch.equal(other.answers, learners[0].answers)
    assert not torch.equal(other.draw(), drawn[0][0])


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_only_guidance_can_tell_a_hidden_name(folder, row, hidden):
    learner = random_learner(replace(FEW, row=row, hidden=hidden), folder)
    with torch.no_grad():
        logits = learner.logits(torch.arange(len(learner.ids))).view(4, 16, -1)
    same = torch.equal(logits, logits[:1].expand_as(logits))
    assert same == (hidden and row in UNGUIDED)
    assert (logits[0] - logits[1]).abs().max() > 1e-3 or same
    assert not torch.allclose(logits[:, 0], logits[:, 1])  # x is always seen


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("row", ROWS)
def test_attention_does_not_see_a_hidden_name(folder, monkeypatch, row, hidden):
    monkeypatch.setattr("model.pool", lambda x, pool_id, turns: torch.ones(
        len(x), turns, x.shape[-1]))  # the same guidance for all names
    learner = random_learner(replace(FEW, row=row, hidden=hidden), folder)
    with torch.no_grad():
        logits = learner.logits(torch.arange(len(learner.ids))).view(4, 16, -1)
    assert torch.allclose(logits, logits[:1].expand_as(logits)) == hidden


@pytest.mark.parametrize("row", [GENERATED, LORA])
@pytest.mark.parametrize("sites", ["half", "last"])
def test_the_lower_blocks_may_run_once_for_all_rows(folder, monkeypatch, row, sites):
    run = replace(FEW, row=row, sites=sites)
    cut = random_learner(run, folder)
    monkeypatch.setattr(Learner, "run_lower_blocks", lambda self: self.llama.embed_tokens(self.ids))
    whole = Learner(run, folder)
    for p, q in zip(whole.trained, cut.trained, strict=True):
        p.data = q.data
    rows = torch.arange(20)
    assert len(cut.llama.layers) < len(whole.llama.layers) == 4
    torch.testing.assert_close(cut.logits(rows), whole.logits(rows))


@pytest.mark.parametrize("row", ROWS)
def test_training_moves_the_adapters_and_nothing_else(folder, row):
    learner = Learner(replace(FEW, row=row), folder)
    named = dict(learner.llama.named_parameters())
    before = {name: p.clone() for name, p in named.items()}
    learner.fit(3, 1e-2)
    moved = {name for name, p in named.items() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in named.items() if p.requires_grad}
    assert all(any(part in name for part in ("expert", "hypernet", "guidance_norm", "lora"))
               for name in moved)
    assert len(learner.trained) == len(moved) > 0


def test_a_run_learns(folder):
    found = boundary.train(replace(FEW, maps=2, steps=150, rate=1e-2, rank=8), folder)
    assert found["accuracy"] > 90 and found["loss"] < math.log(16) / 2


def test_unit_e_has_the_size_that_it_says(folder):
    learner, seen = random_learner(replace(FEW, row=UNIT), folder), []
    learner.llama.hypernet.trunk.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    learner.logits(torch.arange(20))
    torch.testing.assert_close(seen[0].square().mean(-1), torch.ones(20, 1), atol=1e-3, rtol=0)


@pytest.mark.parametrize("row", [TOLD, GATES])
def test_the_controls_read_e_as_they_say(folder, row):
    learner = random_learner(replace(FEW, row=row), folder)
    expert, = {block.expert for block in learner.llama.layers[:1]}
    x, e = torch.randn(2, 3, 32), torch.randn(2, 1, 4)
    expert.encoder = torch.nn.Identity()
    weights = expert.weights(e, None)
    made = expert.project(8 * torch.nn.functional.silu(e))  # 32 inputs, 4 numbers
    gate, value = (x @ expert.down.mT + (made if row == TOLD else 0)).chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * value * (1 if row == TOLD else 1 + made)
    torch.testing.assert_close(expert(x, weights), hidden @ expert.up)


def test_gains_are_paired_by_seed_and_have_students_interval():
    found = {"a": {"accuracy": [50.0, 60.0, 73.0]}, "b": {"accuracy": [49.0, 58.0, 70.0]}}
    single = {row: {"accuracy": values["accuracy"][:1]} for row, values in found.items()}
    assert difference(single, "a", "b") == "+1.0" and difference(found, "a", "c") == ""
    assert difference(found, "a", "b") == "+2.0 ± 2.5"


# ---- The program


@pytest.fixture
def small(folder, tmp_path, monkeypatch):
    """Options of a small grid; `boundary.run()` runs it in this process."""
    monkeypatch.setattr(boundary, "AXES", {"maps": (2, 32), "rank": (16,), "embed": (16,)})
    monkeypatch.setattr(boundary, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(boundary.signal, "signal", lambda *_: None)
    given = ["--llm", folder, "--out", str(tmp_path / "out"), "--steps", 2, "--jobs", 1,
             "--seeds", 2]
    monkeypatch.setattr("sys.argv", ["boundary", *map(str, given)])
    return Options(folder, str(tmp_path / "out"), 2, 2, 1)


def test_a_rate_is_chosen_on_seeds_that_are_not_scored(small, monkeypatch):
    """The first seed picks two of three rates, all three seeds together one of these."""
    trained, losses = [], {1e-3: (2, 0, 0), 1e-2: (1, 3, 3), 1e-1: (9, 0, 0)}
    monkeypatch.setattr(boundary, "RATES", tuple(losses))
    monkeypatch.setattr(boundary, "LORA_RATES", (5.0,))

    def train(run, folder):
        trained.append(run)
        tuning = run.seed in TUNING and run.row == STATIC
        return {"accuracy": 1.0 * run.seed,
                "loss": losses[run.rate][TUNING.index(run.seed)] if tuning else -run.rate}

    monkeypatch.setattr(boundary, "train", train)
    boundary.os.makedirs(small.out)
    found = Runs(small).score([replace(FEW, row=row, rate=0.0) for row in (STATIC, LORA)])
    assert {c.row: values["rate"] for c, values in found.items()} == {STATIC: 1e-3, LORA: 5.0}
    assert all(values["accuracy"] == [SCORED, SCORED + 1] for values in found.values())
    tried = sorted((run.seed, run.rate) for run in trained if run.row == STATIC)
    assert tried == [(11, 1e-3), (11, 1e-2), (11, 1e-1), (12, 1e-3), (12, 1e-2), (13, 1e-3),
                     (13, 1e-2), (14, 1e-3), (15, 1e-3)]
    count = len(trained)
    Runs(small).score(list(found))  # another program goes on: nothing is left to do
    assert len(trained) == count == 14


def test_all_rows_are_scored_at_all_points_and_the_guided_ones_also_without_the_name(
        small, monkeypatch, capsys):
    def train(run, folder):
        return {"accuracy": 1.0 * run.maps + run.seed * (run.row == GENERATED), "loss": run.rate,
                "own rank": 7, "parameters": 1000, "operations": 2e6, "further token": 1e6}

    monkeypatch.setattr(boundary, "train", train)
    monkeypatch.setitem(boundary.AXES, "sites", ("half", "last"))
    boundary.run()
    with open(f"{small.out}/boundary.json") as f:
        cells = json.load(f)["cells"]
    rows = collections.defaultdict(set)
    for c in cells:
        rows[c["maps"], c["sites"], c["hidden"]].add(c["row"])
        assert c["own rank"] == [7, 7] and "seed" not in c
    assert rows == {(*point, hidden): set(GUIDED if hidden else ROWS) - left_out
                    for hidden in (True, False)
                    for point, left_out in (((2, "half"), {*CONTROLS}), ((32, "half"), set()),
                                            ((32, "last"), {*CONTROLS}))}
    printed = capsys.readouterr().out
    assert "2 seeds, 2 steps" in printed and "1,000; 2.000; 1.000; 0.001*" in printed
    assert "hidden: accuracy after 2 steps, %" in printed
    # seeds 14 and 15: on average over 32 maps at two sites, 14 or 15 points more than 32
    ours, none = "32.0 ± 0.0 | 0.001 | +14.5 ± 6.4", "+0.0 ± 0.0"
    assert printed.count(f"| {LORA} | 32.0 ± 0.0 | 0.000 | +14.5 ± 6.4 | {none} |  |  |  |") == 2
    assert printed.count(f"| {UNIT} | {ours} | {none} | {ours} |") == 2
    assert printed.count(f"| {TOLD} | {ours} | {none} | {ours} |") == 1  # at one point only


def test_the_mean_over_the_points_is_taken_seed_by_seed():
    points = [Run(maps=2), Run(maps=4)]
    found = {cell(p, row): {"accuracy": [p.maps * 10.0, p.maps * 20.0 + (row == STATIC)],
                            "loss": [p.maps, 2.0]} for p in points for row in (GENERATED, STATIC)}
    found[cell(points[0], LORA)] = found[cell(points[0], STATIC)]  # not at the other point
    means = pooled(found, points)
    assert means.keys() == {GENERATED, STATIC}
    assert means[STATIC]["accuracy"].tolist() == [30, 61] and means[STATIC]["loss"].tolist() == [
        3, 2]


@pytest.mark.slow
def test_a_stopped_program_goes_on_and_ends_with_a_picture(small, monkeypatch):
    trained, train = [], boundary.train

    def stop_at_nine(run, folder):
        if len(trained) == 9:
            raise KeyboardInterrupt
        trained.append(run)
        return train(run, folder)

    monkeypatch.setattr(boundary, "train", stop_at_nine)
    with pytest.raises(KeyboardInterrupt):
        boundary.run()
    monkeypatch.setattr(boundary, "train", lambda *a: (trained.append(a[0]), train(*a))[1])
    boundary.run()
    assert len(trained) == len(set(trained)) > 40
    with open(f"{small.out}/boundary.json") as f:
        cells = json.load(f)["cells"]
    assert {c["row"] for c in cells} >= set(ROWS) and all(len(c["accuracy"]) == 2 for c in cells)
    with open(f"{small.out}/boundary.png", "rb") as f:
        assert f.read(4) == b"\x89PNG"
    count = len(trained)
    boundary.run()  # nothing is left to do
    assert len(trained) == count


def test_runs_of_another_llama_or_code_are_not_taken_for_these(small, monkeypatch):
    boundary.os.makedirs(small.out)
    Runs(small).finish([FEW])
    assert Runs(small).done.keys() == {FEW}
    for name in ("sources_digest", "fingerprint"):
        with monkeypatch.context() as patch:
            patch.setattr(boundary, name, lambda *_: "another")
            assert not Runs(small).done


def test_a_folder_without_a_llama_ends_in_one_line(small, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["boundary", "--llm", str(tmp_path / "none")])
    with pytest.raises(UserError, match="none: no Llama there; python train.py --stage 0"):
        boundary.run()


@pytest.mark.slow
def test_runs_in_processes_of_their_own_are_the_same(folder):
    runs = [replace(FEW, row=row) for row in (GENERATED, STATIC)]
    own, here = (dict(boundary.results(Options(folder, jobs=jobs), runs)) for jobs in (2, 1))
    assert own.keys() == here.keys() == set(runs)
    assert all(own[run]["loss"] == here[run]["loss"] for run in runs)
