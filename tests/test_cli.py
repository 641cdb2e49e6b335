"""What cli.py claims: options, help texts, errors of one line, Ctrl-C. CPU, no network."""
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
import time
import typing
from typing import Literal

import pytest
import torch

import cli
import benchmarks.run
import experiments.ablate
import experiments.bench
import experiments.gpu_check
import experiments.order
import experiments.outsider
import experiments.step_size
import sample
import tools.check_data
import training.options

HERE = os.path.dirname(os.path.abspath(cli.__file__))


@dataclasses.dataclass
class Words:
    """Some options."""
    words: list[str] | None = None  # may be repeated
    counts: list[int] = ()          # may be repeated, too
    last: str = ""                  # may not


def test_a_list_collects_what_is_said_repeatedly_and_of_other_options_the_last_value_counts():
    argv = "--words a --words=b --last x --counts 1 --words c --last y --counts=2".split()
    assert cli.parse(Words, argv) == {"words": ["a", "b", "c"], "last": "y", "counts": [1, 2]}
    assert cli.parse(Words, []) == {}
    with pytest.raises(cli.UserError, match="--counts b: expected int"):
        cli.parse(Words, ["--counts", "1", "--counts", "b"])
    with pytest.raises(cli.UserError, match="--words needs a value"):
        cli.parse(Words, ["--words", "a", "--words"])


def test_output_is_utf_8_whatever_the_locale(monkeypatch):
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii"))
    cli.main(lambda: print("é日"))
    assert out.getvalue().decode() == "é日\n"


@dataclasses.dataclass
class Every:
    """Options of every type, with a sentence that is too long for one line of 80 columns."""
    first: str | None = None  # above the first title
    # the model
    size: int = 0  # how large,
                   # and this goes on
    rate: float | None = None  # 100 % is all
    kind: Literal["red", "blue"] | None = None  # which one; too long a text for one line of help
    # the run
    fast: bool = False  # a switch
    safe: bool = True  # on at the start

    @classmethod
    def help_epilog(cls):
        return "presets:\n    small  size 1"


@pytest.mark.parametrize("argv, values", [
    ("--size=-1 --rate -0.5", {"size": -1, "rate": -0.5}),
    ("--kind blue --first=a=b", {"kind": "blue", "first": "a=b"}),
    ("--fast --no_safe", {"fast": True, "safe": False}),
    ("--fast --no_fast", {"fast": False}),
    ("x.png --fast", {"first": "x.png", "fast": True}),
    ("--fast x.png", {"first": "x.png", "fast": True}),
    ("--size 3 -", {"size": 3, "first": "-"})])
def test_values_have_the_types_of_the_fields(argv, values):
    assert cli.parse(Every, argv.split(), positional="first") == values


@pytest.mark.parametrize("argv, words", [
    ("--rat 1", "unknown option --rat: did you mean --rate?"),
    ("--zzz=1", "unknown option --zzz: see --help"),
    ("--size", "--size needs a value"),
    ("--size --fast", "--size needs a value"),
    ("--size 1.5", "--size 1.5: expected int"),
    ("--kind green", "--kind green: expected one of red, blue"),
    ("--fast=true", "--fast takes no value"),
    ("x y", "unknown option y"), ("--first x y", "unknown option y"),
    ("-x", "unknown option -x"), ("--si 1", "unknown option --si")])
def test_a_mistake_in_an_option_is_one_line_that_names_it(argv, words):
    with pytest.raises(cli.UserError, match=re.escape(words)) as error:
        cli.parse(Every, argv.split(), positional="first")
    assert "\n" not in str(error.value)


def test_a_word_without_an_option_is_refused_where_no_field_takes_it():
    with pytest.raises(cli.UserError, match="unknown option x"):
        cli.parse(Every, ["x"])


