"""Draw the loss curves of finished or running training: `python -m tools.plot_log DIR...`

The drawing itself is in training/curves.py.
"""
import sys
from dataclasses import dataclass

from cli import main, parse, UserError
from training.curves import plot, read_runs


@dataclass
class Options:
    """plot_log DIR... [--out FILE]: draw the loss of each stage in a folder, or compare runs."""
    out: str = "curves.png"  # the picture to write


def run():
    words = sys.argv[1:]
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    options = Options(**parse(Options, words[count:]))
    if not count:
        raise UserError("expected the folders of one or more runs: tools.plot_log DIR...")
    plot(read_runs(words[:count]), options.out)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main(run)
