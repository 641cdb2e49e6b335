"""Tables in miniature: rows are what they name, statistics, a stopped run continues; bench.py;
pictures by other code; pictures of what the experts do.

How bench.py measures loading is tested in test_formats.py, with the layouts that it loads.
"""
import contextlib
import dataclasses
import functools
import io
import json
import math
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
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

import experiments.ablate
import experiments.bench
import experiments.embeddings
import experiments.forest
import experiments.gpu_check
import experiments.growth
import experiments.look
import experiments.order
import experiments.outsider
import experiments.report
import experiments.step_size
import experiments.tables
import sample
import toy.files
import toy.questions
import toy.stage0
import toy.stand_ins
import toy.world
import train
import training.options
import training.state
import weights
from baselines import BaselineConfig, BaselineVLM
from cli import parse, UserError
from data import collate, encode, IGNORE, IMAGE, Preprocess, PromptFormat, Sample
from experiments.speed import clock, correct, gpu, inputs, loading, models, shapes, stages
from experiments.tables import NO_EXPERTS, PEFT, TABLES
from formats.tokenizer import train_tokenizer
from hypernet import Expert, rms
from model import LayerCache, VLMConfig
from tests.helpers import (batch_of, count_flops, dictated, EVERY, LAYOUT, LLAMA, logits_of, noise,
                           pictures, segments, static, TOKENIZER, TURNS, VISION, whole_batch)
from tests.helpers import look as look_pixels
from tests.helpers import trained as randomly_trained
from tests.programs import HERE, Program, words_of
from training.costs import added_flops, forward_flops, generated_weights, lora_weights
from training.log import expert_shares
from vlora import VLoRAConfig

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
C, D, E, R = toy.stand_ins.VISION.width, toy.stand_ins.LLAMA.width, 16, 16


def config(options):
    """The VLMConfig that train.py makes of a row's options in stage 2 of the toy."""
    method = training.options.Options(method=options.get("method", "hyperllava"))
    given = {**training.options.preset_options(method, 2), **options, "stage": 2}
    return weights.make_config(toy.stand_ins.VISION, toy.stand_ins.LLAMA,
                               **train.model_options(training.options.Options(**given)))


def added(cfg):
    """{name: shape} of what a row has beyond LLaVA's tensors."""
    shapes = {name: tuple(p.shape) for name, p in weights.build_empty(cfg).named_parameters()}
    static = weights.names_of(config(NO_EXPERTS))
    return {name: shape for name, shape in shapes.items() if name not in static}


def count(cfg):
    return sum(math.prod(shape) for shape in added(cfg).values())


def trained(options):
    """Numbers that stage 2 of a row trains."""
    model = weights.build_empty(config(options))
    prefixes = train.TRAINS[2, options.get("tune", "full")]
    return sum(p.numel() for name, p in model.named_parameters()
               if ("llm.expert." if ".expert." in name or ".lora." in name
                   else name).startswith(prefixes) or name.startswith(prefixes))


rows = pytest.mark.parametrize("table, row",
                               [(name, row) for name, table in TABLES.items()
                                for row in table.rows],
                               ids=[f"{name}: {row.name}" for name,
                                    table in TABLES.items() for row in table.rows])


@rows
def test_every_row_is_a_model_and_has_a_figure_for_each_of_the_papers_columns(table, row):
    assert weights.build_empty(config(row.options)).cfg.llm == toy.stand_ins.LLAMA
    assert len(row.paper) in (0, len(TABLES[table].columns))
    assert row.options.keys() <= {f for f in training.options.Options.__dataclass_fields__}


@pytest.mark.parametrize("table", TABLES)
def test_rows_of_a_table_differ(table):
    """In what they make, not in how it is said: an option that names a default would train the same
    row twice.
    """
    made = [(config(row.options), *map(row.options.get, ("tune", "lr", "muon_lr")), row.times)
            for row in TABLES[table].rows]
    alike = sum(made[i] == made[j] for i in range(len(made)) for j in range(i))
    assert alike == (table == "fig4")  # where both curves meet


def language(blocks):
    """Numbers that generated language experts in so many blocks add (facts of arXiv 2403.13447,
    §3.2 and 3.3).
    """
    return E * E + E + E * 3 * R * D + blocks * (D * E + E + 3 * R * D) + D


def visual(inputs):
    size = R * (2 * inputs + D)
    return E * E + E + E * size + inputs * E + E + size


def test_each_flag_adds_the_tensors_that_it_names_and_as_many_numbers_as_the_formula_says():
    assert added(config(NO_EXPERTS)) == {}
    for options, prefixes, expected in [
        ({}, ("projector.expert_1.", "llm."), visual(C) + language(2)),
        ({"visual_expert": "2"}, ("projector.expert_2.", "llm."), visual(D) + language(2)),
        ({"visual_expert": "both"}, ("projector.expert_", "llm."),
         visual(C) + visual(D) + language(2)),
        ({"visual_expert": "none"}, ("llm.",), language(2)),
        ({"language_expert": "none"}, ("projector.expert_1.",), visual(C)),
        (PEFT | {"language_expert": "all"}, ("llm.",), language(4)),
        (PEFT | {"language_expert": "anterior"}, ("llm.",), language(2)),
        (PEFT | {"guidance_after": 1}, ("llm.",), language(3)),
        (PEFT | {"weight_source": "static"}, ("llm.layers.",), 2 * 3 * R * D),
        (PEFT | {"weight_source": "latent"}, ("llm.",), language(2) - D - 2 * (D * E + E) + 2 * E),
        (PEFT | {"weight_source": "lora"}, ("llm.layers.",),
         2 * lora_weights(toy.stand_ins.LLAMA, R)),
    ]:
        cfg = config(options)
        assert count(cfg) == expected, options
        assert all(name.startswith(prefixes) for name in added(cfg)), options
    names = {place: {name.split(".")[2] for name in added(config(PEFT | {"language_expert": place}))
                     if ".layers." in name}
             for place in ("anterior", "posterior", "all")}
    assert names == {"anterior": {"0", "1"}, "posterior": {"2", "3"}, "all": {"0", "1", "2", "3"}}


def test_rows_of_equal_parameters_have_them():
    rows = {row.name: trained(row.options) for row in TABLES["dialect"].rows}
    for name in ("Adapter, equal parameters", "LoRA in the same blocks, equal parameters",
                 "LoRA in all blocks, equal parameters", "gates, equal parameters"):
        assert rows[name] - count(config(NO_EXPERTS)) == pytest.approx(rows["generated"],
                                                                       rel=0.015), name
    assert rows["Adapter"] < 0.8 * rows["generated"]
    whole = {row.name: count(config(row.options)) for row in TABLES["experts"].rows}
    assert whole["both static, of equal parameters"] == pytest.approx(whole["both"], rel=0.01)


def test_rows_of_equal_operations_have_them():
    """For a question of usual length; a further token costs a little more with static experts."""
    rows = {row.name: config(row.options) for row in TABLES["experts"].rows}
    prompt = {name: sum(forward_flops(cfg, 30, at=1).values()) for name, cfg in rows.items()}
    equal = "both static, of equal operations"
    assert prompt[equal] == pytest.approx(prompt["both"], rel=5e-4)
    assert prompt["both static, of equal parameters"] > 1.05 * prompt["both"]
    token = {name: added_flops(cfg, 1, 0) for name, cfg in rows.items()}
    assert token[equal] == pytest.approx(1.25 * token["both"])


def test_generated_numbers_are_those_of_the_weights():
    assert generated_weights(config({})) == R * (2 * C + D) + 2 * R * 3 * D
    assert generated_weights(config({"weight_source": "static"})) == generated_weights(
        config(PEFT | {"weight_source": "lora"})) == 0
    assert generated_weights(config({"weight_source": "mlp"})) == C * D + 2 * D * D
    assert generated_weights(config({"weight_source": "gates"})) == 3 * R
    assert generated_weights(config({"method": "vlora"})) == 5 * 4 * D * 16
    # of a 7B
    assert generated_weights(VLMConfig()) == 16 * 3 * 16 * 4096 + 16 * (2 * 1024
                                                                        + 4096) == 3_244_032
    assert generated_weights(VLoRAConfig()) == 5 * 8 * 4096 * 64 == 10_485_760


def test_rows_share_stage_1_where_their_projectors_agree_and_nowhere_else():
    shared = {name: experiments.tables.row_name(experiments.ablate.stage_1_options(row.options))
              for name, row in
              ((f"{t} {row.name}", row) for t in "2356" for row in TABLES[t].rows)}
    assert {n for n, s in shared.items()
            if s == "ours"} == {"2 E_V1", "3 w/o E_L", "3 anterior half", "3 all",
                                "3 posterior half", "5 ours"}
    assert {n for n, s in shared.items() if s == "visual_expert=none"} == {
        "2 w/o E_V", "6 LoRA", "6 Adapter", "6 Hypernetwork+Adapter", "6 Language Expert"}
    assert shared["5 Adapter"] == "weight_source=static"


