"""What must hold on every device and in every dtype, with random models: parity with transformers,
causality, cached = uncached, batched = single, captured = eager.

In fp32 two ways must give the same logits. In bf16 a way may be wrong, against fp32, by little more
than the plain one is.
"""
import copy
import dataclasses
import importlib.util

import numpy as np
import torch
from torch import nn

from data import IGNORE
from experiments.speed.shapes import (build, build_theirs, config, conversation, EXPERTS,
                                      NO_EXPERTS, pictures, their_batch)
from hypernet import Expert, HyperNetwork
from inference.captured import CapturedStep
from model import Batch, generate
from sample import make_batch

SAME = 1e-4  # of the range: what another order of additions may change in fp32
UNMOVED = 1e-6  # of the range, for logits that must not change at all
MORE = 1.5   # times the error of the plain way in bf16
TURNS, DECODED = 3, 12
DTYPES = torch.float32, torch.bfloat16


def claim(what, dtype, value, bound, sense="at most"):
    """A row: whether `value` is at most, or at least, `bound`."""
    value = float(value)
    fine = value <= bound if sense == "at most" else value >= bound
    name = str(dtype).removeprefix("torch.")
    print(f"{'  ' if fine else '! '}{what}, {name}: {value:.2g}, {sense} {bound:.2g}", flush=True)
    return {"what": what, "dtype": name, "value": value, "bound": bound, "sense": sense, "ok": fine}


def distance(a, b):
    """The largest difference, as a share of the range of b."""
    return ((a - b).abs().max() / (b.max() - b.min())).item()


def error(found, exact):
    """The mean difference, as a share of the range of `exact`."""
    return ((found - exact).abs().mean() / (exact.max() - exact.min())).item()


def same(what, dtype, found, plain, exact):
    """The row of two ways to compute the same logits; `exact`: the plain way in fp32."""
    if dtype == torch.float32:
        return claim(what, dtype, distance(found, plain), SAME)
    return claim(what, dtype, error(found, exact), MORE * error(plain, exact))


def random_experts(model):
    """The model with random up-projections: the paper's zeros would hide all leaks."""
    torch.manual_seed(1)
    for part in model.modules():
        if isinstance(part, HyperNetwork):
            nn.init.normal_(part.up.weight)
        elif isinstance(part, Expert):
            nn.init.normal_(part.up, std=0.5)
    return model


def keep(sample, places, **changed):
    """The sample's tokens at some places, bool[T], as a single turn."""
    cut = {name: getattr(sample, name)[places] for name in ("ids", "labels", "pool_id", "use_id")}
    return dataclasses.replace(sample, turns=1, **cut | changed)


def samples_of(o):
    """Three conversations of several turns and other lengths, and their pictures."""
    cfg, rng = config(o.size), np.random.default_rng(0)
    some = [conversation(cfg, rng, turns=TURNS, asked=10 + 6 * i, answered=3 + i) for i in range(3)]
    return some, pictures(3, o)


# ---- Ours


def answered(model, samples, visual):
    """Logits float32[P, V] at the supervised positions, row by row."""
    return model(make_batch(samples, visual, model)).float()


def by_turns(model, sample, picture):
    """The same of one sample, decoded token by token, turn by turn, in a cache."""
    weight, found = model.llm.embed_tokens.weight, []
    cache = model.new_cache(1, weight.device, weight.dtype)
    for turn in range(sample.turns):
        own = sample.use_id == turn
        new = own & (sample.labels == IGNORE)
        image = None if turn else sample.image
        prompt = keep(sample, new, image=image, use_id=np.zeros(new.sum(), int),
                      pool_id=np.where(sample.pool_id[new] == turn, 0, -1))
        batch = make_batch([prompt], [picture] if image else [], model)
        cache.reserve(int(own.sum()))
        logits = model(dataclasses.replace(batch, at=batch.lengths - 1, lengths=None), cache)
        for token in batch.ids.new_tensor(sample.ids[own & ~new]):
            found.append(logits.clone())  # a captured step writes the next ones into it
            logits = model.step(Batch(token.view(1, 1), None), cache)[:, 0]
    return torch.cat(found).float()


def ways(model, samples, visual):
    """{way: logits float32[P, V] of the answers}: all must be the same. Also the captured model."""
    captured = copy.copy(model)
    captured.step = CapturedStep(captured)
    rows = list(zip(samples, visual))
    found = {"batched": answered(model, samples, visual),
             "single": torch.cat([answered(model, [s], [x]) for s, x in rows]),
             "cached": torch.cat([by_turns(model, s, x) for s, x in rows])}
    first = by_turns(captured, *rows[0])
    replay = captured.step.replay
    found["captured"] = torch.cat([first] + [by_turns(captured, s, x) for s, x in rows[1:]])
    assert captured.step.replay is replay, "captured anew for another prompt length"
    return found, captured


