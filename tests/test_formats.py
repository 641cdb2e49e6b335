"""What formats/ claims: ids and text as in sentencepiece; LLaVA opens in every layout, strictly,
with the numbers of transformers, and is written back.
"""
import dataclasses
import json
import os
import pathlib
import pickle
import random
import re
import shutil
import sys
from fnmatch import fnmatch

import numpy as np
import huggingface_hub
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import LlamaTokenizer

import formats.export
import formats.folders
import formats.llava
import formats.name_rules
import formats.sentencepiece
import formats.tokenizer
import formats.weight_files
import sample
import tools.export_llava
import train
import training.feed
import training.options
import weights
from cli import UserError
from data import (CLIP_MEAN, CLIP_STD, collate, Conversations, encode_prompt, IMAGE, MULTIPLE,
    pixels, Preprocess, SYSTEM)
from experiments.speed import loading, shapes
from formats.tokenizer import Tokenizer, train_tokenizer
from model import generate, LlamaConfig, VisionConfig, VLMConfig
from projector import Projector
from tests.helpers import CLIPS, hf_clip, hf_llama, LLAMAS, randomised
from tests.reference import (batch_of, Bomb, close, equal, hf_llava, opened, state_of, STATIC,
    TEXTS as SHORT_TEXTS, theirs_generate)
from tests.sentencepiece_files import (BASE, field, LETTERS, message, model_proto, TEXTS,
    spaced, train_sentencepiece, WRITTEN)

VOCAB, IDS = 320, 291  # rows of the embedding; ids of the tokenizer and of what a text may hold


# ---- Tokenizers

STRANGE = ["", " ", "  ", "a", " a", "a ", "\n", "\n\n a\n", "a   b\t\r\n", "naïve café", "日本語",
           "👩‍👩‍👧 \U0001F600", "\0\x7f",
           "</s>", "<s> x </s><unk>", "<0x0A>", "x" * 700, "USER: hi ASSISTANT:", "<image>\nQ",
           "\ufffd"]


def test_any_text_comes_back(tokenizer):
    draw = random.Random(0)
    alphabet = "ab USER:</s>\n\t é日😀.?<0x0A>\u200d"
    for text in STRANGE + ["".join(draw.choices(alphabet, k=draw.randrange(40)))
                           for _ in range(300)]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {tokenizer.bos, tokenizer.eos, tokenizer.pad} & set(ids)


def test_frequent_words_and_tags_are_single_tokens(tokenizer):
    for text in ("USER:", "ASSISTANT:", "circle", "red", "square", "triangles"):
        assert len(tokenizer.encode(text)) == 1, text
    space, newline, what = tokenizer.encode("\nWhat")
    assert newline == 3 + ord("\n") and tokenizer.decode([space, what]) == "What"


def test_the_ids_are_laid_out_like_llamas(tokenizer):
    inner = tokenizer.inner
    assert [inner.token_to_id(t) for t in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>")] == [0, 1, 2,
                                                                                            3, 258]
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert tokenizer.vocab == inner.get_vocab_size() == max(inner.get_vocab().values()) + 1 <= 500
    spelt = [3 + b for b in "é日".encode()]
    assert tokenizer.encode("é日") == [inner.token_to_id("▁")] + spelt


def test_no_token_crosses_a_space_and_cutting_first_gives_the_same_ids(tokenizer):
    assert all("▁" not in token[1:] for token in tokenizer.inner.get_vocab())
    cut = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    cut.normalizer = formats.sentencepiece.llama_normalizer()
    cut.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    for text in STRANGE + TEXTS[:12]:
        assert cut.encode(text).ids == tokenizer.encode(text)


def test_training_depends_on_the_texts_alone(tokenizer):
    assert formats.tokenizer.train_tokenizer(TEXTS, 500).file == tokenizer.file
    assert formats.tokenizer.train_tokenizer(reversed(TEXTS), 500).file == tokenizer.file


def test_a_control_token_that_is_frequent_in_the_texts_stays_text():
    text = "a</s> b</s> c</s> <s>a <s>b <s>c a<0x0A> b<0x0A>"
    trained = formats.tokenizer.train_tokenizer([text] * 50, 320)
    ids = trained.encode(text)
    assert min(ids) > 258 and trained.decode(ids) == text
    assert (trained.pad, trained.bos, trained.eos) == (0, 1, 2)


def test_a_newline_is_a_byte_and_the_word_behind_it_a_token():
    space, newline, word = formats.tokenizer.train_tokenizer(["\nzebra", "lion\n"] * 50,
                                                             320).encode("\nzebra")
    assert newline == 3 + ord("\n") and word > 258


def test_a_vocabulary_that_cannot_hold_the_characters_is_refused():
    with pytest.raises(UserError, match="too small"):
        formats.tokenizer.train_tokenizer(["abcdefgh"], 264)


def test_a_tokenizer_survives_saving_and_pickling(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    text = "USER: </s> is </s>"
    for other in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(text) == tokenizer.encode(text) and other.file == tokenizer.file
        assert (other.bos, other.eos, other.pad, other.vocab) == (1, 2, 0, tokenizer.vocab)
    assert other.decode([1] + other.encode("red") + [2]) == "red"


def test_added_tokens_of_a_file_are_neither_read_from_text_nor_counted(tokenizer, tmp_path):
    inner = tokenizers.Tokenizer.from_str(tokenizer.file)
    inner.add_tokens(["<image>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A",
                                                                    special_tokens=[("<s>", 1)])
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab == tokenizer.vocab
    assert loaded.encode("a <image> b") == tokenizer.encode("a <image> b")
    assert loaded.decode([tokenizer.vocab] + tokenizer.encode("red")) == "red"


def test_a_file_without_added_tokens_is_read(tokenizer, tmp_path):
    spec = json.loads(tokenizer.file)
    del spec["added_tokens"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert Tokenizer.load(tmp_path).encode("a red ring") == tokenizer.encode("a red ring")


def with_added(tokenizer, folder, *tokens):
    """Save a tokenizer with more added tokens, (content, id, whether it is special)."""
    spec = json.loads(tokenizer.file)
    spec["added_tokens"] += [{"id": id, "content": text, "special": special, "single_word": False,
                              "lstrip": False, "rstrip": False, "normalized": not special}
                             for text, id, special in tokens]
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def test_a_token_that_a_user_added_is_one_id_in_texts_and_in_answers(tokenizer, tmp_path):
    seg = tokenizer.vocab + 2  # behind <image> and <pad>
    with_added(tokenizer, tmp_path, ("<image>", seg - 2, True), ("<pad>", seg - 1, False),
               ("[SEG]", seg, False), ("[SEG]ment", seg + 1, False))
    found = Tokenizer.load(tmp_path)
    found.save(tmp_path)
    for loaded in (found, Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(found))):
        assert loaded.vocab == seg + 2
        red, space = tokenizer.encode("red"), tokenizer.encode("a ")[len(tokenizer.encode("a")):]
        assert loaded.encode("red [SEG] red") == red + space + [seg] + red
        assert loaded.encode("[SEG][SEG]ment") == [seg, seg + 1]
        for text in ["[SEG]", " [SEG] x", "a[SEG]b", "[SEG]\nx [SEG].", "[SEG", "", *STRANGE]:
            assert loaded.decode(loaded.encode(text)) == text
        for text in STRANGE + ["</s>", "<s>", "<unk>", "<image>", "<pad>"]:
            assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode([1, seg - 2, seg, *red, 2]) == "[SEG] red"


def test_a_special_token_of_a_users_own_stays_text_and_is_named(tokenizer, tmp_path, capsys):
    with_added(tokenizer, tmp_path, ("[SEG]", tokenizer.vocab, True))
    loaded = Tokenizer.load(tmp_path)
    assert "[SEG]: special tokens stay text" in capsys.readouterr().err
    assert loaded.encode("a [SEG] b") == tokenizer.encode("a [SEG] b")
    assert loaded.vocab == tokenizer.vocab


@pytest.mark.parametrize("form", ["before 4.34", "since 4.34"])
def test_added_tokens_beside_a_tokenizer_model_are_read(slow, llama, proto, tmp_path, form):
    n, red = slow.vocab_size(), slow.encode("red")
    (tmp_path / "tokenizer.model").write_bytes(proto)
    ids = {"<pad>": n, "[SEG]": n + 3, "<odd>": n + 1}  # with a gap
    if form == "before 4.34":
        (tmp_path / "added_tokens.json").write_text(json.dumps({"<unk>": 0} | ids))
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(
            {"pad_token": "<pad>", "additional_special_tokens": [{"content": "<odd>"}]}))
    else:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {
            id: {"content": text, "special": text != "[SEG]"} for text, id in ids.items()}}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode("red[SEG] red") == red + [n + 3] + red
    assert loaded.encode("<odd> <pad>") == llama.encode("<odd> <pad>")
    assert loaded.decode([n + 1, *red, n, n + 3]) == "red[SEG]"


