"""Loss curves of all stages, drawn with Pillow from their log.jsonl.

`train.py` draws them at the end of the main run; `python -m tools.plot_log` draws the logs in any
folders, or compares runs.
"""
import dataclasses
import glob
import itertools
import json
import math
import os

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cli import UserError

# Sizes are in px before the figure is halved, which makes its lines smooth
WIDTH, HEIGHT = 1120, 700                    # one panel
LEFT, TOP, RIGHT, BOTTOM = 140, 80, 40, 100  # its margins around the axes
LINE, DOT = 46, 9                            # a line of the legend; the radius of a marker
INK, GRID, PAPER = (50, 50, 50), (225, 225, 225), (255, 255, 255)
COLOURS = [(0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0),
           (86, 180, 233), (0, 0, 0), (120, 80, 60)]  # distinct for colour-blind readers too


def read_log(path):
    """(points, held_out) of a log.jsonl: [(step, loss), ...] of all steps and of evaluations.

    A last line without a newline is left out: the run still writes it, or was killed.
    Raises UserError if another line is damaged.
    """
    points, held_out = [], []
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith("\n"):
                break
            try:
                row = json.loads(line)
                points.append((int(row["step"]), float(row["loss"])))
                if "held_out" in row:
                    held_out.append((int(row["step"]), float(row["held_out"])))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{path} line {number}: not a line of a training log") from None
    return tuple([p for p in part if math.isfinite(p[1])] for part in (points, held_out))


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


def round_ticks(low, high):
    """Three to eight round numbers at equal distances from `low` to `high`."""
    size = 10.0 ** math.floor(math.log10((high - low) / 8))
    size = next(size * m for m in (1, 2, 5, 10) if size * m * 8 >= high - low)
    return [k * size for k in range(math.ceil(low / size), math.floor(high / size) + 1)]


def loss_ticks(low, high):
    """The numbers 1, 2, 5 of each decade from `low` to `high`; if these are few, `round_ticks`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    ticks = [digit * 10.0 ** k for k in decades for digit in (1, 2, 5)]
    ticks = [tick for tick in ticks if low <= tick <= high]
    return ticks if len(ticks) >= 4 else round_ticks(low, high)


@dataclasses.dataclass
class Axes:
    """Where a panel draws a step and a loss; the loss has a logarithmic scale."""
    x: int        # left end of the axes in the figure, px
    y: int        # their lower end
    first: int    # steps from the left end to the right end
    last: int
    low: float    # losses from the lower end to the upper end
    high: float

    def point(self, step, loss):
        """(x, y) in the figure."""
        right = (step - self.first) / (self.last - self.first)
        up = math.log(max(loss, self.low) / self.low) / math.log(self.high / self.low)
        return (self.x + right * (WIDTH - LEFT - RIGHT), self.y - up * (HEIGHT - TOP - BOTTOM))


def make_axes(x, y, logs):
    """The Axes for all logs of a panel, whose upper left corner is (x, y)."""
    steps, losses = zip(*(point for log, _ in logs for part in log for point in part))
    last = max(*steps, min(steps) + 1)
    low, high = max(min(losses), 1e-6) / 1.05, max(*losses, 1e-6) * 1.05
    return Axes(x + LEFT, y + HEIGHT - BOTTOM, min(steps), last, low, high)


def draw_axes(figure, pen, axes, title):
    """The grid, the numbers and the labels of a panel."""
    small, large = ImageFont.load_default(26), ImageFont.load_default(32)
    left, top = axes.point(axes.first, axes.high)
    right, bottom = axes.point(axes.last, axes.low)
    for tick in loss_ticks(axes.low, axes.high):
        y = axes.point(axes.first, tick)[1]
        pen.line((left, y, right, y), GRID, 2)
        pen.text((left - 14, y), f"{tick:g}", INK, small, anchor="rm")
    for tick in round_ticks(axes.first, axes.last):
        x = axes.point(tick, axes.low)[0]
        pen.line((x, bottom, x, bottom + 10), INK, 2)
        pen.text((x, bottom + 16), f"{tick:g}", INK, small, anchor="mt")
    pen.line((left, top, left, bottom, right, bottom), INK, 3)
    pen.text((left, top - 18), title, INK, large, anchor="ls")
    pen.text(((left + right) / 2, bottom + 54), "step", INK, small, anchor="mt")
    label = Image.new("RGB", (240, 36), PAPER)
    ImageDraw.Draw(label).text((120, 18), "loss (log scale)", INK, small, anchor="mm")
    middle = round((top + bottom) / 2)
    figure.paste(label.rotate(90, expand=True), (round(left) - LEFT + 14, middle - 120))


def pale(colour):
    """`colour` mixed with two parts of white, for the losses of single steps."""
    return tuple((c + 2 * 255) // 3 for c in colour)


def draw_logs(pen, axes, logs):
    """All runs in a panel, [(log, colour), ...]; pale lines first, so that they hide nothing."""
    for (points, _), colour in logs:
        pen.line([axes.point(*p) for p in points], pale(colour), 2)
    for (points, held_out), colour in logs:
        steps, losses = zip(*points)
        pen.line([axes.point(*p) for p in zip(steps, smooth(losses))], colour, 5, joint="curve")
        for point in held_out:
            pen.circle(axes.point(*point), DOT, PAPER, colour, 4)


def draw_legend(pen, names):
    """One line that explains the marks, then one with the name and the colour of each run."""
    font, y = ImageFont.load_default(26), LINE
    for i, text in enumerate(("each step", "smoothed", "held-out")):
        x = LEFT + 300 * i
        if text == "held-out":
            pen.circle((x + 25, y), DOT, PAPER, INK, 4)
        else:
            pen.line((x, y, x + 50, y), *((pale(INK), 2) if text == "each step" else (INK, 5)))
        pen.text((x + 64, y), text, INK, font, anchor="lm")
    for i, name in enumerate(names):
        y += LINE
        pen.line((LEFT, y, LEFT + 50, y), COLOURS[i % len(COLOURS)], 5)
        pen.text((LEFT + 64, y), name, INK, font, anchor="lm")


def plot(runs, path):
    """Draw `runs`, as `read_runs` returns them, into a PNG: a panel per stage, a curve per run."""
    stages = list(dict.fromkeys(stage for run in runs.values() for stage in run))
    columns, legend = min(2, len(stages)), LINE * (len(runs) + 2)
    size = columns * WIDTH, legend + math.ceil(len(stages) / columns) * HEIGHT
    figure = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(figure)
    draw_legend(pen, list(runs))
    for i, stage in enumerate(stages):
        logs = [(run[stage], colour) for run, colour in zip(runs.values(), itertools.cycle(COLOURS))
                if stage in run]
        axes = make_axes(i % columns * WIDTH, legend + i // columns * HEIGHT, logs)
        draw_axes(figure, pen, axes, stage)
        draw_logs(pen, axes, logs)
    figure.resize((size[0] // 2, size[1] // 2), Image.Resampling.LANCZOS).save(path, "PNG")
