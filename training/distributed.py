"""TODO"""
import dataclasses
import os
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from cli import main, UserError
from data import IGNORE


def start_world(device, replicate=1):
    """Join torchrun's processes, or be a world of one; returns the mesh that parameters are sharded over.

    With `replicate`, one of two dimensions: as many copies of what is sharded within each. torchrun counts ranks node by
    node, so that with a copy for each node only gradients travel between them, and only what is left when a node has summed its own.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large pages for tensors in a CPU's memory: steps of the toy take a tenth less
    if "WORLD_SIZE" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    else:
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = dist.get_world_size()
    if replicate == 1:
        return init_device_mesh(device, (ranks,))
    if ranks % replicate:
        raise DistributedUserError(f"--replicate {replicate}: the number of ranks, {ranks}, is not a multiple of it")
    return init_device_mesh(device, (replicate, ranks // replicate), mesh_dim_names=("replicate", "shard"))


def sum_over_ranks(values, mesh):
    """list[float]: each of some numbers, summed over all ranks."""
    t = torch.tensor(values, device=mesh.device_type, dtype=torch.float64 if mesh.device_type == "cpu" else torch.float32)
    dist.all_reduce(t)
    return t.tolist()


# ---- Ending together: what one rank meets, all of them must hear of, or they wait for it in their next collective


class DistributedUserError(UserError):
    """A user's error that all ranks raise, in the same words."""


def all_gather(value):
    """What each rank brings, a list by rank."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def raise_on_all_ranks(work):
    """The result of work() on this rank; if it is a user's error on any, Agreed with the first of them on all."""
    result = fault = None
    try:
        result = work()
    except (UserError, OSError) as error:
        fault = str(error)
    faults = [f for f in all_gather(fault) if f is not None]
    if faults:
        raise DistributedUserError(faults[0])
    return result


class Signals:
    """SIGTERM and Ctrl-C while it is entered: noted in `got`, for the loop to look at between two steps.

    torchrun passes a signal on that a terminal has sent already, so that only a later Ctrl-C ends the process at once.
    """

    def __enter__(self):
        self.got, self.when = 0, 0.0
        self.before = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number, frame):
        if self.got and number == signal.SIGINT and time.monotonic() - self.when > 2:
            raise KeyboardInterrupt
        if not self.got:
            self.got, self.when = number, time.monotonic()

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def ignore_signals(worker):
    """Let a process that prepares batches hear its parent alone: terminals and torchrun signal all, and it is needed to the end."""
    numbers = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    def listen():
        while signal.sigwaitinfo(numbers).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()


def split_across_ranks(cuts, make):
    """Batches made of this rank's share of `cuts`, as many as on other ranks: where one is short, a batch that supervises nothing."""
    batches = [make(cut) for cut in cuts[dist.get_rank()::dist.get_world_size()]]
    if len(batches) < -(-len(cuts) // dist.get_world_size()):
        other = make(cuts[0])
        batches.append(dataclasses.replace(other, target=torch.full_like(other.target, IGNORE)))
    return batches


def shutdown():
    """End the process. gloo's threads may abort an ordinary exit after all work is done (torch 2.13), so skip it."""
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main_distributed(work):
    """Do the work of this process and end it, with the exit code of cli.main."""
    try:
        main(work)
    except SystemExit as end:  # an error, a signal or --help: leave without waiting for the other ranks
        alike = isinstance(end.__context__, DistributedUserError) or not dist.is_initialized()
        if isinstance(end.code, str) and not (alike and int(os.environ.get("RANK", 0))):
            print(end.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(end.code, str) else end.code or 0)
    except RuntimeError as error:
        if not (isinstance(error, (dist.DistBackendError, dist.DistNetworkError)) or "/gloo/" in str(error)):
            raise
        print(f"error: rank {os.environ['RANK']} ends, for another rank is gone: what that or torchrun said tells why. "
              f"--resume goes on from the last saved state", file=sys.stderr, flush=True)
        os._exit(1)
    shutdown()
