"""The papers' tables in miniature: `python -m experiments.ablate --table 2`.

A row is a few options of train.py, see tables.py. All rows are trained on the toy and start from
the same stand-ins (stage 0). Stages 1 and 2 then run with several seeds, each by train.py in a
process of its own, --jobs of them at a time. Rows with the same projector share a seed's stage 1.
Finished stages stay in OUT and serve all tables; the same command continues a stopped run.

Each table ends with our scores beside the paper's, the cost of each row, OUT/table_N.json and
OUT/table_N.png. Next: report.py, which makes them.
"""
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

from benchmarks.toy import Answerer, exact, load_questions
from cli import check_numbers, main, MOST, parse, UserError
from experiments.embeddings import plot_embeddings
from experiments.processes import Jobs, sources_digest
from experiments.report import draw, markdown, table_rows
from experiments.tables import (LLAVA, NO_EXPERTS, row_folder, row_name, scores_file, splits_of,
                                steps_of, TABLES)
from formats.json_files import read_json, read_json_list
from toy.files import code_digest, write_atomically, write_dialect, write_unseen
from toy.stage0 import make_world
from toy.stand_ins import VISION
from training.options import finished, folder_of, PARTS, PRESETS, VLORA_PRESETS
from training.state import saved_steps
from weights import load

# Files by which one base differs from another
BASE = ("world/captions.json", "world/instruct.json", "world/dialect.json", "world/heldout.json",
        "world/grounds.json", "world/numbers.json",
        "stage0/clip/model.safetensors", "stage0/llm/model.safetensors")

# The code that decides what a row is, without what surrounds a run
CODE = ("hypernet.py", "projector.py", "model.py", "data.py", "train.py", "vlora.py",
        "baselines.py", "weights.py", "training/muon.py")


@dataclass
class Options:
    """Train the rows of a table of the papers on the toy, with several seeds, and compare them."""
    table: Literal[(*TABLES, "embeddings")] = "2"  # 2 to fig4: the paper's; vlora, vlora3, ..:
                               # VLoRA's Tables 2, 3, ..; the others are ours
    base: str = "out/toy"      # run of train.py with world and stage 0 of all rows; made if missing
    out: str = "out/ablate"    # folder of the rows, the tables and the plots
    seeds: int = 5             # of stages 1 and 2: new weights and the order of the data
    steps: int = 150           # of stage 2
    align: int = 600           # steps of stage 1
    pictures: int = 16000      # of the base's world
    jobs: int = os.cpu_count() or 1  # rows trained at a time, which share the processor's cores
    allow_random_llm: bool = False  # as in train.py, for a quick try
    validate: bool = False     # score only the validation pictures, to choose the number of steps
                               # and of seeds
    score: str | None = None   # only score the row in this folder (internal)

    def __post_init__(self):
        check_numbers(self, {"steps": (2, MOST, "at least 2")})
        if self.validate and self.table == "embeddings":
            raise UserError("--validate: --table embeddings has no scores; leave it out")


# ---- One stage of one row


def stage_1_options(options):
    """Those of a row's options that matter in stage 1: rows in which they are equal share it."""
    if options.get("method") == "vlora":
        return {k: v for k, v in options.items() if k.startswith(("method", "vlora"))}
    if options.get("visual_expert") == "none":
        return {"visual_expert": "none"}
    names = ("visual_expert", "weight_source", "expert_embed", "expert_rank")
    return {k: v for k, v in options.items() if k in names}


def stage_1_folder(o, row, seed):
    name = row_name(stage_1_options(row.options))
    return os.path.join(o.out, f"aligned_{o.align}", name, f"seed{seed}")


def tuned_folder(o):
    return os.path.join(o.out, f"tuned_{o.align}_{TABLES[o.table].tuned}")


def data_file(o, data, steps):
    """A file with the conversations of so many steps, so that features are made only for those."""
    return os.path.join(o.base, "world", f"{data}_{steps}.json")


def resume(folder):
    """--resume if the stage in this folder has saved a state."""
    return ["--resume"] * bool(saved_steps(os.path.join(folder, "state")))