def test_the_help_shows_groups_values_defaults_and_the_epilog_in_80_columns(capsys):
    with pytest.raises(SystemExit) as end:
        cli.parse(Every, ["--size", "2", "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and max(map(len, text.splitlines())) <= 80
    titles = [text.index(title) for title in
              ("options:\n", "the model:\n", "the run:\n", "presets:\n    small  size 1\n")]
    assert titles == sorted(titles)
    for words in ("above the first title", "how large, and this goes on [default: 0]",
                  "100 % is all", "--fast ", "[red | blue]", "on at the start [default: True]"):
        assert words in re.sub(r"\s+", " ", text), words


WAIT = "import time, cli\nprint('ready', flush=True)\n"
PLACES = {"imports": "time.sleep(60)", "main": "cli.main(lambda: time.sleep(60))",
          "imports that swallow it":
              "try: time.sleep(60)\nexcept KeyboardInterrupt: pass\ncli.main(lambda: print('ran'))"}


@pytest.mark.parametrize("code", PLACES.values(), ids=PLACES)
def test_ctrl_c_ends_a_program_with_one_line_even_while_it_imports(code):
    with subprocess.Popen([sys.executable, "-c", WAIT + code], cwd=HERE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as done:
        assert done.stdout.readline() == "ready\n"
        time.sleep(0.3)
        done.send_signal(signal.SIGINT)
        out, err = done.communicate(timeout=60)
    assert (out, err) == ("", "stopped\n")
    assert done.returncode in (130, -signal.SIGINT)  # a shell shows 130 for both


def test_ctrl_c_stays_ignored_where_the_parent_ignores_it():
    code = "import os, signal, cli; os.kill(os.getpid(), signal.SIGINT); print('went on')"
    command = f"trap '' INT; exec {sys.executable} -c \"{code}\""
    done = subprocess.run(["sh", "-c", command], cwd=HERE, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done.stderr


def test_a_gpu_without_room_is_one_line(monkeypatch):
    def run():
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 "
            "GiB of which 5.06 MiB is free. See documentation (https://pytorch.org/docs)")

    with pytest.raises(SystemExit, match=r"^error: CUDA out of memory. Tried to allocate 2.00 GiB. "
                       "Use a smaller --micro_batch_size .*elsewhere$"):
        cli.main(run)
    with pytest.raises(RuntimeError, match="another"):
        cli.main(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_errors_outside_main_keep_their_traceback():
    done = subprocess.run([sys.executable, "-c", "import cli; 1 / 0"], cwd=HERE,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError" in done.stderr


PROGRAMS = [  # (options, what they cannot do without)
    (training.options.Options, {}), (sample.Options, {}), (tools.check_data.Options, {}),
    (experiments.ablate.Options, {}), (experiments.outsider.Options, {}),
    (experiments.order.Options, {}), (experiments.step_size.Options, {}),
    (benchmarks.run.Options, {}), (experiments.bench.Options, {}),
    (experiments.gpu_check.Options, {"device": "cpu"})]
NUMBERS = [(options, needed, f.name) for options, needed in PROGRAMS
           for f in dataclasses.fields(options)
           if cli.value_type(typing.get_type_hints(options)[f.name]) in (int, float, list[float])]


@pytest.mark.parametrize("options, needed, name", NUMBERS, ids=[
    f"{options.__module__}-{name}" for options, _, name in NUMBERS])
def test_every_number_of_every_program_has_a_range(options, needed, name):
    for value in (-1, float("nan"), float("inf"), 2**64):
        with pytest.raises(cli.UserError, match=f"^--{name} {value}: expected "):
            one = [value] if isinstance(getattr(options, name, None), tuple) else value
            options(**needed | {name: one})


def test_a_number_that_is_too_large_is_told_so():
    with pytest.raises(cli.UserError, match=r"^--batch_size 2000000000: expected at most 10\*\*9$"):
        training.options.Options(batch_size=2 * 10**9)


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_streams_are_nowhere(closed, tmp_path):
    code = ("import cli, sys; file = open('file', 'w'); print('out'); sys.stdout.flush(); "
            "print('status', file=sys.stderr); sys.stderr.flush(); file.write(sys.stdin.read()); "
            "cli.main(lambda: None)")
    done = subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code],
                          cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env={**os.environ, "PYTHONPATH": HERE})
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""
    assert done.stdout == ("" if "1>" in closed else "out\n")
    assert done.stderr == ("" if "2>" in closed else "status\n")
