"""Ask a checkpoint about a picture: `python sample.py --image x.jpg --prompt "What colour is the star?"`.

--prompt repeated makes turns of one conversation, --chat goes on talking, --batch answers a file of questions. Answers, and
nothing else, go to standard output as they are made; everything else to standard error.
"""
import contextlib
import dataclasses
import glob
import io
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

import weights
from cli import main, parse, UserError
from data import collate, encode_prompt, image_path, open_image, pixels
from model import Cache, end_turn, generate, stream
from vlora import merged
from weights import fast_dtype, pick_device

HELP = "a question, or /image PATH: another picture and a new conversation; /reset: a new conversation; /quit"


@dataclass
class Options:
    """Answer questions about a picture."""
    image: str | None = None            # the picture, any file that Pillow opens; -: standard input; none: no picture
    prompt: list[str] | None = None     # the question; repeated: turns of one conversation; none: "Describe the image."
    chat: bool = False                  # go on talking: at a terminal, or a question a line from a pipe
    batch: str | None = None            # JSON Lines file to answer: {"prompt": text, "image": path}, or no image
    images: str | None = None           # folder that the paths of --batch start from; none: that of the file
    out: str | None = None              # where the answers to --batch go; none: x.answers.jsonl beside x.jsonl
    batch_size: int = 8                 # questions of --batch that are answered at once
    model: str | None = None            # checkpoint; none: the newest finished stage under out/
    temperature: float = 0.0            # 0: the likeliest token; higher: drawn at random
    top_p: float = 1.0                  # draw from the smallest set of tokens that has this probability
    max_new_tokens: int = 256           # longest answer
    seed: int = 0                       # of the draw
    merge: bool = False                 # VLoRA: make a picture's weights part of the Llama's own while it answers; for long answers
    device: Literal["cuda", "mps", "cpu"] | None = None  # none: the first of them that there is
    dtype: Literal["bfloat16", "float32"] | None = None  # of the computation; none: bfloat16 where it is fast

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: an answer has at least 1 token")
        if not (self.temperature == 0 or 1e-3 <= self.temperature <= 1e3) or not 1e-6 <= self.top_p <= 1:
            raise UserError(f"--temperature {self.temperature} --top_p {self.top_p}: expected 0 or 0.001 to 1000, and above 0 up to 1")
        if not 0 <= self.seed < 2**62:  # --batch adds the number of the line
            raise UserError(f"--seed {self.seed}: expected 0 to 2**62")
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: expected at least 1")
        if self.chat and self.image == "-":
            raise UserError("--image - and --chat would both read standard input: name the picture's file")
        if self.batch is not None and (self.image is not None or self.prompt or self.chat):
            raise UserError("--batch has questions and pictures from its file: leave out --image, --prompt and --chat")
        if self.batch is None and (self.images is not None or self.out is not None):
            raise UserError("--images and --out belong to --batch")
        if self.batch is not None and self.merge:
            raise UserError("--merge is for one picture: --batch runs its changes as branches")


def newest(root="out"):
    """The checkpoint of stage 1 or 2 under `root` that was finished last; UserError if there is none.

    One set aside as stageN.old counts where the save of its successor was killed: `weights.load` falls back to it.
    """
    old, whole = (glob.glob(os.path.join(root, "**", stage, "config.json"), recursive=True)
                  for stage in ("stage[12].old", "stage[12]"))
    times = {os.path.dirname(config).removesuffix(".old"): os.path.getmtime(config) for config in old + whole}
    if not times:
        raise UserError(f"no checkpoint under {root}/: run `python train.py` first, or name one with --model")
    return max(times, key=times.get)


def load(o):
    """(Checkpoint, what to call it) on the device and in the dtype that were asked for, or are best."""
    device = pick_device(o.device)
    name = o.model or newest()
    dtype = o.dtype or fast_dtype(device)
    checkpoint = weights.load(name, getattr(torch, dtype))
    if o.merge and checkpoint.model.cfg.vlora is None:
        raise UserError(f"--merge: in {name} pictures change no weights, as VLoRA's do")
    checkpoint.model.to(device)
    return checkpoint, f"{name} on {device} in {dtype}"


def together(samples, visual, model):
    """The `Batch` of samples and their pictures on the model's device; without a picture the tower does not run."""
    weight = model.llm.embed_tokens.weight
    batch = collate(samples, visual, (0,))
    batch.visual = batch.visual.to(weight.dtype) if visual else None
    return batch.to(weight.device)


