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
import codecs
import collections
import dataclasses
import functools
import itertools
import json
import os
import re
import struct
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from cli import UserError, main, parse
from model import IMAGE

MULTIPLE = 16   # what training pads sequences to a multiple of, see `collate`
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
        spec = json.loads(self.file)
        self.added = {t["id"] for t in spec["added_tokens"]}
        # Without added tokens, text cannot be taken for them; a flag would be lost in a worker's pickle
        spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self.inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.vocab = 1 + max(self.inner.get_vocab().values())  # ids from here on are no text: added tokens, padding rows
        first = spec["pre_tokenizer"] or {}
        if first.get("type") == "Metaspace" and first["prepend_scheme"] != "never" and not first["split"]:
            # Newer files of transformers: a text that begins with a space gets no other. With sentencepiece it does
            self.inner.pre_tokenizer, self.inner.normalizer = None, spaces_of_llama()
        probe = "  A b\n\U000f0000"
        if spec["model"]["type"] != "BPE" or self.decode(self.encode(probe)) != probe:
            raise UserError("the tokenizer is not one of Llama's kind: a BPE, ▁ for spaces, bytes for the unknown")

    @classmethod
    def load(cls, folder):
        """The tokenizer of a model's folder; UserError if there is none or it cannot be read.

        Reads tokenizer.json if there is one, else tokenizer.model. The first knows of more: llava-hf's adds <image> and
        <pad>, which tokenizer.model lacks, to the ids. On text the two agree.
        """
        path, model = os.path.join(folder, "tokenizer.json"), os.path.join(folder, "tokenizer.model")
        if not os.path.isfile(path):
            if not os.path.isfile(model):
                raise UserError(f"neither tokenizer.json nor tokenizer.model in {folder}")
            return cls(of_sentencepiece(model))
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
        stream = self.streaming()
        return "".join(stream.add(i) for i in ids) + stream.end()

    def streaming(self):
        """A `Streaming` for the ids of a text that is yet to come."""
        return Streaming(self)


class Streaming:
    """The text of ids that come one by one: all that `add` and `end` return, in a row, is `decode` of the ids.

    A character of several ids comes when it is whole; a byte that belongs to no character is one U+FFFD, as in
    sentencepiece. Each id costs its own piece only.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.begun = tokenizer, False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def add(self, id):
        """str that is certain now, possibly empty, of one more id (int, or a tensor or array of one)."""
        id = int(id)
        piece = "" if id in self.tokenizer.added else self.tokenizer.inner.id_to_token(id) or ""
        if piece and not self.begun:  # the space that Llama puts before any text
            self.begun, piece = True, piece.removeprefix("▁")
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        return self.text(bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode())

    def end(self):
        """str that was held back: what is left of a character that never became whole."""
        return self.text(b"", final=True)

    def text(self, raw, final=False):
        """str of the next bytes, as far as they are whole characters."""
        return re.sub("[\udc80-\udcff]", "\ufffd", self.utf8.decode(raw, final))


def spaces_of_llama():
    """The normalizer that puts a space before any text, and writes spaces as "▁"."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def layout_of_llama(vocab, merges):
    """A BPE `tokenizers.Tokenizer` with Llama's surroundings: "▁" for spaces, bytes for the unknown."""
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    inner = tokenizers.Tokenizer(bpe)
    inner.normalizer = spaces_of_llama()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return inner


# sentencepiece's messages, {field number: (name, wire type)}, and what a setting that is left out means. See
# https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
MODEL = {1: ("pieces", 2), 2: ("trainer", 2), 3: ("normalizer", 2), 5: ("denormalizer", 2)}
PIECE = {1: ("text", 2), 2: ("score", 5), 3: ("type", 0)}
SETTINGS = {
    "trainer": {3: ("model_type", 0), 24: ("treat_whitespace_as_suffix", 0), 35: ("byte_fallback", 0)},
    "normalizer": {2: ("precompiled_charsmap", 2), 3: ("add_dummy_prefix", 0), 4: ("remove_extra_whitespaces", 0),
                   5: ("escape_whitespaces", 0)},
    "denormalizer": {2: ("precompiled_charsmap", 2)}}
DEFAULTS = {"model_type": 1, "treat_whitespace_as_suffix": 0, "byte_fallback": 0, "precompiled_charsmap": b"",
            "add_dummy_prefix": 1, "remove_extra_whitespaces": 1, "escape_whitespaces": 1}
LLAMA = DEFAULTS | {"model_type": 2, "byte_fallback": 1, "remove_extra_whitespaces": 0}  # type 2 is BPE
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of pieces; 4 is user-defined, 5 unused


