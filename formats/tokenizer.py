"""Text to token ids and back, as Llama does it; a tokenizer of this kind can also be trained.

Next: sentencepiece.py, which reads Llama's own tokenizer.model.
"""
import codecs
import json
import os
import re

import tokenizers
from tokenizers import pre_tokenizers, Regex, trainers

from cli import UserError
from formats.sentencepiece import (BYTES, convert_sentencepiece, layout_of_llama,
    llama_normalizer)


class Tokenizer:
    """Text to ids and back as Llama does it, each text on its own.

    Llama puts a space before any text, and a space belongs to the token after it: "USER:" is read
    as "▁USER:". No text can contain a control token: "</s>" in a text is four characters.

        tokenizer.decode(tokenizer.encode(text)) == text   # except that "▁" becomes a space
    """

    def __init__(self, inner):
        self.file = inner.to_str()
        ids = [inner.token_to_id(t) for t in ("<s>", "</s>", "<unk>")]
        if None in ids:
            raise UserError("the tokenizer lacks <s>, </s> or <unk>: it is not one of Llama's kind")
        self.bos, self.eos, self.pad = ids  # padding is never attended to, so any id will do
        spec = json.loads(self.file)
        self.added = {t["id"] for t in spec["added_tokens"]}
        # Drop the added tokens, so that text cannot match them. A flag would get lost in pickling
        spec.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self.inner = tokenizers.Tokenizer.from_str(json.dumps(spec))
        self.vocab = 1 + max(self.inner.get_vocab().values())  # ids of text are below
        first = spec["pre_tokenizer"] or {}
        if (first.get("type") == "Metaspace" and first["prepend_scheme"] != "never"
                and not first["split"]):
            # In newer files of transformers, a text that begins with a space gets no other one.
            # sentencepiece always adds one, and so does Llama
            self.inner.pre_tokenizer, self.inner.normalizer = None, llama_normalizer()
        probe = "  A b\n\U000f0000"
        if spec["model"]["type"] != "BPE" or self.decode(self.encode(probe)) != probe:
            raise UserError("the tokenizer is not one of Llama's kind: a BPE with ▁ for spaces and "
                            "bytes for unknown characters")

    @classmethod
    def load(cls, folder):
        """The tokenizer in a model's folder; UserError if there is none or it cannot be read.

        Prefers tokenizer.json to tokenizer.model: it may have more added tokens (llava-hf's has
        <image> and <pad>). The ids of text are the same.
        """
        path, model = (os.path.join(folder, f"tokenizer.{ending}") for ending in ("json", "model"))
        if os.path.isfile(path):
            try:
                inner = tokenizers.Tokenizer.from_file(path)
            except Exception as error:  # the library raises nothing more specific
                raise UserError(f"{path}: not a tokenizer ({error})") from None
        elif os.path.isfile(model):
            inner = convert_sentencepiece(model)
        else:
            raise UserError(f"neither tokenizer.json nor tokenizer.model in {folder}")
        return cls(inner)

    def save(self, folder):
        """Write tokenizer.json, including the added tokens."""
        with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
            f.write(self.file)

    def encode(self, text):
        """list[int] of the ids of a text, with Llama's space before it, without bos and eos."""
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """The text of ids, without Llama's space before it and without added tokens."""
        stream = self.streaming()
        return "".join(stream.add(i) for i in ids) + stream.end()

    def streaming(self):
        """A `Streaming` for ids that come one at a time."""
        return Streaming(self)


class Streaming:
    """Text of ids that come one at a time; all that `add` and `end` return is `decode` of the ids.

    A character of several ids is returned when it is complete; a byte that belongs to no character
    becomes one U+FFFD, as in sentencepiece. The cost of an id does not grow with the text.

    tokenizers' DecodeStream is not used: it raises on stray bytes, drops an incomplete end, keeps
    Llama's space after a control token, and decodes stray bytes again with every id.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.begun = tokenizer, False
        self.utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def add(self, id):
        """str that one more id (int, or a tensor or array of one) makes certain, possibly empty."""
        id = int(id)
        piece = "" if id in self.tokenizer.added else self.tokenizer.inner.id_to_token(id) or ""
        if piece and not self.begun:  # the space that Llama puts before any text
            self.begun, piece = True, piece.removeprefix("▁")
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        return self.text(bytes.fromhex(byte[1]) if byte else piece.replace("▁", " ").encode())

    def end(self):
        """str that was held back: the bytes of an incomplete character."""
        return self.text(b"", final=True)

    def text(self, raw, final=False):
        """str of the next bytes, as far as characters are complete."""
        return re.sub("[\udc80-\udcff]", "\ufffd", self.utf8.decode(raw, final))


# ---- Training

CONTROLS = ["<unk>", "<s>", "</s>"]


def learn_merges(texts, size):
    """[(left, right), ...]: the merges that BPE learns from texts for a vocabulary of `size`."""
    inner = layout_of_llama({"<unk>": 0}, [])
    # No token crosses these cuts. Encoding does not need them: the merges give the same ids
    inner.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split("▁", "merged_with_next"),
        pre_tokenizers.Split(Regex(r"[\n.,?!]"), "isolated")])
    trainer = trainers.BpeTrainer(vocab_size=size, min_frequency=2, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    return [tuple(merge) for merge in json.loads(inner.to_str())["model"]["merges"]]


def train_tokenizer(texts, vocab):
    """A `Tokenizer` like Llama's with at most `vocab` ids, trained on an iterable of texts.

    Ids: <unk> <s> </s>, 256 bytes, merged pieces in the order of merging, single characters. A word
    keeps the space before it. Newlines and . , ? ! are always tokens of their own; ":" is not, so
    that "USER:" may become one token. Give it texts as data.py cuts them, so that it learns words
    as they will occur. Raises UserError if `vocab` is too small.
    """
    texts = list(texts)
    fixed = CONTROLS + BYTES
    characters = sorted(set("▁".join(texts).replace(" ", "▁")) | {"▁"})
    room = vocab - len(fixed)
    if room < len(characters):
        raise UserError(f"a vocabulary of {vocab} is too small: {len(fixed)} ids are fixed, "
                        f"and the texts have {len(characters)} different characters")
    characters = [c for c in characters if c != "\n"]  # a newline is a byte, as with Llama
    known, merges = set(characters), []
    for a, b in learn_merges(texts, room):
        if a in known and b in known and a + b not in fixed:  # text never gives a control token
            merges.append((a, b))
            known.add(a + b)
    names = fixed + list(dict.fromkeys(a + b for a, b in merges)) + characters
    inner = layout_of_llama({name: i for i, name in enumerate(names)}, merges)
    inner.add_special_tokens(CONTROLS)
    return Tokenizer(inner)
