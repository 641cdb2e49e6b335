"""LLaVA-1.5 as transformers and as its authors publish it, and VLoRA as its authors do.

Each reader returns the two configs, the preprocessing and where the weights are; weights.py builds
the model. Next: export.py, the other direction.
"""
import dataclasses
import os
import re
from typing import Literal

from cli import UserError
from formats.configs import (check_value, demand, LLAVA_FIXED, preprocessing, text_config,
    tower_config, translate, vision_config)
from formats.folders import ADAPTER_CONFIG, locate, PROJECTOR, resolve
from formats.json_files import read_json_object
from formats.name_rules import (clip_rules, llama_rules, llava_rules, ORIGINAL_PROJECTOR,
    ORIGINAL_TOWER, tower_rules, under, vlora_rules)
from formats.weight_files import LAYOUTS, names_in
from model import VisionConfig
from vlora import SITES, GeneratorConfig

VLORA_TYPE = "llava_vlora"  # model_type of VLoRA's authors
VLORA_FIELDS = {  # GeneratorConfig: the published checkpoint's config
    "sites": ("vlora_type", SITES), "every": ("skip_layers", 4), "rank": ("vlora_rank", 64),
    "embed": ("vlora_dim", 512), "depth": ("vlora_depth", 8)}

# Towers by the name of CLIP in LLaVA's config: a tower inside a checkpoint comes without a config
TOWERS = {"openai/clip-vit-large-patch14-336": VisionConfig(),
          "openai/clip-vit-large-patch14": VisionConfig(image_size=224),
          "clip-vit-large-patch14-336": VisionConfig()}  # in VLoRA's scripts


def trained_aspect(config, path):
    """How pictures were made square in training, "pad" or "crop"; None if the config says nothing.
    """
    aspect = config.get("image_aspect_ratio")
    if aspect not in (None, "pad", "square"):
        raise UserError(f"{path}: image_aspect_ratio {aspect!r} is not supported, only 'pad' and "
                        "'square'")
    return "crop" if aspect == "square" else aspect


# ---- In the layout of transformers


def nested(config, key, path):
    """The object under `key` in a config; UserError if it is missing."""
    if not isinstance(config.get(key), dict):
        raise UserError(f"{path}: no {key}, which LLaVA in the layout of transformers has")
    return config[key]


def read_llava(folder, config, path):
    """(VisionConfig, LlamaConfig, Preprocess, sources for weights.fill) of transformers' LLaVA."""
    demand(config, path, **LLAVA_FIXED)
    vision, text = (nested(config, key, path) for key in ("vision_config", "text_config"))
    demand(vision, f"{path}: vision_config", model_type="clip_vision_model")
    vision = tower_config(vision, f"{path}: vision_config")
    tied = config.get("tie_word_embeddings") or text.get("tie_word_embeddings", False)
    llm = text_config({"model_type": "llama", **text, "tie_word_embeddings": tied},
                      f"{path}: text_config")
    preprocess = preprocessing(folder, vision.image_size, trained_aspect(config, path))
    background = config.get("background", "none")  # ours alone write it
    check_value(background, Literal["none", "white"], f"{path}: background")
    preprocess = dataclasses.replace(preprocess, background=background)
    return vision, llm, preprocess, [(folder, llava_rules(vision.depth, llm.tied))]


# ---- In the layout of the authors


def check_original(config, path, projector="mlp2x_gelu"):
    """UserError that names the field by which a config describes something else than LLaVA-1.5."""
    demand(config, path, mm_projector_type=projector, mm_vision_select_layer=-2,
           mm_vision_select_feature="patch", mm_patch_merge_type="flat", mm_use_im_start_end=False,
           mm_use_im_patch_token=False)


def tower_folder(name, folder, path):
    """The folder of the CLIP `mm_vision_tower`: also one in or beside `folder`, or a hub id."""
    if not isinstance(name, str):
        raise UserError(f"{path}: mm_vision_tower {name!r}, expected the name of a CLIP")
    for place in ("", folder, os.path.dirname(os.path.realpath(folder))):
        if os.path.isdir(os.path.join(place, name)):
            return os.path.join(place, name)
    try:
        return resolve(name)
    except UserError as error:
        raise UserError(f"{path}: mm_vision_tower: {error}") from None


def read_original(folder, config, path):
    """What `read_llava` returns, for the authors' layout, where only a name describes the tower."""
    vlora = config["model_type"] == VLORA_TYPE
    check_original(config, path, "vlora" if vlora else "mlp2x_gelu")
    llm = text_config({**config, "model_type": "llama"}, path)
    rules = (vlora_rules() if vlora else ORIGINAL_PROJECTOR) + llama_rules(llm.tied)
    name, aspect = config["mm_vision_tower"], trained_aspect(config, path)
    inside = any(n.startswith(ORIGINAL_TOWER) for n in names_in(folder))
    if inside and name in TOWERS and not os.path.isdir(name):
        vision = TOWERS[name]
        preprocess = preprocessing(folder, vision.image_size, aspect)
    else:
        clip = tower_folder(name, folder, path)
        vision, preprocess = vision_config(clip, aspect)
    demand(config, path, mm_hidden_size=vision.width)
    if inside:
        tower = under(re.escape(ORIGINAL_TOWER), tower_rules(vision.depth))
        return vision, llm, preprocess, [(folder, tower + rules)]
    return vision, llm, preprocess, [(folder, rules), (clip, clip_rules(vision.depth))]


def vlora_config(config, path, vision, llm):
    """GeneratorConfig of the published checkpoint; UserError that names an unsupported field.

    The number of heads, and that the tag counts as a position, are only in its authors' code.
    """
    found = translate(config, path, VLORA_FIELDS)
    demand(config, path, weights_sep=True, vlora_alpha=found["rank"], vlora_visual_dim=vision.width,
           vlora_pos_num=vision.tokens, vlora_llm_dim=llm.width, vlora_llm_depth=llm.depth)
    try:
        return GeneratorConfig(**found, tag=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def projector_file(name):
    """Path of the mm_projector.bin of LLaVA's stage 1 at `name`, a file, folder or hub id; or None.

    None if there is a whole model, or no projector. Raises UserError if the config.json beside it
    describes another projector.
    """
    is_file = name.endswith(".bin") and os.path.isfile(name)
    folder = os.path.dirname(name) if is_file else locate(name)
    file = name if is_file else os.path.join(folder, PROJECTOR)
    if not is_file:
        held = os.listdir(folder)
        whole = any(name in held for name in (*LAYOUTS, ADAPTER_CONFIG))
        if whole or not os.path.exists(file):
            return None
    config = os.path.join(folder, "config.json")
    if os.path.exists(config):
        check_original(read_json_object(config), config)
    return file
