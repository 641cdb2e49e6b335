"""Checkpoints: build, fill, save and load a model. The one door to checkpoints of every kind.

    assemble(clip, llama, options)   a model of two pretrained parts, with a new projector and
                                     experts
    load(folder or hub name)         a checkpoint of ours, LLaVA-1.5 in either layout or as a LoRA,
                                     or VLoRA's
    save(folder, ...)                write one of ours, whole or not at all

The model is built without storage and filled tensor by tensor from mapped files. Rules rename the
tensors of a foreign checkpoint (formats/name_rules.py). Each parameter is filled exactly once; each
tensor is used once or skipped by a rule. Anything else is a UserError with the tensor and the file.

A checkpoint of ours is a folder with config.json, tokenizer.json and model.safetensors (or shards
and an index). After stage 1 it holds what was trained, and notes where the frozen rest came from.
"""
import dataclasses
import os
import zlib
from typing import Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from baselines import BaselineConfig, BaselineVLM, source_of
from cli import UserError
from data import Preprocess, PromptFormat, SYSTEM
from formats.configs import (build_dataclass, check_heads, expect_keys, llama_config,
                             read_model_config, vision_config)
from formats.folders import atomic_folder, has_config, locate, resolve
from formats.json_files import write_json
from formats.llava import read_llava, read_original, vlora_config, VLORA_TYPE
from formats.lora import add_lora, base_folder, merge
from formats.name_rules import (BY_ID, clip_rules, llama_rules, ORIGINAL_PROJECTOR, OURS,
                                rename, SKIP)
from formats.tokenizer import Tokenizer
from formats.weight_files import check_fit, ends_fingerprint, fingerprint, tensors, write_tensors
from hypernet import Encoder
from model import VLM, VLMConfig
from vlora import GeneratorConfig, VLoRA, VLoRAConfig

FORMAT, VERSION = "hyperllava", 2  # of a checkpoint of ours, see `rescale_encoders`


# ---- Device and precision


def pick_device(wanted=None):
    """`wanted`, or the first of cuda, mps and cpu that exists; UserError if it does not exist here.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    found = ["cuda"] * cuda + ["mps"] * mps + ["cpu"]
    if wanted is not None and wanted not in found:
        raise UserError(f"--device {wanted}: this machine has {', '.join(found)}")
    return wanted or found[0]


def fast_dtype(device):
    """"bfloat16" where it is fast: on GPUs and on CPUs with fast bf16 products. Else "float32":
    on an Intel without AMX, avx512_bf16 is slower than fp32.
    """
    if device != "cpu":
        return "bfloat16"
    cpu = torch.cpu.get_capabilities()
    avx = cpu.get("avx512_bf16") and "Intel" not in cpu["cpu_name"]
    return "bfloat16" if avx or cpu.get("amx_bf16") else "float32"


# ---- Configs and models


def make_config(vision, llm, *, weight_source="hyper", vlora=None, **experts):
    """The config of a model on these two parts, of the class that its options ask for.

    experts        fields of VLMConfig
    weight_source  of the experts; not "hyper": a baseline, see baselines.py
    vlora          GeneratorConfig or None
    Raises UserError as the configs do.
    """
    if vlora is not None:
        return VLoRAConfig(vision, llm, vlora=vlora, **experts)
    if weight_source != "hyper":
        return BaselineConfig(vision, llm, weight_source=weight_source, **experts)
    return VLMConfig(vision, llm, **experts)


@dataclasses.dataclass
class SavedConfig(VLMConfig):
    """What config.json holds of a model of any class: the arguments of `make_config`."""
    weight_source: Literal["hyper", "static", "latent", "mlp", "lora", "gates"] = "hyper"
    vlora: GeneratorConfig | None = None


def saved_config(cfg):
    """The SavedConfig of a model's config."""
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(VLMConfig)}
    vlora = getattr(cfg, "vlora", None)
    return SavedConfig(**fields, weight_source=source_of(cfg), vlora=vlora)


MODELS = {VLMConfig: VLM, BaselineConfig: BaselineVLM, VLoRAConfig: VLoRA}


