"""VLoRA: a picture becomes low-rank weights of the Llama, and no visual token is left (arXiv 2405.20339, "the paper").

    picture ─> CLIP ─> visual_proj + pos_embed ─> z
    queries ─> [self-attention ─> cross-attention to z ─> FFN] x depth ─> shared head ─> W_v, one D x R for each query
    x W'   ─>  x W' + (x W_v) W_s       in every 4th block of the Llama, beside q, k, v, o and the FFN ("m")

W_v is generated anew for each picture (Eq. 4), W_s is learned and zero at the start (Eq. 5): LoRA's A and B, called
`down` and `up` here as in hypernet.py. `PerceptualWeights` makes them, `branch` runs them, `merged` adds them to the
Llama's own weights. HyperLLaVA, to compare, generates both factors and what is gated between them, from the mean of the
features, for one site of a block. Where the authors' code (github.com/FeipengMa6/VLoRA) does other than their paper
says, the line says so; the code is followed, because its checkpoint is.

The prompt. No position belongs to the picture: its tag leaves nothing in the ids, and picture[b] says which picture row
b is about. The published checkpoint was trained with one hidden token in the tag's place, which nobody attends to but
which counts: what follows it stands one position further on. `skip_tag` counts so, without that token. The authors' own
generation forgets it again while decoding; training did not, so neither does this.

    the prompt        <s>  ...  USER:  <image>  What  is  this?  ASSISTANT:
    ours               0   ...    5              6    7    8        9
    the checkpoint's   0   ...    5      (6)     7    8    9       10

Letters are explained at the top of model.py; Q counts a generator's queries, one for each block that is changed, and E
is the width of its states. Next: model.py.
"""
import contextlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from cli import UserError

SITES = "qkvom"  # the linears of attention; m: the whole FFN


@dataclass
class VLoRAConfig:
    """A perceptual weights generator; the defaults are the paper's choices (its Tables 3 to 5)."""
    sites: str = SITES  # which weights get a ΔW, in the order in which the generators are kept
    every: int = 4      # of so many blocks of the Llama, the last gets them
    rank: int = 64      # R
    embed: int = 512    # E; the published script for the first stage says 1024, but the paper and the other script 512
    depth: int = 8      # blocks of a generator
    heads: int = 16     # of a generator's attention; from the code, the paper is silent
    tag: bool = False   # the picture's tag counts as a position, as in the published checkpoint

    def __post_init__(self):
        if not self.sites or len(set(self.sites)) < len(self.sites) or set(self.sites) - set(SITES):
            raise UserError(f"sites {self.sites!r}: expected some of the letters {SITES}, each once")
        for name in ("every", "rank", "embed", "depth", "heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)}: expected 1 or more")
        if self.embed % self.heads:
            raise UserError(f"embed {self.embed} does not divide by heads {self.heads}")

    def blocks(self, llm):
        """Indices of the blocks that are changed in a Llama of this LlamaConfig; by default 3, 7, .. 31 of 32.

        Raises UserError on a Llama for which there are no such weights.
        """
        if llm.kv_heads != llm.heads:
            raise UserError(f"VLoRA writes every ΔW as width x width, so it needs a Llama whose keys and values are as "
                            f"wide as its states; this one has kv_heads {llm.kv_heads}, heads {llm.heads}")
        if llm.depth < self.every:
            raise UserError(f"every {self.every}: the Llama has only {llm.depth} blocks; take {llm.depth} or less")
        return range(self.every - 1, llm.depth, self.every)


