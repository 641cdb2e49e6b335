"""The options of train.py: their names, meaning, ranges and presets.

`Options` is what a user can set. `complete` makes the options of one stage: what the user gave,
then the preset's, then the defaults, checked against each other. The functions between the two
tell where a stage writes and whether it is finished. Next: train.py.
"""
import dataclasses
import os
import shutil
import textwrap
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from cli import check_numbers, MOST, UserError
from data import SYSTEM
from formats.llava import projector_file
from weights import fast_dtype, pick_device

PARTS = ("clip", "llm")  # of stage 0; they do not depend on each other

# Options that are fields of the model's config
EXPERT_OPTIONS = ("visual_expert", "language_expert", "guidance_after", "expert_embed",
                  "expert_rank", "weight_source")

# Options that may change on --resume. With any other changed it would be a different run.
CHANGEABLE = {
    "out", "resume", "overwrite", "steps", "epochs", "log_every", "val_every", "save_every", "keep",
    "workers", "device", "micro_batch_size", "skip_bad_images", "allow_random_llm", "checkpointing",
    "compile", "kernels", "replicate",
    "images", "data", "val", "init", "base", "vision", "llm"}  # the content counts, see state.py


# ---- Presets: {stage, or part of stage 0: {option: value}}; "all" is for every stage

# LLaVA-1.5's recipe for 8 GPUs, which HyperLLaVA §4 keeps: scripts/v1_5/pretrain.sh and
# finetune.sh. The comments name their flags. Our defaults agree with the others:
# --lr_scheduler_type cosine, --warmup_ratio 0.03, --weight_decay 0, AdamW of transformers
# (0.9, 0.999, 1e-8), no clipping (zero2.json and zero3.json set none), --model_max_length 2048,
# --bf16.
LLAVA = {
    "all": dict(epochs=1, checkpointing="full", workers=4),  # --num_train_epochs,
                                   # --gradient_checkpointing, --dataloader_num_workers
    1: dict(template="plain",      # --version plain
            aspect="crop",         # no --image_aspect_ratio: CLIP's processor crops
            batch_size=256, micro_batch_size=32,  # --per_device_train_batch_size 32,
            lr=1e-3),              # --gradient_accumulation_steps 1, --learning_rate
    2: dict(template="v1", aspect="pad",          # --version v1, --image_aspect_ratio pad
            batch_size=128, micro_batch_size=16, lr=2e-5,
            order="modality")  # --group_by_modality_length
}

# What --tune peft changes in stage 2 of LLaVA's recipe. The paper names no rates for it; we take
# those of LLaVA's finetune_lora.sh: --learning_rate for what is new, --mm_projector_lr
PEFT = dict(lr=2e-4, projector_lr=2e-5)

# LLaVA's finetune_lora.sh itself: LoRA in all blocks, and no experts
LLAVA_LORA = LLAVA | {
    "all": LLAVA["all"] | dict(visual_expert="none"),
    2: LLAVA[2] | PEFT | dict(
        tune="peft", weight_source="lora", language_expert="all",  # --lora_enable True
        expert_rank=128,    # --lora_r 128 --lora_alpha 256; our alpha is always twice the rank
        lora_dropout=0.05)  # its default
}

# TinyLlama and CLIP-L on one GPU of 24 GB: the same recipe with smaller micro-batches
ONE_GPU = LLAVA | {1: LLAVA[1] | dict(micro_batch_size=16), 2: LLAVA[2] | dict(micro_batch_size=4)}

TOY = {
    # A step of the toy is one micro-batch: in another order a fifth of it would be padding
    "all": dict(system="", schedule="wsd", clip=1.0, expert_embed=16, order="length",
                kernels="eager", log_every=20, val_every=300, save_every=200),
    "clip": dict(batch_size=64, lr=2e-3, muon_lr=15e-3, steps=450),  # 64 pairs of pictures
    "llm": dict(batch_size=32, lr=2e-3, muon_lr=7e-3, steps=500),
    1: dict(template="plain", batch_size=32, lr=3e-3, steps=200),
    2: dict(template="v1", batch_size=32, lr=2e-3, muon_lr=7e-3, steps=660,
            cache_features=True),  # stage 1 would gain nothing: it reads each picture at most once
}