@pytest.mark.parametrize("file, values", [
    ("tokenizer_config.json", {"added_tokens_decoder": {"500": {"content": "x", "lstrip": True}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"500": "x"}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"many": {"content": "x"}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": {"500": {"special": True}}}),
    ("tokenizer_config.json", {"added_tokens_decoder": [3]}),
    ("added_tokens.json", {"x": "500"}), ("added_tokens.json", {"x": None})])
def test_an_added_token_that_cannot_be_read_is_one_line(tokenizer, tmp_path, file, values):
    tokenizer.save(tmp_path)
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(UserError, match="added.token") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="</s>"):
        Tokenizer.load(tmp_path)


# ---- tokenizer.model

def any_character(draw):
    below = draw.choice([0x80, 0x800, 0xD800, 0x110000])
    return chr(draw.randrange(0xE000 if below > 0xE000 else 0, below))


def fuzz(processor, n):
    """Strings that reach for the corners: what pieces are made of, runs, control characters,
    special tokens' names.
    """
    draw = random.Random(0)
    normal = [processor.id_to_piece(i) for i in range(len(BASE), processor.vocab_size())]
    odd = STRANGE + ["▁", "▁▁", "<0xE6>", "<0x0a>", "\t", "\r\n", " " * 16, " " * 33, "\x1b",
                     "e\u0301", "\ufeff", "\u3000",
                     "\U0010ffff"]
    sources = [lambda: any_character(draw), lambda: draw.choice(odd), lambda: draw.choice(normal),
               lambda: draw.choice(normal).replace("▁", " "), lambda: draw.choice("ab \n"),
               lambda: draw.choice("na日▁="),
               lambda: draw.choice(sources[:6])()]
    for i in range(n):
        source = sources[i % len(sources)]
        yield "".join(source() for _ in range(draw.choice([1, 2, 3, 8, 20])))


def test_the_ids_and_the_text_are_sentencepieces(slow, llama):
    texts = STRANGE + TEXTS[:12] + WRITTEN + list(fuzz(slow, 10_000))
    assert [text for text in texts if llama.encode(text) != slow.encode(text)] == []
    assert [text for text in texts
            if llama.decode(slow.encode(text)) != slow.decode(slow.encode(text))] == []
    assert (llama.vocab, llama.bos, llama.eos, llama.pad) == (slow.vocab_size(), 1, 2, 0)
    assert max(max(slow.encode(text), default=0) for text in texts) > 500  # more than bytes


def test_a_literal_underline_of_sentencepiece_reads_as_a_space_there_and_here(slow, llama):
    assert llama.encode("a▁b") == llama.encode("a b") == slow.encode("a▁b")
    assert llama.decode(llama.encode("a▁b")) == "a b"


def test_a_tokenizer_of_a_model_file_survives_pickling_and_is_saved_as_json(slow, llama, tmp_path):
    llama.save(tmp_path)
    for other in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(llama))):
        assert all(other.encode(text) == slow.encode(text)
                   for text in STRANGE + list(fuzz(slow, 200)))
        assert (other.file, other.vocab, other.bos, other.eos) == (llama.file, llama.vocab, 1, 2)
        assert other.decode([1] + other.encode("</s>") + [2]) == "</s>"


@pytest.mark.parametrize("legacy", [True, False])
def test_a_tokenizer_json_of_transformers_gives_sentencepieces_ids_too(slow, llama, tmp_path,
                                                                       legacy):
    spec = json.loads(llama.file)["model"]
    theirs = LlamaTokenizer(vocab=spec["vocab"], merges=[tuple(m) for m in spec["merges"]],
                            legacy=legacy)
    theirs.add_tokens(["<image>", "<pad>"], special_tokens=True)
    theirs.save_pretrained(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab == slow.vocab_size()
    texts = STRANGE + [" a", "  a", " "] + list(fuzz(slow, 500))
    assert [text for text in texts if loaded.encode(text) != slow.encode(text)] == []
    assert loaded.decode([loaded.vocab, 1] + slow.encode(" a") + [loaded.vocab + 50]) == " a"


def test_merges_that_transformers_5_has_sorted_by_id_give_sentencepieces_ids(tmp_path, monkeypatch):
    proto = spaced(train_sentencepiece(tmp_path), first=True)
    slow = sentencepiece.SentencePieceProcessor(model_proto=proto)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    spec = json.loads(Tokenizer.load(tmp_path).file)
    vocab = spec["model"]["vocab"]
    spec["model"]["merges"].sort(key=lambda pair: vocab["".join(pair)])
    spec["normalizer"], spec["pre_tokenizer"] = None, {
        "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    texts = STRANGE + [" " * n + "x" for n in range(40)] + list(fuzz(slow, 1000))

    def others():
        loaded = Tokenizer.load(tmp_path)
        return [text for text in texts if loaded.encode(text) != slow.encode(text)]

    assert others() == []
    os.remove(tmp_path / "tokenizer.model")
    assert "a   b\t\r\n" in others()
    # Llama's own vocabulary is known by some of its ids
    monkeypatch.setattr(formats.tokenizer, "LLAMA", {"▁▁": vocab["▁▁"]})
    assert others() == []


def test_tokenizer_files_with_different_pieces_are_refused(llama, proto, tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(proto)
    with pytest.raises(UserError, match="different pieces"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("change, named", [
    ({"trainer": [(3, 1), (35, 1)]}, "model_type"), ({"trainer": [(3, 2)]}, "byte_fallback"),
    ({"trainer": [(3, 2), (35, 1), (24, 1)]}, "treat_whitespace_as_suffix"),
    ({"normalizer": [(2, b"map"), (4, 0)]}, "precompiled_charsmap"),
    ({"normalizer": []}, "remove_extra_whitespaces"),  # on where it is left out
    ({"normalizer": [(3, 0), (4, 0)]}, "add_dummy_prefix"),
    ({"normalizer": [(5, 0), (4, 0)]}, "escape_whitespaces"),
    ({"more": field(5, field(2, b"map"))}, "precompiled_charsmap"),
    ({"pieces": LETTERS + [("<x>", 0, 4)]}, "'<x>' is user-defined"),
    ({"pieces": LETTERS + [("x", -9, 5)]}, "'x' is user-defined or unused"),
    ({"pieces": LETTERS[:50] + LETTERS[51:]}, "'<0x2F>' is missing"),
    ({"pieces": LETTERS[3:]}, "lacks <s>, </s> or <unk>"),
    ({"pieces": LETTERS[:1] + LETTERS[2:]}, "lacks <s>"),
    # without a piece for the space
    ({"pieces": LETTERS[:-3] + LETTERS[-2:]}, "not one of Llama's kind"),
    ({"pieces": LETTERS + [("ab", -1, 1), ("ba", -1, 1)]}, "has the score of another"),
    ({"pieces": LETTERS + [("ab", float("nan"), 1), ("aa", -1, 1)]}, "has the score of another"),
    ({"pieces": LETTERS + [("ac", -1, 1)]}, "'ac' has a character that is not a piece")])
def test_a_sentencepiece_model_of_another_kind_is_refused_by_name(change, named, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(model_proto(LETTERS))
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).encode(" abc")) == " abc"
    (tmp_path / "tokenizer.model").write_bytes(model_proto(**{"pieces": LETTERS} | change))
    with pytest.raises(UserError, match=named) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_the_normaliser_that_sentencepiece_takes_by_default_is_refused(tmp_path):
    proto = train_sentencepiece(tmp_path, normalization_rule_name="nmt_nfkc")
    assert sentencepiece.SentencePieceProcessor(model_proto=proto).encode("ﬁ") \
        == sentencepiece.SentencePieceProcessor(model_proto=proto).encode("fi")
    (tmp_path / "tokenizer.model").write_bytes(proto)
    with pytest.raises(UserError, match="precompiled_charsmap"):
        Tokenizer.load(tmp_path)
GOOD_PROTO = model_proto(LETTERS)


@pytest.mark.parametrize("damaged", [
    b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html><html>",
    b"\xff" * 300_000, GOOD_PROTO[:-1],
    GOOD_PROTO[:2005], GOOD_PROTO + b"\x0a",
    GOOD_PROTO + field(1, message([(1, b"\xff\xfe"), (2, 0.0)])),
    GOOD_PROTO + field(1, message([(1, b"a"), (2, 0.0)])),
    GOOD_PROTO + field(1, message([(2, 0.0)])),
    GOOD_PROTO + field(1, message([(1, 7)])), GOOD_PROTO + field(1, 7), GOOD_PROTO + field(2, 2.0)])
def test_a_damaged_model_file_is_one_line_that_names_it(damaged, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="tokenizer.model: damaged") as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value)


def test_whatever_happens_to_a_model_file_it_is_read_or_refused(tmp_path):
    draw, refused = random.Random(0), 0
    for i in range(150):
        damaged = bytearray(GOOD_PROTO)
        for _ in range(draw.choice([1, 3])):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        (tmp_path / "tokenizer.model").write_bytes(
            damaged[:draw.choice([None, draw.randrange(len(damaged))])])
        try:
            Tokenizer.load(tmp_path)
        except UserError:
            refused += 1
    assert refused > 75


def test_a_tokenizer_json_that_is_not_of_llamas_kind_is_refused(tmp_path):
    alphabet = ["<unk>", "<s>", "</s>"] + sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    alphabet = {c: i for i, c in enumerate(alphabet)}
    other = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, [], unk_token="<unk>"))
    other.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    other.decoder = tokenizers.decoders.ByteLevel()
    assert other.decode(other.encode("  A b\n").ids) == "  A b\n"  # a good one, but another
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not one of Llama's kind"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("scheme, split", [("never", False), ("always", True)])
def test_a_tokenizer_json_that_treats_spaces_otherwise_is_refused(tokenizer, tmp_path, scheme,
                                                                  split):
    other = tokenizers.Tokenizer.from_str(tokenizer.file)
    other.normalizer, metaspace = None, tokenizers.pre_tokenizers.Metaspace
    other.pre_tokenizer = metaspace(prepend_scheme="always", split=False)
    other.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).encode("  a b") == tokenizer.encode("  a b")
    other.pre_tokenizer = metaspace(prepend_scheme=scheme, split=split)
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="not one of Llama's kind"):
        Tokenizer.load(tmp_path)
    lower = tokenizers.Tokenizer.from_str(tokenizer.file)
    lower.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFKC(), lower.normalizer])
    lower.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="NFKC"):
        Tokenizer.load(tmp_path)


# ---- Streaming

def streamed(tokenizer, ids):
    """[what each id brings, ..., what the end brings]"""
    stream = tokenizer.streaming()
    return [stream.add(i) for i in ids] + [stream.end()]


