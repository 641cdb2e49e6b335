"""How many threads of a CPU to use, by a measurement: another process may need the cores.

OpenMP's threads wait for each other after every product. If the core of one of them is taken, all
others wait for it, and a token can take ten times as long as with one thread (docs/speed.md).
"""
import functools
import time

import torch

PRODUCTS = 8  # in a measurement, of 32 x 1024 and 1024 x 1024: a few milliseconds
SLOWER = 1.5  # times one thread's time: then so many threads wait for each other


@functools.cache
def all_threads():
    """The number of threads that torch or the user chose: asked once, before it is changed."""
    return torch.get_num_threads()


def time_products(threads, limit=float("inf")):
    """Seconds of PRODUCTS products with so many threads; it stops when they exceed the limit."""
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
    """Set torch's number of threads: all; if they are slower than one, a half, a quarter, ... 1.

    Takes about 10 ms, so that a chat can call it before each answer.
    """
    threads = all_threads()
    if threads > 1:
        limit = SLOWER * time_products(1)
        while threads > 1 and time_products(threads, limit) > limit:
            threads //= 2
        torch.set_num_threads(threads)
