"""Training: stages 0, 1 and 2 as presets of one loop, sharded with FSDP2 at every world size.

    python train.py                                   the toy: stand-ins, alignment, instruction tuning, then scores
    torchrun --nproc_per_node 8 train.py --stage 1 --preset 7b --vision CLIP --llm VICUNA --data J.json --images DIR

A stage is a `Job` (model, data, loss, what to write at the end) made by `stage_0` or `stage_1_or_2`; `train` runs it. What trains
in which stage is said in TRAINS. A run's folder holds log.jsonl, state/ while it lasts, and the checkpoint when it is done.
"""
import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import weights
from benchmarks.toy import score
from cli import parse, UserError
from data import (collate, Conversations, encode, encode_prompt, IGNORE, MULTIPLE, PromptFormat,
    TAG, turns_of_record)
from formats.folders import resolve
from formats.llava import projector_file
from formats.tokenizer import train_tokenizer
from model import Attention, Block, Cache, generate, RMSNorm, VisionAttention
from toy.files import write_world
from toy.stand_ins import (Captions, contrast_loss, language_loss, LLAMA, StandInCLIP,
    StandInLlama, VISION, words, write_clip, write_llm)
from training.costs import step_flops
from training.distributed import (DistributedUserError, main_distributed, raise_on_all_ranks, Signals,
    split_across_ranks, start_world, sum_over_ranks)
from training.feed import (describe_records, is_readable, make_loader, picture_loader,
    TrainDataset, with_picture)
from training.log import cut_log, log_line, log_row
from training.muon import Muon
from training.options import complete, device_of, EXPERT_OPTIONS, Options, stage_folder, title
from training.parts import check_options, run_parts_in_parallel, unfinished
from training.plan import plan
from training.sharding import compile_blocks, gather_tensors, recompute, shard
from training.state import first_step, load_state, save_or_warn
from vlora import VLoRAConfig
from weights import assemble, load, save, source_entry

ANSWER = 32  # tokens of an answer in the log


# What each stage trains, by prefix of the parameters' names; everything else is frozen (paper §3, "training"; VLoRA §4.1).
TRAINS = {
    (0, "full"): ("",),
    (0, "peft"): ("",),
    (1, "full"): ("projector.", "perceptual."),
    (1, "peft"): ("projector.", "perceptual."),
    (2, "full"): ("projector.", "perceptual.", "llm."),
    (2, "peft"): ("projector.", "perceptual.", "llm.hypernet.", "llm.guidance_norm.", "llm.expert."),
}


@dataclass
class Job:
    """One stage: what the loop trains, on what, and what becomes of it."""
    model: nn.Module
    lengths: np.ndarray               # int64[samples], how long each of the training data's samples is
    batch: Callable                   # (rows) -> batch of the training data with those indices
    held_out: list                    # batches of this rank's share of the held-out data, as many as on the other ranks
    loss: Callable                    # (model, batch) -> loss summed over the batch's supervised tokens
    tokens: Callable                  # (batch) -> their number
    finish: Callable                  # ({name: tensor}) -> writes the finished checkpoint
    sample: Callable | None           # (index) -> the Sample of the training data, without its picture; None: there are none
    text: list = dataclasses.field(default_factory=list)  # batches without pictures, to see whether a frozen Llama can read
    skipped: list = dataclasses.field(default_factory=list)  # what is wrong with pictures that `batch` did without
    keeps: tuple = ("",)              # prefixes of the names of the tensors that `finish` gets
    pictured: np.ndarray | None = None  # bool[samples], which of the training data are about a picture; None: all alike
    shown: Callable | None = None     # (function of a prompt to ids) -> str, the answer to one question; None: nothing to ask
    asked: str = ""                   # what that question is, and the answer that the data has


# ---- World and precision: the only lines that know where and in what they run