PRESETS = {"toy": TOY, "7b": LLAVA, "13b": LLAVA, "1b": ONE_GPU,
           "7b-lora": LLAVA_LORA, "13b-lora": LLAVA_LORA}

# What --method vlora changes: VLoRA §4.1 and the authors' pretrain.sh and finetune.sh, for 8 GPUs
VLORA = {
    1: dict(batch_size=768, micro_batch_size=96,  # --per_device_train_batch_size 96; §4.1 has the
            lr=5e-5),     # same, for 40,000 steps on 30 M pairs of CapsFusion (--steps 40000). The
                          # script takes one epoch of all 113 M
    2: dict(lr=2e-5,      # the script's; §4.1 has 5e-5. The batch is 128 in both
            workers=32),  # --dataloader_num_workers
}
VLORA_TOY = dict(lr=5e-4,           # higher ones learn more slowly, see docs/vlora.md
                 vlora_every=1, vlora_rank=16, vlora_embed=128, vlora_depth=2, vlora_heads=4)

VLORA_PRESETS = {
    "toy": {1: dict(VLORA_TOY, steps=300),
            2: dict(VLORA_TOY, muon_lr=3.5e-3, steps=1000)},  # it learns more slowly
    "7b": VLORA, "13b": VLORA, "1b": VLORA | {1: VLORA[1] | dict(micro_batch_size=16)}}


def preset_options(o, stage):
    """{option: value} that the preset and the method of `o` set in a stage."""
    table, unit = PRESETS[o.preset], o.part or stage
    values = table.get("all", {}) | table.get(unit, {})
    if stage == 2 and o.tune == "peft" and o.preset != "toy":
        values |= PEFT
    return values | VLORA_PRESETS[o.preset].get(unit, {}) if o.method == "vlora" else values


def preset_lines(tables):
    """Lines of --help with what each preset sets, by stage."""
    for table in {id(table): table for table in tables.values()}.values():
        yield "  " + ", ".join(name for name in tables if tables[name] is table)
        for unit, values in table.items():
            label = f"stage {unit}" if isinstance(unit, int) else unit
            text = ", ".join(f"{name}={value!r}" for name, value in values.items())
            yield textwrap.fill(f"    {label}: {text}", 80, subsequent_indent=" " * 8)


# ---- Options

# Allowed values of numeric options: (least, most, in words); the others: more than 0
RANGES = {"stage": (0, 2, "1 or 2; the toy also has 0"), "seed": (0, 2**63 - 1, "0 to 2**63 - 1"),
          "clip": (0, MOST, "0 or more"), "muon_lr": (0, MOST, "0 or more"),
          "guidance_after": (0, MOST, "0 or more"), "workers": (0, MOST, "0 or more"),
          **dict.fromkeys(("warmup", "cooldown", "lora_dropout"), (0, 1, "0 to 1"))}


