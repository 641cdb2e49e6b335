"""How far do steps of Adam move an expert at real width? `python -m experiments.step_size`

One expert with its hypernetwork learns beside a static layer with random weights. Its encoder E_n
takes several forms: `scaled` is that of hypernet.py, the others are what it is compared with. With
Adam, to scale the encoder's input by s and its first weights by 1/s is to multiply its learning
rate by s. So all forms run the same code with other rates of E_n.

The data is made up. Guidance is a large mean, with four very large features, plus a small part of
each sample. The target is the output of a teacher, which depends on the sample, plus twice as much
noise: most of a gradient is noise, as in a language model's.
"""
import itertools
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from cli import check_numbers, main, parse
from experiments.report import markdown_table
from hypernet import Expert, HyperNetwork, rms

SITES = {"toy": (192, 192, 16), "E_V1": (1024, 4096, 64),  # inputs (= G), outputs, E
         "E_V2": (4096, 4096, 64), "E_L": (4096, 4096, 64)}
FORMS = {  # the rate of E_n is G^a E^b times that of the rest, and its step 0.8 lr G^a E^(b + 1/2)
    "linear": (1, -0.5), "scaled": (0, 0), "wide": (0, 0.5), "one": (0, -0.5),
    "linear_norm": (1, -0.5), "scaled_norm": (0, 0)}  # with an RMS norm on e
STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 400)  # after which figures are taken


@dataclass
class Options:
    """Train an expert beside a random layer, with several forms of its encoder."""
    site: list[Literal[(*SITES,)]] = (*SITES,)             # where the expert is: gives the widths
    data: list[Literal["fresh", "repeated"]] = ("fresh", "repeated")  # repeated: four batches
    lr: list[float] = (2e-5, 2e-4, 1e-3)                   # constant learning rates
    form: list[Literal[(*FORMS,)]] = ("linear", "scaled")  # of the encoder
    out: str = "step_size.png"                             # the plot to write, a PNG

    def __post_init__(self):
        check_numbers(self, {})


def make_world(site, inputs, outputs):
    """A function that draws a batch: x, guidance, the static layer's output, the teacher's, and
    the target.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    large = torch.ones(inputs).index_fill_(0, torch.arange(4), 10.0)
    x_mean, g_mean = rms(draw(inputs) * large), rms(draw(inputs) * large)
    x_own, g_own = draw(16, inputs) / 4, draw(16, inputs) / 4
    static_in, static_out = draw(inputs, 64), draw(64, outputs)
    read, choose, write = draw(inputs, 16) * inputs ** -0.5, draw(16, 16) / 2, draw(16, outputs)

    def batch(samples=8, tokens=16):
        own = draw(samples, 1, 16)  # what is a sample's own
        x = rms(x_mean + 0.3 * own @ x_own + draw(samples, tokens, inputs))
        x = F.gelu(x) if site == "E_V2" else x
        guidance = g_mean + 0.3 * own @ g_own + 0.1 * draw(samples, 1, inputs)
        guidance = guidance if site in ("toy", "E_L") else x.mean(1, keepdim=True)
        static = 0.5 * rms(F.gelu(x @ static_in) @ static_out)
        teacher = 0.15 * (torch.tanh(x @ read) * (1 + torch.tanh(own @ choose))) @ write
        return x, guidance, static, teacher, teacher + 2 * teacher.std() * draw(*teacher.shape)

    return batch


def train(site, data, lr, form):
    """(figures for the table, {step: |E| / |static|}), both on samples that are not trained on.

    Losses are relative to those without an expert; that on held-out samples is without noise.
    """
    torch.manual_seed(0)
    began, (inputs, outputs, E), (a, b) = time.process_time(), SITES[site], FORMS[form]
    net, expert = HyperNetwork(inputs, outputs, E, 16), Expert(inputs, inputs, outputs, E, 16)
    encoder, shares, losses = expert.encoder, {}, []
    if form.endswith("norm"):
        encoder.register_forward_hook(lambda module, x, e: rms(e) * 3 ** -0.5)  # its size at first
    rest = [p for p in (*net.parameters(), *expert.parameters()) if p is not encoder.weight]
    groups = [{"params": rest}, {"params": encoder.weight, "lr": lr * inputs ** a * E ** b}]
    adam = torch.optim.AdamW(groups, lr, weight_decay=0.0, fused=True)
    draw = make_world(site, inputs, outputs)
    held_out, fixed = draw(32), [draw() for _ in range(4)]
    for step in range(1, STEPS[-1] + 1):
        x, guidance, _, _, target = fixed[step % 4] if data == "repeated" else draw()
        shift = expert(x, expert.weights(guidance, net))
        loss = F.mse_loss(shift, target) / target.square().mean()
        loss.backward()
        losses.append(loss.item())
        adam.step()
        adam.zero_grad()
        if step in STEPS:
            x, guidance, static, teacher, _ = held_out
            with torch.no_grad():
                shift = expert(x, expert.weights(guidance, net))
                e = encoder(guidance)
            shares[step] = (shift.norm() / static.norm()).item()
    held_out_loss = F.mse_loss(shift, teacher) / teacher.square().mean()
    return {"held-out loss": held_out_loss.item(), "worst loss": max(losses),
            "std of e": e.std().item(), "CPU s": time.process_time() - began}, shares


def plot(runs, path):
    """Draw |E| / |static| over the steps: a column for each site, a row for each rate.

    runs  {(site, data, lr, form): {step: |E| / |static|}}
    """
    sites, rates = ([*dict.fromkeys(values)] for values in list(zip(*runs))[::2])
    figure = Figure(figsize=(2.8 * len(sites), 2.4 * len(rates)), layout="constrained")
    grid = figure.subplots(len(rates), len(sites), squeeze=False, sharex=True, sharey=True)
    for (site, data, lr, form), shares in runs.items():
        axes = grid[rates.index(lr)][sites.index(site)]
        axes.loglog(shares.keys(), shares.values(), color=f"C{[*FORMS].index(form)}",
                    linestyle="-" if data == "fresh" else ":", label=f"{form}, {data}")
        axes.set(title=f"{site}, G = {SITES[site][0]}, lr {lr:g}", ylim=(1e-4, 30))
        axes.legend(fontsize=6)
    figure.supylabel("|E| / |static layer's output|")
    figure.savefig(path, dpi=80, format="png")


def run():
    o = Options(**parse(Options))
    torch.set_num_threads(1)
    rows, runs = [], {}
    for name in itertools.product(o.site, o.data, o.lr, o.form):
        figures, runs[name] = train(*name)
        shown = [runs[name][step] for step in (1, 10, 100, 400)] + [*figures.values()]
        rows.append([*map(str, name), *(f"{value:.3f}" for value in shown)])
        print(*rows[-1], file=sys.stderr)
    head = ["site", "data", "lr", "encoder", "step 1", "10", "100", "400", *figures]
    print(markdown_table(head, rows))
    plot(runs, o.out)


if __name__ == "__main__":
    main(run)