def wire(message, fields):
    """Yield (name, value) of those fields of a protobuf message that `fields` lists; ValueError if it is damaged.

    A value is an int where the wire type is 0, else bytes. See https://protobuf.dev/programming-guides/encoding
    """
    at = 0

    def take(size):
        nonlocal at
        at += size
        if at > len(message):
            raise ValueError("it ends too early")
        return message[at - size:at]

    def varint():
        value = 0
        for shift in range(0, 64, 7):
            byte = take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a number has no end")

    while at < len(message):
        number, kind = divmod(varint(), 8)
        name, due = fields.get(number, (None, kind))
        if kind not in (0, 1, 2, 5) or kind != due:
            raise ValueError(f"field {number} has wire type {kind}")
        value = varint() if kind == 0 else take({1: 8, 5: 4}.get(kind) or varint())
        if name is not None:
            yield name, value


def read_sentencepiece(path):
    """[(text, score, type), ...] of the pieces of a sentencepiece model, in the order of their ids.

    Raises UserError if the file is damaged, and if a setting is not as in Llama's, which it names.
    """
    with open(path, "rb") as f:
        model = f.read()
    pieces, settings = [], dict(DEFAULTS)
    try:
        for part, message in wire(model, MODEL):
            if part == "pieces":
                piece = {"text": b"", "score": bytes(4), "type": NORMAL} | dict(wire(message, PIECE))
                pieces.append((piece["text"].decode(), struct.unpack("<f", piece["score"])[0], piece["type"]))
            else:
                settings |= wire(message, SETTINGS[part])
        texts = {text for text, _, _ in pieces}
        if not texts or "" in texts or len(texts) < len(pieces):
            raise ValueError("pieces are missing, empty or there twice")
    except ValueError as error:
        raise UserError(f"{path}: damaged, or no sentencepiece model ({error})") from None
    differs = [name for name, value in LLAMA.items() if settings[name] != value]
    if differs:
        raise UserError(f"{path}: not a model of Llama's kind, which alone is read; it differs in {', '.join(differs)}")
    return pieces


