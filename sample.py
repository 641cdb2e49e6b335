"""Ask a checkpoint about a picture: `python sample.py x.jpg --prompt "What colour is the star?"`.

--prompt may be repeated: turns of one conversation. --chat goes on with questions from the
terminal, --batch answers a file of questions. Answers go to standard output as they are made,
everything else to standard error.

`answer` answers a batch of prompts; the benchmarks call it, too. `Chat` answers turn by turn and
keeps a cache. weights.py opens checkpoints. Next: test_model.py.
"""
# cli first: it handles Ctrl-C during the slow imports
from cli import check_numbers, main, MOST, parse, read_lines, survive_mistakes, UserError

import contextlib
import dataclasses
import io
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

import vlora
import weights
from data import collate, encode_prompt, image_path, open_image, pixels, TAG
from formats.answers import AnswerFile, read_questions
from formats.lora import fingerprints
from formats.runs import choose_checkpoint
from inference.prepare import ready_for_answers
from inference.threads import choose_threads
from model import end_turn, generate, stream

HELP = ("type a question; /image PATH: a new conversation about another picture; "
        "/reset: a new conversation; /quit")
LATER = f"{TAG} in a later question: only the first one can say where the picture stands"


@dataclass
class Options:
    """Answer questions about a picture. A word without an option name is the picture."""
    # question
    image: str | None = None           # the picture, one for a conversation; -: standard input;
                                       # none: no picture
    prompt: list[str] | None = None    # the question; may be repeated: turns of one conversation;
                                       # none: "Describe the image."
    chat: bool = False                 # go on with questions from the terminal, or lines of a pipe
    model: str | None = None           # a checkpoint, or a run's folder: its newest finished stage;
                                       # none: the newest finished stage under out/
    base: str | None = None            # of a LoRA: the model below it; none: the one that it names
    # answer
    max_new_tokens: int = 256          # longest answer, in tokens
    temperature: float = 0.0           # 0: always the likeliest token; above 0: drawn at random
    top_p: float = 1.0                 # sample from the fewest tokens with this total probability
    background: Literal["none", "white"] | None = None  # white: behind transparent pixels; none:
                                       # transparency is dropped (without: as in training)
    seed: int = 0                      # of the random draws
    # file of questions
    batch: str | None = None           # JSON Lines file: {"prompt": text, "image": path} a line,
                                       # the picture may be missing
    images: str | None = None          # folder of its pictures; none: that of the file
    out: str | None = None             # file of the answers; none: x.answers.jsonl for x.jsonl
    batch_size: int = 8                # questions answered together
    # hardware
    device: Literal["cuda", "mps", "cpu"] | None = None  # none: the first of these that exists
    dtype: Literal["bfloat16", "float32"] | None = None  # none: bfloat16 where it is fast
    merge: bool = False                # VLoRA: add the picture's weights to the Llama's own during
                                       # an answer, for long answers

    def __post_init__(self):
        coldest = 1e-3 if self.temperature else 0
        check_numbers(self, {"max_new_tokens": (1, MOST, "at least 1 token"),
                             "temperature": (coldest, 1e3, "0 or 0.001 to 1000"),
                             "top_p": (1e-6, 1, "above 0, and 1 at most"),
                             "seed": (0, 2**62, "0 to 2**62"),  # --batch adds to it
                             "batch_size": (1, MOST, "at least 1")})
        if self.chat and self.image == "-":
            raise UserError("--image - and --chat both read standard input: give a file's path")
        if self.batch is not None and (self.image is not None or self.prompt or self.chat):
            raise UserError("--batch reads its questions and pictures from the file: "
                            "leave out --image, --prompt and --chat")
        if self.batch is None and (self.images is not None or self.out is not None):
            raise UserError("--images and --out belong to --batch")
        if self.batch is not None and self.merge:
            raise UserError("--merge is for one picture: leave it out with --batch")


# ---- Answering


