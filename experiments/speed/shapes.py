"""The sizes; random models, ours and transformers', with the same weights; what they read."""
import dataclasses
import json

import numpy as np
import torch

import toy.stand_ins
from data import IGNORE, IMAGE, pad_right, Sample
from formats.sentencepiece import layout_of_llama
from formats.tokenizer import Tokenizer
from model import LlamaConfig, VisionConfig
from weights import assign, build_empty, initialise, make_config, names_of

SHAPES = {  # CLIP and Llama
    "toy": (toy.stand_ins.VISION, toy.stand_ins.LLAMA),
    "small": (VisionConfig(336, 14, 384, 8, 6, 1536),
              LlamaConfig(512, 12, 8, 8, 1376, 32064, context=4096)),
    "1b": (VisionConfig(), LlamaConfig(1536, 10, 12, 12, 4096)),  # 0.5 billion weights
    "7b": (VisionConfig(), LlamaConfig(context=4096)),
    "7b8": (VisionConfig(), LlamaConfig(depth=8, context=4096)),  # 8 of 7b's 32 blocks
    "13b": (VisionConfig(), LlamaConfig(5120, 40, 40, 40, 13824, context=4096)),
    "tiny": (VisionConfig(28, 14, 32, 2, 2, 64), LlamaConfig(32, 4, 4, 4, 64, 400)),  # for tests
}

BIG = ("1b", "7b", "13b")

# Our models. The experts are the paper's: their up-projections start at zero, so that all of these
# give the same logits, bit for bit
NO_EXPERTS, EXPERTS, STATIC = "no experts", "experts", "static experts"
OURS = {NO_EXPERTS: dict(visual_expert="none", language_expert="none"),
        EXPERTS: {}, STATIC: dict(weight_source="static")}


def config(size, kind=NO_EXPERTS):
    """The VLMConfig of one of OURS."""
    return make_config(*SHAPES[size], **OURS[kind])


# ---- Weights


def random_values(shape, name, o):
    """A random parameter: a matrix keeps the scale of its input, a norm does nothing."""
    if name.endswith("bias") or "norm" in name:
        value = float(name.endswith("weight"))
        return torch.full(shape, value, device=o.device, dtype=o.torch_dtype)
    inputs = shape[1:].numel() if len(shape) > 1 else shape[0]
    return torch.randn(shape, device=o.device, dtype=o.torch_dtype).mul_(inputs ** -0.5)


def build(kind, o):
    """One of OURS, random but always the same, with the size, device and dtype of the options."""
    cfg = config(o.size, kind)
    model, same = build_empty(cfg), names_of(config(o.size))
    torch.manual_seed(0)
    for name, p in list(model.named_parameters()):
        if name in same:
            assign(model, name, random_values(p.shape, name, o))
    initialise(model, 0, o.torch_dtype)  # the experts
    return model.to(o.device).eval()


# ---- transformers


def their_name(name):
    """The name of our parameter in transformers' LlavaForConditionalGeneration."""
    for ours, theirs in (("vision.layers.", "model.vision_tower.encoder.layers."),
                         ("vision.", "model.vision_tower."), ("llm.lm_head.", "lm_head."),
                         ("projector.", "model.multi_modal_projector."),
                         ("llm.", "model.language_model.")):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise KeyError(name)


