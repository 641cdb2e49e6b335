"""Training: one loop runs stages 0, 1 and 2, sharded with FSDP2 on any number of ranks.

    python train.py                 the toy: stand-ins, alignment, instruction tuning, then scores
    torchrun --nproc_per_node 8 train.py --stage 1 --preset 7b --vision CLIP --llm VICUNA \\
             --data J.json --images DIR

In reading order: what trains when, the optimiser, the schedule, a step, the loop, the stages. The
rest of a long run is in training/: options, ranks, sharding, saved state, order of the data, memory
plan. A stage's folder holds log.jsonl, state/ while it runs, and the checkpoint when it is
finished. Next: sample.py.
"""
# cli before torch: from then on, Ctrl-C ends the slow imports with one line
from cli import parse, UserError

import os
if __name__ == "__main__":
    # Let waiting threads sleep early: beside another busy process a step is then over ten times as
    # fast, and alone about as fast (docs/speed.md). GCC's OpenMP, which torch has on Linux, reads
    # this when torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import contextlib
import dataclasses
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from baselines import is_guided
from data import Conversations, PromptFormat
from formats.folders import resolve
from formats.llava import projector_file
from toy import stage0 as toy
from training.checks import check_llm, check_val
from training.costs import step_flops
from training.distributed import (DistributedUserError, main_distributed, raise_on_all_ranks,
                                  Signals, start_world, STOPS, sum_over_ranks)
from training.feed import (describe_records, make_loader, next_batches, Pictures, Question,
                           TrainDataset, val_batches, VLMData)
from training.log import (cut_log, expert_shares, log_row, open_log, progress_bar, write_row,
                          write_skipped)
from training.muon import Muon
from training.options import (complete, device_of, EXPERT_OPTIONS, Options, stage_folder, title)
from training.parts import check_options, run_parts_in_parallel, unfinished
from training.plan import print_plan
from training.sharding import compile_blocks, gather_tensors, recompute, set_modules, shard
from training.state import first_step, load_newest, save_and_end, save_or_warn
from vlora import GeneratorConfig
from weights import assemble, load, save, source_entry

# What each stage trains, by prefix of the parameters' names; the rest is frozen (paper §3; VLoRA
# §4.1). "llm.expert." stands for the experts, or LoRA, of all blocks.
PROJECTOR = ("projector.", "perceptual.")  # of HyperLLaVA, of VLoRA
TRAINS = {
    (0, "full"): ("",), (0, "peft"): ("",),
    (1, "full"): PROJECTOR, (1, "peft"): PROJECTOR,
    (2, "full"): (*PROJECTOR, "llm."),
    (2, "peft"): (*PROJECTOR, "llm.hypernet.", "llm.guidance_norm.", "llm.expert."),
}


def trains_llm(o):
    return "llm." in TRAINS[o.stage, o.tune]


def freeze(model, prefixes):
    """Train the parameters whose names start with one of `prefixes`; freeze the others."""
    for name, p in model.named_parameters():
        name = "llm.expert." if re.match(r"llm\..*\.(expert|lora)\.", name) else name
        p.requires_grad_(name.startswith(prefixes))


# ---- Optimisation


def is_muon_matrix(name, p):
    """True for the matrices of blocks, except those of experts."""
    in_expert = re.search(r"\.(expert|lora)\.", name)
    return ".layers." in name and not in_expert and p.ndim == 2


def rate_of(name, p, o):
    """The option that is the peak learning rate of a parameter."""
    if o.muon_lr and is_muon_matrix(name, p):
        return "muon_lr"
    return "projector_lr" if o.projector_lr and name.startswith("projector.") else "lr"


