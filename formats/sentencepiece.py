"""Llama's tokenizer.model: read sentencepiece's protobuf file, and convert it to `tokenizers`.

Only models with Llama's settings can be read; others are refused by the name of the setting.
Next: llava.py.
"""
import itertools
import struct

import tokenizers
from tokenizers import decoders, models, normalizers

from cli import UserError

# The messages of https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto:
# {field number: (name, wire type)}
MESSAGES = {1: ("pieces", 2), 2: ("trainer", 2), 3: ("normalizer", 2), 5: ("denormalizer", 2)}
PIECE = {1: ("text", 2), 2: ("score", 5), 3: ("type", 0)}
SETTINGS = {
    "trainer": {3: ("model_type", 0), 24: ("treat_whitespace_as_suffix", 0),
                35: ("byte_fallback", 0)},
    "normalizer": {2: ("precompiled_charsmap", 2), 3: ("add_dummy_prefix", 0),
                   4: ("remove_extra_whitespaces", 0), 5: ("escape_whitespaces", 0)},
    "denormalizer": {2: ("precompiled_charsmap", 2)}}
DEFAULTS = dict(model_type=1, treat_whitespace_as_suffix=0, byte_fallback=0,
                precompiled_charsmap=b"", add_dummy_prefix=1, remove_extra_whitespaces=1,
                escape_whitespaces=1)
LLAMA_SETTINGS = DEFAULTS | dict(model_type=2, byte_fallback=1, remove_extra_whitespaces=0)  # BPE
BYTES = [f"<0x{b:02X}>" for b in range(256)]  # pieces for characters that have none of their own
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # types of pieces; 4 is user-defined, 5 is unused


# ---- The same kind of tokenizer in `tokenizers`


def llama_normalizer():
    """Puts a space before any text, and writes spaces as "▁"."""
    return normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])


def layout_of_llama(vocab, merges):
    """A BPE `tokenizers.Tokenizer` like Llama's: "▁" for spaces, bytes for unknown characters."""
    inner = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = llama_normalizer()
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                       decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return inner


# ---- Reading the file


def read_fields(message, fields):
    """Yield (name, value) of the fields of a protobuf message that `fields` lists.

    A value is an int for wire type 0, else bytes. Raises ValueError if the message is damaged.
    See https://protobuf.dev/programming-guides/encoding
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
        name, expected = fields.get(number, (None, kind))
        if kind not in (0, 1, 2, 5) or kind != expected:
            raise ValueError(f"field {number} has wire type {kind}")
        value = varint() if kind == 0 else take({1: 8, 5: 4}.get(kind) or varint())
        if name is not None:
            yield name, value


def read_sentencepiece(path):
    """[(text, score, type), ...] of the pieces of a sentencepiece model, in the order of their ids.

    Raises UserError if the file is damaged, or if a setting differs from Llama's.
    """
    with open(path, "rb") as f:
        model = f.read()
    pieces, settings = [], dict(DEFAULTS)
    try:
        for part, message in read_fields(model, MESSAGES):
            if part == "pieces":
                piece = {"text": b"", "score": bytes(4), "type": NORMAL}
                piece |= dict(read_fields(message, PIECE))
                score, = struct.unpack("<f", piece["score"])
                pieces.append((piece["text"].decode(), score, piece["type"]))
            else:
                settings |= read_fields(message, SETTINGS[part])
        texts = {text for text, _, _ in pieces}
        if not texts or "" in texts or len(texts) < len(pieces):
            raise ValueError("pieces are missing, empty or there twice")
    except ValueError as error:
        raise UserError(f"{path}: damaged, or not a sentencepiece model ({error})") from None
    differs = [name for name, value in LLAMA_SETTINGS.items() if settings[name] != value]
    if differs:
        raise UserError(f"{path}: only models of Llama's kind can be read; this one differs in "
                        f"{', '.join(differs)}")
    return pieces


# ---- Converting it


def odd_pieces(pieces, scores, longer):
    """Yield (piece, problem) for pieces with which merges would not give sentencepiece's ids."""
    yield from ((text, "is user-defined or unused") for text, _, kind in pieces
                if kind not in (NORMAL, UNKNOWN, CONTROL, BYTE))
    for a, b in itertools.pairwise(longer):
        same_run = scores[a] == scores[b] and set(a) == set(b) == {a[0]}
        if not (scores[a] > scores[b] or same_run):  # also where one is NaN
            yield a, "has the score of another"
    yield from ((text, "has a character that is not a piece") for text in longer
                if not set(text) <= scores.keys())
    held = {text for text, _, kind in pieces if kind == BYTE}
    yield from ((name, "is missing") for name in BYTES if name not in held)


def convert_sentencepiece(path):
    """A `tokenizers.Tokenizer` with the ids of a sentencepiece model like Llama's tokenizer.model.

    Sentencepiece repeatedly joins the two neighbours that make the piece with the highest score,
    the leftmost if several do. So the merges of a piece are all ways to cut it in two, and pieces
    with higher scores come first.
    Raises UserError if the file is damaged, or has pieces with which the ids would differ.
    """
    pieces = read_sentencepiece(path)
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    longer = [text for text in scores if len(text) > 1]
    # Llama's runs of spaces share a score. Longest first, so that a run grows from the left
    longer.sort(key=lambda text: (scores[text], len(text)), reverse=True)
    for text, problem in odd_pieces(pieces, scores, longer):
        raise UserError(f"{path}: only models of Llama's kind can be read; the piece {text!r} "
                        f"{problem}")
    # The cuts of one piece may be in any order: they give the same ids
    # as long as nothing crosses the ends of the piece
    merges = [(text[:i], text[i:]) for text in longer for i in range(1, len(text))
              if text[:i] in scores and text[i:] in scores]
    inner = layout_of_llama({text: i for i, (text, _, _) in enumerate(pieces)}, merges)
    inner.add_special_tokens([text for text, _, kind in pieces if kind in (UNKNOWN, CONTROL)])
    return inner
