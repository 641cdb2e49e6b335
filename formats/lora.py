"""LoRA folders of LLaVA: small changes of a Llama, to be added to the weights of their base.

    config.json               LLaVA's, of the whole model
    adapter_config.json       peft's, with the name of the base: a Vicuna, or a whole LLaVA
    adapter_model.*           two factors for each changed layer, float[R, in] A and float[out, R] B
    non_lora_trainables.bin   what was trained as a whole: the projector

The weight of a changed layer is W + B A alpha / R (https://arxiv.org/abs/2106.09685). Used by
weights.py. Next: export.py.
"""
import os
import re

from cli import UserError
from formats.configs import check_value, demand, translate
from formats.folders import ADAPTER_CONFIG, locate, resolve, TRAINED_WHOLE
from formats.json_files import read_json_object
from formats.name_rules import rename, SKIP, under
from formats.weight_files import ADAPTERS, fingerprint, names_in, tensors, weight_files

# Keys of adapter_config.json that are read here, or say nothing of how to merge. Any other that is
# set (use_dora, modules_to_save, rank_pattern, ...) is refused
KNOWN = {"auto_mapping", "base_model_name_or_path", "bias", "exclude_modules", "inference_mode",
         "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
         "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r", "revision",
         "target_modules", "task_type", "use_rslora"}
FACTOR = r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight"


def base_folder(folder, base=None):
    """The folder of a checkpoint's weights: `folder` itself or, if it holds a LoRA, its base.

    base  a folder or hub name; None: as adapter_config.json says
    """
    path = os.path.join(folder, ADAPTER_CONFIG)
    if not os.path.exists(path):
        if base is not None:
            raise UserError(f"--base {base}: {folder} is not a LoRA, it has no {ADAPTER_CONFIG}")
        return folder
    file = weight_files(folder)[0][0]
    if not file.endswith(ADAPTERS):
        raise UserError(f"{file} is a whole model, and {path} a LoRA: move one of them elsewhere")
    name = base or read_json_object(path).get("base_model_name_or_path")
    check_value(name, str, f"{path}: base_model_name_or_path")
    try:
        return resolve(name)
    except UserError as error:
        raise UserError(f"{folder} is a LoRA, and of its base: {error}; "
                        "name the base with --base") from None


def fingerprints(name, base):
    """{"fingerprint": of the weights of a checkpoint, "base": of those below its LoRA, or None}."""
    folder = locate(name)
    home = base_folder(folder, base)
    return {"fingerprint": fingerprint(folder),
            "base": None if home == folder else fingerprint(home)}


def lora_scale(folder):
    """(R, factor of B A) of a LoRA; UserError that names a setting that is not supported."""
    path = os.path.join(folder, ADAPTER_CONFIG)
    config = read_json_object(path)
    demand(config, path, peft_type="LORA", bias="none")
    for key in config.keys() - KNOWN:
        if config[key]:
            raise UserError(f"{path}: {key} {config[key]!r} is not supported")
    if config.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UserError(f"{path}: init_lora_weights {config['init_lora_weights']!r} is not "
                        "supported: it changes the weights of the base")
    found = translate(config, path, {"rank": ("r", 8), "alpha": ("lora_alpha", 8.0)})
    root = config.get("use_rslora") or False
    check_value(root, bool, f"{path}: use_rslora")
    return found["rank"], found["alpha"] / (found["rank"] ** 0.5 if root else found["rank"])


def read_factors(folder, rules, held):
    """{our name: (A, B, factor of B A)} of the layers that a LoRA changes.

    rules, held  of the base: how its tensors are renamed, and our names of all that it has
    """
    rank, scale = lora_scale(folder)
    found = {"A": {}, "B": {}}
    for name, tensor, file in tensors(folder):
        match = re.fullmatch(FACTOR, name)
        target = match and rename(f"{match[1]}.weight", rules)
        if target not in held or target in found[match[2]]:
            raise UserError(f"{file}: tensor {name} has no place in the base")
        if tensor.shape[0 if match[2] == "A" else -1] != rank:
            raise UserError(f"{file}: tensor {name} is {list(tensor.shape)}, but r is {rank}")
        found[match[2]][target] = tensor
    single = found["A"].keys() ^ found["B"].keys()
    if single:
        raise UserError(f"{folder}: the LoRA of {min(single)} has only one of its two factors")
    found = {target: (a, found["B"][target], scale) for target, a in found["A"].items()}
    found.pop(SKIP, None)  # of a block of the tower that is not used
    return found


def add_lora(folder, sources):
    """(sources for weights.fill, {our name: (A, B, factor)}) of a model with the LoRA in `folder`.

    sources  of its base, whose folder is first. Without a LoRA they are returned as they are.
    Raises UserError for a setting that is not supported, and for a tensor that is missing or has
    no place in the base.
    """
    if not os.path.exists(os.path.join(folder, ADAPTER_CONFIG)):
        return sources, {}
    (base, rules), whole = sources[0], os.path.join(folder, TRAINED_WHOLE)
    held = {name: rename(name, rules) for name in names_in(base)}
    if os.path.exists(whole):
        whole_rules = under(r"(?:base_model\.)?(?:model\.)?", rules)
        trained = {rename(name, whole_rules) for name in names_in(whole)}
        replaced = [(re.escape(name), SKIP) for name, ours in held.items() if ours in trained]
        sources = [(base, replaced + rules), (whole, whole_rules), *sources[1:]]
    elif "projector.linear_1.weight" not in held.values():
        raise UserError(f"{folder}: a LoRA without {TRAINED_WHOLE}, which holds the projector; "
                        "LLaVA writes it when training ends")
    return sources, read_factors(folder, rules, set(held.values()) - {None})


def merge(weight, lora, dtype, label):
    """float[out, in]: W + B A * factor, computed in fp32, in `dtype` or that of W.

    lora  (A, B, factor), or None: W is returned
    Raises UserError if the shapes do not fit.
    """
    if lora is None:
        return weight
    a, b, factor = lora
    if weight.shape != (b.shape[0], a.shape[1]):
        raise UserError(f"{label} is {list(weight.shape)}, but its LoRA {[b.shape[0], a.shape[1]]}"
                        ": is this the base that it was trained on?")
    return (weight.float() + b.float() @ a.float() * factor).to(dtype or weight.dtype)
