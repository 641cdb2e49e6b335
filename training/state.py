"""The saved state of a run: written whole or not at all, and read back on any number of ranks.

A stage's folder has state/step_NNNNNN/ while it runs: the shards of torch.distributed.checkpoint
and options.json.
"""
import dataclasses
import json
import os
import shutil
import signal
import sys
import time

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict, StateDictOptions

from cli import UserError
from training.distributed import DistributedUserError, raise_on_all_ranks
from training.options import CHANGEABLE, stage_folder, title
from weights import VERSION


def state_of(model, optimisers):
    """Model and optimiser state of what trains, as torch.distributed.checkpoint expects it."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimisers, options=options)
    return {"model": weights, "optim": moments}


def save_state(folder, step, model, optimisers, o):
    """Write folder/step_NNNNNN whole or not at all; then drop all but the newest --keep.

    Returns "", or the reason why it could not be written. A full disk does not end the run, and
    leaves the older states. A name that ends in .tmp is the rest of an interrupted write or
    removal.
    """
    path = os.path.join(folder, f"step_{step:06d}")

    def begin():
        if dist.get_rank() == 0:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            drop(folder, [name for name in names if name.endswith(".tmp")])
            os.makedirs(path + ".tmp")
            with open(os.path.join(path + ".tmp", "options.json"), "w") as f:
                json.dump(dataclasses.asdict(o) | {"version": VERSION}, f)

    def publish():
        if dist.get_rank() == 0:
            drop(folder, [os.path.basename(path)] if os.path.isdir(path) else [])
            os.replace(path + ".tmp", path)
            kept = [f"step_{n:06d}" for n in saved_steps(folder)[-o.keep:]]
            drop(folder, [name for name in os.listdir(folder) if name not in kept])

    try:
        raise_on_all_ranks(begin)
        dcp.save(state_of(model, optimisers), checkpoint_id=path + ".tmp")
        raise_on_all_ranks(publish)
        return ""
    except (DistributedUserError, CheckpointException) as error:  # the same on all ranks
        if dist.get_rank() == 0:
            shutil.rmtree(path + ".tmp", ignore_errors=True)
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        reason = str(error).splitlines()[0]
        return f"the state after step {step} could not be saved in {folder} ({reason})"


def drop(folder, names):
    """Remove saved states. Rename to .tmp first, so that a half-deleted state is never loaded."""
    for name in names:
        path = os.path.join(folder, name)
        doomed = path.removesuffix(".tmp") + ".tmp"
        if path != doomed:
            shutil.rmtree(doomed, ignore_errors=True)
            os.replace(path, doomed)
        shutil.rmtree(doomed)


def saved_steps(folder):
    """The steps whose saved state is whole, ascending."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    names = [name for name in names if name.startswith("step_") and not name.endswith(".tmp")]
    return sorted(int(name.removeprefix("step_")) for name in names
                  if os.path.exists(os.path.join(folder, name, ".metadata")))


def first_step(o):
    """The number of steps already done: those of the newest saved state with --resume, else 0.

    Raises UserError if there is nothing to resume, if the options or the version of the code differ
    from those of the saved run, or if a saved run would be lost.
    """
    states = os.path.join(stage_folder(o), "state")
    saved = saved_steps(states)
    if not o.resume:
        if saved and not o.overwrite:
            raise UserError(f"{states} holds a run that was stopped after step {saved[-1]}: "
                            f"--resume goes on with it, --stage {o.stage} --overwrite starts anew")
        return 0
    if not saved:
        raise UserError(f"--resume: no saved state in {states}")
    with open(os.path.join(states, f"step_{saved[-1]:06d}", "options.json")) as f:
        before = json.load(f)
    if before.get("version") != VERSION:
        raise UserError(f"--resume: {states} was saved by another version of this code, whose "
                        f"weights and moments differ: finish the run with that version, "
                        f"or say --stage {o.stage} --overwrite")
    for name, value in dataclasses.asdict(o).items():
        if name not in CHANGEABLE and before.get(name, value) != value:
            raise UserError(f"--resume: the run had --{name} {before[name]}, not {value}")
    if o.steps and saved[-1] > o.steps:
        raise UserError(f"--resume: the run has taken {saved[-1]} steps, "
                        f"more than --steps {o.steps}")
    return saved[-1]


def load_state(folder, step, model, optimisers):
    """Load the state saved after `step` steps into model and optimisers, on any number of ranks."""
    state = state_of(model, optimisers)
    dcp.load(state, checkpoint_id=os.path.join(folder, f"step_{step:06d}"))
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_state_dict(model, optimisers, model_state_dict=state["model"],
                   optim_state_dict=state["optim"], options=options)


def save_or_warn(folder, step, model, optimisers, o, *, stop, bar):
    """Save the state after `step` steps; returns the seconds it took.

    A failure is a warning. After the signal `stop` (0: none) it is an error; else the process ends,
    with 130 after Ctrl-C and 0 after SIGTERM.
    """
    began = time.perf_counter()
    problem = save_state(folder, step, model, optimisers, o)
    rank_0 = dist.get_rank() == 0
    if problem and stop:
        raise DistributedUserError(
            f"{title(o)} was stopped by {signal.Signals(stop).name}, and {problem}")
    if problem and rank_0:
        bar.write(f"warning: {problem}; training goes on, older states are kept", file=sys.stderr)
    if stop:
        if rank_0:
            bar.write(f"{title(o)} stopped by {signal.Signals(stop).name} after step {step}, "
                      f"state saved: --resume goes on", file=sys.stderr)
        sys.exit(130 if stop == signal.SIGINT else 0)
    return time.perf_counter() - began