def freeze(model, prefixes):
    """Leave trainable what starts with one of `prefixes`.

    "llm.expert." stands for the experts of all blocks, and for LoRA in their place.
    """
    for name, p in model.named_parameters():
        name = "llm.expert." if re.match(r"llm\..*\.(expert|lora)\.", name) else name
        p.requires_grad_(name.startswith(prefixes))


# ---- Optimisation


def optimisers(model, o):
    """AdamW for all that trains or, with a muon_lr, Muon for the matrices inside blocks and AdamW for the rest."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    in_block = lambda n, p: ".layers." in n and not re.search(r"\.(expert|lora)\.", n) and p.ndim == 2
    matrices = [p for n, p in named if o.muon_lr and in_block(n, p)]
    rest = [p for n, p in named if not (o.muon_lr and in_block(n, p))]
    adam = torch.optim.AdamW(rest, lr=o.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    return [adam] + ([Muon(matrices, lr=o.muon_lr)] if matrices else [])


def schedule(step, o):
    """The factor on the learning rate at 0-based `step`: rises in the warm-up, then a cosine, or flat and a linear end.

    The first step has factor 0 under cosine, as in LLaVA's trainer.
    """
    warm = math.ceil(o.warmup * o.steps)
    if step < warm:
        return (step + (o.schedule == "wsd")) / warm
    if o.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, o.steps - warm)))
    return min(1.0, (o.steps - step) / max(1, o.cooldown * o.steps))


# ---- The loop


def shift_ratio(model):
    """{block: |E_L| / |FFN|} filled in by hooks as the model runs, and the hooks' removal: are the experts at work?"""
    ratios, handles = {}, []
    for n, block in enumerate(m for m in model.modules() if isinstance(m, Block)):
        if getattr(block, "expert", None) is not None:
            norms = {}
            handles.append(block.mlp.register_forward_hook(
                lambda m, i, out, norms=norms: norms.update(ffn=out.float().norm())))
            handles.append(block.expert.register_forward_hook(
                lambda m, i, out, norms=norms, n=n: ratios.update({n: (out.float().norm() / norms["ffn"]).item()})))
    return ratios, lambda: [h.remove() for h in handles]


def reply(model, prompt, o):
    """Ids of the model's greedy answer to the prompt of a batch of one.

    It is always ANSWER tokens long, whatever ends it: ranks whose arithmetic differs must still run the model as often.
    """
    cache = Cache(model.cfg.llm, 1, 0, o.device, getattr(torch, o.dtype))
    return generate(model, prompt.to(o.device), ANSWER, eos=-1, cache=cache)[0]


@torch.no_grad()
def evaluate(job, model, o, mesh):
    """What the log says now and then, as far as there is data for it.

    held_out      loss per token of the held-out data
    expert_share  |E_L| / |FFN| averaged over the blocks with an expert
    answer        to `Job.asked`
    """
    found = {}
    with torch.compiler.set_stance("force_eager") if o.compile else contextlib.nullcontext():  # many shapes, each met but rarely
        if job.held_out:
            ratios, remove = shift_ratio(model)
            summed = [job.loss(model, batch.to(mesh.device_type)).item() for batch in job.held_out]
            loss, tokens = sum_over_ranks([sum(summed), sum(map(job.tokens, job.held_out))], mesh)
            remove()
            found = {"held_out": loss / tokens} | ({"expert_share": sum(ratios.values()) / len(ratios)} if ratios else {})
        if job.shown:
            found["answer"] = job.shown(lambda prompt: reply(model, prompt, o))
    return found


@dataclass
class Step:
    """What all ranks know of a step."""
    loss: float       # per supervised token
    norm: float       # of the gradient
    positions: float  # text and image tokens, without padding
    operations: float  # multiplications and additions, see costs.step_flops
    skipped: float    # pictures that could not be read
    stop: int         # the signal that one of the ranks got before it, or 0


def fail(error):
    raise error


