"""How many floating-point operations a model takes: as the VLoRA paper counts them, and as they are.

A product of m x k and k x n is 2 m k n; all else (norms, softmax, sums) is left out, as by torch's FlopCounterMode.
Letters are explained at the top of model.py.
"""


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


def expert(T, guide, inputs, outputs, embed, rank, turns=1):
    """A generated adapter: its weights, once a turn, and its run. All tokens go through the weights of all turns."""
    weights = turns * (2 * guide * embed + 2 * embed ** 2 + 2 * embed * rank * (2 * inputs + outputs))
    return weights + turns * 2 * T * rank * (2 * inputs + outputs)


def flops(cfg, text, turns=1, at=None, vlora=None):
    """FLOPs of one forward pass over a picture and `text` tokens, without a cache; the same for each row of a batch.

    cfg      VLMConfig; without experts it is LLaVA's
    turns    U
    at       positions P whose logits are computed; None: all
    vlora    VLoRAConfig: its generator takes the place of projector and experts, and the picture no position
    returns  dict of vision, projector (or generator), llm, experts (or branches) and head
    """
    vision, llm, N, E, R = cfg.vision, cfg.llm, cfg.vision.tokens, cfg.expert_embed, cfg.expert_rank
    C, D = vision.width, llm.width
    T = text if vlora else text + N
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
    count["experts"] = expert(N, C, C, D, E, R) * (cfg.visual_expert in ("1", "both"))
    count["experts"] += expert(N, D, D, D, E, R) * (cfg.visual_expert in ("2", "both"))
    blocks = len(cfg.expert_blocks())
    count["experts"] += blocks * expert(T, D, D, D, E, R, turns) + bool(blocks) * 2 * turns * T * D  # and the pooling
    return count
