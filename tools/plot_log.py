"""Draw the loss curves of finished or running training: `python -m tools.plot_log DIR...`

It also prints the losses at a few steps. The drawing itself is in training/curves.py.
"""
import sys
from dataclasses import dataclass

from cli import main, parse, UserError
from training.curves import plot, read_runs


@dataclass
class Options:
    """plot_log DIR... [--out FILE]: draw and print the loss of each stage, or compare runs."""
    out: str = "curves.png"  # the picture to write, a PNG


def losses_at(runs, steps=(1, 10, 100)):
    """Losses at some steps, at the last step, and the last validation loss: a Markdown table with a
    row for each stage. A cell has a number for each run, "-" where there is none.

    runs  as `read_runs` returns them
    """
    heads = [f"loss of {', '.join(runs)}", *(f"step {n}" for n in steps), "last", "validation"]
    lines = [heads, ["---"] * len(heads)]
    for stage in dict.fromkeys(stage for run in runs.values() for stage in run):
        logs = [run.get(stage, ((), ())) for run in runs.values()]
        found = [[dict(points).get(n) for points, _ in logs] for n in steps]
        found += [[part[-1][1] if part else None for part in parts] for parts in zip(*logs)]
        lines.append([stage or ".", *(", ".join("-" if x is None else f"{x:.3f}" for x in losses)
                                      for losses in found)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def run():
    words = sys.argv[1:]
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    if not count and not {"-h", "--help"} & {*words}:
        raise UserError("expected the folders of one or more runs, then options: "
                        "tools.plot_log DIR... [--out FILE]")
    options = Options(**parse(Options, words[count:]))
    runs = read_runs(words[:count])
    plot(runs, options.out)
    print(f"{losses_at(runs)}\n\nwrote {options.out}")


if __name__ == "__main__":
    main(run)