def build_theirs(o, like=None, share=False):
    """transformers' LLaVA, with sdpa.

    like   our model without experts, whose weights it gets; None: random ones
    share  it gets these very tensors, not copies
    """
    import transformers  # takes seconds
    transformers.logging.set_verbosity_error()
    vision, llm = SHAPES[o.size]
    cfg = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=vision.width, intermediate_size=vision.hidden,
            num_hidden_layers=vision.depth + 1, num_attention_heads=vision.heads,
            image_size=vision.image_size, patch_size=vision.patch),
        text_config=transformers.LlamaConfig(
            hidden_size=llm.width, intermediate_size=llm.hidden, num_hidden_layers=llm.depth,
            num_attention_heads=llm.heads, num_key_value_heads=llm.kv_heads,
            vocab_size=llm.vocab, rms_norm_eps=llm.eps, max_position_embeddings=llm.context),
        image_token_index=llm.vocab - 1, vision_feature_layer=-2,
        vision_feature_select_strategy="default", tie_word_embeddings=False)
    with torch.device(o.device):
        model = transformers.LlavaForConditionalGeneration._from_config(
            cfg, attn_implementation="sdpa", dtype=o.torch_dtype)
    if like is not None:
        state = {their_name(name): p.detach() for name, p in like.named_parameters()}
        last = f"model.vision_tower.encoder.layers.{vision.depth}."  # LLaVA does not use its output
        missing, left = model.load_state_dict(state, strict=False, assign=share)
        unused = (last, "model.vision_tower.post_layernorm.")
        assert not left and all(name.startswith(unused) for name in missing), (missing, left)
    model.generation_config.eos_token_id = None  # as many tokens as are asked for
    return model.eval()


# ---- What they read


def conversation(cfg, rng, *, turns=1, asked=70, answered=0):
    """A `Sample` about a picture, of random ids: each turn has so many, answer apart."""
    def words(n):
        return rng.integers(3, cfg.llm.vocab - 1, n)  # the last id is transformers' <image>

    system = asked // 2  # system text in front of the picture, in the first turn only
    parts = [(words(system), "system", 0), (np.full(cfg.image_tokens, IMAGE), "picture", 0)]
    for turn in range(turns):
        parts.append((words(asked - (0 if turn else system)), "question", turn))
        parts.append((words(answered), "answer", turn))
    ids, (what, turn) = np.concatenate([part[0] for part in parts]), (
        np.repeat([part[i] for part in parts], [len(part[0]) for part in parts]) for i in (1, 2))
    return Sample(ids, np.where(what == "answer", ids, IGNORE),
                  np.where(what == "question", turn, -1), turn, turns, "picture", "random", system)


def with_answers(samples, answers):
    """The samples of prompts, each with its answer (a list of ids) as what is trained."""
    def longer(sample, answer):
        more = {"ids": answer, "labels": answer, "pool_id": [-1] * len(answer),
                "use_id": [sample.use_id[-1]] * len(answer)}
        return dataclasses.replace(sample, **{
            name: np.concatenate([getattr(sample, name), values]) for name, values in more.items()})

    return [longer(sample, answer) for sample, answer in zip(samples, answers)]


def pictures(n, o):
    """n random pictures float32[3, S, S], a list."""
    side = SHAPES[o.size][0].image_size
    return list(torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1)))


def their_batch(samples, visual, o):
    """The keyword arguments of transformers' model, without labels, and the labels int64[B, T]."""
    ids = pad_right([s.ids for s in samples], 0)
    ids[ids == IMAGE] = SHAPES[o.size][1].vocab - 1
    mask = pad_right([np.ones_like(s.ids) for s in samples], 0)
    labels = pad_right([s.labels for s in samples], IGNORE)
    pixels = torch.stack(visual).to(o.device, o.torch_dtype)
    return {"input_ids": ids.to(o.device), "attention_mask": mask.to(o.device),
            "pixel_values": pixels}, labels.to(o.device)


def meaningless_tokenizer(ids):
    """A Tokenizer with Llama's layout and so many ids, most of them numbers as words."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁"]
    names += [f"▁{i}" for i in range(ids - len(names))]
    inner = layout_of_llama({name: i for i, name in enumerate(names)}, [])
    inner.add_special_tokens(names[:3])
    return Tokenizer(json.loads(inner.to_str()))


def random_like(state):
    """Random tensors with the shapes and dtypes of `state`, a dict: views of a few numbers.

    They overlap, so a tensor takes memory only while it is written. Each begins at another number.
    """
    pool = torch.empty(2**18, dtype=next(iter(state.values())).dtype).normal_(0, 0.02)
    views = {}
    for start, (name, t) in enumerate(state.items()):
        numbers = pool + 1 if "norm" in name and name.endswith("weight") else pool
        views[name] = numbers.as_strided(t.shape, (2,) * t.ndim, start)
    return views
