"""TODO"""
import dataclasses
import json
import math
import os
import typing

from cli import UserError


def read_json(path):
    """The object in a JSON file; UserError if the file is missing, damaged or no object."""
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f)
    except FileNotFoundError:
        raise UserError(f"no {os.path.basename(path)} in {os.path.dirname(path) or '.'}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def write_json(path, values):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(values, f, indent=2)
        f.write("\n")


def expect_keys(values, keys, label):
    """UserError naming a key that is unknown or lacking."""
    if not isinstance(values, dict):
        raise UserError(f"{label}: expected an object with {', '.join(sorted(keys))}")
    for key in values.keys() - keys:
        raise UserError(f"{label}: unknown key {key!r}, expected {', '.join(sorted(keys))}")
    for key in keys - values.keys():
        raise UserError(f"{label}: no {key!r}")


def is_valid(value, kind):
    """Whether a value is what the annotation of a configuration's field says: numbers are more than 0, tuples one per channel."""
    inner, number = typing.get_args(kind), isinstance(value, (int, float)) and not isinstance(value, bool)
    if typing.get_origin(kind) is typing.Literal:
        return value in inner
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
    if inner:  # of an index, which may be 0, or None
        return type(value) is int and value == 0 or any(is_valid(value, k) for k in inner)
    if kind in (int, float):
        return number and isinstance(value, (int, kind)) and 0 < value < math.inf
    return isinstance(value, kind)


def expected(kind):
    """What `fits` asks for, in words."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if typing.get_origin(kind) is tuple:
        return "three numbers"
    if inner:
        return "a whole number of 0 or more, or null" if int in inner else "an object, or null"
    return {int: "a whole number more than 0", float: "a number more than 0", bool: "true or false", str: "text"}.get(kind, "an object")


def build_dataclass(kind, values, label):
    """The dataclass `kind` of exactly the fields in `values`; UserError names what is unknown, lacking or of no use."""
    expect_keys(values, {f.name for f in dataclasses.fields(kind)}, label)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, wanted in typing.get_type_hints(kind).items():
        if not is_valid(values[name], wanted):
            raise UserError(f"{label}: {name} is {values[name]!r}, expected {expected(wanted)}")
    return kind(**values)
