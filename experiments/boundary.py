"""When do generated weights pay? `python -m experiments.boundary --llm out/toy/stage0/llm`

The task: random maps (permutations) of 16 symbols, each with a name. A row is `<s> name x`, and the
answer is what the map of that name makes of x. Symbols and names are random tokens of the toy's
Llama. All pairs of a map and a symbol are trained, for a fixed number of steps, and all are scored:
how well does an instruction *switch* an adapter? A random map leaves nothing to generalise to, so
there is no held-out score.

The Llama is frozen; only what is added to its upper blocks trains. The guidance is the name, the
only token of the instruction, so how tokens are pooled plays no part here.

    visible   attention reads the name, too
    hidden    no token attends to the name, so only guided adapters can find out which map is meant.
              The others can at best give the answer that is most frequent for x.

Compared are adapters of the same rank, so a further token costs the same; of the same number of
parameters; and of the same operations on a row of 3 tokens, one generation included. The rank of
the last is larger here than it would be for a long prompt. With the same seed, all rows get the
same maps and batches.

Two more forms read the guidance of a generated adapter, at three points of the grid. "told e" adds
a vector made from e to what enters the SwiGLU: it generates no weights, and so says what guidance
is worth by itself. "gates" is the smallest generation, one factor from e for each hidden unit
(GatedExpert in baselines.py).

At each point each row learns at the rate that gives it the lowest loss on seeds that are not
scored: all rates on the first of them, then the best two on two more.

Finished runs are lines of OUT/runs.jsonl; the same command continues. It ends with tables,
OUT/boundary.json and OUT/boundary.png. The whole grid takes about two hours on two cores for five
seeds.
"""
# cli first: it handles Ctrl-C during the slow imports
from cli import check_numbers, main, MOST, parse, UserError

import concurrent.futures
import dataclasses
import json
import multiprocessing
import os
import signal
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

from baselines import BaselineConfig, BaselineLlama
from experiments.processes import sources_digest
from experiments.report import (half_over_seeds, markdown_table, mean_and_spread, spreads,
                                with_spread)
from formats.configs import llama_config
from formats.folders import has_config
from formats.json_files import read_json_lines
from formats.name_rules import llama_rules
from formats.weight_files import fingerprint
from hypernet import Expert, HyperNetwork, rms
from model import Batch, Llama, VisionConfig
from toy.files import write_atomically
from training.costs import added_flops
from weights import fill, make_config, tokenizer_of

SYMBOLS = 16  # in a map
FIRST = 259   # ids of a Llama's tokenizer before this one are controls and single bytes
NAME, LENGTH = 1, 3  # position of the name in a row; positions of a row
BATCH = 64
RATES = (3e-3, 6e-3, 12e-3, 24e-3, 48e-3)
LORA_RATES = (3e-4, 6e-4, 12e-4, 24e-4, 48e-4)  # with more, its loss jumps
TUNING, SCORED = (11, 12, 13), 14  # seeds on which rates are chosen; the first that is scored

# Names of the rows
GENERATED, STATIC = "generated", "static, same R"
PARAMETERS, OPERATIONS = "static, same parameters", "static, same operations on a row"
LORA = "LoRA, same parameters"
UNIT = "unit e"  # a change of the paper's form
TOLD, TOLD_MORE = "told e, same R", "told e, same parameters"
GATES, GATES_MORE = "gates, same R", "gates, same parameters"
FREQUENT = "most frequent answer for x"  # the best that an adapter can do without the name
CONTROLS = (TOLD, TOLD_MORE, GATES, GATES_MORE)
GUIDED = (GENERATED, UNIT, *CONTROLS)  # these are also trained with the name hidden
ROWS = (*GUIDED, STATIC, PARAMETERS, OPERATIONS, LORA)
DRAWN = (GENERATED, GATES_MORE, STATIC, PARAMETERS, OPERATIONS, LORA)  # in the plot


