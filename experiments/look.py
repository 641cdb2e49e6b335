"""What the experts do in one conversation, as one picture: `python -m experiments.look x.jpg
--prompt "What colour is the star?" --prompt "Where is it?"`

    the picture    |E_V1| / |L1| of each patch
    the words      |E_L| / |FFN| of each token in each block that has an expert
    the turns      the cosine between the weights that were generated for them
    the answers    as they are; with every shift set to zero; with the weights of the next turn

`look` computes, `draw` draws. A changed model reads the whole conversation anew, but with the real
answers of the earlier turns, so that a changed answer does not change the next one.
"""
# cli first: it handles Ctrl-C during the slow imports
from cli import main, parse, UserError

import contextlib
import textwrap
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import sample
from baselines import source_of
from benchmarks.ablation import experts_off
from data import IMAGE, open_image, pixels
from formats.runs import choose_checkpoint
from training.log import output_norms

WIDE = 24  # words side by side


@dataclass
class Options:
    """Draw what the experts do in a conversation. A word without an option name is the picture."""
    image: str | None = None   # the picture; none: no picture
    prompt: list[str] | None = None  # may be repeated: turns of one conversation; none:
                               # "Describe the image."
    model: str | None = None   # a checkpoint, or a run's folder: its newest finished stage; none:
                               # the newest finished stage under out/
    out: str = "look.png"      # the PNG to write
    max_new_tokens: int = 64   # longest answer, in tokens
    device: Literal["cuda", "mps", "cpu"] | None = None  # none: the first of these that exists
    dtype: Literal["bfloat16", "float32"] | None = None  # none: bfloat16 where it is fast


@dataclass
class Turn:
    question: str
    answer: str
    words: list[str]    # the text of each token, without the system prompt; a picture is one word
    answer_at: int      # index of the first word of the answer
    shares: np.ndarray  # float32[blocks, words]  |E_L| / |FFN|


@dataclass
class Look:
    blocks: list[int]               # the Llama's blocks with an expert
    turns: list[Turn]
    zeroed: list[str]               # the answers with every shift set to zero
    swapped: list[str]              # with the next turn's language weights; []: one turn, or static
    cosines: dict[str, np.ndarray]  # {name: float32[U, U], a mean over the blocks}; {}: one turn
    picture: np.ndarray | None      # float32[S, S, 3] in 0..1, as CLIP gets it
    patches: dict[str, np.ndarray]  # {"|E_V1| / |L1|": float32[rows, columns]}; also of E_V2


# ---- Computing


def check(model, image, name):
    """The blocks with an expert; UserError if no expert would run in a conversation."""
    blocks = [n for n, block in enumerate(model.llm.layers) if block.expert is not None]
    cfg = model.cfg
    if not blocks and cfg.visual_expert == "none":
        raise UserError(f"{name} has no experts to look at (visual_expert {cfg.visual_expert}, "
                        f"language_expert {cfg.language_expert}, weight_source "
                        f"{source_of(cfg)}): name a HyperLLaVA with --model")
    if not blocks and image is None:
        raise UserError(f"{name} has a visual expert only: give it a picture with --image")
    return blocks


def patch_shares(projector, f):
    """{name: float32[rows, columns]}: each visual expert's shift relative to its static layer.

    f  float[1, N, C], the features of the picture's patches, row by row
    """
    def share(shift, static):
        found = shift.float().norm(dim=-1) / static.float().norm(dim=-1)      # (1, N)
        return found.view(round(f.shape[1] ** 0.5), -1).cpu().numpy()

    found, first = {}, F.gelu(projector.linear_1(f))                          # L1(f)
    shifted = first
    if projector.expert_1 is not None:
        shifted = first + projector.expert_1(f)
        found["|E_V1| / |L1|"] = share(projector.expert_1(f), first)
    if projector.expert_2 is not None:
        found["|E_V2| / |L2|"] = share(projector.expert_2(first), projector.linear_2(shifted))
    return found


