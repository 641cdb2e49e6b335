"""Text to token ids and back, as Llama does it; a tokenizer of this kind can also be trained.

Next: sentencepiece.py, which reads Llama's own tokenizer.model.
"""
import codecs
import json
import os
import re
import sys

import tokenizers
from tokenizers import normalizers, pre_tokenizers, Regex, trainers

from cli import UserError
from formats.configs import check_value, demand, is_number
from formats.json_files import read_json, read_json_object
from formats.sentencepiece import BYTES, convert_sentencepiece, layout_of_llama


# ---- Files

# Tokens that control the model. A text never gives one of these, nor any that a file calls special
CONTROLS = ("<unk>", "<s>", "</s>", "<pad>", "[PAD]", "<image>")
LLAMA = {"▁▁": 259, "▁t": 260, "给": 31999}  # ids by which Llama's own vocabulary is recognised


def added_tokens(folder):
    """[{"content", "id", "special", ...}, ...] that the files beside tokenizer.model add to it.

    added_tokens.json is that of transformers before 4.34, which notes apart which are special.
    """
    def read(name):
        path = os.path.join(folder, name)
        return read_json_object(path) if os.path.isfile(path) else {}

    special = json.dumps(read("special_tokens_map.json"))  # one text, to search names in
    tokens = [{"content": text, "id": id, "special": json.dumps(text) in special}
              for text, id in read("added_tokens.json").items()]
    listed = read("tokenizer_config.json").get("added_tokens_decoder") or {}
    check_value(listed, dict, f"{folder}/tokenizer_config.json: added_tokens_decoder")
    for id, token in listed.items():
        check_value(token, dict, f"{folder}/tokenizer_config.json: added_tokens_decoder: {id}")
        tokens.append({"special": False, **token, "id": int(id) if id.isdecimal() else id})
    for t in tokens:
        if not isinstance(t.get("content"), str) or not is_number(t["id"], int) or t["id"] < 0:
            raise UserError(f"{folder}: added token {t}: expected a content and an id")
    return tokens


def is_word(token):
    """Whether an added token is read from a text: one of a user's own, say "[SEG]"."""
    return not token["special"] and token["content"] not in CONTROLS


def check_added(tokens, folder):
    """UserError unless all added tokens can be read as they are meant.

    Says on standard error which control tokens of a user's own there are.
    """
    for t in tokens:
        if is_word(t):
            demand(t, f"{folder}: added token {t['content']!r}", lstrip=False, rstrip=False,
                   single_word=False)
    odd = {t["content"]: None for t in tokens if t["special"] and t["content"] not in CONTROLS}
    if odd:
        print(f"{folder}: {', '.join(odd)}: special tokens stay text in messages and are left out "
              'of answers; "special": false in the file changes that', file=sys.stderr)


def order_merges(model):
    """Put the merges of Llama's vocabulary into the order of tokenizer.model.

    There the runs of spaces come last, the longest first. transformers 5 sorts by id, and so cuts
    "a  b" otherwise. Another vocabulary stays as the file has it.
    """
    if model["type"] == "BPE" and LLAMA.items() <= model["vocab"].items():
        merged = [pair for pair in model["merges"] if set("".join(pair)) == {"▁"}]
        others = [pair for pair in model["merges"] if set("".join(pair)) != {"▁"}]
        model["merges"] = others + sorted(merged, key=lambda pair: -len("".join(pair)))


def read_spec(folder):
    """What tokenizer.json holds, or would hold, for the tokenizer of a folder; see `load`."""
    path, model = (os.path.join(folder, f"tokenizer.{ending}") for ending in ("json", "model"))
    spec = None
    if os.path.isfile(path):
        try:
            inner = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path}: not a tokenizer ({error})") from None
        # Where ids of added tokens have gaps, the library gives others
        added = read_json(path).get("added_tokens", [])
        spec = json.loads(inner.to_str()) | {"added_tokens": added}
        order_merges(spec["model"])
    if os.path.isfile(model):
        by_model = json.loads(convert_sentencepiece(model).to_str())
        if spec and spec["model"]["vocab"] != by_model["model"]["vocab"]:
            raise UserError(f"{path} and tokenizer.model have different pieces: remove the one "
                            "that is not the model's")
        spec = by_model | {"added_tokens": (spec or by_model)["added_tokens"]}
    if spec is None:
        raise UserError(f"neither tokenizer.json nor tokenizer.model in {folder}")
    added = {}
    for token in spec["added_tokens"] + added_tokens(folder):
        added.setdefault(token["content"], token)
    check_added(added.values(), folder)
    return spec | {"added_tokens": list(added.values())}


