"""TODO"""
import os

from cli import UserError
from data import Preprocess
from formats.json_files import read_json
from model import LlamaConfig, VisionConfig


# ---- Other people's configs


def demand(values, path, **wanted):
    """UserError naming the first field that is present and not the one value that this code builds."""
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise UserError(f"{path}: {key} {values[key]!r} is not supported, only {value!r}")


def numbers(values, path, **defaults):
    """The named fields, or their defaults where absent; UserError on what is not a positive number."""
    found = {key: values.get(key, default) for key, default in defaults.items()}
    for key, value in found.items():
        kinds = (int, float) if isinstance(defaults[key], float) else (int,)
        if type(value) not in kinds or value <= 0:
            raise UserError(f"{path}: {key} {value!r}, expected a positive {'number' if float in kinds else 'integer'}")
    return found


def preprocessing(folder, image_size, aspect="pad"):
    """`Preprocess` from preprocessor_config.json, CLIP's defaults where it or a field is absent.

    transformers 5 keeps the same fields inside processor_config.json.
    """
    paths = [os.path.join(folder, f"{name}_config.json") for name in ("preprocessor", "processor")]
    path = next(filter(os.path.exists, paths), None)
    values = read_json(path) if path else {}
    values = values.get("image_processor", values)
    if not isinstance(values, dict):
        raise UserError(f"{path}: image_processor {values!r}, expected an object")
    for key in ("size", "crop_size"):
        side = values.get(key, image_size)
        sides = list(side.values()) if isinstance(side, dict) else [side]  # {"shortest_edge": S} or {"height": S, "width": S}
        if any(s != image_size for s in sides):
            raise UserError(f"{path}: {key} {side}, but config.json says that the tower reads {image_size} px")
    demand(values, path, resample=3, do_resize=True, do_rescale=True, rescale_factor=1 / 255, do_normalize=True)  # 3: bicubic
    names = {"image_mean": "mean", "image_std": "std"}
    for key in names.keys() & values.keys():
        if not (isinstance(values[key], list) and len(values[key]) == 3 and all(type(v) in (int, float) for v in values[key])):
            raise UserError(f"{path}: {key} {values[key]!r}, expected three numbers")
    return Preprocess(image_size, **{names[k]: tuple(values[k]) for k in names if k in values}, aspect=aspect)


def tower_config(values, path):
    """VisionConfig of the fields of a CLIPVisionConfig, the last block left out; UserError as for `vision_config`."""
    demand(values, path, hidden_act="quick_gelu", num_channels=3)
    n = numbers(values, path, image_size=224, patch_size=32, hidden_size=768, num_hidden_layers=12,
                num_attention_heads=12, intermediate_size=3072, layer_norm_eps=1e-5)
    if n["hidden_size"] % n["num_attention_heads"]:
        raise UserError(f"{path}: hidden_size {n['hidden_size']} does not divide by num_attention_heads "
                        f"{n['num_attention_heads']}")
    return VisionConfig(n["image_size"], n["patch_size"], n["hidden_size"], n["num_hidden_layers"] - 1,
                        n["num_attention_heads"], n["intermediate_size"], n["layer_norm_eps"])


def rope_theta(values, path):
    """Base of the rotary frequencies, from where transformers 4 or 5 writes it; UserError if they are scaled."""
    theta = values.get("rope_theta", 10000.0)
    for key in ("rope_scaling", "rope_parameters"):
        rope = values.get(key) or {}
        if not isinstance(rope, dict):
            raise UserError(f"{path}: {key} {rope!r}, expected an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{path}: {key} of type {kind!r} is not supported, only 'default'")
        demand(rope, path, partial_rotary_factor=1.0)
        theta = rope.get("rope_theta", theta)
    return float(numbers({"rope_theta": theta}, path, rope_theta=10000.0)["rope_theta"])


