"""The README is true: its files exist, its counts and flags are right."""
import ast
import dataclasses
import io
import os
import re
import tokenize

import pytest

import eval as evaluation
import experiments.ablate
import experiments.bench
import experiments.outsider
import sample
import tools.check_data
import tools.export_llava
import train

import pytest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = open(os.path.join(HERE, "README.md"), encoding="utf-8").read()


PROGRAMS = {"train.py": train, "sample.py": sample, "eval.py": evaluation, "tools.check_data": tools.check_data,
            "tools.export_llava": tools.export_llava, "experiments.outsider": experiments.outsider,
            "experiments.bench": experiments.bench, "experiments.ablate": experiments.ablate}


def code_lines(path):
    """Number of lines with code on them: no blanks, comments or docstrings."""
    source = open(path, encoding="utf-8").read()
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_every_flag_in_a_command_exists():
    text = README.replace("\\\n", " ")
    found = re.findall(r"(?:python|nproc_per_node \d+) (?:-m )?(\w+\.\w+)([^\n`]*)", text)
    assert {program for program, _ in found} >= {"train.py", "sample.py", "tools.check_data"}
    for program, words in found:
        fields = {f.name for f in dataclasses.fields(PROGRAMS[program].Options)} | {"help"}
        flags = set(re.findall(r"--(\w+)", words.split("#")[0]))
        assert flags <= fields, f"{program}: {flags - fields}"


def test_every_file_that_it_links_exists():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert os.path.exists(os.path.join(HERE, path)), path


def test_every_option_has_a_comment():
    from cli import comments
    for module in PROGRAMS.values():
        known = comments(module.Options)
        for f in dataclasses.fields(module.Options):
            assert known.get(f.name), f"{module.__name__}: {f.name}"
