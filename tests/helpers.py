"""What several test files use: small random models, conversations, pictures, ways to run them."""
import contextlib
import dataclasses
from collections import Counter

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn.attention import sdpa_kernel, SDPBackend
from torch.utils.flop_counter import FlopCounterMode

import formats.tokenizer
import model
from data import (collate, encode, encode_prompt, IGNORE, IMAGE, pixels, Preprocess,
                  PromptFormat)
from hypernet import Expert, HyperNetwork
from model import Batch, LlamaConfig, VisionConfig, VLM, VLMConfig

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)  # more threads make tiny products slower


# ---- A small HyperLLaVA and its conversations


TURNS = [("<image>\nWhat colour is the circle?", "a red one."),
         ("Is there a square?", "yes, two of them."), ("How many?", "three.")]
TEXTS = [f"USER: {q} ASSISTANT: {a}" for q, a in TURNS] * 2
TOKENIZER = formats.tokenizer.train_tokenizer(TEXTS, 400)
LAYOUT = PromptFormat(system="A chat.", image_tokens=4, context=200)
VISION = VisionConfig(image_size=28, patch=14, width=16, depth=2, heads=2, hidden=24)
LLAMA = LlamaConfig(width=32, depth=4, heads=4, kv_heads=2, hidden=48, vocab=TOKENIZER.vocab,
                    context=200)
EVERY = dict(visual_expert="both", language_expert="all")


KINDS = {  # the fields of VLMConfig that say where experts sit and where guidance is taken
    "posterior": dict(visual_expert="1"),
    "posterior, block 1": dict(visual_expert="both", guidance_after=1),
    "posterior, block 3": dict(visual_expert="2", guidance_after=3),
    "posterior, embeddings": dict(guidance_after=0),
    "all": EVERY,
    "anterior": dict(visual_expert="none", language_expert="anterior"),
}


def config(**kind):
    return VLMConfig(VISION, LLAMA, **{"expert_embed": 8, "expert_rank": 4, **kind})


def trained(dtype=torch.float64, seed=0, **kind):
    """A random VLM in which every part matters: attention is far from uniform, and experts add as
    much as the FFN does."""
    torch.manual_seed(seed)
    model = VLM(config(**kind)).to(dtype).eval()
    for block in [*model.vision.layers, *model.llm.layers]:
        for part in block.self_attn.children():
            torch.nn.init.normal_(part.weight, std=(2 / part.in_features) ** 0.5)
    for part in model.modules():
        if isinstance(part, (HyperNetwork, Expert)):
            up = part.up.weight if isinstance(part, HyperNetwork) else part.up
            torch.nn.init.normal_(up, std=1.0 if isinstance(part, HyperNetwork) else 0.5)
    return model