# ---- Text to ids and back

# How files of Llama's kind treat spaces: (normalizer, pre_tokenizer). With newer ones a text that
# begins with a space gets no other one; sentencepiece always adds one, and so does Llama
OLD_SPACES = json.loads(layout_of_llama({"<unk>": 0}, []).to_str())["normalizer"], None
NEW_SPACES = [(None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme,
                      "split": False}) for scheme in ("first", "always")]


class Tokenizer:
    """Text to ids and back as Llama does it, each text on its own.

    Llama puts a space before any text, and a space belongs to the token after it: "USER:" is read
    as "▁USER:". No text can contain a control token: "</s>" in a text is four characters. A token
    that a user added, say "[SEG]", is one id in a text and in an answer; Llama puts no space before
    the text that follows it.

        tokenizer.decode(tokenizer.encode(text)) == text   # except that "▁" becomes a space

    spec  dict, as in tokenizer.json
    """

    def __init__(self, spec):
        self.file = json.dumps(spec, ensure_ascii=False)
        # The library gets no added tokens: text must not match control tokens, and it would give
        # the others new ids. A flag would get lost in pickling
        self.inner = tokenizers.Tokenizer.from_str(json.dumps(spec | dict(
            added_tokens=[], normalizer=None, pre_tokenizer=None, post_processor=None,
            truncation=None, padding=None)))
        self.inner.normalizer = normalizers.Replace(" ", "▁")
        ids = [self.inner.token_to_id(t) for t in ("<s>", "</s>", "<unk>")]
        if None in ids:
            raise UserError("the tokenizer lacks <s>, </s> or <unk>: it is not one of Llama's kind")
        self.bos, self.eos, self.pad = ids  # padding is never attended to, so any id will do
        self.words = {t["content"]: t["id"] for t in spec["added_tokens"] if is_word(t)}
        self.texts = {id: text for text, id in self.words.items()}
        self.added = {t["id"] for t in spec["added_tokens"]} - self.texts.keys()  # not written
        longest_first = sorted(map(re.escape, self.words), key=len, reverse=True)
        self.word = re.compile(f"({'|'.join(longest_first) or '(?!)'})")  # (?!) matches nothing
        self.vocab = 1 + max(*self.inner.get_vocab().values(), *self.texts)  # a text's ids are less
        if (spec["normalizer"], spec["pre_tokenizer"]) not in (OLD_SPACES, *NEW_SPACES):
            raise UserError("the tokenizer is not one of Llama's kind: its normalizer is "
                            f"{spec['normalizer']}, its pre_tokenizer {spec['pre_tokenizer']}")
        probe = "  A b\n\U000f0000"
        if spec["model"]["type"] != "BPE" or self.decode(self.encode(probe)) != probe:
            raise UserError("the tokenizer is not one of Llama's kind: a BPE with ▁ for spaces and "
                            "bytes for unknown characters")

    @classmethod
    def load(cls, folder):
        """The tokenizer in a model's folder; UserError if there is none or it cannot be read.

        tokenizer.model decides how text is cut; only where it is missing, tokenizer.json does, to
        which transformers 5 writes the merges in another order. Added tokens may be in either.
        """
        return cls(read_spec(folder))

    def save(self, folder):
        """Write tokenizer.json, including the added tokens."""
        with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
            f.write(self.file)

    def encode(self, text):
        """list[int] of the ids of a text, with Llama's space before it, without bos and eos."""
        if not self.words:
            return self.ids(text and f" {text}")
        before, *rest = self.word.split(text)  # text, then added tokens and texts in turn
        ids = self.ids(before and f" {before}")
        for word, after in zip(rest[::2], rest[1::2]):
            ids += [self.words[word], *self.ids(after)]
        return ids

    def ids(self, text):
        """list[int] of a text without added tokens, as it is. Fast: without the places of tokens.
        """
        return self.inner.encode_batch_fast([text])[0].ids

    def decode(self, ids):
        """The text of ids, without Llama's space before it and without control tokens."""
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
        id, t = int(id), self.tokenizer
        piece = "" if id in t.added else t.texts.get(id) or t.inner.id_to_token(id) or ""
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
    controls = ["<unk>", "<s>", "</s>"]
    fixed = controls + BYTES
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
    inner.add_special_tokens(controls)
    return Tokenizer(json.loads(inner.to_str()))
