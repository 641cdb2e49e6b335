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
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import typing
import zipfile
import zlib

import huggingface_hub
import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from cli import UserError, main, parse
from data import SYSTEM, TAG, Layout, Preprocess, Tokenizer
from model import LlamaConfig, VisionBlock, VisionConfig, VLM, VLMConfig
from vlora import SITES, VLoRAConfig, vlora_rules

FORMAT, VERSION = "hyperllava", 1
LAYOUTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")  # in order of preference
PROJECTOR = "mm_projector.bin"  # all that LLaVA's stage 1 writes
PUBLISHED = "llava_vlora"       # model_type of VLoRA's authors
SHARD = 5 * 10**9  # bytes of a weight file that we write, at most
REMAP = 2**27      # bytes read and cast before a file is mapped anew


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


# ---- Folders and files


def resolve(name):
    """The folder of a model: `name` itself if it exists, else the download of `owner/name` from Hugging Face.

    Raises UserError if it is neither, or cannot be had (offline, unknown, not for everyone).
    """
    if os.path.exists(name):
        return name
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"{name}: no such folder, and no name on Hugging Face either (owner/name)")
    small = ["*.json", "tokenizer.model"]
    try:  # what a repository holds in both formats is fetched in one
        folder = huggingface_hub.snapshot_download(name, allow_patterns=["model*.safetensors", *small])
        if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            folder = huggingface_hub.snapshot_download(name, allow_patterns=["pytorch_model*.bin", PROJECTOR, *small])
    except Exception as error:  # the library's own, its HTTP client's, the system's
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{name}: no such folder, and not to be had from Hugging Face: {reason[0]}") from None
    return folder


