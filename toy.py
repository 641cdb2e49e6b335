"""Stage 0 of the toy: a CLIP and a Llama in miniature, trained on the toy world and written as Hugging Face would.

Nothing can be downloaded on a fresh machine, so the default run makes its own stand-ins for CLIP-L and Vicuna: a vision tower
by contrast with captions, a Llama by conversations over scenes told in words. Both come out as the folders that `CLIPVisionModel`
and `LlamaForCausalLM` write, and stages 1 and 2 read them like any other. The world itself is in world.py; train.py trains.
"""
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import weights
from data import Batch, Conversations, Layout, Preprocess, collate, conversation, load_records, open_image, pad_right, pieces, pixels
from model import CLIP, Llama, LlamaConfig, VisionConfig, VLMConfig

VISION = VisionConfig(image_size=60, patch=10, width=128, depth=4, heads=2, hidden=512)
LLAMA = LlamaConfig(width=192, depth=4, heads=3, kv_heads=3, hidden=512, vocab=640, context=256)
CAPTION = LlamaConfig(width=128, depth=2, heads=2, kv_heads=2, hidden=256, vocab=640, tied=True)  # CLIP's other tower
PREPROCESS = Preprocess(size=VISION.image_size)
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

    def forward(self, batch):
        """Logits float[P, V] of the Llama, and similarities float[M, M] of pictures (rows) with captions (columns)."""
        x = self.llm(self.llm.embed_tokens(batch.text.ids))
        logits = self.llm.head(x.flatten(0, 1)[batch.text.at])
        picture = F.normalize(self.post_layernorm(self.vision(batch.pixels)[:, 0]), dim=-1)
        states = self.caption(self.caption.embed_tokens(batch.captions)).flatten(0, 1)[batch.ends]
        caption = F.normalize(self.caption_projection(states), dim=-1)
        return logits, self.logit_scale.exp().to(picture.dtype) * picture @ caption.mT


def contrast(similarity):
    """CLIP's loss: each picture finds its caption among all, each caption its picture. float[M, M] -> scalar, a mean."""
    own = torch.arange(len(similarity), device=similarity.device)
    similarity = similarity.float()
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.mT, own)) / 2


def loss(model, batch):
    """Summed next-token loss of the Llama, plus the contrast weighted like as many tokens, as train.py expects sums."""
    logits, similarity = model(batch)
    language = F.cross_entropy(logits.float(), batch.text.target, reduction="sum")
    return language + contrast(similarity) * len(batch.text.target)


@dataclass
class StandInBatch:
    """Conversations for the Llama, and pictures with their captions for CLIP, each an edit of its neighbour."""
    text: Batch
    pixels: torch.Tensor    # float[M, 3, S, S]
    captions: torch.Tensor  # int64[M, T]
    ends: torch.Tensor      # int64[M], flat positions of the captions' last tokens
    records: list[str]

    def to(self, device):
        return StandInBatch(self.text.to(device), *(x.to(device) for x in (self.pixels, self.captions, self.ends)), self.records)


class StandInData:
    """Stage 0's data, read from a world's folder.

    Row i brings conversation i of text.json and PAIRS pairs of pictures that differ in one attribute: the hard negatives
    without which CLIP would learn a bag of colours and shapes.
    """
    PAIRS = 2

    def __init__(self, folder, tokenizer, system):
        layout = Layout("v1", system, VISION.tokens, LLAMA.context)
        self.texts = Conversations(os.path.join(folder, "text.json"), folder, tokenizer, layout)
        records = load_records(os.path.join(folder, "captions.json"))
        files = (os.path.join(folder, "images", r["image"]) for r in records)
        # kept in bf16, half the size of fp32: 16,000 pictures are 350 MB
        self.pixels = torch.stack([pixels(open_image(f, f), PREPROCESS).bfloat16() for f in files])
        self.captions = [tokenizer.encode(r["conversations"][1]["value"]) + [tokenizer.eos] for r in records]

    def batch(self, rows):
        text = collate([self.texts[i] for i in rows], [], (VISION.tokens, VISION.width))
        pictures = [j % len(self.pixels) for i in rows for j in range(2 * self.PAIRS * i, 2 * self.PAIRS * (i + 1))]
        captions = [np.array(self.captions[j]) for j in pictures]
        ids = pad_right(captions, 0)
        ends = torch.tensor([m * ids.shape[1] + len(c) - 1 for m, c in enumerate(captions)])
        return StandInBatch(text, self.pixels[pictures].float(), ids, ends, text.records)


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
