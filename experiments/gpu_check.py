"""All that only a GPU can tell, in nine minutes: `bash experiments/gpu_check.sh`.

    machine       name, versions, bytes/s of copying, FLOP/s of matrix products
    correctness   in fp32 and bf16: parity with transformers, causality with its negative control,
                  cached = uncached, batched = single, captured = eager
    decode        7B: a token at batch 1, captured and eager, against transformers
    prefill       7B: a picture and 70 tokens, batch 1 and 8, against transformers
    toy           `python train.py`: seconds of each part, scores
    stages        both stages, without and with experts, of 8 of 7B's 32 blocks: with its optimiser
                  state the whole does not fit on one GPU, and the MFU is nearly the same
    experts       7B: prefill and decode with experts, against none
    tests         the tests that run on a GPU, too
    static_cache  7B: decode against transformers' compiled static cache
    loads         7B: a checkpoint's way to memory and to the GPU

Each part is a process with a time limit. One that fails costs only itself. OUT/gpu_check.json is
written anew after each row, {"parts": {name: {"rows", "error", "seconds"}}, ...}: what a part has
measured stays, and `error` is the last line of a part that failed. A row is null in what could not
be measured because a package is missing. Nothing is downloaded.
"""
# cli before torch: from then on, Ctrl-C ends the slow imports with one line
from cli import check_numbers, main, parse, UserError

import contextlib
import glob
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from typing import Literal

from experiments.processes import last_line, ROOT
from experiments.speed.gpu import PARTS
from formats.json_files import write_json
from training.options import device_of

LEAST = 15  # seconds; with fewer left, a part is not begun


@dataclass
class Options:
    """Measure on a GPU what the documentation says of it; write OUT/gpu_check.json."""
    out: str = os.path.join("out", "gpu_check")  # folder of the results
    device: Literal["cuda", "cpu"] = "cuda"  # cpu: to try the script out
    size: Literal["7b", "tiny"] = "7b"  # of the models. tiny: to try the script out
    minutes: float = 8.5              # in all; parts that would begin later are left out
    part: Literal[(*PARTS,)] | None = None  # run only this part, in this process; its work files
                                      # are in --out

    def __post_init__(self):
        check_numbers(self, {})
        device_of(self)

    @classmethod
    def help_epilog(cls):
        return __doc__.split("\n\n", 1)[1]


def command(part, work, o):
    """What runs a part, with a folder for its work files."""
    return [sys.executable, "-m", "experiments.gpu_check", "--part", part, "--out", work,
            "--device", o.device, "--size", o.size]


def error_in(path):
    """The last line that names an error: libraries may warn after it. Else the last line."""
    with open(path) as f:
        named = [line.strip() for line in f if "rror" in line]
    return named[-1] if named else last_line(path)


def run_part(part, o, seconds, keep):
    """Run a part in a process of its own -> its error, None if it went well.

    keep  called with each row
    """
    errors = os.path.join(o.out, f"{part}.err")
    with tempfile.TemporaryDirectory() as work, open(errors, "w") as f:
        process = subprocess.Popen(command(part, work, o), cwd=ROOT, stdin=subprocess.DEVNULL,
                                   text=True, stderr=f, stdout=subprocess.PIPE,
                                   start_new_session=True)
        late = threading.Event()

        def stop():  # the part and all that it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

        timer = threading.Timer(seconds, lambda: (late.set(), stop()))
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith("{"):
                    keep(json.loads(line))
                else:
                    print(f"  {line}", end="", flush=True)
            process.wait()
        finally:
            timer.cancel()
            stop()
            for path in glob.glob(os.path.join(work, "*.txt")):  # what train.py printed
                shutil.copy(path, os.path.join(o.out, f"{part}_{os.path.basename(path)}"))
    if late.is_set():
        return f"took longer than {seconds:.0f} s"
    if process.returncode:
        return error_in(errors) or f"exit status {process.returncode}"
    return None


def check(o):
    """Run the parts and write the JSON; returns the names of those that did not go well."""
    began, path = time.time(), os.path.join(o.out, "gpu_check.json")
    os.makedirs(o.out, exist_ok=True)
    parts = {part: {"rows": None, "error": None, "seconds": None} for part in PARTS}

    def write():
        write_json(f"{path}.tmp", {"options": asdict(o), "seconds": time.time() - began,
                                   "parts": parts})
        os.replace(f"{path}.tmp", path)

    for part, found in parts.items():
        def keep(row):
            found["rows"] = [*(found["rows"] or []), row]
            write()

        print(f"{part}:", flush=True)
        start = time.time()
        left = began + 60 * o.minutes - start
        if left < LEAST:
            found["error"] = "not begun: no time was left"
        else:
            most = PARTS[part][1] * (4 if o.device == "cpu" else 1)  # limits for a GPU
            found["error"] = run_part(part, o, min(left - 5, most), keep)
            found["seconds"] = time.time() - start
        if found["error"]:
            print(f"  failed: {found['error']}", flush=True)
        write()
    return [part for part, found in parts.items() if found["error"]
            or any(row.get("ok") is False for row in found["rows"] or [])]


def run():
    o = Options(**parse(Options))
    if o.part:
        for row in PARTS[o.part][0](o):
            print(json.dumps(row), flush=True)
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the running part, too
    if failed := check(o):
        raise UserError(f"not all went well in {', '.join(failed)}; "
                        f"see {os.path.join(o.out, 'gpu_check.json')}")


if __name__ == "__main__":
    main(run)
