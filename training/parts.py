"""Which stages and parts are still to be run, and how the two parts of stage 0 run side by side."""
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from cli import UserError
from training.distributed import main_distributed, raise_on_all_ranks, Signals, start_world
from training.options import check_paths, complete, finished, folder_of, Options, PARTS, parts_of
from training.state import first_step, saved_steps


def begun(out):
    """Whether a run of all stages can go on in `out`: it left a checkpoint or a state."""
    units = [(0, part) for part in PARTS] + [(1, None), (2, None)]
    return any(finished(out, *unit) or saved_steps(os.path.join(folder_of(out, *unit), "state"))
               for unit in units)


def check_options(given):
    """UserError for what can be seen to be wrong before any work."""
    o = Options(**given)
    if o.stage not in (None, 0, 1, 2) or (o.preset != "toy" and o.stage not in (1, 2)):
        raise UserError(f"--stage {o.stage} with preset {o.preset}: expected 1 or 2; "
                        f"the toy also has 0, or none for all")
    if o.part and o.stage != 0:
        raise UserError(f"--part {o.part}: only stage 0 has parts, say --stage 0")
    if o.stage is None and o.overwrite:
        raise UserError("--overwrite goes with --stage; to train all anew, "
                        "name another folder with --out")
    check_paths(given)
    if o.stage is None and o.resume and not begun(o.out):
        raise UserError(f"--resume: no saved state and no finished stage in {o.out}")
    if o.stage is not None:
        parts = parts_of(o, o.stage)
        left = [part for part in parts if o.overwrite or not finished(o.out, o.stage, part)]
        stage_options = complete(given | {"part": (left or parts)[0]}, o.stage)
        if not left:  # after `complete`, which names missing options
            raise UserError(f"{folder_of(o.out, o.stage, o.part)} is finished: "
                            f"--overwrite trains it anew")
        first_step(stage_options)


def unfinished(given, stage):
    """The options of each part of a stage that is still to be run, [dict, ...].

    With --resume a part goes on from its saved state if it has one.
    """
    o, runs = Options(**given), []
    for part in parts_of(o, stage):
        folder = folder_of(o.out, stage, part)
        if not finished(o.out, stage, part) or (o.overwrite and stage == o.stage):
            resume = o.resume and bool(saved_steps(os.path.join(folder, "state")))
            runs.append(given | {"part": part, "resume": resume})
        elif dist.get_rank() == 0:
            shutil.rmtree(os.path.join(folder, "state"), ignore_errors=True)  # a kill may leave it
            print(f"{folder} is finished, skipped", file=sys.stderr)
    return runs


def run_part(run_stage, given, stage, threads, place, lock):
    """One of the parts of `run_parts_in_parallel`: a world of one that ends when its parent does.

    place  line of its progress bar on the terminal; lock: held while a bar is drawn
    """
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    tqdm.set_lock(lock)
    torch.set_num_threads(threads)
    main_distributed(lambda: run_stage(given, stage, start_world("cpu"), place))


def run_parts_in_parallel(run_stage, runs, stage):
    """Run the parts of a stage at the same time, each in a process with its share of the cores.

    The parts are independent, and small products gain little from a second core: two parts with a
    core each take less time than one after the other on both. A signal, or the failure of a part,
    ends all.
    """
    raise_on_all_ranks(lambda: [first_step(complete(given, stage)) for given in runs])
    threads = max(1, torch.get_num_threads() // len(runs))
    spawn = multiprocessing.get_context("spawn")  # a fork has OpenMP's state without its threads
    lock = spawn.RLock()
    parts = {given["part"]: spawn.Process(target=run_part,
                                          args=(run_stage, given, stage, threads, place, lock))
             for place, given in enumerate(runs)}
    try:
        with Signals() as signals:
            failed = start_and_wait(parts, signals)
    finally:
        del lock  # frees its semaphore: this process may end without Python's exit handlers
    exit_as_parts_did(parts, failed, signals.got, stage)
    if not all(finished(Options(**given).out, stage, given["part"]) for given in runs):
        sys.exit(0)  # one part was stopped by a signal of its own, and has said so


def start_and_wait(parts, signals):
    """Start the processes and wait until all have ended; a signal or a failure ends the others.

    Returns the name of the part that failed first, or None.
    """
    # Children ignore Ctrl-C until they can save: they inherit this.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for process in parts.values():
        process.start()
    signal.signal(signal.SIGINT, signals.note)
    failed, terminated = None, 0.0
    while running := [process for process in parts.values() if process.is_alive()]:
        multiprocessing.connection.wait([process.sentinel for process in running], timeout=0.5)
        failed = failed or first_failed(parts)
        if (signals.got or failed) and not terminated:
            terminated = time.monotonic()
            for process in running:
                process.terminate()
        if failed and terminated and time.monotonic() - terminated > 60:
            for process in running:
                process.kill()  # it may wait for a lock that the failed part held
    return failed or first_failed(parts)


def first_failed(parts):
    return next((name for name, process in parts.items() if process.exitcode), None)


def exit_as_parts_did(parts, failed, got, stage):
    """End this process if a part did not succeed.

    failed  the part that failed first, or None; got: the signal that all got, or 0
    """
    if any(process.exitcode == 1 for process in parts.values()):
        sys.exit(1)  # the part has printed its error
    if got:
        print(f"stage {stage} stopped by {signal.Signals(got).name}", file=sys.stderr)
        sys.exit(130 if got == signal.SIGINT else 0)
    code = parts[failed].exitcode if failed else 0
    if code > 0:
        sys.exit(code)  # Ctrl-C reached only this part
    if code < 0:
        raise UserError(f"stage {stage} {failed} was ended by {signal.Signals(-code).name}")
