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
import os
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from cli import check_numbers, main, parse
from experiments.report import markdown_table
from formats.json_files import read_json, write_json
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
    data: list[Literal["fresh", "repeated"]] = ("fresh",)  # repeated: four batches again and again
    lr: list[float] = (2e-5, 2e-4, 1e-3)                   # constant learning rates
    form: list[Literal[(*FORMS,)]] = ("linear", "scaled")  # of the encoder
    out: str = "out/step_size"                             # folder of results; it collects all runs

    def __post_init__(self):
        check_numbers(self, {})


def make_world(site, inputs, outputs):
    """A function that draws a batch: x, guidance, the static layer's output, the teacher's."""
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
        return x, guidance, static, teacher, 2 * teacher.std() * draw(*teacher.shape)

    return batch


def train(site, form, data, lr):
    """{"steps": {step: figures on held-out samples without noise}, "worst": training loss,
    "cpu_s": seconds}. Losses are relative to those without an expert.
    """
    torch.manual_seed(0)
    began, (inputs, outputs, E), (a, b) = time.process_time(), SITES[site], FORMS[form]
    net, expert = HyperNetwork(inputs, outputs, E, 16), Expert(inputs, inputs, outputs, E, 16)
    encoder, found, worst = expert.encoder, {}, 0.0
    if form.endswith("norm"):
        encoder.register_forward_hook(lambda module, x, e: rms(e) * 3 ** -0.5)  # its size at first
    rest = [p for p in (*net.parameters(), *expert.parameters()) if p is not encoder.weight]
    groups = [{"params": rest}, {"params": encoder.weight, "lr": lr * inputs ** a * E ** b}]
    adam = torch.optim.AdamW(groups, lr, weight_decay=0.0, fused=True)
    draw = make_world(site, inputs, outputs)
    held_out, fixed = draw(32), [draw() for _ in range(4)]
    for step in range(1, STEPS[-1] + 1):
        x, guidance, _, teacher, noise = fixed[step % 4] if data == "repeated" else draw()
        target = teacher + noise
        shift = expert(x, expert.weights(guidance, net))
        loss = F.mse_loss(shift, target) / target.square().mean()
        loss.backward()
        worst = max(worst, loss.item())
        adam.step()
        adam.zero_grad()
        if step in STEPS:
            x, guidance, static, teacher, _ = held_out
            with torch.no_grad():
                shift = expert(x, expert.weights(guidance, net))
                e = encoder(rms(guidance) * expert.scale)
            loss = F.mse_loss(shift, teacher) / teacher.square().mean()
            found[str(step)] = {"share": (shift.norm() / static.norm()).item(), "loss": loss.item(),
                           "e": e.std().item()}
    return {"steps": found, "worst": worst, "cpu_s": time.process_time() - began}


def plot(runs, path):
    """Draw |E| / |static| over the steps: a column for each site, a row for each rate."""
    rates = sorted({run.split()[2] for run in runs}, key=float)
    figure = Figure((11, 2.3 * len(rates)), layout="constrained")
    grid = figure.subplots(len(rates), len(SITES), squeeze=False, sharex=True, sharey=True)
    lines = {}
    for run, found in runs.items():
        site, data, lr, form = run.split()
        axes = grid[rates.index(lr)][[*SITES].index(site)]
        lines[f"{form}, {data}"], = axes.loglog(
            [int(step) for step in found["steps"]],
            [max(1e-4, figures["share"]) for figures in found["steps"].values()],
            f"C{[*FORMS].index(form)}{'-' if data == 'fresh' else ':'}")
        axes.set_title(f"{site}, G = {SITES[site][0]}, lr {lr}", fontsize=9)
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=4)
    figure.supylabel("|E| / |static layer's output|")
    figure.savefig(path, dpi=100)


def table_row(name, found):
    """The cells of a run: its name, |E| / |static| after some steps, figures of the last step."""
    shares = [found["steps"][n]["share"] for n in ("1", "10", "100", "400") if n in found["steps"]]
    last = found["steps"][str(STEPS[-1])]
    return [*name.split(), *(f"{share:.3f}" for share in shares),
            f"{last['loss']:.3f}", f"{found['worst']:.2f}", f"{last['e']:.2f}"]


def run():
    o = Options(**parse(Options))
    torch.set_num_threads(1)
    os.makedirs(o.out, exist_ok=True)
    file = os.path.join(o.out, "runs.json")
    runs = read_json(file) if os.path.exists(file) else {}
    for site, data, lr, form in itertools.product(o.site, o.data, o.lr, o.form):
        name = f"{site} {data} {lr:g} {form}"
        if name not in runs:
            print(name, file=sys.stderr)
            runs[name] = train(site, form, data, lr)
            write_json(file, runs)
    print(markdown_table(["site", "data", "lr", "encoder", "step 1", "10", "100", "400",
                          "held-out loss", "worst loss", "std of e"],
                         [table_row(name, found) for name, found in runs.items()]))
    print(f"{sum(found['cpu_s'] for found in runs.values()) / 60:.1f} minutes of one core")
    plot(runs, os.path.join(o.out, "step_size.png"))


if __name__ == "__main__":
    main(run)