def scored(hits, families, images):
    return {"splits": {"x": {"right": [[f, i, h] for f, i, h in zip(families, images, hits)]}}}


def test_the_difference_is_of_the_means_and_its_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    families, images = ["a", "a", "b"] * 60, [i // 3 for i in range(180)]
    inside = 0
    # two rows that know equally much of all pictures there are, but not the same of these
    for _ in range(400):
        # mostly, what is hard for one is hard for the other
        hard = (0.8 * rng.random(60) + 0.2 * rng.random((2, 60))).repeat(3, axis=1)
        runs = [[scored((rng.random(180) < p).tolist(), families, images) for _ in range(3)]
                for p in hard]
        gain, over_questions, over_seeds = experiments.report.difference(*runs, "x")
        inside += abs(gain) < over_questions
    assert 0.92 < inside / 400 < 0.98
    mean = lambda run: 50 * sum(np.mean([h for f, _, h in run["splits"]["x"]["right"] if f == g])
                                for g in "ab")
    assert gain == pytest.approx(np.mean([mean(a) - mean(b) for a, b in zip(*runs)]))
    assert over_seeds == pytest.approx(
        4.30 * np.std([mean(a) - mean(b) for a, b in zip(*runs)], ddof=1) / 3 ** 0.5)


def test_rows_that_were_asked_different_questions_are_not_compared():
    one, other = scored([1, 0], "ab", [1, 2]), scored([1, 0], "ab", [1, 3])
    with pytest.raises(UserError, match="x: rows were asked different questions"):
        experiments.report.difference([one], [other], "x")


COST = {"trained": 1234, "generated": 99, "prompt_mflops": 251.6, "token_mflops": 4.021,
        "step_s": 0.651, "peak_gb": 1.437,
        "prefill_ms": 6.61, "decode_ms": 1.744}


def test_one_seed_has_no_spread_and_is_not_shown_as_if_it_had(tmp_path):
    runs = [scored(hits, "aabb", [0, 1, 2, 3]) for hits in ([1, 0, 1, 1], [0, 0, 1, 1])]
    table = dataclasses.replace(TABLES["dialect"], splits=("x",), rows=TABLES["dialect"].rows[:2])
    found = [{"name": row.name, "options": {}, "paper": (), "costs": COST,
              "families": {"shift": (50.0, None)},
              "means": {"x": experiments.report.mean_and_spread([50.0])},
              "difference": {"x": experiments.report.difference([run], [runs[1]], "x")}}
             for row, run in zip(table.rows, runs)]
    text = experiments.report.markdown(table, found)
    assert "**50.0** |" in text and "+25.0 (± " in text
    assert not [word for word in ("nan", "None", "seeds") if word in text]
    experiments.report.draw(table, found).savefig(tmp_path / "x.png")
    assert "NaN" not in json.dumps(found)


@pytest.mark.parametrize("name", TABLES)
def test_every_table_is_printed_and_plotted_with_its_rows_and_the_papers_columns(tmp_path, name):
    table = TABLES[name]
    found = [{"name": row.name, "options": row.options, "paper": row.paper, "costs": COST,
              "families": {family: (50.0 + i, 1.0)
                           for family in (toy.world.FAMILIES if name != "dialect" else ("shift",))},
              "means": {split: (60.0 + i, 2.0) for split in table.splits},
              "difference": {split: (1.0, 2.0, 3.0) for split in table.splits}}
             for i, row in enumerate(table.rows)]
    scores, *families, costs = experiments.report.markdown(table, found).split("\n\n")
    assert [part.splitlines()[2] for part in families] == [
        f"| {table.rows[0].name} |" + " 50.0 ± 1.0 |" * 8] * (name != "dialect")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in scores.splitlines()]
    assert len({len(line) for line in lines}) == 1 and [line[0] for line in lines[2:]] == [
        row.name for row in table.rows]
    assert [line[1:1 + len(table.columns)] for line in lines[2:]] == [
        [str(x) for x in row.paper or [""] * len(table.columns)] for row in table.rows]
    assert [line[-1] == "" for line in lines[2:]] == [row is table.rows[table.reference]
                                                      for row in table.rows]
    assert len(costs.splitlines()) == 2 + len(table.rows)
    assert costs.splitlines()[0] == (
        "| row | trained | generated | MFLOPs a prompt | a further token | training step, s "
        "| peak, GB | prompt, ms | a further token, ms |")
    assert costs.splitlines()[2] == (
        f"| {table.rows[0].name} | 1,234 | 99 | 252 | 4.02 | 0.65 | 1.44 | 6.6 | 1.74 |")
    figure = experiments.report.draw(table, found)
    figure.savefig(tmp_path / "x.png")
    axes, = figure.axes
    if table.axis:  # each row is a point of a curve
        assert sum(len(container.lines[0].get_xdata())
                   for container in axes.containers) == len(table.rows)
    else:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            row.name for row in table.rows]
    assert (tmp_path / "x.png").stat().st_size > 5000


def table_file(folder, name, gains):
    """A table_N.json in which each row has this difference to the reference, and its intervals."""
    rows = [{"name": row.name, "difference": {"heldout": gain, "grounds": (9.0, 9.0, 9.0)}}
            for row, gain in zip(TABLES[name].rows, gains)]
    toy.files.write_atomically(folder / f"table_{name}.json", {
        "rows": rows, "options": {"seeds": 4, "align": 600, "steps": 150}})


def test_the_picture_of_all_tables_has_a_line_for_each_row_but_the_reference(tmp_path):
    with pytest.raises(UserError, match="no table_N.json"):
        experiments.forest.draw(str(tmp_path))
    table_file(tmp_path, "3", [(-1.0, 0.5, 2.0), (1.0, 0.5, 2.0), (0.0, 0.5, None), (0, 0, 0)])
    gains = [(-20.0, 1.0, 3.0), (9.0, 9.0, 1.0), (0, 0, 0), (-5.0, 3.0, 3.0)]
    table_file(tmp_path, "vlora4", gains)
    small, large = experiments.forest.draw(str(tmp_path)).axes
    for axes, rows, gains, faces in (
            (small, TABLES["3"].rows[:3], [-1, 1, 0], "www"),
            (large, [TABLES["vlora4"].rows[i] for i in (0, 1, 3)], [-20, 9, -5], "kwk")):
        labels = [text.get_text() for text in axes.get_yticklabels()]
        assert labels == ["", *(row.name for row in rows)]
        marks = [line for line in axes.lines if line.get_marker() == "o"]
        assert [mark.get_xdata()[0] for mark in marks] == gains
        assert "".join(mark.get_markerfacecolor() for mark in marks) == faces
    spans = [tuple(line.get_xdata()) for line in small.lines if line.get_marker() != "o"]
    assert spans == [(-1.5, -0.5), (-3, 1), (0.5, 1.5), (-1, 3), (-0.5, 0.5), (0, 0)]
    assert small.texts[0].get_text().endswith("against posterior half (4 seeds, 600 and 150 steps)")
    assert sorted(sum(experiments.forest.PANELS, ())) == sorted(TABLES)  # no misspelt one in SMALL
    for name, steps in ("vlora6", "900"), ("vlora12", "900 or 1800"), ("vlora24", "900 or 3600"):
        (tmp_path / name).mkdir()
        table_file(tmp_path / name, name, [(0, 0, 0), (-20.0, 1.0, 3.0)])
        title, = experiments.forest.draw(str(tmp_path / name)).axes[0].texts
        assert title.get_text().endswith(f"600 and {steps} steps)")


def test_a_probe_reads_what_is_there_and_no_more():
    rng = np.random.default_rng(0)
    families, images = [str(f) for f in rng.integers(4, size=2000)], [f"{i // 4:04}.png"
                                                                      for i in range(2000)]
    noise = torch.from_numpy(rng.standard_normal((2000, 3))).float()
    share, half = experiments.embeddings.probe(noise, families, images)
    assert abs(share - 0.25) < 0.05 and 0.02 < half < 0.035      # of 1000 questions
    told = torch.nn.functional.one_hot(torch.tensor([int(f) for f in families]),
                                       4).float() + 0.1 * torch.randn(2000, 4)
    assert experiments.embeddings.probe(told, families, images)[0] > 0.99
    told[::2] = torch.randn(1000, 4)                             # half of the questions say nothing
    assert experiments.embeddings.probe(told, families, images)[0] == pytest.approx(0.625, abs=0.05)


def test_the_dialect_has_one_right_answer_for_each_step(tmp_path):
    toy.files.write_world(tmp_path, pictures=30, texts=2, test_pictures=8)
    toy.files.write_dialect(tmp_path)
    training, test = (json.load(open(tmp_path / f))
                      for f in ("dialect.json", "heldout_dialect.json"))
    validation = json.load(open(tmp_path / "validation_dialect.json"))
    assert validation and all(r["image"].startswith("validation_") for r in validation)
    captions = {r["image"]: r["conversations"][1]["value"]
                for r in json.load(open(tmp_path / "captions.json"))}
    assert 5 < len(training) < 30 and len(test) % len(toy.questions.STEPS) == 0 and {
        r["family"] for r in test} == {"shift"}
    for record in training:
        letter = captions[record["image"]].split("the letter ")[1][0]
        said = record["conversations"]
        asked = [int(m["value"].split("Go on by ")[1].rstrip(".")) for m in said[::2]]
        assert sorted(asked) == [*toy.questions.STEPS]
        for steps, message in zip(asked, said[1::2]):
            assert message["value"] == (toy.world.LETTERS * 2)[
                toy.world.LETTERS.index(letter) + steps]


