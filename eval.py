"""Score a checkpoint on a task: `python eval.py --model out/toy/stage2 --task toy`.

A task is a function in benchmarks/ that scores a checkpoint, writes the result and prints it. Next:
benchmarks/toy.py.
"""
import os
import time
from dataclasses import dataclass
from typing import Literal

import benchmarks.toy
from cli import main, parse


TASKS = {"toy": benchmarks.toy.score}  # function of (checkpoint, folder of data, out, start time)


@dataclass
class Options:
    """Score a checkpoint."""
    model: str = "out/toy/stage2"     # folder of the checkpoint
    task: Literal["toy"] = "toy"      # benchmark to run
    data: str | None = None           # folder of the task's data; default: world/ beside the model
    out: str | None = None            # folder for the results; default: the model's parent


def run():
    o = Options(**parse(Options))
    parent = os.path.dirname(os.path.abspath(o.model))
    data = o.data or os.path.join(parent, "world")
    TASKS[o.task](o.model, data, o.out or parent, time.perf_counter())


if __name__ == "__main__":
    main(run)