def test_what_is_streamed_is_in_the_end_what_decode_and_sentencepiece_say_of_any_ids(slow, llama):
    draw = random.Random(0)
    space, wide = slow.piece_to_id("▁"), [3 + b for b in "é日😀".encode()]
    for _ in range(3000):
        ids = [draw.choice([draw.randrange(3, 259), draw.randrange(131, 259), draw.choice(wide),
                            space,
                            draw.randrange(259, slow.vocab_size())])
                            for _ in range(draw.randrange(12))]
        assert "".join(streamed(llama, ids)) == llama.decode(ids) == slow.decode(ids)
        # no text of their own
        assert "".join(streamed(llama, [1] + ids + [2, llama.vocab + 7])) == llama.decode(ids)


def test_a_character_of_several_ids_comes_when_it_is_whole_and_not_later(llama):
    byte = [3 + b for b in "😀é".encode()]
    assert streamed(llama, byte) == ["", "", "", "😀", "", "é", ""]
    assert streamed(llama, byte[:3]) == ["", "", "", "\ufffd" * 3]
    assert streamed(llama, byte[:2] + llama.encode("A")) == ["", "", "\ufffd\ufffd A", ""]
    # a newline is a byte, too, and does not wait
    assert streamed(llama, [3 + 10, 3 + 10]) == ["\n", "\n", ""]
    for text in STRANGE:
        if "\ufffd" not in text:
            assert "\ufffd" not in "".join(streamed(llama, llama.encode(text)))


def test_the_first_space_is_dropped_once_and_all_others_are_kept(slow, llama):
    space = slow.piece_to_id("▁")
    assert streamed(llama, llama.encode("red")) == ["red", ""]
    assert "".join(streamed(llama, [1, space] + llama.encode("red"))) == " red"
    assert "".join(streamed(llama, llama.encode("red") + llama.encode("red"))) == "red red"
    assert streamed(llama, [space, 3 + 10, space, space]) == ["", "\n", " ", " ", ""]
    # a space by its byte is the model's own
    assert streamed(llama, [3 + 32, 3 + 32]) == [" ", " ", ""]


def test_each_id_is_looked_at_once(llama, monkeypatch):
    asked = []

    class Counting:
        def id_to_token(self, id):
            asked.append(id)
            return llama.inner.id_to_token(id)

    counted = pickle.loads(pickle.dumps(llama))
    counted.inner = Counting()
    ids = [3 + b for b in "日本語".encode()] * 20
    assert counted.decode(torch.tensor(ids)) == "日本語" * 20 and asked == ids


# ---- LLaVA as others publish it

ORIGINAL = {"mm_vision_tower": "clip", "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 32,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat",
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False, "use_mm_proj": True, "image_aspect_ratio": "pad",
            "tokenizer_model_max_length": 2048}
CLIP_14 = "openai/clip-vit-large-patch14-336"


def edit(path, change):
    """Let `change` edit the object in a JSON file."""
    with open(path) as f:
        values = json.load(f)
    change(values)
    with open(path, "w") as f:
        json.dump(values, f)


# ---- The layouts, all of one model


def native(llava):
    """{name since transformers 5.6: tensor}, the tied head left out."""
    tied = llava.config.tie_word_embeddings
    return {n: p.detach().clone().contiguous() for n,
            p in llava.named_parameters() if not (tied and n == "lm_head.weight")}


def renamed(state, *table):
    for pattern, replacement in table:
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}
    return state
TOWER = (r"^model\.vision_tower\.", "model.vision_tower.vision_model.")


UNTIL_4_51 = (TOWER, (r"^lm_head", "language_model.lm_head"),
              (r"^model\.language_model\.", "language_model.model."),
              (r"^model\.(vision_tower|multi_modal_projector)", r"\1"))


TO_ORIGINAL = ((r"^model\.vision_tower\.", "model.vision_tower.vision_tower.vision_model."),
               (r"^model\.language_model\.", "model."),
               (r"^model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
               (r"^model\.multi_modal_projector\.linear_2", "model.mm_projector.2"))
SPELLINGS = {"until 4.51": UNTIL_4_51, "since 4.52": (TOWER,), "since 5.6": (), "today": None}
ORIGINALS = ["original", "original, tower inside"]


class Model:
    """A small LLaVA of transformers, and folders with it in every layout."""

    def __init__(self, root, tokenizer, clip_kind, llama_kind):
        self.root, self.tokenizer = root, tokenizer
        self.side = clip_kind["image_size"]
        clip = hf_clip(**clip_kind)
        llama = hf_llama(**llama_kind, vocab_size=VOCAB, max_position_embeddings=512)
        clip.save_pretrained(root / "clip")
        self.projector = Projector(clip.config.hidden_size, llama.config.hidden_size, "none", 1, 1)
        torch.manual_seed(9)
        self.theirs = hf_llava(clip, llama, type("", (), {"projector": randomised(self.projector)}))
        self.llama = llama

    def folder(self, layout):
        path = self.root / layout
        if not path.exists():
            path.mkdir()
            self.write(path, layout)
            self.tokenizer.save(path)
        return path

    def write(self, path, layout):
        if layout in SPELLINGS:
            self.theirs.save_pretrained(path)
            if SPELLINGS[layout] is not None:
                save_file(renamed(native(self.theirs), *SPELLINGS[layout]),
                          path / "model.safetensors")
        elif layout == "llama":
            self.llama.save_pretrained(path)
        elif layout == "projector":
            state = renamed(native(self.theirs), *TO_ORIGINAL)
            torch.save({n: t for n, t in state.items() if "mm_projector" in n},
                       path / "mm_projector.bin")
            (path / "config.json").write_text(json.dumps({"model_type": "llava", **ORIGINAL}))
        elif layout == "ours":
            model = weights.load(str(self.folder("today"))).model
            weights.save(str(path), model.cfg, state_of(model), self.tokenizer,
                         Preprocess(self.side), SYSTEM, stage=2, sources={}, training={})
        else:
            state = renamed(native(self.theirs), *TO_ORIGINAL)
            tower = "model.vision_tower."
            if layout == "original":
                state = {n: t for n, t in state.items() if not n.startswith(tower)}
            else:
                state[f"{tower}vision_tower.vision_model.embeddings.position_ids"] = torch.arange(
                    5)[None]
            torch.save(state, path / "pytorch_model.bin")
            config = {**self.llama.config.to_dict(), **ORIGINAL, "model_type": "llava_llama"}
            (path / "config.json").write_text(json.dumps(config))

    def logits(self, ids, picture):
        theirs = torch.tensor([ids]).masked_fill(torch.tensor([ids]) == IMAGE, 299)
        return self.theirs(input_ids=theirs, pixel_values=picture[None]).logits


@pytest.fixture(scope="module")
def short_tokenizer():
    """Its IDS ids leave rows of the embedding free."""
    return train_tokenizer(SHORT_TEXTS, 300)


@pytest.fixture(scope="module")
def small(tmp_path_factory, short_tokenizer):
    return Model(tmp_path_factory.mktemp("small"), short_tokenizer, CLIPS[0], LLAMAS[0])


@pytest.fixture(scope="module")
def grouped(tmp_path_factory, short_tokenizer):
    """Grouped-query heads, tied embeddings, another base of the rotary frequencies."""
    return Model(tmp_path_factory.mktemp("grouped"), short_tokenizer, CLIPS[1], LLAMAS[1])


def prompt(model, n=3):
    torch.manual_seed(n)
    return [1, *torch.randint(3, IDS, (n,)).tolist(), *[IMAGE] * model.cfg.vision.tokens,
            *torch.randint(3, IDS, (5 + n,)).tolist()]


def answers(model, ids, picture):
    return model(batch_of([ids], picture[None]))


@pytest.mark.parametrize("layout", [*SPELLINGS, *ORIGINALS])
@pytest.mark.parametrize("kind", ["small", "grouped"])
@torch.no_grad()
def test_every_layout_opens_with_the_logits_of_transformers(request, layout, kind):
    m = request.getfixturevalue(kind)
    if kind == "grouped" and layout in ORIGINALS:
        edit(m.folder(layout) / "config.json", lambda c: c.update(mm_hidden_size=48))
    point = weights.load(str(m.folder(layout)))
    ids, picture = prompt(point.model), torch.randn(3, m.side, m.side)
    assert close(answers(point.model, ids, picture), m.logits(ids, picture))
    assert point.model.cfg.llm.vocab == VOCAB > point.tokenizer.vocab
    assert (point.model.cfg.visual_expert, point.model.cfg.language_expert) == ("none", "none")


@pytest.mark.parametrize("layout", ["today", "original"])
def test_a_foreign_checkpoint_is_talked_to_as_llava_1_5_is(small, layout):
    point = weights.load(str(small.folder(layout)))
    layout = point.prompt_format()
    assert (layout.template, layout.system, layout.image_tokens, layout.context) == ("v1", SYSTEM,
                                                                                     4, 512)
    assert point.preprocess == Preprocess(28) and point.preprocess.aspect == "pad"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_foreign_checkpoint_is_cast_as_a_whole(small, dtype):
    for layout in ("today", "original"):
        assert {p.dtype for p in weights.load(str(small.folder(layout)),
                                              dtype).model.parameters()} == {dtype}


def test_training_casts_what_is_new_and_leaves_the_rest_in_the_file(small):
    for layout in ("today", "original"):
        stored = {n: (p.dtype, p.detach()) for n,
                  p in weights.load(str(small.folder(layout))).model.named_parameters()}
        model = weights.load(str(small.folder(layout)), torch.float64, {"visual_expert": "1"},
                             cast=False).model
        for name, p in model.named_parameters():
            assert p.dtype == torch.float64 if ".expert_1." in name else torch.equal(
                p, stored[name][1]) and p.dtype == stored[name][0], name


def test_a_tower_apart_takes_the_dtype_of_the_llama(small, tmp_path):
    folder = shutil.copytree(small.folder("original"), small.root / "half", dirs_exist_ok=True)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save({n: t.half() for n, t in state.items()}, folder / "pytorch_model.bin")
    assert {p.dtype for p in weights.load(str(folder)).model.parameters()} == {torch.float16}


@pytest.fixture
def copied(small, tmp_path):
    """A copy of a layout's folder to spoil, with the tower's folder beside it."""
    shutil.copytree(small.root / "clip", tmp_path / "clip")
    return lambda layout: shutil.copytree(small.folder(layout), tmp_path / "x")


def refused(folder, *words, open_=weights.load):
    """Opening fails with a message of one line that says all of `words`."""
    with pytest.raises(UserError) as caught:
        open_(str(folder))
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


def test_size_mean_and_std_are_those_of_the_preprocessor_file(copied):
    folder = copied("today")
    values = {"crop_size": {"height": 28, "width": 28}, "size": {"shortest_edge": 28},
              "image_mean": [0.1, 0.2, 0.3],
              "image_std": [0.4, 0.5, 0.6], "resample": 3}
    expected = Preprocess(28, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (folder / "preprocessor_config.json").write_text(json.dumps(values))
    assert weights.load(str(folder)).preprocess == expected
    os.remove(folder / "preprocessor_config.json")  # what transformers 5 writes
    (folder / "processor_config.json").write_text(
        json.dumps({"patch_size": 14, "image_processor": values}))
    assert weights.load(str(folder)).preprocess == expected
    (folder / "processor_config.json").write_text(json.dumps({"patch_size": 14}))
    assert weights.load(str(folder)).preprocess == Preprocess(28)
    for key in ("size", "crop_size"):
        (folder / "preprocessor_config.json").write_text(
            json.dumps({**values, key: {"height": 28, "width": 30}}))
        refused(folder, "preprocessor_config.json", f"{key} {{", "28 px")


PROCESSOR = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28},
             "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}


SQUARE = {"height": 28, "width": 28}


@pytest.mark.parametrize("said, llava, clip", [  # and what LLaVA's and CLIP's are refused for
    ({"do_pad": True}, None, "do_pad True"), ({"do_pad": False}, None, None),
    ({"do_pad": True, "do_center_crop": False}, None, "do_pad True"),
    ({"do_pad": False, "do_center_crop": True}, None, None),
    ({"do_pad": False, "do_center_crop": False}, "do_center_crop False", "do_center_crop False"),
    ({"do_center_crop": False}, "do_center_crop False", "do_center_crop False"),
    ({"do_pad": True, "size": SQUARE}, None, "do_pad True"),
    ({"do_pad": False, "size": SQUARE}, "size {", "size {")], ids=str)
def test_what_an_image_processor_says_of_squares_is_done_or_refused_by_name(copied, said, llava,
                                                                            clip):
    folder, draw = copied("today"), np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 256, (*size, 3), np.uint8))
                for size in ((40, 90), (91, 40), (28, 28), (61, 61))]
    for kind, refusal in (("LlavaImageProcessor", llava), ("CLIPImageProcessor", clip)):
        (folder / "preprocessor_config.json").write_text(
            json.dumps({**PROCESSOR, "image_processor_type": kind, **said}))
        if refusal:
            refused(folder, "preprocessor_config.json", refusal)
            continue
        prep = weights.load(str(folder)).preprocess
        theirs = transformers.AutoImageProcessor.from_pretrained(str(folder))
        for picture in pictures:
            made = torch.as_tensor(np.array(theirs(picture)["pixel_values"][0]))
            assert (pixels(picture, prep) - made).abs().max() < 1e-5


