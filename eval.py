"""TODO"""
import os
import time
from dataclasses import dataclass
from typing import Literal

from benchmarks.toy import score
from cli import main, parse


@dataclass
class Options:
    """Score a checkpoint."""
    model: str = "out/toy/stage2"     # checkpoint
    task: Literal["toy"] = "toy"      # what to score it on
    data: str | None = None           # folder of the task's data; none: `world` beside the checkpoint
    out: str | None = None            # folder for scores.json and gallery.png; none: the one that holds the checkpoint
TASKS = {"toy": score}


def run():
    o = Options(**parse(Options))
    parent = os.path.dirname(os.path.abspath(o.model))
    TASKS[o.task](o.model, o.data or os.path.join(parent, "world"), o.out or parent, time.perf_counter())


if __name__ == "__main__":
    main(run)