def load(o, name):
    """(Checkpoint, a line about it), on the device and in the dtype of the options."""
    device = weights.pick_device(o.device)
    dtype = o.dtype or weights.fast_dtype(device)
    checkpoint = weights.load(name, getattr(torch, dtype), base=o.base)
    if o.merge and not isinstance(checkpoint.model, vlora.VLoRA):
        raise UserError(f"--merge: {name} is not a VLoRA, --merge works only with one")
    if o.background:
        checkpoint.preprocess = dataclasses.replace(checkpoint.preprocess, background=o.background)
    ready_for_answers(checkpoint.model.to(device))
    return checkpoint, f"{name} on {device} in {dtype}"


def make_batch(samples, visual, model):
    """The `Batch` on the model's device; without pictures, the vision tower does not run."""
    weight = model.llm.embed_tokens.weight
    batch = collate(samples, visual).to(weight.device)
    batch.visual = batch.visual.to(weight.dtype) if visual else None
    return batch


def answer(checkpoint, samples, visual, max_new_tokens, *, temperature=0.0, top_p=1.0,
           generator=None):
    """Answer B prompts together: a list of B lists of ids, without the end token.

    samples    B `data.Sample`, see `data.encode_prompt`
    visual     pixels float[3, S, S] or features float[N, C] of the samples with a picture, in order
    generator  torch.Generator on the model's device, for temperature > 0

    Runs on the model's device and in its dtype. In fp32, greedy answers are the same as
    without batching.
    """
    batch, tokenizer = make_batch(samples, visual, checkpoint.model), checkpoint.tokenizer
    return generate(checkpoint.model, batch, max_new_tokens, tokenizer.eos, temperature=temperature,
                    top_p=top_p, generator=generator, vocab=tokenizer.vocab)


def make_generator(model, seed):
    """A torch.Generator on the model's device."""
    return torch.Generator(model.llm.embed_tokens.weight.device).manual_seed(seed)


def free_positions(sample, before, context):
    """Positions left for an answer if `before` are used already; UserError if none."""
    free = context - before - len(sample.ids)
    if free < 1:
        past = f", the conversation before it {before}" if before else ""
        hint = ": begin a new one, in a chat with /reset" if before else ""
        raise UserError(f"{sample.record} takes {len(sample.ids)} of the {context} positions of "
                        f"the context{past}; there is no room for an answer{hint}")
    return free


# ---- Conversations