class SkipInit(TorchFunctionMode):
    """Skip the first values of parameters: on the meta device they cost a second and mean nothing.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_empty(cfg):
    """The model of a config, without storage (on the meta device)."""
    with torch.device("meta"), SkipInit():
        return MODELS[type(cfg)](cfg)


def names_of(cfg):
    """The names of a model's parameters."""
    return {name for name, _ in build_empty(cfg).named_parameters()}


# ---- Filling a model


def assign(model, target, tensor):
    """Make `tensor` itself, not a copy, the parameter `target`."""
    owner, _, leaf = target.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


def fill(model, sources, dtype=None, new=(), added=0, factors={}):
    """Fill a model without storage from files.

    sources  [(folder, rules)], see `tensors` and `rename`
    dtype    cast all tensors to it; None: each keeps its own. A tensor without a cast stays mapped
    new      names of the parameters that no source holds; they stay empty, for `initialise`
    added    number of rows that formats/export.py added to embedding and head; they are left out
    factors  {our name: the factors of a LoRA to add}, see `add_lora`
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
            tensor = merge(tensor, factors.get(target), dtype, label)
            assign(model, target, tensor.to(dtype or tensor.dtype).contiguous())
            origin[target] = label
    missing = [name for name in shapes if name not in origin and name not in new]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        folders = " and ".join(folder for folder, _ in sources)
        raise UserError(f"{folders}: no tensor for {missing[0]}{more}")


def initialise(module, seed, dtype=None, name=""):
    """Give storage and first values to the parameters without storage, by reset_parameters().

    Every part draws in fp32 from its own seed, made of `seed` and its name. So it starts the same,
    no matter which other new parts the model has.
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


