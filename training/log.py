"""What a run writes: log.jsonl, a line a step, and the lines on the screen; and a figure for it."""
import contextlib
import json
import os
import sys

import torch
import torch.distributed as dist
from tqdm import tqdm

from model import Block
from training.costs import peak_rate
from training.options import stage_folder, title
from training.plan import GB, peak


def cut_log(path, step):
    """Drop the lines of log.jsonl after `step` steps: a resumed run writes them again.

    Returns the last line kept, or {}. A line is a step; lines that a kill or a crash damaged are
    dropped, and a warning says that steps are missing.
    """
    rows = []
    if os.path.exists(path):
        with open(path, "rb") as f:
            for line in f:
                with contextlib.suppress(ValueError):
                    rows.append(json.loads(line))
    kept = [row for row in rows if row["step"] <= step]
    if len(kept) < step:
        print(f"warning: {path} lacks {step - len(kept)} of the first {step} steps: it is damaged",
              file=sys.stderr)
    with open(path + ".tmp", "w") as f:
        f.writelines(f"{json.dumps(row)}\n" for row in kept)
    os.replace(path + ".tmp", path)
    return kept[-1] if kept else {}


def log_row(result, step, lr, times, o):
    """The line of a step in log.jsonl; steps count from 1.

    times  (seconds of the step, of which it waited for data, seconds a step on average so far)
    """
    seconds, waited, average = times
    rate = peak_rate(o)
    mfu = result.operations / seconds / (rate * dist.get_world_size()) if rate and o.stage else None
    return {"step": step, "loss": result.loss, "lr": lr, "grad_norm": result.norm,
            "tokens_per_s": result.positions / seconds, "mfu": mfu, "data_wait": waited / seconds,
            "peak_gb": peak(o.device) / GB, "eta_s": average * (o.steps - step)}


def log_line(row, o):
    """One aligned line for the screen, at most 100 columns without an answer."""
    parts = [f"{title(o)}  {row['step']:>{len(str(o.steps))}}/{o.steps}", f"loss {row['loss']:.4f}",
             f"lr {row['lr']:.1e}", f"grad {row['grad_norm']:.2f}",
             f"{row['tokens_per_s']:.0f} tok/s"]
    if row["mfu"] is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if row["data_wait"] > 0.05:
        parts.append(f"waiting for data {row['data_wait']:.0%}")
    parts.append(f"{row['peak_gb']:.1f} GB")
    if "val_loss" in row:
        parts.append(f"val loss {row['val_loss']:.4f}")
    if "expert_share" in row:
        parts.append(f"|E_L|/|FFN| {row['expert_share']:.4f}")
    line = "  ".join(parts)
    if "answer" in row:
        answer, truth = (json.dumps(row[key], ensure_ascii=False) for key in ("answer", "truth"))
        line += f"\n    answer {answer} (truth {truth})"
    return line


def open_log(o):
    """log.jsonl of a stage's folder, opened to add lines on rank 0; None on the other ranks."""
    if dist.get_rank() > 0:
        return contextlib.nullcontext()
    return open(os.path.join(stage_folder(o), "log.jsonl"), "a")


def progress_bar(start, o, place):
    """The bar over the steps to take, on line `place` of the terminal; in a file, a line every 15
    s.
    """
    terminal = sys.stderr.isatty()  # elsewhere nothing can move to the line of another bar
    return tqdm(range(start, o.steps), title(o), initial=start, total=o.steps,
                position=place if terminal else 0, disable=dist.get_rank() > 0,
                mininterval=1 if terminal else 15)


def write_skipped(messages, bar):
    """Write messages about this rank's pictures that could not be read."""
    for message in messages:
        bar.write(f"skipped: {message}", file=sys.stderr)


def write_row(row, log, bar, o):
    """Write a step's row to log.jsonl, and to the screen every --log_every steps and if it has
    news.
    """
    if dist.get_rank() == 0:
        print(json.dumps(row), file=log, flush=True)
        if (row["step"] - 1) % o.log_every == 0 or "val_loss" in row or "answer" in row:
            bar.write(log_line(row, o), file=sys.stderr)


@contextlib.contextmanager
def output_norms(parts):
    """Yields {name: [float32[B, T], ...]}: the norm of each vector that a part puts out, one entry
    for each time it runs.

    parts  {name: module}
    """
    norms, handles = {name: [] for name in parts}, []
    for name, part in parts.items():
        def note(module, inputs, out, found=norms[name]):
            found.append(out.float().norm(dim=-1).cpu())

        handles.append(part.register_forward_hook(note))
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def expert_shares(model, batches):
    """Yields {block: |E_L| / |FFN|}, filled at the end: do experts contribute?

    batches  of the passes to come: their tokens count, padding does not
    """
    blocks = [m for m in model.modules() if isinstance(m, Block) and m.expert]
    parts = [{n: getattr(block, name) for n, block in enumerate(blocks)}
             for name in ("mlp", "expert")]
    shares = {}
    with output_norms(parts[0]) as static, output_norms(parts[1]) as shift:
        yield shares
    for n in static:
        sizes = [torch.cat([x[torch.arange(x.shape[1]) < b.lengths[:, None]]
                            for x, b in zip(norms[n], batches)]).norm()
                 for norms in (shift, static)]
        shares[n] = (sizes[0] / sizes[1]).item()
