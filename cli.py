"""The command line of every program, built from a dataclass; how programs end; a chat's input.

A program's options are the fields of a dataclass, one line each:

    @dataclass
    class Options:
        '''What the program does: the first lines of --help.'''
        # the picture                        a comment line of its own: the title of a group
        image: str | None = None   # the help text of the option
                                   # goes on in lines that are indented deeper than the fields
        # the answer
        chat: bool = False         # --chat turns it on, --no_chat off
        prompt: list[str] = ()     # may be repeated

        @classmethod
        def help_epilog(cls):      # optional: text below the options, printed as it is
            return "presets: ..."

--help shows groups and options in the order of the source, so the most important ones stand first.
Fields above the first title form the group "options". Types: str, int, float, bool, Literal, list
of these, and "X | None". Allowed values and defaults are added to the help text.

`parse(Options)` gives the options that the user named, `main(run)` runs a program and turns a
user's mistake into one line; `read_lines` and `survive_mistakes` are for a chat. Import this module
before torch: from then on Ctrl-C, too, ends the program with one line.
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import os
import re
import signal
import sys
import textwrap
import typing


class UserError(ValueError):
    """A mistake that a user can correct: an option, a file, a checkpoint. The text is one line."""

    def __init__(self, text):
        super().__init__(" ".join(str(text).split("\n")))


def comments(options):
    """{field: (title of its group, help text)}, read from the source of the dataclass."""
    found, title, name = {}, "options", None
    for line in inspect.getsource(options).splitlines():
        if match := re.match(r" {4}(\w+)\s*:[^#]*?(?:#\s*(.*))?$", line):
            name = match[1]
            found[name] = title, match[2] or ""
        elif match := re.match(r" {4}#\s*(.*)", line):
            title = match[1]
        elif (match := re.match(r" {5,}#\s*(.*)", line)) and name:
            found[name] = found[name][0], f"{found[name][1]} {match[1]}"
    return found


def value_type(kind):
    """`kind` without None: of `float | None`, float."""
    kinds = typing.get_args(kind)
    return next(k for k in kinds if k is not type(None)) if type(None) in kinds else kind


def help_text(kind, default, comment):
    """The comment of an option, then its allowed values and its default."""
    notes = []
    if typing.get_origin(kind) is typing.Literal:
        notes.append(" | ".join(typing.get_args(kind)))
    if default is dataclasses.MISSING:
        notes.append("required")
    elif default is not None and default is not False and default != ():
        notes.append(f"default: {default}")
    return (comment + (f" [{'; '.join(notes)}]" if notes else "")).replace("%", "%%")


def make_parser(options, positional):
    """The ArgumentParser of a dataclass; it leaves every value a text."""
    parser = argparse.ArgumentParser(
        usage=f"%(prog)s {f'[{positional.upper()}] ' if positional else ''}[--option value ...]",
        description=textwrap.fill(inspect.getdoc(options), 80), add_help=False, allow_abbrev=False,
        epilog=options.help_epilog() if hasattr(options, "help_epilog") else None,
        argument_default=argparse.SUPPRESS, exit_on_error=False,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter,
                                          width=80, max_help_position=26))
    groups, types, notes = {}, typing.get_type_hints(options), comments(options)
    for f in dataclasses.fields(options):
        title, comment = notes[f.name]
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        kind = value_type(types[f.name])
        text = help_text(kind, f.default, comment)
        if kind is bool:
            groups[title].add_argument(f"--{f.name}", action="store_true", help=text)
            parser.add_argument(f"--no_{f.name}", dest=f.name, action="store_false",
                                help=argparse.SUPPRESS)
        else:
            many = typing.get_origin(kind) is list or f.name == positional
            action = "append" if many else "store"
            metavar = {int: "N", float: "X"}.get(kind, "TEXT")
            groups[title].add_argument(f"--{f.name}", action=action, help=text, metavar=metavar)
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    return parser


def convert(name, kind, text):
    """The value of option `name` as its annotated type; UserError if it is not one."""
    kind = value_type(kind)
    if isinstance(text, list) and typing.get_origin(kind) is not list:
        if len(text) > 1:
            raise UserError(f"--{name} is given {len(text)} times, expected once")
        text = text[0]
    if typing.get_origin(kind) is list:
        return [convert(name, typing.get_args(kind)[0], one) for one in text]
    if typing.get_origin(kind) is typing.Literal:
        if text not in typing.get_args(kind):
            raise UserError(f"--{name} {text}: expected one of {', '.join(typing.get_args(kind))}")
        return text
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"--{name} {text}: expected {kind.__name__}") from None


def parse(options, argv=None, positional=None):
    """{field: value} of the options in `argv`, with their types; defaults stay with the dataclass.

    positional  the field that takes a bare word; None: every word follows its option

    The last value of a repeated option counts; a list collects them. Prints the help and exits on
    --help. Raises UserError on an unknown option (naming the nearest one), a missing value, a value
    of the wrong type, and a repeated positional.
    """
    argv = list(map(str, sys.argv[1:] if argv is None else argv))
    types = typing.get_type_hints(options)
    try:
        known, unknown = make_parser(options, positional).parse_known_args(argv)
    except argparse.ArgumentError as error:
        problem = "takes no value" if "ignored" in error.message else "needs a value"
        raise UserError(f"{error.argument_name} {problem}") from None
    given = {name: text if isinstance(text, bool) else convert(name, types[name], text)
             for name, text in vars(known).items()}
    if positional and positional not in given and unknown and re.match("-?$|[^-]", unknown[0]):
        given[positional] = unknown.pop(0)
    if unknown:
        word = unknown[0].split("=")[0]
        near = difflib.get_close_matches(word.removeprefix("--"), types, 1, 0.5)
        raise UserError(f"unknown option {word}: "
                        f"{f'did you mean --{near[0]}?' if near else 'see --help'}")
    return given


MOST = 10**9  # more is a slip, and torch cannot count the elements
POSITIVE = (math.ulp(0.0), MOST, "more than 0")  # from the smallest positive float


def check_numbers(options, ranges):
    """UserError that names a number out of its range.

    ranges  {field: (least, most, the range in words)}; all others: POSITIVE
    """
    values = [(name, value) for name, entry in vars(options).items()
              for value in (entry if isinstance(entry, (list, tuple)) else [entry])]
    for name, value in values:
        least, most, words = ranges.get(name, POSITIVE)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not least <= value <= most:
            expected = "at most 10**9" if most == MOST < value < math.inf else words
            raise UserError(f"--{name} {value}: expected {expected}")


def main(run):
    """Run the program: exit code 0 on success, 1 with one line on a user's error, 130 on Ctrl-C.

    Output is UTF-8 in every locale. If the reader of the output goes away, as `| head -1` does, the
    program ends silently with 141, the code that a shell shows after SIGPIPE. (train.py and eval.py
    go on, see `Output` in training/distributed.py.)
    """
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        if interrupts:
            raise KeyboardInterrupt
        run()
        sys.stdout.flush()
    except BrokenPipeError:
        sys.exit(141)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is imported later
            raise
        sys.exit(f"error: {str(error).split(' GPU ')[0]} Use a smaller --micro_batch_size or "
                 "--checkpointing full in training, a smaller --batch_size elsewhere")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


@contextlib.contextmanager
def survive_mistakes():
    """A user's mistake costs one line on standard error, Ctrl-C at a terminal this block only."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print("stopped; Ctrl-C again ends the program", file=sys.stderr)


def read_lines(help):
    """Yield the lines of standard input; at a terminal, print `help` and a prompt for each line.

    Bytes that are not text become surrogates, so that the caller can refuse that line only.
    """
    sys.stdin.reconfigure(errors="surrogateescape")
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # not on Windows
        import readline  # gives `input` a history and keys for editing
    print(help, file=sys.stderr)
    # `input` prints its prompt to standard output, which may be a file for the answers
    prompt = "> " if sys.stdout.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            print("" if prompt else "> ", end="", file=sys.stderr, flush=True)
            yield input(prompt)
    print(file=sys.stderr)


def note_interrupt(number, frame):
    """Handle Ctrl-C as Python does, and note it: some libraries' imports swallow the exception."""
    interrupts.append(number)
    signal.default_int_handler(number, frame)


def report_uncaught(kind, error, trace):
    """Outside `main`, as during imports: one line on Ctrl-C, else Python's traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


interrupts = []
for name in ("stdin", "stdout", "stderr"):
    if getattr(sys, name) is None:  # closed: a file opened later would take its place
        setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
sys.excepthook = report_uncaught
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else Ctrl-C is to be ignored
    signal.signal(signal.SIGINT, note_interrupt)