def flat(weights):
    """float32[P]: the tensors of one set of weights as one vector."""
    return torch.cat([w.float().flatten() for w in weights])


def cosines(vectors):
    """float32[U, U]: the cosine between turns, a mean over the blocks, of vectors[turn][block]."""
    blocks = [F.normalize(torch.stack(turns), dim=-1) for turns in zip(*vectors)]
    return torch.stack([v @ v.mT for v in blocks]).mean(0).cpu().numpy()


@contextlib.contextmanager
def noted(hypernet):
    """Yields [(embedding e, generated w as in `flat`), ...], one for each call; hypernet: or None.
    """
    calls = []

    def note(module, inputs, out):
        calls.append((inputs[0], flat(out if isinstance(out, tuple) else [out])))

    with hypernet.register_forward_hook(note) if hypernet else contextlib.nullcontext():
        yield calls


class Told:
    """A conversation as the model had it, and the same questions to a changed model.

    chat     a `sample.Chat`, at the end of the conversation
    spans    of each turn: the positions where it begins, where its answer begins, where it ends
    weights  of each turn: [K of each block with an expert]
    calls    of each turn: [(e, w) of each block whose weights a hypernetwork writes]
    """

    def __init__(self, checkpoint, image, questions, o):
        self.again = lambda: sample.Chat(checkpoint, image, o)
        self.chat, self.questions, self.answers = self.again(), questions, []
        self.spans, self.weights, self.calls = [], [], []
        for question in questions:
            self.chat.prompt(question)  # a mistake in one of them: no answer
        for question in questions:
            self.ask(question)

    def ask(self, question):
        chat = self.chat
        begin = chat.cached + len(chat.uncached())
        answer_at = begin + len(chat.prompt(question)[0].ids)
        with noted(chat.model.llm.hypernet) as calls:
            self.answers.append("".join(chat.ask(question)))
        self.spans.append((begin, answer_at, len(chat.ids)))
        layers = [layer for layer in chat.cache.layers if layer.weights is not None]
        self.weights.append([flat(layer.weights) for layer in layers])
        self.calls.append(calls)

    def ask_again(self):
        """The answers of the model as it is now, each after the real answers to the others."""
        chat, answers = self.again(), []
        for question, (_, answer_at, end) in zip(self.questions, self.spans):
            answers.append("".join(chat.ask(question)))
            chat.ids, chat.cached = self.chat.ids[:end], answer_at  # go on after the first answer
        return answers

    def with_next_weights(self):
        """The answers where each turn runs with the weights of the next one, the last with those
        of the first."""
        others = iter([e for calls in self.calls[1:] + self.calls[:1] for e, _ in calls])
        hypernet = self.chat.model.llm.hypernet
        with hypernet.register_forward_pre_hook(lambda module, inputs: next(others)):
            return self.ask_again()


def printable(text):
    """The text with a box for each character that fonts lack: controls, and parts of a character.
    """
    return "".join(c if c.isprintable() and c != "\ufffd" else "□" for c in text)


def label(tokenizer, id):
    """The text of an id as a label."""
    if id in (IMAGE, tokenizer.eos):
        return "picture" if id == IMAGE else "</s>"
    return printable(tokenizer.decode([id]).replace("\n", "↵").strip()) or "␣"


def word_shares(ids, shift, static):
    """(int64[words], float32[blocks, words]): where each word begins, and its |E_L| / |FFN|.

    All positions of a picture are one word. shift, static: float32[blocks, T], norms of each token
    """
    ids = np.array(ids)
    first = np.flatnonzero((ids != IMAGE) | (np.roll(ids, 1) != IMAGE))
    total = [np.sqrt(np.add.reduceat(norms ** 2, first, axis=1)) for norms in (shift, static)]
    return first, total[0] / total[1]


