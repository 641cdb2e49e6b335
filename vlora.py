"""VLoRA: a picture becomes low-rank weights of the Llama; no visual token is left
(arXiv 2405.20339, "the paper").

    picture ─> CLIP ─> visual_proj + pos_embed ─> z
    queries ─> [self-attention ─> cross-attention to z ─> FFN] x depth ─> shared head ─> W_v (D x R)
    x W    ─>  x W + (x W_v) W_s       in every 4th block of the Llama: q, k, v, o and the FFN ("m")

W_v is generated for each picture (Eq. 4); W_s is learned and zero at the start (Eq. 5). They are
LoRA's A and B, called `down` and `up` here as in hypernet.py. `PerceptualWeights` makes them;
`VLoRA` is a VLM whose Llama adds them. To compare: HyperLLaVA generates both factors and a gate
between them, from the mean of the features, for one place in a block. Where the authors' code
("the code", github.com/FeipengMa6/VLoRA) and their paper differ, a comment says so; we follow the
code, as their checkpoint does.

The prompt. The picture has no position: its tag leaves nothing in the ids, and picture[b] says
which picture row b is about. The published checkpoint was trained with one hidden token in the
tag's place. No token attends to it, but it counts: what follows stands one position later.
`skip_tag` counts the same way without that token. (The authors' generation forgets it while
decoding. Training did not, so we do not.)

    the prompt        <s>  ...  USER:  <image>  What  is  this?  ASSISTANT:
    ours               0   ...    5              6    7    8        9
    the checkpoint's   0   ...    5      (6)     7    8    9       10

The letters are explained at the top of hypernet.py. Here Q counts a generator's queries, one for
each changed block, and E is the width of its states.
"""
import contextlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError
from model import CLIP, MLP, VLM, Cache, Llama, VLMConfig, merge_heads, split_heads

SITES = "qkvom"  # q, k, v and o of attention; m: the whole FFN


