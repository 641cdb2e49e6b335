"""What tools/ promise, one test per sentence."""
import json
import math
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

import tools.check_data
import tools.plot_log
import weights
from cli import UserError
from data import encode, Preprocess, PromptFormat, SYSTEM, turns_of_record
from tests.helpers import TOKENIZER, trained
from tests.records import GOOD, messages, write_json
from training.curves import draw, read_runs, smooth


# check_data

def program(*argv):
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return subprocess.run([sys.executable, "-m", "tools.check_data", *map(str, argv)],
                          capture_output=True, text=True, cwd=root)


def run_check_data(monkeypatch, capsys, world, records, *argv):
    """Run check_data in this process; returns what it prints."""
    argv = ["check_data", "--data", write_json(world, records), "--images", str(world), *argv]
    monkeypatch.setattr(sys, "argv", argv)
    tools.check_data.run()
    return capsys.readouterr().out


def text(*texts):
    return {"conversations": messages(*texts)}


@pytest.fixture
def world(tmp_path, tokenizer):
    """A folder with a picture and a tokenizer."""
    Image.linear_gradient("L").save(tmp_path / "x.png")
    tokenizer.save(tmp_path)
    return tmp_path


@pytest.fixture
def count(monkeypatch, capsys, world):
    """A function from records to the {kind: number} that check_data prints."""
    def count(records, *argv):
        out = run_check_data(monkeypatch, capsys, world, records, *argv).splitlines()
        assert out[0] == f"{len(records)} records"
        return {kind: int(n) for n, kind in (line.split(maxsplit=1) for line in out[1:])}
    return count


@pytest.fixture
def show(monkeypatch, capsys, world):
    """A function from options to what check_data prints about two good records."""
    return lambda *argv: run_check_data(monkeypatch, capsys, world, [GOOD, GOOD],
                                        "--llm", str(world), *argv)


def test_it_lists_every_fault_and_exits_with_1_if_there_is_one(world):
    good = program("--data", write_json(world, [GOOD]), "--images", world)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout.split("\n") == ["1 records", "         1 with a picture", ""]
    (world / "empty.png").touch()
    Image.new("1", (9500, 9500)).save(world / "large.png")  # Pillow would warn in three lines
    records = [GOOD, dict(GOOD, image="none.png"), dict(GOOD, image="empty.png"),
               dict(GOOD, image="../x.png"), {"id": "q", "conversations": []}, GOOD,
               dict(GOOD, image="large.png")]
    bad = program("--data", write_json(world, records), "--images", world)
    assert bad.returncode == 1 and bad.stderr == "error: 5 of 7 records cannot be used\n"
    found = [line.split(":")[0] for line in bad.stdout.splitlines()]
    assert found[:5] == [f"record {i} (id {'q' if i == 4 else 'a1'})" for i in (1, 2, 3, 4, 6)]
    assert [line.split(maxsplit=1) for line in found[5:]] == [
        ["7", "records"], ["5", "that cannot be used"], ["2", "with a picture"]]


def test_it_counts_what_is_left_out_or_read_differently_from_llava(count):
    records = [
        GOOD, dict(GOOD, conversations=messages("<image>Q<image>", "a")), text("Q", "a"),
        text("Q", "a", "R"), {"conversations": messages("", "x", "Q", "a")[1:]}, text("Q", ""),
        text("say </s>", "a"), text("say", "USER: a ASSISTANT: b"), text("the <image> tag", "a"),
        dict(GOOD, conversations=messages("<image>", "<image>"))]
    assert count(records) == {
        "without a picture": 7,
        "with a picture": 3,
        "with several <image> in a question: they count as one": 1,
        "ending with a question: it is left out": 1,
        "beginning with an answer: it is left out": 1,
        "with an empty message: it is kept": 1,
        "with </s>, <unk> or ASSISTANT: in a message: read as text": 2,
        "with <image> as text: it refers to no picture": 2}


def test_it_counts_what_the_context_truncates_if_a_tokenizer_is_given(world, count, capsys):
    records = [text("Q", "a"), text("Q", "a", "Q", "b " * 200), text("Q " * 200, "a")]
    lost = "truncated: the context cuts its last answers partly or completely"
    nothing = "without an answer within the context: nothing is trained"
    argv = ["--llm", str(world), "--context", "300"]
    assert count(records, *argv) == {"without a picture": 3, lost: 1, nothing: 1,
                                     "cut by the context of 300 positions, 576 for a picture": 2}
    assert count(records, "--llm", str(world)) == {
        "without a picture": 3, "cut by the context of 2048 positions, 576 for a picture": 0}
    with pytest.raises(UserError, match="1 of 1 records"):
        count([GOOD], *argv)  # a picture takes 576 positions
    assert "ends before the picture" in capsys.readouterr().out


