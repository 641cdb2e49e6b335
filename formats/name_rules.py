"""TODO"""
import re


def vlora_rules():
    """Names of the published checkpoint's generator -> ours, as weights.rename reads them; the rest is a LLaVA's."""
    ours = r"model\.mm_projector\."
    return [
        (rf"{ours}(gen\.\d+\.decoders\.\d+\.(self|multihead)_attn\.in_proj)_(weight|bias)", r"perceptual.\1.\3"),
        (rf"{ours}(.+)", r"perceptual.\1"),
    ]


# ---- Other people's names: (pattern of the whole name, ours). The first that matches counts; SKIP: knowingly unused

SKIP = ""
OURS = [(r"(vision|projector|perceptual|llm)\..+", r"\g<0>")]


def under(prefix, rules):
    """The same rules for names with something before them: `prefix`, a pattern without groups."""
    return [(f"{prefix}(?:{pattern})", replacement) for pattern, replacement in rules]


def tower_rules(depth):
    """Names of a CLIPVisionModel -> ours, for a tower of which `depth` blocks are built."""
    return [
        (r"(vision_model\.)?(post_layernorm\..+|embeddings\.position_ids)", SKIP),
        (rf"(vision_model\.)?encoder\.layers\.{depth}\..+", SKIP),  # the block whose output nobody reads
        (r"(vision_model\.)?encoder\.(layers\..+)", r"vision.\2"),
        (r"(vision_model\.)?((embeddings|pre_layrnorm)\..+)", r"vision.\2"),
    ]


def clip_rules(depth):
    """Names of a CLIPVisionModel or of a CLIPModel, which has a text tower beside it, -> ours."""
    return [(r"text_model\..+|(text|visual)_projection\..+|text_projection|logit_scale", SKIP)] + tower_rules(depth)


def llama_rules(tied, body=r"model\.", head=""):
    """Names of a LlamaForCausalLM -> ours. `body`, `head`: patterns of what stands before those of the blocks and the head."""
    return [
        (rf"{body}layers\.\d+\.self_attn\.rotary_emb\.inv_freq", SKIP),  # a buffer of old versions
        (rf"{head}lm_head\.weight", SKIP if tied else r"llm.lm_head.weight"),
        (rf"{body}((layers|embed_tokens|norm)\..+)", r"llm.\1"),
    ]


def llava_rules(depth, tied):
    """Names of transformers' LlavaForConditionalGeneration -> ours.

    Its versions disagree: model. stands before the parts' names since 4.52, the Llama was language_model.model. until then,
    the tower lost its vision_model. in 5.6, and `save_pretrained` writes some of the old names to this day.
    """
    return [
        *under(r"(?:model\.)?vision_tower\.", tower_rules(depth)),
        (r"(?:model\.)?multi_modal_projector\.(linear_[12]\.(weight|bias))", r"projector.\1"),
        *llama_rules(tied, r"(?:language_model\.model|model\.language_model)\.", r"(?:language_model\.)?"),
    ]


# LLaVA's own names: a Llama's, and these. The projector's are all that mm_projector.bin has; the tower may be left out
ORIGINAL_PROJECTOR = [(r"model\.mm_projector\.0\.(weight|bias)", r"projector.linear_1.\1"),  # 1 is the GELU
                      (r"model\.mm_projector\.2\.(weight|bias)", r"projector.linear_2.\1")]
ORIGINAL_TOWER = "model.vision_tower.vision_tower."


TO_LLAVA = [  # ours -> transformers' before 4.52, which every version opens
    (r"vision\.(layers\..+)", r"vision_tower.vision_model.encoder.\1"),
    (r"vision\.(.+)", r"vision_tower.vision_model.\1"),
    (r"projector\.(.+)", r"multi_modal_projector.\1"),
    (r"llm\.(lm_head\.weight)", r"language_model.\1"),
    (r"llm\.(.+)", r"language_model.model.\1"),
]


def rename(name, rules):
    """Our name of a tensor, SKIP, or None where no rule knows it."""
    for pattern, replacement in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(replacement)
    return None
BY_ID = ("llm.embed_tokens.weight", "llm.lm_head.weight")  # a row per id
