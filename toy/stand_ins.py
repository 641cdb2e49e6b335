"""Stage 0's models: a CLIP and a Llama in miniature, with their losses and their data.

The default run needs no download: it trains its own stand-ins for CLIP-L and Vicuna. The vision
tower learns by contrast with the phrases of captions, the Llama from conversations about scenes
that are described in words. Both are saved as the folders that transformers' `CLIPVisionModel` and
`LlamaForCausalLM` write, and stages 1 and 2 read them like any other.

Next: stage0.py hands them to train.py. The data is made by files.py.
"""
import itertools
import os
import re
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import (open_image, pad_right, pieces, pixels, Preprocess, PromptFormat,
                  turns_of_record)
from formats.export import write_llama, write_vision
from formats.json_files import read_json_list
from model import Batch, CLIP, Llama, LlamaConfig, VisionConfig, VLMConfig

VISION = VisionConfig(image_size=56, patch=8, width=128, depth=4, heads=2, hidden=512)
LLAMA = LlamaConfig(width=192, depth=4, heads=3, kv_heads=3, hidden=512, vocab=640, context=256)
CAPTION = LlamaConfig(width=128, depth=2, heads=2, kv_heads=2, hidden=256, vocab=640, tied=True)
PREPROCESS = Preprocess(size=VISION.image_size)
OUTPUTS = ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")  # last in a block
SHARED = 1.5  # size of the vector that all embeddings of the Llama share; their own part has size 1


def init_weights(model):
    """Initialise a stand-in: blocks add nothing at first, other matrices keep their input's scale.

    Blocks that start at zero follow Zhang et al., "Fixup" (arXiv 1901.09321).
    """
    for name, p in model.named_parameters():
        if p.ndim == 2:
            nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
            if name.endswith(OUTPUTS):
                nn.init.zeros_(p)


