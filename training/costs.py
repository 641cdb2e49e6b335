"""How many floating-point operations a model takes: as the VLoRA paper counts them, and as they are.

A product of m x k and k x n is 2 m k n; all else (norms, softmax, sums) is left out, as by torch's FlopCounterMode.
Letters are explained at the top of model.py.
"""
import dataclasses

import torch

from baselines import is_guided, weight_source
from vlora import VLoRAConfig


def paper_flops(text=32, visual=576, width=4096, depth=32, changed=8, rank=64):
    """The GFLOPs of the Llama in arXiv 2405.20339, §3.4 and Appendix A: of h = width, C = text, L = visual tokens.

    They assume an FFN of two matrices, h x 4h and 4h x h, each with a ΔW, and no grouped queries; generators, CLIP and
    head are left out. Forming ΔW (24 k r h h) is counted for training too, where the code never does it.
    12 C k h h is printed as FLOPs, but counts a multiplication and an addition as one.

    text      the Llama on the text alone
    llava     on the text and the visual tokens
    table     VLoRA in Table 1: the text, and ΔW is formed
    merged    the same, and added to W: inference by the paper's formula
    branches  training by the paper's formula
    """
    h, d, C, k = width, depth, text, changed
    llama = lambda T: 24 * T * d * h ** 2 + 4 * T ** 2 * d * h
    form = 24 * k * rank * h ** 2
    found = dict(text=llama(C), llava=llama(C + visual), table=llama(C) + form,
                 merged=llama(C) + form + 12 * k * h ** 2,
                 branches=llama(C) + form + 12 * C * k * h ** 2 + 14 * C * k * h)
    return {name: count / 1e9 for name, count in found.items()}


def transformer(T, width, kv_width, hidden, matrices):
    """One block: q and o width x width, k and v width x kv_width, attention over T x T, an FFN of so many matrices."""
    return 4 * T * width * (width + kv_width) + 4 * T ** 2 * width + 2 * matrices * T * width * hidden


def expert(source, guide, inputs, outputs, embed, rank):
    """(of generating the weights of an expert once, of running it on one token), by the source of its weights."""
    size = inputs * outputs if source == "mlp" else rank * (2 * inputs + outputs)  # numbers that it runs with
    encoder = {"hyper": 2 * guide * embed, "mlp": 2 * guide * embed, "latent": 0}
    return 2 * embed ** 2 + 2 * embed * size + encoder[source] if source in encoder else 0, 2 * size


def lora(llm, rank):
    """LoRA beside the seven linears of a block, for one token."""
    D, kv, F = llm.width, llm.width * llm.kv_heads // llm.heads, llm.hidden
    return 2 * rank * (2 * 2 * D + 2 * (D + kv) + 3 * (D + F))


def tuning(cfg, tokens, guidances):
    """Language experts, their weights generated so many times, or LoRA, on so many tokens."""
    llm, R = cfg.llm, cfg.expert_rank
    if weight_source(cfg) == "lora":
        return len(cfg.expert_blocks()) * tokens * lora(llm, R)
    weights, run = expert(weight_source(cfg), llm.width, llm.width, llm.width, cfg.expert_embed, R)
    return len(cfg.expert_blocks()) * (guidances * weights + tokens * run)


