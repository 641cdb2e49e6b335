"""TODO"""
import contextlib
import os
import re
import shutil

import huggingface_hub

from cli import UserError

PROJECTOR = "mm_projector.bin"  # all that LLaVA's stage 1 writes


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
def atomic_folder(folder):
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


def locate(name):
    """The folder of a checkpoint: `resolve`d, or `name`.old where a save was killed before the new one was whole."""
    real = os.path.realpath(name)
    killed = not os.path.exists(os.path.join(real, "config.json")) and os.path.exists(f"{real}.old/config.json")
    return f"{real}.old" if killed else resolve(name)