class Chat:
    """A conversation about one picture or none.

    A new turn processes only its own tokens. Keys, values and the picture's features are cached;
    earlier tokens keep what the weights of their turn made of them.

    ids     all tokens: prompts, and answers as the model gave them (encoding an answer's text again
            could give other ids)
    cached  how many of them have been run. The last token of an answer is run when the next turn
            begins, with the weights of its own turn; after a cut answer, </s> is run then, too.

    Ctrl-C may end `ask` anywhere: the partial answer is kept, and the next question follows it.
    """

    def __init__(self, checkpoint, image, o):
        self.checkpoint, self.o = checkpoint, o
        self.model, self.tokenizer = checkpoint.model, checkpoint.tokenizer
        self.context = self.model.cfg.llm.context
        self.image, self.features = image, None  # PIL image or None; float[N, C] from first use on
        self.reset()

    def reset(self):
        """Begin a new conversation about the same picture."""
        weight = self.model.llm.embed_tokens.weight
        self.ids, self.cached = [], 0
        self.cache = self.model.new_cache(1, weight.device, weight.dtype)
        self.generator = make_generator(self.model, self.o.seed)

    def prompt(self, question):
        """(Sample of the tokens that a question adds, positions left for the answer).

        Raises UserError if the question is empty, is not text, or does not fit into the context.
        """
        if re.search("[\ud800-\udfff]", question):
            raise UserError("the prompt is not valid Unicode")
        prompt_format = self.checkpoint.prompt_format()
        if not self.ids:
            image = None if self.image is None else "the picture"
            sample = encode_prompt([], question, self.tokenizer, prompt_format, image)
        elif TAG in question and self.image is not None:
            raise UserError(LATER)
        else:  # pieces of text are encoded one by one: only <s> differs from the whole conversation
            prompt_format = dataclasses.replace(prompt_format, system="")
            sample = encode_prompt([], question, self.tokenizer, prompt_format)
            names = ("ids", "labels", "pool_id", "use_id")
            sample = dataclasses.replace(sample, **{n: getattr(sample, n)[1:] for n in names})
        before = self.cached + len(self.uncached())
        return sample, free_positions(sample, before, self.context)

    def uncached(self):
        """The ids of the last answer that are not in the cache, </s> included."""
        ended = not self.ids or self.ids[-1] == self.tokenizer.eos
        return self.ids[self.cached:] + ([] if ended else [self.tokenizer.eos])

    def visual(self):
        """[features float[N, C]] of the picture, [] without one; the vision tower runs once."""
        if self.image is not None and self.features is None:
            x = pixels(self.image, self.checkpoint.preprocess)[None]
            with torch.no_grad():
                self.features = self.model.features(x.to(self.model.llm.embed_tokens.weight))[0]
        return [] if self.image is None else [self.features]

    @contextlib.contextmanager
    def batch_of(self, sample):
        """The `Batch` of a prompt; with --merge, the picture's weights are merged meanwhile."""
        if not self.o.merge or self.image is None:
            yield make_batch([sample], self.visual() if sample.image else [], self.model)
            return
        batch = make_batch([dataclasses.replace(sample, image=None)], [], self.model)
        first = torch.zeros_like(batch.picture)
        with torch.no_grad():
            deltas = self.model.image_weights(torch.stack(self.visual()), first)
        with vlora.merged(self.model.llm.layers, deltas) as unmerged:
            if self.cache.deltas is None:
                self.cache.deltas, self.cache.tag = unmerged, batch.tag
            yield batch

    def ask(self, question):
        """Yield the answer as text: a piece for each token, and a last one.

        A piece is empty while a character is not complete; the last one holds the rest.
        Raises UserError as `prompt` does, and the conversation is as before.
        """
        sample, free = self.prompt(question)
        if self.cache.lengths.device.type == "cpu":
            choose_threads()
        with self.batch_of(sample) as batch:
            self.cache.rewind(torch.full_like(self.cache.lengths, self.cached))  # after Ctrl-C
            if last := self.uncached():
                lengths = batch.lengths.new_tensor([len(last)])
                end_turn(self.model, batch.ids.new_tensor([last]), lengths, self.cache)
                self.ids, self.cached = self.ids[:self.cached] + last, self.cached + len(last)
            ids, text, o = self.ids + sample.ids.tolist(), self.tokenizer.streaming(), self.o
            for token in stream(self.model, batch, min(o.max_new_tokens, free), self.tokenizer.eos,
                                temperature=o.temperature, top_p=o.top_p, generator=self.generator,
                                cache=self.cache, vocab=self.tokenizer.vocab):
                # a new list: Ctrl-C must not change self.ids without self.cached
                ids = ids + [token.item()]
                self.ids, self.cached = ids, len(ids) - 1
                yield text.add(ids[-1])
            yield text.end()


def print_answer(chat, question):
    """Print an answer as it is made; its speed, and whether it was cut, go to standard error."""
    began, times = time.perf_counter(), []
    try:
        for piece in chat.ask(question):
            times.append(time.perf_counter())
            print(piece, end="", flush=True)
    finally:
        if times:
            print(flush=True)
    n = len(times) - 1  # the last piece is not a token
    rate = f"{(n - 1) / (times[n - 1] - times[0]):.1f} tokens/s, " if n > 1 else ""
    print(f"{n} tokens, {rate}the first after {times[0] - began:.2f} s", file=sys.stderr)
    if chat.ids[-1] != chat.tokenizer.eos:
        print(f"the answer is cut at {n} tokens: the context holds {chat.context} positions"
              if n < chat.o.max_new_tokens else
              f"the answer is not finished: --max_new_tokens {n} allows no more", file=sys.stderr)


