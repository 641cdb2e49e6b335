"""Which checkpoint a name stands for: itself, or the newest finished stage of a training run.

For sample.py. How a checkpoint is opened stands in weights.py.
"""
import glob
import os
import sys

from cli import UserError


def finished_stages(root):
    """{folder: time of its config.json} of the stages 1 and 2 that were finished under `root`.

    stageN.old counts as stageN: `weights.load` falls back to it if a save was killed.
    """
    times = {}
    for stage in ("stage[12].old", "stage[12]"):
        for config in glob.glob(os.path.join(root, "**", stage, "config.json"), recursive=True):
            times[os.path.dirname(config).removesuffix(".old")] = os.path.getmtime(config)
    return times


def choose_checkpoint(name, root="out"):
    """`name` if it is a checkpoint, else the newest finished stage in it, or in `root` for None.

    A name without stages is returned as it is: a hub id, or an error that `weights.load` explains.
    Says on standard error which run was taken if there are several. Raises UserError if there is no
    name and no checkpoint.
    """
    if name is not None and os.path.exists(os.path.join(name, "config.json")):
        return name
    times = finished_stages(name or root)
    if not times and name is None:
        raise UserError(f"no checkpoint under {root}/: run `python train.py` first, "
                        "or name one with --model")
    newest = max(times, key=times.get, default=name)
    if len(set(map(os.path.dirname, times))) > 1:
        print(f"{name or root} holds several runs: {newest} is the newest; "
              "to take another, name it with --model", file=sys.stderr)
    return newest
