"""How many threads of a CPU to use, by a measurement: another process may need the cores.

OpenMP's threads wait for each other after every product. If the core of one of them is taken, all
others wait for it, and a token can take twenty times as long as with one thread (docs/speed.md).
"""
import math
import time

import torch

PRODUCTS = 8  # in a measurement, of 32 x 1024 and 1024 x 1024: a few milliseconds
most = {}     # "threads": as torch or the user chose them


def seconds(threads, limit=math.inf):
    """The time of PRODUCTS products with so many threads; of fewer, if they exceed the limit."""
    x, w = torch.ones(32, 1024), torch.ones(1024, 1024)
    torch.set_num_threads(threads)
    x @ w  # starts the threads
    began = time.perf_counter()
    for _ in range(PRODUCTS):
        x @ w
        if time.perf_counter() - began > limit:
            break
    return time.perf_counter() - began


def choose_threads():
    """Set torch's number of threads: 1, 2, 4, ... or all, as long as more of them are faster.

    Takes about 10 ms, so that it can be called before each answer.
    """
    threads, all_threads = 1, most.setdefault("threads", torch.get_num_threads())
    best = seconds(threads) if all_threads > 1 else 0.0
    while threads < all_threads:
        more = min(2 * threads, all_threads)
        spent = seconds(more, best)
        if spent >= best:
            break
        threads, best = more, spent
    torch.set_num_threads(threads)