def talk(chat):
    """Answer the lines of standard input, until it ends or a line is /quit."""
    for line in read_lines(HELP):
        with survive_mistakes():
            match line.strip().split(maxsplit=1):
                case ["/quit"]:
                    return
                case ["/reset"]:
                    chat.reset()
                case ["/image"]:
                    raise UserError("/image needs the path of a picture: /image PATH")
                case ["/image", path]:
                    path = os.path.expanduser(path)
                    chat = Chat(chat.checkpoint, open_image(path, path), chat.o)
                    print(f"a new conversation about {path}", file=sys.stderr)
                case [word, *_] if word.startswith("/"):
                    raise UserError(f"{word} is not a command; {HELP}")
                case _:
                    print_answer(chat, line.strip())


def converse(o):
    """Answer each --prompt as a turn of one conversation, then go on with --chat."""
    image, questions = None, o.prompt or ([] if o.chat else ["Describe the image."])
    if o.image is not None and any(TAG in question for question in questions[1:]):
        raise UserError(LATER)
    if o.image == "-":
        image = open_image(io.BytesIO(sys.stdin.buffer.read()), "standard input")
    elif o.image is not None:
        image = open_image(o.image, o.image)
    checkpoint, title = load(o, choose_checkpoint(o.model))  # slow, so a bad picture fails first
    chat = Chat(checkpoint, image, o)
    for question in questions:  # a mistake in one of them ends the program before the first answer
        chat.prompt(question)
    print(title, file=sys.stderr)
    for question in questions:
        with survive_mistakes() if o.chat else contextlib.nullcontext():
            print_answer(chat, question)
    if o.chat:
        talk(chat)


# ---- Files of questions


def answer_rows(checkpoint, rows, images, o, seed):
    """[(text, whether it was cut), ...] of (label, question) rows, answered together.

    Raises UserError with the row's label if its picture or prompt cannot be used.
    """
    tokenizer, samples, visual = checkpoint.tokenizer, [], []
    prompt_format = checkpoint.prompt_format()
    for label, row in rows:
        image = row.get("image")
        if image is not None:
            picture = open_image(image_path(images, image, label), f"{label}: {image}")
            visual.append(pixels(picture, checkpoint.preprocess))
        samples.append(encode_prompt([], row["prompt"], tokenizer, prompt_format, image, label))
    limits = [min(o.max_new_tokens, free_positions(s, 0, prompt_format.context)) for s in samples]
    answers = answer(checkpoint, samples, visual, max(limits), temperature=o.temperature,
                     top_p=o.top_p, generator=make_generator(checkpoint.model, seed))
    return [(tokenizer.decode(ids[:n]), len(ids) >= n) for ids, n in zip(answers, limits)]


def answer_file(o):
    """Answer --batch to --out, in order. A stopped run continues after the last answer in its file.
    """
    rows, name = read_questions(o.batch), choose_checkpoint(o.model)
    out = o.out or f"{os.path.splitext(o.batch)[0]}.answers.jsonl"
    images = o.images or os.path.dirname(o.batch) or "."
    sampling = {n: getattr(o, n) for n in ("temperature", "top_p", "max_new_tokens", "seed",
                                           "background")}
    settings = {"model": name, **fingerprints(name, o.base), **sampling}
    answers = AnswerFile(out, rows, settings)
    if answers.done == len(rows):
        print(f"{out} holds all {len(rows)} answers; remove it to answer again", file=sys.stderr)
        return
    checkpoint, title = load(o, name)
    print(title, file=sys.stderr)
    if answers.done:
        print(f"{out} holds {answers.done} of {len(rows)} answers: going on from there",
              file=sys.stderr)
    cut = answers.write(o.batch_size, lambda some, i: answer_rows(
        checkpoint, some, images, o, o.seed + i))
    if cut:
        print(f"{cut} answers were cut: by --max_new_tokens {o.max_new_tokens} or the end of the "
              "context", file=sys.stderr)


def run():
    o = Options(**parse(Options, positional="image"))
    (converse if o.batch is None else answer_file)(o)


if __name__ == "__main__":
    main(run)
