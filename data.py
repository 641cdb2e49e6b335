"""What the model reads: pixels, tokens, conversations with their labels, and batches of them.

A record of a LLaVA file becomes a `Sample` in one pass, from left to right. Every piece of text is
encoded on its own and goes straight to its place, so that spans are known rather than found again by
tokenising twice:

    ids      <s> system  USER:  <image> <image>  \\nWhat is this? ASSISTANT:  A cat. </s>  USER: ...
    labels    -    -       -       -       -                 -                A cat. </s>    -
    pool_id   -    -       0       -       -                 0                  -     -      1
    use_id    0    0       0       0       0                 0                  0     0      1

`pool_id` names the turn whose guidance a position is averaged into, `use_id` the turn whose generated
weights it runs through. A prompt is a prefix of the prompt with its answer: generation sees what
training saw.

`python data.py --check` looks for bad records and pictures, `python data.py --show 3` prints what the
model reads. Next: model.py.
"""
import dataclasses
import functools
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from cli import UserError, main, parse
from model import IMAGE

MULTIPLE = 16   # what training pads sequences to a multiple of, see `collate`
IGNORE = -100   # the label of a position that is not trained
TAG = "<image>"
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


# 1. Pixels

@dataclass(frozen=True)
class Preprocess:
    size: int = 336                                # side of the square that the tower reads, px
    mean: tuple[float, ...] = CLIP_MEAN            # of the pixels in 0..1, by channel
    std: tuple[float, ...] = CLIP_STD
    aspect: Literal["pad", "crop"] = "pad"         # to a square: by padding, or by a central crop


def open_image(file, name):
    """The first frame of a picture (a path or an open file) as a PIL image in RGB, loaded in full.

    Like LLaVA, does not turn the picture as its EXIF data may ask, and drops transparency rather than
    laying it over white.
    Raises UserError with `name` if it is missing, no picture, damaged, or absurdly large.
    """
    # Pillow meets a damaged file with OSError, SyntaxError, ValueError, struct.error and more
    try:
        with Image.open(file) as image:
            # past this size Pillow only warns; it raises on its own at twice as much
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such picture") from None
    except Exception as error:
        raise UserError(f"{name}: unreadable picture ({type(error).__name__}: {error})") from None


def pad_square(image, mean):
    """`image` in the middle of a square canvas of the mean colour; an odd pixel goes right or below."""
    side = max(image.size)
    colour = tuple(int(m * 255) for m in mean)  # truncated, as LLaVA does
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def pixels(image, prep):
    """float32[3, S, S], normalised, of an RGB image: what CLIPImageProcessor on Pillow makes of it.

    The shortest side becomes S, so that the central crop never asks for more than there is.
    """
    if prep.aspect == "pad" and image.width != image.height:
        image = pad_square(image, prep.mean)
    short, long = sorted(image.size)
    if short != prep.size:
        long = int(prep.size * long / short)  # truncated, not rounded
        wide = image.width > image.height
        image = image.resize((long, prep.size) if wide else (prep.size, long), Image.BICUBIC)
    if image.width != image.height:
        left, top = (image.width - prep.size) // 2, (image.height - prep.size) // 2
        image = image.crop((left, top, left + prep.size, top + prep.size))
    x = np.array(image, np.float32) / 255                                      # (S, S, 3)
    x = (x - np.array(prep.mean, np.float32)) / np.array(prep.std, np.float32)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()                   # (3, S, S)


# 2. Tokens

class Tokenizer:
    """Text to ids and back as Llama does it, every text on its own.

    The space that Llama puts before any text is the one before the piece: "USER:" reads as "▁USER:".
    Nothing written in a text can become a control token: "</s>" is four characters here.

        tokenizer.decode(tokenizer.encode(text)) == text   # but for a literal "▁": it reads as a space
    """

    def __init__(self, inner):
        self.file = inner.to_str()
        ids = [inner.token_to_id(t) for t in ("<s>", "</s>", "<unk>")]
        if None in ids:
            raise UserError("the tokenizer lacks <s>, </s> or <unk>: it is not one of Llama's kind")
        self.bos, self.eos, self.pad = ids  # padding is never attended to, so any id will do
        self.vocab = inner.get_vocab_size()
        spec = json.loads(self.file)
        self.added = {t["id"] for t in spec["added_tokens"]}
        # Without added tokens, text cannot be taken for them; a flag would be lost in a worker's pickle
        spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self.inner = tokenizers.Tokenizer.from_str(json.dumps(spec))

    @classmethod
    def load(cls, folder):
        """The tokenizer of a model's folder; UserError if there is none or it cannot be read."""
        path = os.path.join(folder, "tokenizer.json")
        if not os.path.isfile(path):
            raise UserError(f"no tokenizer.json in {folder}; a tokenizer.model alone is not read yet")
        try:
            inner = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path}: not a tokenizer ({error})") from None
        return cls(inner)

    def save(self, folder):
        """Write tokenizer.json, the added tokens included."""
        with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
            f.write(self.file)

    def encode(self, text):
        """list[int] of the text, with Llama's space before it and no bos or eos."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """The text of ids; control and added tokens are skipped, and so is the space in front."""
        return self.inner.decode([int(i) for i in ids if int(i) not in self.added])


def layout_of_llama(vocab, merges):
    """A BPE `tokenizers.Tokenizer` with Llama's surroundings: "▁" for spaces, bytes for the unknown."""
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    inner = tokenizers.Tokenizer(bpe)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return inner


