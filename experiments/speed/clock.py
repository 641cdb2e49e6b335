"""Two sides in turns, peaks of memory in processes of their own, floors, and the rows of a result.
"""
import functools
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from training.plan import peak

COPIED = {"cpu": 2**29, "cuda": 2**31}  # bytes: far more than any cache holds
MULTIPLIED = {"cpu": 2048, "cuda": 8192}  # width of square matrices


# ---- Time


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run, device):
    """Seconds of one call."""
    synchronise(device)
    began = time.perf_counter()
    run()
    synchronise(device)
    return time.perf_counter() - began


def alternate(sides, rounds, device="cpu"):
    """{name: seconds of each round} of {name: function}; one round more, the first, is not counted.

    The sides take turns, and the order is reversed in every second round.
    """
    spent = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name in list(sides)[::1 if turn % 2 else -1]:
            spent[name].append(seconds(sides[name], device))
    return {name: times[1:] for name, times in spent.items()}


# ---- Memory


def in_own_process(function, *arguments):
    """function(*arguments) in a fresh process, which then ends."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def resident():
    """Resident bytes of this process, mapped files included. Needs Linux."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmRSS"))


def reset_peak(device):
    """From here on, `training.plan.peak` counts anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # resets VmHWM to VmRSS


def peak_of(prepare, device):
    """Bytes at the peak of the function that prepare() returns, beyond what is there before.

    So what was prepared counts, but not Python, torch and other imports.
    """
    before = torch.cuda.memory_allocated() if device == "cuda" else resident()
    run = prepare()
    reset_peak(device)
    run()
    synchronise(device)
    return peak(device) - before


# ---- Floors


@functools.cache
def copy_bandwidth(device):
    """Bytes per second, read and written, of copying a tensor; the best of nine."""
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)}, 9, device)["copy"]
    return 2 * source.nbytes / min(times)


@functools.cache
def matmul_rate(device, dtype):
    """FLOP/s of a product of two square matrices; the best of nine."""
    n = MULTIPLIED[device]
    a = torch.randn(n, n, device=device, dtype=dtype)
    times = alternate({"product": lambda: a @ a}, 9, device)["product"]
    return 2 * n ** 3 / min(times)


# ---- Rows


def spread(times, scale):
    """{"median", "min", "max"} of seconds, times `scale`."""
    return {"median": scale * statistics.median(times), "min": scale * min(times),
            "max": scale * max(times)}


def row(what, case, spent, *, unit="ms", each=1, floor=None, aim=None, is_cost=False, peaks={},
        **more):
    """A row of the result, dict; it is printed, too.

    spent    {name: seconds of each round}; ours first, then what it is compared with, if anything
    each     so many units of work in a round
    floor    seconds that one of them must take at least
    is_cost  the ratio is ours / theirs; else theirs / ours, how many times as fast we are
    peaks    {name: bytes}
    """
    scale = {"ms": 1e3, "s": 1}[unit.split()[0]] / each
    sides = [{"name": name, **spread(times, scale), "peak_bytes": peaks.get(name)}
             for name, times in spent.items()]
    ours, theirs = sides if len(sides) == 2 else (*sides, None)
    found = {"what": what, "case": case, "unit": unit, "ours": ours, "theirs": theirs,
             "ratio": None, "is_cost": is_cost, "peak_ratio": None, "floor": None, "share": None,
             "aim": aim, **more}
    if theirs:
        speed = theirs["median"] / ours["median"]
        found["ratio"] = 1 / speed if is_cost else speed
        if peaks:
            found["peak_ratio"] = ours["peak_bytes"] / theirs["peak_bytes"]
    if floor:
        found["floor"] = floor * scale * each
        found["share"] = found["floor"] / ours["median"]
    print(line(found), flush=True)
    return found


def line(found):
    """A row in words."""
    def number(x):
        return f"{x:.3g}" if x < 1000 else f"{x:.0f}"

    def side(values):
        median, least, most = (number(values[name]) for name in ("median", "min", "max"))
        return f"{values['name']} {median} ({least}-{most})"

    ours, theirs = found["ours"], found["theirs"]
    words = [f"{found['what']}, {found['case']} [{found['unit']}]:", side(ours)]
    if theirs:
        sense = "the time" if found["is_cost"] else "as fast"
        words += [f"against {side(theirs)}:", f"{found['ratio']:.3g} x {sense}"]
    if found["aim"]:
        words.append(f"(aim: {found['aim']})")
    if found["floor"]:
        words.append(f"| floor {number(found['floor'])}, share {found['share']:.0%}")
    if found["peak_ratio"]:
        words.append(f"| peak {ours['peak_bytes'] / 1e9:.3g} GB against "
                     f"{theirs['peak_bytes'] / 1e9:.3g}: {found['peak_ratio']:.2f} x")
    return " ".join(words)