def look_back(attention, common):
    """Initialise head h of a block to attend to the token h + 1 places back.

    common  float[D], the vector that all embeddings share. Queries and keys get a multiple of it,
            rotated against each other so that RoPE aligns them at exactly that distance.
    """
    heads, width = LLAMA.heads, LLAMA.width // LLAMA.heads
    frequency = LLAMA.theta ** (-torch.arange(0, width, 2) / width)
    fast = torch.arange(width // 2) < 12  # only fast rotations distinguish neighbours
    size = 0.5 * fast / common.norm()
    queries = attention.q_proj.weight.data.view(heads, width, -1)
    keys = attention.k_proj.weight.data.view(heads, width, -1)
    for head in range(heads):
        angle = (head + 1) * frequency
        queries[head] += torch.cat([size * angle.cos(), -size * angle.sin()])[:, None] * common
        keys[head] += torch.cat([size, 0 * size])[:, None] * common
    nn.init.normal_(attention.o_proj.weight, std=LLAMA.width ** -0.5)  # not zero: used at once


def static(llm):
    """The VLMConfig of a Llama without experts."""
    return VLMConfig(llm=llm, visual_expert="none", language_expert="none")


# ---- The models


def contrastive_loss(similarity, own):
    """Each phrase must match its own pictures better than others, each picture its own phrases.

    similarity  float32[M, Q]; own bool[M, Q]: whether the phrase is in the picture's caption
    returns     a scalar, the mean over own pairs

    CLIP's loss, except that a picture has several phrases and a phrase several pictures: a pair
    competes only with pairs that do not belong together.
    """
    foreign = similarity.masked_fill(own, -1e4)

    def compete(dim):  # over pictures (0) or phrases (1)
        return F.softplus(foreign.logsumexp(dim, keepdim=True) - similarity)[own].mean()

    return (compete(0) + compete(1)) / 2


class StandInCLIP(nn.Module):
    """A CLIP tower and the parts that only its training needs: a caption tower and projections."""

    def __init__(self):
        super().__init__()
        self.vision = CLIP(VISION)
        self.post_layernorm = nn.LayerNorm(VISION.width, eps=VISION.eps)
        self.caption = Llama(static(CAPTION))
        self.caption_projection = nn.Linear(CAPTION.width, VISION.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([10.0]).log())  # 1-D: FSDP shards no scalars
        init_weights(self)

    def forward(self, batch):
        """Similarity of each picture to each phrase, float32[M, Q].

        A smooth maximum over the patches finds where the phrase is seen, as in FILIP (arXiv
        2111.07783). So each patch learns what it shows, and patches are what LLaVA reads.
        """
        patches = self.post_layernorm(self.vision(batch.pixels)[:, 1:])          # (M, N, C)
        text = Batch(batch.phrases, batch.ends % batch.phrases.shape[1] + 1)
        states = self.caption(self.caption.embed_tokens(text.ids), text)         # (Q, T, width)
        phrases = self.caption_projection(states.flatten(0, 1)[batch.ends])      # (Q, C)
        patches, phrases = F.normalize(patches, dim=-1), F.normalize(phrases, dim=-1)
        scores = patches @ (phrases * self.logit_scale.exp()).mT                 # (M, N, Q)
        return scores.float().logsumexp(1)                                       # (M, Q)

    def loss(self, batch):
        """`contrastive_loss`, summed over pictures; they compete within the micro-batch."""
        return contrastive_loss(self(batch), batch.own) * batch.trained


class StandInLlama(nn.Module):
    """A Llama that is trained on text only."""

    def __init__(self):
        super().__init__()
        self.llm = Llama(static(LLAMA))
        init_weights(self)
        # Llama's projections have no biases, so heads can attend to a position, such as "the token
        # before", only through a vector that all embeddings share. With such a vector from the
        # start, and embeddings as large as what blocks add, the Llama learns much faster.
        nn.init.normal_(self.llm.embed_tokens.weight)
        common = torch.randn(LLAMA.width)
        self.llm.embed_tokens.weight.data += SHARED * common
        look_back(self.llm.layers[0].self_attn, common)

    def forward(self, batch):
        """Logits float[P, V] at the batch's supervised positions."""
        x = self.llm(self.llm.embed_tokens(batch.ids), batch)
        return self.llm.head(x.flatten(0, 1)[batch.at])

    def loss(self, batch):
        """Next-token loss, summed over the supervised positions."""
        return F.cross_entropy(self(batch).float(), batch.target, reduction="sum")


# ---- Their data


@dataclass
class CaptionBatch:
    """Pictures, in pairs that differ in one attribute, and all phrases of their captions."""
    pixels: torch.Tensor   # float[M, 3, S, S]
    phrases: torch.Tensor  # int64[Q, T]
    ends: torch.Tensor     # int64[Q], flat positions of the phrases' last tokens
    own: torch.Tensor      # bool[M, Q], whether the picture's caption has the phrase
    lengths: torch.Tensor  # int64[M], positions of a picture in the tower
    records: list[str]     # names for error messages

    @property
    def trained(self):
        """The number of pictures, M: the loss is a sum over them."""
        return len(self.pixels)

    def to(self, device):
        """The same batch with its tensors on `device`."""
        tensors = self.pixels, self.phrases, self.ends, self.own, self.lengths
        return CaptionBatch(*(x.to(device) for x in tensors), self.records)


class Captions:
    """The data of the stand-in for CLIP, from a world's folder, all in memory.

    Sample i is a pair of pictures that differ in one attribute: hard negatives, without which CLIP
    would learn only which colours and shapes there are, not which belong together.
    """
    sample = has_image = None  # its samples are not conversations, and all alike

    def __init__(self, folder, file, tokenizer):
        records = read_json_list(os.path.join(folder, file))
        files = (os.path.join(folder, "images", r["image"]) for r in records)
        # bf16, half the size of fp32: 16,000 pictures take 350 MB
        self.pixels = torch.stack([pixels(open_image(f, f), PREPROCESS).bfloat16() for f in files])
        captions = [r["conversations"][1]["value"].rstrip(".") for r in records]
        self.phrases = [re.split(", | and ", caption) for caption in captions]
        self.ids = {p: np.array(tokenizer.encode(p) + [tokenizer.eos])
                    for p in set(itertools.chain(*self.phrases))}

    def __len__(self):
        return len(self.pixels) // 2

    @property
    def lengths(self):
        """int64[n]: all samples are equally long."""
        return np.ones(len(self), np.int64)

    def take_skipped(self):
        """Messages about unreadable pictures, see training/feed.py: there are none."""
        return []

    def batch(self, rows):
        """The `CaptionBatch` of the samples with these indices."""
        pictures = [j for i in rows for j in (2 * i, 2 * i + 1)]
        phrases = dict.fromkeys(p for j in pictures for p in self.phrases[j])
        column = {p: q for q, p in enumerate(phrases)}
        # Padded to a multiple of 64, for fixed shapes (see data.collate), by empty phrases that
        # belong to no picture
        empty = [np.zeros(1, np.int64)] * (-len(column) % 64)
        ids = pad_right([self.ids[p] for p in column] + empty, 0, 4)
        ends = torch.tensor([q * ids.shape[1] + len(self.ids[p]) - 1 for p, q in column.items()]
                            + [q * ids.shape[1] for q in range(len(column), len(ids))])
        own = torch.zeros(len(pictures), len(ids), dtype=torch.bool)
        for m, j in enumerate(pictures):
            own[m, [column[p] for p in self.phrases[j]]] = True
        lengths = torch.full((len(pictures),), VISION.tokens + 1)
        records = [f"picture {j}" for j in pictures]
        return CaptionBatch(self.pixels[pictures].float(), ids, ends, own, lengths, records)


def words(folder):
    """Yield the pieces of text of a world's conversations, to learn a vocabulary from."""
    layout = PromptFormat("v1", "", VISION.tokens, LLAMA.context)
    for file in ("text.json", "instruct.json"):
        for record in read_json_list(os.path.join(folder, file))[:4000]:
            turns = turns_of_record(record, "world")
            yield from (text for text, _, _ in pieces(turns, layout, "world") if text is not None)


# ---- Their files


def write_clip(tensors, out):
    """Write the trained tensors of a StandInCLIP in the Hugging Face layout."""
    tower = {k.removeprefix("vision."): v for k, v in tensors.items()
             if k.startswith(("vision.", "post_layernorm."))}
    write_vision(out, tower, VISION, PREPROCESS)


def write_llm(tensors, tokenizer, out):
    """Write the trained tensors of a StandInLlama in the Hugging Face layout."""
    state = {k.removeprefix("llm."): v for k, v in tensors.items()}
    write_llama(out, state, LLAMA, tokenizer)