def train_tokenizer(texts, vocab):
    """A `Tokenizer` like Llama's of at most `vocab` ids, learned from an iterable of pieces of text.

    Ids: <unk> <s> </s>, 256 bytes, what was merged (in the order of merging), single characters. A
    word keeps the space before it; newlines and . , ? ! stand alone, ":" does not, so that "USER:" may
    become one token. Give it texts as `pieces` cuts them, and it learns words as they will be met.
    Raises UserError if `vocab` is too small.
    """
    texts = list(texts)
    fixed = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    characters = sorted(set("▁".join(texts).replace(" ", "▁")) | {"▁"})
    room = vocab - len(fixed)
    if room < len(characters):
        raise UserError(f"a vocabulary of {vocab} is too small: {len(fixed)} ids are given, "
                        f"and the texts have {len(characters)} different characters")
    inner = layout_of_llama({"<unk>": 0}, [])
    # No learned token crosses these cuts, so encoding needs none: the merges alone give the same ids
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("▁", "merged_with_next"),
        pre_tokenizers.Split(Regex(r"[\n.,?!]"), "isolated")])
    trainer = trainers.BpeTrainer(vocab_size=room, min_frequency=2, show_progress=False)
    inner.train_from_iterator(texts, trainer)

    # Text that spells a control token must not reach its id, and a newline is a byte, as with Llama
    learned = {c for c in characters if c != "\n"}
    merges = []
    for a, b in map(tuple, json.loads(inner.to_str())["model"]["merges"]):
        if a in learned and b in learned and a + b not in fixed:
            merges.append((a, b))
            learned.add(a + b)
    words = dict.fromkeys(a + b for a, b in merges)
    names = fixed + list(words) + [c for c in characters if c != "\n"]
    inner = layout_of_llama({t: i for i, t in enumerate(names)}, merges)
    inner.add_special_tokens(fixed[:3])
    return Tokenizer(inner)


# 3. Conversations

@dataclass(frozen=True)
class Layout:
    """How a conversation is laid out as positions."""
    template: Literal["plain", "v1"] = "v1"  # plain: picture, caption, newline; v1: Vicuna's dialogue
    system: str = SYSTEM                     # what stands before the first turn of v1; may be empty
    image_tokens: int = 576                  # positions that a picture takes
    context: int = 2048                      # positions after which a sample is cut
    pool: Literal["instruction", "prompt"] = "instruction"  # guidance: a turn's own text, or also what
                                                            # stands before it: picture, system, bos

    def __post_init__(self):
        if self.template not in ("plain", "v1") or self.pool not in ("instruction", "prompt"):
            raise UserError(f"template {self.template!r}, pool {self.pool!r}: expected plain or v1, "
                            "and instruction or prompt")


@dataclass
class Sample:
    """One conversation as the model reads it; the arrays are int64[T]."""
    ids: np.ndarray      # IMAGE at the picture's positions
    labels: np.ndarray   # the id itself where it is trained (no shift yet), else IGNORE
    pool_id: np.ndarray  # turn whose guidance the position is averaged into, or -1
    use_id: np.ndarray   # turn whose generated weights the position uses, or -1
    turns: int
    image: str | None    # the picture's path
    record: str          # what to call it in a message


def record_name(record, index):
    """What messages call a record: its place in the file and, if it has one, its id."""
    known = isinstance(record, dict) and "id" in record
    return f"record {index} (id {record['id']})" if known else f"record {index}"


