"""Programs of this repository in processes of their own, without the seconds that imports take.

`Program("train.py", "--stage", 1)` does what `python train.py --stage 1` does, in a process that is
forked from one that has imported torch already. `start_ranks` starts several that form a world, as
torchrun does. Tests of torchrun, of imports and of Ctrl-C start real ones.
"""
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["pytest", "train", "sample", "torch._dynamo"])


def run_script(words, environment, outputs):
    """In the forked process: be `python WORDS` on one thread; outputs: files of stdout, stderr."""
    import torch  # is there already
    torch.set_num_threads(1)
    os.environ |= environment
    for number, name in enumerate(outputs, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = words
    runpy.run_path(os.path.join(HERE, words[0]), run_name="__main__")


class Program:
    """A running program, with the methods of `subprocess.Popen` that tests use.

    words        the file, relative to the repository's root, and its arguments
    environment  is added to ours
    """

    def __init__(self, *words, **environment):
        self.words = list(map(str, words))
        self.files = [tempfile.NamedTemporaryFile("r") for _ in ("stdout", "stderr")]
        names = [file.name for file in self.files]
        self.process = FORKS.Process(target=run_script, args=(self.words, environment, names))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()

    def communicate(self, timeout=200):
        """Wait until it has ended; returns (stdout, stderr)."""
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.words, timeout)
        return tuple(file.read() for file in self.files)


def start_ranks(ranks, *words):
    """[Program, ...], one for each rank of a world."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
             "GLOO_SOCKET_IFNAME": "lo"}  # whatever the host is called
    return [Program(*words, RANK=str(rank), LOCAL_RANK=str(rank), **world)
            for rank in range(ranks)]


def succeeds(program, timeout=200):
    """Wait for a Program; returns (stdout, stderr)."""
    stdout, stderr = program.communicate(timeout)
    assert program.returncode == 0, stderr[-2000:]
    return stdout, stderr


def words_of(given, stage=2):
    """The words of a command line with these options."""
    options = {"stage": stage} | given
    return [w for k, v in options.items() if v is not None and v is not False
            for w in ([f"--{k}"] if v is True else [f"--{k}", str(v)])]