def answer(checkpoint, samples, visual, max_new_tokens, *, temperature=0.0, top_p=1.0,
           generator=None):
    """Answer prompts together: list of B lists of ids, without the end token.

    samples    B `data.Sample` of prompts, see `data.encode_prompt`
    visual     for each sample with a picture, in order: float[3, S, S] pixels or float[N, C] features
    generator  torch.Generator on the model's device; used when temperature > 0

    Runs on the model's device and in its dtype. In fp32, a greedy answer does not depend on the
    other samples.
    """
    batch, tokenizer = together(samples, visual, checkpoint.model), checkpoint.tokenizer
    return generate(checkpoint.model, batch, max_new_tokens, tokenizer.eos, temperature=temperature,
                    top_p=top_p, generator=generator, vocab=tokenizer.vocab)


def room_after(sample, before, context):
    """Positions left for the answer to a prompt after `before` of conversation; UserError if there are none."""
    room = context - before - len(sample.ids)
    if room < 1:
        past = f", the conversation before it {before}" if before else ""
        hint = ": begin a new one, in a chat with /reset" if before else ""
        raise UserError(f"{sample.record} takes {len(sample.ids)} of the {context} positions of the context{past}; "
                        f"there is no room for an answer{hint}")
    return room


# ---- Conversations


class Chat:
    """A conversation about one picture or none, in which a turn costs its own tokens only.

    ids    all of it: prompts, and answers as the model gave them. Their text encoded anew may make other ids; these are
           what the model has said, and what it goes on from.
    held   how many of them the cache holds. Of an answer all but the last: that one is run when the next turn begins,
           with the weights of its own turn, and so is the </s> that ends an answer which was cut.

    Ctrl-C may leave `ask` anywhere: what was said until then stays, and the next question goes on from there.
    """

    def __init__(self, checkpoint, image, o):
        self.checkpoint, self.model, self.tokenizer, self.o = checkpoint, checkpoint.model, checkpoint.tokenizer, o
        self.image, self.features = image, None  # a PIL image or None; float[N, C] once a question was asked
        self.deltas = None                       # VLoRA: what the picture makes of each block, once a question was asked
        self.context = self.model.cfg.llm.context
        self.reset()

    def reset(self):
        """Begin a new conversation about the same picture."""
        weight = self.model.llm.embed_tokens.weight
        self.ids, self.held = [], 0
        self.cache = Cache(self.model.cfg.llm, 1, 0, weight.device, weight.dtype)
        self.generator = torch.Generator(weight.device).manual_seed(self.o.seed)

    def prompt(self, question):
        """(Sample, positions left for the answer) of what a question adds to the conversation.

        Raises UserError if it is empty or no text, and if it leaves no room.
        """
        if re.search("[\ud800-\udfff]", question):
            raise UserError("the prompt is no valid Unicode")
        layout = self.checkpoint.layout()
        if not self.ids:
            name = None if self.image is None else "the picture"
            sample = encode_prompt([], question, self.tokenizer, layout, name)
        else:  # pieces are encoded apart: alone, but for <s>, a turn has the ids that it has in the whole conversation
            sample = encode_prompt([], question, self.tokenizer, dataclasses.replace(layout, system=""))
            own = {name: getattr(sample, name)[1:] for name in ("ids", "labels", "pool_id", "use_id")}
            sample = dataclasses.replace(sample, **own)
        return sample, room_after(sample, self.held + len(self.tail()), self.context)

    def tail(self):
        """What the cache lacks of the turns before: ids that were not run yet, and </s> where an answer was cut."""
        finished = not self.ids or self.ids[-1] == self.tokenizer.eos
        return self.ids[self.held:] + ([] if finished else [self.tokenizer.eos])

    def look(self):
        """[features float[N, C]] of the picture, which the tower sees once; [] where there is none."""
        if self.image is not None and self.features is None:
            seen = pixels(self.image, self.checkpoint.preprocess)[None].to(self.model.llm.embed_tokens.weight)
            with torch.no_grad():
                self.features = self.model.features(seen)[0]
        return [] if self.image is None else [self.features]

    def merging(self):
        """VLoRA: the context within which the Llama is the picture's, giving what is left to run as branches; else of None.

        For all that runs meanwhile: an answer about another picture must wait until this one is whole.
        """
        if self.model.cfg.vlora is None or self.image is None or not self.o.merge:
            return contextlib.nullcontext()
        if self.deltas is None:
            features = torch.stack(self.look())
            with torch.no_grad():
                self.deltas = self.model.perceptual(features, torch.zeros(1, dtype=torch.int64, device=features.device))
        return merged(self.model.llm.layers, self.deltas)

    def ask(self, question):
        """Yield the answer as text: a piece for each token (empty while a character is not whole), one for what is left.

        Raises UserError as `prompt` does; the conversation is then as before.
        """
        (sample, room), tail = self.prompt(question), self.tail()
        with self.merging() as rest:
            yield from self.answer(sample, room, tail, rest)

    def answer(self, sample, room, tail, rest):
        """The pieces that `ask` yields. rest: what `merging` gave."""
        if rest is None:
            batch = together([sample], [] if self.ids else self.look(), self.model)
        else:
            batch = together([dataclasses.replace(sample, image=None)], [], self.model)
            self.cache.seen = self.cache.seen or (rest, batch.tag if self.model.cfg.vlora.tag else None)
        self.cache.lengths.fill_(self.held)  # no change, unless Ctrl-C came in between
        if tail:
            end_turn(self.model, batch.ids.new_tensor([tail]), batch.lengths.new_tensor([len(tail)]), self.cache)
            self.ids, self.held = self.ids[:self.held] + tail, self.held + len(tail)
        ids, text = self.ids + sample.ids.tolist(), self.tokenizer.streaming()
        for token in stream(self.model, batch, min(self.o.max_new_tokens, room), self.tokenizer.eos, self.o.temperature,
                            self.o.top_p, self.generator, self.cache, self.tokenizer.vocab):
            ids = ids + [token.item()]
            self.ids, self.held = ids, len(ids) - 1
            yield text.add(ids[-1])
        yield text.end()


