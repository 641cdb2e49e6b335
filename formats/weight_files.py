"""Weight files: read and write tensors in safetensors and .bin files, in one file or in shards.

Reading maps files instead of copying them, runs no code in pickles, and refuses damaged files.
Next: configs.py.
"""
import hashlib
import os
import pickle
import re
import zipfile

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file

from cli import UserError
from formats.folders import first_line, TRAINED_WHOLE
from formats.json_files import read_json_object, write_json

LAYOUTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")  # in order of preference
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # of a LoRA
SHARD_NAME = re.compile(r"(pytorch_)?model-\d+-of-\d+\.(safetensors|bin)")
SHARD = 5 * 10**9  # largest weight file to write, bytes
REMAP = 2**27      # map a file again after this many bytes were read and cast


# ---- Reading


def shards_of(index):
    """[(path, names)] of the shards in an index file; UserError if one of them is missing."""
    weight_map = read_json_object(index).get("weight_map")
    if (not isinstance(weight_map, dict) or not weight_map
            or not all(isinstance(file, str) for file in weight_map.values())):
        raise UserError(f"{index}: expected a weight_map from names to files")
    shards = []
    for file in sorted(set(weight_map.values())):
        path = os.path.join(os.path.dirname(index), file)
        if not os.path.isfile(path):
            raise UserError(f"{index} names {file}, which is not there")
        shards.append((path, {name for name, place in weight_map.items() if place == file}))
    return shards


def weight_files(folder):
    """[(path, names in the index, or None)] of a folder or a file; UserError without weights."""
    if os.path.isfile(folder):
        return [(folder, None)]
    for layout in LAYOUTS + ADAPTERS:
        path = os.path.join(folder, layout)
        if os.path.isfile(path):
            return shards_of(path) if layout.endswith(".json") else [(path, None)]
    shards = list(filter(SHARD_NAME.fullmatch, os.listdir(folder)))
    if shards:
        index = re.sub(r"-\d+-of-\d+", "", min(shards)) + ".index.json"
        raise UserError(f"{folder}: {len(shards)} shards without an index: {index} is missing")
    raise UserError(f"no weights in {folder}: looked for {', '.join(LAYOUTS)}")


def is_state(state):
    return isinstance(state, dict) and state and all(
        isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in state.items())


def open_shard(path):
    """(names, get) of a weight file: get(name) is a tensor mapped from it. UserError if damaged."""
    try:
        if path.endswith(".safetensors"):
            file = safe_open(path, "pt")
            return list(file.keys()), file.get_tensor
        mapped = zipfile.is_zipfile(path)  # files from before torch 1.6 cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: damaged, or a pickle with more than tensors in it; its code is "
                        "never run") from None
    except Exception as error:  # the libraries raise nothing more specific
        raise UserError(f"{path}: not a whole weight file, perhaps half downloaded "
                        f"({first_line(error)})") from None
    if not is_state(state):
        raise UserError(f"{path}: expected a dict from names to tensors, and nothing else")
    return list(state), state.__getitem__


def check_shard(path, names, expected, seen):
    """UserError unless names are in one shard only, as in the index. Fills `seen`, {name: path}."""
    for name in names:
        if name in seen:
            raise UserError(f"tensor {name} is both in {seen[name]} and in {path}")
        if expected is not None and name not in expected:
            raise UserError(f"{path}: holds tensor {name}, but the index does not say so")
        seen[name] = path
    if expected is not None and expected - set(names):
        raise UserError(f"{path}: lacks tensor {min(expected - set(names))}, "
                        "which the index says it holds")


def names_in(folder):
    """Names of all tensors in a folder, from its index or its only file."""
    return [name for path, listed in weight_files(folder) for name in listed or open_shard(path)[0]]


def tensors(folder, dtype=None):
    """Yield (name, tensor, file) of all weights in a folder, shard by shard, mapped and not read.

    dtype  what the caller casts tensors to. Pages that were read stay in memory as long as their
           map does, so a file is mapped again after every REMAP bytes of tensors that need a cast:
           a model that is cast is never in memory twice.
    Raises UserError that names the file or tensor: no weights, a missing or damaged shard, a
    tensor in two shards.
    """
    seen = {}
    for path, expected in weight_files(folder):
        names, get = open_shard(path)
        check_shard(path, names, expected, seen)
        read = 0
        for name in names:
            if read > REMAP:
                get = None  # unmap first
                get, read = open_shard(path)[1], 0
            tensor = get(name)
            read += tensor.nbytes if dtype not in (None, tensor.dtype) else 0
            yield name, tensor, path


def check_fit(target, tensor, shape, label):
    """UserError unless the tensor has the shape and kind of the parameter `target`."""
    if tensor.shape != shape:
        raise UserError(f"{label} is {list(tensor.shape)}, "
                        f"but the model's {target} is {list(shape)}")
    if not tensor.is_floating_point():
        raise UserError(f"{label} has dtype {tensor.dtype}, expected a floating type: "
                        f"quantised weights are not supported")


def hash_file(path, pieces=None):
    """sha256 of a file's size and content; with `pieces`, of so many pieces of 64 KiB spread over
    it: 14 GB then take no longer than a second, and a change between two pieces is missed.
    """
    digest, size, piece = hashlib.sha256(), os.path.getsize(path), 2**16
    digest.update(f"{size} ".encode())
    stride = max(piece, size // pieces) if pieces else piece
    with open(path, "rb") as f:
        for place in range(0, size, stride):
            f.seek(place)
            digest.update(f.read(piece))
    return digest.hexdigest()


def fingerprint(folder):
    """A hash of the weights in a folder, a LoRA's projector included, see `hash_file`."""
    paths = [path for path, _ in weight_files(folder)]
    whole = os.path.join(folder, TRAINED_WHOLE)
    paths += [whole] if os.path.exists(whole) and whole not in paths else []
    lines = [f"{os.path.basename(path)} {hash_file(path, 256)}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def ends_fingerprint(folder):
    """What checkpoints of version 1 noted: names, sizes, first and last MiB of the weight files."""
    digest = hashlib.sha256()
    for path, _ in weight_files(folder):
        size = os.path.getsize(path)
        digest.update(f"{os.path.basename(path)} {size}\n".encode())
        with open(path, "rb") as f:
            digest.update(f.read(2**20))
            f.seek(max(0, size - 2**20))
            digest.update(f.read())
    return digest.hexdigest()


# ---- Writing


def split_shards(state):
    """Which tensor goes into which file, at most SHARD bytes each, whatever the order of `state`.

    The result has `filename_to_tensors`, `tensor_to_filename`, `is_sharded` and `metadata`.
    """
    return split_state_dict_into_shards_factory(
        dict(sorted(state.items())), get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors", max_shard_size=SHARD)


def write_file(path, state):
    """Write one safetensors file with a new file's permissions; the library makes it private."""
    with open(path, "wb") as f:
        mode = os.fstat(f.fileno()).st_mode
    try:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path,
                  metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be written ({error})") from None
    os.chmod(path, mode)


def write_tensors(folder, state):
    """Write model.safetensors, or shards and an index. Names and tensors determine the bytes."""
    split = split_shards(state)
    for file, names in split.filename_to_tensors.items():
        write_file(os.path.join(folder, file), {name: state[name] for name in names})
    if split.is_sharded:
        write_json(os.path.join(folder, "model.safetensors.index.json"),
                   {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def dtype_name(state):
    return str(next(iter(state.values())).dtype).removeprefix("torch.")
