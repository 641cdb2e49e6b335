"""TODO"""
import os
import shutil
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from cli import UserError
from data import SYSTEM
from formats.llava import projector_file
from weights import fast_dtype, pick_device


# The options that are fields of VLMConfig
EXPERT_OPTIONS = ("visual_expert", "language_expert", "guidance_after", "expert_embed", "expert_rank", "weight_source")


# What may differ between a run and its continuation. All else would make another run of it, see `first_step`.
CHANGEABLE = {"out", "resume", "overwrite", "steps", "epochs", "log_every", "val_every", "save_every", "keep", "workers", "device",
        "micro_batch_size", "skip_bad_images", "allow_random_llm", "checkpointing", "compile", "replicate"}


# LLaVA-1.5's recipe, which HyperLLaVA §4 keeps: scripts/v1_5/pretrain.sh and finetune.sh, for 8 GPUs. Their other numbers are the
# defaults below: --lr_scheduler_type cosine, --warmup_ratio 0.03, --weight_decay 0, transformers' AdamW (0.9, 0.999, 1e-8), no
# clipping (zero2.json and zero3.json name none), --model_max_length 2048, --bf16.
LLAVA_RECIPE = {
    1: dict(template="plain",          # --version plain
            aspect="crop",             # no --image_aspect_ratio: CLIP's processor crops
            batch_size=256, micro_batch_size=32,  # --per_device_train_batch_size 32, --gradient_accumulation_steps 1
            lr=1e-3, epochs=1,         # --learning_rate, --num_train_epochs
            checkpointing="full",      # --gradient_checkpointing
            workers=4),                # --dataloader_num_workers
    2: dict(template="v1", aspect="pad",          # --version v1, --image_aspect_ratio pad
            batch_size=128, micro_batch_size=16,  # --per_device_train_batch_size 16, --gradient_accumulation_steps 1
            lr=2e-5, epochs=1,
            group_by_length=True,      # --group_by_modality_length; here by length alone
            checkpointing="full", workers=4),
}


# TinyLlama and CLIP-L on one card of 24 GB: the same recipe, in bites that fit, by stage.
SMALL_GPU = {1: dict(micro_batch_size=16), 2: dict(micro_batch_size=4)}
PARTS = ("clip", "llm")  # of stage 0, which need nothing of one another


PRESETS = {
    "7b": LLAVA_RECIPE,
    "13b": LLAVA_RECIPE,
    "1b": LLAVA_RECIPE,
    "toy": {
        "clip": dict(batch_size=64, lr=2e-3, muon_lr=15e-3, steps=450, schedule="wsd", clip=1.0),  # of pairs of pictures
        "llm": dict(batch_size=32, lr=2e-3, muon_lr=12e-3, steps=500, schedule="wsd", clip=1.0),
        1: dict(template="plain", batch_size=32, lr=3e-3, steps=200, schedule="wsd", clip=1.0),
        2: dict(template="v1", batch_size=32, lr=2e-3, muon_lr=4e-3, steps=780, schedule="wsd", clip=1.0,
                cache_features=True),  # stage 1 sees less than half of the pictures, and each of them once
    },
}


# Where VLoRA's recipe differs: its paper's §4.1, and the authors' pretrain.sh and finetune.sh, for 8 GPUs
VLORA_RECIPE = {
    1: dict(batch_size=768, micro_batch_size=96,  # --per_device_train_batch_size 96; §4.1 the same, for 40,000 steps on 30 M pairs
            lr=5e-5),                             # of CapsFusion: --steps 40000. The script has one epoch of all 113 M
    2: dict(lr=2e-5,                              # the script's; the paper says 5e-5. Batch 128 in both
            workers=32),                          # --dataloader_num_workers
}
VLORA_TOY = dict(lr=1e-3, vlora_every=1, vlora_rank=16, vlora_embed=128, vlora_depth=2, vlora_heads=4)  # at 3e-3 stage 1 jumps
VLORA_STEPS = {1: 300, 2: 1000}  # of the toy: it learns more slowly


TOY_RECIPE = dict(vision="stage0/clip", llm="stage0/llm", system="", aspect="pad", expert_embed=16, group_by_length=True,
           kernels="eager", log_every=20, val_every=300, save_every=200)


