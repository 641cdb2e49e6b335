"""From files to batches: pictures, conversations with their labels, the data set, and batches.

A record of a LLaVA file becomes a `Sample` in one pass from left to right. Each piece of text is
encoded separately and appended, so the position of every part is known at once:

    ids      <s> system  USER:  <image> <image>  \nWhat is this? ASSISTANT:  A cat. </s>  USER: ...
    labels    -    -       -       -       -                 -                A cat. </s>    -
    pool_id   -    -       0       -       -                 0                  -     -      1
    use_id    0    0       0       0       0                 0                  0     0      1

A position is averaged into the guidance of turn `pool_id`, and it uses the weights that were
generated for turn `use_id`. A prompt is a prefix of the same prompt with its answer, so generation
sees exactly what training saw.

`python -m tools.check_data --data FILE --images FOLDER` checks a data set. Next: train.py.
"""
import json
import os
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from cli import UserError
from formats.json_files import read_json_list
from formats.pictures import check_size, eight_bits, flatten
from formats.records import check_record
from model import Batch

IMAGE = -200    # placeholder in `Sample.ids` for each image token; the value is LLaVA's
IGNORE = -100   # the label of a position that is not trained, as in F.cross_entropy
MULTIPLE = 16   # training pads sequences to a multiple of this, see `collate`
TAG = "<image>"
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
warnings.filterwarnings("ignore", module=r"PIL\.")  # `open_image` reports problems in one line


# 1. Pictures

@dataclass(frozen=True)
class Preprocess:
    size: int = 336                         # side of the square that CLIP reads, px
    mean: tuple[float, ...] = CLIP_MEAN     # per channel, of pixels in 0..1
    std: tuple[float, ...] = CLIP_STD
    aspect: Literal["pad", "crop"] = "pad"  # make a square by padding, or by a central crop
    background: Literal["none", "white"] = "none"  # behind transparent pixels; none: transparency
                                                   # is dropped


def open_image(file, name):
    """The first frame of a picture (a path or an open file) as a PIL image, fully loaded.

    In RGB, or in RGBA if it has transparency; `pixels` decides what becomes of that. As in LLaVA,
    EXIF orientation is ignored. Of deep grey 8 bits are kept; LLaVA clips it at 255.
    Raises UserError with `name` if the file is missing, damaged, far too large or not a picture.
    """
    # For a damaged file Pillow raises OSError, SyntaxError, ValueError, struct.error and others
    try:
        with Image.open(file) as image:
            check_size(image)
            image = eight_bits(image)
            return image.convert("RGBA" if image.has_transparency_data else "RGB")
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such picture") from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: unreadable picture (not a format that Pillow can read)") from None
    except Exception as error:
        raise UserError(f"{name}: unreadable picture ({type(error).__name__}: {error})") from None


def pad_square(image, mean):
    """`image` centred on a square of the mean colour; an extra pixel goes right or bottom."""
    side = max(image.size)
    colour = tuple(int(m * 255) for m in mean)  # truncated, as in LLaVA
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return canvas


def pixels(image, prep):
    """float32[3, S, S], normalised, from an RGB or RGBA image; as CLIPImageProcessor with Pillow.

    The shorter side is resized to S, then the centre is cropped.
    """
    image = flatten(image, prep.background)
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
    # A channel has only 256 values: normalise those, then look them up
    levels = np.arange(256, dtype=np.float32)[:, None] / 255                             # (256, 1)
    table = (levels - np.array(prep.mean, np.float32)) / np.array(prep.std, np.float32)  # (256, 3)
    x = np.empty((3, prep.size, prep.size), np.float32)
    for plane, values, channel in zip(x, table.T, image.split()):
        np.take(values, np.asarray(channel), out=plane, mode="clip")
    return torch.from_numpy(x)


# 2. Conversations