def front_tag(text):
    """`text` with one tag, in front: "Q\\n<image>" and "<image>\\nQ" are the same question."""
    return f"{TAG}\n{text.replace(TAG, '').strip()}".strip()


def check_messages(messages, name):
    """UserError unless `messages` is a list of texts from human and gpt in turn."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{name}: expected a non-empty list `conversations`")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise UserError(f'{name}: message {i} is not of the form {{"from": role, "value": text}}')
        role, due = message.get("from"), ("human", "gpt")[i % 2]
        if role not in ("human", "gpt"):
            raise UserError(f"{name}: message {i} has the role {role!r}, expected human or gpt")
        if role != due:
            raise UserError(f"{name}: message {i} is from {role}, expected {due}: roles take turns")
        if re.search("[\ud800-\udfff]", message["value"]):
            raise UserError(f"{name}: message {i} is no valid Unicode (half of a surrogate pair)")


def conversation(record, name):
    """The turns [(question, answer), ...] of a LLaVA record, "<image>\\n" before the picture's.

    A last question without an answer is left out. Raises UserError with `name` on a malformed record,
    and where LLaVA goes on: a picture that no position refers to, a tag that has no picture.
    """
    if not isinstance(record, dict):
        raise UserError(f"{name}: expected an object, found {type(record).__name__}")
    image, messages = record.get("image"), record.get("conversations")
    if image is not None and not (isinstance(image, str) and image):
        raise UserError(f"{name}: `image` is {image!r}, expected the path of one picture")
    check_messages(messages, name)
    texts = [m["value"] for m in messages[:len(messages) // 2 * 2]]
    if not texts:
        raise UserError(f"{name}: no answer to learn from")
    tagged = [i for i, text in enumerate(texts) if TAG in text]
    if tagged and image is None:
        raise UserError(f"{name}: {TAG} in message {tagged[0]}, but no picture")
    if image is not None and not tagged:
        raise UserError(f"{name}: a picture, but no {TAG} in any answered question")
    if len(tagged) > 1:
        raise UserError(f"{name}: {TAG} in messages {', '.join(map(str, tagged))}, but one picture")
    if tagged and tagged[0] % 2:
        raise UserError(f"{name}: {TAG} in message {tagged[0]}, which is an answer")
    texts = [front_tag(text) if TAG in text else text for text in texts]
    return list(zip(texts[::2], texts[1::2]))


def pieces(turns, layout, name):
    """[(text, part, turn), ...] in reading order: the one place that knows the templates.

    `part` is "system", "prompt" or "answer"; a text of None is the picture, an answer of None is still
    to come. Pieces are encoded apart, each with the space before it. Raises UserError if `plain` is
    given anything but a picture and its caption.
    """
    if layout.template == "plain":
        if len(turns) != 1 or TAG not in turns[0][0]:
            raise UserError(f"{name}: the template plain takes one picture and its caption")
        caption = turns[0][1]
        # The question is dropped, and there is no eos: the newline ends a caption
        return [(None, "prompt", 0)] + ([] if caption is None else [(caption + "\n", "answer", 0)])
    found = [(layout.system, "system", 0)] if layout.system else []
    for turn, (question, answer) in enumerate(turns):
        before, tag, after = f"USER: {question} ASSISTANT:".partition(TAG)
        found.append((before, "prompt", turn))
        if tag:
            found += [(None, "prompt", turn), (after, "prompt", turn)]
        if answer is not None:
            found.append((answer, "answer", turn))
    return found


def lay_out(turns, tokenizer, layout, record, image=None):
    """The whole `Sample` of turns, of any length; an answer of None ends it where the answer begins."""
    ids, answer, pooled, use = [tokenizer.bos], [False], [layout.pool == "prompt"], [0]
    for text, part, turn in pieces(turns, layout, record):
        new = [IMAGE] * layout.image_tokens if text is None else tokenizer.encode(text)
        if part == "answer" and layout.template == "v1":
            new = new + [tokenizer.eos]
        own = part == "prompt" and text is not None
        ids += new
        answer += [part == "answer"] * len(new)
        pooled += [own or (layout.pool == "prompt" and part != "answer")] * len(new)
        use += [turn] * len(new)
    ids, use = np.array(ids, np.int64), np.array(use, np.int64)
    if layout.template == "plain":  # nobody asked: there is no guidance, and no generated weights
        pool = use = np.full_like(ids, -1)
    else:
        pool = np.where(pooled, use, -1)
    return Sample(ids, np.where(answer, ids, IGNORE), pool, use, max(len(turns), 1), image, record)


def encode(turns, tokenizer, layout, record, image=None):
    """The `Sample` to train on of turns [(question, answer), ...], cut to the context on the right.

    Raises UserError naming `record` if the cut goes through the picture or leaves nothing to learn.
    """
    whole = lay_out(turns, tokenizer, layout, record, image)
    cut = [a[:layout.context] for a in (whole.ids, whole.labels, whole.pool_id, whole.use_id)]
    kept, due = (cut[0] == IMAGE).sum(), (whole.ids == IMAGE).sum()
    if 0 < kept < due:
        raise UserError(f"{record}: the context of {layout.context} ends within the picture, "
                        f"after {kept} of {due} positions")
    if (cut[1] == IGNORE).all():
        raise UserError(f"{record}: no answer within the context of {layout.context}")
    # A picture whose turn was cut away is not shown either; one that takes no positions is
    return Sample(*cut, max(int(cut[3].max()) + 1, 1), image if kept == due else None, record)


def encode_prompt(turns, question, tokenizer, layout, image=None, record="the prompt"):
    """The `Sample` of answered turns and a question, up to where its answer begins; nothing is trained.

    The picture, of path `image`, stands where a question says <image>, else before the first one. The
    ids are a prefix of those that `encode` gives the same turns with the answer. Raises UserError on an
    empty question (but for `plain`, which has none), a tag without a picture, and a prompt beyond the
    context.
    """
    if layout.template == "v1" and not question.replace(TAG, "").strip():
        raise UserError(f"{record} is empty")
    questions, answers = [q for q, _ in turns] + [question], [a for _, a in turns] + [None]
    tagged = [i for i, text in enumerate(questions) if TAG in text] or [0] * (image is not None)
    if tagged and image is None:
        raise UserError(f"{record}: {TAG}, but no picture")
    if len(tagged) > 1:
        raise UserError(f"{record}: {TAG} in {len(tagged)} questions, but one picture")
    for i in tagged:
        questions[i] = front_tag(questions[i])
    sample = lay_out(list(zip(questions, answers)), tokenizer, layout, record, image)
    if len(sample.ids) > layout.context:
        raise UserError(f"{record} takes {len(sample.ids)} positions, "
                        f"the context holds {layout.context}")
    sample.labels[:] = IGNORE
    return sample


# 4. The data set

def load_records(path):
    """The list in a LLaVA JSON file; UserError if it is missing, not JSON, not a list, or empty."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: there is no such file")
    try:
        with open(path, encoding="utf-8") as f:
            records = json.load(f)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(records, list) or not records:
        raise UserError(f"{path}: expected a non-empty list of records")
    return records


