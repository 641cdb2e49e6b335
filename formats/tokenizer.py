"""TODO"""
import codecs
import json
import os
import re

import tokenizers
from tokenizers import pre_tokenizers, Regex, trainers

from cli import UserError
from formats.sentencepiece import convert_sentencepiece, layout_of_llama, spaces_of_llama


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
            return cls(convert_sentencepiece(model))
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
