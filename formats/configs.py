"""Configs: check those of our checkpoints; read and write Hugging Face's for CLIP and Llama.

A model that this code cannot build (another activation, scaled rotary frequencies) is refused by
the name of the field. The fields of LLaVA itself are in llava.py. Next: name_rules.py.
"""
import dataclasses
import math
import os
import types
import typing

from cli import UserError
from data import CLIP_MEAN, CLIP_STD, Preprocess
from formats.json_files import read_json_object
from model import LlamaConfig, VisionConfig


# ---- Checks


def is_number(value, kind=(int, float)):
    return isinstance(value, kind) and not isinstance(value, bool) and abs(value) < math.inf


CHECKS = {  # type of a field: (is a value valid?, what is expected in words)
    int: (lambda v: is_number(v, int) and v > 0, "a whole number more than 0"),
    float: (lambda v: is_number(v) and v > 0, "a number more than 0"),
    bool: (lambda v: isinstance(v, bool), "true or false"),
    str: (lambda v: isinstance(v, str), "text"),
    dict: (lambda v: isinstance(v, dict), "an object"),
    tuple: (lambda v: isinstance(v, (list, tuple)) and len(v) == 3 and all(map(is_number, v)),
            "three numbers"),  # one per channel
    types.UnionType: (lambda v: v is None or is_number(v, int) and v >= 0,  # int | None
                      "a whole number of 0 or more, or null"),
}


def check_value(value, kind, label):
    """UserError unless `value` is valid for a type of field: one in CHECKS, or a Literal."""
    if typing.get_origin(kind) is typing.Literal:
        choices = typing.get_args(kind)
        valid, expected = value in choices, f"one of {', '.join(map(repr, choices))}"
    else:
        test, expected = CHECKS[typing.get_origin(kind) or kind]
        valid = test(value)
    if not valid:
        raise UserError(f"{label} is {value!r}, expected {expected}")


def expect_keys(values, keys, label):
    """UserError that names an unknown or missing key of `values`."""
    if not isinstance(values, dict):
        raise UserError(f"{label}: expected an object with {', '.join(sorted(keys))}")
    for key in values.keys() - keys:
        raise UserError(f"{label}: unknown key {key!r}, expected {', '.join(sorted(keys))}")
    for key in keys - values.keys():
        raise UserError(f"{label}: no {key!r}")


def build_dataclass(kind, values, label, absent={}):
    """The dataclass `kind` from a dict of exactly its fields. A dataclass inside it is a dict too.

    absent  {field: value} of fields that older files do not have
    Raises UserError that names the unknown, missing or invalid field.
    """
    values = absent | values if isinstance(values, dict) else values
    expect_keys(values, {f.name for f in dataclasses.fields(kind)}, label)
    built = {}
    for name, wanted in typing.get_type_hints(kind).items():
        value = values[name]
        part = next(filter(dataclasses.is_dataclass, (wanted, *typing.get_args(wanted))), None)
        if part is None:
            check_value(value, wanted, f"{label}: {name}")
            built[name] = tuple(value) if isinstance(value, list) else value
        else:
            optional = value is None and part is not wanted  # Part | None
            built[name] = None if optional else build_dataclass(part, value, f"{label}.{name}")
    return kind(**built)


