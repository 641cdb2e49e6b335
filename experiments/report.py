"""The results of a table's rows: scores, differences and costs, as Markdown and as a plot.

Read ablate.py first.
"""
import os
import statistics
import time
from collections import Counter, defaultdict, deque

import numpy as np
import torch
from matplotlib.figure import Figure

from cli import UserError
from data import collate, encode_prompt
from experiments.processes import read_log
from experiments.tables import row_folder, scores_file, splits_of, TABLES
from formats.json_files import read_json
from model import stream
from train import freeze, TRAINS
from training.costs import forward_flops, generated_weights, token_flops
from weights import load

# Student's t for so many seeds, two-sided 95 %
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


# ---- Costs


def milliseconds(model, batch, tokens):
    """The time to generate so many tokens."""
    began = time.perf_counter()
    deque(stream(model, batch, tokens, -1), maxlen=0)
    return 1000 * (time.perf_counter() - began)


@torch.no_grad()
def measure_costs(o, rounds=60, tokens=16):
    """What it costs to answer a question about a picture with each row, list[dict].

        trained, generated           numbers of parameters that stage 2 trains, of generated weights
        prompt_mflops, token_mflops  of the prompt, without CLIP, and of one more token
        prefill_ms, decode_ms        time of the same two, on one thread and in fp32

    Rows take turns and the minimum of `rounds` times counts: other processes only add to a time.
    """
    costs, runs = [], []
    for row in TABLES[o.table].rows:
        checkpoint = load(os.path.join(row_folder(o, row, 0), "stage2"), torch.float32)
        model, cfg = checkpoint.model.eval(), checkpoint.model.cfg
        freeze(model, TRAINS[2, row.options.get("tune", "full")])
        question = "What colour is the thing at the top left?"
        layout = checkpoint.prompt_format()
        sample = encode_prompt([], question, checkpoint.tokenizer, layout, "picture")
        batch = collate([sample], [torch.zeros(cfg.vision.tokens, cfg.vision.width)], None)
        length = len(sample.ids)
        flops = forward_flops(cfg, length - cfg.image_tokens, at=1)
        costs.append({
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "generated": generated_weights(cfg), "tokens": length,
            "prompt_mflops": (sum(flops.values()) - flops["vision"]) / 1e6,
            "token_mflops": token_flops(cfg, length + 1) / 1e6})
        runs.append([(model, batch, n) for n in (1, tokens)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = np.array([[[milliseconds(*run) for run in pair] for pair in runs]
                      for _ in range(rounds)])
    torch.set_num_threads(threads)
    for cost, (first, whole) in zip(costs, times.min(0)):
        cost |= {"prefill_ms": first, "decode_ms": (whole - first) / (tokens - 1)}
    return costs


def training_costs(folders):
    """Stage 2: mean seconds of a step, of the fastest seed, and peak memory in GB. Of a resumed run
    the steps since then count."""
    logs = [read_log(os.path.join(folder, "stage2")) for folder in folders]
    return {"step_s": min(log[-2]["eta_s"] for log in logs),  # one step was left then
            "peak_gb": max(row["peak_gb"] for log in logs for row in log)}


# ---- Scores


def mean_and_spread(values):
    """(mean, standard deviation or None if there is only one value)."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def half_over_seeds(values):
    """Half of Student's 95 % interval of the mean of one value for each seed; None for one seed."""
    n = len(values)
    return T_95.get(n, 2.3) * np.std(values, ddof=1) / n ** 0.5 if n > 1 else None


def half_width(terms):
    """Half of the 95 % interval of a sum of independent terms."""
    terms = np.array([*terms])
    return 1.96 * len(terms) ** 0.5 * terms.std(ddof=1)


def hits(runs, split):
    """float[seeds, questions]: 1 where the answer was right."""
    return np.array([[hit for _, _, hit in run["splits"][split]["right"]] for run in runs], float)


def difference(scores, others, split):
    """How much better `scores` are than `others`, lists by seed; in points of the families' mean.

    returns  (difference, half of its 95 % interval over questions, the same over seeds or None)

    Over questions: both answered the same ones, so the differences of pictures count, averaged over
    seeds. Pictures are independent, questions about one picture are not. The number of questions of
    a family counts as given, so the interval of a large difference is a little too wide. Over
    seeds: Student's t of their differences; a seed has the same order of data in both.
    """
    asked = [q[:2] for q in scores[0]["splits"][split]["right"]]
    if any([q[:2] for q in run["splits"][split]["right"]] != asked for run in scores + others):
        raise UserError(f"{split}: rows were asked different questions, so they cannot be "
                        "compared: name another --out")
    families = Counter(family for family, _ in asked)
    weight = np.array([100 / len(families) / families[family] for family, _ in asked])
    gain = (hits(scores, split) - hits(others, split)) * weight  # (seeds, questions)
    by_picture = defaultdict(float)
    for (_, image), value in zip(asked, gain.mean(0)):
        by_picture[image] += value
    by_seed = gain.sum(1)
    return by_seed.mean(), half_width(by_picture.values()), half_over_seeds(by_seed)


def table_rows(o):
    """The options, costs and scores of each row of the table, list[dict]."""
    table = TABLES[o.table]
    folders = [[row_folder(o, row, seed) for seed in range(o.seeds)] for row in table.rows]
    runs = [[read_json(scores_file(o, f)) for f in seeds] for seeds in folders]
    rows = []
    for row, seeds, of_row, cost in zip(table.rows, runs, folders, measure_costs(o)):
        splits = {s: [run["splits"][s] for run in seeds] for s in splits_of(o)}
        first, *_ = splits.values()
        rows.append({
            "name": row.name, "options": row.options, "paper": row.paper,
            "costs": cost | training_costs(of_row),
            "families": {f: mean_and_spread([100 * run["families"][f] for run in first])
                         for f in first[0]["families"]},
            "means": {s: mean_and_spread([100 * run["mean"] for run in splits[s]]) for s in splits},
            "difference": {s: difference(seeds, runs[table.reference], s) for s in splits}})
    return rows


# ---- Markdown

COSTS = [("trained", "trained", ","), ("generated", "generated", ","),  # name, heading, format
         ("prompt_mflops", "MFLOPs a prompt", ".0f"), ("token_mflops", "a further token", ".2f"),
         ("step_s", "training step, s", ".2f"), ("peak_gb", "peak, GB", ".2f"),
         ("prefill_ms", "prompt, ms", ".1f"), ("decode_ms", "a further token, ms", ".2f")]


def markdown_table(head, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def with_spread(value):
    mean, spread = value
    return f"{mean:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")


def markdown(table, rows):
    """The scores, those of each family of questions if there are some, and the costs of a table's
    rows, as Markdown tables."""
    first, *others = rows[0]["means"]
    families, reference = [*rows[0]["families"]], rows[table.reference]
    over_seeds = ", over seeds" if reference["difference"][first][2] is not None else ""
    head = ["row", *table.columns, f"**{first}**", *others,
            f"against {reference['name']} (95 % over questions{over_seeds})"]
    if table.columns:
        head[1] = f"paper: {head[1]}"
    scores = [head]
    for row in rows:
        gain, *halves = row["difference"][first]
        intervals = ", ".join(f"± {half:.1f}" for half in halves if half is not None)
        scores.append([row["name"], *map(str, row["paper"] or [""] * len(table.columns)),
                       f"**{with_spread(row['means'][first])}**",
                       *(with_spread(row["means"][split]) for split in others),
                       "" if row is reference else f"{gain:+.1f} ({intervals})"])
    of_families = [[f"{first}, row", *families]] + [
        [row["name"], *(with_spread(row["families"][f]) for f in families)] for row in rows]
    costs = [["row", *(title for _, title, _ in COSTS)]] + [
        [row["name"], *(format(row["costs"][k], style) for k, _, style in COSTS)] for row in rows]
    tables = [scores, *[of_families] * (len(families) > 1), costs]
    return "\n\n".join(markdown_table(head, rest) for head, *rest in tables)


# ---- Plots


def spreads(values):
    """(means, error bars or None) of some (mean, spread)."""
    means, spread = zip(*values)
    return means, None if None in spread else spread


def plot_curves(axes, table, rows, split):
    """The mean against the number in a row's name; E=4 and R=4 belong to two curves."""
    curves = defaultdict(list)
    for row in rows:
        letter, _, value = row["name"].rpartition("=")
        curves[letter].append((float(value), row["means"][split]))
    for letter, points in curves.items():
        x, values = zip(*sorted(points))
        axes.errorbar(x, *spreads(values), marker="o", capsize=3, label=letter or None)
    axes.set_xlabel(table.axis)
    if len(curves) > 1:
        axes.set_xscale("log", base=2)
        axes.legend()


def plot_bars(axes, rows, split):
    """A group of bars for each family of questions, and one for their mean."""
    width, groups = 0.8 / len(rows), [*rows[0]["families"], "mean"]
    for i, row in enumerate(rows):
        means, errors = spreads([*row["families"].values(), row["means"][split]])
        x = np.arange(len(groups)) + (i - (len(rows) - 1) / 2) * width
        axes.bar(x, means, width, yerr=errors, capsize=2, label=row["name"])
    axes.set_xticks(range(len(groups)), groups)
    axes.legend(fontsize=8)


def draw(table, rows):
    """A matplotlib figure of the scores, with the spread over seeds."""
    figure = Figure((11, 4), layout="tight")
    axes, split = figure.add_subplot(), [*rows[0]["means"]][0]
    if table.axis:
        plot_curves(axes, table, rows, split)
    else:
        plot_bars(axes, rows, split)
    axes.set_ylabel(f"exact match on {split}, %")
    axes.set_title(table.title)
    return figure
