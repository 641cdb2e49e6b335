"""TODO"""
import itertools
import struct

import tokenizers
from tokenizers import decoders, models, normalizers

from cli import UserError


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
MESSAGES = {1: ("pieces", 2), 2: ("trainer", 2), 3: ("normalizer", 2), 5: ("denormalizer", 2)}
PIECE = {1: ("text", 2), 2: ("score", 5), 3: ("type", 0)}


SETTINGS = {
    "trainer": {3: ("model_type", 0), 24: ("treat_whitespace_as_suffix", 0), 35: ("byte_fallback", 0)},
    "normalizer": {2: ("precompiled_charsmap", 2), 3: ("add_dummy_prefix", 0), 4: ("remove_extra_whitespaces", 0),
                   5: ("escape_whitespaces", 0)},
    "denormalizer": {2: ("precompiled_charsmap", 2)}}


DEFAULTS = {"model_type": 1, "treat_whitespace_as_suffix": 0, "byte_fallback": 0, "precompiled_charsmap": b"",
            "add_dummy_prefix": 1, "remove_extra_whitespaces": 1, "escape_whitespaces": 1}
LLAMA_SETTINGS = DEFAULTS | {"model_type": 2, "byte_fallback": 1, "remove_extra_whitespaces": 0}  # type 2 is BPE
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of pieces; 4 is user-defined, 5 unused


def read_fields(message, fields):
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
        for part, message in read_fields(model, MESSAGES):
            if part == "pieces":
                piece = {"text": b"", "score": bytes(4), "type": NORMAL} | dict(read_fields(message, PIECE))
                pieces.append((piece["text"].decode(), struct.unpack("<f", piece["score"])[0], piece["type"]))
            else:
                settings |= read_fields(message, SETTINGS[part])
        texts = {text for text, _, _ in pieces}
        if not texts or "" in texts or len(texts) < len(pieces):
            raise ValueError("pieces are missing, empty or there twice")
    except ValueError as error:
        raise UserError(f"{path}: damaged, or no sentencepiece model ({error})") from None
    differs = [name for name, value in LLAMA_SETTINGS.items() if settings[name] != value]
    if differs:
        raise UserError(f"{path}: not a model of Llama's kind, which alone is read; it differs in {', '.join(differs)}")
    return pieces


def convert_sentencepiece(path):
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
