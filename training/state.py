"""TODO"""
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
from training.options import CHANGEABLE, stage_folder


# ---- State: what a run needs to go on


def state_of(model, opts):
    """Model and optimiser state of what trains, as torch.distributed.checkpoint wants it."""
    part, optim = get_state_dict(model, opts, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": part, "optim": optim}


def save_state(folder, step, model, opts, o):
    """Write folder/step_NNNNNN whole or not at all, then drop all but the newest --keep of them.

    Returns why it could not be written, "" if it was: a full disk leaves the states that were there and ends nothing.
    Whatever ends in .tmp was cut off while it was written or removed.
    """
    path = os.path.join(folder, f"step_{step:06d}")

    def begin():
        if dist.get_rank() == 0:
            drop(folder, [name for name in os.listdir(folder) if name.endswith(".tmp")] if os.path.isdir(folder) else [])
            os.makedirs(path + ".tmp")
            with open(os.path.join(path + ".tmp", "options.json"), "w") as f:
                json.dump(dataclasses.asdict(o), f)

    def publish():
        if dist.get_rank() == 0:
            drop(folder, [os.path.basename(path)] if os.path.isdir(path) else [])
            os.replace(path + ".tmp", path)
            kept = [f"step_{n:06d}" for n in saved_steps(folder)[-o.keep:]]
            drop(folder, [name for name in os.listdir(folder) if name not in kept])

    try:
        raise_on_all_ranks(begin)
        dcp.save(state_of(model, opts), checkpoint_id=path + ".tmp")
        raise_on_all_ranks(publish)
        return ""
    except (DistributedUserError, CheckpointException) as error:  # the same on all ranks
        if dist.get_rank() == 0:
            shutil.rmtree(path + ".tmp", ignore_errors=True)
        reasons = [str(e[0]) for e in error.failures.values()] if isinstance(error, CheckpointException) else [str(error)]
        return f"the state after step {step} could not be saved in {folder} ({reasons[0].splitlines()[0]})"


def drop(folder, names):
    """Remove what `save_state` wrote, by way of names that no longer count as saved."""
    for name in names:
        path = os.path.join(folder, name)
        gone = path.removesuffix(".tmp") + ".tmp"
        if path != gone:
            shutil.rmtree(gone, ignore_errors=True)
            os.replace(path, gone)
        shutil.rmtree(gone)


def saved_steps(folder):
    """Steps with a whole saved state, ascending."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(int(n.removeprefix("step_")) for n in names if n.startswith("step_") and not n.endswith(".tmp")
                  and os.path.exists(os.path.join(folder, n, ".metadata")))


def first_step(o):
    """How many steps are done already: those of the newest saved state with --resume, else none.

    Raises UserError if there is none to resume, if it was made with other options, or if one would be lost.
    """
    states = os.path.join(stage_folder(o), "state")
    saved = saved_steps(states)
    if not o.resume:
        if saved and not o.overwrite:
            raise UserError(f"{states} holds a run that was stopped after step {saved[-1]}: --resume goes on with it, "
                            f"--stage {o.stage} --overwrite starts anew")
        return 0
    if not saved:
        raise UserError(f"--resume: no saved state in {states}")
    with open(os.path.join(states, f"step_{saved[-1]:06d}", "options.json")) as f:
        had = json.load(f)
    for name, value in dataclasses.asdict(o).items():
        if name not in CHANGEABLE and had.get(name, value) != value:
            raise UserError(f"--resume: the run had --{name} {had[name]}, not {value}")
    if o.steps and saved[-1] > o.steps:
        raise UserError(f"--resume: the run has taken {saved[-1]} steps, more than --steps {o.steps}")
    return saved[-1]


def load_state(folder, step, model, opts):
    """Put the state saved after `step` steps, on any number of ranks, into model and optimisers."""
    state = state_of(model, opts)
    dcp.load(state, checkpoint_id=os.path.join(folder, f"step_{step:06d}"))
    set_state_dict(model, opts, model_state_dict=state["model"], optim_state_dict=state["optim"],
                   options=StateDictOptions(ignore_frozen_params=True, strict=False))


def save_or_warn(folder, steps, model, opts, o, stop, bar):
    """Save the state after so many steps -> the seconds that took.

    A failure is a warning; after the signal `stop` it is an error, else the run ends.
    """
    began = time.perf_counter()
    fault = save_state(folder, steps, model, opts, o)
    if fault and stop:
        raise DistributedUserError(f"stopped by {signal.Signals(stop).name}, and {fault}")
    if fault and dist.get_rank() == 0:
        bar.write(f"warning: {fault}; training goes on, the states saved before are kept", file=sys.stderr)
    if stop:
        if dist.get_rank() == 0:
            bar.write(f"stopped by {signal.Signals(stop).name} after step {steps}, state saved: --resume goes on", file=sys.stderr)
        sys.exit(130 if stop == signal.SIGINT else 0)
    return time.perf_counter() - began
