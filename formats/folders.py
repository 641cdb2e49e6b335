"""Folders of models: find one or fetch it from the Hugging Face hub, and replace one safely.

Next: weight_files.py, the tensors in such a folder.
"""
import contextlib
import os
import re
import shutil

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from cli import UserError

PROJECTOR = "mm_projector.bin"  # the only weights that LLaVA's stage 1 writes
# What LLaVA's LoRA training writes, see lora.py
ADAPTER_CONFIG, TRAINED_WHOLE = "adapter_config.json", "non_lora_trainables.bin"


# ---- Finding a folder


def first_line(error):
    """The reason for an error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def hub_problem(error):
    """Why a model could not be fetched, in one line."""
    if isinstance(error, RepositoryNotFoundError):
        return "the Hugging Face hub has no such model, or you may not read it (try: hf auth login)"
    if isinstance(error, (ConnectionError, LocalEntryNotFoundError)):
        return "the Hugging Face hub could not be reached"
    return f"fetching it from the Hugging Face hub failed: {first_line(error)}"


def resolve(name):
    """The folder of a model: `name` if it exists, else `owner/name` is downloaded from the hub.

    Raises UserError if it is neither, or cannot be fetched (offline, unknown, private).
    """
    if os.path.exists(name):
        return name
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"{name}: no such folder, and not the name of a model on the Hugging Face "
                        "hub (owner/name)")
    small = ["*.json", "tokenizer.model", "adapter_model.*", TRAINED_WHOLE]
    try:  # fetch only one format of weights where a repository has both
        folder = huggingface_hub.snapshot_download(
            name, allow_patterns=["model*.safetensors", *small])
        if not any(file.endswith(".safetensors") for file in os.listdir(folder)):
            folder = huggingface_hub.snapshot_download(
                name, allow_patterns=["pytorch_model*.bin", PROJECTOR, *small])
    except Exception as error:  # from the library, its HTTP client or the operating system
        raise UserError(f"{name} is not a folder here, and {hub_problem(error)}") from None
    return folder


def locate(name):
    """The folder of a checkpoint: as `resolve`, or `name`.old if a save was killed."""
    real = os.path.realpath(name)
    if has_config(f"{real}.old") and not has_config(real):
        return f"{real}.old"
    return resolve(name)


def has_config(folder):
    """Whether a folder has a whole checkpoint: config.json is written last and removed first."""
    return os.path.exists(os.path.join(folder, "config.json"))


# ---- Writing a folder whole or not at all

CHECKPOINT_FILE = re.compile(
    r"((pre)?processor_|tokenizer_|generation_)?config\.json|tokenizer\.json|chat_template\.jinja"
    r"|(pytorch_)?model(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
NOTE = "replaced.txt"  # marks a .old folder as made by a save


def checkpoint_files(folder):
    """Names of a checkpoint's files in a folder, config.json last; without logs and the like."""
    names = filter(CHECKPOINT_FILE.fullmatch, os.listdir(folder))
    return sorted(names, key=lambda name: (name == "config.json", name))


def link(path, target):
    """Make a hard link, or a copy on file systems without links (exFAT, cloud drives)."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)


def discard(old):
    """Remove a .old folder if a save made it. Renamed first, so that no half of it is loaded."""
    if os.path.exists(os.path.join(old, NOTE)):
        gone = f"{old}.gone"
        shutil.rmtree(gone, ignore_errors=True)
        os.replace(old, gone)
        shutil.rmtree(gone, ignore_errors=True)


def set_aside(folder):
    """Make `folder`.old a second, whole copy of the checkpoint in `folder`."""
    old, new = f"{folder}.old", f"{folder}.old.new"
    discard(old)
    if os.path.exists(old):
        raise UserError(f"{old} is in the way: a save keeps the old checkpoint there until the new "
                        "one is whole. Please move it")
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    for name in checkpoint_files(folder):
        link(os.path.join(folder, name), os.path.join(new, name))
    with open(os.path.join(new, NOTE), "w", encoding="utf-8") as f:
        f.write("The previous checkpoint, kept until the new one is whole.\n")
    os.replace(new, old)


@contextlib.contextmanager
def atomic_folder(folder):
    """Context: a new folder to write a checkpoint into, which then replaces that in `folder`.

    If there was one, `folder` or `folder`.old holds a whole checkpoint at every moment. An error
    while writing (a full disk) leaves the old one untouched. Other files in `folder` stay.
    """
    folder = os.path.realpath(folder)  # follow links: renaming needs the same file system
    new = f"{folder}.new"
    shutil.rmtree(new, ignore_errors=True)
    os.makedirs(new)
    try:
        yield new
        os.makedirs(folder, exist_ok=True)
        if has_config(folder):  # else an earlier save was killed, and .old is the only checkpoint
            set_aside(folder)
        for name in reversed(checkpoint_files(folder)):
            os.remove(os.path.join(folder, name))
        for name in checkpoint_files(new):
            os.replace(os.path.join(new, name), os.path.join(folder, name))
        discard(f"{folder}.old")
    finally:
        shutil.rmtree(new, ignore_errors=True)