def run_stage(jobs, o, stage, folder, options):
    """Run a stage of train.py in `folder`, or continue it, unless it is finished."""
    if finished(folder, stage):
        return
    os.makedirs(folder, exist_ok=True)
    world = os.path.join(o.base, "world")
    val = "validation_captions" if stage == 1 else "validation"
    files = {"vision": folder_of(o.base, 0, "clip"), "llm": folder_of(o.base, 0, "llm"),
             "images": os.path.join(world, "images"), "val": os.path.join(world, f"{val}.json")}
    words = [word for k, v in (files | options).items() for word in (f"--{k}", v)]
    words += resume(folder_of(folder, stage)) + ["--allow_random_llm"] * o.allow_random_llm
    jobs.run(folder, "train", "--stage", stage, "--out", folder, *words)
    if not finished(folder, stage):
        raise UserError(f"{folder}: stopped before stage {stage} was finished")


def align(jobs, o, row, seed):
    """Stage 1 of a row."""
    options = {"data": data_file(o, "captions", o.align), "steps": o.align, "seed": seed}
    run_stage(jobs, o, 1, stage_1_folder(o, row, seed), options | stage_1_options(row.options))


def tune(jobs, o, row, seed):
    """Stage 2 of a row, and its scores."""
    folder, table = row_folder(o, row, seed), TABLES[o.table]
    start = (tuned_folder(o), 2) if table.tuned else (stage_1_folder(o, row, seed), 1)
    steps = steps_of(o, row)
    options = {"init": folder_of(*start), "data": data_file(o, table.data, steps),
               "steps": steps, "seed": seed}
    run_stage(jobs, o, 2, folder, options | row.options)
    if not os.path.exists(scores_file(o, folder)):
        words = ("--score", folder, "--table", o.table, "--base", o.base)
        jobs.run(folder, "experiments.ablate", *words, *["--validate"] * o.validate)


def tune_llava(jobs, o):
    """Both stages of the LLaVA that all rows of a table start from, if its `tuned` says so."""
    steps = TABLES[o.table].tuned
    align(jobs, o, LLAVA, 0)
    options = {"init": folder_of(stage_1_folder(o, LLAVA, 0), 1), "steps": steps,
               "data": data_file(o, "instruct", steps)}
    run_stage(jobs, o, 2, tuned_folder(o), NO_EXPERTS | options)


def score(o):
    """Answer the table's questions with the row in the folder --score; write its scores."""
    answer = Answerer(load(os.path.join(o.score, "stage2")), max_new_tokens=16)
    scores = {}
    for split in splits_of(o):
        questions = load_questions(os.path.join(o.base, "world"), split)
        questions = [q for q in questions if q.family != "caption"]
        answers = answer(questions, split)
        scores[split] = exact(questions, answers) | {
            "right": [[q.family, os.path.basename(q.image), int(q.answer == a)]
                      for q, a in zip(questions, answers)]}
    write_atomically(scores_file(o, o.score), {"splits": scores})


# ---- The base of all rows


def prepare(jobs, o):
    """Make what the base lacks: the world, the stand-ins, more test splits, the rows' data."""
    folder, table = os.path.join(o.base, "world"), TABLES[o.table]
    if os.path.exists(os.path.join(folder, "world.json")):
        world = read_json(os.path.join(folder, "world.json"))
        if (world["pictures"], world["code"]) != (o.pictures, code_digest()):
            raise UserError(f"--base {o.base}: its world has {world['pictures']} pictures, maybe "
                            f"drawn by other code; expected {o.pictures} (--pictures) by this code")
    make_world(o.base, o.pictures)
    for part in PARTS:
        if not finished(o.base, 0, part):
            jobs.run(o.base, "train", "--stage", 0, "--part", part, "--out", o.base,
                     "--pictures", o.pictures, *resume(folder_of(o.base, 0, part)))
    write_unseen(folder, side=VISION.image_size, pictures=min(100, o.pictures))
    write_dialect(folder)
    needed = {(table.data, steps_of(o, row)) for row in table.rows}
    for data, steps in (("captions", o.align), ("instruct", table.tuned), *needed):
        records = read_json_list(os.path.join(folder, f"{data}.json"))
        records = records[:steps * PRESETS["toy"][2]["batch_size"]]
        if records:
            write_atomically(data_file(o, data, steps), records)


