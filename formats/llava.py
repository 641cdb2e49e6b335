"""TODO"""
import dataclasses
import os
import re

from cli import UserError
from formats.configs import check_value, demand, preprocessing, text_config, tower_config, translate, vision_config
from formats.folders import locate, PROJECTOR, resolve
from formats.json_files import read_json_object
from formats.name_rules import (clip_rules, llama_rules, llava_rules, ORIGINAL_PROJECTOR,
    ORIGINAL_TOWER, tower_rules, under, vlora_rules)
from formats.weight_files import LAYOUTS, names_in
from model import VisionConfig
from vlora import SITES, VLoRAConfig

VLORA_TYPE = "llava_vlora"       # model_type of VLoRA's authors


# ---- LLaVA-1.5, in its own layout and in that of transformers

# Towers by the name that LLaVA gives to CLIP's folder: one that lies inside a checkpoint comes without its config
TOWERS = {"openai/clip-vit-large-patch14-336": VisionConfig(),
          "openai/clip-vit-large-patch14": VisionConfig(image_size=224),
          "clip-vit-large-patch14-336": VisionConfig()}  # in VLoRA's scripts


def nested(config, key, path):
    """An object inside a config file; UserError if it is not there."""
    if not isinstance(config.get(key), dict):
        raise UserError(f"{path}: no {key}, which LLaVA in the layout of transformers has")
    return config[key]


def aspect_of(config, path):
    """How pictures are made square: by padding, as for LLaVA-1.5, unless the config says that it was trained otherwise."""
    aspect = config.get("image_aspect_ratio", "pad")
    if aspect not in ("pad", "square"):
        raise UserError(f"{path}: image_aspect_ratio {aspect!r} is not supported, only 'pad' and 'square'")
    return "crop" if aspect == "square" else "pad"


def read_llava(folder, config, path):
    """(VisionConfig, LlamaConfig, Preprocess, sources to `fill` from) of a LLaVA in the layout of transformers."""
    demand(config, path, vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
           multimodal_projector_bias=True)
    vision, text = nested(config, "vision_config", path), nested(config, "text_config", path)
    demand(vision, f"{path}: vision_config", model_type="clip_vision_model")
    vision = tower_config(vision, f"{path}: vision_config")
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
    llm = text_config({"model_type": "llama", **text, "tie_word_embeddings": tied}, f"{path}: text_config")
    preprocess = preprocessing(folder, vision.image_size, aspect_of(config, path))
    return vision, llm, preprocess, [(folder, llava_rules(vision.depth, llm.tied))]


def check_original(config, path, projector="mlp2x_gelu"):
    """UserError naming the field by which a config with LLaVA's own fields describes something else than LLaVA-1.5."""
    demand(config, path, mm_projector_type=projector, mm_vision_select_layer=-2, mm_vision_select_feature="patch",
           mm_patch_merge_type="flat", mm_use_im_start_end=False, mm_use_im_patch_token=False)


def tower_folder(name, folder, path):
    """The folder of the CLIP that `mm_vision_tower` names: a path as it is, inside `folder` or beside it, or a hub id."""
    if not isinstance(name, str):
        raise UserError(f"{path}: mm_vision_tower {name!r}, expected the name of a CLIP")
    for place in ("", folder, os.path.dirname(os.path.realpath(folder))):
        if os.path.isdir(os.path.join(place, name)):
            return os.path.join(place, name)
    try:
        return resolve(name)
    except UserError as error:
        raise UserError(f"{path}: mm_vision_tower: {error}") from None


VLORA_FIELDS = {  # VLoRAConfig: the published checkpoint's config
    "sites": ("vlora_type", SITES), "every": ("skip_layers", 4), "rank": ("vlora_rank", 64),
    "embed": ("vlora_dim", 512), "depth": ("vlora_depth", 8)}


def vlora_config(config, path, vision, llm):
    """VLoRAConfig of the published checkpoint's config; UserError naming the field that describes another generator.

    Its heads are in the code alone, and so is that the tag counts as a position.
    """
    found = translate(config, path, VLORA_FIELDS)
    demand(config, path, weights_sep=True, vlora_alpha=found["rank"], vlora_visual_dim=vision.width,
           vlora_pos_num=vision.tokens, vlora_llm_dim=llm.width, vlora_llm_depth=llm.depth)
    try:
        return VLoRAConfig(**found, tag=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_original(folder, config, path):
    """What `read_llava` returns, of a LLaVA or VLoRA in its authors' layout. It says nothing of its tower but the name."""
    vlora = config["model_type"] == VLORA_TYPE
    check_original(config, path, "vlora" if vlora else "mlp2x_gelu")
    name, inside = config["mm_vision_tower"], any(n.startswith(ORIGINAL_TOWER) for n in names_in(folder))
    llm = text_config({**config, "model_type": "llama"}, path)
    rules, aspect = (vlora_rules() if vlora else ORIGINAL_PROJECTOR) + llama_rules(llm.tied), aspect_of(config, path)
    if inside and name in TOWERS and not os.path.isdir(name):
        vision = TOWERS[name]
        preprocess = preprocessing(folder, vision.image_size, aspect)
    else:
        clip = tower_folder(name, folder, path)
        vision, preprocess = vision_config(clip)
        preprocess = dataclasses.replace(preprocess, aspect=aspect)
    demand(config, path, mm_hidden_size=vision.width)
    if inside:
        return vision, llm, preprocess, [(folder, under(re.escape(ORIGINAL_TOWER), tower_rules(vision.depth)) + rules)]
    return vision, llm, preprocess, [(folder, rules), (clip, clip_rules(vision.depth))]


def projector_file(name):
    """The mm_projector.bin of LLaVA's stage 1 that `name` (a file, a folder, a hub id) is or holds instead of a whole model.

    None if it is something else. Raises UserError if the config.json beside it describes another projector.
    """
    is_file = name.endswith(".bin") and os.path.isfile(name)
    folder = os.path.dirname(name) if is_file else locate(name)
    file, config = name if is_file else os.path.join(folder, PROJECTOR), os.path.join(folder, "config.json")
    whole = any(os.path.exists(os.path.join(folder, layout)) for layout in LAYOUTS)
    if not is_file and (whole or not os.path.exists(file)):
        return None
    if os.path.exists(config):
        check_original(read_json_object(config), config)
    return file