def test_it_reads_context_image_tokens_and_system_text_from_the_checkpoint(world, count, capsys):
    model = trained()
    state = {name: p.detach() for name, p in model.named_parameters()}
    for folder, system in (("ours", "A chat."), ("wordy", "Why? " * 99)):
        weights.save(str(world / folder), model.cfg, state, TOKENIZER, Preprocess(28), system,
                     stage=2, sources={}, training={})
    lost = "truncated: the context cuts its last answers partly or completely"
    cut = "cut by the context of 200 positions, 4 for a picture"
    records = [GOOD, dict(GOOD, conversations=GOOD["conversations"][:2])]
    assert count(records, "--llm", str(world / "ours")) == {"with a picture": 2, cut: 0}
    long = dict(GOOD, conversations=messages("<image>", "yes", "R", "red " * 300))
    argv = ["--llm", str(world / "ours")]
    assert count([GOOD, long], *argv) == {"with a picture": 2, cut: 1, lost: 1}
    nothing = "without an answer within the context: nothing is trained"
    assert count([text("Q", "a")], "--llm", str(world / "wordy"))[nothing] == 1
    (world / "config.json").write_text('{"model_type": "llama", "max_position_embeddings": 120}')
    llama = ["--llm", str(world), "--system", ""]  # it has no picture: 576 unless given
    cut = "cut by the context of 120 positions, 4 for a picture"
    assert count(records, *llama, "--image_tokens", "4") == {"with a picture": 2, cut: 0}
    with pytest.raises(UserError, match="2 of 2 records"):
        count(records, *llama)
    assert "the context of 120 ends before the picture" in capsys.readouterr().out


def test_it_counts_pictures_that_are_one_flat_colour(world, count):
    stroke = np.zeros((8, 8, 4), np.uint8)  # black on black, as a drawing program saves it
    stroke[2:5, :, 3] = 255
    white = stroke + np.array([255, 255, 255, 0], np.uint8)
    for name, values in (("stroke", stroke), ("white", white), ("flat", stroke[..., :3]),
                         ("deep", np.full((8, 8), 9, np.uint16))):
        Image.fromarray(values).save(world / f"{name}.png")
    files = ["x", "stroke", "stroke", "white", "flat", "deep"]
    records = [dict(GOOD, image=f"{name}.png") for name in files]
    flat = "pictures are one flat colour"
    assert count(records) == {
        "with a picture": 6, flat: 2, f"{flat} once transparency is dropped": 2}
    assert count(records, "--background", "white") == {
        "with a picture": 6, flat: 2, f"{flat} once it is on white": 1}


def test_it_counts_keys_that_are_not_read_and_start_tokens(count):
    records = [dict(GOOD, source="web", model="", width=640), text("say <s>", "a"),
               {"conversations": [dict(m, time=3) for m in messages("Q", "a")], "source": "book"}]
    assert count(records) == {
        "with a picture": 1, "without a picture": 2, "with <s> in a message: read as text": 1,
        "with the key source: it is not read": 2, "with the key width: it is not read": 1,
        "with the key time: it is not read": 1}


def test_what_other_trainers_read_ends_in_one_line_that_names_it(world, monkeypatch, capsys):
    """Formats of other trainers, and pictures that are not files: each record ends in one line."""
    question, answer = GOOD["conversations"][:2]
    about = {"conversations": [question, answer]}
    records = [
        (dict(about, images=["x.png"]), "the key `images`"),
        ({"messages": [], "images": ["x.png"]}, "the key `images`"),
        (dict(about, image=["x.png"]), "`image` is"), (dict(about, image=""), "`image` is ''"),
        (dict(about, image="https://x.org/x.png"), "`image` is"),
        (dict(about, image="sub\\x.png"), "no such picture"),
        (dict(about, image="x.png "), "no such picture"),
        (dict(about, image=str(world / "x.png")), None),
        (dict(text("Q", "a"), system="In French."), "the key `system`"),
        (text("Q", "a") | {"video": "clip.mp4"}, "the key `video`"),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *messages("Q", "a")]},
         "message 0 has the role 'system'"),
        ({"conversations": [{"from": "user", "value": "Q"}]}, "message 0 has the role 'user'"),
        ({"conversations": [question, {"from": "gpt", "value": None}]}, "message 1 does not have"),
        ({"conversations": [question, {"from": "gpt", "value": 3}]}, "message 1 does not have"),
        (dict(about, image="x.png", weight=0), "the key `weight`"),
        (dict(about, image="x.png", id=float("nan")), None)]
    with pytest.raises(UserError, match=f"14 of {len(records)} records cannot be used"):
        run_check_data(monkeypatch, capsys, world, [record for record, _ in records])
    lines = capsys.readouterr().out.splitlines()
    faults = [(f"record {i}", words) for i, (_, words) in enumerate(records) if words]
    for line, (name, words) in zip(lines, faults, strict=False):
        assert line.startswith(name) and words in line and len(line) < 300