@dataclass
class Options:
    """Train HyperLLaVA or VLoRA. Without --stage: train all stages of the toy, then score it."""
    # most important
    stage: int | None = None         # 0: the toy's own CLIP and Llama; 1: align the projector;
                                     # 2: instruction tuning (default: all stages of the toy)
    preset: Literal["toy", "7b", "13b", "1b", "7b-lora", "13b-lora"] = "toy"  # sets the options
                                     # listed at the end. toy: a small model, drawn pictures; 7b,
                                     # 13b: LLaVA-1.5's recipe, 8 GPUs; 1b: TinyLlama and CLIP-L,
                                     # one GPU of 24 GB; -lora: LLaVA's LoRA, without experts
    vision: str | None = None        # CLIP: a folder or a name on the Hugging Face hub (stage 1;
                                     # stage 2 if --init is an mm_projector.bin)
    llm: str | None = None           # Llama, in the same way
    data: str | None = None          # training data: a JSON file in LLaVA's format
    images: str | None = None        # folder that the image paths in the data start from
    out: str | None = None           # folder of the run; stage N writes OUT/stageN (default:
                                     # out/PRESET)
    init: str | None = None          # start of stage 2: a checkpoint of stage 1, a LLaVA-1.5, or
                                     # LLaVA's mm_projector.bin (default: OUT/stage1)
    base: str | None = None          # if --init is a LoRA: the model it was trained on (default: as
                                     # it says)
    resume: bool = False             # continue from the newest saved state
    steps: int | None = None         # optimiser steps (default: the preset's, or from --epochs)
    batch_size: int | None = None    # samples per optimiser step, over all processes (default: the
                                     # preset's)
    lr: float | None = None          # peak learning rate of AdamW (default: the preset's)
    tune: Literal["full", "peft"] = "full"  # what stage 2 trains. full: projector, experts and
                                     # Llama; peft: projector and experts only, at the rates of
                                     # LLaVA's LoRA (2e-4, projector 2e-5) if the preset is LLaVA's
    # data
    val: str | None = None           # JSON file for validation losses, with the same --images
    pictures: int = 16000            # training pictures of the toy, and as many texts for its Llama
    template: Literal["plain", "v1"] = "v1"  # plain: picture, caption; v1: Vicuna's conversations
    system: str = SYSTEM             # text before the first turn of v1
    aspect: Literal["pad", "crop"] = "pad"  # make pictures square by padding or by cropping
    background: Literal["none", "white"] | None = None  # white: behind transparent pixels; none:
                                     # transparency is dropped (default: as in --init, or none)
    context: int | None = None       # longest sequence in tokens, with image tokens (default: the
                                     # Llama's, but at most 2048)
    order: Literal["random", "modality", "length"] = "random"  # what shares a step. random: any
                                     # samples; modality: random ones, but pictures and text apart,
                                     # as in LLaVA; length: also of similar lengths
    cache_features: bool = False     # run the frozen CLIP once per picture, before training, and
                                     # keep its features in memory
    skip_bad_images: bool = False    # replace a record whose picture is unreadable by the next one
                                     # that is not longer
    # model
    method: Literal["hyperllava", "vlora"] = "hyperllava"  # hyperllava: image tokens and experts;
                                     # vlora: pictures as weights of the Llama
    visual_expert: Literal["none", "1", "2", "both"] = "1"  # layers of the projector that have an
                                     # expert (Table 2)
    language_expert: Literal["none", "anterior", "posterior", "all"] = "posterior"  # blocks of the
                                     # Llama that have an expert, from stage 2 on (Table 3)
    guidance_after: int | None = None  # guidance is the output of this many blocks
                                     # (Figure 3; default: half, or 0 if block 0 has an expert)
    guidance_pool: Literal["instruction", "prompt", "last"] = "instruction"  # what guidance is
                                     # the mean of. instruction: the text of the turn's question;
                                     # prompt: also the picture and the system text, in the turn
                                     # where they stand; last: only the last position before the
                                     # answer
    expert_embed: int = 64           # width of the guidance's embedding (Figure 4a)
    expert_rank: int = 16            # width of an expert's bottleneck (Figure 4b)
    weight_source: Literal["hyper", "static", "latent", "mlp", "lora", "gates"] = "hyper"  # where
                                     # experts get their weights. hyper: the paper's; gates: ours,
                                     # a generated factor for each hidden unit; the others are
                                     # baselines (Tables 5, 6)
    # optimisation
    epochs: float | None = None      # passes over the data; used if --steps is not given
    projector_lr: float | None = None  # peak learning rate of the projector and its expert
                                     # (default: --lr, or the preset's)
    muon_lr: float | None = None     # peak learning rate of Muon, which then trains the matrices in
                                     # blocks; 0: AdamW for everything (default: the preset's)
    schedule: Literal["cosine", "wsd"] = "cosine"  # after the warm-up. cosine: a cosine to 0; wsd:
                                     # constant, then linear to 0
    warmup: float = 0.03             # share of the steps in which the learning rate rises
    cooldown: float = 0.4            # share of the steps in which wsd falls to 0
    lora_dropout: float = 0.0        # share of the inputs of LoRA that is dropped, with
                                     # --weight_source lora
    clip: float | None = None        # largest gradient norm; 0: no clipping (default: the preset's)
    # run
    part: Literal["clip", "llm"] | None = None  # train only this part of stage 0 (default: both)
    overwrite: bool = False          # train a finished stage again
    seed: int = 0                    # for new weights and the order of the data
    log_every: int = 1               # steps between printed lines; log.jsonl has every step
    val_every: int = 100             # steps between validation losses, each with a sample answer
    save_every: int = 1000           # steps between saved states
    keep: int = 1                    # saved states to keep, the newest ones
    allow_random_llm: bool = False   # let stage 1 start with an untrained Llama, to try things out
    # hardware
    device: Literal["cuda", "cpu"] | None = None  # default: cuda if available
    dtype: Literal["bfloat16", "float32"] | None = None  # of the computation (default:
                                     # bfloat16 if the device has fast bfloat16)
    micro_batch_size: int | None = None  # samples per process in one forward pass, on average;
                                     # gradients add up to --batch_size (default: the preset's, or
                                     # all)
    workers: int = 0                 # processes that prepare batches
    checkpointing: Literal["none", "selective", "full"] = "none"  # recompute activations in
                                     # the backward pass, to save memory: every second block, or all
    kernels: Literal["fused", "eager"] = "fused"  # of attention and RMS norms; eager is
                                     # faster in bfloat16 on a CPU
    compile: bool = False            # torch.compile the blocks: faster steps, but the first ones
                                     # take minutes; needs a C++ compiler
    replicate: int = 1               # copies of the sharded state; must divide the number of
                                     # processes. One copy per node keeps sharding inside nodes
    # VLoRA, with --method vlora
    vlora_sites: str = "qkvom"       # matrices that pictures change: q, k, v, o of attention, and
                                     # m, the MLP (VLoRA's Table 3)
    vlora_every: int = 4             # change the last block of every N
    vlora_rank: int = 64             # rank of a change (VLoRA's Table 4)
    vlora_embed: int = 512           # width of the weight generators
    vlora_depth: int = 8             # blocks of a generator (VLoRA's Table 5)
    vlora_heads: int = 16            # attention heads of a generator

    def __post_init__(self):
        self.out = self.out or os.path.join("out", self.preset)
        check_numbers(self, RANGES)

    @classmethod
    def help_epilog(cls):
        """The text below the options in --help: the values of the presets."""
        return "\n".join([
            "presets: they replace the defaults above; options that you give replace both",
            *preset_lines(PRESETS), "presets with --method vlora: these values change",
            *preset_lines(VLORA_PRESETS)])