@dataclass
class Options:
    """Where do generated adapters beat static ones, on maps that an instruction names?"""
    llm: str = os.path.join("out", "toy", "stage0", "llm")  # a Llama in Hugging Face's layout
    out: str = os.path.join("out", "boundary")  # folder of the runs, the tables and the plot
    seeds: int = 5     # new maps, weights and order; three more choose the rates
    steps: int = 300   # of each run, with batches of 64 rows
    jobs: int = os.cpu_count() or 1  # runs at a time, each on one thread

    def __post_init__(self):
        check_numbers(self, {"steps": (2, MOST, "at least 2")})


@dataclass(frozen=True)
class Run:
    """A point of the grid, a row there, and how it is trained."""
    row: str = GENERATED
    maps: int = 32
    rank: int = 16                         # R of the generated adapters
    embed: int = 16                        # E
    sites: Literal["half", "last"] = "half"  # the upper half of the blocks, or the last one
    hidden: bool = False
    steps: int = 300
    seed: int = 0
    rate: float = 0.0


AXES = {"maps": (2, 8, 16, 32, 64), "rank": (2, 4, 8, 16, 32), "embed": (4, 16, 64),
        "sites": ("half", "last")}  # one quantity changes at a time


# ---- Other forms than the paper's


class UnitNetwork(HyperNetwork):
    """Scales e to a root mean square of 1 first."""

    def forward(self, e):
        return super().forward(rms(e))


class ToldExpert(Expert):
    """A static adapter that reads e beside x: W_u SwiGLU(W_d x + P e). For rows of one turn: U = 1.

    Adam moves each weight by about the rate, whatever its size. e is scaled up, and P down, by
    `gain`, so that a step moves P e as far as W_d x, which has more inputs.
    """
    def __init__(self, guidance_dim, inputs, outputs, embed, rank):
        super().__init__(guidance_dim, inputs, outputs, embed, rank)
        self.gain, self.project = inputs / embed, nn.Linear(embed, 2 * rank)
        self.project.weight.data /= self.gain

    def weights(self, guidance, hypernet):
        return self.project(self.gain * F.silu(self.encoder(guidance))),        # (B, 1, 2R)

    def forward(self, x, weights, use_id=None):
        gate, value = (x @ self.down.mT + weights[0]).chunk(2, dim=-1)          # (B, T, R)
        return (F.silu(gate) * value) @ self.up


FORMS = {UNIT: (Expert, UnitNetwork), TOLD: (ToldExpert, nn.Identity),
         TOLD_MORE: (ToldExpert, nn.Identity)}


# ---- The Llama with adapters, and what they cost


def config(llm, run, rank, source="hyper"):
    """The VLMConfig of a run's adapters in the upper blocks, of this rank and source."""
    return make_config(VisionConfig(), llm, weight_source=source, visual_expert="none",
                       guidance_after=llm.depth - 1 if run.sites == "last" else None,
                       expert_embed=run.embed, expert_rank=rank)


def plain(llm):
    """A Llama without adapters."""
    return Llama(make_config(VisionConfig(), llm, visual_expert="none", language_expert="none"))


def build(cfg, row):
    """A new Llama with adapters; of another form than the paper's if `row` is one of FORMS."""
    llama = (BaselineLlama if isinstance(cfg, BaselineConfig) else Llama)(cfg)
    if row in FORMS:
        (expert, network), D = FORMS[row], cfg.llm.width
        for n in cfg.expert_blocks():
            llama.layers[n].expert = expert(D, D, D, cfg.expert_embed, cfg.expert_rank)
        llama.hypernet = network(D, D, cfg.expert_embed, cfg.expert_rank)
    return llama


def parameters(cfg, row):
    """Number of parameters that the adapters add."""
    with torch.device("meta"):
        counts = [sum(p.numel() for p in model.parameters())
                  for model in (build(cfg, row), plain(cfg.llm))]
    return counts[0] - counts[1]


