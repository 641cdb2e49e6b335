"""How cost grows: `python -m experiments.growth` draws time and memory of a training step.

One quantity grows at a time: positions of a row, turns of a row (of 516 positions), rows of a
batch, width E of the hypernetwork's embedding, rank R of the experts. The model is a Llama of
256 x 4 with experts in its upper half, trained in fp32 with AdamW on a CPU. An exponent p says that
the cost grows as x^p; it is fitted to the upper half of the points. Memory is what the second step
needs at its peak, measured in a process of its own. The last line of standard output is JSON.
"""
# cli before torch: from then on, Ctrl-C ends the slow imports with one line
from cli import check_numbers, main, parse

import json
import os
import statistics
from dataclasses import asdict, dataclass, replace

import matplotlib
import numpy as np
import torch

from data import collate
from experiments.speed.clock import alternate, in_own_process, peak_of
from experiments.speed.models import steps
from experiments.speed.shapes import conversation
from model import LlamaConfig, VisionConfig, VLM, VLMConfig
from train import freeze, TRAINS

VISION = VisionConfig(28, 14, 32, 2, 2, 64)  # 4 image tokens: next to nothing beside the Llama
LLAMA = LlamaConfig(256, 4, 4, 4, 688, 1000, context=4096)


@dataclass(frozen=True)
class Point:
    """The sizes of a training step."""
    positions: int = 256
    turns: int = 1
    rows: int = 4
    embed: int = 64
    rank: int = 16


AXES = {  # quantity: (its values, the other sizes)
    "positions": ((64, 128, 256, 512, 1024, 2048, 4096), Point(rows=1)),
    "turns": ((1, 2, 4, 8, 16, 32), Point(positions=512 + VISION.tokens)),
    "rows": ((1, 2, 4, 8, 16, 32), Point()),
    "embed": ((8, 16, 32, 64, 128, 256, 512), Point()),
    "rank": ((2, 4, 8, 16, 32, 64, 128), Point())}


@dataclass
class Options:
    """Measure how time and memory of a training step grow; draw them."""
    out: str = os.path.join("out", "growth.png")  # the picture, a PNG
    rounds: int = 5  # how often each step is timed; one round more comes before
    most: int | None = None  # leave out points whose quantity is larger

    def __post_init__(self):
        check_numbers(self, {})


def prepare(point):
    """A function that does one training step."""
    torch.manual_seed(0)
    model = VLM(VLMConfig(VISION, LLAMA, expert_embed=point.embed, expert_rank=point.rank))
    freeze(model, TRAINS[2, "full"])
    own = (point.positions - VISION.tokens) // point.turns
    samples = [conversation(model.cfg, np.random.default_rng(row), turns=point.turns,
                            asked=own // 2, answered=own - own // 2) for row in range(point.rows)]
    batch = collate(samples, list(torch.randn(point.rows, 3, 28, 28)))
    return steps(lambda: model.loss(batch) / batch.trained, model)


def peak_bytes(point):
    """Bytes at the peak of two steps, in a process that has done the smallest step before."""
    prepare(replace(point, positions=32, turns=1, rows=1))()

    def twice():
        run = prepare(point)
        return lambda: (run(), run())

    return peak_of(twice, "cpu")


def exponent(x, y):
    """p of y ~ x^p, fitted to the upper half of the points."""
    upper = slice(len(x) // 2, None)
    if len(x[upper]) < 2:
        return None
    return float(np.polyfit(np.log(x[upper]), np.log(y[upper]), 1)[0])


def measure(name, o):
    """{"x", "seconds", "bytes", "time_exponent", "memory_exponent"} of one quantity."""
    values, base = AXES[name]
    points = {x: replace(base, **{name: x}) for x in values if not o.most or x <= o.most}
    spent = alternate({x: prepare(point) for x, point in points.items()}, o.rounds)
    found = {"x": list(points), "seconds": [statistics.median(times) for times in spent.values()],
             "bytes": [in_own_process(peak_bytes, point) for point in points.values()]}
    found |= {"time_exponent": exponent(found["x"], found["seconds"]),
              "memory_exponent": exponent(found["x"], found["bytes"])}
    for x, seconds, size in zip(found["x"], found["seconds"], found["bytes"]):
        print(f"{name} {x:>5}: {1e3 * seconds:8.1f} ms  {size / 2**20:8.1f} MiB", flush=True)
    return found


def draw(found, path):
    """Time above memory, a column for each quantity, on logarithmic axes."""
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(found), figsize=(12, 4.6), layout="constrained",
                                   sharey="row")
    for column, (name, values) in zip(axes.T, found.items()):
        for axis, y, p in zip(column, (np.array(values["seconds"]) * 1e3,
                                       np.array(values["bytes"]) / 2**20),
                              (values["time_exponent"], values["memory_exponent"])):
            axis.loglog(values["x"], y, "o-", base=2)
            axis.set_title(name if p is None else f"~ {name}$^{{{p:.2f}}}$")
            axis.set_xticks(values["x"], values["x"], fontsize=8)
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("ms a step")
    axes[1, 0].set_ylabel("MiB at the peak")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, dpi=100, format="png")


def run():
    o = Options(**parse(Options))
    found = {name: measure(name, o) for name in AXES}
    draw(found, o.out)
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__,
                      "base": {name: asdict(base) for name, (_, base) in AXES.items()},
                      "found": found}))


if __name__ == "__main__":
    main(run)
