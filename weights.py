"""Checkpoints: reading CLIP, Llama and LLaVA-1.5 as they are published, reading and writing our own.

A foreign checkpoint becomes ours by a table of (pattern, replacement) over its tensors' names. The model is built
without storage and filled tensor by tensor from mapped files; each parameter is filled exactly once and each tensor
used once or skipped by a rule. Anything else is a UserError that names the tensor and the file.

    assemble(clip, llama)     a VLM of two pretrained parts, with a new projector and new experts
    load(folder)              a checkpoint of ours, LLaVA-1.5 in its own layout or in that of transformers, or VLoRA's
    save(folder, ...)         writes one of ours, whole or not at all
    write_llava(folder, ...)  writes a model without experts for transformers to open:
                              python weights.py --model CHECKPOINT --export FOLDER

A checkpoint of ours is config.json, tokenizer.json and model.safetensors (or shards with an index). One of stage 1
holds what was trained, and where the frozen rest came from. Next: train.py.
"""
import dataclasses
import os
import zlib

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from cli import UserError
from data import Preprocess, PromptFormat, SYSTEM
from formats.configs import (build_dataclass, check_heads, expect_keys, llama_config,
    vision_config)
from formats.folders import atomic_folder, locate, resolve
from formats.json_files import read_json_object, write_json
from formats.llava import read_llava, read_original, vlora_config, VLORA_TYPE
from formats.name_rules import (BY_ID, clip_rules, llama_rules, ORIGINAL_PROJECTOR, OURS, rename,
    SKIP)
from formats.tokenizer import Tokenizer
from formats.weight_files import fingerprint, tensors, write_tensors
from model import LlamaConfig, VisionConfig, VLM, VLMConfig
from vlora import VLoRAConfig

FORMAT, VERSION = "hyperllava", 1


# ---- Device and precision


def pick_device(wanted=None):
    """The device asked for, or the first of cuda, mps and cpu that there is; UserError if it is not there."""
    there = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if wanted is not None and wanted not in there:
        raise UserError(f"--device {wanted}: this machine has {', '.join(there)}")
    return wanted or there[0]


def fast_dtype(device):
    """"bfloat16" on a GPU and on processors that multiply in it, else "float32": without them, bf16 is slower on a CPU."""
    fast = device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if fast else "float32"


# ---- Filling a model


def check_fit(target, tensor, shape, label):
    if tensor.shape != shape:
        raise UserError(f"{label} is {list(tensor.shape)}, but the model's {target} is {list(shape)}")
    if not tensor.is_floating_point():
        raise UserError(f"{label} is {tensor.dtype}, not of a floating type: quantised weights are not supported")


def assign(model, target, tensor):
    """Make `tensor` itself, not a copy, the parameter `target`."""
    owner, _, leaf = target.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def fill(model, sources, dtype=None, new=(), added=0):
    """Fill a model that was built without storage (on the meta device).

    sources  [(folder, rules)], see `tensors` and `rename`
    dtype    what all tensors are cast to; None: each keeps its own. What needs no cast stays mapped from its file
    new      names of the parameters that no source holds; they stay without storage, for `initialise`
    added    rows of embedding and head, the last ones, that `write_llava` added; they are left out
    Raises UserError on a tensor that is missing, left over, mis-shaped or there twice.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    origin = {}
    for folder, rules in sources:
        for name, tensor, file in tensors(folder, dtype):
            target = rename(name, rules)
            if target == SKIP:
                continue
            label = f"{file}: tensor {name}"
            if target not in shapes or target in new:
                raise UserError(f"{label} has no place in the model")
            if target in origin:
                raise UserError(f"{label} fills {target}, but so does {origin[target]}")
            tensor = tensor[:-added] if added and target in BY_ID else tensor
            check_fit(target, tensor, shapes[target], label)
            assign(model, target, tensor.to(dtype or tensor.dtype).contiguous())
            origin[target] = label
    missing = [name for name in shapes if name not in origin and name not in new]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{' and '.join(folder for folder, _ in sources)}: no tensor for {missing[0]}{more}")


def initialise(module, seed, dtype=None, name=""):
    """Give storage and first values to the parameters that have none, each part by its reset_parameters().

    Every part draws from a seed of its own, made of `seed` and its name, in fp32: it starts out the same whatever
    other new parts the model has.
    """
    if not any(p.is_meta for p in module.parameters()):
        return
    if not hasattr(module, "reset_parameters") or not all(p.is_meta for p in module.parameters()):
        for child, part in module.named_children():
            initialise(part, seed, dtype, f"{name}.{child}" if name else child)
        return
    module.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        module.reset_parameters()
    module.to(dtype or torch.float32)


class SkipInit(TorchFunctionMode):
    """No first values for parameters: on the meta device there is nothing to draw, but trying costs a second of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_empty(cfg):
    with torch.device("meta"), SkipInit():
        return VLM(cfg)