def train_step(job, model, opts, batches, step, o, mesh, skipped=0, stop=0):
    """One optimiser step over this rank's micro-batches -> `Step`.

    batches  of this rank, or in place of one the UserError that making it met
    skipped  pictures that this rank did without; stop: the signal it got, or 0

    The loss is the sum over supervised tokens divided by their number in the *global* batch, so that accumulation and
    the number of ranks leave the gradients alone. (LLaVA takes the mean of each micro-batch's mean.) What the ranks must
    agree on besides, an error or a signal, travels with that number.
    """
    faults = [b for b in batches if isinstance(b, UserError)]
    whole = [b for b in batches if not isinstance(b, UserError)]
    tokens, positions, work, skips, failed, *signals = sum_over_ranks(
        [sum(job.tokens(b) for b in whole), sum(b.lengths.sum().item() for b in whole),
         sum(step_flops(model.cfg, b, TRAINS[o.stage, o.tune] == TRAINS[2, "full"]) for b in whole) if o.stage else 0, skipped, len(faults),
         stop == signal.SIGTERM, stop == signal.SIGINT], mesh)
    if failed:
        raise_on_all_ranks(lambda: fail(faults[0]) if faults else None)
    if tokens == 0:
        raise DistributedUserError(f"step {step}: no supervised token in its batch of {describe_records(batches)}")
    summed = 0.0
    for batch in batches:
        loss = job.loss(model, batch.to(mesh.device_type)) / tokens
        (loss * dist.get_world_size()).backward()  # FSDP averages over ranks, the loss is a sum
        summed += loss.item()
    loss, = sum_over_ranks([summed], mesh)
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], o.clip or math.inf)
    norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise DistributedUserError(f"step {step}: loss {loss}, gradient norm {norm}, stopped before the update; "
                     f"{describe_records(batches, lambda: not math.isfinite(summed))}")
    for opt in opts:
        opt.step()
        opt.zero_grad()
    return Step(loss, norm, positions, work, skips, signal.SIGINT if signals[1] else signal.SIGTERM if signals[0] else 0)


@torch.no_grad()
def check_reads(job, model, mesh):
    """UserError if a frozen Llama does not know the language: the loss of answers, given questions, is near ln(vocab).

    That is what weights which were never loaded give, or someone else's. Stage 1 would then fit the projector to noise.
    """
    loss = sum(job.loss(model, b.to(mesh.device_type)).item() for b in job.text) / sum(job.tokens(b) for b in job.text)
    chance = math.log(model.cfg.llm.vocab)
    if not loss < 0.9 * chance:
        raise DistributedUserError(f"the Llama does not know the language of the data: its loss on the answers is {loss:.2f} per token, mere "
                     f"guessing gives {chance:.2f}. Look at --llm, or rehearse with --allow_random_llm")


def setup_model(model, o, mesh):
    """(the model frozen where the stage does not train it, and sharded; its optimisers)."""
    for module in model.modules():
        if isinstance(module, (Attention, VisionAttention, RMSNorm)):
            module.plain = o.kernels == "plain"
    freeze(model, TRAINS[o.stage, o.tune])
    if o.compile:
        compile_blocks(model)
    recompute(model, o.checkpointing)
    model = shard(model, mesh, getattr(torch, o.dtype))
    return model, optimisers(model, o)


def start_run(job, model, opts, states, log_path, o, mesh):
    """Go on from the newest of the saved `states`, or begin anew -> (the first step to take, pictures skipped before it, on rank 0)."""
    start = raise_on_all_ranks(lambda: first_step(o))
    if start:
        load_state(states, start, model, opts)
    elif dist.get_rank() == 0:
        shutil.rmtree(states, ignore_errors=True)
    if o.stage == 1 and not start and not o.allow_random_llm:
        check_reads(job, model, mesh)
    return start, cut_log(log_path, start).get("skipped_images", 0) if dist.get_rank() == 0 else 0