def read_json(path):
    """The object in a JSON file; UserError if the file is missing, damaged or no object."""
    try:
        with open(path, encoding="utf-8") as f:
            values = json.load(f)
    except FileNotFoundError:
        raise UserError(f"no {os.path.basename(path)} in {os.path.dirname(path) or '.'}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def write_json(path, values):
    with open(path, "w", encoding="utf-8") as f:
        json.dump(values, f, indent=2)
        f.write("\n")


def shards_of(index):
    """[(path, names)] of the shards that an index file lists; UserError if one of them is not there."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index}: expected a weight_map of names and files")
    names = {}
    for name, file in weight_map.items():
        names.setdefault(file, set()).add(name)
    paths = {file: os.path.join(os.path.dirname(index), file) for file in sorted(names)}
    for file, path in paths.items():
        if not os.path.isfile(path):
            raise UserError(f"{index} names {file}, which is not there")
    return [(path, names[file]) for file, path in paths.items()]


def weight_files(folder):
    """[(path, names it should hold, None if nothing says so)] of a folder, or of a file itself; UserError if there are none."""
    if os.path.isfile(folder):
        return [(folder, None)]
    for layout in LAYOUTS:
        path = os.path.join(folder, layout)
        if os.path.isfile(path):
            return shards_of(path) if layout.endswith(".json") else [(path, None)]
    raise UserError(f"no weights in {folder}: looked for {', '.join(LAYOUTS)}")


def open_shard(path):
    """Names of the tensors in a weight file, and the function from a name to its tensor, mapped from the disk."""
    try:
        if path.endswith(".safetensors"):
            file = safe_open(path, "pt")
            return list(file.keys()), file.get_tensor
        # Files from before torch 1.6 are no archives and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(f"{path}: damaged, or a pickle that holds more than tensors; code in it is never run") from None
    except Exception as error:  # the libraries raise nothing more specific
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a whole weight file, perhaps half downloaded ({reason})") from None
    if not isinstance(state, dict) or not state or not all(isinstance(n, str) and isinstance(t, torch.Tensor)
                                                           for n, t in state.items()):
        raise UserError(f"{path}: expected a dict of names and tensors, nothing else")
    return list(state), state.__getitem__


def check_shard(path, names, expected, seen):
    """Every name in one shard only, and where the index says. `seen`, {name: path}, grows."""
    for name in names:
        if name in seen:
            raise UserError(f"tensor {name} is both in {seen[name]} and in {path}")
        if expected is not None and name not in expected:
            raise UserError(f"{path}: holds tensor {name}, but the index does not say so")
        seen[name] = path
    if expected is not None and expected - set(names):
        raise UserError(f"{path}: lacks tensor {min(expected - set(names))}, which the index says it holds")


def names_in(folder):
    """Names of all tensors in a folder, as its index has them or else its one file."""
    return [name for path, listed in weight_files(folder) for name in listed or open_shard(path)[0]]


def tensors(folder, dtype=None):
    """Yield (name, tensor, file) of all weights in a folder, shard by shard, mapped rather than read.

    Pages that were read stay in memory as long as their map; mapping anew now and then lets go of those whose tensors
    were cast, to `dtype`, so that of a model that is cast as a whole there are never two in memory.
    Raises UserError naming the file or tensor: no weights, a missing or damaged shard, a tensor in two shards.
    """
    seen = {}
    for path, expected in weight_files(folder):
        names, get = open_shard(path)
        check_shard(path, names, expected, seen)
        read = 0
        for name in names:
            if read > REMAP:
                get = None
                get, read = open_shard(path)[1], 0
            tensor = get(name)
            read += tensor.nbytes if dtype not in (None, tensor.dtype) else 0
            yield name, tensor, path


def fingerprint(folder):
    """sha256 over names, sizes, first and last MiB of the weight files: tells models apart without reading 13 GB."""
    digest = hashlib.sha256()
    for path, _ in weight_files(folder):
        size = os.path.getsize(path)
        digest.update(f"{os.path.basename(path)} {size}\n".encode())
        with open(path, "rb") as f:
            digest.update(f.read(2**20))
            f.seek(max(0, size - 2**20))
            digest.update(f.read())
    return digest.hexdigest()


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


# ---- Filling a model


def check_fit(target, tensor, shape, label):
    if tensor.shape != shape:
        raise UserError(f"{label} is {list(tensor.shape)}, but the model's {target} is {list(shape)}")
    if not tensor.is_floating_point():
        raise UserError(f"{label} is {tensor.dtype}, not of a floating type: quantised weights are not supported")


def put(model, target, tensor):
    """Make `tensor` itself, not a copy, the parameter `target`."""
    owner, _, leaf = target.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor))


BY_ID = ("llm.embed_tokens.weight", "llm.lm_head.weight")  # a row per id


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
            put(model, target, tensor.to(dtype or tensor.dtype).contiguous())
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


class Undrawn(TorchFunctionMode):
    """No first values for parameters: on the meta device there is nothing to draw, but trying costs a second of imports."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def without_storage(cfg):
    with torch.device("meta"), Undrawn():
        return VLM(cfg)


def names_of(cfg):
    return {name for name, _ in without_storage(cfg).named_parameters()}


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
    model = without_storage(VLMConfig(vision, llm, **options))
    parts = [(vision_folder, clip_rules(vision.depth)), (llm_folder, llama_rules(llm.tied))]
    parts += [(projector, ORIGINAL_PROJECTOR)] if projector else []
    held = {n for n in names_of(VLMConfig(vision, llm, "none", "none")) if projector or not n.startswith("projector.")}
    fill(model, parts, dtype if cast else None, names_of(model.cfg) - held)
    initialise(model, seed, dtype)
    return model, tokenizer, preprocess


# ---- Writing a folder whole or not at all

WRITTEN = re.compile(r"((pre)?processor_|tokenizer_|generation_)?config\.json|tokenizer\.json|chat_template\.jinja"
                     r"|(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")

NOTE = "replaced.txt"  # in a .old folder that a save made


def link(path, target):
    """A hard link; a copy on file systems that have none (exFAT, cloud drives)."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def checkpoint_files(folder):
    """Names of the files that make the checkpoint in a folder, config.json last; logs and the like are not among them."""
    names = filter(WRITTEN.fullmatch, os.listdir(folder))
    return sorted(names, key=lambda name: (name == "config.json", name))


def discard(old):
    """Remove a .old folder that a save made, at once for whoever looks; one of a user's own making is left alone."""
    if os.path.exists(os.path.join(old, NOTE)):
        gone = f"{old}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


def set_aside(folder):
    """Make `folder`.old a second, whole checkpoint out of the one in `folder`."""
    old, aside = f"{folder}.old", f"{folder}.old.new"
    discard(old)
    if os.path.exists(old):
        raise UserError(f"{old} is in the way: a checkpoint that is replaced is kept there meanwhile. Move it, please")
    shutil.rmtree(aside, ignore_errors=True)
    os.makedirs(aside)
    for name in checkpoint_files(folder):
        link(os.path.join(folder, name), os.path.join(aside, name))
    with open(os.path.join(aside, NOTE), "w", encoding="utf-8") as f:
        f.write("A checkpoint that was about to be replaced, kept until the new one was whole.\n")
    os.replace(aside, old)


@contextlib.contextmanager
def written(folder):
    """A new folder to write a checkpoint into, which then takes the place of the one in `folder`, if any.

    At every moment either `folder` holds a whole checkpoint, known by its config.json, or `folder`.old does. An error
    while writing (a full disk) leaves the old one untouched. Other files in `folder` stay.
    """
    folder = os.path.realpath(folder)  # of a link, the far end: files are only ever renamed within a file system
    new = f"{folder}.new"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    try:
        yield new
        os.makedirs(folder, exist_ok=True)
        if os.path.exists(os.path.join(folder, "config.json")):
            set_aside(folder)  # else a .old is of a save that was killed, and all there is
        for name in reversed(checkpoint_files(folder)):  # without its config.json it is no checkpoint any more
            os.remove(os.path.join(folder, name))
        for name in checkpoint_files(new):
            os.replace(os.path.join(new, name), os.path.join(folder, name))
        discard(f"{folder}.old")
    finally:
        shutil.rmtree(new, ignore_errors=True)


def in_shards(state):
    """{file name: names of its tensors}, in files of at most SHARD bytes; the order in `state` does not matter."""
    groups, size = [[]], 0
    for name in sorted(state):
        if groups[-1] and size + state[name].nbytes > SHARD:
            groups, size = [*groups, []], 0
        groups[-1].append(name)
        size += state[name].nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def write_file(path, state):
    """Write one safetensors file. The library makes it readable to its owner alone; here the umask decides, as elsewhere."""
    with open(path, "wb") as f:
        mode = os.fstat(f.fileno()).st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    os.chmod(path, mode)


def write_tensors(folder, state):
    """Write model.safetensors, or shards and their index; the bytes depend on names and tensors alone."""
    files = in_shards(state)
    for file, names in files.items():
        write_file(os.path.join(folder, file), {name: state[name] for name in names})
    if len(files) > 1:
        weight_map = {name: file for file, names in files.items() for name in names}
        total = sum(t.nbytes for t in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(os.path.join(folder, "model.safetensors.index.json"), index)


def dtype_name(state):
    return str(next(iter(state.values())).dtype).removeprefix("torch.")


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


def write_vision(folder, state, config, preprocess, write=write_tensors):
    """Write a CLIP tower in Hugging Face's layout, for `vision_config` or transformers' CLIPVisionModel to read.

    state   {name in model.CLIP: tensor} of all blocks, and post_layernorm.weight and .bias
    config  VisionConfig of that tower, `depth` counting all blocks
    """
    values = {"architectures": ["CLIPVisionModel"], **vision_values(config, config.depth), "torch_dtype": dtype_name(state)}
    with written(folder) as new:
        write(new, {"vision_model." + re.sub(r"^layers", "encoder.layers", n): t for n, t in state.items()})
        write_json(os.path.join(new, "preprocessor_config.json"), image_values(preprocess, "CLIPImageProcessor"))
        write_json(os.path.join(new, "config.json"), values)


def write_llama(folder, state, config, tokenizer, bos, eos, write=write_tensors):
    """Write a Llama in Hugging Face's layout, for `llama_config` or transformers' LlamaForCausalLM to read.

    state     {name in model.Llama: tensor}
    bos, eos  ids of the tokens that begin and end a text
    """
    values = {"architectures": ["LlamaForCausalLM"], **text_values(config, bos, eos), "torch_dtype": dtype_name(state)}
    with written(folder) as new:
        write(new, {n if n.startswith("lm_head") else f"model.{n}": t for n, t in state.items()})
        tokenizer.save(new)
        write_json(os.path.join(new, "config.json"), values)


# ---- A static model for transformers


def llava_state(model, vocab):
    """{name in transformers' LLaVA: tensor} of a model without experts, and what LLaVA has beyond it.

    The tower's last block and last norm, which no feature runs through, are zeros. The rows of embedding and head up to
    `vocab` are the mean of the others: their logit is the mean of the logits, and so never the greatest.
    """
    state = {}
    for name, p in model.named_parameters():
        t = p.detach()
        if name in BY_ID:
            mean = t.float().mean(0, keepdim=True).to(t.dtype)
            t = torch.cat([t, mean.expand(vocab - len(t), -1)]) if vocab > len(t) else t
        state[rename(name, TO_LLAVA)] = t
    norm, depth = model.vision.pre_layrnorm.weight, model.cfg.vision.depth
    with torch.device("meta"):
        shapes = {f"vision.layers.{depth}.{n}": p.shape for n, p in VisionBlock(model.cfg.vision).named_parameters()}
    shapes |= {f"vision.post_layernorm.{n}": norm.shape for n in ("weight", "bias")}
    return state | {rename(n, TO_LLAVA): torch.zeros(shape, dtype=norm.dtype) for n, shape in shapes.items()}


def write_llava_tokenizer(folder, tokenizer, context):
    """Write the tokenizer with <image> and <pad> among its tokens and <s> before every text; the two ids, and their end."""
    path = os.path.join(folder, "tokenizer.json")
    tokenizer.save(folder)
    inner = tokenizers.Tokenizer.from_file(path)
    inner.add_special_tokens([TAG, "<pad>"])  # those that it has already keep their ids
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos)])
    inner.save(path)
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor", "bos_token": "<s>",
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "padding_side": "left",
        "model_max_length": context, "clean_up_tokenization_spaces": False})
    ids = inner.token_to_id(TAG), inner.token_to_id("<pad>")
    return *ids, max(*ids, inner.get_vocab_size() - 1) + 1


