"""The papers' tables in miniature: `python ablate.py --table 2` trains the rows of a table on the toy and compares them.

A row is a few options of train.py. All rows start from one pair of stand-ins; stages 1 and 2 are then run with several seeds, each
by train.py in a process of its own, --jobs of them at a time. Rows with the same projector share a seed's stage 1. What is done stays
in OUT and serves all tables: a call that was stopped, repeated, goes on where it was.

Each table ends with our scores beside the paper's, what each row costs, OUT/table_N.json and OUT/table_N.png.
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from baselines import GUIDED
from benchmarks.toy import Answerer, exact, load_questions
from cli import main, parse, UserError
from data import collate, encode_prompt
from model import Cache, stream
from toy.files import write_atomically, write_dialect, write_unseen
from toy.stand_ins import VISION
from toy.world import FAMILIES
from train import freeze, toy_world, TRAINS
from training.costs import forward_flops, generated_weights, token_flops
from training.options import EXPERT_OPTIONS, finished, folder_of, PARTS, PRESETS
from training.state import saved_steps
from weights import load


BASE = ("world/captions.json", "world/instruct.json", "world/dialect.json", "world/heldout.json", "world/grounds.json", "world/numbers.json",
        "stage0/clip/model.safetensors", "stage0/llm/model.safetensors")  # what tells one base from another
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # Student's t of so many seeds, two-sided 95 %


@dataclass(frozen=True)
class Row:
    """A row of a table: its name and figures in the paper, and the options of train.py that make it."""
    name: str
    options: dict = field(default_factory=dict)
    paper: tuple = ()


@dataclass(frozen=True)
class Table:
    """`reference` counts the row that the others are compared with; `data` is what stage 2 learns, of the toy world's files.

    tuned  so many steps LLaVA is tuned for first, once: all rows and seeds then start from it, not from a stage 1 of their own
    """
    title: str
    rows: tuple
    reference: int = -1
    columns: tuple = ("GQA", "SQA-I", "VQA-T", "POPE", "MME")  # of the paper
    data: str = "instruct"
    splits: tuple = ("heldout", "combination", "grounds", "numbers")
    axis: str | None = None  # a figure: what its rows' names count
    tuned: int = 0
PLAIN = {"visual_expert": "none", "language_expert": "none"}
LLAVA = Row("LLaVA", PLAIN)
ALONE = {"visual_expert": "none", "tune": "peft"}  # Table 6: the language side alone, beside a frozen Llama
VLORA = ("MMB", "MME", "SQA", "Hallu", "MMMU", "CCB")


def vlora(**options):
    return {"method": "vlora", **options}


TABLES = {
    "2": Table("where the visual expert sits", (
        Row("w/o E_V", {"visual_expert": "none"}, (62.5, 70.4, 58.1, 85.9, 1486.0)),
        Row("E_V2", {"visual_expert": "2"}, (62.0, 69.8, 58.0, 86.4, 1442.6)),
        Row("E_V1 & E_V2", {"visual_expert": "both"}, (60.1, 69.5, 54.4, 86.1, 1449.8)),
        Row("E_V1", {}, (62.7, 70.4, 58.5, 86.3, 1481.2)))),
    "3": Table("which blocks have a language expert", (
        Row("w/o E_L", {"language_expert": "none"}, (61.9, 70.7, 57.5, 85.6, 1492.0)),
        Row("anterior half", {"language_expert": "anterior"}, (62.5, 69.4, 58.5, 85.9, 1481.4)),
        Row("all", {"language_expert": "all"}, (62.7, 69.5, 58.6, 86.0, 1460.3)),
        Row("posterior half", {}, (62.7, 70.4, 58.5, 86.3, 1481.2)))),
    "5": Table("where the experts' weights come from", (
        Row("Adapter", {"weight_source": "static"}, (57.7, 69.4, 53.5, 83.5, 1371.8)),
        Row("Hypernetwork+MLP", {"weight_source": "mlp"}, (60.2, 68.8, 52.9, 84.6, 1460.7)),
        Row("Hypernetwork+Adapter", {"weight_source": "latent"}, (62.1, 69.9, 57.0, 85.4, 1494.4)),
        Row("ours", {}, (62.7, 70.4, 58.5, 86.3, 1481.2)))),
    "6": Table("tuning with a frozen Llama", (
        Row("LoRA", ALONE | {"weight_source": "lora"}, (63.0, 68.4, 58.2, 86.4, 1496.9)),
        Row("Adapter", ALONE | {"weight_source": "static"}, (42.6, 61.2, 41.0, 81.2, 874.4)),
        Row("Hypernetwork+Adapter", ALONE | {"weight_source": "latent"}, (49.0, 63.6, 48.3, 84.6, 1140.0)),
        Row("Language Expert", ALONE, (62.5, 70.4, 58.1, 85.9, 1486.0)))),
    "experts": Table("one expert, both, or as many static parameters", (
        LLAVA, Row("E_V", {"language_expert": "none"}), Row("E_L", {"visual_expert": "none"}), Row("both", {}),
        Row("both static, of equal parameters", {"weight_source": "static", "expert_rank": 185})), reference=3, columns=()),
    "vlora": Table("pictures as tokens or as weights", (
        Row("LLaVA", PLAIN, (64.6, 1470.0, 67.7, 27.4, 33.8, 25.3)),  # aligned, as VLoRA is, on CapsFusion
        Row("VLoRA", vlora(), (63.4, 1311.3, 66.4, 26.4, 36.0, 28.6))), reference=0, columns=VLORA),
    "dialect": Table("a map that the question names", (
        Row("Adapter", ALONE | {"weight_source": "static"}),
        Row("Adapter, equal parameters", ALONE | {"weight_source": "static", "expert_rank": 150}),
        Row("LoRA in the same blocks, equal parameters", ALONE | {"weight_source": "lora", "expert_rank": 24}),
        Row("LoRA in all blocks, equal parameters", ALONE | {"weight_source": "lora", "expert_rank": 12, "language_expert": "all"}),
        Row("generated", ALONE)), columns=(), data="dialect", splits=("heldout_dialect",), tuned=150),
    "fig3": Table("the block after which guidance is taken", tuple(
        Row(str(k), {"guidance_after": k} if k != 2 else {}) for k in (1, 2, 3)), reference=1, columns=(), axis="blocks before guidance"),
    "fig4": Table("the width of the embedding (rank 16), the rank (embedding 16)", tuple(
        [Row(f"E={e}", {"expert_embed": e} if e != 16 else {}) for e in (4, 8, 16, 32, 64)]
        + [Row(f"R={r}", {"expert_rank": r} if r != 16 else {}) for r in (2, 4, 8, 16, 32)]), reference=2, columns=(),
        axis="E: width of the embedding, R: of the bottleneck"),
    "vlora3": Table("VLoRA: which weights a picture changes", (
        Row("qkvom", vlora(), (63.4, 1311.3, 66.4, 26.4, 36.0, 28.6)),
        Row("qkvm", vlora(vlora_sites="qkvm"), (59.6, 1227.5, 64.6, 23.4, 34.7, 24.9)),
        Row("qkv", vlora(vlora_sites="qkv"), (59.4, 1267.9, 65.8, 23.2, 33.9, 28.8)),
        Row("qko", vlora(vlora_sites="qko"), (57.2, 1240.5, 64.0, 23.4, 34.6, 24.9)),
        Row("qk", vlora(vlora_sites="qk"), (53.3, 1169.8, 65.0, 23.5, 36.7, 21.8))), reference=0, columns=VLORA),
    "vlora4": Table("VLoRA: the rank (of 4096 there, of 192 here)", (
        Row("16 / 4", vlora(vlora_rank=4), (59.4, 1212.7, 67.1, 22.9, 39.3, 24.5)),
        Row("32 / 8", vlora(vlora_rank=8), (60.7, 1235.6, 67.2, 23.5, 36.0, 25.3)),
        Row("64 / 16", vlora(), (63.4, 1311.3, 66.4, 26.4, 36.0, 28.6)),
        Row("128 / 32", vlora(vlora_rank=32), (61.0, 1228.4, 68.0, 23.8, 33.4, 26.7))), reference=2, columns=VLORA),
    "vlora5": Table("VLoRA: the generators' blocks (there / here)", (
        Row("4 / 1", vlora(vlora_depth=1), (60.7, 1289.3, 63.9, 24.4, 32.0, 26.7)),
        Row("8 / 2", vlora(), (63.4, 1311.3, 66.4, 26.4, 36.0, 28.6)),
        Row("12 / 3", vlora(vlora_depth=3), (61.3, 1289.3, 67.1, 25.5, 34.7, 30.2))), reference=1, columns=VLORA),
}


@dataclass
class Options:
    """Train the rows of a table of the papers on the toy, with several seeds, and compare them."""
    table: Literal[(*TABLES, "embeddings")] = "2"  # 2, 3, 5, 6, fig3, fig4; experts, dialect, embeddings; VLoRA's 2 to 5: vlora, vlora3, ...
    base: str = "out/toy"      # run of train.py whose world and stage 0 all rows share; what is missing is made
    out: str = "out/ablate"    # folder of the rows, the tables and the plots
    seeds: int = 3             # of stages 1 and 2: new weights and the order of the data
    steps: int = 150           # of stage 2
    align: int = 300           # steps of stage 1
    pictures: int = 16000      # of the base's world
    jobs: int = os.cpu_count() or 1  # rows trained at a time, on the processor's cores in equal shares
    allow_random_llm: bool = False  # as in train.py, to rehearse
    score: str | None = None   # score this row's folder and end: how the program calls itself

    def __post_init__(self):
        for name, least in {"seeds": 1, "steps": 2, "align": 1, "pictures": 1, "jobs": 1}.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name} {getattr(self, name)}: expected at least {least}")


# ---- Training the rows


def name_of(options):
    return ",".join(f"{k}={v}" for k, v in sorted(options.items())) or "ours"


def aligned(options):
    """Those of a row's options that stage 1 knows: rows that agree in them share it."""
    if options.get("method") == "vlora":
        return {k: v for k, v in options.items() if k.startswith(("method", "vlora"))}
    if options.get("visual_expert") == "none":
        return {"visual_expert": "none"}
    return {k: v for k, v in options.items() if k in ("visual_expert", "weight_source", "expert_embed", "expert_rank")}