def train(job, o, mesh):
    """Run a job for o.steps optimiser steps and write its checkpoint."""
    out, rank = stage_folder(o), dist.get_rank()
    o.steps = o.steps or math.ceil(o.epochs * len(job.lengths) / o.batch_size)
    model, opts = setup_model(job.model, o, mesh)
    text = raise_on_all_ranks(lambda: plan(model, opts, job, o, TRAINS[o.stage, o.tune] == TRAINS[2, "full"]))
    if rank == 0:
        print(text, file=sys.stderr)

    states, log_path = os.path.join(out, "state"), os.path.join(out, "log.jsonl")
    start, skipped = start_run(job, model, opts, states, log_path, o, mesh)
    feed = TrainDataset(job, o)
    loader = make_loader(feed, start, o)
    first = began = time.perf_counter()
    saving = 0.0  # seconds, before this step
    with open(log_path, "a") if rank == 0 else contextlib.nullcontext() as log, \
            tqdm(range(start, o.steps), title(o), initial=start, total=o.steps, disable=rank > 0,
                 mininterval=1 if sys.stderr.isatty() else 15) as bar, Signals() as signals:
        for step in bar:
            asked = time.perf_counter()
            batches, bad = zip(*(next(loader) for _ in range(feed.accumulation)))
            waited = time.perf_counter() - asked
            for text in (text for texts in bad for text in texts):
                bar.write(f"skipped: {text}", file=sys.stderr)
            factor = schedule(step, o)
            for opt, lr in zip(opts, (o.lr, o.muon_lr)):
                opt.param_groups[0]["lr"] = lr * factor
            done = train_step(job, model, opts, batches, step, o, mesh, sum(map(len, bad)), signals.got)

            now = time.perf_counter()
            row = log_row(done, o.lr * factor, step, now - began, waited, (now - first) / (step + 1 - start), o)
            skipped += int(done.skipped)
            row |= ({"skipped_images": skipped} if skipped else {}) | ({"save_s": saving} if saving else {})
            if step + 1 == o.steps or (step + 1) % o.val_every == 0:
                row |= evaluate(job, model, o, mesh)
            if rank == 0:
                print(json.dumps(row), file=log, flush=True)
            if rank == 0 and (step % o.log_every == 0 or {"held_out", "answer"} & row.keys()):
                bar.write(log_line(row, o), file=sys.stderr)
            saving = 0.0
            if done.stop or (step + 1) % o.save_every == 0 and step + 1 < o.steps:
                saving = save_or_warn(states, step + 1, model, opts, o, done.stop, bar)
            began = time.perf_counter()
    if skipped and rank == 0:
        print(f"{skipped} times a picture could not be read and the next record took its place", file=sys.stderr)
    tensors = gather_tensors(model, job.keeps, getattr(torch, o.dtype))
    raise_on_all_ranks(lambda: job.finish(tensors) if rank == 0 else None)
    if rank == 0:
        shutil.rmtree(states, ignore_errors=True)
    dist.barrier()


def stage_0(o):
    """The toy's CLIP, or its Llama, from the toy world; see toy.py."""
    folder, out = os.path.join(o.out, "world"), stage_folder(o)
    tokenizer = train_tokenizer(words(folder), LLAMA.vocab)
    cuts = lambda n: [range(i, min(i + o.batch_size, n)) for i in range(0, n, o.batch_size)]
    if o.part == "clip":
        data, val = (Captions(folder, file, tokenizer) for file in ("captions.json", "validation_captions.json"))
        return Job(StandInCLIP(), np.ones(len(data), np.int64), data.batch, [val.batch(cut) for cut in cuts(len(val))],
                   contrast_loss, lambda b: len(b.pixels), lambda tensors: write_clip(tensors, out), None)
    layout = PromptFormat("v1", o.system, VISION.tokens, LLAMA.context)
    data, val = (Conversations(os.path.join(folder, file), folder, tokenizer, layout) for file in ("text.json", "validation_text.json"))
    batch = lambda rows, source=data: collate([source[i] for i in rows], [], (VISION.tokens, VISION.width), multiple=MULTIPLE)
    return Job(StandInLlama(), data.lengths, batch, [batch(cut, val) for cut in cuts(len(val))], language_loss,
               lambda b: b.trained, lambda tensors: write_llm(tensors, tokenizer, out), lambda i: data[i])