@dataclass
class Options:
    """Train HyperLLaVA, or VLoRA. Without --stage: the toy from nothing to its scores. Options left out are the preset's."""
    stage: int | None = None         # 0: the toy's stand-ins; 1: align the projector; 2: instruction tuning
    part: Literal["clip", "llm"] | None = None  # stage 0: which of the stand-ins; none: both
    method: Literal["hyperllava", "vlora"] = "hyperllava"  # pictures as tokens, beside experts; or as weights of the Llama
    preset: Literal["toy", "7b", "13b", "1b"] = "toy"  # recipe: batch, learning rate, steps, template
    vision: str | None = None        # stage 1, or an mm_projector.bin: folder or hub name of a CLIP
    llm: str | None = None           # the same of a Llama
    data: str | None = None          # LLaVA's JSON file
    images: str | None = None        # folder that its pictures' paths start from
    val: str | None = None           # JSON file for the held-out loss, pictures in the same folder
    out: str = "out/toy"             # a run's folder; stage N writes OUT/stageN
    init: str | None = None          # stage 2: checkpoint to start from (OUT/stage1), a LLaVA-1.5, or its mm_projector.bin
    resume: bool = False             # go on from the newest saved state of this stage
    overwrite: bool = False          # train a finished stage anew
    pictures: int = 16000            # the toy's training pictures, and as many texts
    seed: int = 0                    # of new weights and of the order of the data
    steps: int | None = None         # optimiser steps; from epochs if not given
    epochs: float | None = None      # passes over the data
    batch_size: int | None = None    # samples per optimiser step, over all ranks
    micro_batch_size: int | None = None  # samples a rank takes at once; the rest is accumulated
    lr: float | None = None          # peak learning rate of AdamW
    muon_lr: float | None = None     # peak learning rate of Muon for the matrices in blocks; none: AdamW for all
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up: a cosine to 0, or constant with a linear end
    warmup: float = 0.03             # share of the steps in which the rate rises
    cooldown: float = 0.4            # share of the steps in which wsd falls to 0
    clip: float | None = None        # largest gradient norm; none: not clipped, as LLaVA's
    tune: Literal["full", "peft"] = "full"  # stage 2: the Llama too, or experts and projector alone
    visual_expert: Literal["none", "1", "2", "both"] = "1"  # layers of the projector with an expert (Table 2)
    language_expert: Literal["none", "anterior", "posterior", "all"] = "posterior"  # blocks with one, from stage 2 on (Table 3)
    guidance_after: int | None = None  # blocks before language guidance is taken; none: half of them (Figure 3)
    guidance_pool: Literal["instruction", "prompt"] = "instruction"  # what it is averaged over: a turn's own text, or all of its prompt
    expert_embed: int = 64           # width of the guidance's embedding (Figure 4a)
    expert_rank: int = 16            # width of an expert's bottleneck (Figure 4b)
    weight_source: Literal["hyper", "static", "latent", "mlp", "lora"] = "hyper"  # where experts' weights come from (Tables 5, 6)
    vlora_sites: str = "qkvom"       # which weights VLoRA's pictures change: of attention, and m, the FFN (its Table 3)
    vlora_every: int = 4             # of so many blocks, they change the last
    vlora_rank: int = 64             # rank of a change (Table 4)
    vlora_embed: int = 512           # width of the generators
    vlora_depth: int = 8             # blocks of a generator (Table 5)
    vlora_heads: int = 16            # heads of its attention
    template: Literal["plain", "v1"] = "v1"  # plain: picture and caption; v1: Vicuna's conversations
    system: str = SYSTEM             # text before the first turn of v1
    aspect: Literal["pad", "crop"] = "pad"  # make pictures square by padding or by cropping
    context: int | None = None       # longest sequence, image tokens included; none: the Llama's, 2048 at most
    group_by_length: bool = False    # samples of like length share a step, so that less is padded
    cache_features: bool = False     # run the frozen tower once per picture, before training; kept in memory
    kernels: Literal["fused", "eager"] = "fused"  # attention and RMS norms; eager is faster in bf16 on a CPU
    checkpointing: Literal["none", "selective", "full"] = "none"  # recompute every second block, or each, in the backward pass
    compile: bool = False            # let torch.compile make the blocks faster: minutes at the start, and a C++ compiler
    replicate: int = 1               # copies of the sharded state, a divisor of the ranks: with one a node, each shards within itself
    dtype: Literal["bfloat16", "float32"] | None = None  # of the computation; none: bf16 where it is fast
    device: Literal["cuda", "cpu"] | None = None  # none: cuda if there is one
    workers: int = 0                 # processes that prepare batches
    skip_bad_images: bool = False    # a record whose picture cannot be read gives its place to the next one in the file
    allow_random_llm: bool = False   # stage 1 with a Llama that knows no language, to rehearse
    log_every: int = 1               # steps between printed lines; log.jsonl gets every step
    val_every: int = 100             # steps between held-out losses, and answers to one held-out question
    save_every: int = 1000           # steps between saved states
    keep: int = 1                    # saved states to keep, the newest ones

    def __post_init__(self):
        for name in ("steps", "epochs", "batch_size", "micro_batch_size", "pictures", "log_every", "val_every",
                     "save_every", "keep", "replicate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"--{name} {value}: expected more than 0")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"--seed {self.seed}: expected 0 to 2**63")


# ---- The stages


def folder_of(out, stage, part=None):
    """Where a stage, or a part of stage 0, writes."""
    return os.path.join(out, f"stage{stage}", *([part] if part else []))


def stage_folder(o):
    return folder_of(o.out, o.stage, o.part)


def title(o):
    """What a stage, or a part of one, is called in all that is printed."""
    return f"stage {o.stage} {o.part}" if o.part else f"stage {o.stage}"


def parts_of(o, stage):
    """The parts of a stage that are to be trained: of stage 0 those asked for, None of the others, which have none."""
    return [None] if stage else [o.part] if o.part else list(PARTS)


def finished(out, stage, part=None):
    """Whether a stage's checkpoint, or that of a part, is there, be it set aside because the save of its successor was killed.

    Without a `part`, stage 0 is finished if all of its parts are.
    """
    if stage == 0 and part is None:
        return all(finished(out, stage, part) for part in PARTS)
    folder = folder_of(out, stage, part)
    return any(os.path.exists(os.path.join(place, "config.json")) for place in (folder, f"{folder}.old"))


def device_of(o):
    """cuda or cpu, as asked for; by default cuda if there is one."""
    return pick_device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def complete(given, stage):
    """The options of one stage: what the user gave, then the preset's, then the defaults; UserError if they do not fit."""
    o = Options(**given)
    others = {*EXPERT_OPTIONS, "guidance_pool"} if o.method == "vlora" else {name for name in given if name.startswith("vlora_")}
    if given.keys() & others:
        raise UserError(f"--{min(given.keys() & others)} is no option of --method {o.method}")
    preset = dict(PRESETS[o.preset].get(o.part or stage, {})) | (TOY_RECIPE if o.preset == "toy" else {})
    if o.method == "vlora" and stage > 0:  # the stand-ins are the same for both
        preset |= VLORA_TOY | {"steps": VLORA_STEPS[stage]} if o.preset == "toy" else VLORA_RECIPE[stage]
    if o.preset == "1b":
        preset |= SMALL_GPU[stage]
    if o.preset == "toy":
        folder = os.path.join(o.out, "world")
        preset |= {"images": os.path.join(folder, "images")}
        preset |= {k: os.path.join(o.out, preset[k]) for k in ("vision", "llm")}
        if stage > 0:
            preset |= {"data": os.path.join(folder, "captions.json" if stage == 1 else "instruct.json"),
                       "val": os.path.join(folder, "validation_captions.json" if stage == 1 else "validation.json")}
    if stage == 2:
        preset |= {"init": os.path.join(o.out, "stage1")}
        if "init" not in given and not finished(o.out, 1):
            raise UserError(f"stage 2 starts from {preset['init']}, which is not there: "
                            f"run --stage 1 first, or name a checkpoint with --init")
    if "epochs" in given and "steps" not in given:
        preset.pop("steps", None)
    o = Options(**{**preset, **given, "stage": stage})
    needed = {0: (), 1: ("vision", "llm", "data", "images"), 2: ("init", "data", "images")}[stage]
    needed += ("vision", "llm") if stage == 2 and projector_file(o.init) else ()
    missing = [f"--{name}" for name in needed if getattr(o, name) is None]
    if missing:
        raise UserError(f"stage {stage} with preset {o.preset} needs {', '.join(missing)}")
    o.device = device_of(o)
    o.dtype = o.dtype or fast_dtype(o.device)
    compilers = [os.environ.get("CXX", "g++")] if o.device == "cpu" else [os.environ.get("CC", "gcc"), "clang"]
    if o.compile and not any(map(shutil.which, compilers)):
        raise UserError(f"--compile needs a compiler, and {' or '.join(compilers)} is not there: install one, or leave it out")
    ranks = dist.get_world_size()
    o.micro_batch_size = min(o.micro_batch_size or o.batch_size, max(1, o.batch_size // ranks))
    if o.batch_size % (o.micro_batch_size * ranks):
        raise UserError(f"batch_size {o.batch_size} is not a multiple of micro_batch_size {o.micro_batch_size} x {ranks} ranks")
    return o