def test_an_image_processor_that_says_nothing_of_squares_pads_as_llava_does(copied):
    folder = copied("today")
    for said in ({}, {"do_pad": None}, {"do_center_crop": True}, {"do_center_crop": None}):
        (folder / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **said}))
        assert weights.load(str(folder)).preprocess.aspect == "pad"
    edit(folder / "config.json", lambda c: c.update(image_aspect_ratio="square"))
    assert weights.load(str(folder)).preprocess.aspect == "crop"
    edit(folder / "preprocessor_config.json", lambda c: c.update(do_pad=True))
    refused(folder, "image_aspect_ratio", "do_pad True")
    edit(folder / "preprocessor_config.json", lambda c: c.update(do_pad="no"))
    refused(folder, "do_pad is 'no'")


def test_absent_fields_mean_what_they_mean_to_transformers(copied):
    folder, expected = copied("today"), None
    expected = weights.load(str(folder)).model.cfg

    def strip(c):
        keep = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "image_size", "patch_size",
                "vocab_size", "max_position_embeddings"}
        for part in ("text_config", "vision_config"):
            c[part] = {k: v for k, v in c[part].items() if k in keep}
        for key in set(c) - {"model_type", "text_config", "vision_config"}:
            del c[key]
    edit(folder / "config.json", strip)
    assert weights.load(str(folder)).model.cfg == expected
    edit(folder / "config.json", lambda c: c["text_config"].update(
        rope_parameters={"rope_type": "default", "rope_theta": 500}))
    assert weights.load(str(folder)).model.cfg.llm.theta == 500.0


@pytest.mark.parametrize("part, field, value", [
    (None, "vision_feature_layer", -1), (None, "vision_feature_layer", [-2, -5]),
    (None, "vision_feature_select_strategy", "full"), (None, "projector_hidden_act", "relu"),
    (None, "multimodal_projector_bias", False), (None, "image_aspect_ratio", "anyres"),
    ("vision_config", "model_type", "siglip_vision_model"), ("vision_config", "hidden_act", "gelu"),
    ("text_config", "model_type", "mistral"), ("text_config", "sliding_window", 64),
    ("text_config", "attention_bias", True),
    ("text_config", "rope_parameters", {"rope_type": "linear", "factor": 2.0}),
    ("text_config", "hidden_act", "gelu")])
def test_a_llava_that_we_do_not_build_is_refused_by_the_name_of_the_field(copied, part, field,
                                                                          value):
    folder = copied("today")
    edit(folder / "config.json", lambda c: (c[part] if part else c).update({field: value}))
    refused(folder, "config.json", part or "", field)


@pytest.mark.parametrize("field, value", [
    ("mm_projector_type", "linear"), ("mm_vision_select_layer", -1),
    ("mm_vision_select_feature", "cls_patch"),
    ("mm_patch_merge_type", "spatial"), ("mm_use_im_start_end", True),
    ("mm_use_im_patch_token", True),
    ("mm_hidden_size", 64), ("image_aspect_ratio", "anyres"),
    ("rope_scaling", {"type": "linear", "factor": 2.0})])
def test_an_original_llava_that_we_do_not_build_is_refused_by_the_name_of_the_field(copied, field,
                                                                                    value):
    folder = copied("original")
    edit(folder / "config.json", lambda c: c.update({field: value}))
    refused(folder, "config.json", field)


def test_an_original_llava_trained_on_cropped_pictures_crops(copied):
    folder = copied("original")
    edit(folder / "config.json", lambda c: c.update(image_aspect_ratio="square"))
    assert weights.load(str(folder)).preprocess.aspect == "crop"


@pytest.mark.parametrize("place", ["beside", "inside", "absolute"])
def test_the_tower_is_found_where_the_config_says(copied, tmp_path, place):
    folder = copied("original")
    expected = state_of(weights.load(str(folder)).model)
    if place == "inside":
        os.rename(tmp_path / "clip", folder / "clip")
    elif place == "absolute":
        os.rename(tmp_path / "clip", tmp_path / "elsewhere")
        edit(folder / "config.json", lambda c: c.update(
            mm_vision_tower=str(tmp_path / "elsewhere")))
    assert equal(state_of(weights.load(str(folder)).model), expected)


def test_a_tower_that_is_nowhere_is_named(copied, tmp_path):
    folder = copied("original")
    shutil.rmtree(tmp_path / "clip")
    refused(folder, "config.json", "mm_vision_tower", "clip")


def test_a_tower_inside_needs_no_other_folder_if_its_name_is_known(copied, small, tmp_path,
                                                                   monkeypatch):
    folder = copied("original, tower inside")
    expected = state_of(weights.load(str(folder)).model)
    shutil.rmtree(tmp_path / "clip")
    edit(folder / "config.json", lambda c: c.update(mm_vision_tower=CLIP_14))
    assert formats.llava.TOWERS[CLIP_14] == VisionConfig(336, 14, 1024, 23, 16, 4096, 1e-5)
    monkeypatch.setitem(formats.llava.TOWERS, CLIP_14, VisionConfig(28, 14, 32, 2, 2, 48))
    assert equal(state_of(weights.load(str(folder)).model), expected)


# ---- CLIP and Vicuna as their authors published them


@torch.no_grad()
def test_openai_s_clip_and_vicuna_open_as_they_were_published(small, tmp_path):
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                vocab_size=60)
    vision = small.theirs.config.vision_config.to_dict()
    both = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    tower = {n.removeprefix("model.vision_tower."): t for n,
             t in native(small.theirs).items() if "vision_tower" in n}
    both.vision_model.load_state_dict(tower)
    state = {n: p.detach().clone() for n, p in both.named_parameters()}
    buffers = {"vision_model.embeddings.position_ids": torch.arange(5)[None],
               "text_model.embeddings.position_ids": torch.arange(77)[None]}
    os.mkdir(tmp_path / "clip")
    torch.save(state | buffers, tmp_path / "clip" / "pytorch_model.bin")
    sizes = {k: vision[k] for k in ("image_size", "patch_size", "hidden_size", "num_hidden_layers",
                                    "num_attention_heads",
                                    "intermediate_size")}
    (tmp_path / "clip" / "config.json").write_text(json.dumps({
        "model_type": "clip", "projection_dim": 8, "text_config": text, "text_config_dict": None,
        "vision_config": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu",
                          "layer_norm_eps": 1e-5, **sizes},
        "vision_config_dict": sizes}))

    llama = {n: p.detach().half() for n, p in small.llama.named_parameters()}
    llama |= {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}
    names = sorted(llama)
    os.mkdir(tmp_path / "vicuna")
    files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, part in files.items():
        torch.save({n: llama[n] for n in part}, tmp_path / "vicuna" / file)
    weight_map = {n: file for file, part in files.items() for n in part}
    (tmp_path / "vicuna" / "pytorch_model.bin.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}))
    (tmp_path / "vicuna" / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "pad_token_id": 0,
        "pretraining_tp": 1, "tie_word_embeddings": False, "torch_dtype": "float16",
        "use_cache": True}))
    small.tokenizer.save(tmp_path / "vicuna")
    model, _, _ = weights.assemble(str(tmp_path / "clip"), str(tmp_path / "vicuna"), STATIC)
    expected = state_of(weights.load(str(small.folder("today"))).model)
    expected = {n: t.half().float() if n.startswith("llm.") else t for n, t in expected.items()}
    assert equal({n: t for n, t in state_of(model).items() if "projector" not in n},
                 {n: t for n, t in expected.items() if "projector" not in n})