@dataclass
class GeneratorConfig:
    """Settings of the perceptual weights generator; the defaults are the paper's (its Tables 3 to
    5).

    Raises UserError on a setting that cannot be built.
    """
    sites: str = SITES  # which weights get a ΔW, in the order in which the generators are kept
    every: int = 4      # 1: adapt all blocks of the Llama, 2: every second one, ...
    rank: int = 64      # R
    embed: int = 512    # E; the first stage's script says 1024, the paper and the other script 512
    depth: int = 8      # blocks of a generator
    heads: int = 16     # of a generator's attention; from the code, the paper does not say
    tag: bool = False   # the picture's tag counts as a position, as in the published checkpoint

    def __post_init__(self):
        unknown = set(self.sites) - set(SITES)
        if not self.sites or len(set(self.sites)) < len(self.sites) or unknown:
            raise UserError(f"sites {self.sites!r}: expected letters of {SITES}, each once")
        for name in ("every", "rank", "embed", "depth", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: expected 1 or more")
        if self.embed % self.heads:
            raise UserError(f"embed {self.embed} does not divide by heads {self.heads}")

    def blocks(self, llm):
        """Indices of the changed blocks in a Llama of this LlamaConfig; by default 3, 7, .. 31 of
        32.

        Raises UserError if the Llama has grouped keys and values, or too few blocks.
        """
        if llm.kv_heads != llm.heads:
            raise UserError(
                f"VLoRA writes every ΔW as width x width, so it needs a Llama whose keys and "
                f"values are as wide as its states; this one has kv_heads {llm.kv_heads}, "
                f"heads {llm.heads}")
        if llm.depth < self.every:
            raise UserError(f"every {self.every}: the Llama has only {llm.depth} blocks; "
                            f"take {llm.depth} or less")
        return range(self.every - 1, llm.depth, self.every)


@dataclass
class VLoRAConfig(VLMConfig):
    """A CLIP, a Llama and a generator between them; there are no experts. Raises UserError if there
    are.
    """
    visual_expert: str = "none"
    language_expert: str = "none"
    vlora: GeneratorConfig = field(default_factory=GeneratorConfig)

    def __post_init__(self):
        super().__post_init__()
        self.vlora.blocks(self.llm)  # refuses a Llama that cannot have such weights
        if (self.visual_expert, self.language_expert) != ("none", "none"):
            raise UserError(f"visual_expert {self.visual_expert}, language_expert "
                            f"{self.language_expert}: VLoRA has no experts, both must be none")

    @property
    def image_tokens(self):
        return 0


class Attention(nn.Module):
    """x float[M, Q, E] attends to z float[M, N, E]; laid out as torch's nn.MultiheadAttention."""

    def __init__(self, cfg):
        super().__init__()
        self.head_dim = cfg.embed // cfg.heads  # K
        self.in_proj = nn.Linear(cfg.embed, 3 * cfg.embed)
        self.out_proj = nn.Linear(cfg.embed, cfg.embed)

    def forward(self, x, z):
        w, b = self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3)
        q = split_heads(F.linear(x, w[0], b[0]), self.head_dim)  # (M, H, Q, K)
        k = split_heads(F.linear(z, w[1], b[1]), self.head_dim)
        v = split_heads(F.linear(z, w[2], b[2]), self.head_dim)
        return self.out_proj(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class Decoder(nn.Module):
    """A block of a generator: the queries attend to each other, then to the picture; then an FFN.

    The queries are normalised before each part, as in the code; Figure 3 shows no norms.
    """

    def __init__(self, cfg):
        super().__init__()
        E = cfg.embed
        self.self_attn, self.multihead_attn = Attention(cfg), Attention(cfg)
        self.linear1, self.linear2 = nn.Linear(E, 4 * E), nn.Linear(4 * E, E)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(E), nn.LayerNorm(E), nn.LayerNorm(E)

    def forward(self, x, z):
        y = self.norm1(x)
        x = x + self.self_attn(y, y)
        x = x + self.multihead_attn(self.norm2(x), z)
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))


