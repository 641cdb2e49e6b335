"""A prompt, further tokens and a training step: ours against transformers, experts against none.

Before anything is timed, both sides must compute the same: close logits, tokens that the other side
finds likeliest, too, and close gradients. Otherwise a wrong path could look fast.
"""
import dataclasses
import os
import shutil
import statistics
from dataclasses import dataclass

import numpy as np
import torch

from cli import UserError
from data import collate, MULTIPLE
from experiments.speed import shapes
from experiments.speed.clock import (alternate, copy_bandwidth, in_own_process, matmul_rate,
                                     peak_of, row)
from experiments.speed.shapes import config, EXPERTS, NO_EXPERTS, OURS, STATIC
from inference.prepare import ready_for_answers
from model import generate
from sample import make_batch
from train import freeze, TRAINS
from training.costs import (attention_flops, expert_weights, forward_flops, kv_width, llama_weights,
                            step_flops)
from training.plan import GB, room
from training.sharding import set_modules
from weights import build_empty, names_of

THEIRS = {"transformers": {},  # and with which options it generates
          "transformers, static cache": {"cache_implementation": "static"}}
ASKED, DECODED = 70, 64  # tokens of a prompt beside the picture's, and tokens after the first
# What rounding may do: to logits, as a share of their range, and to the norm of all gradients
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-2, 1e-1)}


@dataclass(frozen=True)
class Case:
    """What a row compares: ours first, then the others, of which the fastest counts."""
    job: str                                 # prefill|decode|train
    rows: int                                # B
    aim: str                                 # on two CPU cores, with --size small
    names: tuple[str, ...] = (NO_EXPERTS, "transformers")
    turns: int = 1

    @property
    def is_cost(self):
        return self.names[1] in OURS

    def title(self):
        words = [self.job] * self.is_cost + [f"batch {self.rows}"]
        return ", ".join(words + [f"{self.turns} turns"] * (self.turns > 1))


ON_OFF = EXPERTS, NO_EXPERTS
CASES = {
    "prefill": [Case("prefill", 1, "at least 1.2 x")],
    "decode": [Case("decode", 1, "at least 1.5 x, share at least 60%", (NO_EXPERTS, *THEIRS)),
               Case("decode", 8, "at least 1.5 x", (NO_EXPERTS, *THEIRS))],
    "train": [Case("train", 4, "at least 1.5 x, peak at most 0.7 x")],
    "experts": [Case("train", 4, "at most 1.04 x", ON_OFF),
                Case("prefill", 1, "at most 1.04 x", ON_OFF),
                Case("decode", 1, "at most 1.03 x", ON_OFF),
                Case("train", 4, "at most 1.08 x", (EXPERTS, STATIC), turns=8)]}
UNITS = {"prefill": "ms a prompt", "decode": "ms a token", "train": "ms a step"}


def data(case, o):
    """(samples, pictures): prompts, or for training with about 50 supervised tokens a row; of
    several turns, each asks 20 tokens and answers 20.
    """
    cfg, rng = config(o.size), np.random.default_rng(0)
    sizes = [dict(asked=ASKED, answered=(44 + 4 * (i % 4)) * (case.job == "train"))
             if case.turns == 1 else dict(asked=20, answered=20) for i in range(case.rows)]
    samples = [shapes.conversation(cfg, rng, turns=case.turns, **size) for size in sizes]
    return samples, shapes.pictures(case.rows, o)


# ---- The jobs. Each returns a function that does it once


def prefill(model, name, case, o):
    """-> logits float[B, V] of the last position, as `model.stream` computes them."""
    batch = make_batch(*data(case, o), model)
    B, T = batch.ids.shape
    batch = dataclasses.replace(
        batch, at=torch.arange(B, device=o.device) * T + batch.lengths - 1)

    @torch.no_grad()
    def run():
        cache = model.new_cache(B, o.device, o.torch_dtype)
        cache.reserve(T + DECODED + 1)
        return model(batch, cache)

    return run


def their_prefill(model, name, case, o):
    inputs, _ = shapes.their_batch(*data(case, o), o)

    @torch.no_grad()
    def run():
        return model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]

    return run


def decode(model, name, case, o):
    """-> B lists of n ids, the likeliest, after the prompts."""
    batch = make_batch(*data(case, o), model)
    return lambda n=DECODED + 1: generate(model, batch, n, -1)  # -1: no end token


def their_decode(model, name, case, o):
    inputs, _ = shapes.their_batch(*data(case, o), o)

    def run(n=DECODED + 1):
        out = model.generate(**inputs, max_new_tokens=n, min_new_tokens=n, do_sample=False,
                             **THEIRS[name])
        return out[:, -n:].tolist()

    return run