def of_sentencepiece(path):
    """The `tokenizers.Tokenizer` that gives the ids of a sentencepiece model like Llama's tokenizer.model.

    Sentencepiece joins, again and again, the two neighbours that make the piece of the highest score, and of equals the
    first in the text. So the merges of a piece are all its cuts in two, and those of a higher score go first.
    Raises UserError if the file is damaged, and if it holds pieces for which this does not give the same ids.
    """
    pieces = read_sentencepiece(path)
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    longer = [text for text in scores if len(text) > 1]
    longer.sort(key=lambda text: (scores[text], len(text)), reverse=True)
    # Llama's runs of spaces share a score. The longest first: so a run grows from the left, like sentencepiece's
    fits = lambda a, b: scores[a] > scores[b] or (scores[a] == scores[b] and set(a) == set(b) == {a[0]})
    bytes_ = {text for text, _, kind in pieces if kind == BYTE}
    for odd, found in (
            ("is user-defined or unused", (t for t, _, kind in pieces if kind not in (NORMAL, UNKNOWN, CONTROL, BYTE))),
            ("has the score of another", (a for a, b in itertools.pairwise(longer) if not fits(a, b))),
            ("has a character that is no piece", (text for text in longer if not set(text) <= scores.keys())),
            ("is missing", (name for name in (f"<0x{b:02X}>" for b in range(256)) if name not in bytes_))):
        if (text := next(found, None)) is not None:
            raise UserError(f"{path}: not a model of Llama's kind, which alone is read: the piece {text!r} {odd}")
    # The order among one piece's cuts is free: as long as nothing crosses its ends, its text is joined alike everywhere
    merges = [(text[:i], text[i:]) for text in longer for i in range(1, len(text))
              if text[:i] in scores and text[i:] in scores]
    inner = layout_of_llama({text: i for i, (text, _, _) in enumerate(pieces)}, merges)
    inner.add_special_tokens([text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
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


def conversation(record, name):
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


def lay_out(turns, tokenizer, layout, record, image=None):
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


def cut(whole, context):
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
    return cut(lay_out(turns, tokenizer, layout, record, image), layout.context)


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
    turns = conversation(record, name)
    image = record.get("image")
    pieces(turns, layout, name, image is not None)  # refuses what the template cannot take
    return name, turns, None if image is None else image_path(images, image, name)


class Conversations:
    """The conversations of a LLaVA JSON file, encoded when asked for: `len(c)`, `c[i]` -> `Sample`.

    `pictured` bool[n] tells which of them are about a picture.

    Records lie in one flat array rather than as objects, so that worker processes share them: a Python
    object's page is copied by a mere look at it, for that counts a reference.
    Raises UserError on a malformed file or record, at once.
    """

    def __init__(self, json_path, images, tokenizer, layout=Layout()):
        records = load_records(json_path)
        self.pictured = np.array([read_record(record, i, images, layout)[2] is not None for i, record in enumerate(records)])
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
    picture: torch.Tensor  # int64[B], which of `visual` a row is about; -1: none
    tag: torch.Tensor      # int64[B], see Sample

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
    shown = torch.tensor([s.image is not None for s in samples])
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
        picture=(shown.cumsum(0) - 1).masked_fill(~shown, -1),
        tag=torch.tensor([s.tag for s in samples]),
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


def padding(lengths, batches, multiple=MULTIPLE):
    """The share of padding among the positions of batches, [[index, ...], ...] of samples with lengths int64[n], see `collate`."""
    places = sum(len(b) * -(-int(lengths[b].max()) // multiple) * multiple for b in batches)
    return 1 - sum(int(lengths[b].sum()) for b in batches) / places


class Order:
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


# 5. Looking at data

@dataclass
class Options:
    """Look at training data: --check finds what is bad in it, --show N prints what the model reads."""
    data: str = ""            # LLaVA's JSON file
    images: str = ""          # folder that its pictures' paths start from
    llm: str = ""             # folder with the tokenizer: for --show, and for --check to count what the context cuts
    check: bool = False       # list malformed records, missing and unreadable pictures; exit 1 if any; count the rest
    show: int = 0             # how many conversations to print, the trained part in [[ ]]
    json: bool = False        # with --show: ids, labels, pool_id and use_id as JSON lines
    template: Literal["plain", "v1"] = "v1"  # plain for stage 1, v1 for stage 2
    system: str = SYSTEM      # the text before the first turn
    image_tokens: int = 576   # positions of a picture; 0 for VLoRA
    context: int = 2048       # positions of a sample
    guidance_pool: Literal["instruction", "prompt"] = "instruction"  # what guidance is averaged over

    def __post_init__(self):
        if self.context < 1 or self.image_tokens < 0:
            raise UserError(f"--context {self.context} --image_tokens {self.image_tokens}: expected at least 1, and at least 0")
        if re.search("[\ud800-\udfff]", self.system):
            raise UserError("--system is no valid Unicode")

    def layout(self):
        return Layout(self.template, self.system, self.image_tokens, self.context, self.guidance_pool)


def kinds(record):
    """What `check` counts a well-formed record as. Of the last three kinds LLaVA learns nothing, without a word."""
    said = {who: [m["value"] for m in record["conversations"] if m["from"] == who] for who in ("human", "gpt")}
    questions, answers = said["human"], said["gpt"]
    texts, pictured = questions + answers, record.get("image") is not None
    found = {
        "with a picture": pictured,
        "of text only": not pictured,
        f"with {TAG} as text: there is no picture for it": any(TAG in t for t in (answers if pictured else texts)),
        f"with several {TAG} in a question: one picture": pictured and any(text.count(TAG) > 1 for text in questions),
        "beginning with an answer: left out": record["conversations"][0]["from"] == "gpt",
        "ending with a question: left out": record["conversations"][-1]["from"] == "human",
        "with an empty message: kept": "" in texts,
        "with </s>, <unk> or ASSISTANT: in a message: text": re.search("</s>|<unk>| ASSISTANT: ", "\n".join(texts))}
    return [kind for kind, true in found.items() if true]


def cut_kinds(turns, tokenizer, layout, name, image):
    """The kinds of a record that the context cuts."""
    whole = lay_out(turns, tokenizer, layout, name, image)
    due = (whole.labels != IGNORE).sum()
    kept = (cut(whole, layout.context).labels != IGNORE).sum()
    lost = "cut by the context: its last answers are learned in part or not at all"
    return [lost if kept else "with no answer within the context: nothing to learn"] if kept < due else []


def check(o):
    """Print a line for every fault in a data set and how many records are of which kind; UserError if one is faulty."""
    records, layout, counts = load_records(o.data), o.layout(), collections.Counter()
    tokenizer = Tokenizer.load(o.llm) if o.llm else None

    @functools.cache  # a picture may have many records
    def unreadable(path):
        try:
            open_image(path, path)
        except UserError as error:
            return str(error)

    def look(i):
        """(the fault of record i or None, its kinds)"""
        try:
            name, turns, image = read_record(records[i], i, o.images, layout)
            if image is not None and unreadable(image):
                return f"{name}: {unreadable(image)}", []
            return None, kinds(records[i]) + (cut_kinds(turns, tokenizer, layout, name, image) if tokenizer else [])
        except UserError as error:
            return str(error), []

    # Pillow decodes outside the interpreter's lock
    with ThreadPoolExecutor() as pool, tqdm(total=len(records), unit=" records", disable=None) as bar:
        for start in range(0, len(records), 256):  # in slices: Ctrl-C waits for what was handed over
            part = range(start, min(start + 256, len(records)))
            for fault, found in pool.map(look, part):
                if fault:
                    bar.write(fault, file=sys.stdout)
                counts.update(["that cannot be used"] if fault else found)
            bar.update(len(part))
    print(f"{len(records)} records")
    for kind, count in counts.most_common():
        print(f"{count:>10} {kind}")
    if counts["that cannot be used"]:
        raise UserError(f"{counts['that cannot be used']} of {len(records)} records cannot be used")


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
    data = Conversations(options.data, options.images, Tokenizer.load(options.llm), options.layout())
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
    if not os.path.isdir(options.images):
        raise UserError(f"--images {options.images}: there is no such folder")
    if options.check:
        check(options)
    if options.show > 0:
        show(options)


if __name__ == "__main__":
    main(run)