def pictures(n, dtype=torch.float64, seed=1):
    """Random pixels, a list of n float[3, 28, 28]."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(n, 3, 28, 28, generator=generator).to(dtype))


def conversations(layout=LAYOUT):
    """Three Samples: three turns about a picture, two turns without one, one turn about another."""
    text = [("How many?", "two."), ("What colour is there?", "a red one, a circle.")]
    return [encode(TURNS, TOKENIZER, layout, "three turns", "a.png"),
            encode(text, TOKENIZER, layout, "text"),
            encode([("<image>\nIs there a circle?", "yes.")], TOKENIZER, layout, "one turn",
                   "b.png")]


def batch_of(samples, visual, dtype=torch.float64):
    batch = collate(samples, visual, (3, 28, 28))
    batch.visual = batch.visual.to(dtype)
    return batch


def whole_batch(**layout):
    return batch_of(conversations(dataclasses.replace(LAYOUT, **layout)), pictures(2))


def logits_of(model, batch):
    """float[B, T, V], at all positions."""
    return model(dataclasses.replace(batch, at=None))


def close(a, b, tolerance=1e-6):
    """Whether a is b within a fraction of the range of b. Guidance is pooled in fp32 in every
    model, so an fp64 model reaches 1e-6."""
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * (b.max() - b.min())


def new_weights(model):
    """{name: parameter} of all that experts add to LLaVA."""
    return {name: p for name, p in model.named_parameters()
            if any(word in name for word in ("expert", "hypernet", "guidance"))}


def size(module):
    """Its number of parameters."""
    return sum(p.numel() for p in module.parameters())


def segments(found):
    """(prompt, answer) slices of each turn of a Sample."""
    for turn in range(found.turns):
        own = (found.use_id == turn).nonzero()[0]
        first = own[found.labels[own] != IGNORE][0]
        yield slice(int(own[0]), int(first)), slice(int(first), int(own[-1]) + 1)


def by_steps(model, samples, visual, length):
    """Logits of samples as generation computes them, [float[T_b, V], ...]; all have as many turns.

    Turn by turn in one cache: first the prompts, padded on the right, then token by token the
    answers with their end tokens. A row whose answer has ended waits for the others.
    """
    cache = model.new_cache(len(samples), "cpu", model.llm.norm.weight.dtype)
    cache.reserve(length)
    logits = [[] for _ in samples]
    for turn, spans in enumerate(zip(*map(segments, samples))):
        prompts = [torch.from_numpy(s.ids[prompt]) for s, (prompt, _) in zip(samples, spans)]
        pooled = [torch.from_numpy((s.pool_id[prompt] == turn) - 1)
                  for s, (prompt, _) in zip(samples, spans)]
        used = [torch.zeros_like(prompt) for prompt in prompts]
        ids, pool_id, use_id = (torch.nn.utils.rnn.pad_sequence(rows, True, fill)
                                for rows, fill in ((prompts, 0), (pooled, -1), (used, -1)))
        new = torch.tensor([len(p) for p in prompts])
        image_at = (ids == IMAGE).flatten().nonzero()[:, 0]
        out = model(Batch(ids.clamp(min=0), new, pool_id, use_id, image_at=image_at,
                          visual=visual if len(image_at) else None), cache)
        for row, found, n in zip(logits, out, new):
            row += found[:n]
        texts = [torch.from_numpy(s.ids[answer]) for s, (_, answer) in zip(samples, spans)]
        for step in range(max(map(len, texts))):
            new = torch.tensor([int(step < len(text)) for text in texts])
            ids = torch.stack([text[min(step, len(text) - 1)] for text in texts])[:, None]
            out = model(Batch(ids, new), cache)
            for row, found, n in zip(logits, out, new):
                row += found[:n]
    return [torch.stack(row) for row in logits]


def static(model):
    """LLaVA with the weights of `model` and no experts."""
    plain = VLM(config(visual_expert="none", language_expert="none"))
    plain.to(model.llm.norm.weight.dtype)
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain.eval()


PROMPTS = [  # (turns before, question, picture)
    ([], TURNS[0][0], "a.png"), ([], "How many?", None),
    (TURNS[:2], "What colour is the square?", "b.png"), ([], "Is there?", "c.png"),
    ([("How many?", "two.")], "Is there a red square?", None)]


def prompts(chosen=range(len(PROMPTS))):
    """The Batch of some of PROMPTS, in fp32."""
    look = dict(zip(("a.png", "b.png", "c.png"), pictures(3, torch.float32)))
    samples = [encode_prompt(*PROMPTS[i][:2], TOKENIZER, LAYOUT, PROMPTS[i][2]) for i in chosen]
    return batch_of(samples, [look[s.image] for s in samples if s.image], torch.float32)


# ---- Chats


def noise(seed, size=(40, 30)):
    """A random picture, as a PIL image."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(values)


def look(image, dtype=torch.float32):
    """Pixels float[3, 28, 28] of a PIL image."""
    return pixels(image, Preprocess(28)).to(dtype)


@contextlib.contextmanager
def dictated(tokens):
    """Within this context the model answers with the given tokens, int64[B] each; yields the list
    of logits that they were chosen at."""
    seen, tokens, real = [], iter(tokens), model.sample_token
    model.sample_token = lambda logits, *_: seen.append(logits.clone()) or next(tokens)
    try:
        yield seen
    finally:
        model.sample_token = real


def ask_dictated(chat, question, ids, cut=False):
    """Logits float[P, V] of an answer that is dictated, its end token included unless it is cut."""
    ids = ids if cut else ids + [TOKENIZER.eos]
    chat.o = dataclasses.replace(chat.o, max_new_tokens=len(ids))
    with dictated(torch.tensor([i]) for i in ids) as seen:
        list(chat.ask(question))
    return torch.cat(seen)