def operations(cfg, row, tokens=LENGTH, generations=1):
    """FLOPs of the adapters on `tokens` tokens, plus those of generating the weights `generations`
    times.
    """
    if row not in (TOLD, TOLD_MORE):
        return added_flops(cfg, tokens, generations)
    D, E, R = cfg.llm.width, cfg.expert_embed, cfg.expert_rank
    made = E * (D + 2 * R)
    return 2 * len(cfg.expert_blocks()) * (tokens * 3 * D * R + generations * made)


def sized(llm, run):
    """The `config` of a run with the rank that its row asks for: costs are linear in the rank."""
    sources = dict.fromkeys(GUIDED, "hyper") | {LORA: "lora", GATES: "gates", GATES_MORE: "gates"}
    source = sources.get(run.row, "static")
    rank, measure = run.rank, operations if run.row == OPERATIONS else parameters
    if run.row in (PARAMETERS, OPERATIONS, LORA, TOLD_MORE, GATES_MORE):
        wanted = measure(config(llm, run, rank), GENERATED)
        one, two = (measure(config(llm, run, r, source), run.row) for r in (1, 2))
        rank = max(1, 1 + round((wanted - one) / (two - one)))
    return config(llm, run, rank, source)


def batch_of(rows):
    """A Batch of rows `<s> name x`; their guidance is the name. The ids are not read."""
    use_id = torch.zeros(rows, LENGTH, dtype=torch.int64)
    pool_id = use_id - (torch.arange(LENGTH) != NAME).long()
    return Batch(use_id, None, pool_id, use_id)


# ---- A run


def make_rows(run, vocab):
    """(int64[rows, 3] ids `<s> name x`, int64[rows] answers) of all maps; bos is 1.

    The first maps of a seed are the same for each number of maps.
    """
    rng = np.random.default_rng(run.seed)
    words = FIRST + rng.permutation(vocab - FIRST)
    symbols, names = words[:SYMBOLS], words[SYMBOLS:SYMBOLS + run.maps]
    if len(names) < run.maps:
        raise UserError(f"{run.maps} maps need {FIRST + SYMBOLS + run.maps} tokens, the tokenizer "
                        f"has {vocab}")
    ids = [(1, name, x) for name in names for x in symbols]
    answers = [rng.permutation(symbols) for _ in names]
    return torch.tensor(np.array(ids)), torch.tensor(np.concatenate(answers))


def frequent(run, vocab):
    """% of answers that are right if each x gets its most frequent answer over the maps."""
    answers = make_rows(run, vocab)[1].view(run.maps, SYMBOLS)
    counts = (answers[:, None] == answers).sum(0)  # (maps, SYMBOLS) of each answer for its x
    return 100 * (counts.amax(0) / run.maps).mean().item()


class Hiding:
    """Used as the cache, only for its mask: the last token does not see the name."""

    def __init__(self, depth):
        mask = torch.full((LENGTH, LENGTH), float("-inf")).triu(1)
        mask[NAME + 1:, NAME] = float("-inf")
        self.mask, self.layers = mask[None, None], [self] * depth

    def advance(self, tokens, lengths):
        return torch.arange(tokens)[None]

    def update(self, k, v):
        return k, v

    def keep(self, weights, use_id):
        pass