class Attention(nn.Module):
    """x float[M, Q, E] attends to z float[M, N, E]; torch's nn.MultiheadAttention, its three matrices in one."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.in_proj = nn.Linear(cfg.embed, 3 * cfg.embed)
        self.out_proj = nn.Linear(cfg.embed, cfg.embed)

    def forward(self, x, z):
        parts = zip((x, z, z), self.in_proj.weight.chunk(3), self.in_proj.bias.chunk(3))
        q, k, v = (F.linear(*part).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(q, k, v)  # (M, H, Q, K)
        return self.out_proj(out.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """A block of the generator: the queries attend to each other, then to the picture; then an FFN.

    That each part reads normalised states is the code's choice; the paper's Figure 3 shows no norms.
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
    """W_v of one kind of weight in the Q blocks that are changed (Eq. 4), for each row of a batch.

    z        float[M, N, E]
    picture  int64[B], -1 .. M - 1; see PerceptualWeights
    returns  float[B, Q, D * R], as it is written; zero where picture is -1
    """

    def __init__(self, cfg, queries, width):
        super().__init__()
        self.queries = nn.Parameter(torch.empty(1, queries, cfg.embed))
        self.decoders = nn.ModuleList(Decoder(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.embed)                         # in the code; not in the paper
        self.weights_head = nn.Linear(cfg.embed, width * cfg.rank)  # W_share; Eq. 4 has no bias, the code has one

    def forward(self, z, picture):
        x = self.queries.expand(len(z), -1, -1)
        for block in self.decoders:
            x = block(x, z)
        w = self.weights_head(self.norm(x))                         # (M, Q, D * R)  Eq. 4
        return w[picture.clamp(min=0)].masked_fill((picture < 0)[:, None, None], 0)


class PerceptualWeights(nn.Module):
    """One generator for each kind of weight, and the learned factors W_s of all of them.

    The paper speaks of CLIP's features as they are; the code projects them to E, without a norm, and adds learned
    positions, once for all generators, which ties a checkpoint to its number of patches. It also has a factor alpha / R
    on W_s, which is 1 in every script and is left out here.

    f        float[M, N, C]  CLIP's patch features, what the projector of a LLaVA reads
    picture  int64[B], -1 .. M - 1  the picture that a row is about; -1: none, its ΔW is zero
    returns  list of a dict for each block of the Llama, {site: (W_v float[B, D, R], W_s float[R, D])}; empty where
             nothing is changed. One picture a row: W_v belongs to the row, not to the token
    Raises UserError (when built) as VLoRAConfig.blocks does.
    """

    def __init__(self, cfg, vision, llm):
        super().__init__()
        self.sites, self.rank, self.depth, self.blocks = cfg.sites, cfg.rank, llm.depth, cfg.blocks(llm)
        Q, kinds = len(self.blocks), len(cfg.sites)
        self.visual_proj = nn.Linear(vision.width, cfg.embed)
        self.pos_embed = nn.Parameter(torch.empty(1, vision.tokens, cfg.embed))
        self.gen = nn.ModuleList(Generator(cfg, Q, llm.width) for _ in cfg.sites)
        self.Bs = nn.Parameter(torch.empty(1, kinds * Q, llm.width * cfg.rank))  # W_s, site by site, each D x R
        self.reset_parameters()

    def reset_parameters(self):
        """As the code does. The paper says that W_s is zero and all else random.

        Queries and positions stay at unit variance, since the code's initialiser never meets a bare parameter. W_v
        starts out some fifty times as large as LoRA's A, which makes W_s learn faster than its learning rate says. The
        std of 0.02 is the code's; a generator narrower than 512 takes more, or the picture is lost beside the positions.
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
            if isinstance(part, Attention):  # another bare parameter there
                nn.init.xavier_uniform_(part.in_proj.weight)
        nn.init.normal_(self.pos_embed)
        nn.init.zeros_(self.Bs)

    def forward(self, f, picture):
        z = self.visual_proj(f) + self.pos_embed                                         # (M, N, E)
        ups = self.Bs.view(len(self.sites), len(self.blocks), -1, self.rank).mT          # (sites, Q, R, D)
        deltas = [{} for _ in range(self.depth)]
        for site, generator, up in zip(self.sites, self.gen, ups):
            down = generator(z, picture).unflatten(-1, (-1, self.rank))                  # (B, Q, D, R)
            for slot, n in enumerate(self.blocks):
                deltas[n][site] = down[:, slot], up[slot]
        return deltas


def add_delta(module, x, delta, site):
    """What `module` makes of x, shifted by x ΔW = (x W_v) W_s (Eq. 6, without ever forming ΔW).

    module   q_proj, k_proj, v_proj or o_proj, or for m the MLP as a whole: the paper's FFN has two matrices, each with
             a ΔW; a Llama's has three, none of them square, and the code leads a linear bypass around all of it
    x        float[B, T, D]  what `module` reads
    delta    the block's dict of `PerceptualWeights`, or (); without `site`, and in rows without a picture, nothing is added
    """
    if site not in delta:
        return module(x)
    down, up = delta[site]
    return module(x) + (x @ down) @ up


@contextlib.contextmanager
def merged(layers, deltas):
    """While it lasts, the ΔW of q, k, v and o are part of a Llama's own weights: W + ΔW, added in fp32 (Eq. 3).

    Gives back the deltas that are still to be run as branches, those of m: a bypass of a non-linearity is in no matrix
    (the paper merges it, the code merges nothing). For one picture and long answers: forming a ΔW costs 2 D D R, the
    branch 4 D R a token, so that FLOPs are saved after D/2 tokens; what is saved at once are the branch's kernels.
    In bf16 a small ΔW loses bits to W. At the end each layer has its own parameter back, which nobody wrote to.

    layers   the blocks of a Llama, whose parameters are whole (not sharded)
    deltas   of one row, as `PerceptualWeights` returns them; the Llama may then run any number of rows about that
             picture
    """
    own = []
    try:
        for block, delta in zip(layers, deltas, strict=True):
            for site, (down, up) in delta.items():
                assert len(down) == 1, f"the weights of {len(down)} rows cannot be merged into one Llama"
                if site != "m":
                    linear = getattr(block.self_attn, f"{site}_proj")
                    own.append((linear, linear.weight))
                    with torch.no_grad():  # a Linear holds the transpose of what the paper calls W
                        total = linear.weight.float() + (down[0].float() @ up.float()).mT
                        linear.weight = nn.Parameter(total.to(linear.weight.dtype), requires_grad=False)
        yield [{site: delta[site] for site in delta if site == "m"} for delta in deltas]
    finally:
        for linear, weight in own:
            linear.weight = weight


def skip_tag(positions, tag):
    """Positions as the published checkpoint counts them: int64[B, T] of the tokens that there are -> int64[B, T].

    tag  int64[B]  where the picture's tag stood, which is the position of the first token after it; -1: no picture
    """
    tag = tag[:, None]
    return positions + ((tag >= 0) & (positions >= tag))