# ---- Where a stage writes


def folder_of(out, stage, part=None):
    """The folder of a stage, or of a part of stage 0."""
    return os.path.join(out, f"stage{stage}", *([part] if part else []))


def stage_folder(o):
    return folder_of(o.out, o.stage, o.part)


def title(o):
    """The name of a stage, or of a part of stage 0, in all printed text."""
    return f"stage {o.stage} {o.part}" if o.part else f"stage {o.stage}"


def parts_of(o, stage):
    """The parts of a stage to train: for stage 0 --part or both; [None] for the others."""
    if stage > 0:
        return [None]
    return [o.part] if o.part else list(PARTS)


def finished(out, stage, part=None):
    """Whether a stage, or a part of stage 0, has its checkpoint. Stage 0 needs those of both parts.

    FOLDER.old counts as well: a save that was killed left it there.
    """
    if stage == 0 and part is None:
        return all(finished(out, stage, part) for part in PARTS)
    folder = folder_of(out, stage, part)
    return any(os.path.exists(os.path.join(f, "config.json")) for f in (folder, f"{folder}.old"))


def toy_files(out, stage, own_data):
    """{option: path} of the toy's CLIP and Llama, and of its data unless the user has their own."""
    files = {"vision": folder_of(out, 0, "clip"), "llm": folder_of(out, 0, "llm")}
    if own_data:
        return files
    world = os.path.join(out, "world")
    files["images"] = os.path.join(world, "images")
    if stage > 0:
        data = "captions" if stage == 1 else "instruct"
        val = "validation_captions" if stage == 1 else "validation"
        files["data"] = os.path.join(world, f"{data}.json")
        files["val"] = os.path.join(world, f"{val}.json")
    return files


# ---- The options of one stage