class Learner:
    """The Llama of a run on its rows.

    The lower blocks are frozen and there are few rows, so they run once, for all rows.
    """

    def __init__(self, run, folder):
        llm = llama_config(folder)
        with torch.device("meta"):
            frozen = {name for name, _ in plain(llm).named_parameters()}
        torch.manual_seed(run.seed)
        self.llama = build(sized(llm, run), run.row)
        new = {f"llm.{name}" for name, _ in self.llama.named_parameters() if name not in frozen}
        model = nn.ModuleDict({"llm": self.llama})
        fill(model, [(folder, llama_rules(llm.tied))], torch.float32, new)
        for name, p in model.named_parameters():
            p.requires_grad_(name in new)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.cache = Hiding(llm.depth) if run.hidden else None
        self.ids, self.answers = make_rows(run, tokenizer_of(folder, llm).vocab)
        self.states = self.run_lower_blocks()
        self.batches = torch.Generator().manual_seed(run.seed)

    @torch.no_grad()
    def run_lower_blocks(self):
        """What the first upper block reads, float[rows, T, D]; the blocks below are cut off."""
        llama, states = self.llama, []
        upper = llama.layers[llama.guidance_after:]
        hook = upper[0].register_forward_pre_hook(lambda block, inputs: states.append(inputs[0]))
        llama(llama.embed_tokens(self.ids), batch_of(len(self.ids)), self.cache)
        hook.remove()
        llama.layers, llama.guidance_after = upper, 0
        return states[0]

    def draw(self):
        """int64[64], the rows of the next batch."""
        return torch.randint(len(self.ids), (BATCH,), generator=self.batches)

    def logits(self, rows):
        """float[len(rows), V] of the answers to these rows."""
        x = self.llama(self.states[rows], batch_of(len(rows)), self.cache)
        return self.llama.head(x[:, -1])

    def fit(self, steps, rate):
        """AdamW; the rate falls to zero linearly."""
        adam = torch.optim.AdamW(self.trained, rate, weight_decay=0.0, fused=True)
        for step in range(steps):
            adam.param_groups[0]["lr"] = rate * (1 - step / steps)
            rows = self.draw()
            F.cross_entropy(self.logits(rows), self.answers[rows]).backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            adam.step()
            adam.zero_grad()

    @torch.no_grad()
    def score(self):
        """Over all rows: {"accuracy": % of answers that are the likeliest of all tokens, "loss"}"""
        logits = self.logits(torch.arange(len(self.ids)))
        right = (logits.argmax(-1) == self.answers).float().mean().item()
        return {"accuracy": 100 * right, "loss": F.cross_entropy(logits, self.answers).item()}


def train(run, folder):
    """The scores and costs of a run, on one thread."""
    torch.set_num_threads(1)
    learner = Learner(run, folder)
    learner.fit(run.steps, run.rate)
    cfg = sized(llama_config(folder), run)
    return learner.score() | {
        "parameters": parameters(cfg, run.row), "operations": operations(cfg, run.row),
        "further token": operations(cfg, run.row, 1, 0), "own rank": cfg.expert_rank}


# ---- All runs


def results(o, runs):
    """Yield (run, what `train` gives) in the order in which they end."""
    if o.jobs == 1:
        yield from ((run, train(run, o.llm)) for run in runs)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
            o.jobs, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN)) as pool:
        futures = {pool.submit(train, run, o.llm): run for run in runs}
        try:
            for future in concurrent.futures.as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


CODE = ("experiments/boundary.py", "hypernet.py", "baselines.py", "model.py")


class Runs:
    """{Run: what `train` gives} of the finished runs in OUT/runs.jsonl, of this Llama and code."""

    def __init__(self, o):
        self.o, self.path = o, os.path.join(o.out, "runs.jsonl")
        self.key = {"llm": fingerprint(o.llm), "code": sources_digest(*CODE)}
        lines = read_json_lines(self.path) if os.path.exists(self.path) else []
        self.done = {Run(**line["run"]): line["found"] for _, line in lines
                     if line.items() >= self.key.items()}

    def finish(self, runs):
        """Train those that are not finished."""
        todo = [run for run in dict.fromkeys(runs) if run not in self.done]
        began = time.perf_counter()
        with open(self.path, "a") as file:
            for n, (run, found) in enumerate(results(self.o, todo), 1):
                self.done[run] = found
                line = self.key | {"run": dataclasses.asdict(run), "found": found}
                print(json.dumps(line), file=file, flush=True)
                print(f"{n}/{len(todo)}  {found['accuracy']:5.1f}  {run}  "
                      f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)

    def loss(self, c, rate, seeds):
        return statistics.mean(self.done[replace(c, rate=rate, seed=s)]["loss"] for s in seeds)

    def score(self, cells):
        """{cell: {"rate", "accuracy": [one for each scored seed], ...}} of Runs without seed and
        rate.
        """
        first, *more = TUNING
        self.finish([replace(c, rate=rate, seed=first) for c in cells for rate in rates_of(c)])
        two = {c: sorted(rates_of(c), key=lambda rate: self.loss(c, rate, [first]))[:2]
               for c in cells}
        self.finish([replace(c, rate=rate, seed=seed) for c in cells for rate in two[c]
                     for seed in more])
        best = {c: min(two[c], key=lambda rate: self.loss(c, rate, TUNING)) for c in cells}
        runs = {c: [replace(c, rate=best[c], seed=SCORED + n) for n in range(self.o.seeds)]
                for c in cells}
        self.finish(sum(runs.values(), []))
        return {c: {"rate": best[c]} | {key: [self.done[run][key] for run in scored]
                                        for key in self.done[scored[0]]}
                for c, scored in runs.items()}


