"""Texts to train a tokenizer on, and small sentencepiece models, trained or put together by hand.
"""
import struct

import sentencepiece

from data import SYSTEM

QUESTIONS = ["What colour is the large circle?", "Is there a red square?",
             "How many triangles are there?"]
ANSWERS = ["red", "yes", "top left", "A cat.", "Black and white"]


TEXTS = ([f"USER: {q} ASSISTANT:" for q in QUESTIONS] + [f"\n{q} ASSISTANT:" for q in QUESTIONS]
         + ["USER: ", SYSTEM] + ANSWERS) * 20


def number(n):
    """The protobuf varint of a natural number."""
    return bytes([n]) if n < 128 else bytes([n % 128 + 128]) + number(n // 128)


def field(at, value):
    """A protobuf field: an int, a float, or bytes."""
    if isinstance(value, int):
        return number(at * 8) + number(value)
    if isinstance(value, float):
        return number(at * 8 + 5) + struct.pack("<f", value)
    return number(at * 8 + 2) + number(len(value)) + value


def message(fields):
    return b"".join(field(at, value) for at, value in fields)


def model_proto(pieces, trainer=((3, 2), (35, 1)),
                normalizer=((1, b"identity"), (3, 1), (4, 0), (5, 1)), more=b""):
    """A sentencepiece model of [(text, score, type), ...]."""
    return message([(1, message([(1, t.encode()), (2, float(s)), (3, k)])) for t, s, k in pieces]
                   + [(2, message(trainer)), (3, message(normalizer))]) + more
BASE = [("<unk>", 0, 2), ("<s>", 0, 3),
        ("</s>", 0, 3)] + [(f"<0x{b:02X}>", 0, 6) for b in range(256)]
LETTERS = BASE + [("▁", -7, 1), ("a", -8, 1), ("b", -9, 1)]


WRITTEN = ["the naïve café of 日本, 日本語 and Ελλάδα", "def f(x):    return        x",
           "banana nan anan aaaa abab ababa",
           "==== === ==", "1 22 333 4444", "<s> </s> <unk> s> </ <0x0A> 0x0A",
           "a\u0301 e\u0301 \u200d", "<image> image>"]


def train_sentencepiece(folder, **options):
    """The bytes of a small BPE model with Llama's flags, but for those given."""
    (folder / "texts").write_text("\n".join([t.replace("\n", " ") for t in TEXTS] + WRITTEN * 9),
                                  encoding="utf-8")
    llama = {"vocab_size": 560, "model_type": "bpe", "byte_fallback": True,
             "normalization_rule_name": "identity",
             "remove_extra_whitespaces": False, "split_digits": True,
             "allow_whitespace_only_pieces": True,
             "character_coverage": 0.999, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(input=str(folder / "texts"),
                                             model_prefix=str(folder / "m"),
                                             **llama | options)
    return (folder / "m.model").read_bytes()


def spaced(proto, first=False):
    """The model with what Llama's has and sentencepiece's trainer does not make: runs of spaces
    that share a score, the lowest. In Llama's, their ids are among the first.
    """
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
    pieces = [(processor.id_to_piece(i), processor.get_score(i))
              for i in range(len(BASE), processor.vocab_size())]
    pieces = [(t, s, 1) for t, s in pieces if set(t) != {"▁"}]
    runs = [("▁" * n, -1e9, 1) for n in (2, 4, 8, 3, 16, 5, 1, 7, 6, 11, 9, 10, 15, 13, 12, 14)]
    return model_proto(BASE + (runs + pieces if first else pieces + runs))
