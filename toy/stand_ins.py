"""Stage 0 of the toy: a CLIP and a Llama in miniature, trained on the toy world and written as Hugging Face would.

Nothing can be downloaded on a fresh machine, so the default run makes its own stand-ins for CLIP-L and Vicuna: a vision tower
by contrast with the phrases of captions, a Llama by conversations over scenes told in words. Both come out as the folders that `CLIPVisionModel`
and `LlamaForCausalLM` write, and stages 1 and 2 read them like any other. The world itself is in world.py; train.py trains.
"""
import itertools
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import (load_records, open_image, pad_right, pieces, pixels, Preprocess, PromptFormat,
    turns_of_record)
from formats.export import write_llama, write_vision
from model import Batch, CLIP, Llama, LlamaConfig, VisionConfig, VLMConfig

VISION = VisionConfig(image_size=56, patch=8, width=128, depth=4, heads=2, hidden=512)
LLAMA = LlamaConfig(width=192, depth=4, heads=3, kv_heads=3, hidden=512, vocab=640, context=256)
CAPTION = LlamaConfig(width=128, depth=2, heads=2, kv_heads=2, hidden=256, vocab=640, tied=True)  # CLIP's other tower
PREPROCESS = Preprocess(size=VISION.image_size)
SHARED = 1.5  # what all of the Llama's embeddings start with in common, relative to what is each one's own
STATIC = VLMConfig(llm=LLAMA, visual_expert="none", language_expert="none")


def begin(model):
    """The weights that a stand-in begins with: blocks add nothing at first, and all else is of the size of what it reads.

    A block that adds nothing is an idea of Zhang et al., "Fixup" (arXiv 1901.09321).
    """
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
            if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(p)


