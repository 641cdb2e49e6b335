"""The saved state of a run: written whole or not at all, and read back on any number of ranks.

A stage's folder has state/step_NNNNNN/ while it runs: the shards of torch.distributed.checkpoint
and options.json, which also holds the sizes of these files.
"""
import dataclasses
import functools
import glob
import hashlib
import os
import re
import shutil
import signal
import sys
import time

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict, StateDictOptions
from tqdm import tqdm

from cli import UserError
from formats.configs import expect_keys
from formats.folders import first_line, locate
from formats.json_files import read_json_object, write_json
from formats.lora import base_folder
from formats.weight_files import hash_file
from training.distributed import all_gather, DistributedUserError, raise_on_all_ranks
from training.options import CHANGEABLE, inputs, stage_folder, title
from weights import VERSION

STATE = r"step_(\d{6,})"  # name of a saved state; other things stay until the stage is finished


@functools.cache
def digest(name):
    """A hash of what a path or hub name stands for, wherever it lies: of a data file, the whole; of
    a folder, its configs, tokenizer and weights. Of weights 256 pieces are read, see `hash_file`.
    """
    path, weights = locate(name), (".safetensors", ".bin")
    files = [path] if os.path.isfile(path) else sorted(
        f.path for f in os.scandir(path) if f.name.endswith((*weights, ".json", ".model")))
    hashes = [hash_file(file, 256 if file.endswith(weights) else None) for file in files]
    return f"with content {hashlib.sha256(''.join(hashes).encode()).hexdigest()[:16]}"


def identity(o):
    """{option: value} of what makes a run what it is. Of files, the content counts, not the path;
    one rank is enough to look at it. The pictures are left out.
    """
    fixed = {name: v for name, v in dataclasses.asdict(o).items() if name not in CHANGEABLE}
    if dist.get_rank() > 0:
        return fixed
    names = [name for name in (*inputs(o), "val") if name != "images" and getattr(o, name)]
    files = {name: getattr(o, name) for name in names}
    if o.stage == 2 and "vision" not in names:  # --init is a checkpoint, maybe a LoRA
        folder = locate(o.init)
        home = base_folder(folder, o.base)
        files |= {"base": home} if home != folder else {}
    return fixed | {name: digest(file) for name, file in files.items()}


def state_of(model, optimisers):
    """Model and optimiser state of what trains, as torch.distributed.checkpoint expects it."""
    options = StateDictOptions(ignore_frozen_params=True)
    weights, moments = get_state_dict(model, optimisers, options=options)
    return {"model": weights, "optim": moments}


def save_state(folder, step, model, optimisers, o):
    """Write folder/step_NNNNNN whole or not at all; then drop all but the newest --keep.

    Returns "", or the reason why it could not be written. A full disk does not end the run, and
    leaves the older states. A state that ends in .tmp is the rest of an interrupted write or
    removal.
    """
    path = state_path(folder, step)

    def begin():
        if dist.get_rank() == 0:
            os.makedirs(folder, exist_ok=True)
            for name in os.listdir(folder):
                if re.fullmatch(STATE + r"(\.old)?\.tmp", name):
                    shutil.rmtree(os.path.join(folder, name), ignore_errors=True)
            os.makedirs(path + ".tmp")

    def publish():
        if dist.get_rank() == 0:
            sizes = {file.name: file.stat().st_size for file in os.scandir(path + ".tmp")}
            write_json(os.path.join(path + ".tmp", "options.json"),
                       {"version": VERSION, "options": identity(o), "sizes": sizes})
            drop(folder, [os.path.basename(path)] if os.path.isdir(path) else [])
            os.replace(path + ".tmp", path)
            kept = [f"step_{n:06d}" for n in saved_steps(folder)[-o.keep:]]
            drop(folder, [name for name in os.listdir(folder)
                          if re.fullmatch(STATE, name) and name not in kept])

    try:
        raise_on_all_ranks(begin)
        dcp.save(state_of(model, optimisers), checkpoint_id=path + ".tmp")
        raise_on_all_ranks(publish)
        return ""
    except (DistributedUserError, CheckpointException) as error:  # the same on all ranks
        if dist.get_rank() == 0:
            shutil.rmtree(path + ".tmp", ignore_errors=True)
        reason = reason_of(error) if isinstance(error, CheckpointException) else error
        return f"the state after step {step} could not be saved in {folder} ({reason})"