@dataclass(frozen=True)
class PromptFormat:
    """How a conversation becomes a sequence of positions."""
    template: Literal["plain", "v1"] = "v1"  # plain: picture, caption, newline; v1: Vicuna's turns
    system: str = SYSTEM                     # text before the first turn of v1; may be empty
    image_tokens: int = 576                  # positions of a picture; 0 for VLoRA
    context: int = 2048                      # longest sample, in positions; the rest is cut off
    # What the guidance of a turn is the mean of: the text from USER: to ASSISTANT: (without the
    # picture); all positions between the last answer and the next (in the first turn also bos, the
    # system text and the picture); or only the last of these, which has attended to all before it
    pool: Literal["instruction", "prompt", "last"] = "instruction"

    def __post_init__(self):
        if self.pool not in ("instruction", "prompt", "last"):  # as a checkpoint may have it
            raise UserError(f"guidance_pool {self.pool!r}: expected instruction, prompt or last")


@dataclass
class Sample:
    """One conversation as the model reads it; the arrays are int64[T]."""
    ids: np.ndarray      # IMAGE at the positions of the picture
    labels: np.ndarray   # the id itself where it is trained (not shifted yet), else IGNORE
    pool_id: np.ndarray  # turn whose guidance this position is averaged into, or -1
    use_id: np.ndarray   # turn whose generated weights this position uses, or -1
    turns: int
    image: str | None    # path of the picture
    record: str          # the name of the record in messages
    tag: int = -1        # where the picture begins (it may take no positions); -1: no picture


def record_name(record, index):
    """The name of a record in messages: its index in the file and, if it has one, its id."""
    has_id = isinstance(record, dict) and "id" in record
    return f"record {index} (id {record['id']})" if has_id else f"record {index}"


def front_tag(text):
    """`text` with one tag at the front: "Q\\n<image>" and "<image>\\nQ" are the same question."""
    return f"{TAG}\n{text.replace(TAG, '').strip()}".strip()


def refers_to_image(question):
    """Whether a tag is at either end, where LLaVA's data has it; elsewhere it is text,
    unless the record has a picture."""
    return question.strip().startswith(TAG) or question.strip().endswith(TAG)


def turns_of_record(record, name):
    """The turns [(question, answer), ...] of a LLaVA record; a tag is moved to the front.

    An answer before the first question is left out, and so is a last question without an answer.
    A tag is plain text in an answer, and inside a question of a record without a picture.
    Raises UserError with `name` for a malformed record, one without an answer, a picture whose tag
    is in none or in several of the answered questions, and a tag at an end of a question without a
    picture. What LLaVA does then: docs/data.md.
    """
    check_record(record, name)
    image, messages = record.get("image"), record["conversations"]
    first = 1 if messages[0]["from"] == "gpt" else 0
    texts = [m["value"] for m in messages[first:]]
    turns = list(zip(texts[::2], texts[1::2]))
    if not turns:
        raise UserError(f"{name}: no answer to train on")
    if image is None:
        if any(refers_to_image(question) for question, _ in turns):
            raise UserError(f"{name}: {TAG} in a question, but no picture")
        return turns
    tagged = sum(TAG in question for question, _ in turns)
    if tagged != 1:
        raise UserError(f"{name}: one picture, but {tagged or 'none'} of the answered questions "
                        f"contain {TAG}")
    return [(front_tag(q) if TAG in q else q, a) for q, a in turns]


def pieces(turns, prompt_format, name, has_image=True):
    """[(text, part, turn), ...] in reading order: the only place that spells out the templates.

    `part` is "system", "prompt" or "answer". A text of None is the picture. An answer of None is
    not written yet. Each piece is encoded separately, and the tokenizer begins each with a space,
    also "USER:" after </s> and the text after a picture. Without a picture, tags are plain text.
    Raises UserError if `plain` is given anything other than one picture with its caption.
    """
    if prompt_format.template == "plain":
        if len(turns) != 1 or TAG not in turns[0][0] or not has_image:
            raise UserError(f"{name}: the template plain takes one picture and its caption")
        caption = turns[0][1]
        # The question is dropped. The newline, not eos, ends a caption
        return [(None, "prompt", 0)] + ([] if caption is None else [(caption + "\n", "answer", 0)])
    found = [(prompt_format.system, "system", 0)] if prompt_format.system else []
    for turn, (question, answer) in enumerate(turns):
        prompt = f"USER: {question} ASSISTANT:"
        before, tag, after = prompt.partition(TAG) if has_image else (prompt, "", "")
        found.append((before, "prompt", turn))
        if tag:
            found += [(None, "prompt", turn), (after, "prompt", turn)]
        if answer is not None:
            found.append((answer, "answer", turn))
    return found


