"""Decoding on a GPU: one step, captured once as a CUDA graph and replayed for each token.

A step of a 7B model launches about a thousand small kernels; launched one by one, they take longer
than reading the weights. A graph launches them at once, but always with the same tensors. So keys,
values and the turn's generated weights stand in tensors that stay where they are, and a mask hides
the slots that are not used yet: another prompt length needs no other graph. The idea of a static
cache is that of gpt-fast (https://github.com/pytorch-labs/gpt-fast).
"""
import weakref

import torch

from model import Batch, Cache

SLOTS = 1024  # a static cache has a multiple of so many


class StaticCache(Cache):
    """A Cache whose tensors never move. Its step reads all slots, behind a mask."""

    def __init__(self, model, rows, slots):
        weight = model.llm.embed_tokens.weight
        super().__init__(model.cfg.llm, rows, weight.device, weight.dtype)
        self.reserve(slots)
        self.end = slots
        self.new = torch.ones_like(self.lengths)  # 1: the row's token is real

    def advance(self, T, real=None):
        positions = self.lengths[:, None].clone()
        mask = self.causal_mask(positions)
        for layer in self.layers:
            layer.start, layer.end, layer.positions, layer.mask = None, self.end, positions, mask
        self.lengths += self.new
        return positions


def capture(run, device):
    """A function that does what run() does, by a CUDA graph; elsewhere `run` itself."""
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # libraries choose their kernels
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def move_out(cache):
    """Give a cache tensors of its own in place of the static ones."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        if layer.weights is not None:
            layer.weights = tuple(w.clone() for w in layer.weights)
    cache.lengths = cache.lengths.clone()


class CapturedStep:
    """Decoding steps of a VLM with static tensors; takes the place of `model.step`.

    It is captured the first time, when the number of rows changes, and when a cache needs more
    slots than there are. The cache that it decodes for holds the static tensors themselves, so that
    its next turn is written into them. Another cache takes them over; the one before keeps copies.
    They stay for as long as the model: a batch that follows has its prompts' cache beside them.
    A replay calls no Python, so no hooks. The next step overwrites the logits that it returns.
    """

    def __init__(self, model):
        self.model, self.cache, self.owner = model, None, lambda: None

    @torch.no_grad()
    def __call__(self, batch, cache):
        if self.cache is None or cache.lengths is not self.cache.lengths:  # new, or after a prompt
            self.load(cache)
        self.ids.copy_(batch.ids)
        self.cache.new.copy_(1 if batch.lengths is None else batch.lengths)
        self.replay()
        cache.end += 1
        same = cache.start is not None and batch.lengths is None
        cache.start = cache.start + 1 if same else None
        return self.logits

    def load(self, cache):
        """Move what a cache holds to the static tensors; capture a step first if none fits."""
        rows, slots = len(cache.lengths), cache.layers[0].keys.shape[2]
        if self.owner() not in (None, cache):
            move_out(self.owner())
        fits = self.cache is not None and len(self.cache.lengths) == rows
        if not fits or self.cache.layers[0].keys.shape[2] < slots:
            self.cache = self.replay = self.logits = None  # frees what they hold
            self.make_step(cache, rows, -(-slots // SLOTS) * SLOTS)
        for mine, theirs in zip(self.cache.layers, cache.layers):
            if theirs.keys is not mine.keys:
                mine.keys[:, :, :slots] = theirs.keys
                mine.values[:, :, :slots] = theirs.values
                theirs.keys, theirs.values = mine.keys, mine.values
            if mine.weights is not None:
                for w, new in zip(mine.weights, theirs.weights):
                    w.copy_(new)
                theirs.weights = mine.weights
        self.cache.lengths.copy_(cache.lengths)
        cache.lengths, self.owner = self.cache.lengths, weakref.ref(cache)

    def make_step(self, cache, rows, slots):
        """Make static tensors like those of `cache`, and capture the step that uses them.

        `self.cache` is set last: Ctrl-C may come at any time.
        """
        static = StaticCache(self.model, rows, slots)
        for mine, theirs in zip(static.layers, cache.layers):
            if theirs.weights is not None:
                mine.weights = tuple(torch.zeros_like(w) for w in theirs.weights)
        device = cache.lengths.device
        ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)

        def run():
            self.logits = self.model(Batch(ids, None), static)

        self.replay, self.ids = capture(run, device), ids
        self.cache = static
