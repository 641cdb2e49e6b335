"""README and docs/ are true: links lead to files, flags exist, code is quoted as it stands.

The sizes of files and the direction of imports are checked in test_tree.py.
"""
import ast
import dataclasses
import glob
import importlib
import json
import os
import re
import sys
import types

import pytest
from PIL import Image

import cli
from data import PromptFormat, read_record
from formats.answers import read_questions
from formats.json_files import read_json_list

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PAGES = ["README.md", *sorted(glob.glob("docs/*.md", root_dir=HERE))]
PROGRAMS = ("train.py", "sample.py", "eval.py",
            "tools.check_data", "tools.export_llava", "tools.plot_log",
            "experiments.ablate", "experiments.bench", "experiments.boundary",
            "experiments.forest", "experiments.growth", "experiments.look", "experiments.order",
            "experiments.outsider", "experiments.step_size")
TORCHRUN = {"nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint", "shutdown_timeout"}
FIGURE_ROW = r"\| ([^|]+) \| [^|]+ \| ([^|]*`\w+\.py`: `[^|]+) \|"


def read(path):
    with open(os.path.join(HERE, path), encoding="utf-8") as f:
        return f.read()


def options_of(program):
    """The dataclass of a program's options; a program is called `train.py` or `tools.plot_log`."""
    return importlib.import_module(program.removesuffix(".py")).Options


def commands(text):
    """(program, the words that follow it) of every command in a page."""
    for line in re.findall(r"(?:python|torchrun) [^\n`]*", text.replace("\\\n", " ")):
        words = line.split("#")[0].split()
        for n, word in enumerate(words):
            if re.fullmatch(r"\w+\.py|(tools|experiments)\.\w+", word):
                yield word, words[n + 1:]
                break


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file(page):
    folder = os.path.dirname(os.path.join(HERE, page))
    for path in re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", read(page)):
        assert os.path.exists(os.path.join(folder, path)), path


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_a_command_exists(page):
    for program, words in commands(read(page)):
        assert program in PROGRAMS, program
        fields = {f.name for f in dataclasses.fields(options_of(program))} | {"help"}
        flags = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        assert flags <= fields, f"{program}: {flags - fields}"


def test_every_program_is_shown_in_a_command():
    shown = {program for page in PAGES for program, _ in commands(read(page))}
    assert shown == set(PROGRAMS)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_named_in_the_text_belongs_to_a_program(page):
    options = [f.name for program in PROGRAMS for f in dataclasses.fields(options_of(program))]
    text = re.sub(r"pip install[^\n`]*", "", read(page))
    found = set(re.findall(r"(?<![\w-])--(\w+)", text)) - TORCHRUN - {"help"}
    assert found <= set(options), found - set(options)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_folder_named_in_code_type_exists(page):
    for path in re.findall(r"`((?:\w+/)*\w+\.py|(?!out/)\w+/)`", read(page)):
        assert os.path.exists(os.path.join(HERE, path)), path


@pytest.mark.parametrize("page", PAGES)
def test_every_name_said_to_be_in_a_file_is_there(page):
    for name, path in re.findall(r"`(\w+)(?:\(\))?`\s+in\s+`([\w/]+\.py)`", read(page)):
        assert re.search(rf"^(def |class )?{name}\b|, {name} =", read(path), re.MULTILINE), name


def test_every_option_has_a_comment():
    for program in PROGRAMS:
        known = cli.comments(options_of(program))
        for f in dataclasses.fields(options_of(program)):
            text = known.get(f.name) or [""]  # or (title of its group, comment)
            assert text[-1], f"{program}: {f.name}"


def test_the_readme_quotes_hypernet_as_it_stands():
    """Each line of the code block is in hypernet.py, in that order; comments may differ."""
    def bare(text):
        return [" ".join(line.split("  #")[0].split()) for line in text.splitlines()]

    block = re.search(r"```python\n(.*?)```", read("README.md"), re.DOTALL)[1]
    lines = iter(bare(read("hypernet.py")))
    for quoted in filter(None, bare(block)):
        assert quoted in lines, quoted  # `in` moves the iterator on to the line found


def test_every_function_in_the_table_of_the_figure_exists():
    rows = re.findall(FIGURE_ROW, read("README.md"))
    assert len(rows) >= 8
    for part, places in rows:
        for file, name in re.findall(r"`(\w+\.py)`: `([\w.]+)`", places):
            body = ast.parse(read(file)).body
            for word in name.split("."):
                found = [node for node in body if getattr(node, "name", None) == word]
                assert found, f"{part}: {file} has no {name}"
                body = found[0].body


def test_the_readme_is_short():
    assert len(read("README.md").encode()) <= 12 * 1024
    assert max(map(len, read("README.md").splitlines())) <= 120


@pytest.mark.parametrize("page", PAGES[1:])
def test_a_page_of_docs_begins_by_saying_whom_it_is_for(page):
    assert read(page).split("\n\n")[1].startswith("This page is for ")
    assert f"({page})" in read("README.md")


def test_the_scripts_of_own_data_make_records_and_score_answers(tmp_path, monkeypatch, capsys):
    """The page's package is optional, so a stand-in has its functions, with 33 pictures."""
    texts = [f"is it number {i}?" for i in range(20)]
    asked = [(text, "Yes", number) for number in range(33) for text in texts]
    package = types.ModuleType("easy_vqa")
    for split in ("train", "test"):
        paths = {number: str(tmp_path / f"{number}.png") for number in range(33)}
        setattr(package, f"get_{split}_image_paths", lambda: paths)
        setattr(package, f"get_{split}_questions", lambda: tuple(zip(*asked)))
    for path in paths.values():
        Image.linear_gradient("L").save(path)
    monkeypatch.setitem(sys.modules, "easy_vqa", package)
    monkeypatch.chdir(tmp_path)
    convert, score = re.findall(r"python - <<'END'\n(.*?)\nEND\n", read("docs/own_data.md"),
                                re.DOTALL)
    exec(convert, {})
    records = read_json_list("easy/train.json")
    read_records = [read_record(r, i, "easy/images", PromptFormat()) for i, r in enumerate(records)]
    assert sum((turns for _, turns, _ in read_records), [])[1] == (texts[1], "Yes")
    assert [len(turns) for _, turns, _ in read_records] == [5, 5, 5, 5] * 33
    questions = {}
    for name, source in (("before", "test"), ("after", "test"), ("exchanged", "exchanged")):
        questions[name] = [row for _, row in read_questions(f"easy/{source}.jsonl")]
        answers = [{**row, "answer": ["no", " YES"][i % 2 or name == "after"]}
                   for i, row in enumerate(questions[name])]
        with open(f"easy/{name}.answers.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in answers)
    pairs = list(zip(questions["after"], questions["exchanged"]))
    assert all(a["prompt"] == b["prompt"] and a["image"] != b["image"] for a, b in pairs)
    assert all(os.path.exists(f"easy/images/{a['image']}") for a, _ in pairs)
    exec(score, {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"after: 100.0% of {len(pairs)} questions" \
        and lines[0].startswith("before: 4")