def token_flops(cfg, length):
    """FLOPs of one further token of an answer, which attends to `length` positions; weights that were generated are kept."""
    llm, D = cfg.llm, cfg.llm.width
    count = llm.depth * (transformer(1, D, D * llm.kv_heads // llm.heads, llm.hidden, 3) + 4 * (length - 1) * D) + 2 * D * llm.vocab
    if isinstance(cfg, VLoRAConfig):
        return count + len(cfg.vlora.sites) * len(cfg.vlora.blocks(llm)) * 4 * D * cfg.vlora.rank
    return count + tuning(cfg, 1, 0)


def flops(cfg, text, turns=1, at=None):
    """FLOPs of one forward pass over a picture and `text` tokens, without a cache; the same for each row of a batch.

    (But for latent weights, which are generated once for all rows.)

    cfg      VLMConfig; without experts it is LLaVA's
    turns    U
    at       positions P whose logits are computed; None: all
    returns  dict of vision, projector, llm, experts and head; for VLoRA generator and branches instead of projector, experts
    """
    vision, llm, vlora, N = cfg.vision, cfg.llm, getattr(cfg, "vlora", None), cfg.vision.tokens
    C, D = vision.width, llm.width
    T = text + cfg.image_tokens
    count = {"vision": 2 * N * C * 3 * vision.patch ** 2 + vision.depth * transformer(N + 1, C, C, vision.hidden, 2),
             "llm": llm.depth * transformer(T, D, D * llm.kv_heads // llm.heads, llm.hidden, 3),
             "head": 2 * (T if at is None else at) * D * llm.vocab}
    if vlora:
        Q, W, sites = len(vlora.blocks(llm)), vlora.embed, len(vlora.sites)
        cross = 4 * Q * W ** 2 + 4 * N * W ** 2 + 4 * Q * N * W  # q and o of the queries, k and v of the patches
        block = transformer(Q, W, W, 4 * W, 2) + cross
        count["generator"] = 2 * N * C * W + sites * (vlora.depth * block + 2 * Q * W * D * vlora.rank)
        count["branches"] = sites * Q * 4 * T * D * vlora.rank
        return count
    count["projector"] = 2 * N * D * (C + D)
    guided = is_guided(cfg)
    U = turns if guided else 1  # all tokens go through the weights of all turns
    visual = [width for which, width in (("1", C), ("2", D)) if cfg.visual_expert in (which, "both")]
    found = [expert(weight_source(cfg), width, width, D, cfg.expert_embed, cfg.expert_rank) for width in visual]
    count["experts"] = sum(weights + N * run for weights, run in found)
    count["experts"] += tuning(cfg, U * T, U) + bool(cfg.expert_blocks()) * guided * 2 * U * T * D  # and the pooling
    return count


# Dense bf16 operations per second, from NVIDIA's data sheets, by the device's whole name or what comes before a "-" in it.
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12, "NVIDIA A100": 312e12,
        "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA A10G": 70e12,
        "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}


def peak_rate(o):
    """Operations per second that the device can do in this dtype, or None where that is not known."""
    if o.device != "cuda" or o.dtype != "bfloat16":
        return None
    return PEAK.get(torch.cuda.get_device_name().split("-")[0])


def operations(model, batch, trains_llm):
    """Multiplications and additions that a VLM's step needs for a batch, without padding or what checkpointing repeats.

    A product with P weights takes 2 P a position forwards and 2 P for the gradient of its input, and as much again for that
    of trained weights. The frozen tower only goes forwards; a frozen Llama passes gradients on. Attention is causal.
    """
    l = model.cfg.llm
    passes = 3 if trains_llm else 2
    n, square, turns = batch.lengths.sum().item(), (batch.lengths ** 2).sum().item(), batch.ids.shape[0] * batch.turns
    kv = l.kv_heads * (l.width // l.heads)
    block = l.width * (2 * l.width + 2 * kv + 3 * l.hidden)
    found = l.depth * (passes * 2 * n * block + 3 * 2 * square * l.width) + passes * 2 * batch.trained * l.width * l.vocab
    found += 3 * tuning(model.cfg, n, turns if is_guided(model.cfg) else 1)
    count, pictures = flops(dataclasses.replace(model.cfg, language_expert="none"), 1), len(batch.visual)
    if batch.visual.ndim == 4:
        found += pictures * count["vision"]
    if isinstance(model.cfg, VLoRAConfig):
        return found + 3 * (pictures * count["generator"] + n * count["branches"])
    return found + 3 * pictures * (count["projector"] + count["experts"])