REPOSITORIES = {
    "openai/clip": (["config.json", "preprocessor_config.json", "pytorch_model.bin",
                     "tokenizer.json", "vocab.json"],
                    ["tf_model.h5", "flax_model.msgpack", "merges.txt", "README.md"]),
    "lmsys/vicuna": (["config.json", "pytorch_model-00001-of-00002.bin",
                      "pytorch_model-00002-of-00002.bin", "tokenizer.model",
                      "pytorch_model.bin.index.json", "tokenizer_config.json"],
                      ["README.md", "training_args.bin"]),
    "llava-hf/llava": (["config.json", "model-00001-of-00002.safetensors",
                        "model-00002-of-00002.safetensors", "tokenizer.json",
                        "model.safetensors.index.json", "preprocessor_config.json",
                        "processor_config.json"],
                       ["pytorch_model-00001-of-00001.bin", "tf_model.h5", "rust_model.ot",
                        "onnx/model.onnx"]),
    "liuhaotian/llava": (["config.json", "mm_projector.bin", "pytorch_model-00001-of-00001.bin",
                          "tokenizer.model",
                          "pytorch_model.bin.index.json"], ["README.md"]),
    "liuhaotian/projector": (["config.json", "mm_projector.bin"], ["README.md"]),
    "someone/llava-lora": (["config.json", "adapter_config.json", "adapter_model.bin",
                            "non_lora_trainables.bin"], ["README.md", "trainer_state.bin"]),
    "ours/hyperllava": (["config.json", "model.safetensors", "tokenizer.json"],
                        ["log.jsonl", "README.md"]),
}


