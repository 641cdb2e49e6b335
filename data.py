"""What the model reads: pixels, tokens, conversations with their labels, and batches of them.

A record of a LLaVA file becomes a `Sample` in one pass, from left to right. Every piece of text is
encoded on its own and goes straight to its place, so that spans are known rather than found again by
tokenising twice:

    ids      <s> system  USER:  <image> <image>  \nWhat is this? ASSISTANT:  A cat. </s>  USER: ...
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
import json
import os
import re
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from cli import UserError
from model import Batch

MULTIPLE = 16   # what training pads sequences to a multiple of, see `collate`
IMAGE = -200   # the id of an image token in a Sample (LLaVA's IMAGE_TOKEN_INDEX); it is in no vocabulary
IGNORE = -100   # the label of a position that is not trained
TAG = "<image>"


SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
warnings.filterwarnings("ignore", module=r"PIL\.")  # `open_image` judges by itself, in one line
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

    Like LLaVA, does not turn the picture as its EXIF data may ask, and drops transparency rather than laying it over
    white. Of 16 bits it takes the upper 8, in grey too, where LLaVA has all that is above 255 white.
    Raises UserError with `name` if it is missing, no picture, damaged, or absurdly large.
    """
    # Pillow meets a damaged file with OSError, SyntaxError, ValueError, struct.error and more
    try:
        with Image.open(file) as image:
            # past this size Pillow only warns; it raises on its own at twice as much
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
            # padded to a square of 4 bytes a pixel, 1 x 65000 would take 17 GB
            if max(image.size) ** 2 > 4 * Image.MAX_IMAGE_PIXELS or max(image.size) > 1000 * min(image.size):
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, too many as a square or a strip")
            if image.mode.startswith("I"):  # I;16, I;16B, or I: grey of more than 8 bits
                grey = np.asarray(image)
                if grey.min() < 0 or grey.max() > 65535:
                    raise ValueError(f"grey from {grey.min()} to {grey.max()}, expected at most 16 bits")
                image = Image.fromarray((grey >> 8).astype(np.uint8))
            if image.mode == "F":
                raise ValueError("its pixels are fractions, which have no certain white: save it with 8 bits")
            return image.convert("RGB")
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such picture") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: unreadable picture (of no format that Pillow knows)") from None
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
    return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))        # (3, S, S)


# 3. Conversations

@dataclass(frozen=True)
class PromptFormat:
    """How a conversation is laid out as positions."""
    template: Literal["plain", "v1"] = "v1"  # plain: picture, caption, newline; v1: Vicuna's dialogue
    system: str = SYSTEM                     # what stands before the first turn of v1; may be empty
    image_tokens: int = 576                  # positions that a picture takes; VLoRA's take none
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
    tag: int = -1        # position of the picture or, where that takes none, of what stands behind it; -1: no picture


def record_name(record, index):
    """What messages call a record: its place in the file and, if it has one, its id."""
    known = isinstance(record, dict) and "id" in record
    return f"record {index} (id {record['id']})" if known else f"record {index}"


def front_tag(text):
    """`text` with one tag, in front: "Q\\n<image>" and "<image>\\nQ" are the same question."""
    return f"{TAG}\n{text.replace(TAG, '').strip()}".strip()


def wants_picture(question):
    """Whether a tag stands at an end of the question, where LLaVA's data has it: not one that is talked about."""
    return question.strip().startswith(TAG) or question.strip().endswith(TAG)