def make_optimisers(model, o):
    """AdamW for what trains; with --muon_lr, Muon for the matrices in blocks. A group of parameters
    for each rate; its peak is the group's `initial_lr`.
    """
    groups = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault(rate_of(name, p, o), []).append(p)
    groups = {rate: {"params": params, "lr": getattr(o, rate), "initial_lr": getattr(o, rate)}
              for rate, params in groups.items()}
    muon = groups.pop("muon_lr", None)
    adam = torch.optim.AdamW(list(groups.values()), weight_decay=0.0, eps=1e-8, fused=True)
    return [adam] + ([Muon([muon], o.muon_lr)] if muon else [])


def schedule(step, o):
    """The factor on the learning rate at 0-based `step`.

    cosine: warm-up, then a cosine to 0; a warm-up begins with factor 0, as in LLaVA's trainer.
    wsd: warm-up, then constant, then a linear decay to 0.
    """
    warm = math.ceil(o.warmup * o.steps)
    if step < warm:
        return (step + (o.schedule == "wsd")) / warm
    if o.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, o.steps - warm)))
    return min(1.0, (o.steps - step) / max(1, o.cooldown * o.steps))


# ---- A step


@dataclass
class StepResult:
    """The figures of a step, the same on all ranks."""
    loss: float        # per supervised token
    norm: float        # of the gradient
    positions: float   # text and image tokens, without padding
    operations: float  # multiplications and additions, see costs.step_flops
    skipped: float     # pictures that could not be read
    stop: int          # the signal that some rank got before the step, or 0
    missing: float     # batches that could not be built; with one, or a signal, nothing was done


def gather_counts(batches, model, step, o, mesh, *, skipped, stop):
    """(supervised tokens of the global batch, StepResult without loss and norm).

    One all-reduce sums the counts, errors and signals of all ranks. Raises DistributedUserError if
    there is no supervised token.
    """
    good = [b for b in batches if not isinstance(b, UserError)]
    tokens, positions, work, skips, missing, *signals = sum_over_ranks([
        sum(b.trained for b in good),
        sum(b.lengths.sum().item() for b in good),
        sum(step_flops(model.cfg, b, trains_llm(o)) for b in good) if o.stage else 0,
        skipped, len(batches) - len(good), *(stop == s for s in STOPS)], mesh)
    if tokens == 0 and not missing:
        raise DistributedUserError(f"step {step + 1}: no supervised token in its batch of "
                                   f"{describe_records(batches)}")
    stop = next((s for s, got in zip(STOPS, signals) if got), 0)
    return tokens, StepResult(0.0, 0.0, positions, work, skips, stop, missing)


def train_step(model, optimisers, batches, step, o, mesh, *, skipped=0, stop=0):
    """One optimiser step over this rank's micro-batches; returns its StepResult.

    batches  this rank's; an entry is a UserError if its batch could not be built
    skipped  pictures that this rank skipped; stop: the signal that it got, or 0

    The loss is the sum over supervised tokens, divided by their number in the *global* batch. So
    neither accumulation nor the number of ranks changes the gradients. (LLaVA takes a mean of
    means.)
    """
    tokens, result = gather_counts(batches, model, step, o, mesh, skipped=skipped, stop=stop)
    if result.stop or result.missing:
        return result
    # A resumed run draws the same dropout
    torch.manual_seed(o.seed + step * dist.get_world_size() + dist.get_rank())
    summed = 0.0
    for batch in batches:
        loss = model.loss(batch.to(mesh.device_type)) / tokens
        (loss * dist.get_world_size()).backward()  # undoes FSDP's averaging over ranks
        summed += loss.item()
    result.loss, = sum_over_ranks([summed], mesh)
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = nn.utils.clip_grad_norm_(trained, o.clip or math.inf)
    result.norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    if not (math.isfinite(result.loss) and math.isfinite(result.norm)):
        records = describe_records(batches, failed=not math.isfinite(summed))
        raise DistributedUserError(f"step {step + 1}: loss {result.loss}, gradient norm "
                                   f"{result.norm}, stopped before the update; {records}")
    for optimiser in optimisers:
        optimiser.step()
        optimiser.zero_grad()
    return result


# ---- Evaluation