def check_heads(width, heads, label, kv_heads=None):
    """UserError unless attention heads have a whole width, and in a Llama an even one."""
    if width % heads:
        raise UserError(f"{label}: width {width} does not divide by heads {heads}")
    if kv_heads and (heads % kv_heads or width // heads % 2):
        raise UserError(f"{label}: {heads} heads of {width // heads}, {kv_heads} of keys: expected "
                        "heads of an even size, and their number a multiple of that of keys")


def demand(values, path, **wanted):
    """UserError that names the first field that is present with an unsupported value."""
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise UserError(f"{path}: {key} {values[key]!r} is not supported, only {value!r}")


def read_model_config(folder):
    """(path, values) of the config.json in a folder; UserError if the weights are quantised."""
    if os.path.isfile(folder):
        raise UserError(f"{folder}: a file, expected the folder of a checkpoint")
    path = os.path.join(folder, "config.json")
    values = read_json_object(path)
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    for found in filter(None, (part.get("quantization_config") for part in parts)):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise UserError(f"{path}: quantised weights (quantization_config, {method}) are not "
                        "supported; take the checkpoint that they were made from")
    return path, values


# ---- Tables of fields, {our name: (their name, their default)}


def translate(values, path, table):
    """{our name: value}; UserError unless each value is valid for the type of its default."""
    found = {ours: values.get(theirs, default) for ours, (theirs, default) in table.items()}
    for ours, (theirs, default) in table.items():
        check_value(found[ours], type(default), f"{path}: {theirs}")
    return found


def translate_back(config, table):
    """{their name: value} of a dataclass."""
    return {theirs: getattr(config, ours) for ours, (theirs, _) in table.items()}


# ---- CLIP

VISION_FIXED = {"hidden_act": "quick_gelu", "num_channels": 3}
VISION_FIELDS = {  # VisionConfig: CLIPVisionConfig
    "image_size": ("image_size", 224), "patch": ("patch_size", 32), "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12), "heads": ("num_attention_heads", 12),
    "hidden": ("intermediate_size", 3072), "eps": ("layer_norm_eps", 1e-5)}


def tower_config(values, path):
    """VisionConfig from a CLIPVisionConfig's fields, without the last block; UserError if unfit."""
    demand(values, path, **VISION_FIXED)
    cfg = VisionConfig(**translate(values, path, VISION_FIELDS))
    check_heads(cfg.width, cfg.heads, f"{path}: hidden_size, num_attention_heads")
    return dataclasses.replace(cfg, depth=cfg.depth - 1)


def vision_config(folder, aspect=None):
    """(VisionConfig, Preprocess) of a CLIPVisionModel or CLIPModel, without the last block.

    aspect  as for `preprocessing`
    Raises UserError that names the field by which this is another kind of tower.
    """
    path, values = read_model_config(folder)
    if values.get("model_type") not in ("clip", "clip_vision_model", None):
        raise UserError(f"{path}: model_type {values['model_type']!r}, expected clip or "
                        "clip_vision_model")
    keys = "vision_config", "vision_config_dict"  # old files have both; the second overrides
    parts = [values[key] or {} for key in keys if key in values] or [values]
    for part in parts:
        check_value(part, dict, f"{path}: vision_config")
    values = {**parts[0], **parts[-1]}
    cfg = tower_config(values, path)
    return cfg, preprocessing(folder, cfg.image_size, aspect)


def vision_values(config, blocks):
    """The fields of transformers' CLIPVisionConfig for a tower of that many blocks."""
    return {"model_type": "clip_vision_model", **VISION_FIXED,
            **translate_back(config, VISION_FIELDS), "num_hidden_layers": blocks}


# ---- The image processor

PROCESSOR_FIXED = dict(do_resize=True, resample=3, do_rescale=True, rescale_factor=1 / 255,
                       do_normalize=True)  # resample 3: bicubic
PROCESSOR_FIELDS = {"mean": ("image_mean", CLIP_MEAN), "std": ("image_std", CLIP_STD)}


def aspect_of(values, path, aspect):
    """"pad" or "crop": how an image processor with these fields makes a picture square.

    aspect  what LLaVA's config says, or None. Where neither says anything: "pad", as LLaVA does
    Raises UserError for another way, and if the two contradict each other.
    """
    said = {key: values[key] for key in ("do_pad", "do_center_crop") if values.get(key) is not None}
    for key, value in said.items():
        check_value(value, bool, f"{path}: {key}")
    if str(values.get("image_processor_type")).startswith("CLIP"):
        demand(said, f"{path}: a CLIPImageProcessor", do_pad=False)
    if aspect is not None:
        demand(said, f"{path}: with the image_aspect_ratio of config.json", do_pad=aspect == "pad")
    if not said.get("do_pad"):
        demand(said, f"{path}: without do_pad true", do_center_crop=True)
    pads = said.get("do_pad", aspect != "crop")
    size = values.get("size")
    if not pads and isinstance(size, dict) and "shortest_edge" not in size:
        raise UserError(f"{path}: size {size} without padding distorts pictures, which is "
                        "not supported, only a shortest_edge")
    return "pad" if pads else "crop"


def preprocessing(folder, image_size, aspect=None):
    """`Preprocess` from preprocessor_config.json; CLIP's defaults if the file or a field is absent.

    aspect  "pad" or "crop", what LLaVA's config says of making pictures square; None: nothing
    transformers 5 keeps the same fields inside processor_config.json.
    """
    paths = [os.path.join(folder, f"{name}_config.json") for name in ("preprocessor", "processor")]
    path = next(filter(os.path.exists, paths), None)
    values = read_json_object(path) if path else {}
    values = values.get("image_processor", values)
    check_value(values, dict, f"{path}: image_processor")
    for key in ("size", "crop_size"):
        side = values.get(key, image_size)  # S, {"shortest_edge": S} or {"height": S, "width": S}
        sides = side.values() if isinstance(side, dict) else [side]
        if any(s != image_size for s in sides):
            raise UserError(f"{path}: {key} {side}, but config.json says that the tower reads "
                            f"{image_size} px")
    demand(values, path, **PROCESSOR_FIXED)
    found = translate(values, path, PROCESSOR_FIELDS)
    return Preprocess(image_size, tuple(found["mean"]), tuple(found["std"]),
                      aspect_of(values, path, aspect))


def image_values(preprocess, kind):
    """The fields of transformers' image processor `kind` for a Preprocess, padding excepted."""
    size = preprocess.size
    return {"image_processor_type": kind, "do_convert_rgb": True, **PROCESSOR_FIXED,
            "size": {"shortest_edge": size}, "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            **translate_back(preprocess, PROCESSOR_FIELDS)}


# ---- Llama

TEXT_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
TEXT_FIELDS = {  # LlamaConfig: transformers' LlamaConfig
    "width": ("hidden_size", 4096), "depth": ("num_hidden_layers", 32),
    "heads": ("num_attention_heads", 32), "kv_heads": ("num_key_value_heads", 32),
    "hidden": ("intermediate_size", 11008), "vocab": ("vocab_size", 32000),
    "eps": ("rms_norm_eps", 1e-6), "theta": ("rope_theta", 10000.0),
    "context": ("max_position_embeddings", 2048), "tied": ("tie_word_embeddings", False)}


def rope_theta(values, path):
    """Base of the rotary frequencies, from transformers 4 or 5; UserError if they are scaled."""
    theta = values.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        check_value(rope, dict, f"{path}: {key}")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{path}: {key} of type {kind!r} is not supported, only 'default'")
        demand(rope, path, partial_rotary_factor=1.0)
        theta = rope.get("rope_theta", theta)
    return theta


def text_config(values, path):
    """LlamaConfig from the fields of a Llama's config; UserError as for `llama_config`."""
    if values.get("model_type") != "llama":
        raise UserError(f"{path}: model_type {values.get('model_type')!r}, expected 'llama'")
    demand(values, path, **TEXT_FIXED, sliding_window=None)
    heads = values.get("num_attention_heads", 32)
    values = {**values, "rope_theta": rope_theta(values, path),  # the others may be null
              "num_key_value_heads": values.get("num_key_value_heads") or heads,
              "tie_word_embeddings": values.get("tie_word_embeddings") or False}
    cfg = LlamaConfig(**translate(values, path, TEXT_FIELDS))
    check_heads(cfg.width, cfg.heads, f"{path}: hidden_size, num_attention_heads, "
                "num_key_value_heads", cfg.kv_heads)
    if values.get("head_dim") is not None:
        demand(values, path, head_dim=cfg.width // cfg.heads)
    return dataclasses.replace(cfg, theta=float(cfg.theta))


def llama_config(folder):
    """LlamaConfig of the folder of a Llama 1 or 2 (Vicuna).

    Raises UserError that names the field by which it is another model.
    """
    path, values = read_model_config(folder)
    return text_config(values, path)


def text_values(config, bos, eos):
    """The fields of transformers' LlamaConfig."""
    return {"model_type": "llama", **TEXT_FIXED, **translate_back(config, TEXT_FIELDS),
            "head_dim": config.width // config.heads, "rope_scaling": None,
            "bos_token_id": bos, "eos_token_id": eos}


# ---- LLaVA

LLAVA_FIXED = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default",
               "projector_hidden_act": "gelu", "multimodal_projector_bias": True}