def vlm_loss(model, batch):
    """Next-token loss summed over the supervised positions, the only ones that have logits."""
    logits = model(batch.ids, batch.visual, batch.pool_id, batch.use_id, batch.turns, batch.at, picture=batch.picture, tag=batch.tag)
    return F.cross_entropy(logits.float(), batch.target, reduction="sum")


def sample_question(data, picture, blank, o):
    """(Job.shown, Job.asked) of the first record whose first question is about a picture that can be read; (None, "") if none is."""
    for i in range(len(data)):
        sample, turns = data[i], turns_of_record(data.record(i), f"record {i}")
        fits = (sample.labels[sample.use_id <= 0] != IGNORE).any()  # the context did not cut the first answer
        if sample.image is None or TAG not in turns[0][0] or not fits or o.skip_bad_images and not is_readable(sample.image):
            continue
        prompt = encode_prompt([], turns[0][0], data.tokenizer, data.layout, sample.image, sample.record)
        batch, eos = collate([prompt], [picture(sample)], blank), data.tokenizer.eos

        def shown(ids_of):
            ids = ids_of(batch)
            text = data.tokenizer.decode(ids[:ids.index(eos)] if eos in ids else ids)
            return text.split("\n")[0] if o.template == "plain" else text

        asked = turns[0][0].replace(TAG, "").strip() if o.template == "v1" else ""
        said = [sample.image, *(json.dumps(text, ensure_ascii=False) for text in (asked, turns[0][1]) if text)]
        return shown, f"{': '.join(said[:-1])} (truth {said[-1]})"
    return None, ""


def text_batches(data, blank, context, o):
    """The first conversations as text alone, in the form that Llamas which answer are trained on: see `check_reads`."""
    layout, samples = PromptFormat("v1", o.system, 0, context), []
    for i in range(min(32, len(data))):
        turns = [(q.replace(TAG, "").strip(), a) for q, a in turns_of_record(data.record(i), f"record {i}")]
        samples.append(encode(turns, data.tokenizer, layout, f"record {i}"))
    return [collate(samples[i:i + 8], [], blank, multiple=MULTIPLE) for i in range(0, len(samples), 8)]


def model_options(o):
    """The fields of VLMConfig that the options choose."""
    if o.method == "vlora":
        vlora = VLoRAConfig(o.vlora_sites, o.vlora_every, o.vlora_rank, o.vlora_embed, o.vlora_depth, o.vlora_heads)
        return {"visual_expert": "none", "language_expert": "none", "vlora": vlora}
    chosen = {k: getattr(o, k) for k in EXPERT_OPTIONS}
    if o.stage == 1:  # the language experts join in stage 2: nobody has asked anything yet
        chosen |= {"language_expert": "none", "guidance_after": None}
    return chosen