class Generator(nn.Module):
    """W_v of one site in the Q changed blocks (Eq. 4), for each row of a batch.

    z        float[M, N, E]
    picture  int64[B], -1 .. M - 1; see PerceptualWeights
    returns  float[B, Q, D * R], flat; zero where picture is -1
    """

    def __init__(self, cfg, queries, width):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, queries, cfg.embed))
        self.decoders = nn.ModuleList(Decoder(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.embed)                         # in the code; not in the paper
        # W_share; Eq. 4 has no bias, the code has one
        self.weights_head = nn.Linear(cfg.embed, width * cfg.rank)

    def forward(self, z, picture):
        x = self.queries.expand(len(z), -1, -1)
        for block in self.decoders:
            x = block(x, z)
        w = self.weights_head(self.norm(x))                         # (M, Q, D * R)  Eq. 4
        return w[picture.clamp(min=0)].masked_fill((picture < 0)[:, None, None], 0)


class PerceptualWeights(nn.Module):
    """One generator for each site, and the learned factors W_s of all of them.

    In the paper the generators read CLIP's features directly. The code projects them to E, without
    a norm, and adds learned positions, once for all generators; this ties a checkpoint to its
    number of patches. It also has a factor alpha / R on W_s, which is 1 in every script and left
    out here.

    f        float[M, N, C]  CLIP's patch features, as the projector of a LLaVA reads them
    picture  int64[B], -1 .. M - 1  the row's picture; -1: none, its ΔW is zero
    returns  a dict for each block of the Llama, {site: (W_v float[B, D, R], W_s float[R, D])};
             empty for blocks that are not changed. One picture a row: W_v belongs to the row, not
             the token
    Raises UserError (when built) as GeneratorConfig.blocks does.
    """

    def __init__(self, cfg, vision, llm):
        super().__init__()
        self.sites, self.rank = cfg.sites, cfg.rank
        self.depth, self.blocks = llm.depth, cfg.blocks(llm)
        Q = len(self.blocks)
        self.visual_proj = nn.Linear(vision.width, cfg.embed)
        self.pos_embed = nn.Parameter(torch.empty(1, vision.tokens, cfg.embed))
        self.gen = nn.ModuleList(Generator(cfg, Q, llm.width) for _ in cfg.sites)
        # W_s transposed, site by site, each D x R; the name is the published checkpoint's
        self.Bs = nn.Parameter(torch.empty(1, len(cfg.sites) * Q, llm.width * cfg.rank))
        self.reset_parameters()

    def reset_parameters(self):
        """As in the code. (The paper: W_s is zero, everything else is random.)

        Queries and positions keep unit variance, since the code's initialiser skips bare
        parameters. W_v starts about fifty times as large as LoRA's A, so W_s learns faster than its
        learning rate says. The std of 0.02 is the code's. Generators narrower than 512 take a
        larger one (ours), or the features would be lost beside the positions.
        """
        std = 0.02 * max(1, 512 / self.visual_proj.out_features) ** 0.5
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=std)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.LayerNorm):
                part.reset_parameters()
            elif isinstance(part, Generator):
                nn.init.normal_(part.queries)
        for part in self.modules():
            if isinstance(part, Attention):  # a bare parameter in the code
                nn.init.xavier_uniform_(part.in_proj.weight)
        nn.init.normal_(self.pos_embed)
        nn.init.zeros_(self.Bs)

    def forward(self, f, picture):
        z = self.visual_proj(f) + self.pos_embed                                 # (M, N, E)
        ups = self.Bs.view(len(self.sites), len(self.blocks), -1, self.rank).mT  # (sites, Q, R, D)
        deltas = [{} for _ in range(self.depth)]
        for site, generator, up in zip(self.sites, self.gen, ups):
            down = generator(z, picture).unflatten(-1, (-1, self.rank))          # (B, Q, D, R)
            for slot, n in enumerate(self.blocks):
                deltas[n][site] = down[:, slot], up[slot]
        return deltas


class Delta:
    """Adds a picture's change to the output of the module that it is mixed into.

    delta  (W_v float[B, D, R], W_s float[R, D]) of the pass in progress, set by VLoRA; None: no
           picture. ΔW itself is never formed.
    """
    delta = None

    def forward(self, x):
        y = super().forward(x)
        return y if self.delta is None else add_delta(y, x, *self.delta)


class DeltaLinear(Delta, nn.Linear):
    """q_proj, k_proj, v_proj or o_proj with a picture's change: x W + (x W_v) W_s (Eq. 6)."""


class DeltaMLP(Delta, MLP):
    """The FFN with a picture's change around it.

    The paper's FFN has two matrices, each with a ΔW. A Llama's has three, none of them square; the
    code leads one linear bypass around the whole FFN, and so does this.
    """


def add_delta(y, x, down, up):
    """y + x ΔW for y, x float[B, T, D], with ΔW = W_v W_s (Eq. 5)."""
    return y + (x @ down) @ up


class TaggedLlama(Llama):
    """A Llama that counts positions as the published checkpoint does.

    tag  int64[B] of the pass in progress, set by VLoRA; None: the tag takes no position
    """
    tag = None

    def next_positions(self, batch, cache):
        positions = super().next_positions(batch, cache)
        return positions if self.tag is None else skip_tag(positions, self.tag)


def skip_tag(positions, tag):
    """int64[B, T] positions of the real tokens -> as the published checkpoint counts them.

    tag  int64[B], position of the first token after the picture's tag; -1: no picture
    """
    tag = tag[:, None]
    return positions + ((tag >= 0) & (positions >= tag))


class PictureCache(Cache):
    """A Cache that also keeps the rows' weight changes and tags."""
    deltas = tag = None


