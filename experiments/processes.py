"""Programs in processes of their own, and the log of train.py: for ablate.py and bench.py."""
import hashlib
import os
import pathlib
import subprocess
import sys
import threading

from cli import UserError
from formats.json_files import read_json_lines

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def environment(**more):
    """The environment of a process that imports this repository's modules."""
    return os.environ | {"PYTHONPATH": ROOT} | more


def sources_digest(*names):
    """The sha256 of these files of the repository, which decide what a run gives."""
    code = b"".join(pathlib.Path(ROOT, name).read_bytes() for name in names)
    return hashlib.sha256(code).hexdigest()


def last_line(path):
    """The last line of a text file; "" if it has none."""
    with open(path) as f:
        return (f.read().splitlines() or [""])[-1]


def read_log(folder):
    """The rows of folder/log.jsonl, list[dict], one for each step."""
    return [row for _, row in read_json_lines(os.path.join(folder, "log.jsonl"))]


class Jobs:
    """Runs programs, each with `threads` threads; several Python threads may call `run` at once."""

    def __init__(self):
        self.threads, self.running, self.lock = os.cpu_count() or 1, set(), threading.Lock()
        self.stopped = False

    def run(self, folder, program, *words):
        """Run a module, output in folder/output.txt; UserError with its last line if it fails."""
        path = os.path.join(folder, "output.txt")
        with open(path, "a") as output, self.lock:
            if self.stopped:
                raise UserError("stopped")
            process = subprocess.Popen(
                [sys.executable, "-m", program, *map(str, words)], stdout=output, stderr=output,
                env=environment(OMP_NUM_THREADS=str(self.threads)),
                close_fds=False)  # it inherits locks: if we are killed, they end when it ends
            self.running.add(process)
        process.wait()
        self.running.discard(process)
        if process.returncode and not self.stopped:
            name = program.replace(".", "/") + ".py"
            raise UserError(f"{name} failed with status {process.returncode}, see {path}: "
                            f"{last_line(path)}")

    def stop(self):
        """End what runs; train.py saves its state then. Nothing can be started any more."""
        with self.lock:
            self.stopped = True
            for process in list(self.running):
                process.terminate()