# How `data.pieces` lays out a conversation, for transformers' processor
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for c in content if c.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for c in content if c.type == 'text' -%}{{ c.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ SYSTEM }}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ 'USER: ' + text(message.content) + ' ASSISTANT:' }}
{%- else -%}{{ ' ' + text(message.content) + '</s>' }}{%- endif -%}
{%- endfor -%}
"""


def write_llava(folder, model, tokenizer, preprocess, system, write=write_tensors):
    """Write a model without experts for transformers' LlavaForConditionalGeneration and AutoProcessor, whole or not at all.

    The vocabulary grows by <image> and <pad> where there is no room for them yet, to a multiple of 64. `load` gives the same
    model back, bit for bit.
    write  (folder, {name: tensor}) -> writes these
    Raises UserError if the model has experts or is a VLoRA: their weights depend on the input, for which there is no place.
    """
    cfg = model.cfg
    if cfg.vlora is not None:
        raise UserError("a VLoRA does not fit into LLaVA's layout, which has visual tokens and no generated weights")
    if (cfg.visual_expert, cfg.language_expert) != ("none", "none"):
        raise UserError(f"visual_expert {cfg.visual_expert}, language_expert {cfg.language_expert}: a model with experts does not "
                        f"fit into LLaVA's layout, only one trained with --visual_expert none --language_expert none")
    with written(folder) as new:
        image, pad, ids = write_llava_tokenizer(new, tokenizer, cfg.llm.context)
        vocab = cfg.llm.vocab if ids <= cfg.llm.vocab else -(-ids // 64) * 64
        state = llava_state(model, vocab)
        write(new, state)
        write_json(os.path.join(new, "preprocessor_config.json"), {
            **image_values(preprocess, "LlavaImageProcessor"), "do_pad": preprocess.aspect == "pad",
            "processor_class": "LlavaProcessor"})
        write_json(os.path.join(new, "processor_config.json"), {
            "processor_class": "LlavaProcessor", "patch_size": cfg.vision.patch, "image_token": TAG,
            "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"})  # 1: CLS, which this strategy drops
        with open(os.path.join(new, "chat_template.jinja"), "w", encoding="utf-8") as f:
            f.write(CHAT_TEMPLATE.replace("SYSTEM", json.dumps(system and system + " ")))
        ends = {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": pad}
        write_json(os.path.join(new, "generation_config.json"), ends)
        write_json(os.path.join(new, "config.json"), {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "image_token_index": image,
            "image_seq_length": cfg.vision.tokens, "pad_token_id": pad, "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True, "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
            "tie_word_embeddings": cfg.llm.tied, "torch_dtype": dtype_name(state),
            "vision_config": vision_values(cfg.vision, cfg.vision.depth + 1),
            "text_config": text_values(dataclasses.replace(cfg.llm, vocab=vocab), tokenizer.bos, tokenizer.eos),
            "image_aspect_ratio": {"pad": "pad", "crop": "square"}[preprocess.aspect],  # this and the rest is for `load`
            "system_prompt": system, "added_rows": vocab - cfg.llm.vocab})


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
        return Layout("v1", self.system, cfg.image_tokens, cfg.llm.context, pool)


def source(name, checkpoint):
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
    with written(folder) as new:
        write_tensors(new, state)
        tokenizer.save(new)
        write_json(os.path.join(new, "config.json"), config)


def expect_keys(values, keys, label):
    """UserError naming a key that is unknown or lacking."""
    if not isinstance(values, dict):
        raise UserError(f"{label}: expected an object with {', '.join(sorted(keys))}")
    for key in values.keys() - keys:
        raise UserError(f"{label}: unknown key {key!r}, expected {', '.join(sorted(keys))}")
    for key in keys - values.keys():
        raise UserError(f"{label}: no {key!r}")


def fits(value, kind):
    """Whether a value is what the annotation of a configuration's field says: numbers are more than 0, tuples one per channel."""
    inner, number = typing.get_args(kind), isinstance(value, (int, float)) and not isinstance(value, bool)
    if typing.get_origin(kind) is typing.Literal:
        return value in inner
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) == 3 and all(isinstance(v, (int, float)) for v in value)
    if inner:  # of an index, which may be 0, or None
        return type(value) is int and value == 0 or any(fits(value, k) for k in inner)
    if kind in (int, float):
        return number and isinstance(value, (int, kind)) and 0 < value < math.inf
    return isinstance(value, kind)


