"""CLIP's tower, the Llama with language experts, and the VLM that joins them; generation
(paper §3, Figure 2b, Eq. 7).

    picture ─> CLIP ─> Projector (visual expert) ─┐
                                                  ├─> blocks 0 .. k-1 ─┬─> blocks k .. L-1 ─> head
    question ─> embed_tokens ─────────────────────┘                    │   (language experts)
                                                                       └─> guidance ─> their weights

All modules are plain `nn.Module`s; train.py handles devices, ranks and sharding. Parameters end in
the names of the Hugging Face checkpoints (q_proj, gate_proj, ...). `generate` is at the end.
Read before: hypernet.py, which explains the letters in the shapes, and projector.py. Next: data.py,
train.py.
"""
import dataclasses
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError
from hypernet import Expert, HyperNetwork, pool
from projector import Projector


@dataclass
class VisionConfig:
    """A CLIP vision tower. `depth` counts the blocks that are built: LLaVA reads the output of the
    last but one, so the last one is not built."""
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
    """HyperLLaVA on a CLIP and a Llama; the defaults are the paper's (Tables 2, 3; Figures 3, 4).

    Raises UserError if guidance would be taken later than the first block with an expert needs it,
    or after the last block.
    """
    vision: VisionConfig = field(default_factory=VisionConfig)
    llm: LlamaConfig = field(default_factory=LlamaConfig)
    visual_expert: Literal["none", "1", "2", "both"] = "1"
    language_expert: Literal["none", "anterior", "posterior", "all"] = "posterior"
    # Blocks that run before guidance is taken. None: 0 for anterior or all, else depth // 2.
    # Experts of posterior blocks begin there.
    guidance_after: int | None = None
    expert_embed: int = 64  # E
    expert_rank: int = 16   # R

    def __post_init__(self):
        early = self.language_expert in ("anterior", "all")
        if self.guidance_after is None:
            self.guidance_after = 0 if early else self.llm.depth // 2
        if not 0 <= self.guidance_after < self.llm.depth:
            raise UserError(f"guidance_after {self.guidance_after}: the Llama has blocks "
                            f"0 to {self.llm.depth - 1}")
        if early and self.guidance_after:
            raise UserError(f"guidance_after {self.guidance_after}: language_expert "
                            f"{self.language_expert} needs guidance already in block 0, "
                            f"so it must be 0 (the token embeddings)")

    @property
    def image_tokens(self):
        """Positions that a picture takes."""
        return self.vision.tokens

    def expert_blocks(self):
        """Indices of the blocks with a language expert."""
        if self.language_expert == "none":
            return range(0)
        anterior = self.language_expert == "anterior"
        return range(self.guidance_after, self.llm.depth // 2 if anterior else self.llm.depth)


@dataclass
class Batch:
    """What a model reads. `data.collate` makes it for training and prompts; decoding steps need ids
    and lengths only."""
    ids: torch.Tensor                      # int64[B, T], padded on the right
    lengths: torch.Tensor | None           # int64[B], real tokens of each row; None: all T
    pool_id: torch.Tensor | None = None    # int64[B, T], see hypernet.py; None: use cached weights
    use_id: torch.Tensor | None = None     # int64[B, T]
    turns: int = 1                         # U, the most turns that any row has
    visual: torch.Tensor | None = None     # float[M, 3, S, S] pixels or float[M, N, C] features
    image_at: torch.Tensor | None = None   # int64[image tokens], indices into [B * T]
    at: torch.Tensor | None = None         # int64[P], indices into [B * T] that get logits
    target: torch.Tensor | None = None     # int64[P], the next tokens; -100: not trained
    picture: torch.Tensor | None = None    # int64[B], the row's picture in `visual`, or -1 (VLoRA)
    tag: torch.Tensor | None = None        # int64[B], position of the picture's tag, or -1 (VLoRA)
    records: list[str] = field(default_factory=list)  # names for messages

    @property
    def trained(self):
        """The number of supervised tokens."""
        return int((self.target >= 0).sum())

    def to(self, device):
        """The same batch with its tensors on `device`."""
        moved = {name: x.to(device, non_blocking=True) for name, x in vars(self).items()
                 if isinstance(x, torch.Tensor)}
        return dataclasses.replace(self, **moved)


def attend(q, k, v, mask=None, causal=False, eager=False):
    """softmax(q k' / sqrt(K)) v for q float[B, H, T, K] and k, v float[B, kv_heads, T', K].

    mask   float[B, 1, T, T'], added to the scores: 0 where attention is allowed, elsewhere -inf
    eager  written out instead of the fused kernel: on a CPU in bf16, the fused kernel's backward
           pass takes four times as long (sequences of 130, torch 2.13). train.py sets it.
    """
    if not eager:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
    (B, H, T, K), length = q.shape, k.shape[2]
    if k.shape[1] < H:
        k, v = (x.repeat_interleave(H // x.shape[1], dim=1) for x in (k, v))
    if causal:
        mask = q.new_full((T, length), float("-inf")).triu(1)
    # baddbmm adds the mask during the product. A masked_fill would copy all scores twice.
    bias = q.new_zeros(()) if mask is None else mask
    bias = bias.expand(B, H, T, length).flatten(0, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=K ** -0.5)
    return scores.view(B, H, T, length).softmax(-1) @ v


def split_heads(x, head_dim):
    """float[B, T, H * K] -> float[B, H, T, K] with K = head_dim."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x):
    """float[B, H, T, K] -> float[B, T, H * K]."""
    return x.transpose(1, 2).flatten(2)


# ---- CLIP: https://github.com/openai/CLIP/blob/main/clip/model.py
# Leaf names as in Hugging Face's CLIPVisionModel


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
        self.head_dim, self.eager = cfg.width // cfg.heads, False  # K
        self.q_proj = nn.Linear(cfg.width, cfg.width)
        self.k_proj = nn.Linear(cfg.width, cfg.width)
        self.v_proj = nn.Linear(cfg.width, cfg.width)
        self.out_proj = nn.Linear(cfg.width, cfg.width)

    def forward(self, x):
        q = split_heads(self.q_proj(x), self.head_dim)  # (M, H, 1 + N, K)
        k = split_heads(self.k_proj(x), self.head_dim)
        v = split_heads(self.v_proj(x), self.head_dim)
        return self.out_proj(merge_heads(attend(q, k, v, eager=self.eager)))


class VisionMLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.width, cfg.hidden)
        self.fc2 = nn.Linear(cfg.hidden, cfg.width)

    def forward(self, x):
        # quick_gelu, x sigmoid(1.702 x): OpenAI's own, not the usual GELU
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
    """pixels float[M, 3, S, S] -> states float[M, 1 + N, C] after the last block; state 0 is CLS.

    LLaVA's features are the output of the last block but one, without the final LayerNorm. The last
    block of the checkpoint is therefore neither built nor run.
    """

    def __init__(self, cfg):
        super().__init__()
        self.embeddings = VisionEmbeddings(cfg)
        self.pre_layrnorm = nn.LayerNorm(cfg.width, eps=cfg.eps)  # sic, in every checkpoint
        self.layers = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth))

    def forward(self, pixels):
        x = self.pre_layrnorm(self.embeddings(pixels))
        for block in self.layers:
            x = block(x)
        return x


# ---- Llama: https://github.com/meta-llama/llama/blob/main/llama/model.py
# Rotary halves as in Hugging Face's checkpoints


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, the mean over the last axis.

    F.rms_norm is fused on cuda only. On a CPU it and its gradient make a dozen passes in fp32;
    `eager`, written out in the precision of x, takes half the time in bf16 (torch 2.13). The scale
    of a row is then rounded to bf16, an error of at most 1.6 %.
    """

    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.eager = eps, False
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        if not self.eager:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return x * (size.square() + self.eps).rsqrt() * self.weight


def rotary(positions, head_dim, theta):
    """cos and sin, float32[B, 1, T, K], of the angles at positions int64[B, T]; K = head_dim.

    In the first half the sine has the opposite sign: see `rotate`.
    """
    exponent = -torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim  # (K/2,)
    angle = positions[:, None, :, None] * theta ** exponent  # (B, 1, T, K/2)
    return torch.cat([angle, angle], dim=-1).cos(), torch.cat([-angle, angle], dim=-1).sin()


def rotate(x, cos, sin):
    """Turn the pairs (i, i + K/2) of each head.

    Meta's own weights pair (2i, 2i + 1); Hugging Face permuted q_proj and k_proj so that the halves
    pair up instead. With K = 4: [a b c d] -> [a b c d] cos + [c d a b] [-sin -sin sin sin].
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class Attention(nn.Module):
    """Causal self-attention; `layer_cache` is this block's LayerCache while decoding."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim, self.eager = cfg.width // cfg.heads, False  # K
        self.q_proj = nn.Linear(cfg.width, cfg.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(cfg.width, cfg.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(cfg.width, cfg.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(cfg.heads * self.head_dim, cfg.width, bias=False)

    def forward(self, x, cos, sin, layer_cache=None):
        q = rotate(split_heads(self.q_proj(x), self.head_dim), cos, sin)  # (B, H, T, K)
        k = rotate(split_heads(self.k_proj(x), self.head_dim), cos, sin)  # (B, kv_heads, T, K)
        v = split_heads(self.v_proj(x), self.head_dim)
        mask = None  # rows are padded on the right, so without a cache the causal mask is enough
        if layer_cache is not None:
            k, v = layer_cache.update(k, v)
            mask = layer_cache.mask
        causal = mask is None and x.shape[1] > 1  # a single token sees all keys
        return self.o_proj(merge_heads(attend(q, k, v, mask, causal, self.eager)))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gate_proj = nn.Linear(cfg.width, cfg.hidden, bias=False)
        self.up_proj = nn.Linear(cfg.width, cfg.hidden, bias=False)
        self.down_proj = nn.Linear(cfg.hidden, cfg.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A Llama block. With an expert it is Eq. 7: x_out = h + FFN(y) + E_L(y),
    where h = x + Attn(RMS(x)) and y = RMS(h).

    Eq. 7 prints the *normalised* features as the residual (Figure 2b draws both), which would break
    a pretrained Llama at step 0; here the residual stays h. Its FFN(SwiGLU(x)) is Llama's MLP,
    which has the SwiGLU inside. The expert reads what the FFN reads, adds beside it, and has no
    residual of its own.

    recipe       what the weights of new turns are made from: (guidance float[B, U, D],
                 use_id int64[B, T], hypernet); None: use the generated weights in `layer_cache`
    layer_cache  this block's LayerCache while decoding, else None
    """

    def __init__(self, cfg, expert=None):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.eps)
        self.mlp = MLP(cfg)
        self.expert = expert

    def forward(self, x, cos, sin, recipe=None, layer_cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layer_cache)
        y = self.post_attention_layernorm(x)
        if self.expert is None:
            return x + self.mlp(y)
        if recipe is None:
            weights, use_id = layer_cache.weights, None
        else:
            guidance, use_id, hypernet = recipe
            # made here, so that activation checkpointing can free them
            weights = self.expert.weights(guidance, hypernet)
            if layer_cache is not None:
                layer_cache.keep(weights, use_id)
        return x + (self.mlp(y) + self.expert(y, weights, use_id))  # Eq. 7


class LayerCache:
    """What one block keeps while decoding: keys, values, and the generated weights of each row's
    latest turn."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values  # (B, kv_heads, slots, K), preallocated
        self.weights = None                    # (B, 1, 2R, D), (B, 1, R, D)
        # Set for each pass by Cache.advance
        self.start = self.end = self.positions = self.mask = None

    def update(self, k, v):
        """Write the new keys and values at their rows' positions; return all that are in use."""
        if self.start is not None:  # all rows at once
            self.keys[:, :, self.start:self.end] = k
            self.values[:, :, self.start:self.end] = v
        else:
            index = self.positions[:, None, :, None].expand_as(k)
            self.keys.scatter_(2, index, k)
            self.values.scatter_(2, index, v)
        return self.keys[:, :, :self.end], self.values[:, :, :self.end]

    def keep(self, weights, use_id):
        """Keep the weights of the latest turn of each row: all tokens to come belong to that turn.
        A row that uses no expert keeps zeros for the last matrix, so its shift is zero.
        """
        last = use_id.amax(1)                             # (B,)  -1: the row uses no expert
        rows = torch.arange(len(last), device=last.device)
        # W_d and W_u. An adapter of baselines.py may have one matrix, or one set for all rows and
        # turns: hence expand and clamp
        *others, last_matrix = (
            w.expand(len(last), *w.shape[1:])[rows, last.clamp(0, w.shape[1] - 1)][:, None]
            for w in weights)
        self.weights = *others, last_matrix.masked_fill((last < 0)[:, None, None, None], 0)


def make_room(x, slots):
    """x float[B, kv_heads, .., K], padded with zeros to at least `slots` slots."""
    more = slots - x.shape[2]
    return F.pad(x, (0, 0, 0, more)) if more > 0 else x


class Cache:
    """Keys, values and generated weights of all blocks. Row b has seen `lengths[b]` tokens.

    `reserve` makes room before a turn. Positions past a row's length contain stale values (padding
    of a shorter prompt), masked until overwritten; so `rewind` takes tokens back.

    start  the position at which all rows stand; None: they may differ. A pass of rows that stand at
           the same position needs no index and, if it is the first or has one token, no mask
    end    all tokens stand in the first `end` slots
    """

    def __init__(self, cfg, rows, device, dtype):
        shape = rows, cfg.kv_heads, 0, cfg.width // cfg.heads
        empty = torch.zeros(shape, device=device, dtype=dtype)
        self.layers = [LayerCache(empty, empty) for _ in range(cfg.depth)]
        self.rewind(torch.zeros(rows, dtype=torch.int64, device=device))

    def rewind(self, lengths):
        """Go back to the first `lengths` tokens of each row, int64[B]."""
        shortest, self.end = torch.stack(lengths.aminmax()).tolist()
        self.lengths, self.start = lengths, shortest if shortest == self.end else None

    def reserve(self, more):
        """Make room for `more` further tokens in each row; what is there stays."""
        # Ctrl-C may have stopped a pass, or this loop: set start and end again
        self.rewind(self.lengths)
        for layer in self.layers:
            layer.keys = make_room(layer.keys, self.end + more)
            layer.values = make_room(layer.values, self.end + more)

    def causal_mask(self, positions):
        """float[B, 1, T, end], see `attend`: tokens at int64[B, T] positions see those up to their
        own.
        """
        slots = torch.arange(self.end, device=positions.device)
        later = slots > positions[:, None, :, None]
        return torch.zeros_like(later, dtype=self.layers[0].keys.dtype).masked_fill(
            later, float("-inf"))

    def advance(self, T, real=None):
        """Positions int64[B, T] of the next T tokens. In each row the first `real` int64[B] of them
        are no padding (None: all).
        """
        start, device = self.start, self.lengths.device
        # T contains padding, so end + T may be more than there is room for
        self.end = min(self.end + T, self.layers[0].keys.shape[2])
        positions = self.lengths[:, None] + torch.arange(T, device=device)
        mask = None
        if start is None or (start > 0 and T > 1):
            mask = self.causal_mask(positions)
        for layer in self.layers:
            layer.start, layer.end, layer.positions, layer.mask = start, self.end, positions, mask
        self.lengths = self.lengths + (T if real is None else real)
        self.start = start + T if start is not None and real is None else None
        return positions


class Llama(nn.Module):
    """Embeddings float[B, T, D] -> final states float[B, T, D]; `head` turns states into logits.

    The guidance of turn t is the mean, over the tokens with pool_id t, of the RMS-normalised output
    of the first `guidance_after` blocks (0: of the embeddings). This RMSNorm is that of Figure 2b;
    Llama has none between two blocks.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.guidance_after = cfg.llm, cfg.guidance_after
        D, E, R, eps = cfg.llm.width, cfg.expert_embed, cfg.expert_rank, cfg.llm.eps
        expert_blocks = cfg.expert_blocks()
        self.embed_tokens = nn.Embedding(cfg.llm.vocab, D)
        self.layers = nn.ModuleList(
            Block(cfg.llm, Expert(D, D, D, E, R) if n in expert_blocks else None)
            for n in range(cfg.llm.depth))
        self.norm = RMSNorm(D, eps)
        self.lm_head = None if cfg.llm.tied else nn.Linear(D, cfg.llm.vocab, bias=False)
        self.guidance_norm = RMSNorm(D, eps) if expert_blocks else None
        self.hypernet = HyperNetwork(D, D, E, R) if expert_blocks else None

    def guidance(self, x, batch):
        """What the experts of new turns need, see Block; None in a model without experts."""
        if self.guidance_norm is None:
            return None
        g = pool(self.guidance_norm(x), batch.pool_id, batch.turns).to(x.dtype)  # f of Eq. 3
        return g, batch.use_id, self.hypernet

    def next_positions(self, batch, cache):
        """int64[1 or B, T], the positions of the batch's tokens in their rows. Moves the cache on.
        """
        T = batch.ids.shape[1]
        if cache is None:
            return torch.arange(T, device=batch.ids.device)[None]
        return cache.advance(T, batch.lengths)

    def forward(self, x, batch, cache=None):
        head_dim = self.cfg.width // self.cfg.heads
        angles = rotary(self.next_positions(batch, cache), head_dim, self.cfg.theta)
        cos, sin = (values.to(x.dtype) for values in angles)
        recipe = None
        for n, block in enumerate(self.layers):
            if n == self.guidance_after and batch.pool_id is not None:
                recipe = self.guidance(x, batch)  # the arrow at 1/2 Layers in Figure 2
            x = block(x, cos, sin, recipe, cache and cache.layers[n])
        return self.norm(x)

    def head(self, x):
        return F.linear(x, self.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)


class VLM(nn.Module):
    """HyperLLaVA: CLIP, a projector with visual experts, a Llama with language experts (Eq. 1)."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision = CLIP(cfg.vision)
        self.projector = Projector(cfg.vision.width, cfg.llm.width, cfg.visual_expert,
                                   cfg.expert_embed, cfg.expert_rank)
        self.llm = Llama(cfg)

    def features(self, visual):
        """CLIP's patch features float[M, N, C] of pixels float[M, 3, S, S]. Features pass through.
        """
        return visual if visual.ndim == 3 else self.vision(visual)[:, 1:]  # without CLS

    def embed(self, batch):
        """float[B, T, D]: embeddings of the text, and visual tokens at the picture's positions."""
        x = self.llm.embed_tokens(batch.ids)
        if batch.visual is None:
            return x
        tokens = self.projector(self.features(batch.visual)).flatten(0, 1)  # (M N, D)
        tokens = tokens[:len(batch.image_at)].to(x.dtype)  # a dummy picture has no positions
        # Eq. 1: V beside T, here at the places of <image>
        return x.flatten(0, 1).index_copy(0, batch.image_at, tokens).view_as(x)

    def forward(self, batch, cache=None):
        """Logits of the next token: float[P, V] at the positions `batch.at`, or float[B, T, V].

        With a cache the batch holds only what is new; without `pool_id` it goes on with the
        generated weights in the cache.
        """
        x = self.llm(self.embed(batch), batch, cache)
        return self.llm.head(x if batch.at is None else x.flatten(0, 1)[batch.at])

    def loss(self, batch):
        """Next-token loss summed over the supervised tokens; no other position gets logits."""
        return F.cross_entropy(self(batch).float(), batch.target, reduction="sum")

    def step(self, batch, cache):
        """A decoding step: logits float[B, 1, V]. inference/captured.py puts a faster one here."""
        return self(batch, cache)

    def new_cache(self, rows, device, dtype):
        return Cache(self.cfg.llm, rows, device, dtype)


# ---- Generation


def sample_token(logits, temperature, top_p, generator=None):
    """int64[B] from logits float[B, V]: the likeliest at temperature 0, else drawn from the
    nucleus, the smallest set of tokens with at least the probability `top_p`.
    """
    if temperature == 0:
        return logits.argmax(-1)
    p, token = torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True)
    p = p.masked_fill(p.cumsum(-1) - p >= top_p, 0)  # drop a token if p before it >= top_p
    drawn = torch.multinomial(p, 1, generator=generator)
    return token.gather(-1, drawn)[:, 0]


@torch.no_grad()
def end_turn(model, ids, lengths, cache):
    """Run the tokens that a turn still lacks in the cache, before the next turn begins.

    `stream` does not run the last token that it yields, and an answer that was cut has no end
    token. ids int64[B, T], padded on the right, lengths int64[B]: they run with the weights of
    their turn.
    """
    cache.reserve(ids.shape[1])
    unread = torch.zeros_like(lengths[:1])  # logits of a single position, to save time
    model(Batch(ids, lengths, at=unread), cache)


@torch.no_grad()
def stream(model, batch, max_new_tokens, eos, *, temperature=0.0, top_p=1.0, generator=None,
           cache=None, vocab=None):
    """Answer a batch of prompts; yield one token a row at a time, int64[B], eos once a row has
    ended.

    batch    the prompts; with a cache, what is new in the next turn
    cache    of the same rows after `end_turn`; None: a first turn
    vocab    with temperature > 0, ids >= vocab are never sampled (rows of the embedding beyond
             the tokenizer's vocabulary); None: all may be
    Ends when all rows have ended, or at max_new_tokens. The last token of a row is not run any
    more: `cache` lacks it.
    """
    B, T = batch.ids.shape
    weight = model.llm.embed_tokens.weight
    cache = cache or model.new_cache(B, weight.device, weight.dtype)
    cache.reserve(T + max_new_tokens)
    last = torch.arange(B, device=batch.ids.device) * T + batch.lengths - 1
    # None: no padding, so the steps below need no index and no mask
    lengths = None if batch.lengths.min() == T else batch.lengths
    logits = model(dataclasses.replace(batch, at=last, lengths=lengths), cache)  # (B, V)
    ended = torch.zeros_like(batch.lengths, dtype=torch.bool)
    for step in range(max_new_tokens):
        logits = logits[:, :vocab] if temperature else logits  # greedy: any id, as in transformers
        token = sample_token(logits, temperature, top_p, generator).masked_fill(ended, eos)
        yield token
        ended |= token == eos
        count = int(ended.sum())  # a GPU waits here, and nowhere else in a step
        if count == B or step == max_new_tokens - 1:
            return
        lengths = (~ended).long() if count else None  # 0: the row has ended
        logits = model.step(Batch(token[:, None], lengths), cache)[:, 0]


def generate(model, batch, max_new_tokens, eos, **sampling):
    """The answers of `stream` as a list of B lists of ids, without the end token."""
    steps = torch.stack(list(stream(model, batch, max_new_tokens, eos, **sampling)), dim=1).tolist()
    return [row[:row.index(eos)] if eos in row else row for row in steps]