def image_path(images, image, name):
    """The path of a record's picture in the folder `images`; UserError if it leads out.

    Links inside the folder are followed: they are the user's own, and many keep coco/ on another disk.
    """
    if os.path.isabs(image) or ".." in image.split("/") or "\0" in image or os.path.normpath(image) == ".":
        raise UserError(f"{name}: the picture {image} is not inside {images}")
    return os.path.join(images, image)


class Conversations:
    """The conversations of a LLaVA JSON file, encoded when asked for: `len(c)`, `c[i]` -> `Sample`.

    Records lie in one flat array rather than as objects, so that worker processes share them: a Python
    object's page is copied by a mere look at it, for that counts a reference.
    Raises UserError on a malformed file or record, at once.
    """

    def __init__(self, json_path, images, tokenizer, layout=Layout()):
        records = load_records(json_path)
        for i, record in enumerate(records):
            conversation(record, record_name(record, i))
        lines = [json.dumps(record).encode() for record in records]
        self.ends = np.cumsum([len(line) for line in lines])
        self.bytes = np.frombuffer(b"".join(lines), np.uint8)
        self.images, self.tokenizer, self.layout = images, tokenizer, layout

    def __len__(self):
        return len(self.ends)

    def record(self, i):
        """The record itself, a dict as in the file."""
        start = self.ends[i - 1] if i else 0
        return json.loads(self.bytes[start:self.ends[i]].tobytes())

    def image_path(self, record, name):
        """Where the record's picture lies, or None if it has none; UserError if outside the folder."""
        image = record.get("image")
        return None if image is None else image_path(self.images, image, name)

    @property
    def lengths(self):
        """int64[n], the size of each record in bytes: close enough to its tokens to group samples by."""
        return np.diff(self.ends, prepend=0)

    def pictures(self):
        """Paths of all pictures, each once, in the order of the file."""
        found = (self.image_path(self.record(i), f"record {i}") for i in range(len(self)))
        return list(dict.fromkeys(path for path in found if path is not None))

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        record = self.record(i)
        name = record_name(record, i)
        turns, image = conversation(record, name), self.image_path(record, name)
        return encode(turns, self.tokenizer, self.layout, name, image)


