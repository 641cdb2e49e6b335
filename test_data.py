"""What data.py claims, one test per sentence. CPU, no network; references: transformers, sentencepiece."""
import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import data
from cli import UserError
from data import (IGNORE, IMAGE, SYSTEM, Conversations, Layout, Order, Preprocess, Tokenizer, check_causal, collate,
                  conversation, encode, encode_prompt, open_image, pixels)

QUESTIONS = ["What colour is the large circle?", "Is there a red square?", "How many triangles are there?"]
ANSWERS = ["red", "yes", "top left", "A cat.", "Black and white"]
TEXTS = ([f"USER: {q} ASSISTANT:" for q in QUESTIONS] + [f"\n{q} ASSISTANT:" for q in QUESTIONS]
         + ["USER: ", SYSTEM] + ANSWERS) * 20
TURNS = [("<image>\nWhat colour is the large circle?", "red"), ("Is there a red square?", "A cat."),
         ("How many triangles are there?", "Black and white")]
LAYOUT = Layout(image_tokens=9, context=400)


@pytest.fixture(scope="module")
def tokenizer():
    return data.train_tokenizer(TEXTS, 500)


def messages(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


GOOD = {"id": "a1", "image": "x.png", "conversations": messages("What is this?\n<image>", "A cat.", "Colour?", "red")}


def write_json(folder, records):
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return str(path)


# Pixels

def picture(mode, width, height):
    """A PNG or, for CMYK, a TIFF of noise, as an open file."""
    bands = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "CMYK": 4, "RGBA": 4}[mode]
    noise = np.random.default_rng(width * height).integers(0, 256, (height, width, bands), np.uint8)
    if mode == "P":
        image = Image.fromarray(noise.repeat(3, 2)).quantize(17)
    else:
        image = Image.frombytes(mode, (width, height), noise.tobytes())
    file = io.BytesIO()
    image.save(file, "TIFF" if mode == "CMYK" else "PNG")
    file.seek(0)
    return file


def expand2square(image, colour):
    """LLaVA's rule, by numpy: the picture in the middle, what is odd below or right."""
    w, h = image.size
    side = max(w, h)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = colour
    top, left = (side - h) // 2, (side - w) // 2
    canvas[top:top + h, left:left + w] = np.asarray(image)
    return Image.fromarray(canvas)


@pytest.mark.parametrize("mode, width, height", [
    ("RGB", 1, 1), ("RGB", 3, 500), ("RGB", 500, 3), ("RGB", 336, 336), ("RGB", 337, 501), ("RGB", 100, 37),
    ("RGB", 335, 336), ("L", 41, 60), ("P", 60, 41), ("LA", 50, 33), ("CMYK", 33, 70), ("RGBA", 70, 33)])
def test_pixels_are_those_of_CLIPImageProcessor(mode, width, height):
    size = 48 if (width, height) in ((3, 500), (500, 3)) else 336
    reference = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    # LLaVA's own conversion first: the processor would lay what is transparent over white
    theirs = Image.open(picture(mode, width, height)).convert("RGB")
    ours = open_image(picture(mode, width, height), "p")
    for aspect in ("pad", "crop"):
        padded = expand2square(theirs, (122, 116, 104)) if aspect == "pad" else theirs
        expected = reference(padded, return_tensors="pt")["pixel_values"][0]
        got = pixels(ours, Preprocess(size, aspect=aspect))
        assert got.dtype == torch.float32 and got.shape == (3, size, size) and got.is_contiguous()
        assert (got - expected).abs().max() < 1e-6


def test_pixels_follow_the_mean_and_std_they_are_given():
    got = pixels(Image.new("RGB", (4, 4), (255, 0, 51)), Preprocess(4, mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 1.0)))
    assert torch.allclose(got[:, 0, 0], torch.tensor([1.0, -2.0, 0.0]), atol=1e-6)


def test_the_first_frame_is_taken_and_exif_does_not_turn_it():
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "blue")]
    gif, jpeg, exif = io.BytesIO(), io.BytesIO(), Image.Exif()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    frames[0].save(jpeg, "JPEG", exif=exif)
    assert open_image(gif, "g").getpixel((0, 0)) == (255, 0, 0)
    assert open_image(jpeg, "j").size == (8, 4)