def drop(folder, names):
    """Remove saved states. Rename to .tmp first, so that a half-deleted state is never loaded."""
    for name in names:
        doomed = os.path.join(folder, name + ".old.tmp")  # name.tmp may be what replaces it
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(os.path.join(folder, name), doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def state_path(folder, step):
    return os.path.join(folder, f"step_{step:06d}")


def saved_steps(folder):
    """The steps whose state was saved, ascending; `read_saved` tells if one is still whole."""
    files = [file for name in (".metadata", "options.json")
             for file in glob.glob(f"step_*/{name}", root_dir=folder)]
    states = [re.fullmatch(STATE, os.path.dirname(file)) for file in files]
    return sorted({int(state[1]) for state in states if state})


def read_saved(path):
    """The options.json of a saved state; UserError that names a file which is not whole."""
    file = os.path.join(path, "options.json")
    saved = read_json_object(file)
    if saved.get("version") != VERSION:
        raise UserError(f"{file}: saved by another version of this code, whose weights and moments "
                        f"differ: finish the run with that version, or say --overwrite")
    expect_keys(saved, {"version", "options", "sizes"}, file)
    for name, size in saved["sizes"].items():
        file = os.path.join(path, name)
        if not os.path.exists(file) or os.path.getsize(file) != size:
            raise UserError(f"{file}: damaged, {size:,} bytes were written")
    return saved


def newest_state(folder):
    """(step, its options.json, problems of newer states) of the newest whole state in a folder."""
    problems = []
    for step in reversed(saved_steps(folder)):
        try:
            return step, read_saved(state_path(folder, step)), problems
        except UserError as error:
            problems.append(str(error))
    raise UserError(f"--resume: {problems[0]}; no older state is whole" if problems else
                    f"--resume: no saved state in {folder}")


def first_step(o):
    """The number of steps already done: those of the newest whole state with --resume, else 0.

    Raises UserError if there is nothing to resume, if the run would not have the identity of the
    saved one, or if a saved run would be lost.
    """
    states = os.path.join(stage_folder(o), "state")
    if not o.resume:
        if (saved := saved_steps(states)) and not o.overwrite:
            raise UserError(f"{states} holds a run that was stopped after step {saved[-1]}: "
                            f"--resume goes on with it, --stage {o.stage} --overwrite starts anew")
        return 0
    step, saved, _ = newest_state(states)
    before = saved["options"]
    for name, value in identity(o).items():
        if before.get(name, value) != value:
            raise UserError(f"--resume: the run had --{name} {before[name]}, not {value}")
    if o.steps and step > o.steps:
        raise UserError(f"--resume: the run has taken {step} steps, more than --steps {o.steps}")
    return step


def load_newest(o, model, optimisers):
    """Load the newest whole state with --resume; returns the steps done, 0 for a new run.

    Drops the states that the run will write again: damaged ones, or all. Raises
    DistributedUserError as `first_step` does, and if the state cannot be read.
    """
    states = os.path.join(stage_folder(o), "state")
    start = raise_on_all_ranks(lambda: first_step(o))
    if start:
        load_state(states, start, model, optimisers)
    if dist.get_rank() == 0:
        identity(o)  # now: later the files may be others
        for problem in newest_state(states)[2] if start else ():
            print(f"warning: {problem}; going on after step {start}", file=sys.stderr)
        drop(states, [f"step_{step:06d}" for step in saved_steps(states) if step > start])
    return start


def load_state(folder, step, model, optimisers):
    """Load the state saved after `step` steps into model and optimisers, on any number of ranks."""
    state, path = state_of(model, optimisers), state_path(folder, step)
    try:
        dcp.load(state, checkpoint_id=path)
    except CheckpointException as error:  # the same on all ranks
        raise DistributedUserError(f"{path}: damaged ({reason_of(error)}); remove it to go on "
                                   f"from an older state") from None
    options = StateDictOptions(ignore_frozen_params=True, strict=False)
    set_state_dict(model, optimisers, model_state_dict=state["model"],
                   optim_state_dict=state["optim"], options=options)


def reason_of(error):
    """The error in a CheckpointException of torch's, in one line."""
    return first_line(next(iter(error.failures.values()))[0])


def save_or_warn(folder, step, model, optimisers, o, *, bar):
    """Save the state after `step` steps; returns the seconds it took. A failure is a warning."""
    began = time.perf_counter()
    problem = save_state(folder, step, model, optimisers, o)
    if problem and dist.get_rank() == 0:
        bar.write(f"warning: {problem}; training goes on, older states are kept", file=sys.stderr)
    return time.perf_counter() - began


def save_and_end(folder, step, model, optimisers, o, *, stop, batches):
    """Save the state after `step` steps and end the process; the next step cannot be taken.

    stop     the signal that some rank got, or 0. The exit code is then 130 after Ctrl-C, else 0
    batches  this rank's for the next step. Without a signal, all ranks raise the first UserError
             that stands for a batch, as a DistributedUserError
    """
    problem = "" if step else "nothing to save"
    if step and not all_gather(step in saved_steps(folder))[0]:  # else it was just saved, or loaded
        problem = save_state(folder, step, model, optimisers, o)
    by = f" by {signal.Signals(stop).name}" if stop else ""
    end = (f"{title(o)} stopped{by} after step {step}, "
           f"{problem or 'state saved: --resume goes on'}")
    if not stop:
        errors = all_gather(next((str(b) for b in batches if isinstance(b, UserError)), ""))
        raise DistributedUserError(f"{next(filter(None, errors))} ({end})")
    if problem and step:
        raise DistributedUserError(end)
    if dist.get_rank() == 0:
        tqdm.write(end, file=sys.stderr)
    sys.exit(130 if stop == signal.SIGINT else 0)