def stage_1_or_2(o):
    """Alignment (1) or instruction tuning (2) of a VLM on LLaVA's data."""
    options, dtype = model_options(o), getattr(torch, o.dtype)
    projector = projector_file(o.init) if o.stage == 2 else None  # LLaVA's own stage 1 leaves no more than that
    if projector and o.method == "vlora":
        raise UserError(f"--init {o.init}: a projector, which VLoRA has none of; stage 2 wants a checkpoint of stage 1")
    if o.stage == 1 or projector:
        parts = {"vision": o.vision, "llm": o.llm}
        folders = [resolve(name) for name in parts.values()]
        model, tokenizer, preprocess = assemble(*folders, options, dtype, o.seed, projector, cast=False)
        sources = {part: source_entry(name, stage_folder(o)) for part, name in parts.items() if o.stage == 1}
    else:
        point, sources = load(o.init, dtype, options, o.seed, cast=False), {}
        model, tokenizer, preprocess = point.model, point.tokenizer, point.preprocess
    preprocess = dataclasses.replace(preprocess, aspect=o.aspect)
    context = o.context or min(2048, model.cfg.llm.context)
    layout = PromptFormat(o.template, o.system, model.cfg.image_tokens, context, o.guidance_pool)
    if not os.path.isdir(o.images):
        raise UserError(f"--images {o.images}: there is no such folder")
    data = [Conversations(path, o.images, tokenizer, layout) for path in (o.data, o.val) if path]
    picture = picture_loader(data, model, preprocess, o)
    blank = (model.cfg.vision.tokens, model.cfg.vision.width) if o.cache_features else (3, preprocess.size, preprocess.size)

    skipped = []

    def batch(rows, source=data[0]):
        pairs = [with_picture(source, i, picture, skipped if o.skip_bad_images else None) for i in rows]
        return collate([s for s, _ in pairs], [p for _, p in pairs if p is not None], blank, multiple=MULTIPLE)

    held_out = split_across_ranks([range(i, min(i + o.micro_batch_size, 512, len(d)))
                      for d in data[1:] for i in range(0, min(len(d), 512), o.micro_batch_size)], lambda rows: batch(rows, data[1]))
    shown, asked = sample_question(data[-1], picture, blank, o)

    def finish(tensors):
        save(stage_folder(o), model.cfg, tensors, tokenizer, preprocess, o.system, o.stage,
                     sources, dataclasses.asdict(o))

    features = (model.cfg.vision.tokens, model.cfg.vision.width)
    text = text_batches(data[0], features, context, o) if o.stage == 1 and not o.allow_random_llm else []
    return Job(model, data[0].lengths, batch, held_out, vlm_loss, lambda b: b.trained, finish, lambda i: data[0][i], text, skipped,
               ("",) if o.stage == 2 else TRAINS[1, o.tune], data[0].pictured, shown, asked)


def run_stage(given, stage, mesh):
    """Train one stage and write its checkpoint."""
    o = raise_on_all_ranks(lambda: complete(given, stage))
    raise_on_all_ranks(lambda: (first_step(o), os.makedirs(stage_folder(o), exist_ok=True)))
    torch.manual_seed(o.seed)
    job = raise_on_all_ranks(lambda: stage_0(o) if stage == 0 else stage_1_or_2(o))
    train(job, o, mesh)


def toy_world(out, pictures):
    """Write the toy's world into OUT/world, unless it is there."""
    write_world(os.path.join(out, "world"), pictures, side=VISION.image_size, texts=pictures, test_pictures=min(250, pictures))


def run():
    given = parse(Options)
    o = Options(**given)
    began = time.perf_counter()
    mesh = start_world(device_of(o), o.replicate)
    raise_on_all_ranks(lambda: check_options(given))
    if o.preset == "toy":
        raise_on_all_ranks(lambda: dist.get_rank() or toy_world(o.out, o.pictures))
    stand_ins = o.preset == "toy" and o.stage in (None, 1) and not given.keys() >= {"vision", "llm"}
    for stage in [0] * stand_ins + ([1, 2] if o.stage is None else [o.stage]):
        runs = unfinished(given, stage)
        if len(runs) > 1 and mesh.device_type == "cpu" and "WORLD_SIZE" not in os.environ and torch.get_num_threads() > 1:
            run_parts_in_parallel(run_stage, runs, stage)
        else:
            for one in runs:
                run_stage(one, stage, mesh)
    if o.stage is None and dist.get_rank() == 0:
        score(os.path.join(o.out, "stage2"), os.path.join(o.out, "world"), o.out, began)


if __name__ == "__main__":
    main_distributed(run)