def look_back(attention, common):
    """Let head h of a block begin by looking at the token h + 1 places back.

    common  float[D], what all embeddings share: queries and keys get a part of it, turned against one another so that
            the rotary angle of that distance brings them in line
    """
    heads, width = LLAMA.heads, LLAMA.width // LLAMA.heads
    frequency = LLAMA.theta ** (-torch.arange(0, width, 2) / width)
    size = 0.5 * (torch.arange(width // 2) < 12) / common.norm()  # fast rotations alone tell neighbours apart
    queries, keys = (p.weight.data.view(heads, width, -1) for p in (attention.q_proj, attention.k_proj))
    for head in range(heads):
        angle = (head + 1) * frequency
        queries[head] += torch.cat([size * angle.cos(), -size * angle.sin()])[:, None] * common
        keys[head] += torch.cat([size, 0 * size])[:, None] * common
    nn.init.normal_(attention.o_proj.weight, std=LLAMA.width ** -0.5)  # they have something to say at once


class StandInCLIP(nn.Module):
    """A CLIP tower and what it needs besides to be trained; its loss is `contrast_loss` below."""

    def __init__(self):
        super().__init__()
        self.vision = CLIP(VISION)
        self.post_layernorm = nn.LayerNorm(VISION.width, eps=VISION.eps)
        self.caption = Llama(VLMConfig(llm=CAPTION, visual_expert="none", language_expert="none"))
        self.caption_projection = nn.Linear(CAPTION.width, VISION.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([10.0]).log())  # 1-D: FSDP shards no scalars
        begin(self)

    def forward(self, batch):
        """How well each picture fits each phrase, float32[M, Q]."""
        patches = F.normalize(self.post_layernorm(self.vision(batch.pixels)[:, 1:]), dim=-1)            # (M, N, C)
        text = Batch(batch.phrases, batch.ends)
        states = self.caption(self.caption.embed_tokens(batch.phrases), text).flatten(0, 1)[batch.ends]  # (Q, width)
        phrases = F.normalize(self.caption_projection(states), dim=-1) * self.logit_scale.exp()         # (Q, C)
        return (patches @ phrases.mT).float().logsumexp(1)                                              # of (M, N, Q)

    def loss(self, batch):
        """`contrast`, as a sum over the pictures of a micro-batch; a picture competes within it only."""
        return contrast(self(batch), batch.own) * len(batch.pixels)


class StandInLlama(nn.Module):
    """A Llama that reads text alone; its loss is `language_loss` below."""

    def __init__(self):
        super().__init__()
        self.llm = Llama(STATIC)
        begin(self)
        # Llama's projections have no biases: heads can attend to a place, such as "the token before", only by what all
        # embeddings share. Born with it, and as large as what blocks add, the Llama learns much sooner (README, Results).
        nn.init.normal_(self.llm.embed_tokens.weight)
        common = torch.randn(LLAMA.width)
        self.llm.embed_tokens.weight.data += SHARED * common
        look_back(self.llm.layers[0].self_attn, common)

    def forward(self, batch):
        """Logits float[P, V] at the batch's supervised positions."""
        x = self.llm(self.llm.embed_tokens(batch.ids), batch)
        return self.llm.head(x.flatten(0, 1)[batch.at])

    def loss(self, batch):
        """Next-token loss summed over the supervised positions."""
        return F.cross_entropy(self(batch).float(), batch.target, reduction="sum")


def contrast(fit, own):
    """Each phrase must fit its own pictures better than any other picture, and each picture its own phrases.

    fit  float32[M, Q]; own bool[M, Q]: the phrase is in the picture's caption. Returns a scalar, a mean over own pairs.

    CLIP's loss, but a picture has several phrases and a phrase several pictures, so a pair competes with the foreign ones
    only. A smooth maximum over the patches finds where the phrase is seen, as in FILIP (arXiv 2111.07783): patches then
    learn for themselves what they show, and patches are what LLaVA reads.
    """
    foreign = fit.masked_fill(own, -1e4)
    return sum(F.softplus(foreign.logsumexp(dim, keepdim=True) - fit)[own].mean() for dim in (0, 1)) / 2


@dataclass
class CaptionBatch:
    """Pictures, in pairs that differ in one thing, and all phrases of their captions."""
    pixels: torch.Tensor   # float[M, 3, S, S]
    phrases: torch.Tensor  # int64[Q, T]
    ends: torch.Tensor     # int64[Q], flat positions of the phrases' last tokens
    own: torch.Tensor      # bool[M, Q], which picture's caption has which phrase
    lengths: torch.Tensor  # int64[M], positions a picture takes in the tower
    records: list[str]

    @property
    def trained(self):
        return len(self.pixels)

    def to(self, device):
        tensors = (x.to(device) for x in (self.pixels, self.phrases, self.ends, self.own, self.lengths))
        return CaptionBatch(*tensors, self.records)


class Captions:
    """The data of the stand-in for CLIP, read from a world's folder.

    Row i is a pair of pictures that differ in one attribute: the hard negatives without which CLIP would learn a bag of
    colours and shapes.
    """

    def __init__(self, folder, file, tokenizer):
        records = load_records(os.path.join(folder, file))
        files = (os.path.join(folder, "images", r["image"]) for r in records)
        # kept in bf16, half the size of fp32: 16,000 pictures are 350 MB
        self.pixels = torch.stack([pixels(open_image(f, f), PREPROCESS).bfloat16() for f in files])
        self.phrases = [re.split(", | and ", r["conversations"][1]["value"].rstrip(".")) for r in records]
        self.ids = {p: np.array(tokenizer.encode(p) + [tokenizer.eos]) for p in set(itertools.chain(*self.phrases))}

    has_image = sample = None

    def __len__(self):
        return len(self.pixels) // 2

    @property
    def lengths(self):
        return np.ones(len(self), np.int64)

    def take_skipped(self):
        return []

    def batch(self, rows):
        pictures = [j for i in rows for j in (2 * i, 2 * i + 1)]
        # in steps of 64 for the sake of fixed shapes, see data.collate: an empty phrase that no picture owns fits none
        column = {p: q for q, p in enumerate(dict.fromkeys(p for j in pictures for p in self.phrases[j]))}
        empty = [np.zeros(1, np.int64)] * (-len(column) % 64)
        ids = pad_right([self.ids[p] for p in column] + empty, 0, 4)
        ends = torch.tensor([q * ids.shape[1] + len(self.ids[p]) - 1 for p, q in column.items()]
                            + [q * ids.shape[1] for q in range(len(column), len(ids))])
        own = torch.zeros(len(pictures), len(ids), dtype=torch.bool)
        for m, j in enumerate(pictures):
            own[m, [column[p] for p in self.phrases[j]]] = True
        lengths = torch.full((len(pictures),), VISION.tokens + 1)
        return CaptionBatch(self.pixels[pictures].float(), ids, ends, own, lengths, [f"picture {j}" for j in pictures])


def words(folder):
    """The pieces of text that conversations about the world are cut into, to learn a vocabulary from."""
    layout = PromptFormat("v1", "", VISION.tokens, LLAMA.context)
    for file in ("text.json", "instruct.json"):
        for record in load_records(os.path.join(folder, file))[:4000]:
            turns = turns_of_record(record, "world")
            yield from (text for text, _, _ in pieces(turns, layout, "world") if text is not None)


def write_clip(tensors, out):
    """Write the trained tensors of a StandInCLIP in the Hugging Face layout."""
    tower = {k.removeprefix("vision."): v for k, v in tensors.items() if k.startswith(("vision.", "post_layernorm."))}
    write_vision(out, tower, VISION, PREPROCESS)


def write_llm(tensors, tokenizer, out):
    """Write the trained tensors of a StandInLlama in the Hugging Face layout."""
    state = {k.removeprefix("llm."): v for k, v in tensors.items()}
    write_llama(out, state, LLAMA, tokenizer)