def described(kind):
    """What `fits` asks for, in words."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(repr, inner))}"
    if typing.get_origin(kind) is tuple:
        return "three numbers"
    if inner:
        return "a whole number of 0 or more, or null" if int in inner else "an object, or null"
    return {int: "a whole number more than 0", float: "a number more than 0", bool: "true or false", str: "text"}.get(kind, "an object")


def build(kind, values, label):
    """The dataclass `kind` of exactly the fields in `values`; UserError names what is unknown, lacking or of no use."""
    expect_keys(values, {f.name for f in dataclasses.fields(kind)}, label)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name, wanted in typing.get_type_hints(kind).items():
        if not fits(values[name], wanted):
            raise UserError(f"{label}: {name} is {values[name]!r}, expected {described(wanted)}")
    return kind(**values)


def build_config(values, label):
    """VLMConfig of its nested dict."""
    expect_keys(values, {f.name for f in dataclasses.fields(VLMConfig)}, label)
    parts = {"vision": VisionConfig, "llm": LlamaConfig} | ({} if values["vlora"] is None else {"vlora": VLoRAConfig})
    cfg = build(VLMConfig, values | {name: build(kind, values[name], f"{label}.{name}") for name, kind in parts.items()}, label)
    for name, part in (("vision", cfg.vision), ("llm", cfg.llm)):
        if part.width % part.heads:
            raise UserError(f"{label}.{name}: width {part.width} does not divide by heads {part.heads}")
    if cfg.llm.heads % cfg.llm.kv_heads or cfg.llm.width // cfg.llm.heads % 2:
        raise UserError(f"{label}.llm: {cfg.llm.heads} heads of {cfg.llm.width // cfg.llm.heads}, {cfg.llm.kv_heads} of keys: expected heads "
                        "of an even size, in as many as divide by those of keys")
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


def filled(cfg, sources, dtype, cast, seed, experts, label, added=0):
    """The VLM of `cfg` with what `sources` hold, see `fill` and `load`, and the experts that `experts` adds, new from `seed`."""
    grown = cfg if experts is None else with_experts(cfg, experts, label)
    model = without_storage(grown)
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
    preprocess = build(Preprocess, config["preprocess"], f"{path}: preprocess")
    expect_keys(config["template"], {"system"}, f"{path}: template")
    parts = [(folder, OURS)]
    if config["sources"]:
        expect_keys(config["sources"], {"vision", "llm"}, f"{path}: sources")
        rules = {"vision": clip_rules(cfg.vision.depth), "llm": llama_rules(cfg.llm.tied)}
        parts += [(source_folder(noted, folder), rules[part]) for part, noted in config["sources"].items()]
        dtype = dtype or next(tensors(folder))[1].dtype  # that of the trained part for the frozen ones, too
    model = filled(cfg, parts, dtype, cast, seed, experts, path)
    return Checkpoint(model, Tokenizer.load(folder), preprocess, config["template"]["system"], config)


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


def vlora_config(config, path, vision, llm):
    """VLoRAConfig of the published checkpoint's config; UserError naming the field that describes another generator.

    Its heads are in the code alone, and so is that the tag counts as a position.
    """
    n = numbers(config, path, vlora_dim=512, vlora_depth=8, vlora_rank=64, skip_layers=4)
    demand(config, path, weights_sep=True, vlora_alpha=n["vlora_rank"], vlora_visual_dim=vision.width,
           vlora_pos_num=vision.tokens, vlora_llm_dim=llm.width, vlora_llm_depth=llm.depth)
    try:
        return VLoRAConfig(config.get("vlora_type", SITES), n["skip_layers"], n["vlora_rank"], n["vlora_dim"], n["vlora_depth"],
                           tag=True)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_original(folder, config, path):
    """What `read_llava` returns, of a LLaVA or VLoRA in its authors' layout. It says nothing of its tower but the name."""
    vlora = config["model_type"] == PUBLISHED
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


