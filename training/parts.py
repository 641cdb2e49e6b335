"""TODO"""
import multiprocessing.connection
import os
import signal
import sys
import threading

import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import UserError
from training.distributed import main_distributed, raise_on_all_ranks, Signals, start_world
from training.options import complete, finished, folder_of, Options, parts_of
from training.state import first_step, saved_steps


def check_options(given):
    """UserError for what can be seen to be wrong before any work."""
    o = Options(**given)
    if o.stage not in (None, 0, 1, 2) or (o.preset != "toy" and o.stage not in (1, 2)):
        raise UserError(f"--stage {o.stage} with preset {o.preset}: expected 1 or 2; the toy also has 0, or none for all")
    if o.part and o.stage != 0:
        raise UserError(f"--part {o.part}: only stage 0 has parts, say --stage 0")
    if o.stage is not None and finished(o.out, o.stage, o.part) and not o.overwrite:
        raise UserError(f"{folder_of(o.out, o.stage, o.part)} is finished: --overwrite trains it anew")
    if o.stage is None and o.overwrite:
        raise UserError("--overwrite goes with --stage; to train all anew, name another folder with --out")
    if o.stage is not None:
        left = [part for part in parts_of(o, o.stage) if o.overwrite or not finished(o.out, o.stage, part)]
        first_step(complete(given | {"part": left[0]}, o.stage))



def unfinished(given, stage):
    """The options of what is still to be run of a stage, by part; it goes on from a saved state where --resume wants that."""
    o, runs = Options(**given), []
    for part in parts_of(o, stage):
        folder = folder_of(o.out, stage, part)
        if not finished(o.out, stage, part) or (o.overwrite and stage == o.stage):
            runs.append(given | {"part": part, "resume": o.resume and bool(saved_steps(os.path.join(folder, "state")))})
        elif dist.get_rank() == 0:
            print(f"{folder} is finished, skipped", file=sys.stderr)
    return runs


def run_part(run_stage, given, stage, threads):
    """One of the runs of `side_by_side`: a world of one, in a process that does not outlive its parent."""
    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which `launch` would leave behind
    torch.set_num_threads(threads)
    main_distributed(lambda: run_stage(given, stage, start_world("cpu")))


def run_parts_in_parallel(run_stage, runs, stage):
    """Run the parts of a stage at once, each in a process with its share of the cores.

    They need nothing of one another, and small products gain little from a second core: two parts on a core each take less time
    than one after the other on both. A signal, or the failure of a part, ends all of them, as a signal ends any run.
    """
    raise_on_all_ranks(lambda: [first_step(complete(given, stage)) for given in runs])  # what is wrong is said here, once
    threads = max(1, torch.get_num_threads() // len(runs))
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit OpenMP's state, but not its threads
    parts = {given["part"]: spawn.Process(target=run_part, args=(run_stage, given, stage, threads)) for given in runs}
    failed, told = None, False
    with Signals() as signals:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: until a part can save, a terminal's Ctrl-C is its parent's affair
        for process in parts.values():
            process.start()
        signal.signal(signal.SIGINT, signals.note)
        while running := [process for process in parts.values() if process.is_alive()]:
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=0.5)
            failed = failed or next((name for name, process in parts.items() if process.exitcode), None)
            if (signals.got or failed) and not told:
                told = True
                for process in running:
                    process.terminate()
    if any(process.exitcode == 1 for process in parts.values()):
        sys.exit(1)  # it has said why
    if signals.got:
        print(f"stopped by {signal.Signals(signals.got).name}", file=sys.stderr)
        sys.exit(130 if signals.got == signal.SIGINT else 0)
    if failed and parts[failed].exitcode > 0:
        sys.exit(parts[failed].exitcode)  # a Ctrl-C that met it alone, say
    if failed:
        raise UserError(f"stage {stage} {failed} was ended by {signal.Signals(-parts[failed].exitcode).name}")
    if not all(finished(Options(**given).out, stage, given["part"]) for given in runs):
        sys.exit(0)  # a signal met one of them alone, which has said so