@contextlib.contextmanager
def counted(vlm):
    """Yields a Counter of the tokens that the Llama runs and the pictures that the tower runs."""
    count = Counter()
    text, tower = vlm.llm.embed_tokens, vlm.vision
    handles = [text.register_forward_hook(lambda m, x, y: count.update(tokens=x[0].numel())),
               tower.register_forward_hook(lambda m, x, y: count.update(pictures=len(x[0])))]
    yield count
    for handle in handles:
        handle.remove()


# ---- Counting operations


TOWER = VisionConfig(image_size=56, patch=14, width=24, depth=2, heads=2, hidden=72)
GROUPED = LlamaConfig(width=64, depth=4, heads=4, kv_heads=2, hidden=80, vocab=50)
EVEN = LlamaConfig(width=32, depth=3, heads=2, kv_heads=2, hidden=100, vocab=70, tied=True)


def row_of_text(cfg, text, rows=1, turns=1, at=None):
    """A Batch of `rows` rows, each with a picture of TOWER's size and so many tokens of text.

    at  number of positions with logits in all; None: all positions
    """
    T = cfg.image_tokens + text
    ids, turn = torch.ones(rows, T, dtype=torch.int64), torch.zeros(rows, T, dtype=torch.int64)
    image_at = torch.arange(rows * T).view(rows, T)[:, :cfg.image_tokens].flatten()
    return Batch(ids, torch.full((rows,), T), turn, turn, turns, torch.randn(rows, 3, 56, 56),
                 image_at, None if at is None else torch.arange(at), picture=torch.arange(rows),
                 tag=torch.full((rows,), -1))


def count_flops(run, *parts):
    """torch's count for run(): {module: {operation: FLOPs}}; "Global" is the whole.

    parts  the models that it runs
    """
    for part in parts:  # the counter fails on views of parameters that require gradients
        part.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()


# ---- transformers' models


def randomised(reference):
    """The model with random values everywhere, so that no bias or norm is neutral; large enough for
    clear greedy choices."""
    for name, p in sorted(reference.named_parameters()):
        values = torch.randn_like(p) * (2 / p.shape[-1]) ** 0.5
        p.data = 1 + 0.2 * values if "norm" in name and name.endswith("weight") else values
    return reference.eval()


CLIPS = [
    dict(image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
         intermediate_size=48),
    dict(image_size=40, patch_size=8, hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
         intermediate_size=64),
]


LLAMAS = [
    dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
         num_key_value_heads=4),
    dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6,
         num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-4,
         rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    dict(hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=8,
         num_key_value_heads=1),
]


def hf_clip(seed=0, **kind):
    """A small CLIPVisionModel; `kind`: fields of its config beside CLIPS[0]."""
    torch.manual_seed(seed)
    cfg = transformers.CLIPVisionConfig(**{**CLIPS[0], **kind})
    return randomised(transformers.CLIPVisionModel(cfg))


def hf_llama(seed=0, **kind):
    """A small LlamaForCausalLM; `kind`: fields of its config beside LLAMAS[0]."""
    torch.manual_seed(seed + 100)
    more = {"vocab_size": 300, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
    cfg = transformers.LlamaConfig(**{**LLAMAS[0], **more, **kind})
    return randomised(transformers.LlamaForCausalLM(cfg))


def check_causal(labels, pool_id, use_id):
    """Raise AssertionError if a trained position could see later text through its guidance.

    All int64[B, T], labels not shifted. Position i predicts i + 1. If that is trained, no position
    up to i may use guidance that includes a position after i.
    """
    rows = zip(labels.tolist(), pool_id.tolist(), use_id.tolist())
    for b, (label, pool, use) in enumerate(rows):
        pool_end = {turn: j for j, turn in enumerate(pool) if turn >= 0}  # last position per turn
        latest = -1
        for i in range(len(label) - 1):
            latest = max(latest, pool_end.get(use[i], -1))
            assert label[i + 1] == IGNORE or latest <= i, \
                f"row {b}: position {i} is trained, but its guidance reaches to position {latest}"
