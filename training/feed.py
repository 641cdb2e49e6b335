"""TODO"""
import functools

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cli import UserError
from data import MULTIPLE, open_image, pixels
from training.distributed import all_gather, ignore_signals


def padding_share(lengths, batches, multiple=MULTIPLE):
    """The share of padding among the positions of batches, [[index, ...], ...] of samples with lengths int64[n], see `collate`."""
    places = sum(len(b) * -(-int(lengths[b].max()) // multiple) * multiple for b in batches)
    return 1 - sum(int(lengths[b].sum()) for b in batches) / places


class BatchSampler:
    """Which samples make which step: a function of seed and step alone, the same for any number of ranks.

    The epochs' permutations follow one another and are cut into steps of `batch_size`. With `lengths` (any measure,
    one number a sample), samples of like length share a step, so that less is padded: within runs of GROUP steps the
    permutation is sorted by length, then the steps of the whole epoch are mixed. With `pictured` bool[n], samples with a
    picture and without are grouped apart, as their lengths cannot be compared; only what is left of both shares a step.

    LLaVA's --group_by_modality_length sorts within a step alone, to deal out like sums to the ranks: its batches hold long
    and short samples. Sorting more of them makes batches of like lengths, so that ranks wait no longer for each other.
    """
    GROUP = 32

    def __init__(self, n, seed, batch_size, lengths=None, pictured=None):
        self.n, self.seed, self.batch_size, self.lengths = n, seed, batch_size, lengths
        self.pictured = np.zeros(n, bool) if pictured is None else pictured
        self.epoch = functools.lru_cache(maxsize=2)(self.epoch)

    def epoch(self, epoch):
        """int64[n], the order of the samples in an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.n)
        if self.lengths is None:
            return order
        first = min(-epoch * self.n % self.batch_size, self.n)  # these complete the last step of the epoch before
        last = first + (self.n - first) // self.batch_size * self.batch_size
        body, size = order[first:last], self.batch_size
        kinds = [body[self.pictured[body] == kind] for kind in (True, False)]
        whole = [kind[:len(kind) // size * size] for kind in kinds]
        left = np.concatenate([kind[len(part):] for kind, part in zip(kinds, whole)])  # a step of both, or nothing
        runs = [part[i:i + self.GROUP * size] for part in (*whole, left) for i in range(0, len(part), self.GROUP * size)]
        runs = [r[np.lexsort((self.lengths[r], self.pictured[r]))] for r in runs]
        steps = np.concatenate(runs).reshape(-1, size) if runs else order[:0].reshape(0, size)
        return np.concatenate([order[:first], rng.permutation(steps).ravel(), order[last:]])

    def step(self, step):
        """list[int] of the samples of optimiser step `step`."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self.epoch(place // self.n)[place % self.n]) for place in places]


# ---- Data order: f(seed, epoch, step) and nothing else


class TrainDataset(Dataset):
    """The micro-batches of this rank, in order: item k is micro-batch k % accumulation of step k // accumulation.

    An item is (the batch or a UserError, what is wrong with the pictures that were skipped in it).
    A step's samples are the same whatever the world: micro-batch j of the step goes to rank j % world.
    """

    def __init__(self, job, o):
        self.job, self.o = job, o
        self.order = BatchSampler(len(job.lengths), o.seed, o.batch_size, job.lengths if o.group_by_length else None, job.pictured)
        self.accumulation = o.batch_size // (o.micro_batch_size * dist.get_world_size())

    def __len__(self):
        return self.o.steps * self.accumulation

    def __getitem__(self, k):
        step, turn = divmod(k, self.accumulation)
        rows = self.order.step(step)
        first = (turn * dist.get_world_size() + dist.get_rank()) * self.o.micro_batch_size
        self.job.skipped.clear()
        try:
            return self.job.batch(rows[first:first + self.o.micro_batch_size]), list(self.job.skipped)
        except UserError as error:  # handed over like a batch: raised in a worker, it would arrive inside a traceback
            return error, []


def describe_records(batches, guilty=lambda: False):
    """The records of this step, by rank; those of the guilty ranks alone if there are any."""
    ranks = all_gather((guilty(), [r for b in batches for r in b.records]))
    some = any(bad for bad, _ in ranks)
    return "; ".join(f"rank {n}, records {', '.join(records)}" for n, (bad, records) in enumerate(ranks) if bad or not some)


def make_loader(feed, start, o):
    """An iterator over the micro-batches of a `Feed` from step `start` on, prepared by --workers processes."""
    return iter(DataLoader(feed, batch_size=None, sampler=range(start * feed.accumulation, len(feed)), num_workers=o.workers,
                           multiprocessing_context="fork" if o.workers else None, worker_init_fn=ignore_signals))


def is_readable(path):
    try:
        open_image(path, path)
        return True
    except UserError:
        return False


def picture_loader(data, model, preprocess, o):
    """A function from a sample to its picture: pixels float[3, S, S] or, with --cache_features, features float[N, C]."""
    read = lambda path, name: pixels(open_image(path, name), preprocess)
    if not o.cache_features:
        return lambda sample: read(sample.image, f"{sample.record}: {sample.image}")
    paths = sorted({p for d in data for p in d.pictures()})
    dtype, found = getattr(torch, o.dtype), {}
    model.vision.to(o.device, dtype)
    with torch.no_grad():
        for i in tqdm(range(0, len(paths), 64), "features", mininterval=5):
            some = paths[i:i + 64]
            if o.skip_bad_images:
                some = [p for p in some if is_readable(p)]
            if some:
                made = model.features(torch.stack([read(p, p) for p in some]).to(o.device, dtype)).cpu()
                found |= zip(some, made)
    model.vision.to("cpu")
    return lambda sample: found[sample.image] if sample.image in found else read(sample.image, f"{sample.record}: {sample.image}")


def with_picture(data, i, picture, skipped):
    """(sample i, its picture or None). With a list `skipped`, a sample whose picture cannot be read is replaced.

    By the next of the file, and so on, the first after the last: a rule that knows nothing of the run, so that a resumed
    one meets the same. What was wrong is added to the list.
    """
    for j in range(len(data)):
        sample = data[(i + j) % len(data)]
        try:
            return sample, None if sample.image is None else picture(sample)
        except UserError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
    raise UserError("--skip_bad_images: not one picture of the data can be read")