def load_llava(folder, config, dtype, cast, seed, experts):
    path = os.path.join(folder, "config.json")
    read = read_original if "mm_vision_tower" in config else read_llava
    vision, llm, preprocess, sources = read(folder, config, path)
    added = config.get("added_rows", 0)
    llm = dataclasses.replace(llm, vocab=llm.vocab - added)
    tokenizer = tokenizer_of(folder, llm)
    dtype = dtype or (next(tensors(folder))[1].dtype if sources[1:] else None)  # that of the Llama for a tower apart, too
    vlora = vlora_config(config, path, vision, llm) if config["model_type"] == PUBLISHED else None
    model = filled(VLMConfig(vision, llm, "none", "none", vlora=vlora), sources, dtype, cast, seed, experts, path, added)
    return Checkpoint(model, tokenizer, preprocess, config.get("system_prompt", SYSTEM), config)


# By "format" in config.json, or the "model_type" of foreign ones; LLaVA's authors say llava in old files, llava_llama in new
LOADERS = {FORMAT: load_ours, "llava": load_llava, "llava_llama": load_llava, PUBLISHED: load_llava}


def locate(name):
    """The folder of a checkpoint: `resolve`d, or `name`.old where a save was killed before the new one was whole."""
    real = os.path.realpath(name)
    killed = not os.path.exists(os.path.join(real, "config.json")) and os.path.exists(f"{real}.old/config.json")
    return f"{real}.old" if killed else resolve(name)


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
        check_original(read_json(config), config)
    return file


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
    config = read_json(os.path.join(folder, "config.json"))
    kind = config.get("format", config.get("model_type"))
    if not isinstance(kind, str) or kind not in LOADERS:
        raise UserError(f"{folder}/config.json: {kind!r} is no format that can be opened, expected {', '.join(LOADERS)}")
    return LOADERS[kind](folder, config, dtype, cast, seed, experts)


# ---- python weights.py


@dataclasses.dataclass
class Options:
    """Write a model without experts in the layout of llava-hf, for transformers to open."""
    model: str | None = None     # checkpoint: a folder or hub name
    export: str | None = None    # folder to write

    def __post_init__(self):
        if not self.model or not self.export:
            raise UserError("say --model CHECKPOINT --export FOLDER")
        if os.path.exists(os.path.join(self.export, "config.json")):
            raise UserError(f"--export {self.export}: holds a checkpoint already")


def run():
    o = Options(**parse(Options))
    point = load(o.model)
    write_llava(o.export, point.model, point.tokenizer, point.preprocess, point.system)


if __name__ == "__main__":
    main(run)