def test_it_opens_several_pictures_at_a_time_and_not_again_for_each_record(count, monkeypatch):
    opened, meet = [], threading.Barrier(2, timeout=20)

    def open_two(path, name):
        opened.append(path)
        if len(opened) <= 2:
            meet.wait()  # until another thread opens a picture, too
        return Image.linear_gradient("L").convert("RGB")

    monkeypatch.setattr(tools.check_data, "open_image", open_two)
    assert count([GOOD, dict(GOOD, image="y.png")] * 500) == {"with a picture": 1000}
    assert len(opened) < 100  # a few threads may meet at a new picture


def test_show_prints_what_the_model_reads_with_the_trained_part_marked(show):
    out = show("--show", "1")
    assert out.splitlines()[0].startswith("--- record 0 (id a1), picture ")
    assert out[out.index("\n") + 1:] == (
        f"<s>{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: [[A cat.</s>]]"
        "USER: Colour? ASSISTANT: [[red</s>]]\n")


def test_show_reads_a_folder_that_has_only_a_model_file(world, proto, slow, show):
    (world / "tokenizer.json").unlink()
    (world / "tokenizer.model").write_bytes(proto)
    out = show("--show", "1")
    assert out[out.index("\n") + 1:] == (
        f"<s>{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: [[A cat.</s>]]"
        "USER: Colour? ASSISTANT: [[red</s>]]\n")
    line = json.loads(show("--show", "1", "--json", "--system", ""))
    assert line["ids"][:1 + len(slow.encode("USER: "))] == [1] + slow.encode("USER: ")


def test_show_json_prints_ids_and_labels_one_sample_per_line(show, tokenizer):
    out = show("--show", "3", "--json", "--system", "", "--image_tokens", "4")
    lines = [json.loads(line) for line in out.splitlines()]
    prompt_format = PromptFormat(system="", image_tokens=4)
    sample = encode(turns_of_record(GOOD, "r"), tokenizer, prompt_format, "r", "x")
    assert len(lines) == 2 and lines[0]["record"] == "record 0 (id a1)"
    for name in ("ids", "labels", "pool_id", "use_id"):
        assert lines[1][name] == getattr(sample, name).tolist()


@pytest.mark.parametrize("argv", [
    [], ["--check"], ["--show", "1", "--data", "d", "--images", "i"], ["--chekc"], ["--data", "d"]])
