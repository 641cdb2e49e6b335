"""bench.py counts padding, and trains; that it measures loading is in test_foreign.py, with the layouts it loads."""
import json

import numpy as np
import pytest

import experiments.bench
import toy.files
import toy.stand_ins
from cli import UserError
from formats.tokenizer import train_tokenizer


def test_what_bench_calls_llavas_order_groups_as_llava_does():
    rng = np.random.default_rng(0)
    sizes, pictured = rng.integers(1, 400, 1000), rng.random(1000) < 0.8
    order = experiments.bench.llava_order(sizes, pictured, 4, 8, rng)
    assert sorted(order) == list(range(1000))
    whole = [(pictured == kind).sum() // 32 - ((pictured == kind).sum() % 32 == 0) for kind in (True, False)]
    steps = order[:32 * sum(whole)].reshape(-1, 4, 8)
    assert all(len(set(pictured[step.ravel()])) == 1 for step in steps)
    left = order[32 * sum(whole):]
    assert len(set(pictured[left])) == 2 and (np.diff(left) > 0).all()
    spread = lambda groups: np.ptp(sizes[groups].sum(-1), axis=-1).mean()
    assert spread(steps) < 0.2 * spread(rng.permutation(1000)[:steps.size].reshape(steps.shape))


def test_bench_counts_the_padding_of_three_orders(tmp_path, capsys):
    toy.files.write_world(tmp_path, pictures=200, texts=2, test_pictures=2)
    tokenizer = train_tokenizer(toy.stand_ins.words(str(tmp_path)), 400)
    tokenizer.save(str(tmp_path))
    experiments.bench.compare_padding(experiments.bench.Options(padding=str(tmp_path / "instruct.json"), llm=str(tmp_path), image_tokens=49, ranks=4, micro_batch_size=4))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["records"] == 200 and 0 < found["ours"]["padding"] < 0.7 * found["llava"]["padding"]
    assert 1 < found["ours"]["slowest"] < found["llava"]["slowest"]
    with pytest.raises(UserError, match="a step of 32 x 16 wants more"):
        experiments.bench.compare_padding(experiments.bench.Options(padding=str(tmp_path / "instruct.json"), llm=str(tmp_path), ranks=32))


@pytest.mark.slow
def test_bench_trains_both_stages_with_experts_and_without(tmp_path, capsys):
    experiments.bench.rehearse(experiments.bench.Options(train="tiny", out=str(tmp_path), steps=4, micro_batch_size=2, save=True))
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert [(run["stage"], run["experts"]) for run in found] == [(1, "none"), (2, "none"), (1, "generated"), (2, "generated")]
    for run in found:
        assert run["tokens_per_s"] > 0 and run["mfu"] is None and 0 <= run["data_wait"] <= 1 and run["peak_gb"] > 0.1
    with open(tmp_path / "generated" / "stage1" / "log.jsonl") as f:
        rates = [json.loads(line)["tokens_per_s"] for line in f]
    log = [json.loads(line) for line in open(tmp_path / "generated" / "stage1" / "log.jsonl")]
    assert ["save_s" in row for row in log] == [False] * 3 + [True] and found[2]["save_s"] == log[3]["save_s"]
    third = found[2]["save_s"] * (1 / found[2]["save_share"] - 1) / 1000  # seconds of the one step that counts
    assert third == pytest.approx(3 * log[2]["eta_s"] - 2 * log[1]["eta_s"] / 2) and third > 0
    assert len(rates) == 4 and found[2]["tokens_per_s"] == pytest.approx(sum(rates[2:]) / 2)
    assert json.load(open(tmp_path / "generated" / "stage1" / "config.json"))["model"]["visual_expert"] == "1"
    assert json.load(open(tmp_path / "none" / "stage1" / "config.json"))["model"]["visual_expert"] == "none"
    assert not (tmp_path / "none" / "stage2").exists()
    cost = found[0]["tokens_per_s"] / found[2]["tokens_per_s"] - 1
    assert f"stage 1: experts cost {cost:.1%} of the time" in lines
