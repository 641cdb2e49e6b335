"""Names of tensors in other checkpoints -> names here, as tables of rules.

A rule is (pattern of the whole name, our name); the first that matches counts. A name that no rule
matches is an error in weights.fill; a tensor that is left out on purpose has a rule with SKIP.
Next: tokenizer.py.
"""
import re

SKIP = ""
BY_ID = ("llm.embed_tokens.weight", "llm.lm_head.weight")  # these have a row per token id
OURS = [(r"(vision|projector|perceptual|llm)\..+", r"\g<0>")]


def rename(name, rules):
    """Our name of a tensor, SKIP, or None where no rule matches."""
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None


def under(prefix, rules):
    """The same rules for names that begin with `prefix`, a pattern without groups."""
    return [(f"{prefix}(?:{pattern})", replacement) for pattern, replacement in rules]


# ---- Hugging Face's CLIP and Llama


def tower_rules(depth):
    """CLIPVisionModel, for a tower that is built with `depth` blocks."""
    return [
        (r"(vision_model\.)?(post_layernorm\..+|embeddings\.position_ids)", SKIP),
        (rf"(vision_model\.)?encoder\.layers\.{depth}\..+", SKIP),  # the last block is not used
        (r"(vision_model\.)?encoder\.(layers\..+)", r"vision.\2"),
        (r"(vision_model\.)?((embeddings|pre_layrnorm)\..+)", r"vision.\2"),
    ]


def clip_rules(depth):
    """CLIPVisionModel, or CLIPModel, which also has a text tower."""
    text = r"text_model\..+|(text|visual)_projection\..+|text_projection|logit_scale"
    return [(text, SKIP), *tower_rules(depth)]


def llama_rules(tied, body=r"model\.", head=""):
    """LlamaForCausalLM. `body` and `head` are patterns of the prefixes of blocks and head."""
    return [
        (rf"{body}layers\.\d+\.self_attn\.rotary_emb\.inv_freq", SKIP),  # a buffer of old versions
        (rf"{head}lm_head\.weight", SKIP if tied else r"llm.lm_head.weight"),
        (rf"{body}((layers|embed_tokens|norm)\..+)", r"llm.\1"),
    ]


# ---- LLaVA in transformers


def llava_rules(depth, tied):
    """LlavaForConditionalGeneration, whose versions differ.

    The parts have the prefix model. since 4.52; the Llama was language_model.model. before; the
    tower lost its vision_model. in 5.6; and `save_pretrained` still writes some of the old names.
    """
    return [
        *under(r"(?:model\.)?vision_tower\.", tower_rules(depth)),
        (r"(?:model\.)?multi_modal_projector\.(linear_[12]\.(weight|bias))", r"projector.\1"),
        *llama_rules(tied, r"(?:language_model\.model|model\.language_model)\.",
                     r"(?:language_model\.)?"),
    ]


TO_LLAVA = [  # the other way: our name -> that before 4.52, which every version opens
    (r"vision\.(layers\..+)", r"vision_tower.vision_model.encoder.\1"),
    (r"vision\.(.+)", r"vision_tower.vision_model.\1"),
    (r"projector\.(.+)", r"multi_modal_projector.\1"),
    (r"llm\.(lm_head\.weight)", r"language_model.\1"),
    (r"llm\.(.+)", r"language_model.model.\1"),
]


# ---- The layouts of LLaVA's and VLoRA's authors: a Llama's names, and these

ORIGINAL_TOWER = "model.vision_tower.vision_tower."  # prefix of a tower inside the checkpoint
ORIGINAL_PROJECTOR = [  # also the names in mm_projector.bin; module 1 is the GELU
    (r"(?:model\.)?mm_projector\.0\.(weight|bias)", r"projector.linear_1.\1"),
    (r"(?:model\.)?mm_projector\.2\.(weight|bias)", r"projector.linear_2.\1"),
]


def vlora_rules():
    """VLoRA's generator; its attentions keep the three input projections in one tensor."""
    attention = r"gen\.\d+\.decoders\.\d+\.(self|multihead)_attn\.in_proj"
    return [(rf"model\.mm_projector\.({attention})_(weight|bias)", r"perceptual.\1.\3"),
            (r"model\.mm_projector\.(.+)", r"perceptual.\1")]