@dataclass
class Batch:
    ids: torch.Tensor      # int64[B, T], padded on the right
    pool_id: torch.Tensor  # int64[B, T], -1 on padding
    use_id: torch.Tensor   # int64[B, T], -1 on padding
    turns: int             # U, of the row that has the most
    lengths: torch.Tensor  # int64[B], positions of each row that are no padding
    visual: torch.Tensor   # float[M, 3, S, S] pixels or float[M, N, C] features, in the rows' order
    at: torch.Tensor       # int64[P] flat positions b * T + i whose next token is trained
    target: torch.Tensor   # int64[P] those next tokens; IGNORE where P was padded
    records: list[str]

    @property
    def trained(self):
        """The number of supervised tokens."""
        return int((self.target != IGNORE).sum())

    def to(self, device):
        """The same batch with its tensors on `device`."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
                        for k, v in fields.items()})


def pad_right(rows, value, multiple=1):
    """int64[B, T] of int64[T_b] arrays, T a multiple of `multiple`."""
    out = np.full((len(rows), -(-max(map(len, rows)) // multiple) * multiple), value, np.int64)
    for row, values in zip(out, rows):
        row[:len(values)] = values
    return torch.from_numpy(out)


def collate(samples, visual, blank, pad=0, multiple=1):
    """The `Batch` of samples and of the pictures of those that have one, in order.

    visual  list of float[3, S, S] pixels or float[N, C] features
    blank   the shape of one of them: a batch without pictures brings one of zeros that no position
            refers to, so that every rank runs every part of a sharded model
    multiple  T is padded to a multiple of it, and P of four times it (with target IGNORE): kernels are chosen,
            and on a CPU compiled, for each new shape, which may cost more than the padding
    """
    named = sum(s.image is not None for s in samples)
    assert len(visual) == named, f"{len(visual)} pictures for {named} samples that name one"
    ids = pad_right([s.ids for s in samples], pad, multiple)
    labels = pad_right([s.labels for s in samples], IGNORE, multiple)
    # The label shift, here and nowhere else: position i is trained to say what stands at i + 1.
    # <s> USER: hi ASSISTANT: hello </s>  is trained on  ASSISTANT: -> hello  and  hello -> </s>
    b, i = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    at, target, more = b * ids.shape[1] + i, labels[b, i + 1], -len(b) % (4 * multiple) if multiple > 1 else 0
    return Batch(
        ids=ids,
        pool_id=pad_right([s.pool_id for s in samples], -1, multiple),
        use_id=pad_right([s.use_id for s in samples], -1, multiple),
        turns=max(s.turns for s in samples),
        lengths=torch.tensor([len(s.ids) for s in samples]),
        visual=torch.stack(visual) if visual else torch.zeros(1, *blank),
        at=F.pad(at, (0, more)),
        target=F.pad(target, (0, more), value=IGNORE),
        records=[s.record for s in samples],
    )


def check_causal(labels, pool_id, use_id):
    """AssertionError if guidance could tell a trained position what is yet to come.

    All int64[B, T], labels unshifted. What position i attends to, if trained to predict i + 1, must run
    through weights whose guidance was pooled from positions up to i.
    """
    rows = zip(labels.tolist(), pool_id.tolist(), use_id.tolist())
    for b, (label, pool, use) in enumerate(rows):
        last = {turn: j for j, turn in enumerate(pool) if turn >= 0}  # where each turn's pooling ends
        latest = -1
        for i in range(len(label) - 1):
            latest = max(latest, last.get(use[i], -1))
            assert label[i + 1] == IGNORE or latest <= i, \
                f"row {b}: position {i} is trained, but its guidance reaches to position {latest}"


class Order:
    """Which samples make which step: a function of seed and step alone, the same for any number of ranks.

    The epochs' permutations follow one another and are cut into steps of `batch_size`. With `lengths` (any measure,
    one number a sample), samples of like length share a step, so that less is padded: within runs of GROUP steps the
    permutation is sorted by length, then the steps of the whole epoch are mixed.
    """
    GROUP = 32

    def __init__(self, n, seed, batch_size, lengths=None):
        self.n, self.seed, self.batch_size, self.lengths = n, seed, batch_size, lengths
        self.epoch = functools.lru_cache(maxsize=2)(self.epoch)

    def epoch(self, epoch):
        """int64[n], the order of the samples in an epoch."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.n)
        if self.lengths is None:
            return order
        first = min(-epoch * self.n % self.batch_size, self.n)  # these complete the last step of the epoch before
        last = first + (self.n - first) // self.batch_size * self.batch_size
        run = self.GROUP * self.batch_size
        runs = [order[i:min(i + run, last)] for i in range(first, last, run)]
        runs = [r[np.argsort(self.lengths[r], kind="stable")] for r in runs]
        steps = np.concatenate(runs).reshape(-1, self.batch_size) if runs else order[:0].reshape(0, self.batch_size)
        return np.concatenate([order[:first], rng.permutation(steps).ravel(), order[last:]])

    def step(self, step):
        """list[int] of the samples of optimiser step `step`."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self.epoch(place // self.n)[place % self.n]) for place in places]


# 5. Looking at data

@dataclass
class Options:
    """Look at training data: --check finds what is bad in it, --show N prints what the model reads."""
    data: str = ""            # LLaVA's JSON file
    images: str = ""          # folder that its pictures' paths start from
    llm: str = ""             # folder with the tokenizer, for --show
    check: bool = False       # list malformed records, missing and unreadable pictures; exit 1 if any
    show: int = 0             # how many conversations to print, the trained part in [[ ]]
    json: bool = False        # with --show: ids, labels, pool_id and use_id as JSON lines
    template: Literal["plain", "v1"] = "v1"  # plain for stage 1, v1 for stage 2
    system: str = SYSTEM      # the text before the first turn
    image_tokens: int = 576   # positions of a picture
    context: int = 2048       # positions of a sample
    guidance_pool: Literal["instruction", "prompt"] = "instruction"  # what guidance is averaged over


def fault(images, index, record):
    """What is wrong with a record or its picture, in one line, or None."""
    name = record_name(record, index)
    try:
        conversation(record, name)
        if record.get("image") is not None:
            open_image(image_path(images, record["image"], name), f"{name}: {record['image']}")
    except UserError as error:
        return str(error)


def check(path, images):
    """Print a line for every fault in a data set; UserError with their number if there is one."""
    records = load_records(path)
    faults = 0
    with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
        for start in range(0, len(records), 256):  # in slices: Ctrl-C waits for what was handed over
            part = range(start, min(start + 256, len(records)))
            for line in pool.map(lambda i: fault(images, i, records[i]), part):
                if line:
                    print(line, flush=True)
                    faults += 1
    if faults:
        raise UserError(f"{faults} of {len(records)} records cannot be used")
    pictures = sum(record.get("image") is not None for record in records)
    print(f"{len(records)} records, {pictures} with a picture: all readable")


def readable(sample, tokenizer):
    """The text of a sample: <s> and </s> spelt out, the picture as a tag, the trained part in [[ ]]."""
    names = {IMAGE: TAG, tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    text = ""
    marked = zip((sample.labels != IGNORE).tolist(), sample.ids.tolist())
    for trained, part in itertools.groupby(marked, key=lambda pair: pair[0]):
        runs = itertools.groupby((i for _, i in part), key=names.get)
        spelt = "".join(name or tokenizer.decode(list(run)) for name, run in runs)
        text += f" [[{spelt}]]" if trained else spelt
    return text


def show(options):
    """Print the first samples of a data set, as text or as JSON lines."""
    layout = Layout(options.template, options.system, options.image_tokens, options.context,
                    options.guidance_pool)
    data = Conversations(options.data, options.images, Tokenizer.load(options.llm), layout)
    for i in range(min(options.show, len(data))):
        sample = data[i]
        if options.json:
            fields = dataclasses.asdict(sample).items()
            print(json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields}))
        else:
            trained = int((sample.labels != IGNORE).sum())
            print(f"--- {sample.record}, picture {sample.image}, "
                  f"{len(sample.ids)} positions, {trained} trained")
            print(readable(sample, data.tokenizer))


def run():
    options = Options(**parse(Options))
    needed = ["data", "images"] + ["llm"] * (options.show > 0)
    missing = [f"--{name}" for name in needed if not getattr(options, name)]
    if not (options.check or options.show > 0) or missing:
        raise UserError(f"say --check or --show N, with --data and --images (and --llm to show); "
                        f"missing: {', '.join(missing) or '--check or --show'}")
    if options.check:
        check(options.data, options.images)
    if options.show > 0:
        show(options)


if __name__ == "__main__":
    main(run)