def check_messages(messages, name):
    """UserError unless `messages` is a list of texts from human and gpt, or gpt and human, in turn."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{name}: expected a non-empty list `conversations`")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise UserError(f'{name}: message {i} is not of the form {{"from": role, "value": text}}')
        role = message.get("from")
        if role not in ("human", "gpt"):
            raise UserError(f"{name}: message {i} has the role {role!r}, expected human or gpt")
        due = {"human": "gpt", "gpt": "human"}[messages[i - 1]["from"]] if i else role
        if role != due:
            raise UserError(f"{name}: message {i} is from {role}, expected {due}: roles take turns")
        if re.search("[\ud800-\udfff]", message["value"]):
            raise UserError(f"{name}: message {i} is no valid Unicode (half of a surrogate pair)")


def turns_of_record(record, name):
    """The turns [(question, answer), ...] of a LLaVA record, "<image>\\n" before the picture's.

    An answer before the first question is left out, and so is a last question without an answer. A tag in an answer is
    just text, and so is one inside a question where there is no picture. Raises UserError with `name` on a malformed
    record, and where LLaVA goes on: a picture that no position refers to, a tag that has no picture.
    """
    if not isinstance(record, dict):
        raise UserError(f"{name}: expected an object, found {type(record).__name__}")
    image, messages = record.get("image"), record.get("conversations")
    if image is not None and not (isinstance(image, str) and image):
        raise UserError(f"{name}: `image` is {image!r}, expected the path of one picture")
    check_messages(messages, name)
    texts = [m["value"] for m in messages[messages[0]["from"] == "gpt":]]
    questions, answers = texts[::2], texts[1::2]
    questions = questions[:len(answers)]
    if not answers:
        raise UserError(f"{name}: no answer to learn from")
    if image is None:
        if any(map(wants_picture, questions)):
            raise UserError(f"{name}: {TAG} in a question, but no picture")
        return list(zip(questions, answers))
    tagged = sum(TAG in question for question in questions)
    if tagged != 1:
        raise UserError(f"{name}: one picture, but {TAG} in {tagged or 'none'} of the answered questions")
    return [(front_tag(q) if TAG in q else q, a) for q, a in zip(questions, answers)]


def pieces(turns, layout, name, picture=True):
    """[(text, part, turn), ...] in reading order: the one place that knows the templates.

    `part` is "system", "prompt" or "answer"; a text of None is the picture, an answer of None is still to come. Pieces
    are encoded apart, each with the space before it: "USER:" after </s>, too, reads as at the start, and so does what
    stands behind a picture. Without a picture, tags are text.
    Raises UserError if `plain` is given anything but a picture and its caption.
    """
    if layout.template == "plain":
        if len(turns) != 1 or TAG not in turns[0][0] or not picture:
            raise UserError(f"{name}: the template plain takes one picture and its caption")
        caption = turns[0][1]
        # The question is dropped, and there is no eos: the newline ends a caption
        return [(None, "prompt", 0)] + ([] if caption is None else [(caption + "\n", "answer", 0)])
    found = [(layout.system, "system", 0)] if layout.system else []
    for turn, (question, answer) in enumerate(turns):
        asked = f"USER: {question} ASSISTANT:"
        before, tag, after = asked.partition(TAG) if picture else (asked, "", "")
        found.append((before, "prompt", turn))
        if tag:
            found += [(None, "prompt", turn), (after, "prompt", turn)]
        if answer is not None:
            found.append((answer, "answer", turn))
    return found


def encode_conversation(turns, tokenizer, layout, record, image=None):
    """The whole `Sample` of turns, of any length; an answer of None ends it where the answer begins."""
    ids, answer, pooled, use, tag = [tokenizer.bos], [False], [layout.pool == "prompt"], [0], -1
    for text, part, turn in pieces(turns, layout, record, image is not None):
        new = [IMAGE] * layout.image_tokens if text is None else tokenizer.encode(text)
        if part == "answer" and layout.template == "v1":
            new = new + [tokenizer.eos]
        tag = len(ids) if text is None else tag
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
    return Sample(ids, np.where(answer, ids, IGNORE), pool, use, max(len(turns), 1), image, record, tag)


def truncate(whole, context):
    """The first `context` positions of a `Sample`, or those before its picture if they would end within it.

    A picture that is cut away is not shown either. Where no answer begins early enough, nothing is left to learn.
    Raises UserError naming the record if not even a picture in the first turn has room.
    """
    picture, end, image = np.flatnonzero(whole.ids == IMAGE), context, whole.image
    if len(picture) and picture[-1] >= context:
        if whole.use_id[picture[0]] <= 0:
            raise UserError(f"{whole.record}: the context of {context} ends before the picture does, which takes the "
                            f"positions {picture[0]} to {picture[-1]}")
        end, image = min(context, picture[0]), None
    elif whole.tag >= context:
        image = None
    ids, labels, pool_id, use_id = (a[:end] for a in (whole.ids, whole.labels, whole.pool_id, whole.use_id))
    tag = -1 if image is None else whole.tag
    return Sample(ids, labels, pool_id, use_id, max(int(use_id.max()) + 1, 1), image, whole.record, tag)


def encode(turns, tokenizer, layout, record, image=None):
    """The `Sample` to train on of turns [(question, answer), ...], `cut` to the context, with its errors."""
    return truncate(encode_conversation(turns, tokenizer, layout, record, image), layout.context)


def encode_prompt(turns, question, tokenizer, layout, image=None, record="the prompt"):
    """The `Sample` of answered turns and a question, up to where its answer begins; nothing is trained.

    The picture, of path `image`, stands where a question says <image>, else before the first one. The
    ids are a prefix of those that `encode` gives the same turns with the answer. Raises UserError on an empty question
    (but for `plain`, which has none), a tag at an end of a question without a picture, and a prompt beyond the context.
    """
    if layout.template == "v1" and not question.replace(TAG, "").strip():
        raise UserError(f"{record} is empty")
    questions, answers = [q for q, _ in turns] + [question], [a for _, a in turns] + [None]
    if image is None and any(map(wants_picture, questions)):
        raise UserError(f"{record}: {TAG}, but no picture")
    if image is not None:
        tagged = [i for i, text in enumerate(questions) if TAG in text] or [0]
        if len(tagged) > 1:
            raise UserError(f"{record}: {TAG} in {len(tagged)} questions, but one picture")
        questions[tagged[0]] = front_tag(questions[tagged[0]])
    sample = encode_conversation(list(zip(questions, answers)), tokenizer, layout, record, image)
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
        with open(path, encoding="utf-8-sig") as f:  # some editors put a mark in front
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


def read_record(record, index, images, layout):
    """(name, turns, path of the picture or None) of a record; UserError if it is malformed, or unfit for the layout."""
    name = record_name(record, index)
    turns = turns_of_record(record, name)
    image = record.get("image")
    pieces(turns, layout, name, image is not None)  # refuses what the template cannot take
    return name, turns, None if image is None else image_path(images, image, name)


class Conversations:
    """The conversations of a LLaVA JSON file, encoded when asked for: `len(c)`, `c[i]` -> `Sample`.

    `has_image` bool[n] tells which of them are about a picture.

    Records lie in one flat array rather than as objects, so that worker processes share them: a Python
    object's page is copied by a mere look at it, for that counts a reference.
    Raises UserError on a malformed file or record, at once.
    """

    def __init__(self, json_path, images, tokenizer, layout=PromptFormat()):
        records = load_records(json_path)
        self.has_image = np.array([read_record(record, i, images, layout)[2] is not None for i, record in enumerate(records)])
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

    @property
    def lengths(self):
        """int64[n], the size of each record in bytes: close enough to its tokens to group samples by."""
        return np.diff(self.ends, prepend=0)

    def pictures(self):
        """Paths of all pictures, each once, in the order of the file."""
        found = (read_record(self.record(i), i, self.images, self.layout)[2] for i in range(len(self)))
        return list(dict.fromkeys(path for path in found if path is not None))

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        name, turns, image = read_record(self.record(i), i, self.images, self.layout)
        return encode(turns, self.tokenizer, self.layout, name, image)


def pad_right(rows, value, multiple=1):
    """int64[B, T] of int64[T_b] arrays, T a multiple of `multiple`."""
    out = np.full((len(rows), -(-max(map(len, rows)) // multiple) * multiple), value, np.int64)
    for row, values in zip(out, rows):
        row[:len(values)] = values
    return torch.from_numpy(out)


def collate(samples, visual, blank=None, pad=0, multiple=1):
    """The `Batch` of samples and of the pictures of those that have one, in order.

    visual    list of float[3, S, S] pixels or float[N, C] features
    blank     shape of one of them: a batch without pictures brings one of zeros that no position refers
              to, so that every rank runs every part of a sharded model; None: it brings none
    multiple  T is padded to a multiple of it, P to a multiple of four times it (with target IGNORE):
              kernels are chosen, and on a CPU compiled, for each new shape, which may cost more than
              the padding
    """
    expected = sum(s.image is not None for s in samples)
    assert len(visual) == expected, f"{len(visual)} pictures for {expected} samples with one"
    ids = pad_right([s.ids for s in samples], pad, multiple)
    labels = pad_right([s.labels for s in samples], IGNORE, multiple)
    has_image = torch.tensor([s.image is not None for s in samples])
    # The label shift, here and nowhere else: position i is trained to predict the token at i + 1.
    # <s> USER: hi ASSISTANT: hello </s>  is trained on  ASSISTANT: -> hello  and  hello -> </s>
    b, i = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    at, target = b * ids.shape[1] + i, labels[b, i + 1]
    more = -len(b) % (4 * multiple) if multiple > 1 else 0
    if not visual and blank is not None:
        visual = [torch.zeros(blank)]
    return Batch(
        ids=ids.clamp(min=0),
        lengths=torch.tensor([len(s.ids) for s in samples]),
        pool_id=pad_right([s.pool_id for s in samples], -1, multiple),
        use_id=pad_right([s.use_id for s in samples], -1, multiple),
        turns=max(s.turns for s in samples),
        visual=torch.stack(visual) if visual else None,
        image_at=(ids == IMAGE).flatten().nonzero()[:, 0],
        at=F.pad(at, (0, more)),
        target=F.pad(target, (0, more), value=IGNORE),
        picture=(has_image.cumsum(0) - 1).masked_fill(~has_image, -1),
        tag=torch.tensor([s.tag for s in samples]),
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