def encode_conversation(turns, tokenizer, prompt_format, name, image=None):
    """The `Sample` of all turns, not truncated; it ends where an answer of None would begin."""
    pool_all = prompt_format.pool != "instruction"
    ids, tag = [tokenizer.bos], -1
    spans = [(1, 0, False, pool_all)]  # length, turn, whether an answer, whether pooled
    for text, part, turn in pieces(turns, prompt_format, name, image is not None):
        new = [IMAGE] * prompt_format.image_tokens if text is None else tokenizer.encode(text)
        if part == "answer" and prompt_format.template == "v1":
            new = new + [tokenizer.eos]
        if text is None:
            tag = len(ids)
        # The causal rule: a turn's own question enters its guidance, an answer never does.
        is_question = part == "prompt" and text is not None
        is_pooled = is_question or (pool_all and part != "answer")
        spans.append((len(new), turn, part == "answer", is_pooled))
        ids += new
    lengths, *columns = map(np.array, zip(*spans))
    ids = np.array(ids, np.int64)
    use_id, is_answer, is_pooled = (np.repeat(values, lengths) for values in columns)
    if prompt_format.template == "plain":  # without a question: no guidance, no generated weights
        pool_id = use_id = np.full_like(ids, -1)
    else:
        pool_id = np.where(is_pooled, use_id, -1)
        if prompt_format.pool == "last":  # keep the last position of each prompt
            pool_id[:-1][pool_id[:-1] == pool_id[1:]] = -1
    labels = np.where(is_answer, ids, IGNORE)
    return Sample(ids, labels, pool_id, use_id, max(len(turns), 1), image, name, tag)


def truncate(sample, context):
    """The first `context` positions of a `Sample`; it ends before a picture that does not fit.

    A picture that is cut off is not passed to the model. If no answer begins within the context,
    nothing is trained.
    Raises UserError naming the record if the picture of the first turn does not fit.
    """
    image_at, end, image = np.flatnonzero(sample.ids == IMAGE), context, sample.image
    if len(image_at) and image_at[-1] >= context:
        if sample.use_id[image_at[0]] <= 0:  # the first turn, or a caption of `plain`
            raise UserError(f"{sample.record}: the context of {context} ends before the picture, "
                            f"which takes positions {image_at[0]} to {image_at[-1]}")
        end, image = min(context, image_at[0]), None
    elif sample.tag >= context:
        image = None
    use_id = sample.use_id[:end]
    return Sample(sample.ids[:end], sample.labels[:end], sample.pool_id[:end], use_id,
                  max(int(use_id.max()) + 1, 1), image, sample.record,
                  -1 if image is None else sample.tag)


def encode(turns, tokenizer, prompt_format, name, image=None):
    """The `Sample` to train on, from turns [(question, answer), ...], truncated to the context."""
    sample = encode_conversation(turns, tokenizer, prompt_format, name, image)
    return truncate(sample, prompt_format.context)


def encode_prompt(turns, question, tokenizer, prompt_format, image=None, name="the prompt"):
    """The `Sample` of answered turns and a new question; it ends where the answer will begin.

    The picture, with the path `image`, goes where a question has <image>, else before the first
    question. The ids are a prefix of what `encode` gives for the same turns with the answer.
    Nothing is trained.
    Raises UserError for an empty question (except with `plain`, which has none), for a tag at an
    end of a question without a picture, and for a prompt that is longer than the context.
    """
    if prompt_format.template == "v1" and not question.replace(TAG, "").strip():
        raise UserError(f"{name} is empty")
    questions, answers = [q for q, _ in turns] + [question], [a for _, a in turns] + [None]
    if image is None and any(map(refers_to_image, questions)):
        raise UserError(f"{name}: {TAG}, but no picture")
    if image is not None:
        tagged = [i for i, text in enumerate(questions) if TAG in text] or [0]
        if len(tagged) > 1:
            raise UserError(f"{name}: {TAG} in {len(tagged)} questions, but one picture")
        questions[tagged[0]] = front_tag(questions[tagged[0]])
    turns = list(zip(questions, answers))
    sample = encode_conversation(turns, tokenizer, prompt_format, name, image)
    if len(sample.ids) > prompt_format.context:
        raise UserError(f"{name} takes {len(sample.ids)} positions, "
                        f"but the context has {prompt_format.context}")
    sample.labels[:] = IGNORE
    return sample