def test_the_further_splits_show_what_training_never_does(tmp_path):
    toy.files.write_world(tmp_path, pictures=4, texts=2, test_pictures=4)
    toy.files.write_unseen(tmp_path, pictures=12)
    objects = [len(list(toy.questions.objects_in(r["conversations"][1]["value"]).elements()))
               for r in json.load(open(tmp_path / "numbers_captions.json"))]
    assert len(objects) == 12 and set(objects) == {6, 7}
    assert len(json.load(open(tmp_path / "grounds_captions.json"))) == 12
    rng = np.random.default_rng(0)
    tones = [len(np.unique(np.asarray(
        toy.world.checkerboard(rng, np.full(3, 120.0), (56, 40))).reshape(-1, 3), axis=0))
        for _ in range(5)]
    assert tones == [2] * 5


# ---- The program


@pytest.fixture(scope="module")
def base(tmp_path_factory, mesh):
    """A base with a tiny world, its stand-ins hardly trained."""
    out = tmp_path_factory.mktemp("base")
    toy.stage0.make_world(str(out), 40)
    for part in ("clip", "llm"):
        train.run_stage({"out": str(out), "part": part, "batch_size": 4, "steps": 4,
                         "dtype": "float32"}, 0, mesh)
    return out


def start(base, out, *words):
    words = ("--pictures", 40, "--align", 2, "--steps", 3, "--seeds", 2, "--jobs", 2,
             "--allow_random_llm", "--base", base, "--out", out, *words)
    return subprocess.Popen([sys.executable, "-m", "experiments.ablate", *map(str, words)],
                            stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def running(out):
    """Command lines of processes that work in a folder."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found.append(open(f"/proc/{pid}/cmdline").read())
    return [line for line in found if str(out) in line]


@pytest.mark.slow
def test_a_table_is_made_stopped_and_gone_on_with(base, tmp_path):
    process = start(base, tmp_path, "--table", "vlora")
    row = tmp_path / "instruct_2_3" / "method=vlora" / "seed0"
    while process.poll() is None and not (row / "output.txt").exists():
        time.sleep(0.05)
    assert running(tmp_path)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=300)
    assert process.returncode == 143
    assert not running(tmp_path)  # its trainings ended with it
    assert not list(tmp_path.glob("table_*"))
    kept = {path: path.stat().st_mtime_ns
            for path in tmp_path.glob("aligned_2/*/seed*/stage1/model.safetensors")}
    assert len(kept) == 4
    assert len({path.read_bytes() for path in kept}) == 4  # seeds differ from stage 1 on

    process = start(base, tmp_path, "--table", "vlora")
    text, error = process.communicate(timeout=900)
    assert process.returncode == 0, error[-2000:]
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    found = json.load(open(tmp_path / "table_vlora.json"))
    assert [row["name"] for row in found["rows"]] == ["LLaVA", "VLoRA"]
    assert (tmp_path / "table_vlora.png").exists()
    assert "| LLaVA | 64.6 | 1470.0 |" in text and text.count("\n| VLoRA |") == 3
    for row in found["rows"]:
        assert row["means"].keys() == {"heldout", "combination", "grounds",
                                       "numbers"} and row["costs"]["trained"] > 1e6
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/model.safetensors")}
    process = start(base, tmp_path, "--table", "vlora")
    assert process.communicate(timeout=300)[0].count("\n| VLoRA |") == 3
    assert {path: path.stat().st_mtime_ns
            for path in tmp_path.glob("**/model.safetensors")} == before

    scores = {path: path.read_bytes() for path in tmp_path.glob("instruct*/*/*/scores.json")}
    text, error = start(base, tmp_path, "--table", "vlora", "--validate").communicate(timeout=200)
    assert "**validation**" in text and "heldout" not in text, error[-2000:]
    assert scores == {path: path.read_bytes() for path in scores} and len(scores) == 4


class Here(experiments.ablate.Jobs):
    """Programs that run in this process, which has torch already."""
    mesh = None

    def run(self, folder, program, *words):
        given = parse({"train": training.options.Options,
                       "experiments.ablate": experiments.ablate.Options}[program], map(str, words))
        if program == "experiments.ablate":
            experiments.ablate.score(experiments.ablate.Options(**given))
        else:
            train.run_stage(given, given["stage"], self.mesh)


@pytest.mark.slow
@pytest.mark.parametrize("table", ["dialect", "fig3", "fig4", "vlora6", "vlora3", "vlora4",
                                   "vlora5"])
def test_a_row_of_other_tables_goes_all_the_way(base, mesh, tmp_path, table, monkeypatch):
    """The last one; the others are the same commands of train.py with options that are tested
    above.
    """
    monkeypatch.setattr(Here, "mesh", mesh)
    monkeypatch.setattr(experiments.ablate, "Jobs", Here)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # only the main thread may
    monkeypatch.setitem(TABLES, table, dataclasses.replace(
        TABLES[table], rows=TABLES[table].rows[-1:], reference=0, splits=TABLES[table].splits[-1:],
        tuned=min(TABLES[table].tuned, 3)))
    few = functools.partial(experiments.report.measure_costs, rounds=2, tokens=4)
    monkeypatch.setattr(experiments.report, "measure_costs", few)
    o = experiments.ablate.Options(table=table, base=str(base), out=str(tmp_path), seeds=1, steps=3,
                                   align=2, pictures=40, jobs=1, allow_random_llm=True)
    experiments.ablate.train_rows(o)
    row, = experiments.report.table_rows(o)
    experiments.report.draw(TABLES[table], [row]).savefig(tmp_path / "x.png")
    parts = 2 if table == "dialect" else 3  # the dialect has one family
    assert experiments.report.markdown(TABLES[table], [row]).count("\n\n") == parts - 1
    with open(os.path.join(experiments.tables.row_folder(o, TABLES[table].rows[0], 0), "stage2",
                           "log.jsonl")) as f:
        steps = [json.loads(line) for line in f]
    assert len(steps) == 3 * TABLES[table].rows[0].times
    assert row["costs"]["peak_gb"] == max(step["peak_gb"] for step in steps) > 0.1
    assert row["costs"]["step_s"] > 0 and row["costs"]["token_mflops"] < row["costs"][
        "prompt_mflops"]


@pytest.mark.slow
def test_a_row_that_fails_ends_the_program_with_a_line_that_says_where(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    (tmp_path / "base" / "stage0" / "llm" / "model.safetensors").write_bytes(b"half")
    process = start(tmp_path / "base", tmp_path / "out", "--table", "vlora", "--jobs", 1)
    error = process.communicate(timeout=200)[1].splitlines()
    assert process.returncode == 1 and error[-1].startswith(
        "error: train.py failed with status 1, see ") and "model.safetensors: " in error[
        -1] and "output.txt: error: " in error[-1]


def test_rows_of_another_base_are_not_taken_for_this_ones(tmp_path, monkeypatch):
    for name in experiments.ablate.BASE:
        (tmp_path / "base" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "base" / name).write_text(name)
    o = experiments.ablate.Options(base=str(tmp_path / "base"), out=str(tmp_path / "out"))
    (tmp_path / "out").mkdir()
    experiments.ablate.check_base(o)
    experiments.ablate.check_base(
        dataclasses.replace(o, base=shutil.copytree(tmp_path / "base", tmp_path / "moved")))
    noted = json.loads((tmp_path / "out" / "base.json").read_text())
    (tmp_path / "out" / "base.json").write_text(
        json.dumps({name: noted[name] for name in noted if "grounds" not in name}))
    with pytest.raises(UserError, match="were made with another world/grounds.json than"):
        experiments.ablate.check_base(o)
    (tmp_path / "out" / "base.json").write_text(json.dumps(noted))
    (tmp_path / "base" / "stage0" / "llm" / "model.safetensors").write_text("trained anew")
    with pytest.raises(UserError, match="were made with another stage0/llm/model.safetensors than "
                                        "there is now: name another --out"):
        experiments.ablate.check_base(o)
    (tmp_path / "base" / "stage0" / "llm" / "model.safetensors").write_text(
        "stage0/llm/model.safetensors")
    experiments.ablate.check_base(o)
    monkeypatch.setitem(training.options.TOY[2], "muon_lr", 1.0)
    with pytest.raises(UserError, match="were made with another preset than"):
        experiments.ablate.check_base(o)
    monkeypatch.undo()
    experiments.ablate.check_base(o)
    monkeypatch.setattr(experiments.ablate, "CODE", ("hypernet.py",))
    with pytest.raises(UserError, match="were made with another code than"):
        experiments.ablate.check_base(o)


def test_scores_that_do_not_exist_are_not_asked_for():
    with pytest.raises(UserError, match="--validate: --table embeddings has no scores"):
        experiments.ablate.Options(table="embeddings", validate=True)


def test_two_programs_do_not_train_in_one_folder_and_wait_for_each_other_at_one_base(tmp_path,
                                                                                     monkeypatch):
    base, out = str(tmp_path / "base"), str(tmp_path / "out")
    with experiments.ablate.locked(f"{out}/lock") as ours:
        assert ours
        process = start(base, out)
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 1 and error.splitlines()[
            -1] == f"error: another ablate.py works in {out}: let it end, or name another --out"
    assert not os.path.exists(base)
    with experiments.ablate.locked(f"{out}/lock") as ours:
        assert ours

    made = []
    monkeypatch.setattr(experiments.ablate, "prepare", lambda jobs,
                        o: made.append("theirs") or sys.exit())

    def there():
        with contextlib.suppress(SystemExit):
            experiments.ablate.train_rows(experiments.ablate.Options(base=base, out=base, jobs=1))

    with experiments.ablate.locked(f"{base}/base.lock"):
        other = threading.Thread(target=there)
        other.start()
        time.sleep(0.3)
        made.append("ours")
    other.join(60)
    assert made == ["ours", "theirs"]


def test_embeddings_are_of_a_model_whose_experts_are_guided():
    for options in ({"language_expert": "none"}, {"weight_source": "latent"}):
        point = weights.Checkpoint(weights.build_empty(config(options)), None, None, "", {})
        value, = options.values()
        with pytest.raises(UserError, match=f"--table embeddings: no language expert .*{value}"):
            experiments.embeddings.embed(point, [])


def test_a_training_that_outlives_a_killed_ablate_keeps_its_lock(tmp_path, monkeypatch):
    children = []
    # As if ablate were killed here
    monkeypatch.setattr(subprocess.Popen, "wait", lambda process: children.append(process))
    with experiments.ablate.locked(tmp_path / "lock") as ours:
        assert ours
        experiments.ablate.Jobs().run(tmp_path, "timeit", "-n", 1, "import time; time.sleep(60)")
    monkeypatch.undo()
    with experiments.ablate.locked(tmp_path / "lock") as ours:
        assert not ours
    children[0].kill()
    children[0].wait()
    with experiments.ablate.locked(tmp_path / "lock") as ours:
        assert ours


def test_the_share_of_the_experts_is_that_of_all_passes():
    model, found = randomly_trained(visual_expert="none"), []
    long, short = (encode(turns, TOKENIZER, LAYOUT, "", "x.png") for turns in (TURNS, TURNS[:1]))
    assert len(short.ids) < len(long.ids) - 10
    one, other, both = (batch_of(some, pictures(1) * len(some))
                        for some in ([long], [short], [short, long]))
    for passes in ([one], [other], [one, other], [both]):
        with torch.no_grad(), expert_shares(model, passes) as shares:
            for batch in passes:
                model(batch)
        found.append(shares[0])
    assert min(found[:2]) < found[2] < max(found[:2])
    assert found[3] == pytest.approx(found[2], rel=1e-2)  # padding does not count


def test_a_base_with_another_world_is_left_alone(tmp_path):
    toy.stage0.make_world(str(tmp_path), 6)
    before = (tmp_path / "world" / "world.json").read_text()
    with pytest.raises(UserError, match="its world has 6 pictures, .* expected 8"):
        experiments.ablate.train_rows(
            experiments.ablate.Options(base=str(tmp_path), out=str(tmp_path / "x"), pictures=8,
                                       jobs=1))
    assert (tmp_path / "world" / "world.json").read_text() == before
    other = json.loads(before) | {"code": "x"}
    toy.files.write_atomically(tmp_path / "world" / "world.json", other)
    with pytest.raises(UserError, match="6 pictures, maybe drawn by other code; expected 6"):
        experiments.ablate.train_rows(
            experiments.ablate.Options(base=str(tmp_path), out=str(tmp_path / "x"), pictures=6,
                                       jobs=1))


@pytest.mark.slow
def test_a_stage_0_that_was_stopped_goes_on(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    shutil.rmtree(tmp_path / "base" / "stage0" / "llm")
    o = experiments.ablate.Options(base=str(tmp_path / "base"), out=str(tmp_path / "x"),
                                   pictures=40, jobs=1)
    words = ("--stage", 0, "--part", "llm", "--out", o.base, "--pictures", 40, "--steps",
             training.options.PRESETS["toy"]["llm"]["steps"])
    process = subprocess.Popen([sys.executable, os.path.join(HERE, "train.py"), *map(str, words)],
                               stderr=subprocess.DEVNULL)
    log, began = tmp_path / "base" / "stage0" / "llm" / "log.jsonl", time.time()
    while not (log.exists() and log.read_text().count("\n") > 1) and time.time() - began < 100:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    said = []

    class Heard(experiments.ablate.Jobs):
        def run(self, folder, program, *words):
            said.append(words)

    experiments.ablate.prepare(Heard(), o)
    assert [words[:4] for words in said] == [("--stage", 0, "--part", "llm")] and said[0][
        -1] == "--resume"


# ---- Orders


def test_what_is_called_llavas_order_groups_as_llava_does():
    rng = np.random.default_rng(0)
    sizes, pictured = rng.integers(1, 400, 1000), rng.random(1000) < 0.8
    found = experiments.order.llava_order(sizes, pictured, 32, 4)
    order = np.ravel(found)
    assert len(order) == len(set(order)) == 1000 // 32 * 32
    whole = [(pictured == kind).sum() // 32 - ((pictured == kind).sum() % 32 == 0)
             for kind in (True, False)]
    steps = np.array(found[:sum(whole)])
    assert steps.shape[1:] == (4, 8)
    assert all(len(set(pictured[step.ravel()])) == 1 for step in steps)
    left = order[32 * sum(whole):]
    assert len(set(pictured[left])) == 2 and (np.diff(left) > 0).all()
    spread = lambda groups: np.ptp(sizes[groups].sum(-1), axis=-1).mean()
    assert spread(steps) < 0.2 * spread(rng.permutation(1000)[:steps.size].reshape(steps.shape))


@pytest.mark.parametrize("ranks, micro", [(8, 16), (2, 16), (2, 4)])
def test_the_order_by_modality_is_llavas_with_little_padding_and_balanced_ranks(ranks, micro):
    """On the sources of mix665k, each with a tenth of its records."""
    samples = experiments.order.made_up(576)
    rows = np.random.default_rng(1).permutation(len(samples.words))[::10]
    samples = experiments.order.Samples(*(values[rows] for values in vars(samples).values()))
    parts = 128 // micro
    llava = experiments.order.judge(samples, experiments.order.llava_order(
        samples.words, samples.has_image, 128, parts), ranks)
    ours, by_length = (experiments.order.judge(
        samples, experiments.order.our_order(samples, order, 128, parts), ranks)
        for order in ("modality", "length"))
    assert ours["padding"] < 0.08 and ours["slowest"] < 1.05 and llava["padding"] > 0.2
    assert ours["peak"] < 0.85 * llava["peak"]
    assert np.abs(ours["sources"] / llava["sources"] - 1).max() < 0.1
    assert (by_length["sources"] / llava["sources"]).max() > 5


def test_orders_are_compared_on_a_file_of_conversations(tmp_path, capsys, monkeypatch):
    toy.files.write_world(tmp_path, pictures=200, texts=2, test_pictures=2)
    tokenizer = train_tokenizer(toy.stand_ins.words(str(tmp_path)), 400)
    tokenizer.save(str(tmp_path))
    words = ["--data", f"{tmp_path}/instruct.json", "--llm", str(tmp_path), "--image_tokens", "49"]
    monkeypatch.setattr(sys, "argv", ["order", *words, "--ranks", "4", "--micro_batch_size", "4",
                                      "--batch_size", "16"])
    experiments.order.run()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["| LLaVA's", "| length", "| modality"]
    padding = [float(row[1].rstrip("%")) for row in rows]
    assert 0 < padding[1] < padding[2] < 0.7 * padding[0]
    monkeypatch.setattr(sys, "argv", ["order", *words, "--batch_size", "256"])
    with pytest.raises(UserError, match="200 records, fewer than --batch_size 256"):
        experiments.order.run()
    for wrong in ({"ranks": 3}, {"ranks": 0}, {"micro_batch_size": -1}, {"data": "x"}):
        with pytest.raises(UserError, match="expected"):
            experiments.order.Options(**wrong)


# ---- Speed


def bench(monkeypatch, capsys, **options):
    """(its last line of output as JSON, all lines) of experiments/bench.py with tiny models."""
    given = {"size": "tiny", "device": "cpu", "rounds": 1, **options}
    flags = [word for word in words_of(given, None) if word != "--no_peak"]
    monkeypatch.setattr(sys, "argv", ["bench", *flags, *["--no_peak"] * (not options.get("peak"))])
    for kind in ("COPIED", "MULTIPLIED"):
        monkeypatch.setitem(getattr(clock, kind), "cpu", 64)
    clock.copy_bandwidth.cache_clear()
    clock.matmul_rate.cache_clear()
    experiments.bench.run()
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), lines


def check_row(row):
    """A row has what is promised, and its ratio and share are those of the medians."""
    assert row.keys() >= {"what", "case", "unit", "ours", "theirs", "ratio", "is_cost", "floor",
                          "share", "peak_ratio", "aim"}
    sides = [row["ours"]] + [row["theirs"]] * (row["theirs"] is not None)
    for side in sides:
        assert side.keys() == {"name", "median", "min", "max", "peak_bytes"}
        assert side["min"] <= side["median"] <= side["max"]
    if row["theirs"]:
        ours, theirs = (side["median"] for side in sides)
        assert row["ratio"] == pytest.approx(ours / theirs if row["is_cost"] else theirs / ours)
    if row["floor"]:
        assert row["share"] == pytest.approx(row["floor"] / row["ours"]["median"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what, cases", [
    ("prefill", ["batch 1"]), ("decode", ["batch 1", "batch 8"]), ("train", ["batch 4"]),
    ("experts", ["train, batch 4", "prefill, batch 1", "decode, batch 1",
                 "train, batch 4, 8 turns"])])
def test_bench_compares_models_that_compute_the_same(monkeypatch, capsys, what, cases, dtype):
    monkeypatch.setattr(models, "DECODED", 4)
    found, _ = bench(monkeypatch, capsys, what=what, dtype=dtype)
    assert found.keys() == {"device", "threads", "versions", "commit", "options", "dtype", "size",
                            "rows", "left_out"}
    assert found["versions"].keys() == {"python", "torch", "transformers"}
    assert (found["dtype"], found["size"], found["left_out"]) == (dtype, "tiny", {})
    assert [row["case"] for row in found["rows"]] == cases
    for row in found["rows"]:
        check_row(row)
        assert row["what"] == what and row["floor"] > 0 and row["is_cost"] == (what == "experts")


def test_bench_times_pictures_and_conversations(monkeypatch, capsys):
    monkeypatch.setattr(inputs, "EACH", 2)
    for what, cases in (("pixels", 2), ("tokens", 1)):
        rows = bench(monkeypatch, capsys, what=what)[0]["rows"]
        assert len(rows) == cases and all(row["ratio"] > 0 for row in rows)
        for row in rows:
            check_row(row)


@pytest.mark.slow
def test_bench_measures_everything_with_peaks_and_names_what_is_left_out(monkeypatch, capsys,
                                                                          tmp_path):
    monkeypatch.chdir(tmp_path)  # without out/toy
    monkeypatch.setattr(experiments.bench, "ALL", ("tokens", "decode", "train", "load"))
    found, lines = bench(monkeypatch, capsys, what="all", batch_size=2, peak=True)
    assert Counter(row["what"] for row in found["rows"]) == {
        "tokens": 1, "decode": 1, "train": 1, "load": 3}
    assert any("sample.py is not timed: there is no out/toy/stage2" in line for line in lines)
    for row in found["rows"]:
        check_row(row)
        if row["what"] in models.CASES:
            assert row["ours"]["peak_bytes"] > 0 and row["peak_ratio"] > 0
            assert "batch 2" in row["case"]
    monkeypatch.setattr(models, "room", lambda device: 10**6)
    monkeypatch.setattr(experiments.bench, "ALL", ("train", "prefill"))
    left = bench(monkeypatch, capsys, what="all")[0]["left_out"]
    assert left.keys() == {"train"} and "needs" in left["train"]


@pytest.mark.slow
def test_bench_times_the_start_of_sample_py(monkeypatch, capsys, tmp_path):
    o = experiments.bench.Options(what="load", size="tiny", device="cpu", rounds=1,
                                  model=str(tmp_path / "llava"))
    with pytest.raises(UserError, match="^sample.py failed: error: .*llava"):
        loading.first_token(o)
    loading.make("tiny", o.model)
    row = loading.first_token(o)
    assert row["theirs"] is None and row["ours"]["median"] > 0.5 and "1.5 s" in row["aim"]


@pytest.mark.parametrize("options, message", [
    (dict(what="pixels", cold=True), "^--cold is for --what load or all, not pixels$"),
    (dict(what="train", out="x"), "^--out is for --what load or stages or all, not train$"),
    (dict(what="stages", model="x", out="x"), "^--model is for --what load or all, not stages$"),
    (dict(what="load", save=True), "^--save is for --what stages, not load$"),
    (dict(what="stages"), "^--what stages writes large files: say where with --out FOLDER$"),
    (dict(what="stages", out="x", steps=3, save=True), "^--steps 3: expected more than 3, "),
    (dict(what="load", size="7b"), "^--what load --size 7b writes a large checkpoint: "),
    (dict(what="train", size="tiny", device="cpu", dtype="float32"),
     "^train with two models of size tiny in float32 needs 0 GB, the cpu has 0$")])
def test_options_of_bench_that_do_not_fit_end_in_one_line(monkeypatch, options, message):
    monkeypatch.setattr(models, "room", lambda device: 10**6)
    with pytest.raises(UserError, match=message):
        o = experiments.bench.Options(**options)
        experiments.bench.rows_of(o.what, o)


@pytest.mark.parametrize("job", ["prefill", "decode", "train"])
def test_bench_notices_a_side_that_computes_something_else(monkeypatch, job):
    o = experiments.bench.Options(size="tiny", device="cpu", dtype="float32", rounds=1)
    case, start = models.Case(job, 2, ""), models.start

    def wrong(model, name, *more):
        if name == "transformers":
            norm = model.model.language_model.layers[1].input_layernorm  # its tensors may be ours
            norm.weight = torch.nn.Parameter(norm.weight + torch.randn(32))
        return start(model, name, *more)

    monkeypatch.setattr(models, "start", wrong)
    with pytest.raises(AssertionError, match="of both sides differ"):
        models.measure(case, o)


@pytest.mark.parametrize("kind", [shapes.NO_EXPERTS, shapes.EXPERTS])
@pytest.mark.parametrize("size", ["toy", "tiny"])
def test_the_floor_counts_each_number_that_a_token_reads(kind, size):
    o = experiments.bench.Options(size=size, device="cpu", dtype="float32")
    model = shapes.build(kind, o)
    batch = sample.make_batch(*models.data(models.Case("decode", 2, ""), o), model)
    cache = model.new_cache(2, "cpu", torch.float32)
    length = batch.ids.shape[1]
    cache.reserve(length)
    with torch.no_grad():
        model(batch, cache)
    parameters = {name: p.numel() for name, p in model.llm.named_parameters()
                  if not re.search("embed_tokens|expert|hypernet|guidance_norm", name)}
    cached = sum(t.numel() for layer in cache.layers
                 for t in (layer.keys, layer.values, *(layer.weights or ())))
    assert models.numbers_per_token(model.cfg, 2, length) == sum(parameters.values()) + cached


def test_llavas_way_gives_our_ids_and_labels(tokenizer):
    layout = PromptFormat(image_tokens=1, context=2**20)
    theirs = inputs.their_tokenizer(tokenizer)
    for turns in ([("<image>\nWhat colour?", "a red circle."), ("Why", "yes"), ("b? ", " no \n")],
                  [("Is there 日本?", "😀 two")]):
        ids, labels = inputs.llavas_way(turns, theirs, layout.system)
        image = "x" if "<image>" in turns[0][0] else None
        ours = encode(turns, tokenizer, layout, "r", image)
        assert ids.tolist() == ours.ids.tolist()
        assert labels.tolist() == ours.labels.tolist() and (labels >= 0).sum() > len(turns)


def test_a_prompt_costs_what_torch_counts():
    o = experiments.bench.Options(size="tiny", device="cpu", dtype="float32")
    model = shapes.build(shapes.NO_EXPERTS, o)
    batch = sample.make_batch(*models.data(models.Case("prefill", 1, ""), o), model)
    T = batch.ids.shape[1]
    batch = dataclasses.replace(batch, at=torch.tensor([T - 1]))
    counted = sum(count_flops(lambda: model(batch), model)["Global"].values())
    unseen = 4 * (T * T // 2) * model.cfg.llm.width * model.cfg.llm.depth  # torch counts it
    assert models.prompt_flops(model.cfg, models.ASKED) == counted - unseen


def test_sides_take_turns_and_change_their_order():
    calls = []
    sides = {name: functools.partial(calls.append, name) for name in "ab"}
    spent = clock.alternate(sides, 2)
    assert calls == list("baabba") and [len(times) for times in spent.values()] == [2, 2]


@pytest.mark.slow
def test_peaks_are_of_the_function_and_what_it_was_prepared_with():
    peak = clock.in_own_process(clock.peak_of, prepare_megabytes, "cpu")
    assert peak == pytest.approx(300e6, rel=0.1)


def prepare_megabytes():
    kept = np.ones(10**8, np.uint8)
    np.ones(5 * 10**8, np.uint8)
    return lambda: np.ones(2 * 10**8, np.uint8).sum() + kept[0]


def test_a_state_that_could_not_be_saved_ends_the_bench_of_stages(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(training.state, "save_state", lambda *_: "the disk is full")
    monkeypatch.setattr(training.state.dist, "get_rank", lambda: 0)
    bar = types.SimpleNamespace(write=lambda text, file: told.append(text))
    training.state.save_or_warn("", 3, None, None, None, bar=bar)

    def program(command, stdout, stderr):
        stdout.write(told[0])
        return types.SimpleNamespace(returncode=0)

    monkeypatch.setattr(stages.subprocess, "run", program)
    o = experiments.bench.Options(what="stages", size="tiny", out=str(tmp_path), save=True, steps=4)
    with pytest.raises(UserError, match="the state could not be saved, see .*none_1.txt"):
        stages.train_stage(o, 1, "none", 1)


@pytest.mark.slow
def test_bench_trains_both_stages_with_experts_and_without(tmp_path, capsys, monkeypatch):
    found, lines = bench(monkeypatch, capsys, what="stages", out=tmp_path, steps=4, batch_size=2,
                         save=True)
    found = found["rows"]
    assert [(run["stage"], run["experts"]) for run in found] == [(1, "none"), (2, "none"),
                                                                 (1, "generated"), (2, "generated")]
    for run in found:
        assert run["tokens_per_s"] > 0 and run["mfu"] is None and 0 <= run[
            "data_wait"] <= 1 and run["peak_gb"] > 0.1
    with open(tmp_path / "generated" / "stage1" / "log.jsonl") as f:
        rates = [json.loads(line)["tokens_per_s"] for line in f]
    log = [json.loads(line) for line in open(tmp_path / "generated" / "stage1" / "log.jsonl")]
    assert ["save_s" in row for row in log] == [False] * 3 + [True] and found[2]["save_s"] == log[
        3]["save_s"]
    # seconds of the one step that counts
    third = found[2]["save_s"] * (1 / found[2]["save_share"] - 1) / 1000
    assert third == pytest.approx(3 * log[2]["eta_s"] - 2 * log[1]["eta_s"] / 2) and third > 0
    assert len(rates) == 4 and found[2]["tokens_per_s"] == pytest.approx(sum(rates[2:]) / 2)
    config = json.load(open(tmp_path / "generated" / "stage1" / "config.json"))
    assert config["model"]["visual_expert"] == "1" and config["training"]["batch_size"] == 4
    assert json.load(open(tmp_path / "none" / "stage1" / "config.json"))["model"][
        "visual_expert"] == "none"
    assert not (tmp_path / "none" / "stage2").exists()
    cost = found[0]["tokens_per_s"] / found[2]["tokens_per_s"] - 1
    assert f"stage 1: experts cost {cost:.1%} of the time" in lines


# ---- On a GPU


ROW = "import json; print('words'); print(json.dumps({'what': 'x', 'ok': True}), flush=True); "
PARTS = {  # what a part's process runs, and what is told of its error
    "good": ("pass", None),
    "fails": ("import atexit, sys; atexit.register(lambda: print('a warning', file=sys.stderr)); "
              "raise ValueError('no such kernel')", "ValueError: no such kernel"),
    "refuses": ("import sys; sys.exit('error: --x 3')", "error: --x 3"),
    "hangs": ("import subprocess; subprocess.run(['sleep', '50'])", "took longer than 4 s"),
    "last": ("\nwhile open({json!r}).read().count('what') < 5: pass", None)}  # written row by row


def test_a_part_that_fails_or_hangs_costs_only_itself(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(experiments.gpu_check, "PARTS", {
        part: (None, 1 if part == "hangs" else 60) for part in PARTS})
    monkeypatch.setattr(experiments.gpu_check, "command", lambda part, work, o: [
        sys.executable, "-c", ROW + PARTS[part][0].format(json=os.path.join(o.out,
                                                                            "gpu_check.json"))])
    o = experiments.gpu_check.Options(out=str(tmp_path), device="cpu")
    began = time.perf_counter()
    assert experiments.gpu_check.check(o) == ["fails", "refuses", "hangs"]
    assert time.perf_counter() - began < 20
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert found.keys() == {"options", "seconds", "parts"} and list(found["parts"]) == list(PARTS)
    for part, (_, error) in PARTS.items():
        told = found["parts"][part]
        assert told.keys() == {"rows", "error", "seconds"} and told["seconds"] > 0
        assert told["rows"] == [{"what": "x", "ok": True}]  # what was measured before stays
        assert told["error"] is None if error is None else told["error"].startswith(error)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("  words") == 5 and "  failed: took longer than 4 s" in lines
    assert not [line for line in lines if line.startswith("{")]


def test_parts_that_no_time_is_left_for_are_named(tmp_path):
    o = experiments.gpu_check.Options(out=str(tmp_path), device="cpu", minutes=0.1)
    assert experiments.gpu_check.check(o) == list(gpu.PARTS)
    for part in json.loads((tmp_path / "gpu_check.json").read_text())["parts"].values():
        assert part == {"rows": None, "error": "not begun: no time was left", "seconds": None}


def test_a_claim_that_does_not_hold_is_a_failure(monkeypatch, tmp_path):
    monkeypatch.setattr(experiments.gpu_check, "PARTS", {"a": (None, 30), "b": (None, 30)})
    monkeypatch.setattr(experiments.gpu_check, "command", lambda part, work, o: [
        sys.executable, "-c", "print('{\"ok\": %s}')" % {"a": "false", "b": "null"}[part]])
    o = experiments.gpu_check.Options(out=str(tmp_path), device="cpu")
    assert experiments.gpu_check.check(o) == ["a"]


@pytest.fixture
def part(monkeypatch, tmp_path):
    """Runs a part of gpu_check.py with tiny models in this process: the list of its rows."""
    monkeypatch.setattr(models, "DECODED", 4)
    for kind in ("COPIED", "MULTIPLIED"):
        monkeypatch.setitem(getattr(clock, kind), "cpu", 64)
    o = experiments.gpu_check.Options(out=str(tmp_path), device="cpu", size="tiny")
    return lambda name: list(json.loads(json.dumps(row)) for row in gpu.PARTS[name][0](o))


CLAIMS = ["single = batched", "cached = batched", "captured = cached",
          "an answer moves logits before it",
          "the same, pooled over answers (negative control)",
          *(f"parity with transformers, {part}" for part in ("CLIP", "Llama", "LLaVA"))]
TOKENS = [f"greedy tokens that depend on {what}" for what in ("a batch", "a captured step")]


def test_what_must_hold_on_a_gpu_holds_here(part):
    rows = part("correctness")
    assert Counter(row["what"] for row in rows) == Counter(2 * CLAIMS + TOKENS)
    assert all(row["ok"] and row["value"] <= row["bound"] for row in rows
               if row["sense"] == "at most") and all(row["ok"] for row in rows)
    assert Counter(row["dtype"] for row in rows) == {"float32": 10, "bfloat16": 8}


@pytest.mark.parametrize("broken, failed", [
    ("pooling", CLAIMS[3]), ("cache", CLAIMS[1]), ("captured", CLAIMS[2]),
    ("norm", "parity with transformers, LLaVA")])
def test_a_wrong_model_is_noticed(part, monkeypatch, broken, failed):
    monkeypatch.setattr(correct, "DTYPES", (torch.float32,))
    if broken == "pooling":  # guidance sees the answers
        make = correct.make_batch
        monkeypatch.setattr(correct, "make_batch", lambda *a: (
            lambda batch: dataclasses.replace(batch, pool_id=batch.use_id))(make(*a)))
    elif broken == "cache":  # a turn's weights are those of its first turn
        monkeypatch.setattr(LayerCache, "keep", lambda self, weights, use_id: vars(
            self).update(weights=tuple(w[:, :1] for w in self.weights or weights)))
    elif broken == "captured":
        step = correct.CapturedStep.__call__
        monkeypatch.setattr(correct.CapturedStep, "__call__",
                            lambda self, *a: step(self, *a).roll(1, -1))
    else:
        build = correct.build_theirs

        def wrong(*a):
            theirs = build(*a)
            theirs.model.language_model.norm.weight.data[0] = 9
            return theirs

        monkeypatch.setattr(correct, "build_theirs", wrong)
    assert failed in {row["what"] for row in part("correctness") if not row["ok"]}


def test_the_fast_parts_yield_what_is_promised(part):
    machine, = part("machine")
    assert machine.keys() == {"device", "memory_gb", "versions", "commit", "copy_bandwidth",
                              "matmul_rate"}
    assert machine["versions"]["torch"] == torch.__version__
    against = {"decode": ["eager", "transformers"], "prefill": ["transformers"] * 2,
               "experts": ["no experts"] * 2, "static_cache": ["eager",
                                                               "transformers, static cache"]}
    for name, sides in against.items():
        rows = part(name)
        assert [row["theirs"]["name"] for row in rows] == sides
        for row in rows:
            check_row(row)
            assert row["size"] == "tiny" and row["share"] > 0
            assert ("tokens_per_s" in row) == row["unit"].endswith("token")


def test_without_transformers_its_sides_are_null(part, monkeypatch, capsys):
    find = gpu.importlib.util.find_spec
    monkeypatch.setattr(gpu.importlib.util, "find_spec",
                        lambda name: None if name == "transformers" else find(name))
    assert part("machine")[0]["versions"]["transformers"] is None
    assert [row["theirs"] and row["theirs"]["name"] for row in part("decode")] == ["eager"]
    assert [row["theirs"] for row in part("prefill")] == [None, None]
    assert [row["ok"] for row in part("correctness")][-3:] == [None] * 3
    assert part("tests") == [{"what": "tests", "result": None}]
    assert [row["theirs"] for row in part("loads")] == [None]
    assert "left out: there is no transformers" in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_measures_everything(tmp_path):
    done = subprocess.run(["bash", os.path.join(HERE, "experiments", "gpu_check.sh"), "--device",
                           "cpu", "--size", "tiny", "--minutes", "15"], capture_output=True,
                          text=True, timeout=1000,
                          env=os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    rows = {name: part["rows"] for name, part in found["parts"].items()}
    assert {name: len(some) for name, some in rows.items()} == {
        "machine": 1, "correctness": 18, "decode": 2, "prefill": 2, "toy": 6, "stages": 4,
        "experts": 2, "tests": 1, "static_cache": 2, "loads": 4}
    assert [row["case"] for row in rows["toy"]] == [*gpu.TOY, "all"]
    assert rows["toy"][-1]["means"].keys() >= {"heldout", "shuffled", "experts_off"}
    assert "passed" in rows["tests"][0]["result"]
    for row in rows["stages"]:
        assert row.keys() >= {"stage", "experts", "tokens_per_s", "mfu", "peak_gb", "foreseen_gb",
                              "size", "micro_batch_size"}


# ---- Pictures by other code


@pytest.mark.parametrize("scattered", [False, True])
def test_pictures_are_of_the_style_that_is_promised(scattered, monkeypatch):
    places, draw = [], experiments.outsider.draw_thing
    monkeypatch.setattr(experiments.outsider, "draw_thing", lambda pen, kind, x, y, r,
                        colour: (places.append((x, y, r)), draw(pen, kind, x, y, r, colour)))
    across = 0
    for seed in range(40):
        places.clear()
        image, things = experiments.outsider.random_picture(random.Random(seed), scattered)
        (wide, high), n = image.size, len(things)
        assert 200 <= wide <= 800 and 200 <= high <= 800 and wide != high and 2 <= n == len(
            places) <= 5
        assert {*things} <= {*toy.world.PAIRS} - toy.world.HELD_OUT
        ends = [[(int(3 * (x + s * r * 0.999) / wide), int(3 * (y + s * r * 0.999) / high))
                 for s in (-1, 1)] for x, y, r in places]
        across += sum(a != b for a, b in ends)
        if not scattered:
            assert len({a for a, _ in ends}) == n  # a ninth each
    assert (across > 40) == scattered and (across == 0) == (not scattered)


def test_questions_have_one_answer_each():
    asked = experiments.outsider.questions([("red", "star"), ("red", "ring"), ("blue", "ring")],
                                           "x")
    assert [(q.text, q.answer) for q in asked] == [
        ("What colour is the star?", "red"), ("What shape is the blue thing?", "ring"),
        ("How many things are there?", "3"),
        ("How many blue things are there?", "1"), ("How many red things are there?", "2")]
    assert Counter(q.family for q in asked) == {"colour": 1, "shape": 1, "count": 3}


# ---- Step size


@pytest.fixture
def small_sites(monkeypatch):
    monkeypatch.setattr(experiments.step_size, "SITES",
                        {"E_V1": (24, 20, 16), "E_V2": (20, 20, 16), "E_L": (20, 20, 16)})


@pytest.mark.parametrize("site", ["E_V1", "E_V2", "E_L"])
def test_the_form_linear_learns_as_an_encoder_without_a_scale_does(small_sites, monkeypatch, site):
    class Plain(Expert):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            encoder, self.encoder = self.encoder, torch.nn.Linear(sizes[0], sizes[3])
            self.encoder.weight.data = encoder.weight.data * encoder.scale
            self.encoder.bias.data = encoder.bias.data
            self.encoder.register_forward_pre_hook(lambda module, x: rms(x[0]))

    monkeypatch.setattr(experiments.step_size, "STEPS", (1, 10, 20))
    train = experiments.step_size.train
    linear, ours = (train(site, "fresh", 1e-2, form)[1] for form in ("linear", "scaled"))
    monkeypatch.setattr(experiments.step_size, "Expert", Plain)
    plain = train(site, "fresh", 1e-2, "scaled")[1]
    assert linear == pytest.approx(plain, rel=1e-2) and ours != pytest.approx(plain, rel=1e-2)


def test_step_size_shows_every_run_in_a_row_and_in_a_plot(small_sites, monkeypatch, capsys,
                                                          tmp_path):
    monkeypatch.setattr("sys.argv", ["step_size", "--site", "E_V1", "--lr", "1e-3", "--form", "one",
                                     "--form", "scaled_norm", "--out", str(tmp_path / "a.png")])
    experiments.step_size.run()
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[1:4] for row in rows] == [
        [data, "0.001", form] for data in ("fresh", "repeated") for form in ("one", "scaled_norm")]
    assert {row.count("|") for row in rows} == {head.count("|")}
    assert (tmp_path / "a.png").stat().st_size > 1000


# ---- Pictures of what the experts do


LOOK = sample.Options(max_new_tokens=6)
ASKED = [question.removeprefix("<image>\n") for question, _ in TURNS]


def checkpoint_of(model, layout=LAYOUT):
    return weights.Checkpoint(model, TOKENIZER, Preprocess(28), layout.system, {})


def look_at(model, image=noise(0), questions=ASKED, o=LOOK):
    return experiments.look.look(checkpoint_of(model), image, questions, o)


def guidance_of(model, batch):
    """What `Llama.guidance` gives in a pass without a cache."""
    real, found = model.llm.guidance, []
    model.llm.guidance = lambda *given: found.append(real(*given)) or found[0]
    logits_of(model, batch)
    del model.llm.guidance
    return found[0]


@torch.no_grad()
def norms_of_a_whole_pass(model, batch):
    """({block: (|E_L| float[T], |FFN| float[T])}, {block: [K of each turn]}), without a cache: from
    what each FFN reads and the guidance."""
    inputs, norms, made, (g, use_id, hypernet) = {}, {}, {}, guidance_of(model, batch)
    handles = [block.mlp.register_forward_pre_hook(
                   lambda module, x, n=n: inputs.update({n: x[0]}))
               for n, block in enumerate(model.llm.layers)]
    logits_of(model, batch)
    for handle in handles:
        handle.remove()
    for n in model.cfg.expert_blocks():
        block = model.llm.layers[n]
        made[n] = block.expert.weights(g, hypernet)
        shift = block.expert(inputs[n], made[n], use_id)
        norms[n] = shift[0].norm(dim=-1), block.mlp(inputs[n])[0].norm(dim=-1)
    return norms, {n: [torch.cat([w[0, u].flatten() for w in pair])
                       for u in range(batch.turns)] for n, pair in made.items()}


@pytest.mark.parametrize("kind", [{}, EVERY], ids=["posterior", "both, all"])
def test_a_look_shows_what_the_experts_compute_in_the_whole_conversation(kind):
    model = randomly_trained(torch.float32, seed=3, **kind)
    whole = encode(TURNS, TOKENIZER, LAYOUT, "whole", "x.png")
    ids = [TOKENIZER.encode(answer) + [TOKENIZER.eos] for _, answer in TURNS]
    with dictated(torch.tensor([i]) for _ in range(3) for answer in ids for i in answer):
        found = look_at(model, o=sample.Options(max_new_tokens=40))
    visual = look_pixels(noise(0))
    batch = batch_of([whole], [visual], torch.float32)
    norms, made = norms_of_a_whole_pass(model, batch)
    with torch.no_grad(), expert_shares(model, [batch]) as logged:  # what the training log shows
        logits_of(model, batch)
    assert list(logged.values()) == pytest.approx(
        [(shift.norm() / static.norm()).item() for shift, static in norms.values()], rel=1e-4)

    assert found.blocks == list(norms) and [t.answer for t in found.turns] == [
        answer for _, answer in TURNS]
    system = 1 + len(TOKENIZER.encode(LAYOUT.system))
    for t, (turn, (prompt, answer)) in enumerate(zip(found.turns, segments(whole))):
        places = range(max(prompt.start, system), answer.stop - (t == len(TURNS) - 1))
        patches = [i for i in places if whole.ids[i] == IMAGE]
        words = [[i] for i in places if i not in patches[1:]]
        words = [patches if w[0] in patches else w for w in words]
        for row, (shift, static) in zip(turn.shares, norms.values()):
            expected = [(shift[w].square().sum() / static[w].square().sum()).sqrt() for w in words]
            assert row == pytest.approx(torch.stack(expected).numpy(), rel=1e-3)
        assert turn.words[0] == "USER:" and turn.words[turn.answer_at - 1] == "ASSISTANT:"
        assert len(turn.words) == len(words) and turn.words.count("picture") == (t == 0)
        assert (turn.words[-1] == "</s>") == (t < len(TURNS) - 1)  # the last token never runs
    cosine = torch.nn.functional.cosine_similarity
    for i in range(3):
        for j in range(3):
            expected = np.mean([cosine(k[i], k[j], 0).item() for k in made.values()])
            bias = [model.llm.layers[n].expert for n in made]
            part = np.mean([cosine(*(k[u] - torch.cat([b.down.flatten(), b.up.flatten()])
                                     for u in (i, j)), 0).item()
                            for k, b in zip(made.values(), bias)])
            k, w = found.cosines.values()
            assert (k[i, j], w[i, j]) == pytest.approx((expected, part), abs=1e-4)
    assert w.min() < 0.9


def test_patches_show_the_shift_of_each_visual_expert_in_the_models_own_pass():
    model = randomly_trained(torch.float32, seed=3, **EVERY)
    found, parts, seen = look_at(model, questions=ASKED[:1]), model.projector, {}
    handles = [getattr(parts, name).register_forward_hook(
                   lambda module, x, y, name=name: seen.update({name: (x[0], y)}))
               for name in ("expert_1", "linear_2", "expert_2")]
    with torch.no_grad():
        model.projector(model.features(look_pixels(noise(0))[None]))
    for handle in handles:
        handle.remove()
    (_, e1), (shifted, l2), (_, e2) = (seen[n] for n in ("expert_1", "linear_2", "expert_2"))
    expected = [e1.norm(dim=-1) / (shifted - e1).norm(dim=-1), e2.norm(dim=-1) / l2.norm(dim=-1)]
    assert list(found.patches) == ["|E_V1| / |L1|", "|E_V2| / |L2|"]
    for shares, right in zip(found.patches.values(), expected):
        assert shares == pytest.approx(right.view(2, 2).numpy(), rel=1e-3)
    assert found.picture.shape == (28, 28, 3) and found.picture.std() > 0.1
    assert found.swapped == [] and found.cosines == {}  # one turn


@pytest.mark.parametrize("image", [noise(0), None], ids=["picture", "text"])
@torch.no_grad()
def test_changed_answers_are_those_of_llava_and_of_the_next_turns_weights(image):
    """Token by token without a cache, each after the real answers to the others."""
    model = randomly_trained(torch.float32, seed=3, visual_expert="1", language_expert="all")
    found = look_at(model, image)
    told = experiments.look.Told(checkpoint_of(model), image, ASKED, LOOK)
    ids, begins = told.chat.ids, [begin for begin, _, _ in told.spans]
    use_id = np.searchsorted(begins, np.arange(len(ids) + 6), side="right") - 1
    pool_id = np.full(len(ids) + 6, -1)
    for t, (begin, answer_at, _) in enumerate(told.spans):
        begin = max(begin, 1 + len(TOKENIZER.encode(LAYOUT.system)))
        pool_id[begin:answer_at] = np.where(np.equal(ids[begin:answer_at], IMAGE), -1, t)

    def batch(ids, use_id):
        T = len(ids)
        sample = Sample(np.array(ids), np.full(T, IGNORE), pool_id[:T], use_id[:T], 3,
                        image and "x", "", 0)
        return collate([sample], [look_pixels(image)] if image else [])

    guidance = guidance_of(model, batch(ids, use_id))

    def answers(model, step):
        """Where each turn t runs with the weights of turn t + step."""
        model.llm.guidance = lambda x, batch: (guidance[0], batch.use_id, model.llm.hypernet)
        for t, (_, answer_at, _) in enumerate(told.spans):
            use, new = (np.minimum(use_id, t) + step) % 3, []
            while len(new) < 6 and TOKENIZER.eos not in new:
                logits = logits_of(model, batch(ids[:answer_at] + new, use))
                new.append(logits[0, -1].argmax().item())
            yield TOKENIZER.decode(new)

    real = [turn.answer for turn in found.turns]
    assert list(answers(model, 0)) == real
    assert list(answers(model, 1)) == found.swapped != real
    assert list(answers(static(model), 0)) == found.zeroed != real


@pytest.mark.filterwarnings("ignore:Glyph")  # random models write in every script
@pytest.mark.parametrize("kind, image, panels", [
    (dict(visual_expert="none"), noise(0), 3), (dict(language_expert="none"), noise(0), 2),
    ({}, None, 2), (EVERY, noise(0), 5)],
    ids=["language only", "visual only", "no picture", "all"])
def test_a_look_draws_what_a_model_has(kind, image, panels):
    found = look_at(randomly_trained(torch.float32, seed=3, **kind), image)
    figure = experiments.look.draw(found)
    top, bottom = figure.subfigs
    assert len([axes for axes in top.axes if axes.get_title()]) == panels
    texts = [text.get_text() for axes in bottom.axes for text in axes.texts]
    questions = [text for text in texts if text[3:] in ASKED]
    assert questions == [f"{t + 1}. {question}" for t, question in enumerate(ASKED)]
    figure.savefig(file := io.BytesIO(), dpi=100)
    assert Image.open(file).width == 1200


@pytest.mark.parametrize("source", ["static", "latent", "mlp"])
def test_a_look_at_other_sources_of_weights(source):
    torch.manual_seed(0)
    model = BaselineVLM(BaselineConfig(VISION, LLAMA, expert_embed=8, expert_rank=4,
                                       weight_source=source))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    found = look_at(model)
    assert found.blocks == [2, 3] and bool(found.swapped) == (source != "static")
    k, *_ = found.cosines.values()
    assert source == "mlp" or k == pytest.approx(1)


def test_a_look_at_a_model_without_experts_ends_with_one_line():
    plain = dict(visual_expert="none", language_expert="none")
    lora = BaselineConfig(VISION, LLAMA, visual_expert="none", weight_source="lora")
    even = dataclasses.replace(LLAMA, kv_heads=4)
    for cfg in (VLMConfig(VISION, LLAMA, **plain), lora, VLoRAConfig(VISION, even)):
        with pytest.raises(UserError, match="^the model has no experts to look at .*--model$"):
            look_at(weights.build_empty(cfg))
    with pytest.raises(UserError, match="visual expert only.*--image$"):
        look_at(weights.build_empty(VLMConfig(VISION, LLAMA, language_expert="none")), None)


def test_look_writes_its_picture(tmp_path, monkeypatch, capsys):
    checkpoint = checkpoint_of(randomly_trained(torch.float32, seed=3))
    monkeypatch.setattr(sample, "load", lambda o, name: (checkpoint, name))
    noise(0).save(tmp_path / "x.png")
    monkeypatch.setattr("sys.argv", ["look", str(tmp_path / "x.png"), "--model", str(tmp_path),
                                     "--prompt", "How many?", "--out", str(tmp_path / "a.png")])
    experiments.look.run()
    assert Image.open(tmp_path / "a.png").width == 1200
    assert capsys.readouterr().out == f"wrote {tmp_path}/a.png\n"


# ---- How cost grows


def test_exponents_are_fitted_to_the_larger_half():
    x = [1, 2, 4, 8, 16, 32]
    assert experiments.growth.exponent(x, [5 + n ** 2 * (n > 2) for n in x]) == pytest.approx(
        2, abs=0.1)
    assert experiments.growth.exponent(x, [3 * n ** 0.5 for n in x]) == pytest.approx(0.5)
    assert experiments.growth.exponent([1], [2.0]) is None


def test_each_quantity_grows_alone_up_to_the_sizes_that_are_told():
    for name, (values, base) in experiments.growth.AXES.items():
        assert list(values) == sorted(values)
    seen, real = [], experiments.growth.collate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments.growth, "collate", lambda *a: seen.append(real(*a)) or seen[-1])
        turns, base = experiments.growth.AXES["turns"]
        for n in turns:
            experiments.growth.prepare(dataclasses.replace(base, turns=n, rows=1))
    for n, batch in zip(turns, seen, strict=True):
        assert batch.turns == n and batch.lengths.tolist() == [516]
        assert all((batch.pool_id == turn).any() for turn in range(n))


@pytest.mark.slow
def test_growth_draws_time_and_memory(tmp_path):
    path = tmp_path / "new" / "growth.png"
    done = Program("experiments/growth.py", "--out", path, "--rounds", 1, "--most", 2,
                   PYTHONPATH=HERE).communicate()[0]
    found = json.loads(done.splitlines()[-1])["found"]
    assert path.exists() and set(found) == set(experiments.growth.AXES)
    assert found["turns"]["x"] == [1, 2] and found["positions"]["x"] == []
    assert all(size > 2**20 for size in found["rows"]["bytes"])
