"""The shape of the repository: few files in the root, imports that run one way, short functions.

The limits keep the code readable. Before you raise one, look for a better cut; if you raise it, say
why in the commit.
"""
import ast
import glob
import graphlib
import io
import os
import statistics
import tokenize

import pytest

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FILES = sorted(glob.glob("*.py", root_dir=HERE)) + sorted(
    path for path in glob.glob("*/**/*.py", root_dir=HERE, recursive=True)
    if os.path.exists(os.path.join(HERE, path.split("/")[0], "__init__.py")))  # no out/, no .venv/
CODE = [path for path in FILES if not os.path.basename(path).startswith(("test_", "conftest"))
        and not path.startswith("tests/")]

# Each group may import itself and the groups before it.
ORDER = (("cli",), ("hypernet",), ("projector",), ("model",),
         ("data", "formats", "baselines", "vlora"), ("inference",), ("weights",), ("training",))
# These may not import what stands around them; only train.py meets the toy.
CORE = {name for group in ORDER for name in group} | {"sample", "train"}
AROUND = {"experiments", "benchmarks", "tools", "eval", "toy"}

READING_PATH = ("hypernet", "projector", "model", "data", "train", "sample")
WITH_CHECKPOINTS = (*READING_PATH, "weights", "eval", "vlora")
MOST_CODE = 10153  # all but tests

TABLES = {"experiments/tables.py", "toy/questions.py", "toy/world.py"}  # wide tables of data


def read(path):
    with open(os.path.join(HERE, path), encoding="utf-8") as f:
        return f.read()


def module_name(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(path):
    """Names of the modules of this repository that a file imports, also inside functions."""
    known, found = {module_name(file) for file in FILES}, set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & known - {module_name(path)}


IMPORTS = {module_name(path): imports_of(path) for path in FILES}


def code_lines(path):
    """Number of lines with code on them: no blanks, comments or docstrings."""
    source, lines = read(path), set()
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def functions():
    """(where, node) of every function in the code."""
    for path in CODE:
        for node in ast.walk(ast.parse(read(path))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path}:{node.lineno} {node.name}", node


def length(node):
    return node.end_lineno - node.lineno + 1


def test_the_root_lists_the_reading_path_and_little_else():
    root = {path for path in FILES if "/" not in path}
    assert len(root) <= 12, sorted(root)
    assert root >= {f"{name}.py" for name in (*WITH_CHECKPOINTS, "test_model")}


def test_imports_run_one_way():
    before = set()
    for group in ORDER:
        before |= set(group)
        for module, imported in IMPORTS.items():
            if module.split(".")[0] in group:
                wrong = {name for name in imported if name.split(".")[0] not in before}
                assert not wrong, f"{module} imports {wrong}"


def test_the_core_imports_nothing_that_stands_around_it():
    for module, imported in IMPORTS.items():
        if module.split(".")[0] in CORE:
            allowed = {"toy"} if module == "train" else set()
            wrong = {name for name in imported if name.split(".")[0] in AROUND - allowed}
            assert not wrong, f"{module} imports {wrong}"


def test_no_module_imports_itself_through_others():
    try:
        graphlib.TopologicalSorter(IMPORTS).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_every_module_begins_by_saying_what_it_holds():
    texts = {path: ast.get_docstring(ast.parse(read(path))) or "" for path in FILES if read(path)}
    assert not [path for path, text in texts.items() if len(text) < 20 or "TODO" in text]


def test_functions_are_short():
    lengths = {where: length(node) for where, node in functions()}
    assert not {where: lines for where, lines in lengths.items() if lines > 50}
    assert statistics.median(lengths.values()) <= 12


def test_functions_take_few_positional_parameters():
    for where, node in functions():
        names = {a.arg for a in node.args.posonlyargs + node.args.args} - {"self", "cls"}
        assert len(names) <= 6, f"{where}: {names}"


def test_lines_are_at_most_100_columns_wide():
    wide = [f"{path}:{n}" for path in CODE for n, line in enumerate(read(path).splitlines(), 1)
            if len(line) > 100 and path not in TABLES]
    assert not wide


def test_the_code_is_small():
    def count(names):
        return sum(code_lines(f"{name}.py") for name in names)

    assert count(READING_PATH) <= 1250
    assert count(WITH_CHECKPOINTS) <= 1700
    assert sum(map(code_lines, CODE)) <= MOST_CODE