def steps(loss, model):
    """-> the loss of a training step; update=False only leaves the gradients.

    Weights, gradients and AdamW's moments have the model's dtype. The rate is tiny: the work is the
    same in each step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-8, weight_decay=0.0, fused=True)

    def run(update=True):
        value = loss()
        value.backward()
        if update:
            optimiser.step()
            optimiser.zero_grad()
        return value.detach()

    return run


def train_batch(case, o):
    """As train.py makes it."""
    samples, visual = data(case, o)
    batch = collate(samples, visual, multiple=MULTIPLE).to(o.device)
    batch.visual = batch.visual.to(o.torch_dtype)
    return batch


def train(model, name, case, o):
    """Stage 2: all but CLIP is trained. `eager` as train.py's toy has it, on a CPU in bf16."""
    freeze(model, TRAINS[2, "full"])
    set_modules(model, eager=o.device == "cpu" and o.dtype == "bfloat16", dropout=0.0)
    batch = train_batch(case, o)
    tokens = batch.trained
    return steps(lambda: model.loss(batch) / tokens, model)


def their_train(model, name, case, o):
    model.train().model.vision_tower.requires_grad_(False)
    inputs, labels = shapes.their_batch(*data(case, o), o)
    return steps(lambda: model(**inputs, labels=labels, use_cache=False).loss, model)


JOBS = {"prefill": (prefill, their_prefill), "decode": (decode, their_decode),
        "train": (train, their_train)}


def start(model, name, case, o):
    """The function that does the case's job once with a model, one of OURS or THEIRS."""
    if name in OURS and case.job != "train":
        model = ready_for_answers(model)
    return JOBS[case.job][name not in OURS](model, name, case, o)


def start_two(name, case, o):
    """The job twice, with a new model: the second training step has AdamW's moments."""
    model = shapes.build(name, o) if name in OURS else shapes.build_theirs(o)
    run = start(model, name, case, o)
    return lambda: (run(), run())


def peak_apart(name, case, o):
    """Bytes at the peak of a process that has done the same with a tiny model before: that has the
    imports, and whatever else is made once.
    """
    start_two(name, case, dataclasses.replace(o, size="tiny"))()
    return peak_of(lambda: start_two(name, case, o), o.device)


# ---- Do both sides compute the same?


def demand(error, most, what):
    assert error <= most, f"{what} of both sides differ: {error:.2g}, allowed is {most:.2g}"


def check_prefill(runs, models, case, o):
    ours, theirs = (runs[name]().float() for name in case.names[:2])
    demand((ours - theirs).abs().max() / (theirs.max() - theirs.min()),
           TOLERANCE[o.torch_dtype][0], "logits")


@torch.no_grad()
def check_decode(runs, models, case, o):
    """Each of our tokens is the likeliest for the other side, too, but for rounding."""
    answers, other = runs[case.names[0]](), case.names[1]
    assert {len(a) for a in answers} == {DECODED + 1}
    samples, visual = data(case, o)
    samples = shapes.with_answers(samples, answers)
    batch = make_batch(samples, visual, models[case.names[0]])
    if other in OURS:
        logits = models[other](batch)
    else:
        inputs, _ = shapes.their_batch(samples, visual, o)
        logits = models[other](**inputs).logits.flatten(0, 1)[batch.at]
    chosen = logits.gather(1, batch.target[:, None])[:, 0]
    demand((logits.amax(1) - chosen).max() / (logits.max() - logits.min()),
           TOLERANCE[o.torch_dtype][0], "tokens")


def check_train(runs, models, case, o):
    """The gradients of all that LLaVA has are the same, but for rounding."""
    ours, other = (models[name] for name in case.names)
    for name in case.names:
        runs[name](update=False)
    error = norm = 0.0
    for name in names_of(config(o.size)):
        p, q = ours.get_parameter(name), other.get_parameter(
            name if case.is_cost else shapes.their_name(name))
        if p.requires_grad:
            error += (p.grad.float() - q.grad.float()).square().sum().item()
            norm += q.grad.float().square().sum().item()
    ours.zero_grad()
    other.zero_grad()
    demand((error / norm) ** 0.5, TOLERANCE[o.torch_dtype][1], "gradients")


CHECKS = {"prefill": check_prefill, "decode": check_decode, "train": check_train}


# ---- Floors