@torch.no_grad()
def evaluate(stage, model, o, mesh):
    """Figures for the log, if there is data for them.

    val_loss       loss per supervised token of the validation data
    expert_share   |E_L| / |FFN|, a mean over the blocks with an expert; of rank 0's batches
    answer, truth  the model's answer to the stage's question, and the right one
    """
    row = {}
    # Evaluation has many rare shapes; compiling for each would take minutes.
    with torch.compiler.set_stance("force_eager") if o.compile else contextlib.nullcontext():
        if stage.val_batches:
            with expert_shares(model, stage.val_batches) as shares:
                losses = [model.loss(b.to(mesh.device_type)).item() for b in stage.val_batches]
            tokens = sum(b.trained for b in stage.val_batches)
            loss, tokens = sum_over_ranks([sum(losses), tokens], mesh)
            row["val_loss"] = loss / tokens
            if shares:
                row["expert_share"] = sum(shares.values()) / len(shares)
        if stage.question:
            row["answer"] = stage.question.answer(model, o.device, getattr(torch, o.dtype))
            row["truth"] = stage.question.truth
    return row


# ---- The loop


@dataclass
class Stage:
    """A model with loss(batch), data with batch(rows), and what to write at the end."""
    model: nn.Module              # loss(batch) is summed over the supervised tokens
    data: object                  # see training.feed.VLMData
    val_batches: list             # this rank's batches of validation data; each rank has as many
    write: Callable               # {name: tensor} -> writes the finished checkpoint
    keeps: tuple = ("",)          # prefixes of the tensors to save
    question: Question | None = None


def setup_model(model, o, mesh):
    """(model, optimisers): frozen, compiled, checkpointed and sharded as the options say."""
    freeze(model, TRAINS[o.stage, o.tune])
    set_modules(model, eager=o.kernels == "eager", dropout=o.lora_dropout)
    if o.compile:
        compile_blocks(model)
    if o.stage:
        recompute(model, o.checkpointing)
    model = shard(model, mesh, getattr(torch, o.dtype))
    return model, make_optimisers(model, o)


def start_or_resume(stage, model, optimisers, o, mesh):
    """(first step, number of skipped pictures so far): of the newest saved state, or zero. Only
    rank 0, which writes the log, knows how many were skipped; the others get 0. Checks --val and
    the Llama before.
    """
    check_val(stage.val_batches, mesh)
    start = load_newest(o, model, optimisers)
    if o.stage == 1 and not start and not o.allow_random_llm:
        check_llm(model, raise_on_all_ranks(stage.data.text_batches), mesh)
    if dist.get_rank() > 0:
        return start, 0
    last_row = cut_log(os.path.join(stage_folder(o), "log.jsonl"), start)
    return start, last_row.get("skipped_images", 0)