class VLoRA(VLM):
    """A CLIP tower, generators of perceptual weights, and a Llama that they change.

    A forward pass first sets every `delta` (and the tag) on the modules that use it. They stay
    until the next pass, because activation checkpointing runs blocks again in the backward pass.
    """

    def __init__(self, cfg):
        nn.Module.__init__(self)
        self.cfg = cfg
        self.vision = CLIP(cfg.vision)
        self.perceptual = PerceptualWeights(cfg.vlora, cfg.vision, cfg.llm)
        self.llm = TaggedLlama(cfg)
        for n in cfg.vlora.blocks(cfg.llm):
            block = self.llm.layers[n]
            block.mlp = DeltaMLP(cfg.llm)
            for site in "qkvo":
                linear = DeltaLinear(cfg.llm.width, cfg.llm.width, bias=False)
                setattr(block.self_attn, f"{site}_proj", linear)

    def image_weights(self, visual, picture):
        """The deltas of each block, see PerceptualWeights; visual as in Batch, picture int64[B]."""
        return self.perceptual(self.features(visual), picture)

    def set_deltas(self, deltas, tag):
        """deltas: a dict {site: (down, up)} for each block; None: no row has a picture."""
        for n in self.cfg.vlora.blocks(self.cfg.llm):
            block, delta = self.llm.layers[n], deltas[n] if deltas else {}
            block.mlp.delta = delta.get("m")
            for site in "qkvo":
                getattr(block.self_attn, f"{site}_proj").delta = delta.get(site)
        self.llm.tag = tag if self.cfg.vlora.tag else None

    def forward(self, batch, cache=None):
        """As VLM.forward; the pictures' weights come from `batch.visual`, or else from the cache.
        """
        self.set_deltas(None, None)  # frees those of the pass before
        deltas = tag = None
        if batch.visual is not None:
            deltas, tag = self.image_weights(batch.visual, batch.picture), batch.tag
            if cache is not None:
                cache.deltas, cache.tag = deltas, tag
        elif cache is not None:
            deltas, tag = cache.deltas, cache.tag
        self.set_deltas(deltas, tag)
        x = self.llm(self.llm.embed_tokens(batch.ids), batch, cache)
        return self.llm.head(x if batch.at is None else x.flatten(0, 1)[batch.at])

    def new_cache(self, rows, device, dtype):
        return PictureCache(self.cfg.llm, rows, device, dtype)


@contextlib.contextmanager
def merged(layers, deltas):
    """Inside this context the ΔW of q, k, v and o are added to the Llama's own weights (Eq. 3).

    W + ΔW is computed in fp32. Yields the deltas that still run as branches, those of m: no matrix
    can hold a bypass around a non-linearity. (The paper merges it, the code merges nothing.)
    It pays for one picture and long answers: forming a ΔW costs 2 D D R operations, the branch 4 D
    R a token, so operations are saved after D/2 tokens. In bf16 a small ΔW loses bits to W. At the
    end each layer has its own parameter back, unchanged.

    layers  the blocks of a Llama, not sharded
    deltas  of one row, as `PerceptualWeights` returns them; the Llama may then run any number of
            rows about that picture
    """
    own = []
    try:
        for block, delta in zip(layers, deltas, strict=True):
            for site, (down, up) in delta.items():
                assert len(down) == 1, f"cannot merge weights of {len(down)} rows into one Llama"
                if site != "m":
                    linear = getattr(block.self_attn, f"{site}_proj")
                    own.append((linear, linear.weight))
                    with torch.no_grad():  # a Linear holds the transpose of the paper's W
                        total = linear.weight.float() + (down[0].float() @ up.float()).mT
                        weight = total.to(linear.weight.dtype)
                        linear.weight = nn.Parameter(weight, requires_grad=False)
        yield [{site: delta[site] for site in delta if site == "m"} for delta in deltas]
    finally:
        for linear, weight in own:
            linear.weight = weight