def say(chat, question):
    """Answer on standard output as the words come, then say on standard error how fast, and whether the answer was cut."""
    began, times = time.perf_counter(), []
    try:
        for piece in chat.ask(question):
            times.append(time.perf_counter())
            print(piece, end="", flush=True)
    finally:
        if times:
            print(flush=True)
    n = len(times) - 1  # the last piece is no token
    rate = f"{(n - 1) / (times[n - 1] - times[0]):.1f} tokens/s, " if n > 1 else ""
    print(f"{n} tokens, {rate}the first after {times[0] - began:.2f} s", file=sys.stderr)
    if chat.ids[-1] != chat.tokenizer.eos:
        if n < chat.o.max_new_tokens:
            print(f"the answer is cut at {n} tokens: the context holds {chat.context} positions", file=sys.stderr)
        else:
            print(f"the answer is not at its end: --max_new_tokens {n} allows no more", file=sys.stderr)


@contextlib.contextmanager
def forgiving():
    """Within this context a mistake costs a line on standard error, and Ctrl-C at a terminal one answer, not the chat."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        print("stopped; once more ends the chat", file=sys.stderr)


def lines():
    """Yield what standard input says: typed at a prompt where it is a terminal, else line by line."""
    sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is for `prompt` to refuse
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # gives `input` a history, and keys to edit with
    shown = sys.stdout.isatty()  # else the prompt that `input` shows would be in the file that the answers go to
    print(f"type {HELP}", file=sys.stderr)
    with contextlib.suppress(EOFError):
        while True:
            print("" if shown else "> ", end="", file=sys.stderr, flush=True)
            yield input("> " if shown else "")
    print(file=sys.stderr)


def talk(chat):
    """Answer line after line of standard input, until it ends or says /quit."""
    for line in lines():
        with forgiving():
            match line.strip().split(maxsplit=1):
                case ["/quit"]:
                    return
                case ["/reset"]:
                    chat.reset()
                case ["/image", path]:
                    path = os.path.expanduser(path)
                    chat = Chat(chat.checkpoint, open_image(path, path), chat.o)
                case [word, *_] if word.startswith("/"):
                    print(f"{word} is no command; type {HELP}", file=sys.stderr)
                case _:
                    say(chat, line.strip())


def converse(o):
    """Answer --prompt, turn by turn, then go on with --chat."""
    if o.image == "-":
        image = open_image(io.BytesIO(sys.stdin.buffer.read()), "standard input")
    else:
        image = None if o.image is None else open_image(o.image, o.image)
    checkpoint, title = load(o)  # after the picture: a mistake with that shows at once
    chat = Chat(checkpoint, image, o)
    questions = o.prompt or ([] if o.chat else ["Describe the image."])
    for question in questions:
        chat.prompt(question)  # one that cannot even begin a conversation is a mistake before any is answered
    print(title, file=sys.stderr)
    for question in questions:
        with forgiving() if o.chat else contextlib.nullcontext():
            say(chat, question)
    if o.chat:
        talk(chat)


# ---- Files of questions


def read_questions(path):
    """The objects in a JSON Lines file; OSError, or UserError that names the line, if one cannot be answered."""
    rows = []
    with open(path, "rb") as f:
        for i, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path} line {i}: not JSON ({error})") from None
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
                raise UserError(f'{path} line {i}: expected {{"prompt": text, ...}}')
            if not isinstance(row.get("image"), str | None):
                raise UserError(f'{path} line {i}: "image" is {row["image"]!r}, expected the path of a picture')
            if "answer" in row:
                raise UserError(f'{path} line {i}: "answer" is where the answer will go: call what is there otherwise')
            rows.append(row)
    return rows


def line_of(row, answer):
    return json.dumps({**row, "answer": answer}, ensure_ascii=False).encode() + b"\n"


def answered(out, rows):
    """(rows that the file `out` answers, bytes of its whole lines); a last line that is half written does not count.

    Raises UserError if a line is not an answer to the row in its place: the file is something else.
    """
    if not os.path.exists(out):
        return 0, 0
    with open(out, "rb") as f:
        found = f.read().split(b"\n")  # the last is what stands behind the last newline
    for i, line in enumerate(found):
        # How the line begins, up to the answer's text; nothing begins like a line too many
        due = line_of(rows[i], "")[:-3] if i < len(rows) else b"\n"
        if line[:len(due)] != (due if i < len(found) - 1 else due[:len(line)]):
            raise UserError(f"{out} line {i + 1}: not the answer to that line of --batch: name another --out, or remove it")
    return len(found) - 1, sum(map(len, found[:-1])) + len(found) - 1


def answers(checkpoint, rows, names, images, o, seed):
    """[(text, whether it was cut), ...] of rows, answered at once: greedily and in fp32 as each would be alone.

    Raises UserError with the row's name if its picture or prompt cannot be used.
    """
    layout, prep, tokenizer = checkpoint.layout(), checkpoint.preprocess, checkpoint.tokenizer
    samples, visual = [], []
    for row, name in zip(rows, names):
        image = row.get("image")
        if image is not None:
            visual.append(pixels(open_image(image_path(images, image, name), f"{name}: {image}"), prep))
        samples.append(encode_prompt([], row["prompt"], tokenizer, layout, image, name))
    longest = [min(o.max_new_tokens, room_after(s, 0, layout.context)) for s in samples]
    generator = torch.Generator(checkpoint.model.llm.embed_tokens.weight.device).manual_seed(seed)
    found = answer(checkpoint, samples, visual, max(longest), temperature=o.temperature,
                   top_p=o.top_p, generator=generator)
    return [(tokenizer.decode(ids[:n]), len(ids) >= n) for ids, n in zip(found, longest)]


def answer_file(o):
    """Answer --batch to --out, line by line in order. A run that was stopped goes on where its file ends."""
    rows = read_questions(o.batch)
    out = o.out or f"{os.path.splitext(o.batch)[0]}.answers.jsonl"
    done, size = answered(out, rows)
    if done == len(rows):
        print(f"{out} holds all {done} answers; to have others, remove it", file=sys.stderr)
        return
    checkpoint, title = load(o)
    print(title, file=sys.stderr)
    if done:
        print(f"{out} holds {done} of {len(rows)} answers: going on from there", file=sys.stderr)
    images, cut = o.images or os.path.dirname(o.batch) or ".", 0
    with open(out, "ab") as f, tqdm(total=len(rows), initial=done, unit="answer") as bar:
        f.truncate(size)
        for i in range(done, len(rows), o.batch_size):
            some = rows[i:i + o.batch_size]
            names = [f"{o.batch} line {j}" for j in range(i + 1, i + len(some) + 1)]
            texts = answers(checkpoint, some, names, images, o, o.seed + i)
            f.write(b"".join(line_of(row, text) for row, (text, _) in zip(some, texts)))
            f.flush()
            cut += sum(was for _, was in texts)
            bar.update(len(some))
    if cut:
        print(f"{cut} answers were cut: by --max_new_tokens {o.max_new_tokens} or the end of the context", file=sys.stderr)


def run():
    o = Options(**parse(Options))
    if o.batch is not None:
        answer_file(o)
    else:
        converse(o)


if __name__ == "__main__":
    main(run)