def rates_of(c):
    return LORA_RATES if c.row == LORA else RATES


def grid(o):
    """The points of the grid as Runs of the generated row."""
    base = Run(steps=o.steps)
    return list(dict.fromkeys(replace(base, **{axis: value})
                              for axis, values in AXES.items() for value in values))


def cell(point, row, hidden=False):
    """A row at a point. A static adapter of the same R does not depend on E."""
    return replace(point, row=row, hidden=hidden, embed=Run.embed if row == STATIC else point.embed)


def controlled(point):
    """Whether the controls are trained here: with 16 maps or more at the usual R, E and blocks."""
    return point.maps >= 16 and replace(point, maps=Run.maps) == Run(steps=point.steps)


def cells(points):
    """All rows at all points; hidden: the guided ones."""
    return list(dict.fromkeys(
        cell(p, row, hidden) for p in points for hidden in (False, True)
        for row in (GUIDED if hidden else ROWS) if row not in CONTROLS or controlled(p)))


# ---- Tables and the plot


def difference(found, ours, others):
    """How much more accurate `ours` is, and half of the 95 % interval; paired by seed."""
    if ours not in found or others not in found:
        return ""
    gains = np.subtract(*(found[c]["accuracy"] for c in (ours, others)))
    half = half_over_seeds(gains)
    return f"{gains.mean():+.1f}" + (f" ± {half:.1f}" if half is not None else "")


def accuracy(found, c):
    return with_spread(mean_and_spread(found[c]["accuracy"])) if c in found else ""


def loss(found, c):
    return f"{np.mean(found[c]['loss']):.3f}" if c in found else ""


def costs(found, c):
    if c not in found:
        return ""
    f, edge = found[c], found[c]["rate"] in (rates_of(c)[0], rates_of(c)[-1])
    return (f"{f['parameters'][0]:,}; {f['operations'][0] / 1e6:.3f}; "
            f"{f['further token'][0] / 1e6:.3f}; {f['rate']:g}" + "*" * edge)


def table(points, columns):
    """A Markdown table; columns: {heading: function of a point that gives a text}."""
    rows = [[str(p.maps), str(p.rank), str(p.embed), p.sites, *(text(p) for text in
             columns.values())] for p in points]
    return markdown_table(["maps", "R", "E", "blocks", *columns], rows)


def pooled(found, points, hidden=False):
    """{row: {"accuracy", "loss": means over all points, one for each seed}}, if it has them all."""
    at = {row: [found.get(cell(p, row, hidden)) for p in points] for row in ROWS}
    return {row: {key: np.mean([f[key] for f in of], 0) for key in ("accuracy", "loss")}
            for row, of in at.items() if all(of)}


def pooled_table(found, points):
    """How every row does on average over the points, beside the generated one and beside as many
    static parameters.
    """
    seen, unseen = (pooled(found, points, hidden) for hidden in (False, True))
    head = ["row", "visible", "loss", f"{GENERATED} - row", f"row - {PARAMETERS}", "hidden", "loss",
            f"{GENERATED} - row"]
    return markdown_table(head, [
        [row, accuracy(seen, row), loss(seen, row), difference(seen, GENERATED, row),
         difference(seen, row, PARAMETERS), accuracy(unseen, row), loss(unseen, row),
         difference(unseen, GENERATED, row)] for row in seen])