def tokenizer_of(folder, llm):
    """The tokenizer in a folder; UserError if it has ids without an embedding in the Llama."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab > llm.vocab:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab} ids, the model {llm.vocab}")
    return tokenizer


def assemble(vision_folder, llm_folder, options, dtype=torch.float32, *, seed=0, projector=None,
             cast=True):
    """(model, Tokenizer, Preprocess) of a CLIP and a Llama in Hugging Face's layout.

    options    dict of the options of `make_config`; new parts are initialised from `seed`
    projector  path of an mm_projector.bin for the projector's static part, see `projector_file`
    cast       False: `dtype` is that of the new parts; the folders' tensors keep theirs, mapped
    """
    vision, preprocess = vision_config(vision_folder)
    llm = llama_config(llm_folder)
    tokenizer = tokenizer_of(llm_folder, llm)
    cfg = make_config(vision, llm, **options)
    sources = [(vision_folder, clip_rules(vision.depth)), (llm_folder, llama_rules(llm.tied))]
    sources += [(projector, ORIGINAL_PROJECTOR)] if projector else []
    held = names_of(VLMConfig(vision, llm, "none", "none"))
    held = {name for name in held if projector or not name.startswith("projector.")}
    model = build_empty(cfg)
    fill(model, sources, dtype if cast else None, names_of(cfg) - held)
    initialise(model, seed, dtype)
    return model, tokenizer, preprocess


# ---- Checkpoints of ours


@dataclasses.dataclass
class Checkpoint:
    """A model, and what is needed to use it as it was trained."""
    model: VLM
    tokenizer: Tokenizer
    preprocess: Preprocess
    system: str   # the system prompt
    config: dict  # the whole of config.json

    def prompt_format(self):
        """The PromptFormat of its conversations: as in training, guidance included."""
        cfg = self.model.cfg
        pool = self.config.get("training", {}).get("guidance_pool", "instruction")
        return PromptFormat("v1", self.system, cfg.image_tokens, cfg.llm.context, pool)


def source_entry(name, checkpoint):
    """What config.json in the folder `checkpoint` notes of a model that it needs.

    name  a folder or a hub name. A folder is noted relative to the checkpoint, so both may move
          together
    """
    local = os.path.exists(name)
    path = os.path.relpath(os.path.realpath(name), os.path.realpath(checkpoint)) if local else name
    return {"path": path, "fingerprint": fingerprint(resolve(name))}


def source_folder(entry, checkpoint):
    """The folder of a model that `source_entry` noted; UserError if it is gone or has changed."""
    expect_keys(entry, {"path", "fingerprint"}, f"{checkpoint}/config.json: sources")
    path = os.path.join(os.path.realpath(checkpoint), entry["path"])
    try:
        folder = os.path.normpath(path) if os.path.exists(path) else resolve(entry["path"])
    except UserError as error:
        raise UserError(f"{checkpoint} needs the model that it was trained on: {error}") from None
    if entry["fingerprint"] not in (fingerprint(folder), ends_fingerprint(folder)):
        raise UserError(f"{folder}: its weights are not those that {checkpoint} was trained on "
                        f"(fingerprints differ)")
    return folder


def save(folder, model_config, state, tokenizer, preprocess, system, *, stage, sources, training):
    """Write a checkpoint of ours, whole or not at all (see `atomic_folder`).

    state     {name in the model: plain CPU tensor}; after stage 1 only what was trained
    sources   {"vision": source_entry(...), "llm": source_entry(...)}, where the frozen rest is; {}:
              in `state`
    training  dict of the options that made it
    Raises OSError or UserError if it cannot be written; an older checkpoint is then still there.
    """
    config = {"format": FORMAT, "version": VERSION,
              "model": dataclasses.asdict(saved_config(model_config)),
              "preprocess": dataclasses.asdict(preprocess), "template": {"system": system},
              "stage": stage, "sources": sources, "training": training}
    with atomic_folder(folder) as new:
        write_tensors(new, state)
        tokenizer.save(new)
        write_json(os.path.join(new, "config.json"), config)


def read_config(values, label):
    """The config of a model from its object in config.json."""
    saved = build_dataclass(SavedConfig, values, label)
    check_heads(saved.vision.width, saved.vision.heads, f"{label}.vision")
    check_heads(saved.llm.width, saved.llm.heads, f"{label}.llm", saved.llm.kv_heads)
    return make_config(**vars(saved))


def check_method(cfg, wanted, label):
    """UserError unless `cfg` is the method that was asked for: a GeneratorConfig, or None for no
    VLoRA.

    The published checkpoint's way to count positions (`tag`) is its own and always kept.
    """
    held = getattr(cfg, "vlora", None)
    if (held is None) != (wanted is None):
        what, method = ("no VLoRA", "hyperllava") if held is None else ("a VLoRA", "vlora")
        raise UserError(f"{label}: holds {what}, so its pictures reach the Llama in another way: "
                        f"say --method {method}")
    for name, value in dataclasses.asdict(held).items() if held else ():
        if name != "tag" and getattr(wanted, name) != value:
            raise UserError(f"{label}: {name} is {value} there, not {getattr(wanted, name)}; "
                            f"a trained generator keeps its form: say --vlora_{name} {value}")


def add_experts(cfg, options, label):
    """`cfg` with the experts of `options` where it has none yet.

    Raises UserError if it has experts, and they are not the ones asked for.
    """
    check_method(cfg, options.get("vlora"), label)
    now = vars(saved_config(cfg))
    grown = make_config(**now | options | {"vlora": now["vlora"]})
    held = ["visual_expert"] if cfg.visual_expert != "none" else []
    held += ["language_expert", "guidance_after"] if cfg.language_expert != "none" else []
    held += ["expert_embed", "expert_rank", "weight_source"] if held else []
    then = vars(saved_config(grown))
    for name in held:
        if now[name] != then[name]:
            raise UserError(f"{label}: {name} is {now[name]} there, not {then[name]}; "
                            f"trained experts keep their form: say --{name} {now[name]}")
    return grown


def rescale_encoders(model):
    """Convert the encoders of version 1, which read the guidance without `Encoder.scale`.

    Products with the guidance stay what they were, but for rounding. New encoders have no storage
    yet, so this does not change them.
    """
    for part in model.modules():
        if isinstance(part, Encoder):
            part.weight = nn.Parameter(part.weight / part.scale)


def build_and_fill(cfg, sources, label, *, dtype, cast, seed, experts, lora, added=0,
                   version=VERSION):
    """The model of `cfg` with the tensors of `sources`, see `fill` and `load`.

    experts  options of the experts to add, initialised from `seed`; None: none
    lora     folder with a LoRA that was trained on these tensors, or without one
    version  of a checkpoint of ours
    """
    sources, factors = add_lora(lora, sources)
    grown = cfg if experts is None else add_experts(cfg, experts, label)
    model = build_empty(grown)
    new = names_of(grown) - names_of(cfg) if experts else ()
    fill(model, sources, dtype if cast else None, new, added, factors)
    if version == 1:
        rescale_encoders(model)
    initialise(model, seed, dtype)
    return model


def load_ours(folder, path, config, *, dtype, **how):
    expect_keys(config, {"format", "version", "model", "preprocess", "template", "stage", "sources",
                         "training"}, path)
    if config["version"] not in (1, VERSION):
        raise UserError(f"{path}: version {config['version']}, this code reads 1 and {VERSION}")
    cfg = read_config(config["model"], f"{path}: model")
    preprocess = build_dataclass(Preprocess, config["preprocess"], f"{path}: preprocess",
                                 absent={"background": "none"})
    expect_keys(config["template"], {"system"}, f"{path}: template")
    sources = [(folder, OURS)]
    if config["sources"]:
        expect_keys(config["sources"], {"vision", "llm"}, f"{path}: sources")
        rules = {"vision": clip_rules(cfg.vision.depth), "llm": llama_rules(cfg.llm.tied)}
        sources += [(source_folder(entry, folder), rules[part])
                    for part, entry in config["sources"].items()]
        dtype = dtype or next(tensors(folder))[1].dtype  # of the trained part
    model = build_and_fill(cfg, sources, path, dtype=dtype, version=config["version"], **how)
    tokenizer = Tokenizer.load(folder)
    return Checkpoint(model, tokenizer, preprocess, config["template"]["system"], config)


# ---- LLaVA-1.5 and VLoRA, in their authors' layout or in that of transformers


def load_llava(folder, path, config, *, dtype, **how):
    read = read_original if "mm_vision_tower" in config else read_llava
    vision, llm, preprocess, sources = read(folder, config, path)
    added = config.get("added_rows", 0)
    llm = dataclasses.replace(llm, vocab=llm.vocab - added)
    tokenizer = tokenizer_of(folder, llm)
    if dtype is None and len(sources) > 1:
        dtype = next(tensors(folder))[1].dtype  # a tower in its own folder takes that of the Llama
    published = config["model_type"] == VLORA_TYPE
    vlora = vlora_config(config, path, vision, llm) if published else None
    cfg = make_config(vision, llm, visual_expert="none", language_expert="none", vlora=vlora)
    model = build_and_fill(cfg, sources, path, dtype=dtype, added=added, **how)
    return Checkpoint(model, tokenizer, preprocess, config.get("system_prompt", SYSTEM), config)


# By "format" in our config.json, or "model_type" in foreign ones. LLaVA's authors say llava in old
# files, llava_llama in new ones.
LOADERS = {FORMAT: load_ours, "llava": load_llava, "llava_llama": load_llava,
           VLORA_TYPE: load_llava}


def load(name, dtype=None, experts=None, seed=0, cast=True, base=None):
    """The `Checkpoint` in a folder or under a hub name: ours, LLaVA-1.5 in either layout, or
    VLoRA's.

    dtype    of all parameters; None: as stored
    experts  options of `make_config`, to add the experts that the checkpoint lacks
    seed     of the added experts
    cast     False: `dtype` is that of the added experts; the folder's tensors keep theirs, mapped
    base     of a LoRA, a folder or hub name; None: as its adapter_config.json says
    Falls back to `name`.old if a save was killed. Raises UserError: no checkpoint, another format,
    an unknown key, a tensor that is missing, left over or mis-shaped, a frozen part that has
    changed.
    """
    folder = locate(name)
    home = base_folder(folder, base)  # where most of the weights are
    path, config = read_model_config(folder if has_config(folder) else home)
    kind = config.get("format", config.get("model_type"))
    if not isinstance(kind, str) or kind not in LOADERS:
        raise UserError(f"{path}: format {kind!r} cannot be opened, "
                        f"expected one of {', '.join(LOADERS)}")
    return LOADERS[kind](home, path, config, dtype=dtype, cast=cast, seed=seed, experts=experts,
                         lora=folder)