def train(stage, o, mesh, place=0):
    """Train a stage and write its checkpoint. place: line of its bar on the terminal."""
    states = os.path.join(stage_folder(o), "state")
    o.steps = o.steps or math.ceil(o.epochs * len(stage.data) / o.batch_size)
    model, optimisers = setup_model(stage.model, o, mesh)
    raise_on_all_ranks(lambda: print_plan(model, optimisers, stage, o, trains_llm(o)))
    start, skipped = start_or_resume(stage, model, optimisers, o, mesh)
    dataset = TrainDataset(stage.data, o)
    loader = raise_on_all_ranks(lambda: make_loader(dataset, start, o))
    loop_began = step_began = time.perf_counter()
    save_seconds = 0.0
    with open_log(o) as log, progress_bar(start, o, place) as bar, Signals() as signals:
        for step in bar:
            # Data: this rank's micro-batches of the step
            asked = time.perf_counter()
            batches, messages = next_batches(loader, dataset.accumulation, signals)
            waited = time.perf_counter() - asked
            write_skipped(messages, bar)

            # Learning rate
            factor = schedule(step, o)
            for group in (g for optimiser in optimisers for g in optimiser.param_groups):
                group["lr"] = group["initial_lr"] * factor

            # Forward, backward, clip, step
            result = train_step(model, optimisers, batches, step, o, mesh,
                                skipped=len(messages), stop=signals.got)
            if result.stop or result.missing:  # the program ends here
                save_and_end(states, step, model, optimisers, o, stop=result.stop, batches=batches)
            skipped += int(result.skipped)

            # Log
            now = time.perf_counter()
            times = now - step_began, waited, (now - loop_began) / (step + 1 - start)
            row = log_row(result, step + 1, o.lr * factor, times, o)
            row |= {"skipped_images": skipped} if skipped else {}
            row |= {"save_s": save_seconds} if save_seconds else {}

            # Evaluate
            last = step + 1 == o.steps
            if last or (step + 1) % o.val_every == 0:
                row |= evaluate(stage, model, o, mesh)
            write_row(row, log, bar, o)

            # Save
            save_seconds = 0.0
            if (step + 1) % o.save_every == 0 and not last:
                save_seconds = save_or_warn(states, step + 1, model, optimisers, o, bar=bar)
            step_began = time.perf_counter()
    finish(stage, model, skipped, o)