def describe_turns(told, norms, tokenizer, system):
    """[`Turn`, ...].

    norms   (of E_L, of the FFN), float32[blocks, T] each
    system  number of positions before the first question
    """
    turns = []
    for question, answer, (begin, answer_at, end) in zip(told.questions, told.answers, told.spans):
        begin, end = max(begin, system), min(end, told.chat.cached)  # the last token has not run
        ids = told.chat.ids[begin:end]
        first, shares = word_shares(ids, *(x[:, begin:end] for x in norms))
        turns.append(Turn(question, answer, [label(tokenizer, ids[i]) for i in first],
                          int((first < answer_at - begin).sum()), shares))
    return turns


def see(chat):
    """(float32[S, S, 3] in 0..1, `patch_shares`) of a chat's picture; (None, {}) without one."""
    if chat.image is None:
        return None, {}
    prep = chat.checkpoint.preprocess
    x = pixels(chat.image, prep).permute(1, 2, 0).numpy() * prep.std + prep.mean
    return np.clip(x, 0, 1), patch_shares(chat.model.projector, torch.stack(chat.visual()))


@torch.no_grad()
def look(checkpoint, image, questions, o, name="the model"):
    """The `Look` of a conversation about `image`, a PIL image or None; o: `sample.Options`.

    Raises UserError if the model, called `name`, has no experts or a question cannot be asked.
    """
    model, system = checkpoint.model, checkpoint.system
    vars(model).pop("step", None)  # hooks do not see a captured step
    blocks = check(model, image, name)
    with (output_norms({n: model.llm.layers[n].expert for n in blocks}) as shift,
          output_norms({n: model.llm.layers[n].mlp for n in blocks}) as static):
        told = Told(checkpoint, image, questions, o)
    norms = [torch.zeros(0, told.chat.cached).numpy()] * 2
    if blocks:
        norms = [torch.cat([torch.cat(found[n], 1) for n in blocks]).cpu().numpy()
                 for found in (shift, static)]
    before = 1 + len(checkpoint.tokenizer.encode(system) if system else [])
    turns = describe_turns(told, norms, checkpoint.tokenizer, before)
    with experts_off(model):
        zeroed = told.ask_again()
    generated, several = model.llm.hypernet is not None, len(questions) > 1
    near = {"weights K = w + b": cosines(told.weights)} if blocks and several else {}
    if generated and several:
        near["generated part w"] = cosines([[w for _, w in calls] for calls in told.calls])
    swapped = told.with_next_weights() if generated and several else []
    return Look(blocks, turns, zeroed, swapped, near, *see(told.chat))


# ---- Drawing


def answer_lines(found, t):
    """[(text, colour), ...] of turn t: its question, its answer, what the answer becomes."""
    turn, next_turn = found.turns[t], (t + 1) % len(found.turns) + 1
    changed = [("every shift set to zero", found.zeroed[t])]
    if found.swapped:
        changed.append((f"language weights of turn {next_turn}", found.swapped[t]))
    lines = [(f"{t + 1}. {turn.question}", "black"), (f"answer: {turn.answer}", "black")]
    for how, answer in changed:
        same = answer == turn.answer
        lines.append((f"{how}: {answer if not same else 'the same answer'}",
                      "dimgray" if same else "firebrick"))
    return [(printable(textwrap.shorten(text, 125, placeholder=" …")), colour)
            for text, colour in lines]


def write_lines(axes, lines):
    """Write lines above the axes, the first one in bold."""
    for i, (text, colour) in enumerate(reversed(lines)):
        weight = "bold" if i == len(lines) - 1 else "normal"
        axes.annotate(text, (0, 1), (0, 6 + 15 * i), "axes fraction", textcoords="offset points",
                      color=colour, fontweight=weight, fontsize=10.5, parse_math=False)


def draw_words(axes, turn, words, blocks, most):
    """|E_L| / |FFN| of some words of a turn, `words` being a slice; the answer's are in bold."""
    axes.imshow(turn.shares[:, words], aspect="auto", vmin=0, vmax=most)
    axes.set_yticks(range(len(blocks)), [f"block {n}" for n in blocks], fontsize=9)
    texts = turn.words[words]
    axes.set_xticks(range(len(texts)), texts, rotation=35, ha="right", rotation_mode="anchor",
                    fontsize=10, parse_math=False)
    for i, text in enumerate(axes.get_xticklabels(), words.start):
        text.set_fontweight("bold" if i >= turn.answer_at else "normal")