@contextlib.contextmanager
def locked(path, wait=False):
    """Hold a lock file within this context. Yields False if another process has it, or waits."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    with open(path, "w") as f:
        os.set_inheritable(f.fileno(), True)  # see Jobs
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def check_base(o):
    """Note in OUT/base.json what the rows start from, the toy's preset and the code; UserError if
    that differs from an earlier note."""
    path, digests = os.path.join(o.out, "base.json"), {}
    for name in BASE:
        with open(os.path.join(o.base, name), "rb") as f:
            digests[name] = hashlib.file_digest(f, "sha256").hexdigest()
    presets = repr((PRESETS["toy"], VLORA_PRESETS["toy"]))
    digests["preset"] = hashlib.sha256(presets.encode()).hexdigest()
    digests["code"] = sources_digest(*CODE)
    if not os.path.exists(path):
        return write_atomically(path, digests)
    noted = read_json(path)
    if noted != digests:
        changed = ", ".join(name for name in digests if noted.get(name) != digests[name])
        raise UserError(f"the rows in {o.out} were made with another {changed} than there is now: "
                        f"name another --out")


# ---- All rows


def train_in_pool(pool, jobs, o):
    """Train all rows, seed by seed; a line on standard error for each stage that is finished."""
    table = TABLES[o.table]
    rows = {row_folder(o, row, 0): row for row in table.rows}.values()
    work = [(row, seed) for seed in range(o.seeds) for row in rows]
    if table.tuned:
        tune_llava(jobs, o)
    jobs.threads = max(1, jobs.threads // o.jobs)
    if not table.tuned:
        shared = {stage_1_folder(o, *item): item for item in work}.values()  # a row for each
        run_all(pool, align, jobs, o, shared)
    run_all(pool, tune, jobs, o, work)


def run_all(pool, stage, jobs, o, work):
    """`align` or `tune` for each (row, seed) of `work`."""
    began = time.perf_counter()
    futures = {pool.submit(stage, jobs, o, *item): item for item in work}
    for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
        future.result()
        row, seed = futures[future]
        print(f"stage {1 if stage is align else 2}: {n}/{len(futures)}  {row.name}, seed {seed}  "
              f"{time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)


def train_rows(o):
    """Prepare the base and train all rows; if one fails or we are stopped, the others end too."""
    jobs = Jobs()
    with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
        try:
            with locked(os.path.join(o.base, "base.lock"), wait=True):  # others wait for the base
                prepare(jobs, o)
            check_base(o)
            train_in_pool(pool, jobs, o)
        except BaseException:
            jobs.stop()
            pool.shutdown(cancel_futures=True)
            raise


def make_table(o):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # like Ctrl-C, it ends the jobs
    table, began = TABLES[o.table], time.perf_counter()
    with locked(os.path.join(o.out, "lock")) as ours:
        if not ours:
            raise UserError(f"another ablate.py works in {o.out}: "
                            "let it end, or name another --out")
        train_rows(o)
    rows, seconds = table_rows(o), time.perf_counter() - began
    path = os.path.join(o.out, f"table_{o.table}" + "_validation" * o.validate)
    write_atomically(f"{path}.json", {
        "title": table.title, "options": dataclasses.asdict(o), "seconds": seconds, "rows": rows})
    print(f"{table.title}; {o.seeds} seeds, {o.steps} steps, {seconds:.0f} s\n\n"
          f"{markdown(table, rows)}", flush=True)
    draw(table, rows).savefig(f"{path}.png", dpi=100)


def run():
    o = Options(**parse(Options))
    if o.score:
        score(o)
    elif o.table == "embeddings":
        plot_embeddings(o)
    else:
        make_table(o)


if __name__ == "__main__":
    main(run)