def finish(stage, model, skipped, o):
    """Write the checkpoint, drop the saved states, and say where it is."""
    tensors = gather_tensors(model, stage.keeps, getattr(torch, o.dtype))
    raise_on_all_ranks(lambda: stage.write(tensors) if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        shutil.rmtree(os.path.join(stage_folder(o), "state"), ignore_errors=True)
        if skipped:
            print(f"{skipped} pictures could not be read; the next records took their places",
                  file=sys.stderr)
        print(f"{title(o)} is finished: {stage_folder(o)}", file=sys.stderr)
    dist.barrier()


# ---- The stages


def model_options(o):
    """The options of weights.make_config that the command line chooses."""
    if o.method == "vlora":
        generator = GeneratorConfig(o.vlora_sites, o.vlora_every, o.vlora_rank, o.vlora_embed,
                                    o.vlora_depth, o.vlora_heads)
        return {"visual_expert": "none", "language_expert": "none", "vlora": generator}
    options = {name: getattr(o, name) for name in EXPERT_OPTIONS}
    if o.stage == 1:  # stage 1 has no questions, so no language experts
        options |= {"language_expert": "none", "guidance_after": None}
    return options


def build_model(o):
    """(model, tokenizer, preprocess, sources): from CLIP and Llama, or from the checkpoint --init.

    sources  paths of CLIP and the Llama, for the checkpoint of stage 1
    """
    options, dtype = model_options(o), getattr(torch, o.dtype)
    projector = projector_file(o.init) if o.stage == 2 else None  # LLaVA's pretrained projector
    if projector and o.method == "vlora":
        raise UserError(f"--init {o.init}: a projector, but VLoRA has none; "
                        f"expected a checkpoint of stage 1")
    if o.stage == 2 and not projector:
        checkpoint = load(o.init, dtype, options, o.seed, cast=False, base=o.base)
        pool, before = checkpoint.prompt_format().pool, checkpoint.config
        trained = before.get("stage") == 2 and before["model"]["language_expert"] != "none"
        if trained and is_guided(checkpoint.model.cfg) and pool != o.guidance_pool:
            raise UserError(f"--init {o.init}: trained with --guidance_pool {pool}, "
                            f"not {o.guidance_pool}")
        return checkpoint.model, checkpoint.tokenizer, checkpoint.preprocess, {}
    parts = {"vision": o.vision, "llm": o.llm}
    folders = [resolve(name) for name in parts.values()]
    built = assemble(*folders, options, dtype, seed=o.seed, projector=projector, cast=False)
    if o.stage == 2:
        return *built, {}
    return *built, {part: source_entry(name, stage_folder(o)) for part, name in parts.items()}


def vlm_stage(o):
    """Stage 1 (alignment) or 2 (instruction tuning) of a VLM on LLaVA's data."""
    model, tokenizer, preprocess, sources = build_model(o)
    cfg = model.cfg
    preprocess = dataclasses.replace(
        preprocess, aspect=o.aspect, background=o.background or preprocess.background)
    context = o.context or min(2048, cfg.llm.context)
    layout = PromptFormat(o.template, o.system, cfg.image_tokens, context, o.guidance_pool)
    if not os.path.isdir(o.images):
        raise UserError(f"--images {o.images}: folder not found")
    files = [Conversations(path, o.images, tokenizer, layout) for path in (o.data, o.val) if path]
    load_picture, blank = Pictures(preprocess, o.dtype), (3, preprocess.size, preprocess.size)
    if o.cache_features:
        blank = (cfg.vision.tokens, cfg.vision.width)
        load_picture.cache(sorted({path for f in files for path in f.pictures()}), model, o)
    # of --data, then of --val, if there is one
    data = [VLMData(f, load_picture, blank, o.skip_bad_images) for f in files]

    def write(tensors):
        save(stage_folder(o), cfg, tensors, tokenizer, preprocess, o.system, stage=o.stage,
             sources=sources, training=dataclasses.asdict(o))

    batches = val_batches(data[1], o.micro_batch_size) if o.val else []
    keeps = ("",) if o.stage == 2 else TRAINS[1, o.tune]
    return Stage(model, data[0], batches, write, keeps, data[-1].question())


def run_stage(given, stage, mesh, place=0):
    """Train one stage, or a part of stage 0, with the options that the user gave."""
    o = raise_on_all_ranks(lambda: complete(given, stage))
    raise_on_all_ranks(lambda: (first_step(o), os.makedirs(stage_folder(o), exist_ok=True)))
    torch.manual_seed(o.seed)
    train(raise_on_all_ranks(lambda: toy_stage(o) if stage == 0 else vlm_stage(o)), o, mesh, place)


def toy_stage(o):
    """Stage 0: the toy's stand-in for CLIP or for the Llama."""
    world = os.path.join(o.out, "world")
    model, data, val, write = toy.stage_0(o.part, world, stage_folder(o), o.system)
    cuts = [range(i, min(i + o.batch_size, len(val))) for i in range(0, len(val), o.batch_size)]
    return Stage(model, data, [val.batch(rows) for rows in cuts], write)  # the same on all ranks


def run():
    given = parse(Options)
    o = Options(**given)
    mesh = start_world(device_of(o), o.replicate)
    raise_on_all_ranks(lambda: check_options(given))
    rank_0, one_process = dist.get_rank() == 0, dist.get_world_size() == 1
    # The toy needs its stand-ins for CLIP and the Llama, unless others are given, and its world for
    # them and as its data
    stand_ins = o.preset == "toy" and o.stage in (None, 1) and not given.keys() >= {"vision", "llm"}
    if stand_ins:
        raise_on_all_ranks(lambda: toy.check_fit(complete(given, 1), given, model_options))
    progress = toy.Progress(o.stage is None and rank_0)
    if stand_ins or o.stage == 0 or (o.preset == "toy" and "data" not in given):
        raise_on_all_ranks(lambda: toy.make_world(o.out, o.pictures) if rank_0 else None)
        progress.done("world")
    stages = [1, 2] if o.stage is None else [o.stage]
    for stage in [0, *stages] if stand_ins else stages:
        runs = unfinished(given, stage)
        parallel = len(runs) > 1 and mesh.device_type == "cpu" and one_process
        if parallel and torch.get_num_threads() > 1:
            run_parts_in_parallel(run_stage, runs, stage)
        else:
            for one in runs:
                run_stage(one, stage, mesh)
        progress.done(f"stage {stage}")
    if o.stage is None and rank_0:
        toy.finish(o.out, progress.began, mesh.device_type)


if __name__ == "__main__":
    main_distributed(run)