def prompt_flops(cfg, text):
    """FLOPs of a prompt of a picture and so many tokens; half of the pairs of positions count."""
    pairs = (text + cfg.image_tokens) ** 2
    return (sum(forward_flops(cfg, text, at=1).values())
            - cfg.llm.depth * attention_flops(pairs, cfg.llm.width) // 2)


def numbers_per_token(cfg, rows, length):
    """Numbers that must be read for one more token in each row: the Llama's weights (of the
    embedding only the head, if it is tied), keys and values of `length` positions, and the rows'
    generated weights.
    """
    llm, D = cfg.llm, cfg.llm.width
    weights = llama_weights(llm) + (2 * llm.depth + 1) * D + D * llm.vocab
    cached = 2 * llm.depth * kv_width(llm) * length
    cached += len(cfg.expert_blocks()) * expert_weights("hyper", D, D, cfg.expert_rank)
    return weights + rows * cached


def floor(case, o):
    """Seconds that the job needs at least on this machine: of a token, a prompt batch or a step."""
    cfg = config(o.size, case.names[0])
    if case.job == "decode":
        length = ASKED + cfg.image_tokens + (DECODED + 1) / 2  # in the mean
        read = numbers_per_token(cfg, case.rows, length) * o.torch_dtype.itemsize
        return read / copy_bandwidth(o.device)
    operations = (step_flops(cfg, train_batch(case, o), True) if case.job == "train"
                  else case.rows * prompt_flops(cfg, ASKED))
    return operations / matmul_rate(o.device, o.torch_dtype)


# ---- Rows


def check_room(case, o):
    """UserError if two models do not fit with their gradients and AdamW's moments."""
    model = build_empty(config(o.size))
    copies = 4 if case.job == "train" else 1
    need = 2 * copies * sum(p.numel() for p in model.parameters()) * o.torch_dtype.itemsize
    if need > room(o.device):
        raise UserError(f"{case.job} with two models of size {o.size} in {o.dtype} needs "
                        f"{need / GB:.0f} GB, the {o.device} has {room(o.device) / GB:.0f}")


def usable(names, o):
    """Without the static cache where it cannot be: on cuda, transformers compiles with it."""
    compilers = os.environ.get("CC", "cc"), "gcc", "clang"
    if o.device == "cuda" and len(names) > 2 and not any(map(shutil.which, compilers)):
        print("transformers' static cache is left out: there is no C compiler")
        return [name for name in names if "static cache" not in name]
    return names


def measure(case, o):
    """The seconds of `time_runs`, of a case's sides."""
    ours, *others = usable(case.names, o)
    first = shapes.build(ours, o)
    second = (shapes.build(others[0], o) if case.is_cost
              else shapes.build_theirs(o, first, share=case.job != "train"))
    models = {ours: first, **dict.fromkeys(others, second)}
    runs = {name: start(model, name, case, o) for name, model in models.items()}
    CHECKS[case.job](runs, models, case, o)
    return time_runs(runs, case, o)


def time_runs(runs, case, o):
    """{name: seconds of each round} of a case's functions, of DECODED tokens for decode."""
    if case.job != "decode":
        return alternate(runs, o.rounds, o.device)
    calls = {(name, n): lambda run=run, n=n: run(n) for name, run in runs.items()
             for n in (1, DECODED + 1)}
    spent = alternate(calls, o.rounds, o.device)
    return {name: [long - short for long, short in
                   zip(spent[name, DECODED + 1], spent[name, 1])] for name in runs}


def compare(what, case, o):
    """A row: the job's time, peak and floor; against the faster of the others."""
    check_room(case, o)
    spent = measure(case, o)
    if o.device == "cuda":
        torch.cuda.empty_cache()  # the other processes need it
    ours, *others = spent
    best = min(others, key=lambda name: statistics.median(spent[name]))
    each = DECODED if case.job == "decode" else 1
    for name in set(others) - {best}:
        slower = 1e3 * statistics.median(spent[name]) / each
        print(f"{name} is slower: {slower:.4g} {UNITS[case.job]}")
    label = {ours: ours if case.is_cost else "ours", best: best}
    peaks = {label[name]: in_own_process(peak_apart, name, case, o) for name in label if o.peak}
    aim = case.aim if (o.size, o.device) == ("small", "cpu") else None
    return row(what, case.title(), {label[name]: spent[name] for name in label},
               unit=UNITS[case.job], each=each, floor=floor(case, o), aim=aim,
               is_cost=case.is_cost, peaks=peaks)


def rows(what, o):
    """The rows of prefill, decode, train or experts; --batch_size replaces the cases' own."""
    cases = CASES[what]
    if o.batch_size:
        cases = dict.fromkeys(dataclasses.replace(c, rows=o.batch_size, aim=None) for c in cases)
    return [compare(what, case, o) for case in cases]
