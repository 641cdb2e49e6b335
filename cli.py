"""From a flat dataclass of options to a command line, and the one way in which our programs end.

`parse(Options)` reads `--name value`, `--name=value` and bare `--flag` for booleans (`--no_flag` turns one off); one of
type `list[str]` may be repeated. The help text is the comment behind each field. `main(run)` turns a user's mistake
into one line and exit code 1.
"""
import dataclasses
import difflib
import inspect
import re
import sys
import typing


class UserError(ValueError):
    """Something a user can mend: an option, a file of theirs, a checkpoint. Its text, in one line, is the whole message."""

    def __init__(self, text):
        super().__init__(" ".join(str(text).split("\n")))


def comments(options):
    """{field: the comment behind it} read from the source of the dataclass and of its bases."""
    sources = [inspect.getsource(c) for c in reversed(options.__mro__) if dataclasses.is_dataclass(c)]
    lines = "\n".join(sources).splitlines()
    found = (re.match(r"\s+(\w+)\s*:[^#]*?(?:#\s*(.*))?$", line) for line in lines)
    return {m[1]: m[2] or "" for m in found if m}


def usage(options):
    """The --help text: the docstring, then one line per option with its default and its comment."""
    rows = []
    for f in dataclasses.fields(options):
        default = "required" if f.default is dataclasses.MISSING else repr(f.default)
        rows.append(f"  --{f.name:<20} {default:<14} {comments(options).get(f.name, '')}")
    return f"{inspect.getdoc(options)}\n\noptions (default, meaning):\n" + "\n".join(rows)


def convert(name, kind, text):
    """`text` as the annotated type of option `name`; UserError if it is not one."""
    inner = typing.get_args(kind)
    if type(None) in inner:  # of "float | None" the float
        return convert(name, next(k for k in inner if k is not type(None)), text)
    if typing.get_origin(kind) is list:
        return [convert(name, inner[0], text)]
    if typing.get_origin(kind) is typing.Literal:
        if text not in inner:
            raise UserError(f"--{name} {text}: expected one of {', '.join(inner)}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"--{name} {text}: expected true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{name} {text}: expected {kind.__name__}") from None


def parse(options, argv=None):
    """{field: value} of the options named in `argv`, typed; defaults are left to the dataclass.

    Of an option that is repeated the last value counts, but for a list, which collects them.
    Raises UserError on an unknown option (naming the nearest),
    a missing value or an ill-typed one; prints the help and exits on --help.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    kinds = typing.get_type_hints(options)
    given = {}
    while argv:
        word = argv.pop(0)
        if word in ("-h", "--help"):
            print(usage(options))
            sys.exit(0)
        name, equals, text = word.removeprefix("--").partition("=")
        negated = name.startswith("no_") and kinds.get(name[3:]) is bool
        if not word.startswith("--") or not (name in kinds or negated):
            near = difflib.get_close_matches(name, kinds, 1, 0.5)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise UserError(f"unknown option {word.split('=')[0]}: {hint}")
        bare = not equals and (not argv or argv[0].startswith("--"))
        if negated or (kinds[name] is bool and bare):
            given[name.removeprefix("no_") if negated else name] = not negated
            continue
        if bare:
            raise UserError(f"--{name} needs a value")
        value = convert(name, kinds[name], text if equals else argv.pop(0))
        given[name] = given.get(name, []) + value if isinstance(value, list) else value
    return given


def main(run):
    """Run the program: exit code 0 on success, 1 with one line on a user's error, 130 on Ctrl-C.

    Output is UTF-8 whatever the locale. Where its reader goes away, as `| head -1` does, the program ends without a
    word and with 141, what a shell says of a program that SIGPIPE ended.
    """
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        run()
        sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(141)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
