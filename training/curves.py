"""Loss curves of all stages, drawn with matplotlib from their log.jsonl.

`train.py` draws them at the end of the main run; `python -m tools.plot_log` draws the logs in any
folders, or compares runs.
"""
import glob
import json
import math
import os

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, LogLocator

from cli import UserError


def read_log(path):
    """(points, val_losses) of a log.jsonl: [(step, loss), ...] of all steps and of evaluations.

    A last line without a newline is left out: the run still writes it, or was killed.
    Raises UserError if another line is damaged.
    """
    points, val_losses = [], []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                points.append((int(row["step"]), float(row["loss"])))
                if "val_loss" in row:
                    val_losses.append((int(row["step"]), float(row["val_loss"])))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} line {number}: not a line of a training log") from None
    return tuple([p for p in part if math.isfinite(p[1])] for part in (points, val_losses))


def read_runs(folders):
    """{folder: {stage: what `read_log` returns}}.

    A stage is the subfolder that holds a log.jsonl, like "stage2"; "" is the folder itself.
    Raises UserError if a folder is missing or has no log with a step in it.
    """
    runs = {}
    for folder in folders:
        if not os.path.isdir(folder):
            raise UserError(f"{folder}: folder not found")
        paths = sorted(glob.glob("**/log.jsonl", root_dir=folder, recursive=True))
        logs = {os.path.dirname(path): read_log(os.path.join(folder, path)) for path in paths}
        runs[folder] = {stage: log for stage, log in logs.items() if log[0]}
        if not runs[folder]:
            raise UserError(f"{folder}: no log.jsonl with a training step, here or in a subfolder")
    return runs


def smooth(losses):
    """float[n], the mean of each loss and its neighbours within 1/60 of the run."""
    n, total = len(losses), np.cumsum([0.0, *losses])
    first = np.maximum(np.arange(n) - n // 60, 0)
    end = np.minimum(np.arange(n) + n // 60 + 1, n)
    return (total[end] - total[first]) / (end - first)


def draw_panel(axes, stage, runs):
    """The losses of one stage in all runs; returns {name of a run: its line}."""
    lines = {}
    for i, (name, run) in enumerate(runs.items()):
        if stage in run:
            points, val_losses = run[stage]
            steps, losses = zip(*points)
            axes.plot(steps, losses, f"C{i}", alpha=0.3, linewidth=0.8)
            lines[name], = axes.plot(steps, smooth(losses), f"C{i}")
            if val_losses:
                axes.plot(*zip(*val_losses), f"C{i}o", markerfacecolor="white")
    axes.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 10 * low else AutoLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    return lines


def draw(runs):
    """A matplotlib figure of `runs`, as `read_runs` returns them: a panel for each stage."""
    stages = list(dict.fromkeys(stage for run in runs.values() for stage in run))
    columns = min(2, len(stages))
    rows = math.ceil(len(stages) / columns)
    figure, lines = Figure((5.6 * columns, 3.5 * rows + 0.6), layout="constrained"), {}
    for i, stage in enumerate(stages, 1):
        lines |= draw_panel(figure.add_subplot(rows, columns, i), stage, runs)
    figure.legend(lines.values(), lines, loc="outside upper left",
                  title="pale: each step; line: smoothed; circles: validation")
    return figure


def plot(runs, path):
    """Draw `runs` into a PNG."""
    draw(runs).savefig(path, dpi=100, format="png")
