"""What the order of the samples does to stage 2: `python -m experiments.order OPTIONS`.

    --data J.json --llm DIR   on a file of conversations
    (neither)                 on made-up samples: as many of each source as LLaVA's mix665k has,
                              with turns and lengths that are guessed

Compares an epoch in LLaVA's order with the epochs of our --order length and modality.
"""
from dataclasses import dataclass

import numpy as np

from cli import check_numbers, main, MOST, parse, UserError
from data import Conversations, IGNORE, PromptFormat, SYSTEM
from formats.folders import resolve
from formats.tokenizer import Tokenizer
from training.feed import BatchSampler, deal, padded

SOURCES = [  # records (LLaVA-1.5's paper); guessed: turns, tokens of a question and of an answer
    (40688, 3.5, 70, 280),  # ShareGPT, the only one without pictures
    (58000, 4.5, 14, 30), (23000, 1, 14, 120), (77000, 1, 22, 130),  # LLaVA: chat, detail, reason
    (83000, 5.4, 11, 3), (72000, 13, 11, 2), (9000, 1, 23, 3),       # VQAv2, GQA, OKVQA
    (80000, 5, 9, 7), (66000, 1, 50, 2), (22000, 1, 60, 15),         # OCR-VQA, A-OKVQA, TextCaps
    (48000, 10, 22, 14), (86000, 10, 24, 14)]                        # RefCOCO, Visual Genome


@dataclass
class Options:
    """Compare orders of the samples: padding, balance of the ranks, what a step is made of."""
    data: str | None = None               # JSON file of training data (default: made-up samples)
    llm: str | None = None                # with --data: a Llama, for its tokenizer
    image_tokens: int = 576               # positions of a picture
    ranks: int = 8                        # that share a step's samples
    batch_size: int = 128                 # samples of a step
    micro_batch_size: int = 16            # samples that a rank processes at once, on average

    def __post_init__(self):
        if bool(self.data) != bool(self.llm):
            raise UserError("expected --data FILE --llm FOLDER, or neither")
        check_numbers(self, {"image_tokens": (0, MOST, "0 or more")})
        if self.batch_size % (self.ranks * self.micro_batch_size):
            raise UserError(f"--batch_size {self.batch_size}: expected a multiple of --ranks "
                            f"{self.ranks} x --micro_batch_size {self.micro_batch_size}")


@dataclass
class Samples:
    """What an order needs to know of n samples, and what it is judged by."""
    lengths: np.ndarray     # positions
    supervised: np.ndarray  # tokens
    words: np.ndarray       # LLaVA's measure of length
    has_image: np.ndarray
    source: np.ndarray      # index of its source


def made_up(image_tokens):
    """Samples of SOURCES; their texts are log-normal in length. The context is 2048."""
    rng = np.random.default_rng(0)
    source = np.repeat(np.arange(len(SOURCES)), [records for records, *_ in SOURCES])
    mean_turns, question, answer = np.array(SOURCES).T[1:, source]
    turns = 1 + rng.poisson(mean_turns - 1)
    told = turns * (answer * rng.lognormal(0, 0.5, len(source)) + 1)
    text = told + turns * (question * rng.lognormal(0, 0.4, len(source)) + 8)
    before = 36 + image_tokens * (source > 0)
    kept = np.minimum(1, (2048 - before) / text)  # of the text
    words = text * 0.75 * rng.lognormal(0, 0.1, len(source))
    return Samples((before + kept * text).astype(int), np.maximum(1, kept * told).astype(int),
                   words.astype(int), source > 0, source)


def read(o):
    """The Samples of a file of conversations."""
    layout = PromptFormat(system=SYSTEM, image_tokens=o.image_tokens)
    data = Conversations(o.data, "/", Tokenizer.load(resolve(o.llm)), layout)
    if len(data) < o.batch_size:
        raise UserError(f"--data {o.data}: {len(data)} records, fewer than --batch_size "
                        f"{o.batch_size}")
    samples = [data[i] for i in range(len(data))]
    found = [(len(s.ids), (s.labels != IGNORE).sum()) for s in samples]
    words = [sum(len(message["value"].split()) for message in data.record(i)["conversations"])
             for i in range(len(data))]
    return Samples(*np.array(found).T, np.array(words), data.has_image, np.zeros(len(data), int))