def test_a_command_line_that_lacks_something_is_refused(monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", ["check_data", *argv])
    with pytest.raises(UserError):
        tools.check_data.run()


def test_the_context_of_data_is_positive():
    with pytest.raises(UserError, match="context"):
        tools.check_data.Options(context=0)


# plot_log

def write_log(folder, losses, validation=()):
    folder.mkdir(parents=True)
    rows = [{"step": i, "loss": loss, "lr": 1e-3} for i, loss in enumerate(losses)]
    for step, loss in validation:
        rows[step]["val_loss"] = loss
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def plot_log(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["plot_log", *map(str, argv)])
    tools.plot_log.run()


def test_every_stage_of_a_run_is_read_with_all_its_points(tmp_path):
    write_log(tmp_path / "stage0" / "llm", [3.0, 2.0, 1.0], [(2, 1.5)])
    write_log(tmp_path / "stage2", [0.5] * 100, [(49, 0.6), (99, 0.5)])
    (tmp_path / "stage2" / "log.jsonl").open("a").write('{"step": 100, "lo')  # still being written
    write_log(tmp_path / "stage1", [])  # no step yet
    stages = read_runs([str(tmp_path)])[str(tmp_path)]
    assert list(stages) == [os.path.join("stage0", "llm"), "stage2"]
    assert stages[os.path.join("stage0", "llm")] == ([(0, 3.0), (1, 2.0), (2, 1.0)], [(2, 1.5)])
    assert [len(part) for part in stages["stage2"]] == [100, 2]
    write_log(tmp_path / "nan", [1.0, math.nan, 2.0])
    runs = read_runs([tmp_path / "nan"])
    assert runs == {tmp_path / "nan": {"": ([(0, 1.0), (2, 2.0)], [])}}


def test_smoothing_keeps_the_number_of_points_and_their_mean():
    assert smooth([3.0, 1.0, 2.0]).tolist() == [3.0, 1.0, 2.0]  # too few to average
    smoothed = smooth([1.0, 3.0] * 300)
    assert len(smoothed) == 600 and abs(smoothed[10:-10] - 2).max() < 0.06


@pytest.mark.parametrize("losses, expected", [
    ([0.095, 6.8], [0.1, 0.2, 0.5, 1, 2, 5]), ([0.62, 1.1], [0.7, 0.8, 0.9, 1, 1.1])])
def test_the_losses_have_round_numbers_on_a_logarithmic_axis(losses, expected):
    axes, = draw({"a": {"stage1": ([*enumerate(losses)], [])}}).axes
    low, high = axes.get_ylim()
    assert axes.get_yscale() == "log" and low < losses[0] and high > losses[-1]
    ticks = [tick for tick in axes.get_yticks() if losses[0] <= tick <= losses[1] + 1e-9]
    assert ticks == pytest.approx(expected)
    assert axes.yaxis.get_major_formatter()(expected[0]) == str(expected[0])


def test_every_stage_gets_a_panel_and_every_run_a_curve(tmp_path, monkeypatch, capsys):
    for run, scale in (("a", 1), ("b", 0.8)):
        write_log(tmp_path / run / "stage1", [2.0 * scale, 1.5 * scale, 1.2 * scale], [(2, 1.3)])
    write_log(tmp_path / "b" / "stage2", [1.0])
    for names, panels in ((["a"], 1), (["a", "b"], 2)):
        folders = [str(tmp_path / name) for name in names]
        plot_log(monkeypatch, *folders, "--out", tmp_path / "c.png")
        assert capsys.readouterr().out.endswith(f"\n\nwrote {tmp_path / 'c.png'}\n")
        figure = draw(read_runs(folders))
        width, height = Image.open(tmp_path / "c.png").size
        assert [width, height] == pytest.approx(100 * figure.get_size_inches())
        assert width == panels * 560
        assert [axes.get_title() for axes in figure.axes] == ["stage1", "stage2"][:panels]
        lines = figure.axes[0].lines
        colours = [to_hex(line.get_color()) for line in lines]
        assert colours == [to_hex("C0")] * 3 + [to_hex("C1")] * 3 * (panels - 1)
        assert lines[0].get_ydata().tolist() == [2.0, 1.5, 1.2]
        assert lines[2].get_xydata().tolist() == [[2, 1.3]]
        legend, = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == folders
        assert [to_hex(line.get_color()) for line in legend.get_lines()] == colours[::3]


def test_losses_of_a_few_steps_are_printed(tmp_path, monkeypatch, capsys):
    write_log(tmp_path / "a" / "stage1", [9.0, 2.0, *[1.5] * 8, 1.25], [(10, 1.3)])
    write_log(tmp_path / "b" / "stage1", [9.0, 3.0])
    write_log(tmp_path / "b" / "stage2", [0.5])
    plot_log(monkeypatch, tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c.png")
    assert capsys.readouterr().out.splitlines()[:4] == [
        f"| loss of {tmp_path / 'a'}, {tmp_path / 'b'} "
        "| step 1 | step 10 | step 100 | last | validation |", "| --- | --- | --- | --- | --- | --- |",
        "| stage1 | 2.000, 3.000 | 1.250, - | -, - | 1.250, 3.000 | 1.300, - |",
        "| stage2 | -, - | -, - | -, - | -, 0.500 | -, - |"]


def test_a_run_without_validation_losses_has_no_third_curve(tmp_path):
    write_log(tmp_path / "a" / "stage1", [2.0, 1.0])
    axes, = draw(read_runs([str(tmp_path / "a")])).axes
    assert [line.get_xdata().tolist() for line in axes.lines] == [[0, 1], [0, 1]]


def test_plot_log_names_in_one_line_what_is_wrong(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    write_log(tmp_path / "new", [])
    write_log(tmp_path / "bad", [1.0])
    (tmp_path / "bad" / "log.jsonl").open("a").write('{"loss": 1}\n')
    write_log(tmp_path / "list", [1.0])
    (tmp_path / "list" / "log.jsonl").open("a").write("[1]\n")
    cases = [([], r"folders .*, then options: tools.plot_log DIR"), (["nowhere"], "nowhere: folder not found"),
             (["empty"], "empty: no log.jsonl"), (["new"], "new: no log.jsonl"),
             (["bad"], "log.jsonl line 2"), (["list"], "log.jsonl line 2")]
    for folders, message in cases:
        with pytest.raises(UserError, match=message):
            plot_log(monkeypatch, *(tmp_path / f for f in folders), "--out", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()
