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

import weights
from data import (MULTIPLE, Batch, Conversations, Layout, Preprocess, collate, conversation, load_records, open_image, pad_right,
                  pieces, pixels)
from model import CLIP, Llama, LlamaConfig, VisionConfig, VLMConfig

VISION = VisionConfig(image_size=56, patch=8, width=128, depth=4, heads=2, hidden=512)
LLAMA = LlamaConfig(width=192, depth=4, heads=3, kv_heads=3, hidden=512, vocab=640, context=256)
CAPTION = LlamaConfig(width=128, depth=2, heads=2, kv_heads=2, hidden=256, vocab=640, tied=True)  # CLIP's other tower
PREPROCESS = Preprocess(size=VISION.image_size)
SHARED = 1.5  # what all of the Llama's embeddings start with in common, relative to what is each one's own
STATIC = VLMConfig(llm=LLAMA, visual_expert="none", language_expert="none")


class StandIns(nn.Module):
    """The two models of stage 0 and what CLIP needs besides to be trained; their losses are `loss` below."""

    def __init__(self):
        super().__init__()
        self.vision = CLIP(VISION)
        self.post_layernorm = nn.LayerNorm(VISION.width, eps=VISION.eps)
        self.caption = Llama(CAPTION, VLMConfig(llm=CAPTION, visual_expert="none", language_expert="none"))
        self.caption_projection = nn.Linear(CAPTION.width, VISION.width, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor([10.0]).log())  # 1-D: FSDP shards no scalars
        self.llm = Llama(LLAMA, STATIC)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02 if "embed" in name else p.shape[1] ** -0.5)
        # Llama's projections have no biases: heads can attend to a place, such as "the token before", only by what all
        # embeddings share. Born with it, and as large as what blocks add, the Llama learns much sooner (README, Results).
        nn.init.normal_(self.llm.embed_tokens.weight)
        self.llm.embed_tokens.weight.data += SHARED * torch.randn(LLAMA.width)

    def forward(self, batch):
        """Logits float[P, V] of the Llama, and how well each picture fits each phrase, float32[M, Q]."""
        x = self.llm(self.llm.embed_tokens(batch.text.ids))
        logits = self.llm.head(x.flatten(0, 1)[batch.text.at])
        patches = F.normalize(self.post_layernorm(self.vision(batch.pixels)[:, 1:]), dim=-1)            # (M, N, C)
        states = self.caption(self.caption.embed_tokens(batch.phrases)).flatten(0, 1)[batch.ends]       # (Q, width)
        phrases = F.normalize(self.caption_projection(states), dim=-1)                                  # (Q, C)
        similarity = self.logit_scale.exp() * (patches @ phrases.mT).float()                            # (M, N, Q)
        return logits, similarity.logsumexp(1)


def contrast(fit, own):
    """Each phrase must fit its own pictures better than any other picture, and each picture its own phrases.

    fit  float32[M, Q]; own bool[M, Q]: the phrase is in the picture's caption. Returns a scalar, a mean over own pairs.

    CLIP's loss, but a picture has several phrases and a phrase several pictures, so a pair competes with the foreign ones
    only. A smooth maximum over the patches finds where the phrase is seen, as in FILIP (arXiv 2111.07783): patches then
    learn for themselves what they show, and patches are what LLaVA reads.
    """
    foreign = fit.masked_fill(own, -1e4)
    return sum(F.softplus(foreign.logsumexp(dim, keepdim=True) - fit)[own].mean() for dim in (0, 1)) / 2


def loss(model, batch):
    """Summed next-token loss of the Llama, plus the contrast weighted like as many tokens, as train.py expects sums.

    The contrast is among the pictures of a micro-batch, so that unlike the Llama's loss it depends on how a step is cut.
    """
    logits, fit = model(batch)
    language = F.cross_entropy(logits.float(), batch.text.target, reduction="sum")
    return language + contrast(fit, batch.own) * batch.text.trained


