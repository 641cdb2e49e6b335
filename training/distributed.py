"""Ranks: how they start, agree, and end. One code path for one process and for many.

Errors across ranks: if one fails, all must stop, or the rest hang in the next collective. So
anything that may fail on one rank runs inside `raise_on_all_ranks`.
"""
import contextlib
import datetime
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cli import main, UserError
from formats.folders import first_line


STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # they end a run with its state saved


class DistributedUserError(UserError):
    """A user's error that all ranks raise, with the same text."""


def many_processes():
    """Whether torchrun started several: a cluster may leave WORLD_SIZE=1 behind, with no more."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def local_world():
    """(which of the processes on its machine this is, how many they are), as torchrun says."""
    if not many_processes():
        return 0, 1
    return tuple(int(os.environ.get(name) or default) for name, default in
                 (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))


def set_device():
    """Take a GPU of one's own; UserError on all ranks of a machine with fewer GPUs than ranks, or
    if LOCAL_RANK does not say which.
    """
    (rank, ranks), gpus = local_world(), torch.cuda.device_count()
    if many_processes() and gpus > 1 and not os.environ.get("LOCAL_RANK"):
        raise UserError("LOCAL_RANK is not set, so all processes would take GPU 0: start them with "
                        "torchrun")
    if ranks > gpus:
        raise UserError(f"{ranks} processes need as many GPUs, this machine has {gpus}: "
                        f"--nproc_per_node {gpus}")
    torch.cuda.set_device(rank)


def start_world(device, replicate=1):
    """Join torchrun's processes, or be a world of one; returns the mesh that parameters are sharded
    over.

    replicate  copies of the sharded state. torchrun numbers ranks node by node, so with one copy a
               node, parameters travel inside a node, and only summed gradients between nodes.
    Raises UserError if the ranks cannot reach each other or lack GPUs, DistributedUserError if they
    cannot be split into that many copies.
    """
    # Large pages for tensors in CPU memory: steps of the toy take a tenth less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    backend = "nccl" if device == "cuda" else "gloo"
    many = many_processes()
    if many and device == "cuda":
        set_device()
    alone = {} if many else dict(store=dist.HashStore(), rank=0, world_size=1)
    patience = datetime.timedelta(hours=1)  # others wait while rank 0 writes the checkpoint
    try:
        dist.init_process_group(backend, timeout=patience, **alone)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the processes cannot be connected: {first_line(error)}") from None
    ranks = dist.get_world_size()
    if replicate == 1:
        return init_device_mesh(device, (ranks,))
    if ranks % replicate:
        raise DistributedUserError(f"--replicate {replicate}: expected a divisor of "
                                   f"the {ranks} ranks")
    return init_device_mesh(device, (replicate, ranks // replicate),
                            mesh_dim_names=("replicate", "shard"))


def sum_over_ranks(values, mesh):
    """list[float]: each of some numbers, summed over all ranks."""
    dtype = torch.float64 if mesh.device_type == "cpu" else torch.float32
    t = torch.tensor(values, device=mesh.device_type, dtype=dtype)
    dist.all_reduce(t)
    return t.tolist()


def all_gather(value):
    """The values of all ranks, a list by rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def raise_on_all_ranks(work):
    """work() on this rank; if it raises a user's error on any, all raise DistributedUserError with
    the first.
    """
    result = error = None
    try:
        result = work()
    except (UserError, OSError) as caught:
        error = str(caught)
    errors = [e for e in all_gather(error) if e is not None]
    if errors:
        raise DistributedUserError(errors[0])
    return result


class Signals:
    """Notes Ctrl-C, SIGTERM and SIGHUP in `got` while it is entered; the loop looks at it between
    two steps.

    torchrun sends on a signal that the terminal has already sent. So a second Ctrl-C ends the
    process at once only if it comes more than two seconds later. nohup's choice is kept.
    """

    def __enter__(self):
        self.got, self.when, self.waiting = 0, 0.0, False
        self.loader_handler = signal.getsignal(signal.SIGCHLD)
        self.before = {s: signal.signal(s, self.note) for s in STOPS
                       if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN}
        self.before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, self.check_workers)
        return self

    def note(self, number, frame):
        if self.got and number == signal.SIGINT and time.monotonic() - self.when > 2:
            raise KeyboardInterrupt
        if not self.got:
            self.got, self.when = number, time.monotonic()
        if self.waiting:
            raise KeyboardInterrupt

    def check_workers(self, *signal_and_frame):
        """Let the data loader raise its RuntimeError if a worker died, but not amid a step."""
        if self.waiting and callable(self.loader_handler):
            self.loader_handler(signal.SIGCHLD, None)

    @contextlib.contextmanager
    def interruptible(self):
        """Within it, a signal raises KeyboardInterrupt at once, also one that came before."""
        self.waiting = True
        try:
            self.check_workers()
            if self.got:
                raise KeyboardInterrupt
            yield
        finally:
            self.waiting = False

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Output:
    """Standard output or error of a run that does not end with its reader, a terminal or `tee`:
    what nobody reads is lost, and nothing else.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self.unless_unread(self.stream.write, text)

    def flush(self):
        self.unless_unread(self.stream.flush)

    def unless_unread(self, act, *given):
        try:
            act(*given)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


def ignore_signals(worker):
    """For worker processes of a data loader: only the parent shuts them down, by a signal or by
    ending.

    A terminal and torchrun signal all processes of a group, but workers are needed until the state
    is saved. A worker that waits to send a batch would not notice the parent's end by itself.
    """
    parent = multiprocessing.parent_process().pid
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)

    def listen():
        got = None
        while os.getppid() == parent and not (got and got.si_pid == parent):
            got = signal.sigtimedwait(STOPS, 1)  # None after a second
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def flush_and_exit(code):
    """End the process without Python's exit handlers: gloo's threads may abort them (torch 2.13).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main_distributed(work):
    """Do the work of this process and end it, with the exit code of cli.main.

    An error that all ranks share is printed by rank 0 only. A rank that fails does not wait for the
    others.
    """
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main(work)
    except SystemExit as end:  # an error, a signal or --help
        code = end.code
        joined = dist.is_initialized()
        shared = isinstance(end.__context__, DistributedUserError) or not joined
        if isinstance(code, str):
            rank = dist.get_rank() if joined else local_world()[0]
            if not (shared and many_processes() and rank):
                print(code, file=sys.stderr)
            code = 1
        flush_and_exit(code or 0)
    except RuntimeError as error:
        broken = isinstance(error, (dist.DistBackendError, dist.DistNetworkError))
        if not (broken or "/gloo/" in str(error)):
            raise
        print(f"error: rank {dist.get_rank()} stops because another rank is gone "
              f"({first_line(error)}); the messages of that rank or of torchrun say why. "
              f"--resume goes on from the last saved state", file=sys.stderr)
        flush_and_exit(1)
    dist.barrier()
    flush_and_exit(0)
