"""What a model costs: FLOPs of a forward pass, a token, a training step, and its generated weights.

A product of an m x k and a k x n matrix takes 2 m k n FLOPs: m k n multiplications and as many
additions. Everything else (norms, softmax, sums) is left out, as in torch's FlopCounterMode.
For letters see the top of hypernet.py. Memory is in plan.py; experiments/report.py
prints both.
"""
import torch

from baselines import GUIDED, source_of
from vlora import VLoRAConfig

GENERATED = ("hyper", "mlp", "latent")  # sources with a hypernetwork


def vlora_of(cfg):
    """The GeneratorConfig of a VLoRA; None for every other model."""
    return cfg.vlora if isinstance(cfg, VLoRAConfig) else None


# ---- Numbers of weights


def kv_width(llm):
    """Width of keys and values: less than D with grouped queries."""
    return llm.kv_heads * (llm.width // llm.heads)


def block_weights(width, kv_width, hidden, matrices):
    """Weights in a block's matrices: q, k, v, o of attention, and an FFN of 2 or 3 matrices."""
    return 2 * width * (width + kv_width) + matrices * width * hidden


def llama_weights(llm):
    """Weights in the matrices of all blocks, without embeddings and head."""
    return llm.depth * block_weights(llm.width, kv_width(llm), llm.hidden, 3)


def lora_weights(llm, rank):
    """Weights of LoRA on the seven linear layers of one block."""
    D = llm.width
    return rank * (2 * 2 * D + 2 * (D + kv_width(llm)) + 3 * (D + llm.hidden))


def expert_weights(source, inputs, outputs, rank):
    """Weights that an expert runs with: W_d and W_u, or the whole matrix of "mlp"."""
    return inputs * outputs if source == "mlp" else rank * (2 * inputs + outputs)


def made_weights(source, inputs, outputs, rank):
    """Numbers that are generated for one expert."""
    if source == "gates":
        return rank
    return expert_weights(source, inputs, outputs, rank) if source in GENERATED else 0


def visual_widths(cfg):
    """The width of the input of each visual expert, list[int]."""
    C, D = cfg.vision.width, cfg.llm.width
    return {"none": [], "1": [C], "2": [D], "both": [C, D]}[cfg.visual_expert]


def generated_weights(cfg):
    """Weights that are generated for one picture and one turn, in the whole model."""
    vlora, source, D = vlora_of(cfg), source_of(cfg), cfg.llm.width
    if vlora:
        return len(vlora.sites) * len(vlora.blocks(cfg.llm)) * D * vlora.rank
    widths = visual_widths(cfg) + [D] * len(cfg.expert_blocks())
    return sum(made_weights(source, width, D, cfg.expert_rank) for width in widths)


# ---- FLOPs of the parts


def attention_flops(pairs, width):
    """Scores and the weighted sum of values, for so many pairs of a query and a key position."""
    return 4 * pairs * width


def expert_flops(cfg, inputs, tokens, generations):
    """One expert on so many tokens, its weights generated so many times; or LoRA in its place.

    inputs   width of the expert's input and of its guidance
    """
    E, R, source = cfg.expert_embed, cfg.expert_rank, source_of(cfg)
    if source == "lora":
        return 2 * tokens * lora_weights(cfg.llm, R)
    weights = expert_weights(source, inputs, cfg.llm.width, R)
    encoder = inputs * E if source in GUIDED else 0                              # Eq. 3
    trunk = E ** 2 if source in GENERATED else 0                                 # Eq. 4
    generating = encoder + trunk + E * made_weights(source, inputs, cfg.llm.width, R)
    return 2 * (tokens * weights + generations * generating)


def added_flops(cfg, tokens, generations):
    """What is added to the Llama's own blocks: VLoRA's branches, language experts, or LoRA."""
    if vlora_of(cfg):
        return 4 * tokens * generated_weights(cfg)
    return len(cfg.expert_blocks()) * expert_flops(cfg, cfg.llm.width, tokens, generations)


def generator_flops(cfg):
    """VLoRA: from CLIP's features of one picture to its generated weights."""
    vlora, N = vlora_of(cfg), cfg.vision.tokens
    Q, E = len(vlora.blocks(cfg.llm)), vlora.embed
    block = 2 * Q * block_weights(E, E, 4 * E, 2) + attention_flops(Q * (Q + N), E)
    block += 4 * (Q + N) * E ** 2  # cross-attention: q, o of queries; k, v of patches
    blocks = len(vlora.sites) * vlora.depth * block
    return 2 * N * cfg.vision.width * E + blocks + 2 * E * generated_weights(cfg)


def picture_flops(cfg):
    """{part: FLOPs} of one picture: vision, and generator (VLoRA) or projector and experts."""
    vision, N, C, D = cfg.vision, cfg.vision.tokens, cfg.vision.width, cfg.llm.width
    block = 2 * (N + 1) * block_weights(C, C, vision.hidden, 2) + attention_flops((N + 1) ** 2, C)
    count = {"vision": 2 * N * C * 3 * vision.patch ** 2 + vision.depth * block}
    if vlora_of(cfg):
        return count | {"generator": generator_flops(cfg)}
    experts = sum(expert_flops(cfg, width, N, 1) for width in visual_widths(cfg))
    return count | {"projector": 2 * N * D * (C + D), "experts": experts}


# ---- FLOPs of a forward pass, a token, a training step


def forward_flops(cfg, text, turns=1, at=None):
    """{part: FLOPs} of a forward pass over a picture and `text` tokens, for one row of a batch.

    Without a cache. "latent" weights are counted for each row, but are generated once for all rows.

    cfg      VLMConfig; without experts it is LLaVA's
    turns    U
    at       positions P whose logits are computed; None: all
    returns  the parts of `picture_flops`, llm, head and, for VLoRA, branches
    """
    llm, D, T = cfg.llm, cfg.llm.width, text + cfg.image_tokens
    count = picture_flops(cfg)
    count["llm"] = 2 * T * llama_weights(llm) + llm.depth * attention_flops(T * T, D)
    count["head"] = 2 * (T if at is None else at) * D * llm.vocab
    if vlora_of(cfg):
        return count | {"branches": added_flops(cfg, T, 1)}
    guided = source_of(cfg) in GUIDED
    U = turns if guided else 1  # every token runs with the weights of every turn
    count["experts"] += added_flops(cfg, U * T, U)
    if guided and cfg.expert_blocks():
        count["experts"] += 2 * U * T * D  # the mean that makes the guidance
    return count


def token_flops(cfg, length):
    """FLOPs of one more token of an answer, which sees `length` positions; weights are cached."""
    llm, D = cfg.llm, cfg.llm.width
    blocks = 2 * llama_weights(llm) + llm.depth * attention_flops(length, D)
    return blocks + 2 * D * llm.vocab + added_flops(cfg, 1, 0)


def step_flops(cfg, batch, trains_llm):
    """FLOPs of a VLM's training step on a batch, without padding and what checkpointing repeats.

    For each position, a matrix with P weights takes 2 P in the forward pass, 2 P for the gradient
    of its input and, if it is trained, 2 P for its own. The frozen tower only runs forward; a
    frozen Llama passes gradients on. Attention is causal: half of the pairs count. Pooling is left
    out.
    """
    llm, D, pictures = cfg.llm, cfg.llm.width, len(batch.visual)
    tokens, squares = batch.lengths.sum().item(), (batch.lengths ** 2).sum().item()
    turns = len(batch.ids) * batch.turns if source_of(cfg) in GUIDED else 1
    each = picture_flops(cfg)
    vision = each.pop("vision")
    llama = tokens * llama_weights(llm) + batch.trained * D * llm.vocab
    count = 2 * (3 if trains_llm else 2) * llama
    count += 3 * llm.depth * attention_flops(squares, D) // 2
    count += 3 * (added_flops(cfg, tokens, turns) + pictures * sum(each.values()))
    return count + (pictures * vision if batch.visual.ndim == 4 else 0)  # else features made before


# ---- The device's peak, and the VLoRA paper's own count

# Dense bf16 FLOP/s from NVIDIA's data sheets, by the device's name up to a "-".
PEAK = {
    "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12, "NVIDIA A100 80GB PCIe": 312e12, "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12, "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165e12, "NVIDIA GeForce RTX 3090": 71e12}


def peak_rate(o):
    """FLOP/s that the device can reach in this dtype; None if that is unknown."""
    if o.device != "cuda" or o.dtype != "bfloat16":
        return None
    return PEAK.get(torch.cuda.get_device_name().split("-")[0])


def paper_flops(text=32, visual=576, width=4096, depth=32, changed=8, rank=64):
    """GFLOPs of the Llama by the formulas of arXiv 2405.20339, §3.4 and Appendix A.

    There, h is the width and C the number of text tokens. The paper assumes an FFN of two matrices,
    h x 4h and 4h x h, each with a ΔW, and no grouped queries; it leaves out generators, CLIP and
    head. Forming ΔW (24 k r h h) is counted for training too, where the code never does it. The
    12 C k h h are called FLOPs, but a multiplication and an addition count as one.

    text      the Llama on the text
    llava     the Llama on the text and the visual tokens
    table     VLoRA in Table 1: the text, and forming ΔW
    merged    inference: the same, and adding ΔW to W
    branches  training
    """
    h, d, C, k = width, depth, text, changed
    llama = {T: 24 * T * d * h ** 2 + 4 * T ** 2 * d * h for T in (C, C + visual)}
    table = llama[C] + 24 * k * rank * h ** 2
    count = {"text": llama[C], "llava": llama[C + visual], "table": table,
             "merged": table + 12 * k * h ** 2,
             "branches": table + 12 * C * k * h ** 2 + 14 * C * k * h}
    return {name: flops / 1e9 for name, flops in count.items()}
