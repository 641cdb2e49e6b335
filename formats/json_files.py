"""Read and write JSON files. Every error is one line: path, line number if any, reason.

    read_json(path)         any value
    read_json_object(path)  a dict: config.json, index files; with a key, its value
    read_json_list(path)    a list that is not empty: LLaVA's training data; also as JSON Lines
    read_json_lines(path)   JSON Lines, one value per line: questions, logs
    write_json(path, value)

Next: configs.py, which checks what a config.json holds.
"""
import io
import json
import re

from cli import UserError


def parse_json(text, label, check_unicode=False):
    """The value of a JSON text, str or bytes; UserError that begins with `label` if it is damaged.

    check_unicode  also refuse an escaped half of a surrogate pair, which cannot be written as UTF-8
    """
    try:
        value = json.loads(text)
        if check_unicode:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{label}: not JSON ({error})") from None


def read_bytes(path):
    """The bytes of a file; UserError if it is missing or cannot be read."""
    try:
        with open(path, "rb") as f:
            return f.read()
    except FileNotFoundError:
        raise UserError(f"{path}: file not found") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path):
    """The value in a JSON file; UserError if the file is missing, cannot be read or is damaged."""
    return parse_json(read_bytes(path), path)  # bytes: json finds out their encoding itself


def read_json_object(path, key=None):
    """The dict in a JSON file, or its value for `key`.

    UserError as for `read_json`, and if there is no such thing.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, {{...}}")
    if key is not None and key not in value:
        raise UserError(f"{path}: lacks {key!r}: is it the right file?")
    return value if key is None else value[key]


def read_json_list(path):
    """The list in a JSON file, or the objects of a JSON Lines file, one on each line.

    UserError as for `read_json`, and if it is empty or not a list.
    """
    data = read_bytes(path)
    if re.match(rb'(\xef\xbb\xbf)?\s*\{ *"', data):
        label = f"{path} begins with an object, so it is read as JSON Lines: line"
        return [parse_json(line, f"{label} {number}")
                for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    value = parse_json(data, path)
    if not isinstance(value, list) or not value:
        raise UserError(f"{path}: expected a non-empty JSON list, [...]")
    return value


def read_json_lines(path):
    """[(label, value), ...] of a JSON Lines file. A label, "PATH line N", is for error messages.

    UserError as for `read_json`, naming the line; also for text that is not valid Unicode.
    """
    rows = []
    for number, line in enumerate(io.BytesIO(read_bytes(path)), 1):
        label = f"{path} line {number}"
        rows.append((label, parse_json(line, label, check_unicode=True)))
    return rows


def write_json(path, value):
    """Write a value as indented JSON, in UTF-8."""
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2)
        f.write("\n")