@pytest.mark.parametrize("name", REPOSITORIES)
def test_of_a_hub_repository_all_that_is_needed_is_fetched_and_nothing_else(name, tmp_path,
                                                                            monkeypatch):
    needed, useless = REPOSITORIES[name]

    def download(asked, allow_patterns):
        assert asked == name
        for file in needed + useless:
            if any(fnmatch(file, pattern) for pattern in allow_patterns):
                (tmp_path / file).touch()
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert formats.folders.resolve(name) == str(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(needed)


# ---- Strictness


def projector_of(small):
    return lambda path: weights.assemble(str(small.root / "clip"), str(small.folder("llama")),
                                         STATIC,
                                         projector=formats.llava.projector_file(path))


def opener(layout, small):
    """How the folder of a layout is opened, and names of some of its tensors with what they are
    called here.
    """
    if layout == "clip":
        return lambda path: weights.assemble(path, str(small.folder("llama")), STATIC)
    if layout == "llama":
        return lambda path: weights.assemble(str(small.root / "clip"), path, STATIC)
    return projector_of(small) if layout == "projector" else weights.load


def file_of(folder):
    return next(folder / n for n in ("model.safetensors", "pytorch_model.bin", "mm_projector.bin")
                if (folder / n).exists())


def read(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def write(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


def shard(folder, state, twice=None):
    """Two shards and an index instead of the one file; the tensor `twice` in both."""
    file = file_of(folder)
    stem, ending = file.stem, file.suffix[1:]
    os.remove(file)
    names = sorted(state)
    halves = [names[::2], names[1::2]]
    files = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    weight_map = {n: f for f, half in zip(files, halves) for n in half}
    (folder / f"{stem}.{ending}.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map}))
    for half in halves:
        half += [twice] if twice and twice not in half else []
    for f, half in zip(files, halves):
        write({n: state[n] for n in half}, folder / f)
    return files
EVERY = ["clip", "llama", *SPELLINGS, *ORIGINALS, "ours", "projector"]


SAMPLES = (r"patch_embedding\.weight|layers\.0\.layer_norm1\.bias"
           r"|(linear_1|mm_projector\.0)\.weight|(linear_2|projector\.2)\.bias"
           r"|layers\.1\.mlp\.up_proj\.weight|embed_tokens\.weight|lm_head\.weight"
           r"|(?<!layer)norm\.weight")


def samples(state):
    """A few names of each part."""
    return [name for name in state if re.search(rf"({SAMPLES})$", name)
            and "norm.weight" not in name] + [
        name for name in state if name.endswith("input_layernorm.weight")][:1]


@pytest.mark.parametrize("layout, change", [
    (layout, change) for layout in EVERY for change in ("dropped", "renamed", "reshaped", "twice")
    if (layout, change) != ("projector", "twice")])  # that one never comes in shards
def test_every_layout_names_the_tensor_that_is_not_as_it_should_be(copied, small, layout, change,
                                                                   tmp_path):
    folder = tmp_path / "clip" if layout == "clip" else copied(layout)
    file, open_ = file_of(folder), opener(layout, small)
    whole = read(file)
    open_(str(folder))
    chosen = samples(whole)
    assert len(chosen) >= (2 if layout in ("clip", "projector") else 3)
    if change == "twice":
        shard(folder, whole, chosen[0])
        return refused(folder, chosen[0], f"-of-00002{file.suffix}", open_=open_)
    for name in chosen:
        state = dict(whole)
        tensor = state.pop(name)
        if change == "renamed":
            state[name + "_"] = tensor
        if change == "reshaped":
            state[name] = tensor[..., :-1].contiguous()
        write(state, file)
        known = {"dropped": name.rpartition(".")[2],
                 "renamed": f"{file.name}: tensor {name}_ has no place",
                 "reshaped": f"{file.name}: tensor {name} is {list(tensor[..., :-1].shape)}"}
        refused(folder, known[change], open_=open_)
        if change == "dropped":
            with pytest.raises(UserError, match=f"no tensor for {re.escape(ours_of(name))}"):
                open_(str(folder))


def ours_of(name):
    """What a tensor is called here, by the tables of this file."""
    rules = [(r"(vision|projector|llm)\..+", r"\g<0>"),
             (r".*mm_projector\.0\.(.+)", r"projector.linear_1.\1"),
             (r".*mm_projector\.2\.(.+)", r"projector.linear_2.\1"),
             (r".*multi_modal_projector\.(.+)", r"projector.\1"),
             (r"(.*vision_tower\.)?(vision_model\.)?encoder\.(.+)", r"vision.\3"),
             (r"(.*vision_tower\.)?(vision_model\.)?((embeddings|pre_layrnorm)\..+)", r"vision.\3"),
             (r".*lm_head\.weight", "llm.lm_head.weight"),
             (r"(language_model\.)?model\.(language_model\.)?(.+)", r"llm.\3")]
    return formats.name_rules.rename(name, rules)


@pytest.mark.parametrize("layout", ["until 4.51", "original", "ours"])
def test_a_layout_in_shards_gives_the_same_model(copied, layout):
    folder = copied(layout)
    expected = state_of(weights.load(str(folder)).model)
    files = shard(folder, read(file_of(folder)))
    assert equal(state_of(weights.load(str(folder)).model), expected)
    whole = (folder / files[1]).read_bytes()
    for keep in (0, 100, -1):
        (folder / files[1]).write_bytes(whole[:keep])
        refused(folder, files[1])
    os.remove(folder / files[1])
    refused(folder, "index.json", files[1], "not there")


@pytest.mark.parametrize("layout", ["until 4.51", "original"])
def test_shards_without_an_index_are_named(copied, layout):
    folder = copied(layout)
    file = file_of(folder).name
    shard(folder, read(folder / file))
    os.remove(folder / f"{file}.index.json")
    refused(folder, f"2 shards without an index: {file}.index.json is missing")


@pytest.mark.parametrize("layout", ["today", "original", "clip", "llama"])
@pytest.mark.parametrize("said, name", [({"quant_method": "gptq", "bits": 4}, "gptq"),
                                        ({"load_in_4bit": True}, "None"), ("awq", "awq")])
def test_quantised_weights_are_refused_before_anything_else(copied, small, tmp_path, layout, said,
                                                            name):
    folder = tmp_path / "clip" if layout == "clip" else copied(layout)
    edit(folder / "config.json", lambda c: c.update(quantization_config=said))
    file_of(folder).write_bytes(b"")
    refused(folder, f"quantised weights (quantization_config, {name})", open_=opener(layout, small))
    if layout == "today":
        edit(folder / "config.json", lambda c: c["text_config"].update(
            quantization_config=c.pop("quantization_config")))
        refused(folder, f"quantised weights (quantization_config, {name})")


@pytest.mark.parametrize("layout, file",
                         [("original", "pytorch_model.bin"), ("projector", "mm_projector.bin")])
def test_code_in_a_pickle_is_refused_and_not_run(copied, small, tmp_path, layout, file):
    folder = copied(layout)
    state = read(folder / file)
    state["model.mm_projector.0.bias"] = Bomb(str(tmp_path / "ran"))
    torch.save(state, folder / file)
    refused(folder, file, "code", open_=opener(layout, small))
    assert not (tmp_path / "ran").exists()


def test_what_is_no_llava_is_named(tmp_path, small):
    for kind in ("llava_next", "mistral", "qwen2_vl"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        refused(tmp_path, repr(kind), "hyperllava, llava, llava_llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    refused(tmp_path, "config.json", "no vision_config")
    refused(small.folder("projector"), "no weights", "model.safetensors")


# ---- LoRA


LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "use_dora": False,
        "base_model_name_or_path": "vicuna", "target_modules": ["q_proj", "down_proj"],
        "modules_to_save": None, "rank_pattern": {}, "use_rslora": False, "lora_dropout": 0.05,
        "init_lora_weights": True, "layers_to_transform": None, "task_type": "CAUSAL_LM"}


@pytest.fixture
def lora(small, tmp_path, monkeypatch):
    """A LoRA folder as LLaVA writes it, with its base `vicuna` and the tower in the working folder.
    """
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "lora"
    shutil.copytree(small.folder("original"), folder)
    state = read(folder / "pytorch_model.bin")
    os.remove(folder / "pytorch_model.bin")
    os.remove(folder / "tokenizer.json")
    shutil.copytree(small.folder("llama"), tmp_path / "vicuna")
    shutil.copytree(small.root / "clip", tmp_path / "clip")
    torch.manual_seed(5)
    torch.save({f"base_model.model.{name}": torch.randn_like(tensor)
                for name, tensor in state.items() if "mm_projector" in name},
               folder / "non_lora_trainables.bin")
    save_file({f"base_model.model.model.layers.{i}.{layer}.lora_{x}.weight": torch.randn(shape)
               for i in range(3) for layer, out, inside in (("self_attn.q_proj", 32, 32),
                                                            ("mlp.down_proj", 32, 48))
               for x, shape in (("A", (4, inside)), ("B", (out, 4)))},
              folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(LORA))
    return folder


def merged(lora, small, scale):
    """Our state of what the LoRA folder means, computed in fp64."""
    state = state_of(weights.load(str(small.folder("original"))).model)
    for name, tensor in read(lora / "non_lora_trainables.bin").items():
        state[ours_of(name)] = tensor
    factors = read(lora / "adapter_model.safetensors")
    for name in [name for name in factors if ".lora_A." in name]:
        ours = name.replace("base_model.model.model.", "llm.").replace(".lora_A", "")
        delta = factors[name.replace("lora_A", "lora_B")].double() @ factors[name].double() * scale
        state[ours] = (state[ours].double() + delta).float()
    return state


def same_to_fp32(found, expected):
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=1e-6, atol=1e-5) for name in expected)


@pytest.mark.parametrize("form", ["safetensors", "bin", "keys without prefixes", "rslora",
                                  "base by option", "base with a projector", "base in half"])
def test_a_lora_folder_opens_merged_in_fp32(lora, small, tmp_path, form):
    base, scale, dtype, factors = None, 2.0, None, read(lora / "adapter_model.safetensors")
    expected = merged(lora, small, 4.0 if form == "rslora" else scale)
    if form == "bin":  # as older versions of peft name them
        os.remove(lora / "adapter_model.safetensors")
        torch.save({re.sub("(lora_.)", r"\1.default", n): t for n, t in factors.items()},
                   lora / "adapter_model.bin")
    elif form == "keys without prefixes":
        whole = lora / "non_lora_trainables.bin"
        torch.save({n.removeprefix("base_model.model.model."): t for n, t in read(whole).items()},
                   whole)
    elif form == "rslora":
        edit(lora / "adapter_config.json", lambda c: c.update(use_rslora=True))
    elif form == "base by option":
        base = str(os.rename("vicuna", "elsewhere") or tmp_path / "elsewhere")
    elif form == "base with a projector":
        base = str(small.folder("original"))
    elif form == "base in half":
        state, dtype = load_file("vicuna/model.safetensors"), torch.float16
        save_file({n: t.half() for n, t in state.items()}, "vicuna/model.safetensors")
        at = "llm.layers.0.self_attn.q_proj.weight"
        delta = expected[at].double() - state[at.replace("llm", "model")].double()
        whole = state[at.replace("llm", "model")].half().double() + delta
    point = weights.load(str(lora), base=base)
    found = state_of(point.model)
    if dtype:
        assert {t.dtype for t in found.values()} == {dtype}  # of the base; rounded once
        assert (found[at].double() - whole).abs().max() <= whole.abs().max() * 2.0 ** -11
        assert weights.load(
            str(lora), torch.float32).model.get_parameter(at).half().equal(found[at])
    else:
        assert same_to_fp32(found, expected)
    assert point.tokenizer.encode("a red ring?") == small.tokenizer.encode("a red ring?")
    assert point.preprocess == Preprocess(28) and point.system == SYSTEM


def test_an_adapter_of_a_llava_in_the_layout_of_transformers_opens_too(lora, small, tmp_path):
    expected = state_of(weights.load(str(small.folder("today"))).model)
    for name in ("config.json", "non_lora_trainables.bin"):
        os.remove(lora / name)
    edit(lora / "adapter_config.json", lambda c: c.update(
        base_model_name_or_path=str(small.folder("today"))))
    names = {f"base_model.model.model.{part}.lora_{x}.weight": part for x in "AB" for part in (
        "language_model.layers.1.mlp.up_proj", "vision_tower.encoder.layers.2.self_attn.q_proj",
        "vision_tower.encoder.layers.0.self_attn.q_proj", "multi_modal_projector.linear_1")}
    shapes = {n: tuple(small.theirs.get_parameter(f"model.{part}.weight").shape)
              for n, part in names.items()}
    factors = {n: torch.ones((4, i) if "lora_A" in n else (o, 4)) for n, (o, i) in shapes.items()}
    save_file(factors, lora / "adapter_model.safetensors")
    found = state_of(weights.load(str(lora)).model)
    changed = {n: float((found[n] - expected[n]).mean()) for n in found
               if not torch.equal(found[n], expected[n])}
    assert changed == {n: pytest.approx(8.0) for n in (
        "llm.layers.1.mlp.up_proj.weight", "vision.layers.0.self_attn.q_proj.weight",
        "projector.linear_1.weight")}  # the tower's last block is not used


@pytest.mark.parametrize("change, words", [
    ({"use_dora": True}, ["use_dora True"]), ({"bias": "all"}, ["bias 'all'"]),
    ({"peft_type": "IA3"}, ["peft_type 'IA3'"]),
    ({"modules_to_save": ["embed_tokens"]}, ["modules_to_save ['embed_tokens']"]),
    ({"rank_pattern": {"q_proj": 8}}, ["rank_pattern"]),
    ({"alpha_pattern": {"q_proj": 8}}, ["alpha_pattern"]),
    ({"alora_invocation_tokens": [5]}, ["alora_invocation_tokens [5]"]),
    ({"init_lora_weights": "pissa"}, ["init_lora_weights 'pissa'"]),
    ({"r": 8}, ["lora_A.weight is [4, ", "r is 8"]), ({"r": None}, ["r is None"]),
    ({"lora_alpha": "8"}, ["lora_alpha is '8'"]), ({"use_rslora": 1}, ["use_rslora is 1"]),
    ({"base_model_name_or_path": None}, ["base_model_name_or_path is None"]),
    ({"base_model_name_or_path": "nowhere"}, ["nowhere: no such folder", "--base"])])
def test_a_lora_with_another_setting_is_refused_by_its_name(lora, change, words):
    edit(lora / "adapter_config.json", lambda c: c.update(change))
    refused(lora, *words)


@pytest.mark.parametrize("change, words", [
    (lambda f: f.popitem(), ["has only one of its two factors"]),
    (lambda f: f.update({"base_model.model.model.layers.9.mlp.down_proj.lora_A.weight":
                         torch.ones(4, 48)}), ["layers.9.mlp", "no place in the base"]),
    (lambda f: f.update({"base_model.model.model.layers.0.mlp.down_proj.lora_magnitude_vector":
                         torch.ones(32)}), ["lora_magnitude_vector has no place"]),
    (lambda f: f.update({n: t.flatten() for n, t in f.items() if "0.mlp.down_proj" in n}),
     ["r is"]),
    (lambda f: f.update({n: t[:, :-1].contiguous() for n, t in f.items() if "_A" in n}),
     ["is this the base"])])
def test_a_lora_is_read_strictly(lora, change, words):
    factors = read(lora / "adapter_model.safetensors")
    change(factors)
    save_file(factors, lora / "adapter_model.safetensors")
    refused(lora, *words)


def test_a_lora_folder_without_a_part_or_with_another_base_is_refused(lora, small):
    whole = read(lora / "non_lora_trainables.bin")
    write({**whole, "base_model.model.model.norm.bias": torch.ones(32)},
          lora / "non_lora_trainables.bin")
    refused(lora, "norm.bias has no place")
    write(dict(list(whole.items())[1:]), lora / "non_lora_trainables.bin")
    refused(lora, "no tensor for projector.linear_1.weight")
    os.remove(lora / "non_lora_trainables.bin")
    refused(lora, "a LoRA without non_lora_trainables.bin")
    write(whole, lora / "non_lora_trainables.bin")
    weights.load(str(lora))
    for change, words in (({"vocab_size": 321},
                           "vicuna/model.safetensors: tensor lm_head.weight is [320"),
                          ({"num_hidden_layers": 2}, "has no place"),
                          ({"num_hidden_layers": 4}, "no tensor for llm.layers.3")):
        with_change = shutil.copytree(lora, f"{lora}_other", dirs_exist_ok=True)
        edit(os.path.join(with_change, "config.json"), lambda c: c.update(change))
        refused(with_change, words)
    shutil.copy("vicuna/model.safetensors", lora)
    refused(lora, "lora/model.safetensors is a whole model, and", "a LoRA")
    refused(small.folder("original"), "--base vicuna", "not a LoRA",
            open_=lambda path: weights.load(path, base="vicuna"))
    os.remove(lora / "model.safetensors")
    os.remove(lora / "config.json")
    refused(lora, "vicuna/config.json: format 'llama' cannot be opened")


def test_a_lora_is_asked_exported_and_trained_on_as_any_other_checkpoint(lora, small, monkeypatch,
                                                                         capsys):
    expected = state_of(weights.load(str(lora)).model)
    os.rename("vicuna", "elsewhere")
    for program, words in ((tools.export_llava, ["--export", "whole"]),
                           (sample, ["--prompt", "a", "--max_new_tokens", "2"])):
        monkeypatch.setattr(sys, "argv", ["x", "--model", "lora", "--base", "elsewhere", *words])
        program.run()
    assert "2 tokens" in capsys.readouterr().err
    assert equal(state_of(weights.load("whole").model), expected)
    given = {"init": "lora", "base": "elsewhere", "data": "d.json", "images": ".", "stage": 2}
    model = train.build_model(training.options.Options(**given, dtype="float32"))[0]
    found = state_of(model)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(UserError, match="--base elsewhere: only for stage 2"):
        training.options.check_needed(training.options.Options(**given | {"stage": 1}), given)


# ---- Writing LLaVA


@pytest.fixture(scope="module")
def written(small, grouped, tmp_path_factory):
    """{case: (checkpoint, folder that write_llava made of it)}; in the first, the tokenizer fills
    the vocabulary.
    """
    root, made = tmp_path_factory.mktemp("written"), {}
    full = weights.load(str(small.folder("today")))
    full.model.cfg.llm.vocab = IDS
    for name in formats.name_rules.BY_ID:
        weights.assign(full.model, name, full.model.get_parameter(name).data[:IDS])
    full.system = 'Say "no" to {{ braces }}.\nBe brief.'
    for case, point in {"full": full, "room": weights.load(str(small.folder("original"))),
                        "tied": weights.load(str(grouped.folder("today")))}.items():
        made[case] = point, str(root / case)
        formats.export.write_llava(made[case][1], point.model, point.tokenizer, point.preprocess,
                                   point.system)
    return made


@pytest.mark.parametrize("case", ["full", "room", "tied"])
@torch.no_grad()
def test_transformers_opens_the_llava_that_we_write_and_gives_our_logits_and_tokens(written, case):
    point, folder = written[case]
    theirs = opened(transformers.LlavaForConditionalGeneration, folder)
    model, image = point.model, theirs.config.image_token_id
    assert theirs.config.text_config.vocab_size == 320 > image >= IDS
    side, rows = model.cfg.vision.image_size, [prompt(model, n) for n in range(1, 5)]
    visual = torch.randn(4, 3, side, side)
    for ids, picture in zip(rows, visual):
        ours = answers(model, ids, picture)
        logits = theirs(input_ids=torch.tensor([ids]).masked_fill(torch.tensor([ids]) == IMAGE,
                                                                  image),
                        pixel_values=picture[None]).logits
        assert close(ours, logits[..., :ours.shape[-1]])
        # their rows are the mean of the others, and so never the likeliest
        added = logits[..., ours.shape[-1]:]
        assert (added - ours.mean(-1, keepdim=True)).abs().lt(1e-3).all()
    assert generate(model, batch_of(rows, visual), 8, 2) == theirs_generate(theirs, rows, visual, 8,
                                                                            image)


@pytest.mark.parametrize("case", ["full", "room", "tied"])
def test_what_we_write_loads_bit_for_bit(written, case):
    point, folder = written[case]
    back = weights.load(folder)
    assert equal(state_of(back.model), state_of(point.model)) and back.model.cfg == point.model.cfg
    assert back.preprocess == point.preprocess and back.system == point.system
    assert back.tokenizer.encode("a red ring?") == point.tokenizer.encode("a red ring?")


def test_the_background_of_transparent_pixels_is_kept(written, tmp_path):
    point, _ = written["full"]
    white, folder = dataclasses.replace(point.preprocess, background="white"), str(tmp_path / "x")
    formats.export.write_llava(folder, point.model, point.tokenizer, white, point.system)
    assert weights.load(folder).preprocess == white
    edit(tmp_path / "x/config.json", lambda c: c.update(background="red"))
    with pytest.raises(UserError, match="config.json: background is 'red', expected one of 'none'"):
        weights.load(folder)


def test_writing_what_was_loaded_gives_the_same_files(written, tmp_path):
    for point, folder in written.values():
        back = weights.load(folder)
        again = str(tmp_path / os.path.basename(folder))
        formats.export.write_llava(again, back.model, back.tokenizer, back.preprocess, back.system)
        for name in os.listdir(folder):
            assert open(f"{folder}/{name}", "rb").read() == open(f"{again}/{name}",
                                                                 "rb").read(), name


@pytest.mark.parametrize("aspect, size", [("pad", (40, 23)), ("pad", (23, 40)), ("crop", (40, 23))])
def test_the_processor_of_transformers_makes_our_pixels_and_ids(written, tmp_path, aspect, size):
    point, _ = written["full"]
    prep = Preprocess(28, aspect=aspect)
    folder = str(tmp_path / "x")
    formats.export.write_llava(folder, point.model, point.tokenizer, prep, point.system)
    assert weights.load(folder).preprocess == prep
    processor = transformers.AutoProcessor.from_pretrained(folder)
    text = lambda value: [{"type": "text", "text": value}]
    messages = [{"role": "user", "content": [{"type": "image"}, *text("what colour?")]},
                {"role": "assistant", "content": text("a red circle")},
                {"role": "user", "content": "is \"the\"\nring blue?"}]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8))
    made = processor(images=picture, text=processor.apply_chat_template(messages),
                     return_tensors="pt")
    sample = encode_prompt([("<image>\nwhat colour?", "a red circle")], "is \"the\"\nring blue?",
                           point.tokenizer, point.prompt_format(), "x")
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert made["input_ids"][0].tolist() == [image if i == IMAGE else i
                                             for i in sample.ids.tolist()]
    assert (made["pixel_values"][0] - pixels(picture, prep)).abs().max() < 1e-6


def test_added_tokens_are_written_with_their_ids(small, tmp_path):
    folder = shutil.copytree(small.folder("today"), tmp_path / "x")
    with_added(small.tokenizer, folder, ("[SEG]", IDS, False))
    point = weights.load(str(folder))
    out = str(tmp_path / "out")
    formats.export.write_llava(out, point.model, point.tokenizer, point.preprocess, point.system)
    back, theirs = weights.load(out).tokenizer, transformers.AutoTokenizer.from_pretrained(out)
    assert back.encode("a [SEG]") == point.tokenizer.encode("a [SEG]")
    assert IDS in back.encode("a [SEG]") and IDS == theirs.convert_tokens_to_ids("[SEG]")
    with_added(small.tokenizer, folder, ("[SEG]", IDS + 1, False))  # IDS is nobody's
    point = weights.load(str(folder))
    with pytest.raises(UserError, match=rf"\[SEG\] has the id {IDS + 1}; .* give it {IDS}"):
        formats.export.write_llava(out, point.model, point.tokenizer, point.preprocess, "")


def test_a_model_with_experts_is_not_written(small, tmp_path):
    model = weights.load(str(small.folder("today")), experts={"visual_expert": "1"}).model
    with pytest.raises(UserError, match="visual_expert 1.*experts does not fit"):
        formats.export.write_llava(str(tmp_path / "x"), model, small.tokenizer, Preprocess(28),
                                   SYSTEM)
    assert not os.listdir(tmp_path)


def test_export_writes_what_transformers_opens_and_overwrites_nothing(small, tmp_path, monkeypatch):
    out = str(tmp_path / "x")
    monkeypatch.setattr(sys, "argv",
                        ["weights.py", "--model", str(small.folder("ours")), "--export", out])
    tools.export_llava.run()
    opened(transformers.LlavaForConditionalGeneration, out)
    with pytest.raises(UserError, match="holds a checkpoint already"):
        tools.export_llava.run()
    with pytest.raises(UserError, match="--model CHECKPOINT --export FOLDER"):
        tools.export_llava.Options(model="x")


# ---- Straight to stage 2


@pytest.fixture(scope="module")
def stage_2(tmp_path_factory, small):
    """Options of a stage 2 on four pictures."""
    root = tmp_path_factory.mktemp("data")
    rng, records = np.random.default_rng(0), []
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (30, 20 + i, 3), dtype=np.uint8)).save(
            root / f"{i}.png")
        records.append({"id": str(i), "image": f"{i}.png", "conversations": [
            {"from": "human", "value": "<image>\nwhat colour is it?"},
            {"from": "gpt", "value": "a red circle"},
            {"from": "human", "value": "a ring?"}, {"from": "gpt", "value": f"a square {i}"}]})
    (root / "data.json").write_text(json.dumps(records))
    return {"preset": "7b", "data": str(root / "data.json"), "images": str(root),
            "val": str(root / "data.json"), "batch_size": 4,
            "steps": 2, "dtype": "float32", "device": "cpu", "val_every": 1, "context": 512,
            "expert_embed": 4, "expert_rank": 2,
            "lr": 1e-3, "warmup": 0.0}