# 3. The data set

def image_path(images, image, name):
    """The path of a record's picture in the folder `images`; UserError if it leads outside.

    `image` is relative to the folder, or absolute and inside it. Links inside the folder are
    followed: the user made them, often to keep coco/ on another disk.
    """
    inside = os.path.relpath(image, images) if os.path.isabs(image) else image
    outside = ".." in [*image.split("/"), *inside.split("/")]
    if outside or "\0" in image or os.path.normpath(inside) == ".":
        raise UserError(f"{name}: the picture {image!r:.200} is not inside {images}: expected a "
                        "path in the folder --images")
    return os.path.join(images, image)


def read_record(record, index, images, prompt_format, path=""):
    """(name, turns, path of the picture or None) of a record.

    Raises UserError if the record, of the file `path`, is malformed or does not fit the template.
    """
    name = record_name(record, index)
    label = f"{path} {name}".strip()
    turns = turns_of_record(record, label)
    image = record.get("image")
    pieces(turns, prompt_format, label, image is not None)  # raises if the template cannot take it
    return name, turns, None if image is None else image_path(images, image, label)


class Conversations:
    """The conversations of a LLaVA JSON file, encoded on access: `len(c)`, `c[i]` -> `Sample`.

    has_image  bool[n]  whether each conversation has a picture

    The records are stored in one flat array, not as objects, so that worker processes share them:
    touching a Python object changes its refcount and so copies its page in forked workers.
    Raises UserError for a malformed file or record when it is created.
    """

    def __init__(self, json_path, images, tokenizer, prompt_format=PromptFormat()):
        records = read_json_list(json_path)
        self.images, self.tokenizer, self.prompt_format = images, tokenizer, prompt_format
        self.has_image = np.array([
            read_record(record, i, images, prompt_format, json_path)[2] is not None
            for i, record in enumerate(records)])
        lines = [json.dumps(record).encode() for record in records]
        self.ends = np.cumsum([len(line) for line in lines])
        self.bytes = np.frombuffer(b"".join(lines), np.uint8)

    def __len__(self):
        return len(self.ends)

    def record(self, i):
        """Record i as a dict, as in the file."""
        start = self.ends[i - 1] if i else 0
        return json.loads(self.bytes[start:self.ends[i]].tobytes())

    def read(self, i):
        """(name, turns, path of the picture or None) of record i."""
        return read_record(self.record(i), i, self.images, self.prompt_format)

    @property
    def lengths(self):
        """int64[n], size of each record in bytes: a good enough estimate to group by length."""
        return np.diff(self.ends, prepend=0)

    def pictures(self):
        """Paths of all pictures, each once, in the order of the file."""
        paths = (self.read(i)[2] for i in range(len(self)))
        return list(dict.fromkeys(path for path in paths if path is not None))

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        name, turns, image = self.read(i)
        return encode(turns, self.tokenizer, self.prompt_format, name, image)


# 4. Batches

def pad_right(rows, value, multiple=1):
    """int64[B, T] of int64[T_b] arrays, T a multiple of `multiple`."""
    out = np.full((len(rows), -(-max(map(len, rows)) // multiple) * multiple), value, np.int64)
    for row, values in zip(out, rows):
        row[:len(values)] = values
    return torch.from_numpy(out)


def collate(samples, visual, blank=None, pad=0, multiple=1):
    """The `Batch` of samples and of the pictures of those that have one, in order.

    visual    list of float[3, S, S] pixels or float[N, C] features
    blank     shape of one of them: a batch without pictures gets a dummy of zeros that no position
              uses, so that all ranks run the same parts of a sharded model; None: it gets none
    multiple  T is padded to a multiple of it, and P to a multiple of 4 x `multiple`, with target
              IGNORE. Kernels are chosen anew for each shape: fewer shapes save more than the
              padding costs
    """
    expected = sum(s.image is not None for s in samples)
    assert len(visual) == expected, f"{len(visual)} pictures for {expected} samples with one"
    assert all(s.tag >= 0 for s in samples if s.image is not None), "a picture without a place"
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