@dataclass
class StandInBatch:
    """Conversations for the Llama; pictures, in pairs that differ in one thing, and all phrases of their captions for CLIP."""
    text: Batch
    pixels: torch.Tensor   # float[M, 3, S, S]
    phrases: torch.Tensor  # int64[Q, T]
    ends: torch.Tensor     # int64[Q], flat positions of the phrases' last tokens
    own: torch.Tensor      # bool[M, Q], which picture's caption has which phrase
    records: list[str]

    @property
    def lengths(self):
        return self.text.lengths

    def to(self, device):
        tensors = (x.to(device) for x in (self.pixels, self.phrases, self.ends, self.own))
        return StandInBatch(self.text.to(device), *tensors, self.records)


class StandInData:
    """Stage 0's data, read from a world's folder.

    Row i brings conversation i of text.json and PAIRS pairs of pictures that differ in one attribute: the hard negatives
    without which CLIP would learn a bag of colours and shapes.
    """
    PAIRS = 2

    def __init__(self, folder, texts, captions, tokenizer, system):
        layout = Layout("v1", system, VISION.tokens, LLAMA.context)
        self.texts = Conversations(os.path.join(folder, texts), folder, tokenizer, layout)
        records = load_records(os.path.join(folder, captions))
        files = (os.path.join(folder, "images", r["image"]) for r in records)
        # kept in bf16, half the size of fp32: 16,000 pictures are 350 MB
        self.pixels = torch.stack([pixels(open_image(f, f), PREPROCESS).bfloat16() for f in files])
        self.phrases = [re.split(", | and ", r["conversations"][1]["value"].rstrip(".")) for r in records]
        self.ids = {p: np.array(tokenizer.encode(p) + [tokenizer.eos]) for p in set(itertools.chain(*self.phrases))}

    def batch(self, rows):
        text = collate([self.texts[i] for i in rows], [], (VISION.tokens, VISION.width), multiple=MULTIPLE)
        pictures = [j % len(self.pixels) for i in rows for j in range(2 * self.PAIRS * i, 2 * self.PAIRS * (i + 1))]
        # in steps of 64 for the sake of fixed shapes, see data.collate: an empty phrase that no picture owns fits none
        column = {p: q for q, p in enumerate(dict.fromkeys(p for j in pictures for p in self.phrases[j]))}
        empty = [np.zeros(1, np.int64)] * (-len(column) % 64)
        ids = pad_right([self.ids[p] for p in column] + empty, 0, 4)
        ends = torch.tensor([q * ids.shape[1] + len(self.ids[p]) - 1 for p, q in column.items()]
                            + [q * ids.shape[1] for q in range(len(column), len(ids))])
        own = torch.zeros(len(pictures), len(ids), dtype=torch.bool)
        for m, j in enumerate(pictures):
            own[m, [column[p] for p in self.phrases[j]]] = True
        return StandInBatch(text, self.pixels[pictures].float(), ids, ends, own, text.records)


def words(folder):
    """The pieces of text that conversations about the world are cut into, to learn a vocabulary from."""
    layout = Layout("v1", "", VISION.tokens, LLAMA.context)
    for file in ("text.json", "instruct.json"):
        for record in load_records(os.path.join(folder, file))[:4000]:
            turns = conversation(record, "world")
            yield from (text for text, _, _ in pieces(turns, layout, "world") if text is not None)


def finish(tensors, tokenizer, out):
    """Write out/clip and out/llm in the Hugging Face layout from the trained tensors of a StandIns."""
    part = lambda prefix: {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    tower = part("vision.") | {f"post_layernorm.{k}": v for k, v in part("post_layernorm.").items()}
    weights.write_vision(os.path.join(out, "clip"), tower, VISION, PREPROCESS)
    weights.write_llama(os.path.join(out, "llm"), part("llm."), LLAMA, tokenizer, tokenizer.bos, tokenizer.eos)
