"""From a data set to the micro-batches of each rank.

The order of the data is f(seed, epoch, step) and nothing else. A resumed run, on any number of
ranks, sees the same samples in the same steps.
"""
import bisect
import functools
import json
import os
import pickle
import shutil
import sys
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cli import UserError
from data import (IGNORE, IMAGE, MULTIPLE, PromptFormat, TAG, collate, encode, encode_conversation,
                  encode_prompt, open_image, pixels, turns_of_record)
from formats.folders import first_line
from formats.tokenizer import Tokenizer
from model import Batch, generate
from training.distributed import all_gather, ignore_signals


def padded(length):
    """The length of a sequence in a batch, see `collate`."""
    return -(-length // MULTIPLE) * MULTIPLE


class BatchSampler:
    """Which samples make which step: a function of seed and step only, the same for any number of
    ranks.

    The permutations of the epochs follow one another and are cut into steps of `batch_size`.

    has_image  bool[n]: as with LLaVA's --group_by_modality_length, the samples of a step all have a
               picture, or none has; otherwise they are random. What is left of both comes last
    lengths    float[n], any measure: also put samples of similar length into one step. Runs of
               GROUP steps are sorted by length; then the steps of the epoch are shuffled
    """
    GROUP = 32

    def __init__(self, n, seed, batch_size, lengths=None, has_image=None):
        self.n, self.seed, self.batch_size = n, seed, batch_size
        self.lengths, self.has_image = lengths, has_image
        self.epoch = functools.lru_cache(maxsize=2)(self.epoch)

    def epoch(self, epoch):
        """int64[n], the order of the samples in an epoch."""
        rng, size = np.random.default_rng([self.seed, epoch]), self.batch_size
        order = rng.permutation(self.n)
        if self.lengths is None and self.has_image is None:
            return order
        first = min(-epoch * self.n % size, self.n)  # the rest of a step of the last epoch
        head, body = order[:first], order[first:]
        has_image = np.zeros(self.n, bool) if self.has_image is None else self.has_image
        kinds = [body[has_image[body] == kind] for kind in (True, False)]
        whole = [kind[:len(kind) // size * size] for kind in kinds]
        left = [kind[len(part):] for kind, part in zip(kinds, whole)]
        if self.lengths is not None:
            run = self.GROUP * size
            runs = [part[i:i + run] for part in whole for i in range(0, len(part), run)]
            whole = [r[np.argsort(self.lengths[r], kind="stable")] for r in runs] or whole
        steps = rng.permutation(np.concatenate(whole).reshape(-1, size))
        return np.concatenate([head, steps.ravel(), *left])

    def step(self, step):
        """list[int] of the samples of optimiser step `step`."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self.epoch(place // self.n)[place % self.n]) for place in places]


def deal(sizes, parts):
    """Cut samples into `parts` micro-batches of similar work, the longest samples first.

    sizes    int64[n], n >= parts: positions of each sample
    returns  [int64[m], ...]: indices of samples

    The samples are sorted by size. Of all ways to cut them into runs, this is one whose largest
    padded run, samples x longest, is smallest. So there is little padding, ranks that work at the
    same time take similar times, and memory is at its least. Short samples share a micro-batch with
    more others than long ones do. The square in attention's cost is left out: with 7B and 2,048
    positions it is 4 % of the work.
    """
    order = np.argsort(-sizes, kind="stable")
    sizes = sizes[order]

    def cut(bound):
        """Where runs of at most `bound` padded positions end; the last one is n if they suffice."""
        ends = [0]
        for more in reversed(range(parts)):  # so many runs follow, and each needs a sample
            ends.append(min(ends[-1] + bound // sizes[ends[-1]], len(sizes) - more))
        return ends[1:]

    bounds = range(sizes[0], sizes[0] * -(-len(sizes) // parts) + 1)
    least = bisect.bisect_left(bounds, True, key=lambda bound: cut(bound)[-1] == len(sizes))
    return np.split(order, cut(bounds[least])[:-1])


class TrainDataset(Dataset):
    """The micro-batches of this rank in order: item k is micro-batch k % accumulation of step
    k // accumulation.

    A step has the same samples and the same micro-batches on any number of ranks: micro-batch j
    goes to rank j % ranks. `micro_batch_size` is the mean of their sizes, see `deal`.
    An item is (batch, messages about skipped pictures). If a batch cannot be built, a UserError
    stands in its place: raised in a worker, it would arrive inside a traceback.
    """
    PICTURE = 576  # where a picture takes no positions (VLoRA), its work counts as so many

    def __init__(self, data, o):
        self.data, self.o = data, o
        self.sampler = BatchSampler(len(data), o.seed, o.batch_size,
                                    data.lengths if o.order == "length" else None,
                                    data.has_image if o.order != "random" else None)
        self.accumulation = o.batch_size // (o.micro_batch_size * dist.get_world_size())
        self.micro_batches = functools.lru_cache(maxsize=2)(self.micro_batches)

    def __len__(self):
        return self.o.steps * self.accumulation

    def size(self, i):
        """Positions of sample i in a batch."""
        if self.data.sample is None:  # samples of one size
            return 1
        sample = self.data.sample(i)
        bare = sample.image is not None and IMAGE not in sample.ids
        return padded(len(sample.ids)) + self.PICTURE * bare

    def micro_batches(self, step):
        """[[index, ...], ...] of all micro-batches of a step, over all ranks."""
        rows, parts = self.sampler.step(step), self.o.batch_size // self.o.micro_batch_size
        if parts == 1:
            return [rows]
        sizes = np.array([self.size(i) for i in rows])
        return [[rows[i] for i in part] for part in deal(sizes, parts)]

    def __getitem__(self, k):
        step, turn = divmod(k, self.accumulation)
        try:
            rows = self.micro_batches(step)[turn * dist.get_world_size() + dist.get_rank()]
            batch = self.data.batch(rows)
        except UserError as error:
            return error, []
        return batch, self.data.take_skipped()


def make_loader(dataset, start, o):
    """An iterator over the items of a TrainDataset from step `start` on, prepared by --workers
    processes.

    Workers send bytes through a pipe: torch would put tensors into /dev/shm, which is small in
    containers (Docker: 64 MB), and if it were full, the run would wait for ever. Raises UserError
    if /dev/shm has no place for the workers' locks either.
    """
    items = range(start * dataset.accumulation, len(dataset))
    if not o.workers:
        return map(dataset.__getitem__, items)
    writable = os.access("/dev/shm", os.W_OK)
    if sys.platform == "linux" and not (writable and shutil.disk_usage("/dev/shm").free >= 2**20):
        raise UserError(f"--workers {o.workers}: a megabyte of /dev/shm is needed (for Docker: "
                        f"--shm-size 1g), and it is full, missing or read-only; --workers 0 needs "
                        f"none")
    return map(pickle.loads, DataLoader(
        dataset, batch_size=None, sampler=items, num_workers=o.workers, collate_fn=pickle.dumps,
        multiprocessing_context="fork", worker_init_fn=ignore_signals))


def next_batches(loader, count, signals):
    """(this rank's micro-batches of a step, messages about skipped pictures).

    A UserError stands for a batch that could not be built, and for all of them if a signal came or
    a worker died meanwhile.
    """
    try:
        with signals.interruptible():
            items = [next(loader) for _ in range(count)]
    except KeyboardInterrupt:
        return [UserError("interrupted while waiting for data")], []
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        return [UserError(f"{first_line(error).rstrip('. ')}. If the machine is out of memory, use "
                          f"fewer --workers")], []
    return [batch for batch, _ in items], sum([messages for _, messages in items], [])


def describe_records(batches, failed=False):
    """The records of this step, by rank; only those of the ranks that `failed`, if any did."""
    ranks = all_gather((failed, [record for batch in batches for record in batch.records]))
    some = any(bad for bad, _ in ranks)
    return "; ".join(f"rank {n}, records {', '.join(records)}"
                     for n, (bad, records) in enumerate(ranks) if bad or not some)


def split_across_ranks(cuts, make_batch):
    """Batches of this rank's share of `cuts`, [rows, ...]; as many as on the other ranks.

    Where one is missing, a batch without supervised tokens stands in, so that all ranks run the
    model equally often.
    """
    ranks = dist.get_world_size()
    batches = [make_batch(rows) for rows in cuts[dist.get_rank()::ranks]]
    if len(batches) < -(-len(cuts) // ranks):
        batches.append(make_batch(cuts[0]))
        batches[-1].target = torch.full_like(batches[-1].target, IGNORE)
    return batches


def val_batches(data, size):
    """Batches of `size` of this rank's share of the first 512 samples of validation data; says
    which pictures were skipped."""
    n = min(len(data), 512)
    cuts = [range(i, min(i + size, n)) for i in range(0, n, size)]
    batches = split_across_ranks(cuts, data.batch)
    for message in dict.fromkeys(data.take_skipped()):
        print(f"skipped in --val: {message}", file=sys.stderr)
    return batches


def is_readable(path):
    try:
        open_image(path, path)
        return True
    except UserError:
        return False


class Pictures:
    """The pictures of samples: pixels float[3, S, S], or CLIP's features float[N, C] if they were
    cached.

    Called with a Sample; raises UserError if its picture cannot be read. They have the `dtype` of
    the computation: a worker then sends half as many bytes of bfloat16.
    """

    def __init__(self, preprocess, dtype):
        self.preprocess, self.dtype, self.features = preprocess, getattr(torch, dtype), {}

    def read(self, path, name):
        return pixels(open_image(path, name), self.preprocess).to(self.dtype)

    def __call__(self, sample):
        if sample.image in self.features:
            return self.features[sample.image]
        return self.read(sample.image, f"{sample.record}: {sample.image}")

    @torch.no_grad()
    def cache(self, paths, model, o):
        """Run the frozen tower once per picture, before training."""
        model.vision.to(o.device, self.dtype)
        for i in tqdm(range(0, len(paths), 64), "features", mininterval=5):
            some = [p for p in paths[i:i + 64] if not o.skip_bad_images or is_readable(p)]
            if some:
                batch = torch.stack([self.read(p, p) for p in some])
                self.features |= zip(some, model.features(batch.to(o.device)).cpu())
        model.vision.to("cpu")


@dataclass
class Question:
    """A validation question that the log answers now and then."""
    batch: Batch          # the prompt, a batch of one
    tokenizer: Tokenizer
    image: str            # path of the picture
    text: str             # without the picture's tag; empty for a caption
    truth: str            # the answer in the data
    plain: bool           # a caption ends with its line
    LENGTH = 32           # tokens of an answer

    def answer(self, model, device, dtype):
        """The model's greedy answer, as text.

        Never stops at eos: every rank must make the same number of forward calls.
        """
        cache, eos = model.new_cache(1, device, dtype), self.tokenizer.eos
        ids = generate(model, self.batch.to(device), self.LENGTH, eos=-1, cache=cache)[0]
        text = self.tokenizer.decode(ids[:ids.index(eos)] if eos in ids else ids)
        return text.split("\n")[0] if self.plain else text

    def __str__(self):
        parts = [self.image, *(json.dumps(t, ensure_ascii=False) for t in [self.text] if t)]
        return f"{': '.join(parts)} (truth {json.dumps(self.truth, ensure_ascii=False)})"


class VLMData:
    """Conversations with their pictures, in batches.

    blank  shape of a picture or of its features, for batches without one
    skip   replace a record whose picture cannot be read by the next one that is not longer
    """

    def __init__(self, conversations, load_picture, blank, skip=False):
        self.conversations, self.load_picture, self.blank = conversations, load_picture, blank
        self.lengths, self.has_image = conversations.lengths, conversations.has_image
        self.skip, self.skipped = skip, []

    def __len__(self):
        return len(self.conversations)

    def sample(self, i):
        """The Sample with that index, without its picture."""
        return self.conversations[i]

    def is_cut(self, i):
        """Whether the context cuts that conversation."""
        data = self.conversations
        name, turns, image = data.read(i)
        sample = encode_conversation(turns, data.tokenizer, data.prompt_format, name, image)
        return len(sample.ids) > data.prompt_format.context

    def take_skipped(self):
        """Messages about the pictures skipped since the last call."""
        messages, self.skipped = self.skipped, []
        return messages

    def batch(self, rows):
        """The Batch of the samples with these indices. Raises UserError if a picture cannot be
        read.
        """
        pairs = [self.with_picture(i) for i in rows]
        visual = [picture for _, picture in pairs if picture is not None]
        return collate([sample for sample, _ in pairs], visual, self.blank, multiple=MULTIPLE)

    def with_picture(self, i):
        """(sample i, its picture or None). With `skip`, the next readable record stands in for a
        bad one; it must not be longer, or the micro-batch might not fit into memory.

        The rule depends on the data only, so that a resumed run makes the same replacement.
        """
        longest = padded(len(self.conversations[i].ids))
        for j in range(len(self)):
            sample = self.conversations[(i + j) % len(self)]
            if len(sample.ids) > longest:
                continue
            try:
                return sample, None if sample.image is None else self.load_picture(sample)
            except UserError as error:
                if not self.skip:
                    raise
                self.skipped.append(str(error))
        raise UserError(f"--skip_bad_images: no record can stand in for record {i}: of those that "
                        f"are not longer, no picture can be read")

    def text_batches(self):
        """The first 32 conversations as text only, in the form that chat Llamas are trained on."""
        data, samples = self.conversations, []
        text_format = PromptFormat("v1", data.prompt_format.system, 0, data.prompt_format.context)
        for i in range(min(32, len(self))):
            turns = turns_of_record(data.record(i), f"record {i}")
            turns = [(question.replace(TAG, "").strip(), answer) for question, answer in turns]
            samples.append(encode(turns, data.tokenizer, text_format, f"record {i}"))
        return [collate(samples[i:i + 8], [], self.blank, multiple=MULTIPLE)
                for i in range(0, len(samples), 8)]

    def question(self):
        """A Question about the first picture that can be read; None if there is none.

        The first question of its record must be about the picture, and the context must not have
        cut its answer.
        """
        data = self.conversations
        for i in range(len(self)):
            sample, turns = data[i], turns_of_record(data.record(i), f"record {i}")
            answered = (sample.labels[sample.use_id <= 0] != IGNORE).any()
            if sample.image is None or TAG not in turns[0][0] or not answered:
                continue
            if self.skip and not is_readable(sample.image):
                continue
            prompt = encode_prompt([], turns[0][0], data.tokenizer, data.prompt_format,
                                   sample.image, sample.record)
            batch = collate([prompt], [self.load_picture(sample)])
            plain = data.prompt_format.template == "plain"
            text = "" if plain else turns[0][0].replace(TAG, "").strip()
            return Question(batch, data.tokenizer, sample.image, text, turns[0][1], plain)
        return None
