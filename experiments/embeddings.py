"""What the embeddings of the guidance tell about the question: a plot and a linear probe.

Of held-out questions, before and after stage 2: `python -m experiments.ablate --table embeddings`.
"""
import os
from collections import defaultdict

import torch
from matplotlib.figure import Figure

from baselines import is_guided, source_of
from benchmarks.toy import Answerer, load_questions
from cli import UserError
from experiments.report import half_width
from toy.world import FAMILIES
from training.options import EXPERT_OPTIONS
from weights import load


@torch.no_grad()
def embed(checkpoint, questions):
    """The guidance's embeddings e float[questions, E] at the first block with an expert (Eq. 3).

    Raises UserError if the checkpoint has no language experts that the guidance changes.
    """
    cfg = checkpoint.model.cfg
    if not is_guided(cfg) or not cfg.expert_blocks():
        raise UserError(
            f"--table embeddings: no language expert of this model has embeddings (weight_source "
            f"{source_of(cfg)}, language_expert {cfg.language_expert}); name another --base")
    answer, found = Answerer(checkpoint, max_new_tokens=1), []
    expert = checkpoint.model.llm.layers[cfg.expert_blocks()[0]].expert
    keep = lambda module, inputs, e: found.append(e[:, 0].float())
    handle = expert.encoder.register_forward_hook(keep)
    answer(questions, "embeddings")
    handle.remove()
    return torch.cat(found)


def probe(e, families, images):
    """Fit a linear map from e to the family on every second picture; score it on the others.

    returns  (accuracy, half of its 95 % interval, for independent pictures)
    """
    names, pictures = sorted(set(families)), sorted(set(images))
    odd = torch.tensor([pictures.index(image) % 2 == 1 for image in images])
    label = torch.tensor([names.index(family) for family in families])
    x = torch.cat([e, torch.ones(len(e), 1)], 1).double()
    target = torch.nn.functional.one_hot(label, len(names)).double()
    ridge = 1e-3 * torch.eye(x.shape[1])
    weight = torch.linalg.solve(x[~odd].mT @ x[~odd] + ridge, x[~odd].mT @ target[~odd])
    right = ((x[odd] @ weight).argmax(1) == label[odd]).double()
    accuracy, by_picture = right.mean().item(), defaultdict(float)
    tested = [image for image, is_odd in zip(images, odd) if is_odd]
    for image, hit in zip(tested, (right - accuracy).tolist()):
        by_picture[image] += hit / len(right)
    return accuracy, half_width(by_picture.values())


def plot_embeddings(o):
    """Draw OUT/embeddings.png from the stages of --base and print the probe's accuracy."""
    after = load(os.path.join(o.base, "stage2"))
    experts = {name: after.config["training"][name] for name in EXPERT_OPTIONS} | {"vlora": None}
    before = load(os.path.join(o.base, "stage1"), next(after.model.parameters()).dtype, experts)
    questions = load_questions(os.path.join(o.base, "world"), "heldout")
    questions = [q for q in questions if q.family != "caption"]
    families, images = [q.family for q in questions], [q.image for q in questions]
    figure = Figure((11, 5), layout="tight")
    axes = figure.subplots(1, 2)
    for panel, name, checkpoint in zip(axes, ("before", "after"), (before, after)):
        e = embed(checkpoint, questions)
        accuracy, half = probe(e, families, images)
        centred = e - e.mean(0)
        directions = torch.linalg.svd(centred, full_matrices=False)[2]
        points = centred @ directions[:2].mT                         # (questions, 2)
        for family in FAMILIES:
            panel.scatter(*points[[f == family for f in families]].mT, s=6, label=family)
        panel.set_title(f"{name} stage 2: a linear probe finds the family in {accuracy:.1%}")
        print(f"{name}: a linear probe of e finds {100 * accuracy:.1f} % of the families "
              f"(95 %: ± {100 * half:.1f}; chance {100 / len(FAMILIES):.1f} %)")
    axes[1].legend(markerscale=2, fontsize=8)
    os.makedirs(o.out, exist_ok=True)
    figure.savefig(os.path.join(o.out, "embeddings.png"), dpi=100)
