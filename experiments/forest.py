"""All tables of ablate.py in one picture: `python -m experiments.forest --out assets/tables.png`.

A line for each row: how much better it answers than its table's reference, with both intervals of
95 %. It reads the table_N.json that ablate.py wrote.
"""
import os
from dataclasses import dataclass

from matplotlib.figure import Figure

from cli import main, parse, UserError
from experiments.tables import TABLES
from formats.json_files import read_json

# Tables whose differences share an axis: small ones, large ones
SMALL = ("2", "3", "5", "6", "fig3", "fig4", "experts", "long")
PANELS = SMALL, tuple(name for name in TABLES if name not in SMALL)


@dataclass
class Options:
    """Draw the differences of all finished tables of ablate.py with their intervals."""
    tables: str = "out/ablate"           # folder of the tables, the --out of ablate.py
    out: str | None = None               # the picture, a PNG (default: TABLES/tables.png)


def read_tables(folder, names):
    """{name: what ablate.py wrote into table_NAME.json} of those that are in the folder."""
    paths = {name: os.path.join(folder, f"table_{name}.json") for name in names}
    return {name: read_json(path) for name, path in paths.items() if os.path.exists(path)}


def lines_of(tables):
    """[(label, difference, half over questions, half over seeds or None)], top to bottom; one of
    (title of a table, None, None, None) before its rows."""
    lines = []
    for name, table in tables.items():
        options = table["options"]
        gains = [(row["name"], *next(iter(row["difference"].values()))) for row in table["rows"]]
        reference = next(label for label, *gain in gains if not any(gain))
        steps = sorted({options["steps"] * row.times for row in TABLES[name].rows})
        title = (f"{TABLES[name].title}, against {reference} ({options['seeds']} seeds, "
                 f"{options['align']} and {' or '.join(map(str, steps))} steps)")
        lines += [(title, None, None, None), *(line for line in gains if any(line[1:]))]
    return lines


def draw_panel(axes, lines):
    """A forest plot of `lines_of`: thick is the interval over questions, thin that over seeds. A
    point is filled if the difference is larger than the root of the sum of their squares."""
    for y, (label, gain, over_questions, over_seeds) in enumerate(lines):
        if gain is None:
            axes.text(0, y, label, transform=axes.get_yaxis_transform(), va="center", weight="bold",
                      fontsize=8)
            continue
        axes.plot([gain - over_questions, gain + over_questions], [y, y], "C0", lw=5, alpha=0.5)
        if over_seeds is not None:
            axes.plot([gain - over_seeds, gain + over_seeds], [y, y], "k", lw=1.2)
        enough = over_seeds is not None and gain ** 2 > over_questions ** 2 + over_seeds ** 2
        axes.plot(gain, y, "ko", markersize=5, markerfacecolor="k" if enough else "w")
    axes.axvline(0, color="gray", lw=0.8)
    axes.set_yticks(range(len(lines)), [line[0] if line[1] is not None else "" for line in lines],
                    fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel("points of exact match more than the reference; thick: 95 % over questions, "
                    "thin: over seeds; filled: enough for a claim", fontsize=8)


def draw(folder):
    """A matplotlib figure of all tables in the folder. Raises UserError if there is none."""
    panels = [lines_of(tables) for names in PANELS if (tables := read_tables(folder, names))]
    if not panels:
        raise UserError(f"--tables {folder}: no table_N.json of experiments.ablate in it")
    heights = [len(lines) + 2 for lines in panels]
    figure = Figure((10, 0.22 * sum(heights)), layout="constrained")
    for axes, lines in zip(figure.subplots(len(panels), squeeze=False,
                                           height_ratios=heights)[:, 0], panels):
        draw_panel(axes, lines)
    return figure


def run():
    o = Options(**parse(Options))
    path = o.out or os.path.join(o.tables, "tables.png")
    draw(o.tables).savefig(path, dpi=110, format="png")
    print(path)


if __name__ == "__main__":
    main(run)