def tokens_differ(model, captured, samples, visual):
    """How many greedy tokens after the first prompts depend on the batch, or on the capture."""
    firsts = [keep(s, np.arange(len(s.ids)) < np.argmax(s.labels != IGNORE)) for s in samples]
    together = make_batch(firsts, visual, model)
    wanted = generate(model, together, DECODED, -1)
    found = [generate(model, make_batch([s], [x], model), DECODED, -1)[0]
             for s, x in zip(firsts, visual)]
    return [int((np.array(some) != np.array(wanted)).sum())
            for some in (found, generate(captured, together, DECODED, -1))]


def leaks(model, samples, visual, pool_over_answers=False):
    """For each token of an answer, how far another token there moves logits that come before it or
    that belong to another row: float64[P], shares of the range.
    """
    batch = make_batch(samples, visual, model)
    places = [(b, p) for b, s in enumerate(samples) for p in np.flatnonzero(s.labels != IGNORE)]
    if pool_over_answers:
        batch.pool_id = batch.use_id
    batch.at = None
    before, found = model(batch).float(), []
    for b, p in places:
        ids = batch.ids.clone()
        ids[b, p] = (ids[b, p] + 7) % (model.cfg.llm.vocab - 1)
        moved = (model(dataclasses.replace(batch, ids=ids)).float() - before).abs().amax(-1)
        assert moved[b, p] > 0, "a token that changes nothing proves nothing"
        moved[b, p:] = 0
        found.append((moved.max() / (before.max() - before.min())).item())
    return np.array(found)


@torch.no_grad()
def our_rows(o):
    """The rows of what we claim about our own model."""
    exact, (samples, visual) = random_experts(build(EXPERTS, o)), samples_of(o)
    plain = None
    for dtype in DTYPES:
        model = copy.deepcopy(exact).to(dtype)
        found, captured = ways(model, samples, visual)
        plain = found["batched"] if plain is None else plain
        for a, b in (("single", "batched"), ("cached", "batched"), ("captured", "cached")):
            yield same(f"{a} = {b}", dtype, found[a], found[b], plain)
        if dtype == torch.float32:
            counts = tokens_differ(model, captured, samples, visual)
            for words, count in zip(("a batch", "a captured step"), counts):
                yield claim(f"greedy tokens that depend on {words}", dtype, count, 0)
        yield claim("an answer moves logits before it", dtype,
                    leaks(model, samples, visual).max(), UNMOVED)
        control = np.median(leaks(model, samples, visual, pool_over_answers=True))
        yield claim("the same, pooled over answers (negative control)", dtype, control, SAME,
                    "at least")


# ---- transformers


def both(model, theirs, o):
    """{part: (our values, theirs)}, float32: of CLIP, of a text, of a text with its picture."""
    samples, visual = samples_of(o)
    text = [keep(s, s.ids >= 0, image=None) for s in samples]
    pixels = torch.stack(visual).to(o.device, o.torch_dtype)
    states = theirs.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    found = {"CLIP": (model.features(pixels), states[-2][:, 1:])}
    for name, some, seen in (("Llama", text, []), ("LLaVA", samples, visual)):
        batch = make_batch(some, seen, model)
        inputs, _ = their_batch(some, visual, o)
        if not seen:
            del inputs["pixel_values"]
        found[name] = model(batch), theirs(**inputs).logits.flatten(0, 1)[batch.at]
    return {name: [x.float() for x in sides] for name, sides in found.items()}


@torch.no_grad()
def their_rows(o):
    """The rows of parity, without experts. In bf16 our error is compared with theirs."""
    parts = "CLIP", "Llama", "LLaVA"
    if importlib.util.find_spec("transformers") is None:
        print("parity is left out: there is no transformers")
        yield from ({"what": f"parity with transformers, {part}", "ok": None} for part in parts)
        return
    model = build(NO_EXPERTS, o)
    exact = both(model, build_theirs(o, model), o)
    for part, (ours, other) in exact.items():
        yield same(f"parity with transformers, {part}", torch.float32, ours, other, None)
    half = dataclasses.replace(o, dtype="bfloat16")
    found = both(model.bfloat16(), build_theirs(half, model), half)
    for part in parts:
        ours, other = found[part]
        yield same(f"parity with transformers, {part}", torch.bfloat16, ours, other, exact[part][1])


def rows(o):
    """All rows, in fp32 and bf16; `o.dtype` is float32."""
    torch.backends.cudnn.allow_tf32 = False  # else the first layer of CLIP is not fp32 on cuda
    yield from our_rows(o)
    yield from their_rows(o)