def names_of(cfg):
    return {name for name, _ in build_empty(cfg).named_parameters()}


def tokenizer_of(folder, llm):
    """The tokenizer in a folder; UserError if it has ids that the Llama has no embedding for."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab > llm.vocab:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab} ids, but the model only {llm.vocab}")
    return tokenizer


def assemble(vision_folder, llm_folder, options, dtype=torch.float32, seed=0, projector=None, cast=True):
    """(VLM, Tokenizer, Preprocess) of a CLIP and a Llama in Hugging Face's layout; what is new starts from `seed`.

    options    dict of the fields of VLMConfig that choose the experts
    projector  path of an mm_projector.bin for the projector's static part, see `projector_file`
    cast       whether what the folders hold is cast to `dtype` as well; if not it stays mapped as it is there
    """
    vision, preprocess = vision_config(vision_folder)
    llm = llama_config(llm_folder)
    tokenizer = tokenizer_of(llm_folder, llm)
    model = build_empty(VLMConfig(vision, llm, **options))
    parts = [(vision_folder, clip_rules(vision.depth)), (llm_folder, llama_rules(llm.tied))]
    parts += [(projector, ORIGINAL_PROJECTOR)] if projector else []
    held = {n for n in names_of(VLMConfig(vision, llm, "none", "none")) if projector or not n.startswith("projector.")}
    fill(model, parts, dtype if cast else None, names_of(model.cfg) - held)
    initialise(model, seed, dtype)
    return model, tokenizer, preprocess


# ---- Checkpoints of ours


@dataclasses.dataclass
class Checkpoint:
    """A model, and what it takes to talk to it as it was trained."""
    model: VLM
    tokenizer: Tokenizer
    preprocess: Preprocess
    system: str   # the system prompt
    config: dict  # the whole of config.json

    def layout(self):
        """How to lay out a conversation with it: as in training, guidance included."""
        cfg, pool = self.model.cfg, self.config.get("training", {}).get("guidance_pool", "instruction")
        return PromptFormat("v1", self.system, cfg.image_tokens, cfg.llm.context, pool)


def source_entry(name, checkpoint):
    """What a checkpoint in the folder `checkpoint` notes of the model `name`, a folder or a hub id, that it needs.

    A folder is noted relative to the checkpoint, so that both may move together.
    """
    local = os.path.exists(name)
    path = os.path.relpath(os.path.realpath(name), os.path.realpath(checkpoint)) if local else name
    return {"path": path, "fingerprint": fingerprint(resolve(name))}


def source_folder(noted, checkpoint):
    """The folder of a model that `source` noted; UserError if it is gone or is another by now."""
    expect_keys(noted, {"path", "fingerprint"}, f"{checkpoint}/config.json: sources")
    path = os.path.join(os.path.realpath(checkpoint), noted["path"])
    try:
        folder = os.path.normpath(path) if os.path.exists(path) else resolve(noted["path"])
    except UserError as error:
        raise UserError(f"{checkpoint} needs the model that it was trained on: {error}") from None
    if fingerprint(folder) != noted["fingerprint"]:
        raise UserError(f"{folder}: its weights are not those that {checkpoint} was trained on (fingerprints differ)")
    return folder


def save(folder, model_config, state, tokenizer, preprocess, system, stage, sources, training):
    """Write a checkpoint of ours, whole or not at all (see `written`).

    state     {name in VLM: plain CPU tensor}; in stage 1 those that were trained
    sources   {"vision": source(...), "llm": source(...)} if the frozen rest is to be found there; {}: `state` is all
    training  dict of the options that made it
    Raises OSError or UserError if it cannot be written; what was there before is then still there.
    """
    config = {"format": FORMAT, "version": VERSION, "model": dataclasses.asdict(model_config),
              "preprocess": dataclasses.asdict(preprocess), "template": {"system": system}, "stage": stage,
              "sources": sources, "training": training}
    with atomic_folder(folder) as new:
        write_tensors(new, state)
        tokenizer.save(new)
        write_json(os.path.join(new, "config.json"), config)


def build_config(values, label):
    """VLMConfig of its nested dict."""
    cfg = build_dataclass(VLMConfig, values, label)
    check_heads(cfg.vision.width, cfg.vision.heads, f"{label}.vision")
    check_heads(cfg.llm.width, cfg.llm.heads, f"{label}.llm", cfg.llm.kv_heads)
    return cfg


def same_method(cfg, asked, label):
    """The VLoRAConfig of `cfg`, or None; UserError unless it is what is `asked` for, how positions are counted aside."""
    if (cfg.vlora is None) != (asked is None):
        held, method = ("no VLoRA", "hyperllava") if cfg.vlora is None else ("a VLoRA", "vlora")
        raise UserError(f"{label}: holds {held}, whose pictures reach the Llama in another way: say --method {method}")
    if cfg.vlora is not None:
        for name, value in dataclasses.asdict(cfg.vlora).items():
            if name != "tag" and getattr(asked, name) != value:
                raise UserError(f"{label}: {name} is {value} there, not {getattr(asked, name)}; a trained generator keeps its "
                                f"form: say --vlora_{name} {value}")
    return cfg.vlora


def with_experts(cfg, experts, label):
    """`cfg` with experts added where it has none; UserError if those that it has are not the ones asked for."""
    grown = dataclasses.replace(cfg, **experts | {"vlora": same_method(cfg, experts.get("vlora"), label)})
    held = ["visual_expert"] if cfg.visual_expert != "none" else []
    held += ["language_expert", "guidance_after"] if cfg.language_expert != "none" else []
    held += ["expert_embed", "expert_rank", "weight_source"] if held else []
    for field in held:
        was, asked = getattr(cfg, field), getattr(grown, field)
        if was != asked:
            raise UserError(f"{label}: {field} is {was} there, not {asked}; trained experts keep their form: say --{field} {was}")
    return grown


def build_and_fill(cfg, sources, dtype, cast, seed, experts, label, added=0):
    """The VLM of `cfg` with what `sources` hold, see `fill` and `load`, and the experts that `experts` adds, new from `seed`."""
    grown = cfg if experts is None else with_experts(cfg, experts, label)
    model = build_empty(grown)
    new = names_of(grown) - names_of(cfg) if experts else ()
    fill(model, sources, dtype if cast else None, new, added)
    initialise(model, seed, dtype)
    return model


def load_ours(folder, config, dtype, cast, seed, experts):
    path = os.path.join(folder, "config.json")
    keys = {"format", "version", "model", "preprocess", "template", "stage", "sources", "training"}
    expect_keys(config, keys, path)
    if config["version"] != VERSION:
        raise UserError(f"{path}: version {config['version']}, this code reads {VERSION}")
    cfg = build_config(config["model"], f"{path}: model")
    preprocess = build_dataclass(Preprocess, config["preprocess"], f"{path}: preprocess")
    expect_keys(config["template"], {"system"}, f"{path}: template")
    parts = [(folder, OURS)]
    if config["sources"]:
        expect_keys(config["sources"], {"vision", "llm"}, f"{path}: sources")
        rules = {"vision": clip_rules(cfg.vision.depth), "llm": llama_rules(cfg.llm.tied)}
        parts += [(source_folder(noted, folder), rules[part]) for part, noted in config["sources"].items()]
        dtype = dtype or next(tensors(folder))[1].dtype  # that of the trained part for the frozen ones, too
    model = build_and_fill(cfg, parts, dtype, cast, seed, experts, path)
    return Checkpoint(model, Tokenizer.load(folder), preprocess, config["template"]["system"], config)


def load_llava(folder, config, dtype, cast, seed, experts):
    path = os.path.join(folder, "config.json")
    read = read_original if "mm_vision_tower" in config else read_llava
    vision, llm, preprocess, sources = read(folder, config, path)
    added = config.get("added_rows", 0)
    llm = dataclasses.replace(llm, vocab=llm.vocab - added)
    tokenizer = tokenizer_of(folder, llm)
    dtype = dtype or (next(tensors(folder))[1].dtype if sources[1:] else None)  # that of the Llama for a tower apart, too
    vlora = vlora_config(config, path, vision, llm) if config["model_type"] == VLORA_TYPE else None
    model = build_and_fill(VLMConfig(vision, llm, "none", "none", vlora=vlora), sources, dtype, cast, seed, experts, path, added)
    return Checkpoint(model, tokenizer, preprocess, config.get("system_prompt", SYSTEM), config)


# By "format" in config.json, or the "model_type" of foreign ones; LLaVA's authors say llava in old files, llava_llama in new
LOADERS = {FORMAT: load_ours, "llava": load_llava, "llava_llama": load_llava, VLORA_TYPE: load_llava}


def load(name, dtype=None, experts=None, seed=0, cast=True):
    """The `Checkpoint` in a folder or under a hub id: ours, LLaVA-1.5 as its authors or transformers write it, or VLoRA's.

    dtype    of all parameters; None: as stored
    experts  dict of the fields of VLMConfig that choose experts and method, to add the experts that the checkpoint has not
    seed     of the experts that are added
    cast     False: `dtype` is that of the added experts alone; what the folder holds stays mapped as it is there
    Falls back to `name`.old where a save was killed. Raises UserError: no checkpoint, another format, an unknown key, a
    tensor that is missing, left over or mis-shaped, a frozen part that is not the one it was trained on.
    """
    folder = locate(name)
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: a file, expected the folder of a checkpoint")
    config = read_json_object(os.path.join(folder, "config.json"))
    kind = config.get("format", config.get("model_type"))
    if not isinstance(kind, str) or kind not in LOADERS:
        raise UserError(f"{folder}/config.json: {kind!r} is no format that can be opened, expected {', '.join(LOADERS)}")
    return LOADERS[kind](folder, config, dtype, cast, seed, experts)