def draw_turns(figure, found, rows):
    """Each turn's answers and words; rows: [(turn, slice of its words), ...]."""
    width = min(WIDE, max(len(turn.words) for turn in found.turns))
    most = max((turn.shares.max() for turn in found.turns), default=0) if found.blocks else 0
    grid = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axes, (t, words) in zip(grid, rows):
        if not words.start:
            write_lines(axes, answer_lines(found, t))
        if found.blocks:
            draw_words(axes, found.turns[t], words, found.blocks, most)
            axes.set_xlim(-0.5, width - 0.5)
            axes.spines[:].set_visible(False)
        else:
            axes.axis("off")
    if found.blocks:
        bar = figure.colorbar(grid[0].images[0], ax=list(grid), pad=0.01, fraction=0.02)
        bar.set_label("|E_L| / |FFN|")


def draw_patches(axes, picture, name, shares):
    """The shares over the picture in grey."""
    side = len(picture)
    axes.imshow(picture.mean(-1), cmap="gray", extent=(0, side, side, 0))
    image = axes.imshow(shares, alpha=0.7, extent=(0, side, side, 0), vmin=0)
    axes.figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    axes.set_title(f"{name} of each patch", fontsize=11)
    axes.axis("off")


def draw_cosines(axes, name, values):
    """The cosines between turns as numbers; the further apart, the darker."""
    axes.imshow(1 - values, vmin=0, vmax=1, cmap="Reds")
    for (i, j), value in np.ndenumerate(values):
        axes.text(j, i, f"{value:.3f}", ha="center", va="center",
                  color="white" if value < 0.4 else "black", fontsize=10 if len(values) < 6 else 7)
    turns = range(len(values))
    axes.set_xticks(turns, [t + 1 for t in turns])
    axes.set_yticks(turns, [t + 1 for t in turns])
    axes.set_title(f"cosine between turns:\n{name}", fontsize=11)
    axes.tick_params(length=0)


def draw_top(figure, found):
    """The picture, its patches, and the cosines between turns, side by side."""
    widths = [1] * (found.picture is not None) + [1.07] * len(found.patches)
    widths += [0.75] * len(found.cosines)
    panels = iter(figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0])
    if found.picture is not None:
        axes = next(panels)
        axes.imshow(found.picture)
        axes.set_title("the picture, as CLIP sees it", fontsize=11)
        axes.axis("off")
    for name, shares in found.patches.items():
        draw_patches(next(panels), found.picture, name, shares)
    for name, values in found.cosines.items():
        draw_cosines(next(panels), name, values)


def draw(found):
    """A matplotlib figure of a `Look`, 1,200 px wide at 100 dpi."""
    rows = [(t, slice(i, i + WIDE)) for t, turn in enumerate(found.turns)
            for i in range(0, len(turn.words) if found.blocks else 1, WIDE)]
    strip = 0.9 + 0.2 * len(found.blocks) if found.blocks else 0.2  # inches
    heights = [sum(strip + 0.9 * (not words.start) for _, words in rows)]
    if found.picture is not None or found.cosines:
        heights.insert(0, 2.5 if found.picture is None else 3.5)
    figure = Figure((12, sum(heights)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    *top, bottom = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part in top:
        draw_top(part, found)
    draw_turns(bottom, found, rows)
    return figure


def run():
    o = Options(**parse(Options, positional="image"))
    options = sample.Options(max_new_tokens=o.max_new_tokens, device=o.device, dtype=o.dtype)
    image = None if o.image is None else open_image(o.image, o.image)
    name = choose_checkpoint(o.model)
    checkpoint, _ = sample.load(options, name)
    found = look(checkpoint, image, o.prompt or ["Describe the image."], options, name)
    draw(found).savefig(o.out, dpi=100, format="png")
    print(f"wrote {o.out}")


if __name__ == "__main__":
    main(run)