def test_sixteen_bits_are_converted_as_pillow_does():
    image = Image.fromarray(np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16))
    file = io.BytesIO()
    image.save(file, "PNG")
    assert np.array_equal(np.asarray(open_image(file, "p")), np.asarray(Image.open(file).convert("RGB")))


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated", "folder", "large", "huge"])
def test_a_picture_that_cannot_be_read_is_an_error_that_names_it(damage, tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    assert open_image(path, "p").size == (40, 40)
    if damage == "missing":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage in ("large", "huge"):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", {"large": 1599, "huge": 700}[damage])
    else:
        path.write_bytes({"empty": b"", "text": b"not a picture", "truncated": whole[:len(whole) // 2]}[damage])
    warns = pytest.warns(Image.DecompressionBombWarning) if damage == "large" else contextlib.nullcontext()
    with warns:
        with pytest.raises(UserError, match="record 7: p.png"):
            open_image(path, "record 7: p.png")


# Tokens

STRANGE = ["", " ", "  ", "a", " a", "a ", "\n", "\n\n a\n", "a   b\t\r\n", "naïve café", "日本語", "👩‍👩‍👧 \U0001F600", "\0\x7f",
           "</s>", "<s> x </s><unk>", "<0x0A>", "x" * 700, "USER: hi ASSISTANT:", "<image>\nQ", "\ufffd"]


def test_any_text_comes_back(tokenizer):
    draw = random.Random(0)
    alphabet = "ab USER:</s>\n\t é日😀.?<0x0A>\u200d"
    for text in STRANGE + ["".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(300)]:
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
    assert [inner.token_to_id(t) for t in ("<unk>", "<s>", "</s>", "<0x00>", "<0xFF>")] == [0, 1, 2, 3, 258]
    assert (tokenizer.pad, tokenizer.bos, tokenizer.eos) == (0, 1, 2)
    assert tokenizer.vocab == inner.get_vocab_size() == max(inner.get_vocab().values()) + 1 <= 500
    assert tokenizer.encode("é日") == [inner.token_to_id("▁")] + [3 + b for b in "é日".encode()]


def test_no_token_crosses_a_space_and_cutting_first_gives_the_same_ids(tokenizer):
    assert all("▁" not in token[1:] for token in tokenizer.inner.get_vocab())
    cut = tokenizers.Tokenizer.from_str(tokenizer.inner.to_str())
    cut.pre_tokenizer = tokenizers.pre_tokenizers.Split("▁", "merged_with_next")
    for text in STRANGE + TEXTS[:12]:
        assert cut.encode(text).ids == tokenizer.encode(text)


def test_training_depends_on_the_texts_alone(tokenizer):
    assert data.train_tokenizer(TEXTS, 500).file == tokenizer.file
    assert data.train_tokenizer(reversed(TEXTS), 500).file == tokenizer.file


def test_a_control_token_that_is_frequent_in_the_texts_stays_text():
    text = "a</s> b</s> c</s> <s>a <s>b <s>c a<0x0A> b<0x0A>"
    trained = data.train_tokenizer([text] * 50, 320)
    ids = trained.encode(text)
    assert min(ids) > 258 and trained.decode(ids) == text
    assert (trained.pad, trained.bos, trained.eos) == (0, 1, 2)


def test_a_newline_is_a_byte_and_the_word_behind_it_a_token():
    space, newline, word = data.train_tokenizer(["\nzebra", "lion\n"] * 50, 320).encode("\nzebra")
    assert newline == 3 + ord("\n") and word > 258


def test_a_vocabulary_that_cannot_hold_the_characters_is_refused():
    with pytest.raises(UserError, match="too small"):
        data.train_tokenizer(["abcdefgh"], 264)


def test_a_tokenizer_survives_saving_and_pickling(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    text = "USER: </s> is </s>"
    for other in (Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode(text) == tokenizer.encode(text) and other.file == tokenizer.file
        assert (other.bos, other.eos, other.pad, other.vocab) == (1, 2, 0, tokenizer.vocab)
    assert other.decode([1] + other.encode("red") + [2]) == "red"


def test_added_tokens_of_a_file_are_counted_but_never_read_from_text(tokenizer, tmp_path):
    inner = tokenizers.Tokenizer.from_str(tokenizer.file)
    inner.add_tokens(["<image>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab == tokenizer.vocab + 1
    assert loaded.encode("a <image> b") == tokenizer.encode("a <image> b")
    assert loaded.decode([tokenizer.vocab] + tokenizer.encode("red")) == "red"


def test_a_folder_without_a_tokenizer_is_an_error_that_says_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json.*tokenizer.model"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="</s>"):
        Tokenizer.load(tmp_path)


# Conversations

def spans(mask):
    """[(start, end), ...] of the runs of True."""
    edges = np.flatnonzero(np.diff(np.r_[0, np.asarray(mask, int), 0]))
    return list(zip(edges[::2], edges[1::2]))


def tag(turn):
    """TURNS with the picture in another turn, or in none."""
    bare = [(q.removeprefix("<image>\n"), a) for q, a in TURNS]
    return [("<image>\n" * (i == turn) + q, a) for i, (q, a) in enumerate(bare)]


@pytest.mark.parametrize("system", ["", SYSTEM])
@pytest.mark.parametrize("tagged", [0, 1, None])
def test_labels_cover_exactly_the_answers_with_their_end_token(tokenizer, system, tagged):
    turns = tag(tagged)
    s = encode(turns, tokenizer, dataclasses.replace(LAYOUT, system=system), "r", None if tagged is None else "x")
    trained = s.labels != IGNORE
    assert [tokenizer.decode(s.labels[a:b]) for a, b in spans(trained)] == [a for _, a in turns]
    assert all(s.labels[b - 1] == tokenizer.eos for _, b in spans(trained))
    assert np.array_equal(s.ids[trained], s.labels[trained])
    assert (s.ids[~trained] != tokenizer.eos).all() and (s.ids == tokenizer.bos).nonzero()[0].tolist() == [0]
    assert (s.ids == IMAGE).sum() == (0 if tagged is None else 9)


def test_a_sample_is_its_pieces_one_after_the_other(tokenizer):
    e = tokenizer.encode
    s = encode(TURNS[:2], tokenizer, LAYOUT, "r", "x")
    assert s.ids.tolist() == (
        [1] + e(SYSTEM) + e("USER: ") + [IMAGE] * 9 + e("\nWhat colour is the large circle? ASSISTANT:") + e("red") + [2]
        + e("USER: Is there a red square? ASSISTANT:") + e("A cat.") + [2])


def test_plain_is_picture_caption_newline_and_trains_the_last_two(tokenizer):
    s = encode([("<image>\nDescribe.", "red")], tokenizer, Layout("plain", image_tokens=9), "r", "x")
    caption = tokenizer.encode("red\n")
    assert s.ids.tolist() == [1] + [IMAGE] * 9 + caption and s.labels.tolist() == [IGNORE] * 10 + caption
    assert caption[-1] == 3 + ord("\n")
    assert set(s.pool_id) == set(s.use_id) == {-1} and s.turns == 1


class Slow:
    """Llama's slow tokenizer: what LLaVA was trained with."""
    bos, eos = 1, 2

    def __init__(self, path):
        self.processor = sentencepiece.SentencePieceProcessor(model_file=path)
        self.encode = self.processor.encode

    def llava(self, prompt):
        """LLaVA's tokenizer_image_token of a finished prompt, in Llama's legacy form: each part with its own space."""
        ids = [self.bos]
        for i, chunk in enumerate(prompt.split("<image>")):
            ids += [IMAGE] * (i > 0)
            for j, part in enumerate(chunk.split("</s>")):
                ids += [self.eos] * (j > 0) + self.encode(part)
        return ids


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "texts").write_text("\n".join(text.replace("\n", " ") for text in TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "texts"), model_prefix=str(folder / "m"), model_type="bpe", vocab_size=380,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    return Slow(str(folder / "m.model"))


@pytest.mark.parametrize("question, answer", [
    ("<image>\nWhat colour is it?", "red"), ("<image>", " red \n"), ("<image>\nIs it?\nAnswer <a>", "")])
def test_the_ids_are_llavas_in_their_legacy_form(slow, question, answer):
    layout = dataclasses.replace(LAYOUT, image_tokens=1)
    turns = [(question, answer), ("Is there a red square?", "A cat."), ("Why", "yes")]
    prompt = f"{SYSTEM} USER: {question} ASSISTANT:{' ' * bool(answer)}{answer}</s>"
    prompt += "USER: Is there a red square? ASSISTANT: A cat.</s>USER: Why ASSISTANT: yes</s>"
    assert encode(turns, slow, layout, "r", "x").ids.tolist() == slow.llava(prompt)
    asked = slow.llava(prompt[:-len(" yes</s>")])
    assert encode_prompt(turns[:2], "Why", slow, layout, "x.png").ids.tolist() == asked
    space, colon_to_newline = slow.encode("USER: ")[-1], slow.encode("\n")
    assert slow.processor.id_to_piece(space) == "▁" and colon_to_newline == [space, 13]


@pytest.mark.parametrize("pool", ["instruction", "prompt"])
@pytest.mark.parametrize("tagged", [0, 1, None])
def test_a_prompt_is_a_prefix_of_the_prompt_with_its_answer(tokenizer, pool, tagged):
    layout = dataclasses.replace(LAYOUT, pool=pool)
    turns = tag(tagged)
    for t in range(len(turns)):
        shown = tagged is not None and tagged <= t
        p = encode_prompt(turns[:t], turns[t][0], tokenizer, layout, "x.png" if shown else None)
        s = encode(turns[:t + 1], tokenizer, layout, "r", "x" if shown else None)
        whole = encode(turns, tokenizer, layout, "r", None if tagged is None else "x")
        for name in ("ids", "pool_id", "use_id"):
            ours = getattr(p, name).tolist()
            assert ours == getattr(s, name)[:len(ours)].tolist() == getattr(whole, name)[:len(ours)].tolist()
        assert p.turns == s.turns == t + 1 and (p.labels == IGNORE).all()
        assert s.labels[len(p.ids)] != IGNORE and tokenizer.decode(s.ids[len(p.ids):]) == turns[t][1]
    plain = Layout("plain", image_tokens=3)
    p = encode_prompt([], "", tokenizer, plain, "x.png").ids.tolist()
    assert p == [1] + [IMAGE] * 3 == encode([TURNS[0]], tokenizer, plain, "r", "x").ids.tolist()[:4]


def test_a_picture_without_a_tag_stands_before_the_first_question(tokenizer):
    asked = [(QUESTIONS[0], "red")]
    expected = encode_prompt(TURNS[:1], "Why?", tokenizer, LAYOUT, "x.png").ids.tolist()
    assert encode_prompt(asked, "Why?", tokenizer, LAYOUT, "x.png").ids.tolist() == expected
    said = [(QUESTIONS[0] + "\n<image>", "red")]
    assert encode_prompt(said, "Why?", tokenizer, LAYOUT, "x.png").ids.tolist() == expected
    with pytest.raises(UserError, match="no picture"):
        encode_prompt(said, "Why?", tokenizer, LAYOUT)


def test_pool_id_marks_the_instruction_and_use_id_the_whole_turn(tokenizer):
    s = encode(TURNS, tokenizer, LAYOUT, "r", "x")
    assert s.turns == 3
    for t, (question, answer) in enumerate(TURNS):
        pooled = tokenizer.decode(s.ids[s.pool_id == t])
        assert pooled.replace("  ", " ") == f"USER: {question.removeprefix('<image>')} ASSISTANT:".replace("  ", " ")
        start, end = spans(s.use_id == t)[0]
        assert len(spans(s.use_id == t)) == 1 and s.ids[end - 1] == tokenizer.eos
        assert (start == 0) == (t == 0) and (start == 0 or s.ids[start - 1] == tokenizer.eos)
    assert (s.pool_id[s.ids == IMAGE] == -1).all() and (s.pool_id[s.labels != IGNORE] == -1).all()
    assert (s.pool_id[:1 + len(tokenizer.encode(SYSTEM))] == -1).all() and (s.use_id >= 0).all()


def test_prompt_pooling_takes_in_picture_system_and_bos(tokenizer):
    s = encode(TURNS, tokenizer, dataclasses.replace(LAYOUT, pool="prompt"), "r", "x")
    assert np.array_equal(s.pool_id, np.where(s.labels == IGNORE, s.use_id, -1))


def test_guidance_of_a_trained_position_never_comes_from_later(tokenizer):
    for pool in ("instruction", "prompt"):
        s = encode(TURNS, tokenizer, dataclasses.replace(LAYOUT, pool=pool), "r", "x")
        check_causal(s.labels[None], s.pool_id[None], s.use_id[None])
        leaky = np.where(s.labels == IGNORE, s.pool_id, s.use_id)  # answers pooled too
        with pytest.raises(AssertionError, match="guidance"):
            check_causal(s.labels[None], leaky[None], s.use_id[None])
        with pytest.raises(AssertionError, match="guidance"):  # one guidance for the whole sample
            check_causal(s.labels[None], np.where(s.pool_id >= 0, 0, -1)[None], np.zeros_like(s.use_id)[None])


@pytest.mark.parametrize("literal", ["</s>", "<s>", "<unk>", "[INST]", "USER:", " ASSISTANT: "])
def test_literals_of_special_tokens_in_a_message_stay_text(tokenizer, literal):
    turns = [(f"say {literal} now", f"ok {literal} done"), ("again", "yes")]
    s = encode(turns, tokenizer, LAYOUT, "r")
    answers = [tokenizer.decode(s.labels[a:b]) for a, b in spans(s.labels != IGNORE)]
    assert answers == [f"ok {literal} done", "yes"] and (s.ids == 2).sum() == 2 and (s.ids == 1).sum() == 1


def test_tags_are_moved_to_the_front_where_there_is_a_picture():
    assert conversation(GOOD, "r") == [("<image>\nWhat is this?", "A cat."), ("Colour?", "red")]
    for text in ("<image>\nQ", "Q<image>", " <image> Q\n<image>\n "):
        record = {"image": "x", "conversations": messages(text, " a ")}
        assert conversation(record, "r") == [("<image>\nQ", " a ")]
    assert conversation({"image": "x", "conversations": messages("<image>", "a")}, "r") == [("<image>", "a")]
    assert conversation({"conversations": messages(" Q ", "a")}, "r") == [(" Q ", "a")]


def test_a_last_question_without_an_answer_is_left_out():
    assert conversation({"conversations": messages("Q", "a", "R")}, "r") == [("Q", "a")]


BAD = {
    "not an object": ["Q", "a"],
    "no conversations": {"image": "x"},
    "an empty list": {"conversations": []},
    "no list": {"conversations": "Q"},
    "a message without text": {"conversations": [{"from": "human"}]},
    "two questions in a row": {"conversations": [messages("Q")[0], messages("Q")[0]]},
    "gpt first": {"conversations": messages("Q", "a")[::-1]},
    "an unknown role": {"conversations": [{"from": "system", "value": "Q"}]},
    "a picture without a tag": {"image": "x", "conversations": messages("Q", "a")},
    "a tag in an unanswered question": {"image": "x", "conversations": messages("Q", "a", "<image>\nR")},
    "a tag without a picture": {"conversations": messages("<image>\nQ", "a")},
    "two tags": {"image": "x", "conversations": messages("<image>\nQ", "a", "<image>", "b")},
    "a tag in an answer": {"image": "x", "conversations": messages("Q", "<image>")},
    "two pictures": {"image": ["x", "y"], "conversations": messages("<image>\nQ", "a")},
    "an empty path": {"image": "", "conversations": messages("<image>\nQ", "a")},
    "no answer": {"conversations": messages("Q")},
    "half a character": {"conversations": messages("Q \ud83d", "a")},
}


@pytest.mark.parametrize("record", BAD.values(), ids=BAD)
def test_a_malformed_record_is_an_error_that_names_it(record, tokenizer, tmp_path):
    if isinstance(record, dict):
        record = {"id": "b7", **record}
    with pytest.raises(UserError, match=r"record 1 \(id b7\)" if isinstance(record, dict) else "record 1"):
        Conversations(write_json(tmp_path, [GOOD, record]), tmp_path, tokenizer)


def test_a_sample_is_cut_on_the_right_and_never_through_the_picture(tokenizer):
    whole = encode(TURNS, tokenizer, LAYOUT, "r", "x")
    first = int(np.flatnonzero(whole.ids == IMAGE)[0])
    answer = int(np.flatnonzero(whole.labels != IGNORE)[0])
    for context in (answer + 1, answer + 5, len(whole.ids) - 1, len(whole.ids)):
        s = encode(TURNS, tokenizer, dataclasses.replace(LAYOUT, context=context), "r", "x")
        for name in ("ids", "labels", "pool_id", "use_id"):
            assert np.array_equal(getattr(s, name), getattr(whole, name)[:context])
        assert s.turns == s.use_id.max() + 1 and s.image == "x"
    for context, message in ((first + 1, "within the picture"), (first + 8, "within the picture"), (answer, "no answer"),
                             (first + 9, "no answer"), (first, "no answer"), (1, "no answer")):
        with pytest.raises(UserError, match=f"record 5: .*{message}"):
            encode(TURNS, tokenizer, dataclasses.replace(LAYOUT, context=context), "record 5: c", "x")


def test_a_picture_whose_turn_is_cut_away_is_not_shown(tokenizer):
    turns = [("Q", "a"), ("<image>\nR", "b")]
    short = dataclasses.replace(LAYOUT, context=len(encode(turns[:1], tokenizer, LAYOUT, "r").ids) + 1)
    assert encode(turns, tokenizer, LAYOUT, "r", "x").image == "x"
    assert encode(turns, tokenizer, short, "r", "x").image is None
    unseen = dataclasses.replace(LAYOUT, image_tokens=0)  # a picture that takes no positions
    assert encode(turns, tokenizer, unseen, "r", "x").image == "x"


@pytest.mark.parametrize("question", ["", " \n\t", "<image>", "<image>\n "])
def test_an_empty_prompt_is_refused(tokenizer, question):
    with pytest.raises(UserError, match="empty"):
        encode_prompt([], question, tokenizer, LAYOUT, "x.png")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(tokenizer):
    n = len(encode_prompt([], "Why?", tokenizer, LAYOUT, "x.png").ids)
    assert len(encode_prompt([], "Why?", tokenizer, dataclasses.replace(LAYOUT, context=n), "x.png").ids) == n
    with pytest.raises(UserError, match=rf"\b{n}\b.*\b{n - 1}\b"):
        encode_prompt([], "Why?", tokenizer, dataclasses.replace(LAYOUT, context=n - 1), "x.png")


def test_plain_refuses_what_is_no_captioned_picture(tokenizer):
    plain = Layout("plain")
    for turns in ([("Q", "a")], TURNS):
        with pytest.raises(UserError, match="record 3"):
            encode(turns, tokenizer, plain, "record 3", "x")
    with pytest.raises(UserError):
        encode_prompt([], "", tokenizer, plain)


# The data set

def test_records_come_out_as_they_went_in(tokenizer, tmp_path):
    records = [dict(GOOD, id=str(i), conversations=messages(f"<image>\nWhat {i} é😀?", f"answer {i}")) for i in range(5)]
    records.append({"conversations": messages("Q", "a")})
    dataset = Conversations(write_json(tmp_path, records), tmp_path, tokenizer, LAYOUT)
    assert len(dataset) == 6 and [dataset.record(i) for i in range(6)] == records
    assert [s.record for s in (dataset[0], dataset[4], dataset[5])] == ["record 0 (id 0)", "record 4 (id 4)", "record 5"]
    assert dataset[1].image == str(tmp_path.resolve() / "x.png") and dataset[5].image is None
    expected = encode(conversation(records[3], "r"), tokenizer, LAYOUT, "r", "x")
    assert np.array_equal(dataset[3].ids, expected.ids) and np.array_equal(dataset[3].labels, expected.labels)
    assert np.array_equal(pickle.loads(pickle.dumps(dataset))[3].ids, expected.ids)
    assert len(list(dataset)) == 6


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", "3", "[" * 100_000, b"\xff\xfe["])
def test_a_file_that_is_no_list_of_records_is_an_error_that_names_it(text, tokenizer, tmp_path):
    path = tmp_path / "d.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="d.json"):
        Conversations(str(path), tmp_path, tokenizer)


def test_a_picture_outside_the_folder_is_refused(tokenizer, tmp_path):
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    (images / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    for folder in (images / "sub", elsewhere):
        Image.new("RGB", (4, 4)).save(folder / "x.png")
    os.symlink(elsewhere, images / "coco")  # the user's own, and followed
    bad = ["../elsewhere/x.png", "sub/../../elsewhere/x.png", str(images / "sub" / "x.png"), "coco/../x.png", "/etc/passwd",
           ".", "..", "sub\0/x.png"]
    path = write_json(tmp_path, [dict(GOOD, image=image) for image in ["sub/x.png", "coco/x.png"] + bad])
    dataset = Conversations(path, images, tokenizer, LAYOUT)
    assert [dataset[i].image for i in (0, 1)] == [str(images / "sub" / "x.png"), str(images / "coco" / "x.png")]
    for i in range(2, len(dataset)):
        with pytest.raises(UserError, match=rf"record {i} \(id a1\).*not inside"):
            dataset[i]


def test_a_batch_is_padded_on_the_right_and_shifted_once(tokenizer):
    samples = [encode(TURNS, tokenizer, LAYOUT, "one", "x"), encode([("Q", "yes")], tokenizer, LAYOUT, "two"),
               encode(TURNS[:1], tokenizer, LAYOUT, "three", "y")]
    visual = [torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), 2.0)]
    batch = collate(samples, visual, (3, 4, 4), pad=7)
    T = len(samples[0].ids)
    assert batch.ids.shape == batch.pool_id.shape == batch.use_id.shape == (3, T) and batch.turns == 3
    for b, s in enumerate(samples):
        n = len(s.ids)
        for name, fill in (("ids", 7), ("pool_id", -1), ("use_id", -1)):
            row = getattr(batch, name)[b]
            assert row.dtype == torch.int64 and row[:n].tolist() == getattr(s, name).tolist()
            assert (row[n:] == fill).all()
    assert batch.lengths.tolist() == [len(s.ids) for s in samples]
    assert batch.records == ["one", "two", "three"] and batch.visual[:, 0, 0, 0].tolist() == [1.0, 2.0]

    flat, labels = batch.ids.flatten(), np.concatenate([np.r_[s.labels, [IGNORE] * (T - len(s.ids))] for s in samples])
    assert torch.equal(flat[batch.at + 1], batch.target)
    assert batch.at.tolist() == [i - 1 for i in np.flatnonzero(labels != IGNORE)]
    rows = [tokenizer.decode(batch.target[batch.at // T == b]) for b in range(3)]
    assert rows == ["red A cat. Black and white", "yes", "red"]
    first = batch.at[0]
    assert tokenizer.decode([flat[first]]) == "ASSISTANT:" and tokenizer.decode([batch.target[0]]) == "red"
    moved = batch.to("meta")
    assert moved.ids.is_meta and moved.visual.is_meta and moved.target.is_meta and moved.records == batch.records


def test_a_batch_without_pictures_brings_a_blank_one_that_nothing_refers_to(tokenizer):
    batch = collate([encode([("Q", "yes")], tokenizer, LAYOUT, "r")], [], (9, 32))
    assert batch.visual.shape == (1, 9, 32) and not batch.visual.any() and not (batch.ids == IMAGE).any()
    with pytest.raises(AssertionError, match="pictures"):
        collate([encode(TURNS, tokenizer, LAYOUT, "r", "x")], [], (9, 32))


def test_padding_to_a_multiple_adds_nothing_to_learn(tokenizer):
    samples = [encode(TURNS, tokenizer, LAYOUT, "one", "x"), encode([("Q", "yes")], tokenizer, LAYOUT, "two")]
    plain, padded = (collate(samples, [torch.ones(3, 4, 4)], None, multiple=m) for m in (1, 16))
    T = plain.ids.shape[1]
    assert T % 16 and padded.ids.shape[1] == -(-T // 16) * 16 and len(padded.at) % 64 == 0
    assert padded.trained == plain.trained == len(plain.at) and torch.equal(padded.lengths, plain.lengths)
    real = padded.target != IGNORE
    assert torch.equal(padded.target[real], plain.target)
    b, t = padded.at[real] // padded.ids.shape[1], padded.at[real] % padded.ids.shape[1]
    assert torch.equal(b * T + t, plain.at)
    for name, value in (("ids", 0), ("pool_id", -1), ("use_id", -1)):
        wide, narrow = getattr(padded, name), getattr(plain, name)
        assert torch.equal(wide[:, :T], narrow) and (wide[:, T:] == value).all()


@pytest.mark.parametrize("lengths", [None, np.arange(100) % 37])
def test_the_order_is_a_function_of_seed_and_epoch_alone(lengths):
    order = Order(100, 3, 8, lengths)
    first = order.epoch(1).tolist()
    assert sorted(first) == list(range(100))
    for epoch in (0, 2, 3):
        order.epoch(epoch)
    assert order.epoch(1).tolist() == first == Order(100, 3, 8, lengths).epoch(1).tolist()
    others = [Order(100, seed, 8, lengths).epoch(e).tolist() for seed, e in ((3, 0), (3, 2), (1, 3), (4, 1), (0, 1), (1, 0))]
    assert all(first != other for other in others) and len({tuple(o) for o in others}) == 6


@pytest.mark.parametrize("n, batch_size", [(10, 4), (3, 4), (12, 4), (5, 12)])
@pytest.mark.parametrize("grouped", [False, True])
def test_steps_walk_through_the_epochs_without_a_gap(n, batch_size, grouped):
    order = Order(n, 5, batch_size, np.arange(n) if grouped else None)
    walked = [i for step in range(12) for i in order.step(step)]
    expected = [i for epoch in range(12 * batch_size // n + 1) for i in order.epoch(epoch).tolist()]
    assert walked == expected[:12 * batch_size]
    assert Order(n, 5, batch_size, np.arange(n) if grouped else None).step(7) == walked[7 * batch_size:8 * batch_size]


def test_grouping_puts_like_lengths_into_a_step_in_every_epoch():
    lengths = np.random.default_rng(0).integers(0, 1000, 5003)
    spread = lambda order: np.mean([np.ptp(lengths[order.step(k)]) for k in range(400)])  # 5 epochs, 5003 = 62 * 80 + 43
    assert spread(Order(5003, 0, 64, lengths)) < 0.2 * spread(Order(5003, 0, 64))


# The program

def program(*argv):
    return subprocess.run([sys.executable, data.__file__, *map(str, argv)], capture_output=True, text=True)


@pytest.fixture
def world(tmp_path, tokenizer):
    """A folder with one good record, its picture and a tokenizer."""
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    tokenizer.save(tmp_path)
    return tmp_path


def test_check_lists_every_fault_and_exits_with_1_if_there_is_one(world):
    good = program("--check", "--data", write_json(world, [GOOD]), "--images", world)
    assert (good.returncode, good.stderr) == (0, "") and "1 records, 1 with a picture" in good.stdout
    (world / "empty.png").touch()
    records = [GOOD, dict(GOOD, image="none.png"), dict(GOOD, image="empty.png"), dict(GOOD, image="../x.png"),
               {"id": "q", "conversations": []}, GOOD]
    bad = program("--check", "--data", write_json(world, records), "--images", world)
    assert bad.returncode == 1 and bad.stderr == "error: 4 of 6 records cannot be used\n"
    found = [line.split(":")[0] for line in bad.stdout.splitlines()]
    assert found == ["record 1 (id a1)", "record 2 (id a1)", "record 3 (id a1)", "record 4 (id q)"]


def shown(monkeypatch, capsys, world, *argv):
    path = write_json(world, [GOOD, GOOD])
    monkeypatch.setattr(sys, "argv", ["data.py", "--data", path, "--images", str(world), "--llm", str(world), *argv])
    data.run()
    return capsys.readouterr().out


def test_show_prints_what_the_model_reads_with_the_trained_part_marked(world, monkeypatch, capsys):
    out = shown(monkeypatch, capsys, world, "--show", "1")
    assert out.splitlines()[0].startswith("--- record 0 (id a1), picture ")
    assert out[out.index("\n") + 1:] == (f"<s>{SYSTEM} USER: <image>\nWhat is this? ASSISTANT: [[A cat.</s>]]"
                                         "USER: Colour? ASSISTANT: [[red</s>]]\n")


def test_show_json_prints_ids_and_labels_one_sample_a_line(world, monkeypatch, capsys, tokenizer):
    out = shown(monkeypatch, capsys, world, "--show", "3", "--json", "--system", "", "--image_tokens", "4")
    lines = [json.loads(line) for line in out.splitlines()]
    sample = encode(conversation(GOOD, "r"), tokenizer, Layout(system="", image_tokens=4), "r", "x")
    assert len(lines) == 2 and lines[0]["record"] == "record 0 (id a1)"
    for name in ("ids", "labels", "pool_id", "use_id"):
        assert lines[1][name] == getattr(sample, name).tolist()


@pytest.mark.parametrize("argv", [[], ["--check"], ["--show", "1", "--data", "d", "--images", "i"], ["--chekc"]])
def test_a_command_line_that_lacks_something_is_refused(monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", ["data.py", *argv])
    with pytest.raises(UserError):
        data.run()