def text_config(values, path):
    """LlamaConfig of the fields of a Llama's config; UserError as for `llama_config`."""
    if values.get("model_type") != "llama":
        raise UserError(f"{path}: model_type {values.get('model_type')!r}, expected 'llama'")
    demand(values, path, hidden_act="silu", attention_bias=False, mlp_bias=False, sliding_window=None)
    n = numbers(values, path, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008,
                vocab_size=32000, rms_norm_eps=1e-6, max_position_embeddings=2048)
    width, heads = n["hidden_size"], n["num_attention_heads"]
    kv_heads = numbers({"num_key_value_heads": values.get("num_key_value_heads") or heads}, path,
                       num_key_value_heads=heads)["num_key_value_heads"]
    if width % heads or (width // heads) % 2 or heads % kv_heads:
        raise UserError(f"{path}: hidden_size {width} does not divide into num_attention_heads {heads} of an even size, "
                        f"or these not by num_key_value_heads {kv_heads}")
    if values.get("tie_word_embeddings", False) not in (None, True, False):
        raise UserError(f"{path}: tie_word_embeddings {values['tie_word_embeddings']!r}, expected true or false")
    if values.get("head_dim") is not None:
        demand(values, path, head_dim=width // heads)
    return LlamaConfig(width, n["num_hidden_layers"], heads, kv_heads, n["intermediate_size"], n["vocab_size"],
                       n["rms_norm_eps"], rope_theta(values, path), n["max_position_embeddings"],
                       bool(values.get("tie_word_embeddings", False)))


def vision_config(folder):
    """(VisionConfig, Preprocess) of a CLIPVisionModel or a whole CLIPModel, the last block left out.

    Raises UserError naming the field that says this is another kind of tower.
    """
    path = os.path.join(folder, "config.json")
    values = read_json(path)
    if values.get("model_type") not in ("clip", "clip_vision_model", None):
        raise UserError(f"{path}: model_type {values['model_type']!r}, expected clip or clip_vision_model")
    if values.keys() & {"vision_config", "vision_config_dict"}:  # old files have both; the second is what counts
        parts = [values.get(key) or {} for key in ("vision_config", "vision_config_dict")]
        if not all(isinstance(part, dict) for part in parts):
            raise UserError(f"{path}: vision_config is no object")
        values = parts[0] | parts[1]
    cfg = tower_config(values, path)
    return cfg, preprocessing(folder, cfg.image_size)


def llama_config(folder):
    """LlamaConfig of a Llama 1 or 2 (Vicuna); UserError naming the field that says it is something else."""
    path = os.path.join(folder, "config.json")
    return text_config(read_json(path), path)


def vision_values(config, blocks):
    """The fields of transformers' CLIPVisionConfig for a tower of that many blocks."""
    return {"model_type": "clip_vision_model", "hidden_size": config.width, "intermediate_size": config.hidden,
            "num_hidden_layers": blocks, "num_attention_heads": config.heads, "num_channels": 3,
            "image_size": config.image_size, "patch_size": config.patch, "hidden_act": "quick_gelu",
            "layer_norm_eps": config.eps}


def text_values(config, bos, eos):
    """The fields of transformers' LlamaConfig."""
    return {"model_type": "llama", "hidden_size": config.width, "intermediate_size": config.hidden,
            "num_hidden_layers": config.depth, "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads, "head_dim": config.width // config.heads,
            "vocab_size": config.vocab, "max_position_embeddings": config.context, "rms_norm_eps": config.eps,
            "rope_theta": config.theta, "rope_scaling": None, "hidden_act": "silu", "attention_bias": False,
            "mlp_bias": False, "tie_word_embeddings": config.tied, "bos_token_id": bos, "eos_token_id": eos}


def image_values(preprocess, kind):
    """The fields of one of transformers' image processors that treats pictures as `preprocess` does, padding aside."""
    side = {"height": preprocess.size, "width": preprocess.size}
    return {"image_processor_type": kind, "do_convert_rgb": True, "do_resize": True,
            "size": {"shortest_edge": preprocess.size}, "resample": 3, "do_center_crop": True, "crop_size": side,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(preprocess.mean), "image_std": list(preprocess.std)}
