"""TODO"""
import hashlib
import os
import pickle
import zipfile

import torch
from safetensors import safe_open, SafetensorError
from safetensors.torch import save_file

from cli import UserError
from formats.json_files import read_json_object, write_json


LAYOUTS = ("model.safetensors", "model.safetensors.index.json",
           "pytorch_model.bin", "pytorch_model.bin.index.json")  # in order of preference
SHARD = 5 * 10**9  # bytes of a weight file that we write, at most
REMAP = 2**27      # bytes read and cast before a file is mapped anew


def shards_of(index):
    """[(path, names)] of the shards that an index file lists; UserError if one of them is not there."""
    weight_map = read_json_object(index).get("weight_map")
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
