"""CLIP's tower, the Llama with language experts, and the VLM that joins them; generation (paper §3, Figure 2b, Eq. 7).

    picture ─> CLIP ─> Projector (visual expert) ─┐
                                                  ├─> blocks 0 .. k-1 ─┬─> blocks k .. L-1, each with a language expert ─> head
    question ─> embed_tokens ─────────────────────┘                    └─> guidance of each turn ─> HyperNetwork ┘

Everything here is plain `nn.Module`s that know nothing of devices, ranks or sharding; parameters carry the leaf names of
the Hugging Face checkpoints. `generate` is at the end. Read hypernet.py and projector.py first, then train.py.

Letters, used alike in every file:
    B batch             T sequence (text + image tokens)   N image tokens        V vocabulary
    D width of Llama    C width of CLIP                    F hidden of an MLP    L layers
    H heads             K width of one head                R rank of an expert   G width of the guidance   U turns
    S side of the image, px   E width of the hypernetwork's embedding   M pictures in a batch   P supervised positions
"""
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from baselines import expert_of, GUIDED, linear_of, network_of
from cli import UserError
from hypernet import pool
from projector import Projector
from vlora import add_delta, PerceptualWeights, skip_tag, VLoRAConfig

IMAGE = -200  # the id that stands for one image token (LLaVA's IMAGE_TOKEN_INDEX); it is in no vocabulary