def rows(out):
    return [json.loads(line) for line in open(os.path.join(out, "stage2", "log.jsonl"))]


def loss_of(point, given):
    """Loss per token of a checkpoint on the data of a stage 2, computed without the training loop.
    """
    layout = point.prompt_format()
    data = Conversations(given["data"], given["images"], point.tokenizer, layout)
    order = training.feed.BatchSampler(4, 0, 4).step(0)
    taken = [data[i] for i in order]
    visual = [pixels(Image.open(s.image).convert("RGB"), point.preprocess) for s in taken]
    batch = collate(taken, visual, (3, 28, 28), multiple=MULTIPLE)
    with torch.no_grad():
        return point.model.loss(batch).item() / batch.trained


@pytest.mark.parametrize("layout", ["until 4.51", "original"])
def test_stage_2_starts_from_a_llava_with_its_very_loss_and_trains_experts_from_zero(
    small, stage_2, mesh, tmp_path, layout):
    start = weights.load(str(small.folder(layout)))
    given = stage_2 | {"init": str(small.folder(layout)), "out": str(tmp_path)}
    train.run_stage(given, 2, mesh)
    log = rows(tmp_path)
    # a sum divided first or last
    assert log[0]["loss"] == pytest.approx(loss_of(start, given), abs=0, rel=1e-7)
    assert log[1]["loss"] < log[0]["loss"] - 0.01
    end = weights.load(str(tmp_path / "stage2"))
    assert (end.model.cfg.visual_expert, end.model.cfg.language_expert) == ("1", "posterior")
    # zero at the start
    assert end.model.llm.layers[-1].expert.up.any() and end.model.projector.expert_1.expert.up.any()
    # and from that one a further stage 2
    train.run_stage(given | {"init": str(tmp_path / "stage2"), "out": str(tmp_path / "more")}, 2,
                    mesh)
    assert rows(tmp_path / "more")[0]["loss"] == pytest.approx(loss_of(end, given), abs=0, rel=1e-7)


