"""TODO"""
import json
import os

import torch.distributed as dist

from training.costs import peak_rate
from training.options import title
from training.plan import GB, peak


def cut_log(path, step):
    """Drop the lines of log.jsonl from `step` on: a resumed run writes them again. Returns the last one kept, or {}."""
    lines = open(path).readlines() if os.path.exists(path) else []
    kept = lines[:step] if step else []  # a line a step, the last one perhaps cut off by a kill
    with open(path + ".tmp", "w") as f:
        f.writelines(kept)
    os.replace(path + ".tmp", path)
    return json.loads(kept[-1]) if kept else {}


def log_row(done, lr, step, seconds, waited, average, o):
    """A step's line in log.jsonl. `seconds` it took, of which it `waited` for data; `average`: seconds a step so far."""
    rate = peak_rate(o)
    return {"step": step, "loss": done.loss, "lr": lr, "grad_norm": done.norm,
            "tokens_per_s": done.positions / seconds,
            "mfu": done.operations / seconds / (rate * dist.get_world_size()) if rate and o.stage else None,
            "data_wait": waited / seconds, "peak_gb": peak(o.device) / GB,
            "eta_s": average * (o.steps - step - 1)}


def log_line(row, o):
    """One aligned line of the log."""
    mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}"
    left = f"{row['eta_s'] // 3600:.0f}:{row['eta_s'] % 3600 // 60:02.0f}:{row['eta_s'] % 60:02.0f}"
    text = (f"{title(o)}  step {row['step'] + 1:5d}/{o.steps}  loss {row['loss']:7.4f}  lr {row['lr']:.2e}  "
            f"grad {row['grad_norm']:7.3f}  {row['tokens_per_s']:7.0f} tok/s  MFU {mfu}  data {row['data_wait']:4.0%}  "
            f"{row['peak_gb']:.1f} GB  {left} left")
    extra = [("held_out", "held out"), ("expert_share", "|E_L|/|FFN|")]
    text += "".join(f"  {label} {row[key]:.4f}" for key, label in extra if key in row)
    return text + (f"  says {json.dumps(row['answer'], ensure_ascii=False)}" if "answer" in row else "")