@dataclass
class VisionConfig:
    """A CLIP vision tower. `depth` counts the blocks that are built: LLaVA reads the output of the last but one."""
    image_size: int = 336
    patch: int = 14
    width: int = 1024
    depth: int = 23
    heads: int = 16
    hidden: int = 4096
    eps: float = 1e-5

    @property
    def tokens(self):
        return (self.image_size // self.patch) ** 2


@dataclass
class LlamaConfig:
    width: int = 4096
    depth: int = 32
    heads: int = 32
    kv_heads: int = 32
    hidden: int = 11008
    vocab: int = 32000
    eps: float = 1e-5
    theta: float = 10000.0  # base of the rotary frequencies
    context: int = 2048     # longest sequence, image tokens included
    tied: bool = False      # the head shares the embedding's matrix


@dataclass
class VLMConfig:
    """What makes a HyperLLaVA of a CLIP and a Llama, by default the paper's (Tables 2, 3; Figures 3, 4), or a VLoRA."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    llm: LlamaConfig = field(default_factory=LlamaConfig)
    visual_expert: Literal["none", "1", "2", "both"] = "1"
    language_expert: Literal["none", "anterior", "posterior", "all"] = "posterior"
    guidance_after: int | None = None  # blocks that run before guidance is taken; None: half of them, or 0 when block 0 has an expert
    expert_embed: int = 64             # E
    expert_rank: int = 16              # R
    weight_source: Literal["hyper", "static", "latent", "mlp", "lora"] = "hyper"  # of the experts' weights, see sources.py
    vlora: VLoRAConfig | None = None   # not None: VLoRA, whose pictures become weights instead of tokens

    def __post_init__(self):
        if self.vlora is not None:
            self.vlora.blocks(self.llm)  # refuses a Llama for which there are no such weights
            if (self.visual_expert, self.language_expert) != ("none", "none"):
                raise UserError(f"visual_expert {self.visual_expert}, language_expert {self.language_expert}: VLoRA has "
                                f"neither, both must be none")
        if self.weight_source == "lora" and self.visual_expert != "none":
            raise UserError(f"visual_expert {self.visual_expert}: weight_source lora changes the Llama alone, so it must be none")
        width = self.llm.width  # of the largest matrix, that of a language expert or of the second visual one
        if self.weight_source == "mlp" and self.expert_embed * width ** 2 > 2**27:
            raise UserError(f"weight_source mlp: generates whole matrices, with {self.expert_embed * width ** 2:,} numbers for one of "
                            f"{width} x {width}; it is meant for small models, up to {2**27:,}")
        early = self.language_expert in ("anterior", "all")
        if self.guidance_after is None:
            self.guidance_after = 0 if early else self.llm.depth // 2
        if not 0 <= self.guidance_after < self.llm.depth:
            raise UserError(f"guidance_after {self.guidance_after}: the Llama has blocks 0 to {self.llm.depth - 1}")
        if early and self.guidance_after:
            raise UserError(f"guidance_after {self.guidance_after}: language_expert {self.language_expert} needs guidance in "
                            f"block 0 already, so it must be 0 (the token embeddings)")

    @property
    def image_tokens(self):
        """Positions that a picture takes."""
        return self.vision.tokens if self.vlora is None else 0

    def expert_blocks(self):
        """Indices of the blocks with a language expert, or with LoRA."""
        last = self.llm.depth // 2 if self.language_expert == "anterior" else self.llm.depth
        return range(0) if self.language_expert == "none" else range(self.guidance_after, last)


def attend(q, k, v, mask=None, causal=False, plain=False):
    """softmax(q k' / sqrt(K)) v for q float[B, H, T, K] and k, v float[B, kv_heads, T', K]; mask bool[B, 1, T, T'].

    `plain` spells it out instead of calling the fused kernel: on a CPU, in bf16, the backward pass of that kernel takes
    four times as long as these lines (sequences of 130, torch 2.13). train.py sets it, never the model.
    """
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=True)
    (B, H, T, K), length = q.shape, k.shape[2]
    if k.shape[1] < H:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    if causal:
        mask = torch.ones(T, length, dtype=torch.bool, device=q.device).tril()
    # What hides a score is added within the product: a masked_fill is a copy of all scores, there and on the way back
    masks = q.new_zeros(()) if mask is None else torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    scores = torch.baddbmm(masks.expand(B, H, T, length).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=K ** -0.5)
    return scores.view(B, H, T, length).softmax(-1) @ v


# ---- CLIP: https://github.com/openai/CLIP/blob/main/clip/model.py, leaf names as in Hugging Face's CLIPVisionModel


class VisionEmbeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.class_embedding = nn.Parameter(nn.init.normal_(torch.empty(cfg.width), std=0.02))
        self.patch_embedding = nn.Conv2d(3, cfg.width, cfg.patch, stride=cfg.patch, bias=False)
        self.position_embedding = nn.Embedding(cfg.tokens + 1, cfg.width)

    def forward(self, pixels):
        x = self.patch_embedding(pixels).flatten(2).mT  # (M, N, C), patches row by row
        cls = self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1)
        return torch.cat([cls, x], dim=1) + self.position_embedding.weight  # (M, 1 + N, C)


class VisionAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.heads, self.plain = cfg.heads, False
        self.q_proj = nn.Linear(cfg.width, cfg.width)
        self.k_proj = nn.Linear(cfg.width, cfg.width)
        self.v_proj = nn.Linear(cfg.width, cfg.width)
        self.out_proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x):
        M, T, C = x.shape
        q, k, v = (p(x).view(M, T, self.heads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        out = attend(q, k, v, plain=self.plain)  # (M, H, T, K)
        return self.out_proj(out.transpose(1, 2).reshape(M, T, C))


class VisionMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.width, cfg.hidden)
        self.fc2 = nn.Linear(cfg.hidden, cfg.width)

    def forward(self, x):
        # quick_gelu, x sigmoid(1.702 x): what OpenAI trained with, neither erf nor tanh GELU
        return self.fc2(F.silu(1.702 * self.fc1(x)) / 1.702)


class VisionBlock(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.self_attn = VisionAttention(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.width, eps=cfg.eps)
        self.mlp = VisionMLP(cfg)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIP(nn.Module):
    """pixels float[M, 3, S, S] -> states float[M, 1 + N, C] after the last block that is built; state 0 is CLS.

    A tower for LLaVA is built one block short: the features are the output of the last but one, without the final
    LayerNorm, and a block whose output nobody reads is neither kept nor run.
    """

    def __init__(self, cfg):
        super().__init__()
        self.embeddings = VisionEmbeddings(cfg)
        self.pre_layrnorm = nn.LayerNorm(cfg.width, eps=cfg.eps)  # spelt so in every checkpoint
        self.layers = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth))

    def forward(self, pixels):
        x = self.pre_layrnorm(self.embeddings(pixels))
        for block in self.layers:
            x = block(x)
        return x


# ---- Llama: https://github.com/meta-llama/llama/blob/main/llama/model.py, rotary halves as in Hugging Face's checkpoints


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, the mean over the last axis.

    Fused kernels there are on cuda alone. A CPU makes a dozen passes in fp32 of F.rms_norm and its gradient; spelt out, `plain`,
    in the precision of x it takes half of the time in bf16 (torch 2.13). A row is then off by 0.8 % at most, as a whole.
    """

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.plain = eps, False
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        if not self.plain:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x * (size.square() + self.eps).rsqrt() * self.weight


def rotary(positions, width, theta):
    """cos and sin, float32[B, 1, T, K], of the angles by which a head of width K is turned at int64[B, T] positions.

    The sine is that of the negative angle in the first half, as `rotate` wants it.
    """
    frequency = theta ** (-torch.arange(0, width, 2, device=positions.device).float() / width)  # (K/2,)
    angle = positions[:, None, :, None] * frequency                                             # (B, 1, T, K/2)
    return torch.cat([angle, angle], dim=-1).cos(), torch.cat([-angle, angle], dim=-1).sin()


def rotate(x, cos, sin):
    """Turn the pairs (i, i + K/2) of each head.

    Meta's own weights pair (2i, 2i + 1); Hugging Face permuted q_proj and k_proj so that the halves pair up instead.
    With K = 4: [a b c d] -> [a b c d] cos + [c d a b] [-sin -sin sin sin].
    """
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, dims=-1), sin.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, cfg, linear=nn.Linear):
        super().__init__()
        self.width, self.plain = cfg.width // cfg.heads, False  # K
        self.q_proj = linear(cfg.width, cfg.heads * self.width, bias=False)
        self.k_proj = linear(cfg.width, cfg.kv_heads * self.width, bias=False)
        self.v_proj = linear(cfg.width, cfg.kv_heads * self.width, bias=False)
        self.o_proj = linear(cfg.heads * self.width, cfg.width, bias=False)

    def forward(self, x, cos, sin, memory=None, delta=()):
        B, T, _ = x.shape
        parts = zip((self.q_proj, self.k_proj, self.v_proj), "qkv")
        q, k, v = (add_delta(p, x, delta, site).view(B, T, -1, self.width).transpose(1, 2) for p, site in parts)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # (B, H, T, K), (B, kv_heads, T, K)
        if memory is None:  # rows are padded on the right, so a causal mask is all the mask there is
            out = attend(q, k, v, causal=True, plain=self.plain)
        else:
            out = attend(q, *memory.update(k, v), mask=memory.mask, plain=self.plain)
        return add_delta(self.o_proj, out.transpose(1, 2).reshape(B, T, -1), delta, "o")