def test_experts_added_to_a_llava_leave_its_logits_as_they_were_bit_for_bit(small, stage_2, mesh,
                                                                            tmp_path):
    given = stage_2 | {"init": str(small.folder("today")), "out": str(tmp_path)}
    stage = train.vlm_stage(training.options.complete(given, 2))
    static = weights.load(str(small.folder("today"))).model
    batch = stage.data.batch(range(4))
    validation = stage.val_batches[0]
    with torch.no_grad():
        assert torch.equal(stage.model(batch), static(batch))
        assert len(list(stage.model.parameters())) > len(list(static.parameters()))
        assert stage.model.loss(validation) == static.loss(validation)


@pytest.mark.parametrize("named", ["mm_projector.bin", ""])
def test_stage_2_starts_from_the_projector_that_llavas_stage_1_left(small, stage_2, mesh, tmp_path,
                                                                    named):
    given = stage_2 | {"init": str(small.folder("projector") / named), "out": str(tmp_path),
                       "vision": str(small.root / "clip"),
                       "llm": str(small.folder("llama"))}
    stage = train.vlm_stage(training.options.complete(given, 2))
    expected = state_of(weights.load(str(small.folder("today"))).model)
    found = state_of(stage.model)
    assert equal({n: found[n] for n in expected}, expected)
    assert any("expert" in n for n in found)
    if named:
        for part in ("vision", "llm"):
            with pytest.raises(UserError, match=f"needs --{part}$"):
                training.options.complete({k: v for k, v in given.items() if k != part}, 2)


def test_a_projector_of_another_kind_is_refused_by_the_name_of_the_field(copied):
    folder = copied("projector")
    edit(folder / "config.json", lambda c: c.update(mm_vision_select_layer=-1))
    for path in (folder, folder / "mm_projector.bin"):
        refused(path, "mm_vision_select_layer", open_=formats.llava.projector_file)


# ---- Loading for experiments/bench.py


TINY = VisionConfig(28, 14, 32, 2, 2, 48), LlamaConfig(32, 2, 4, 4, 48, 300)


def to_bin(folder):
    """Make each safetensors file of a folder a pytorch_model*.bin in float16, and its index."""
    as_bin = lambda text: text.replace("model", "pytorch_model").replace(".safetensors", ".bin")
    for path in pathlib.Path(folder).glob("*.safetensors"):
        torch.save({name: t.half() for name, t in load_file(path).items()},
                   path.with_name(as_bin(path.name)))
        path.unlink()
    for path in pathlib.Path(folder).glob("*.index.json"):
        index = json.loads(path.read_text())
        names = {name: as_bin(file) for name, file in index["weight_map"].items()}
        path.with_name(as_bin(path.name)).write_text(json.dumps(index | {"weight_map": names}))
        path.unlink()


@pytest.mark.parametrize("dtype, ending, shard",
                         [("bfloat16", "safetensors", 5 * 10**9), ("float16", "bin", 40_000)])
def test_bench_makes_a_llava_that_both_open_and_measures_its_loading(tmp_path, monkeypatch, capsys,
                                                                     dtype, ending, shard):
    monkeypatch.setitem(shapes.SHAPES, "7b", TINY)
    monkeypatch.setattr(formats.weight_files, "SHARD", shard)
    folder = str(tmp_path / "x")
    loading.make("7b", folder)
    if ending == "bin":
        to_bin(folder)
    files = sum(n.endswith(ending) for n in os.listdir(folder))
    assert f" in {files} files" in capsys.readouterr().out and (files > 2) == (ending == "bin")
    point = weights.load(folder)
    assert point.model.cfg == VLMConfig(*TINY, "none", "none")
    assert {str(p.dtype) for p in point.model.parameters()} == {f"torch.{dtype}"}
    assert len(point.tokenizer.inner.get_vocab()) == 300
    assert point.model.llm.embed_tokens.weight.std() > 0.01
    theirs = opened(transformers.LlavaForConditionalGeneration, folder)
    assert torch.equal(theirs.model.language_model.norm.weight.to(point.model.llm.norm.weight),
                       point.model.llm.norm.weight)
    found = loading.measure(folder, "ours")
    assert found.keys() == {"load_s", "touch_s", "peak_bytes"} and found["load_s"] > 0


def test_the_made_up_7b_has_the_shapes_of_llava_1_5():
    model = weights.build_empty(VLMConfig(*shapes.SHAPES["7b"], "none", "none"))
    block = sum(p.numel() for p in model.vision.layers[0].parameters())
    # with the block and the norm left out
    assert sum(p.numel() for p in model.parameters()) + block + 2 * 1024 == 7_062_902_784
    state = formats.export.llava_state(model, 32064)
    assert len(state) == 686 and state["language_model.lm_head.weight"].shape == (32064, 4096)


@pytest.mark.slow
def test_a_model_loads_within_1_15_times_its_size(tmp_path):
    folder = str(tmp_path / "x")
    loading.make("1b", folder)
    found = loading.compare(folder, 1, False)[0]
    assert found["ours"]["peak_bytes"] < 1.15 * found["bytes"]
    to_bin(folder)
    assert loading.measure_apart(folder, "ours")["peak_bytes"] < 1.15 * found["bytes"]


def test_a_model_type_that_is_no_name_is_one_line(copied):
    folder = copied("today")
    edit(folder / "config.json", lambda c: c.update(model_type=[]))
    refused(folder, "config.json", "cannot be opened")


def test_no_added_token_is_drawn(small, tmp_path):
    folder = shutil.copytree(small.folder("today"), tmp_path / "x")
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    n = inner.get_vocab_size()
    inner.add_special_tokens(["<image>", "<pad>"])
    inner.save(str(folder / "tokenizer.json"))
    point = weights.load(str(folder))
    assert point.tokenizer.vocab == n and point.tokenizer.added >= {n, n + 1}
    head = point.model.llm.lm_head.weight.data
    head[n:] = 5 * head[5]
    chat = sample.Chat(point, None, sample.Options(temperature=1.0, max_new_tokens=100))
    list(chat.ask("a"))
    assert max(chat.ids) < n


def test_ids_beyond_the_embedding_are_refused_though_they_are_few(copied):
    folder = copied("today")
    edit(folder / "tokenizer.json", lambda v: v["model"]["vocab"].update({"zz": 5000}))
    refused(folder, "5001 ids", "320")


@pytest.mark.parametrize("file, change", [
    ("config.json", {"tie_word_embeddings": "no"}),
    ("preprocessor_config.json", {"image_mean": None}),
    ("preprocessor_config.json", {"image_std": [0.5]}),
    ("preprocessor_config.json", {"rescale_factor": 1.0}),
    ("processor_config.json", {"image_processor": 3})])
def test_a_value_of_another_type_is_one_line(copied, file, change):
    folder = copied("today")
    (folder / file).touch()
    if not (folder / file).read_text():
        (folder / file).write_text("{}")
    edit(folder / file, lambda c: c.update(change))
    refused(folder, file, next(iter(change)))


def test_odd_fields_of_the_parts_are_one_line(copied):
    folder = copied("today")
    edit(folder / "config.json", lambda c: c["text_config"].update(rope_parameters="linear"))
    refused(folder, "rope_parameters")


@pytest.mark.parametrize("tower", [None, 3, []])
def test_a_tower_without_a_name_is_one_line(copied, tower):
    folder = copied("original")
    edit(folder / "config.json", lambda c: c.update(mm_vision_tower=tower))
    refused(folder, "mm_vision_tower")


@pytest.mark.parametrize("state", [{}, {1: torch.zeros(2)}])
def test_a_file_without_named_tensors_is_one_line(copied, state):
    folder = copied("original")
    torch.save(state, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin")


@pytest.mark.parametrize("weight_map",
                         [{}, {"model.norm.weight": None}, {"model.norm.weight": ["x"]}])
def test_an_index_of_nothing_is_one_line(copied, weight_map):
    folder = copied("original")
    (folder / "pytorch_model.bin").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(folder, "pytorch_model.bin.index.json")


def test_a_fingerprint_sees_a_change_in_the_middle_of_the_weights(tmp_path):
    weights_of = {name: torch.rand(2**20) for name in "abc"}  # 12 MB
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        save_file(weights_of, tmp_path / name / "model.safetensors")
        weights_of["b"] = torch.rand(2**20)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    assert formats.weight_files.fingerprint(one) != formats.weight_files.fingerprint(two)
    assert formats.weight_files.ends_fingerprint(one) == formats.weight_files.ends_fingerprint(two)
    (tmp_path / "two" / "model.safetensors").write_bytes(
        (tmp_path / "one" / "model.safetensors").read_bytes())
    before = formats.weight_files.fingerprint(two)
    assert before == formats.weight_files.fingerprint(one)
    (tmp_path / "two" / "non_lora_trainables.bin").write_bytes(b"projector")
    assert formats.weight_files.fingerprint(two) != before