def llava_order(words, has_image, size, parts):
    """LLaVA's --group_by_modality_length (llava/train/llava_trainer.py); its megabatch is a step.

    Records with and without a picture are grouped apart: shuffled, cut into steps, each sorted by
    words and dealt to `parts` micro-batches of one size so that their sums are similar. The last
    step of each kind, full or not, comes at the end, cut as it is.
    returns  [[int64[m], ...], ...]: the micro-batches of the whole steps of an epoch
    """
    rng, steps, left = np.random.default_rng(0), [], []
    for kind in (True, False):
        order = rng.permutation(np.flatnonzero(has_image == kind))
        *cuts, last = np.split(order, range(size, len(order), size))
        left.append(last)
        for rows in cuts:
            chunks, sums = [[] for _ in range(parts)], np.zeros(parts)
            for i in rows[np.argsort(-words[rows])]:
                to = sums.argmin()
                chunks[to].append(i)
                sums[to] += words[i] if len(chunks[to]) < size // parts else np.inf  # full
            steps.append(np.array(chunks))
    rest = np.sort(np.concatenate(left))
    rest = rest[:len(rest) // size * size].reshape(-1, parts, size // parts)
    return [*(steps[i] for i in rng.permutation(len(steps))), *rest]


def our_order(samples, order, size, parts):
    """The same for our --order length (with exact lengths) or modality."""
    lengths = samples.lengths if order == "length" else None
    rows = BatchSampler(len(samples.words), 0, size, lengths, samples.has_image).epoch(0)
    return [[step[part] for part in deal(padded(samples.lengths[step]), parts)]
            for step in rows[:len(rows) // size * size].reshape(-1, size)]


def judge(samples, steps, ranks):
    """{figure: value} of an epoch's steps, [[int64[m], ...], ...]: the micro-batches of each.

    padding    share of the positions
    slowest    positions of the slowest of the ranks that work at the same time, over their mean
    time       the same, over what their mean would be without padding
    peak       most positions in a micro-batch
    tokens     supervised tokens of a step, (fewest, most)
    commonest  share of the samples of a step that its commonest source has, mean over steps
    sources    share of each source in the gradient, float64[n]: a step's loss is a mean over its
               tokens, and with Adam each step counts alike
    """
    sizes = np.array([[len(m) * padded(samples.lengths[m].max()) for m in step] for step in steps])
    slowest = sizes.reshape(len(steps), -1, ranks).max(-1).sum() * ranks
    rows = [np.concatenate(step) for step in steps]
    real = sum(samples.lengths[r].sum() for r in rows)
    tokens = [samples.supervised[r].sum() for r in rows]
    weights = [np.bincount(samples.source[r], samples.supervised[r] / n, samples.source.max() + 1)
               for r, n in zip(rows, tokens)]
    return {"padding": 1 - real / sizes.sum(), "slowest": slowest / sizes.sum(),
            "time": slowest / real, "peak": sizes.max(), "tokens": (min(tokens), max(tokens)),
            "commonest": np.mean([np.bincount(samples.source[r]).max() / len(r) for r in rows]),
            "sources": np.mean(weights, axis=0)}


def run():
    o = Options(**parse(Options))
    samples, size = read(o) if o.data else made_up(o.image_tokens), o.batch_size
    parts = size // o.micro_batch_size
    orders = {"LLaVA's": llava_order(samples.words, samples.has_image, size, parts)}
    orders |= {name: our_order(samples, name, size, parts) for name in ("length", "modality")}
    found = {name: judge(samples, steps, o.ranks) for name, steps in orders.items()}
    print("| order | padding | slowest rank | time | positions | tokens of a step "
          "| commonest source | weight of sources |")
    for name, f in found.items():
        share = f["sources"] / found["LLaVA's"]["sources"]
        print(f"| {name} | {f['padding']:.1%} | {f['slowest']:.2f} | {f['time']:.2f} "
              f"| {f['peak']:,} | {f['tokens'][0]:,}–{f['tokens'][1]:,} | {f['commonest']:.0%} "
              f"| {share.min():.2f}–{share.max():.2f} |")


if __name__ == "__main__":
    main(run)