def tables(found, points, unnamed):
    """{title: Markdown}; unnamed: {number of maps: `frequent`}."""
    def scores(rows, hidden=False):
        return {row: lambda p, row=row: accuracy(found, cell(p, row, hidden)) for row in rows}

    def gains(rows, hidden=False):
        return {f"{GENERATED} - {row}": lambda p, row=row: difference(
            found, cell(p, GENERATED, hidden), cell(p, row, hidden)) for row in rows}

    after = f"after {points[0].steps} steps"
    hard = [p for p in points if p.maps >= 16]  # with fewer nearly all rows reach 100 %
    return {
        f"visible: accuracy {after}, %": table(points, scores(ROWS)),
        f"visible: differences {after}": table(points, gains(ROWS[1:])),
        f"hidden: accuracy {after}, %": table(
            points, scores(GUIDED, True) | {FREQUENT: lambda p: f"{unnamed[p.maps]:.1f}"}),
        f"hidden: differences {after}": table(points, gains(GUIDED[1:], True)),
        "mean over the points with 16 maps or more": pooled_table(found, hard),
        "mean over the points that have all rows": pooled_table(
            found, list(filter(controlled, points))),
        "parameters; MFLOPs a row; a further token; rate (*: the lowest or highest tried)": table(
            points, {row + ", hidden" * hidden: lambda p, row=row, hidden=hidden: costs(
                found, cell(p, row, hidden)) for row in ROWS for hidden in (False, True)})}


def draw(found, points, unnamed):
    """Accuracy against each number of the grid, with the spread over seeds."""
    figure = Figure((10, 4.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    labels = {"maps": "maps", "rank": "rank R", "embed": "width E of the embedding"}
    for ax, (axis, label) in zip(axes, labels.items()):
        line = [replace(Run(steps=points[0].steps), **{axis: value}) for value in AXES[axis]]
        curves = [(row, hidden) for hidden in (False, True) for row in DRAWN]
        for row, hidden in curves:
            at = {getattr(p, axis): cell(p, row, hidden) for p in line}
            at = {x: c for x, c in at.items() if c in found}
            if len(at) > 1:
                means, errors = spreads([mean_and_spread(found[c]["accuracy"])
                                         for c in at.values()])
                ax.errorbar(list(at), means, errors, marker="o", capsize=3, markersize=4,
                            color=f"C{DRAWN.index(row)}", linestyle="--" if hidden else "-",
                            label=row + ", hidden" * hidden)
        ax.set_xscale("log", base=2)
        ax.set_xticks(AXES[axis], AXES[axis])
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].plot(*zip(*sorted(unnamed.items())), color="grey", linestyle=":", label=FREQUENT)
    axes[0].set_ylabel(f"accuracy after {points[0].steps} steps, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def run():
    o = Options(**parse(Options))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # like Ctrl-C
    if not has_config(o.llm):
        raise UserError(f"--llm {o.llm}: no Llama there; python train.py --stage 0 trains one")
    os.makedirs(o.out, exist_ok=True)
    runs, points = Runs(o), grid(o)
    found = runs.score(cells(points))
    vocab, seeds = tokenizer_of(o.llm, llama_config(o.llm)).vocab, range(SCORED, SCORED + o.seeds)
    unnamed = {p.maps: statistics.mean(frequent(replace(p, seed=seed), vocab) for seed in seeds)
               for p in points}
    written = [dataclasses.asdict(c) | values for c, values in found.items()]
    for values in written:
        del values["seed"]
    write_atomically(os.path.join(o.out, "boundary.json"), {
        "options": dataclasses.asdict(o), FREQUENT: unnamed, "cells": written})
    draw(found, points, unnamed).savefig(os.path.join(o.out, "boundary.png"), dpi=100)
    print(f"{o.seeds} seeds, {o.steps} steps. Accuracies ± standard deviation. Differences ± 95 % "
          "interval over seeds, paired; one interval in twenty misses.\n")
    for title, text in tables(found, points, unnamed).items():
        print(f"{title}\n\n{text}\n")


if __name__ == "__main__":
    main(run)