class MLP(nn.Module):
    def __init__(self, cfg, linear=nn.Linear):
        super().__init__()
        self.gate_proj = linear(cfg.width, cfg.hidden, bias=False)
        self.up_proj = linear(cfg.width, cfg.hidden, bias=False)
        self.down_proj = linear(cfg.hidden, cfg.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A Llama block; with an expert, Eq. 7: x_out = h + FFN(y) + E_L(y) where h = x + Attn(RMS(x)), y = RMS(h).

    Eq. 7 prints the *normalised* features as the residual, which would break a pretrained Llama at step 0; the residual
    here stays h. The expert reads what the FFN reads and adds beside it, without a residual of its own.

    guidance  (guidance float[B, U, D] or None, use_id int64[B, T], hypernet); None: the cached weights of the turn in progress
    memory    this block's BlockMemory when decoding with a cache
    delta     VLoRA: low-rank changes of q, k, v, o and m, see vlora.branch; (): none
    linear    class of the seven linears: nn.Linear, or one with LoRA
    """

    def __init__(self, cfg, expert=None, linear=nn.Linear):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.self_attn = Attention(cfg, linear)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.mlp = MLP(cfg, linear)
        self.expert = expert

    def forward(self, x, cos, sin, guidance=None, memory=None, delta=()):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, memory, delta)
        y = self.post_attention_layernorm(x)
        if self.expert is None:
            return x + add_delta(self.mlp, y, delta, "m")
        if guidance is None:
            weights, use_id = memory.weights, memory.use_id
        else:
            g, use_id, hypernet = guidance
            weights = self.expert.weights(g, hypernet)  # built here, so that only g outlives the block
            if memory is not None:
                memory.keep(weights, use_id)
        return x + (self.mlp(y) + self.expert(y, weights, use_id))  # Eq. 7


class LayerCache:
    """What one block remembers while decoding: keys and values, and the generated weights of each row's last turn."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values  # (B, kv_heads, length, K), preallocated
        self.positions = self.mask = None      # set for each step by Cache.advance
        self.weights = self.use_id = None      # (B, 1, 2R, D), (B, 1, R, D); int64[B, 1]

    def update(self, k, v):
        """Write the new keys and values at their rows' positions; return all of them."""
        index = self.positions[:, None, :, None].expand_as(k)
        self.keys.scatter_(2, index, k)
        self.values.scatter_(2, index, v)
        return self.keys, self.values

    def keep(self, weights, use_id):
        """Keep the weights of the last turn that each row uses: every token generated next belongs to that turn."""
        last = use_id.amax(1)                                     # (B,)  -1: the row uses no expert
        rows = torch.arange(len(last), device=last.device)
        # Weights that no input changes are there once, for all rows and turns
        self.weights = tuple(w[rows % len(w), last.clamp(0, w.shape[1] - 1)][:, None] for w in weights)
        self.use_id = last.clamp(max=0)[:, None]                  # 0 or -1


class Cache:
    """Keys, values and generated weights of all blocks. Rows advance at their own pace: `lengths` tokens each.

    Room is preallocated, by `reserve` before a turn. Positions of a row past its length hold rubbish (padding of a
    shorter prompt), which the mask hides until real tokens overwrite it; so lowering `lengths` takes tokens back.
    """

    def __init__(self, cfg, batch, length, device, dtype):
        shape = (batch, cfg.kv_heads, length, cfg.width // cfg.heads)
        zeros = lambda: torch.zeros(shape, device=device, dtype=dtype)
        self.blocks = [LayerCache(zeros(), zeros()) for _ in range(cfg.depth)]
        self.slots = torch.arange(length, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.seen = None  # VLoRA: what VLM.perceive made of the pictures

    def reserve(self, more):
        """Make room for `more` further tokens a row; what there is stays."""
        length = int(self.lengths.max()) + more
        if length > len(self.slots):
            for memory in self.blocks:
                memory.keys = F.pad(memory.keys, (0, 0, 0, length - memory.keys.shape[2]))
                memory.values = F.pad(memory.values, (0, 0, 0, length - memory.values.shape[2]))
            self.slots = torch.arange(length, device=self.slots.device)

    def advance(self, T, new):
        """Positions int64[B, T] of T further tokens a row, of which `new` int64[B] are real (the others padding)."""
        positions = self.lengths[:, None] + torch.arange(T, device=self.slots.device)
        mask = (self.slots <= positions[..., None])[:, None]  # (B, 1, T, length)
        for memory in self.blocks:
            memory.positions, memory.mask = positions, mask
        self.lengths = self.lengths + new
        return positions


class Llama(nn.Module):
    """Embeddings float[B, T, D] -> final states float[B, T, D]; `head` turns states into logits.

    With language experts (Eq. 7), guidance of turn t is the mean, over the tokens with pool_id t, of the RMS-normalised
    output of the first `guidance_after` blocks (0: of the embeddings). The norm is the expert's own: Llama has none
    between two blocks, and sharing the next block's would tie the tap to it.
    """

    def __init__(self, cfg, vlm):
        super().__init__()
        self.cfg, self.guidance_after = cfg, vlm.guidance_after
        E, R, D, sites, source = vlm.expert_embed, vlm.expert_rank, cfg.width, vlm.expert_blocks(), vlm.weight_source
        self.embed_tokens = nn.Embedding(cfg.vocab, D)
        tuned = lambda: Block(cfg, expert_of(source, D, D, D, E, R), linear_of(source, R))
        self.layers = nn.ModuleList(tuned() if n in sites else Block(cfg) for n in range(cfg.depth))
        self.norm = RMSNorm(D, cfg.eps)
        self.lm_head = None if cfg.tied else nn.Linear(D, cfg.vocab, bias=False)
        self.guidance_norm = RMSNorm(D, cfg.eps) if sites and source in GUIDED else None
        self.hypernet = network_of(source, D, D, E, R) if sites else None

    def guide(self, x, pool_id, turns):
        """Guidance float[B, U, D] of states x float[B, T, D], a mean in fp32; None where no weights depend on it."""
        return None if self.guidance_norm is None else pool(self.guidance_norm(x), pool_id, turns).to(x.dtype)

    def forward(self, x, pool_id=None, use_id=None, turns=1, cache=None, lengths=None, seen=None):
        """lengths int64[B]: real tokens among the T, with a cache, and with one also

        pool_id None: go on with the weights generated from guidance that are in the cache
        seen    None: the same of those generated from pictures, see VLM.perceive
        """
        B, T, _ = x.shape
        positions = torch.arange(T, device=x.device)[None] if cache is None else cache.advance(T, lengths)
        if cache is not None:
            seen = cache.seen = seen or cache.seen
        deltas, tag = seen or ([()] * len(self.layers), None)
        positions = positions if tag is None else skip_tag(positions, tag)
        cos, sin = rotary(positions, self.cfg.width // self.cfg.heads, self.cfg.theta)
        guidance = None
        for n, block in enumerate(self.layers):
            if n == self.guidance_after and pool_id is not None:
                guidance = self.guide(x, pool_id, turns), use_id, self.hypernet
            x = block(x, cos, sin, guidance, cache and cache.blocks[n], deltas[n])
        return self.norm(x)

    def head(self, x):
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)


class VLM(nn.Module):
    """HyperLLaVA: a CLIP tower, a projector with visual experts and a Llama with language experts.

    VLoRA has a generator of perceptual weights where the projector is, and no experts.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision = CLIP(cfg.vision)
        if cfg.vlora is None:
            self.projector = Projector(cfg.vision.width, cfg.llm.width, cfg.visual_expert, cfg.expert_embed, cfg.expert_rank,
                                       cfg.weight_source)
        else:
            self.perceptual = PerceptualWeights(cfg.vlora, cfg.vision, cfg.llm)
        self.llm = Llama(cfg.llm, cfg)

    def features(self, visual):
        """CLIP's patch features float[M, N, C] of pixels float[M, 3, S, S]; features made before pass through."""
        return visual if visual.ndim == 3 else self.vision(visual)[:, 1:]  # CLS dropped

    def perceive(self, visual, picture, tag):
        """VLoRA: (ΔW of each block, int64[B] where the tag counts as a position or None), as `Llama.forward` wants them."""
        return self.perceptual(self.features(visual), picture), tag if self.cfg.vlora.tag else None

    def forward(self, ids, visual, pool_id, use_id, turns, at=None, cache=None, lengths=None, picture=None, tag=None):
        """Logits of the token after each position.

        ids      int64[B, T]  token ids; IMAGE where an image token stands, in the order of the pictures
        visual   float[M, 3, S, S] pixels or float[M, N, C] features; None: the text alone, or VLoRA's cache
        pool_id, use_id  int64[B, T] and turns = U: see hypernet.py; pool_id None: the cache's generated weights
        at       int64[P]  flat positions b * T + t to compute logits at; None: all
        picture, tag  int64[B]  for VLoRA: which picture each row is about, and where its tag stood; -1: none
        returns  float[P, V], or float[B, T, V]
        """
        x, seen = self.llm.embed_tokens(ids.clamp(min=0)), None
        if visual is not None and self.cfg.vlora is not None:
            seen = self.perceive(visual, picture, tag)
        elif visual is not None:
            places = (ids == IMAGE).flatten().nonzero()[:, 0]                              # none if the picture is a blank one
            tokens = self.projector(self.features(visual)).flatten(0, 1)                   # (M N, D)
            x = x.flatten(0, 1).index_copy(0, places, tokens[:len(places)].to(x.dtype)).view_as(x)
        x = self.llm(x, pool_id, use_id, turns, cache, lengths, seen)
        return self.llm.head(x if at is None else x.flatten(0, 1)[at])


# ---- Generation


def sample_token(logits, temperature, top_p, generator=None):
    """Next token int64[B] from logits float[B, V]: the likeliest at temperature 0, else drawn from the top_p nucleus."""
    if temperature == 0:
        return logits.argmax(-1)
    p, token = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # keep a token while the mass before it is short of top_p
    drawn = torch.multinomial(p, 1, generator=generator)
    return token.gather(-1, drawn)[:, 0]


@torch.no_grad()
def end_turn(model, ids, lengths, cache):
    """Run what `stream` yielded last, and the end token of a row that was cut, before the next turn begins.

    ids int64[B, T], padded on the right, lengths int64[B]: they belong to the turn in progress and run with its weights.
    """
    cache.reserve(ids.shape[1])
    model(ids, None, None, None, 1, torch.zeros_like(lengths[:1]), cache, lengths)


@torch.no_grad()
def stream(model, batch, max_new_tokens, eos, temperature=0.0, top_p=1.0, generator=None, cache=None, vocab=None):
    """Answer a batch of prompts, one token a row at a time.

    batch    ids, pool_id, use_id int64[B, T] padded on the right, lengths, picture, tag int64[B], visual, turns:
             see data.Batch
    cache    of the same rows after `end_turn`: the batch holds what is new in the next turn; None: a first turn
    vocab    ids from here on are never drawn (rows of the embedding beyond the tokenizer's); None: all may be
    yields   int64[B] for each step; eos for a row that has ended. Ends when all rows have, or at max_new_tokens. What a
             row yields last, its end token if it ended, is not run any more: `cache` lacks it.
    """
    B, T = batch.ids.shape
    weight = model.llm.embed_tokens.weight
    cache = cache or Cache(model.cfg.llm, B, 0, weight.device, weight.dtype)
    cache.reserve(T + max_new_tokens)
    last = torch.arange(B, device=batch.ids.device) * T + batch.lengths - 1
    logits = model(batch.ids, batch.visual, batch.pool_id, batch.use_id, batch.turns, last, cache, batch.lengths,
                   batch.picture, batch.tag)
    ended = torch.zeros_like(batch.lengths, dtype=torch.bool)
    for step in range(max_new_tokens):
        # Only what is drawn at random can be such an id by mere chance; greedily, the model would have to mean it
        logits = logits[:, :vocab] if temperature else logits
        token = sample_token(logits, temperature, top_p, generator).masked_fill(ended, eos)
        yield token
        ended |= token == eos
        if ended.all() or step == max_new_tokens - 1:
            return
        logits = model(token[:, None], None, None, None, 1, None, cache, (~ended).long())[:, 0]


def generate(model, batch, max_new_tokens, eos, **sampling):
    """The answers of `stream` as a list of B lists of ids, without the end token."""
    steps = torch.stack(list(stream(model, batch, max_new_tokens, eos, **sampling)), dim=1).tolist()
    return [row[:row.index(eos)] if eos in row else row for row in steps]