class Jobs:
    """Programs that run in processes of their own, with `threads` threads each; `stop` ends those that do."""

    def __init__(self):
        self.threads, self.running, self.lock = os.cpu_count() or 1, set(), threading.Lock()
        self.stopped = False

    def run(self, folder, program, *words):
        """Run a program of this repository with its output in folder/output.txt; UserError with its last line if it fails."""
        path = os.path.join(folder, "output.txt")
        with open(path, "a") as output, self.lock:
            if self.stopped:
                raise UserError("stopped")
            process = subprocess.Popen([sys.executable, "-m", program, *map(str, words)], stdout=output, stderr=output,
                                       env={**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONPATH": ROOT})
            self.running.add(process)
        process.wait()
        self.running.discard(process)
        if process.returncode and not self.stopped:
            with open(path) as output:
                last = (output.read().splitlines() or [""])[-1]
            raise UserError(f"{program} failed with status {process.returncode}, see {path}: {last}")

    def stop(self):
        with self.lock:
            self.stopped = True
            for process in list(self.running):
                process.terminate()  # train.py saves its state then


def stage(jobs, o, n, folder, options):
    """Run stage n of train.py into `folder`, from its saved state if there is one; nothing if it is done."""
    if finished(folder, n):
        return
    os.makedirs(folder, exist_ok=True)
    for name in ("world", "stage0"):
        if not os.path.lexists(os.path.join(folder, name)):
            os.symlink(os.path.relpath(os.path.realpath(os.path.join(o.base, name)), os.path.realpath(folder)), os.path.join(folder, name))
    begun = saved_steps(os.path.join(folder, f"stage{n}", "state"))
    words = [word for k, v in options.items() for word in (f"--{k}", v)]
    words += ["--resume"] * bool(begun) + ["--allow_random_llm"] * o.allow_random_llm
    jobs.run(folder, "train", "--stage", n, "--out", folder, "--pictures", o.pictures, *words)
    if not finished(folder, n):
        raise UserError(f"{folder}: stopped before stage {n} was done")


def stage_1_folder(o, row, seed):
    return os.path.join(o.out, f"aligned_{o.align}", name_of(aligned(row.options)), f"seed{seed}")


def row_folder(o, row, seed):
    return os.path.join(o.out, f"{TABLES[o.table].data}_{o.align}_{o.steps}", name_of(row.options), f"seed{seed}")


def tuned_folder(o):
    return os.path.join(o.out, f"tuned_{o.align}_{TABLES[o.table].tuned}")


def start_of(o, row, seed):
    """The checkpoint that stage 2 of a row begins with."""
    if TABLES[o.table].tuned:
        return os.path.join(tuned_folder(o), "stage2")
    return os.path.join(stage_1_folder(o, row, seed), "stage1")


def align(jobs, o, row, seed):
    options = {"data": data_file(o, "captions", o.align), "steps": o.align, "seed": seed}
    stage(jobs, o, 1, stage_1_folder(o, row, seed), options | aligned(row.options))


def tune(jobs, o, row, seed):
    """Stage 2 of a row, and its scores."""
    folder, table = row_folder(o, row, seed), TABLES[o.table]
    options = {"init": start_of(o, row, seed), "data": data_file(o, table.data, o.steps), "steps": o.steps, "seed": seed}
    stage(jobs, o, 2, folder, options | row.options)
    if not os.path.exists(os.path.join(folder, "scores.json")):
        jobs.run(folder, "experiments.ablate", "--score", folder, "--table", o.table, "--base", o.base)


def data_file(o, data, steps):
    """The file with as many conversations as so many steps see, so that features are made of no more pictures."""
    return os.path.join(o.base, "world", f"{data}_{steps}.json")


def prepare(jobs, o):
    """The base's world and stand-ins, the further splits, and what the rows learn."""
    folder = os.path.join(o.base, "world")
    if os.path.exists(os.path.join(folder, "world.json")):
        with open(os.path.join(folder, "world.json")) as f:
            had = json.load(f)["pictures"]
        if had != o.pictures:
            raise UserError(f"--pictures {o.pictures}: the world of {o.base} has {had}; say that, or another --base")
    toy_world(o.base, o.pictures)
    for part in PARTS:
        if not finished(o.base, 0, part):
            begun = saved_steps(os.path.join(folder_of(o.base, 0, part), "state"))
            jobs.run(o.base, "train", "--stage", 0, "--part", part, "--out", o.base, "--pictures", o.pictures,
                     *["--resume"] * bool(begun))
    write_unseen(folder, side=VISION.image_size, pictures=min(100, o.pictures))
    write_dialect(folder)
    table = TABLES[o.table]
    for data, steps in (("captions", o.align), (table.data, o.steps), ("instruct", table.tuned)):
        with open(os.path.join(folder, f"{data}.json")) as f:
            records = json.load(f)[:steps * PRESETS["toy"][2]["batch_size"]]
        if records:
            write_atomically(data_file(o, data, steps), records)


@contextlib.contextmanager
def locked(path, wait=False):
    """While no other ablate.py holds this lock, a file; if one does, True after waiting for it, or False at once."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def same_base(o):
    """Note in OUT what its rows start from; UserError if it holds rows that started from something else."""
    path = os.path.join(o.out, "base.json")
    found = {}
    for name in BASE:
        with open(os.path.join(o.base, name), "rb") as f:
            found[name] = hashlib.file_digest(f, "sha256").hexdigest()
    if not os.path.exists(path):
        return write_atomically(path, found)
    with open(path) as f:
        had = json.load(f)
    if had != found:
        changed = ", ".join(name for name in BASE if had.get(name) != found[name])
        raise UserError(f"the rows in {o.out} started from another {changed} than {o.base} has now: name another --out")


def train_rows(o):
    """All rows with all seeds, those of a seed before those of the next."""
    jobs, table = Jobs(), TABLES[o.table]
    rows = {name_of(row.options): row for row in table.rows}.values()
    with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
        try:
            with locked(os.path.join(o.base, "base.lock"), wait=True):  # one makes what is missing, others wait for it
                prepare(jobs, o)
            same_base(o)
            began, work = time.perf_counter(), [(row, seed) for seed in range(o.seeds) for row in rows]
            if table.tuned:
                align(jobs, o, LLAVA, 0)
                stage(jobs, o, 2, tuned_folder(o), PLAIN | {"init": os.path.join(stage_1_folder(o, LLAVA, 0), "stage1"), "steps": table.tuned,
                                                            "data": data_file(o, "instruct", table.tuned)})
            jobs.threads = max(1, jobs.threads // o.jobs)
            if not table.tuned:
                firsts = {stage_1_folder(o, *item): item for item in work}.values()  # one of those that share it
                for _ in pool.map(lambda item: align(jobs, o, *item), firsts):
                    pass
            futures = {pool.submit(tune, jobs, o, *item): item for item in work}
            for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
                future.result()
                row, seed = futures[future]
                print(f"{n}/{len(work)}  {row.name}, seed {seed}  {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
        except BaseException:
            jobs.stop()
            pool.shutdown(cancel_futures=True)
            raise


# ---- Scoring a row


def score(o):
    """Answer every question of the table's splits with the row in the folder --score; writes its scores.json."""
    answer = Answerer(load(os.path.join(o.score, "stage2")), max_new_tokens=16)
    found = {}
    for split in TABLES[o.table].splits:
        questions = [q for q in load_questions(os.path.join(o.base, "world"), split) if q.family != "caption"]
        answers = answer(questions, split)
        found[split] = exact(questions, answers) | {
            "right": [[q.family, os.path.basename(q.image), int(q.answer == a)] for q, a in zip(questions, answers)]}
    write_atomically(os.path.join(o.score, "scores.json"), {"splits": found})


def milliseconds(work):
    began = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - began)


@torch.no_grad()
def costs(o, rounds=60, steps=16):
    """What each row costs, list[dict]: parameters that stage 2 trains, generated numbers, and to answer a question about a picture
    the MFLOPs of its prompt (beside CLIP's) and of a token after it, and in ms, on one thread and in fp32, the same two.

    Rows take turns, and the least of `rounds` times stands: what else runs on a machine only adds to it, and to all alike.
    """
    found, answers = [], []
    for row in TABLES[o.table].rows:
        point = load(os.path.join(row_folder(o, row, 0), "stage2"), torch.float32)
        model, layout = point.model.eval(), point.prompt_format()
        freeze(model, TRAINS[2, row.options.get("tune", "full")])
        sample = encode_prompt([], "What colour is the thing at the top left?", point.tokenizer, layout, "picture")
        batch = collate([sample], [torch.zeros(model.cfg.vision.tokens, model.cfg.vision.width)], None)
        count = forward_flops(model.cfg, len(sample.ids) - model.cfg.image_tokens, at=1)
        found.append({"trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "generated": generated_weights(model.cfg),
                      "tokens": len(sample.ids), "prompt_mflops": (sum(count.values()) - count["vision"]) / 1e6,
                      "token_mflops": token_flops(model.cfg, len(sample.ids) + 1) / 1e6})

        def answer(tokens, model=model, batch=batch):
            cache = Cache(model.cfg.llm, 1, batch.ids.shape[1] + steps, "cpu", torch.float32)
            collections.deque(stream(model, batch, tokens, -1, cache=cache), maxlen=0)

        answers.append(answer)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = np.array([[[milliseconds(lambda: answer(tokens)) for tokens in (1, steps)] for answer in answers] for _ in range(rounds)])
    torch.set_num_threads(threads)
    for row, (first, whole) in zip(found, times.min(0)):
        row |= {"prefill_ms": first, "decode_ms": (whole - first) / (steps - 1)}
    return found


# ---- Comparing rows


def mean_and_spread(values):
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def difference(scores, others, split):
    """How much better `scores` are than `others`, both a list by seed, in points of the mean over families.

    returns  (difference, half of its 95 % interval over questions, the same over seeds)

    Over questions: they are the same in both, so what counts is each picture's difference, averaged over seeds; pictures are
    independent, questions about one are not. Over seeds: Student's t of the seeds' differences, the same data order in both.
    """
    asked = scores[0]["splits"][split]["right"]
    if any([q[:2] for q in run["splits"][split]["right"]] != [q[:2] for q in asked] for run in scores + others):
        raise UserError(f"{split}: rows were asked different questions, so they cannot be compared: name another --out")
    right = lambda runs: np.array([[hit for _, _, hit in run["splits"][split]["right"]] for run in runs], float)
    gain = right(scores) - right(others)                                             # (seeds, questions)
    size = collections.Counter(family for family, _, _ in asked)
    share = np.array([100 / len(size) / size[family] for family, _, _ in asked])      # of a question in the mean over families
    by_picture = collections.defaultdict(float)
    for (_, image, _), value in zip(asked, gain.mean(0) * share):
        by_picture[image] += value
    values = np.array([*by_picture.values()])
    by_seed = (gain * share).sum(1)
    n = len(by_seed)
    over_seeds = T_95.get(n, 2.3) * by_seed.std(ddof=1) / n ** 0.5 if n > 1 else None
    return by_seed.mean(), 1.96 * (len(values) ** 0.5) * values.std(ddof=1), over_seeds


def scores_of(folder):
    with open(os.path.join(folder, "scores.json")) as f:
        return json.load(f)


def logged(folders):
    """What stage 2 took: the mean seconds of a step with the seed that was disturbed least, and the peak of its memory in GB."""
    logs = []
    for folder in folders:
        with open(os.path.join(folder, "stage2", "log.jsonl")) as f:
            logs.append([json.loads(line) for line in f])
    return {"step_s": min(log[-2]["eta_s"] for log in logs),  # one step was left then
            "peak_gb": max(line["peak_gb"] for log in logs for line in log)}


def table_rows(o):
    """What each row of the table is, costs and scores, list[dict]."""
    table = TABLES[o.table]
    folders = [[row_folder(o, row, seed) for seed in range(o.seeds)] for row in table.rows]
    runs = [[scores_of(folder) for folder in of_row] for of_row in folders]
    found = []
    for row, seeds, of_row, cost in zip(table.rows, runs, folders, costs(o)):
        result = {"name": row.name, "options": row.options, "paper": row.paper, "costs": cost | logged(of_row)}
        first = table.splits[0]
        result["families"] = {f: mean_and_spread([100 * run["splits"][first]["families"][f] for run in seeds])
                              for f in seeds[0]["splits"][first]["families"]}
        result["means"] = {s: mean_and_spread([100 * run["splits"][s]["mean"] for run in seeds]) for s in table.splits}
        result["difference"] = {s: difference(seeds, runs[table.reference], s) for s in table.splits}
        found.append(result)
    return found


def markdown(table, rows):
    """The scores and the costs of a table's rows as two Markdown tables."""
    pair = lambda value: f"{value[0]:.1f}" + (f" ± {value[1]:.1f}" if value[1] is not None else "")
    families, splits = list(rows[0]["families"]), list(table.splits)
    head = ["row", *(f"paper: {c}" if i == 0 else c for i, c in enumerate(table.columns))]
    head += [*(families if len(families) > 1 else []), f"**{splits[0]}**", *splits[1:],
             f"against {table.rows[table.reference].name} (95 % over questions{', over seeds' if rows[0]['difference'][splits[0]][2] is not None else ''})"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["name"], *(map(str, row["paper"] or [""] * len(table.columns)))]
        cells += [f"{row['families'][f][0]:.1f}" for f in families] if len(families) > 1 else []
        cells += [f"**{pair(row['means'][splits[0]])}**", *(pair(row["means"][s]) for s in splits[1:])]
        gain = row["difference"][splits[0]]
        cells.append("" if row is rows[table.reference] else f"{gain[0]:+.1f} ({', '.join(f'± {x:.1f}' for x in gain[1:] if x is not None)})")
        lines.append("| " + " | ".join(cells) + " |")
    head = ["row", "trained", "generated", "MFLOPs a prompt", "a further token", "training step, s", "peak, GB", "prompt, ms", "a further token, ms"]
    lines += ["", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        c = row["costs"]
        lines.append(f"| {row['name']} | {c['trained']:,} | {c['generated']:,} | {c['prompt_mflops']:.0f} | {c['token_mflops']:.2f} | "
                     f"{c['step_s']:.2f} | {c['peak_gb']:.2f} | {c['prefill_ms']:.1f} | {c['decode_ms']:.2f} |")
    return "\n".join(lines)


def plots():
    """matplotlib's pyplot, without a display; UserError if it is not installed: only plots need it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the plots need matplotlib: pip install -r requirements-dev.txt")
    import matplotlib
    matplotlib.use("agg")
    from matplotlib import pyplot
    return pyplot


def plot(table, rows, path):
    """Scores with the spread of the seeds: a group of bars per family, or for a figure a curve of the mean."""
    pyplot = plots()
    figure, axes = pyplot.subplots(figsize=(11, 4))
    split = table.splits[0]
    if table.axis:
        curves = collections.defaultdict(list)
        for row in rows:
            letter, _, value = row["name"].rpartition("=")
            curves[letter].append((float(value), *row["means"][split]))
        for letter, points in curves.items():
            x, y, spread = zip(*sorted(points))
            axes.errorbar(x, y, None if None in spread else spread, marker="o", capsize=3, label=letter or None)
        axes.set_xlabel(table.axis)
        if len(curves) > 1:
            axes.set_xscale("log", base=2)
            axes.legend()
    else:
        groups = [*rows[0]["families"], "mean"]
        for i, row in enumerate(rows):
            values = [*row["families"].values(), row["means"][split]]
            x = np.arange(len(groups)) + (i - (len(rows) - 1) / 2) * 0.8 / len(rows)
            y, spread = zip(*values)
            axes.bar(x, y, 0.8 / len(rows), yerr=None if None in spread else spread, capsize=2, label=row["name"])
        axes.set_xticks(range(len(groups)), groups)
        axes.legend(fontsize=8)
    axes.set_ylabel(f"exact match on {split}, %")
    axes.set_title(table.title)
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


# ---- What the embeddings of guidance know


@torch.no_grad()
def embedded(point, questions):
    """e float[questions, E], the embedding of each question's guidance at the first block with an expert (Eq. 3).

    Raises UserError if the checkpoint has no language experts that guidance changes.
    """
    cfg = point.model.cfg
    if cfg.weight_source not in GUIDED or not cfg.expert_blocks():
        raise UserError(f"--table embeddings: no language expert of this model has embeddings (weight_source {cfg.weight_source}, "
                        f"language_expert {cfg.language_expert}); name the --base of another run")
    answer, found = Answerer(point, max_new_tokens=1), []
    block = point.model.llm.layers[cfg.expert_blocks()[0]]
    handle = block.expert.encoder.register_forward_hook(lambda module, inputs, e: found.append(e[:, 0].float()))
    answer(questions, "embeddings")
    handle.remove()
    return torch.cat(found)


def probe(e, families, images):
    """How often a linear map of e, fitted to the questions about every second picture, tells the family of the others'.

    returns  (share, half of its 95 % interval): pictures are independent, questions about one are not
    """
    names, pictures = sorted(set(families)), sorted(set(images))
    odd = torch.tensor([pictures.index(image) % 2 == 1 for image in images])
    label = torch.tensor([names.index(family) for family in families])
    x = torch.cat([e, torch.ones(len(e), 1)], 1).double()
    target = torch.nn.functional.one_hot(label, len(names)).double()
    weight = torch.linalg.solve(x[~odd].mT @ x[~odd] + 1e-3 * torch.eye(x.shape[1]), x[~odd].mT @ target[~odd])
    right = ((x[odd] @ weight).argmax(1) == label[odd]).double()
    share, shift = right.mean().item(), collections.defaultdict(float)
    for image, hit in zip([i for i, o in zip(images, odd) if o], (right - share).tolist()):
        shift[image] += hit / len(right)
    return share, 1.96 * (len(shift) ** 0.5) * statistics.stdev(shift.values())


def embeddings(o):
    """The embeddings of held-out questions in two principal components, before and after stage 2, and what a probe reads in them."""
    pyplot = plots()
    after = load(os.path.join(o.base, "stage2"))
    experts = {name: after.config["training"][name] for name in EXPERT_OPTIONS}
    before = load(os.path.join(o.base, "stage1"), next(after.model.parameters()).dtype, experts | {"vlora": None})
    questions = [q for q in load_questions(os.path.join(o.base, "world"), "heldout") if q.family != "caption"]
    families, images = [q.family for q in questions], [q.image for q in questions]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 5))
    for panel, name, point in zip(axes, ("before", "after"), (before, after)):
        e = embedded(point, questions)
        accuracy, half = probe(e, families, images)
        _, _, directions = torch.linalg.svd(e - e.mean(0), full_matrices=False)
        places = (e - e.mean(0)) @ directions[:2].mT
        for family in FAMILIES:
            some = places[[f == family for f in families]]
            panel.scatter(*some.mT, s=6, label=family)
        panel.set_title(f"{name} stage 2: a linear probe reads the family in {accuracy:.1%}")
        print(f"{name}: {100 * accuracy:.1f} % (95 %: ± {100 * half:.1f}) of the families read from e (chance {100 / len(FAMILIES):.1f} %)")
    axes[1].legend(markerscale=2, fontsize=8)
    figure.tight_layout()
    os.makedirs(o.out, exist_ok=True)
    figure.savefig(os.path.join(o.out, "embeddings.png"), dpi=100)


def run():
    o = Options(**parse(Options))
    if o.score or o.table == "embeddings":
        (score if o.score else embeddings)(o)
        return
    plots()  # to miss it before hours of training rather than after
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C does, by way of Jobs.stop
    table, began = TABLES[o.table], time.perf_counter()
    with locked(os.path.join(o.out, "lock")) as ours:
        if not ours:
            raise UserError(f"another ablate.py works in {o.out}: let it end, or name another --out")
        train_rows(o)
    rows = table_rows(o)
    write_atomically(os.path.join(o.out, f"table_{o.table}.json"), {
        "title": table.title, "options": dataclasses.asdict(o), "seconds": time.perf_counter() - began, "rows": rows})
    print(f"{table.title}; {o.seeds} seeds, {o.steps} steps, {time.perf_counter() - began:.0f} s\n\n{markdown(table, rows)}", flush=True)
    plot(table, rows, os.path.join(o.out, f"table_{o.table}.png"))


if __name__ == "__main__":
    main(run)