def device_of(o):
    """The device to train on: --device, or cuda if available, else cpu.

    UserError if this machine does not have it.
    """
    return pick_device(o.device or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_method(given, method):
    """UserError if an option belongs to the other method."""
    if method == "vlora" and given.get("preset", "toy") not in VLORA_PRESETS:
        raise UserError(f"--preset {given['preset']} is no preset of --method vlora")
    if given.get("preset", "").endswith("-lora") and given.get("tune") == "full":
        raise UserError(f"--tune full: the preset {given['preset']} has the rates of LoRA, which "
                        f"are too high for the Llama itself; use {given['preset'][:-5]}")
    if given.get("lora_dropout") and not (given.get("weight_source") == "lora"
                                          or given.get("preset", "").endswith("-lora")):
        raise UserError("--lora_dropout goes with --weight_source lora")
    experts = {name for name in given
               if name in (*EXPERT_OPTIONS, "guidance_pool", "projector_lr", "lora_dropout")}
    vlora = {name for name in given if name.startswith("vlora_")}
    if wrong := experts if method == "vlora" else vlora:
        raise UserError(f"--{min(wrong)} is no option of --method {method}")


def check_paths(given):
    """UserError if a file or folder of data that the user named does not exist."""
    for name in ("data", "val", "images"):
        kind, exists = ("folder", os.path.isdir) if name == "images" else ("file", os.path.isfile)
        if given.get(name) and not exists(given[name]):
            raise UserError(f"--{name} {given[name]}: {kind} not found")


def inputs(o):
    """Names of the options without whose files a stage cannot run."""
    names = {0: (), 1: ("vision", "llm", "data", "images"), 2: ("init", "data", "images")}[o.stage]
    projector = o.stage == 2 and projector_file(o.init)  # only a projector, without CLIP and Llama
    return names + (("vision", "llm") if projector else ())


def check_needed(o, given):
    """UserError that names the options a stage cannot do without and does not have."""
    if o.stage == 2 and "init" not in given and not finished(o.out, 1):
        raise UserError(f"stage 2 starts from {o.init}, which is not there: run --stage 1 first, "
                        f"or name a checkpoint with --init")
    if o.base is not None and (o.stage != 2 or projector_file(o.init)):
        raise UserError(f"--base {o.base}: only for stage 2, if --init is a LoRA")
    missing = [f"--{name}" for name in inputs(o) if getattr(o, name) is None]
    if missing:
        raise UserError(f"stage {o.stage} with preset {o.preset} needs {', '.join(missing)}")


def check_compiler(device):
    """UserError if there is no compiler for torch.compile."""
    names = [os.environ.get("CC", "gcc"), "clang"]
    if device == "cpu":
        names = [os.environ.get("CXX", "g++")]
    if not any(map(shutil.which, names)):
        raise UserError(f"--compile needs a compiler, and {' or '.join(names)} is not there: "
                        f"install one, or leave it out")


def split_batch(o):
    """The micro-batch size on this number of ranks; UserError if the batch does not divide."""
    ranks = dist.get_world_size()
    size = min(o.micro_batch_size or o.batch_size, max(1, o.batch_size // ranks))
    if o.batch_size % (size * ranks):
        raise UserError(f"batch_size {o.batch_size} is not a multiple of "
                        f"micro_batch_size {size} x {ranks} ranks")
    return size


def complete(given, stage):
    """The options of one stage: what the user gave, then the preset's, then the defaults.

    given    {option: value} of the command line
    returns  Options with device, dtype and micro_batch_size set; steps may be None if epochs is set
    Raises UserError if an option is missing or does not fit the others.
    """
    o = Options(**given)
    check_method(given, o.method)
    preset = preset_options(o, stage)
    if o.preset == "toy":
        preset |= toy_files(o.out, stage, "data" in given)
    if stage == 2:
        preset["init"] = folder_of(o.out, 1)
    if "epochs" in given and "steps" not in given:
        preset.pop("steps", None)
    o = dataclasses.replace(o, **{**preset, **given, "stage": stage})
    check_needed(o, given)
    o.device = device_of(o)
    o.dtype = o.dtype or fast_dtype(o.device)
    if o.device != "cpu" and "kernels" not in given:
        o.kernels = Options.kernels  # a preset's eager ones are for CPUs
    if o.compile:
        check_compiler(o.device)
    o.micro_batch_size = split_batch(o)
    return o
