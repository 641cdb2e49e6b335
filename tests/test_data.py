"""What data.py promises, one test per sentence. References: transformers and sentencepiece."""
import contextlib
import dataclasses
import io
import json
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import data
from cli import UserError
from data import (collate, Conversations, encode, encode_prompt, IGNORE, IMAGE, open_image, pixels,
                  Preprocess, PromptFormat, SYSTEM, turns_of_record)
from formats.pictures import flatten
from tests.helpers import check_causal
from tests.records import GOOD, messages, write_json
from tests.sentencepiece_files import QUESTIONS
from training.feed import BatchSampler

TURNS = [("<image>\nWhat colour is the large circle?", "red"), ("Is there a red square?", "A cat."),
         ("How many triangles are there?", "Black and white")]
LAYOUT = PromptFormat(image_tokens=9, context=400)


# Pixels

def noise(*shape):
    return np.random.default_rng(shape[0] * shape[1]).integers(0, 256, shape, np.uint8)


def png16(colour, values):
    """A PNG with 16 bits per channel, which Pillow cannot write: `values` in one row.

    colour  0: grey, 2: RGB, 4: grey with alpha
    """
    row = np.repeat(np.array(values, ">u2"), {0: 1, 2: 3, 4: 2}[colour]).tobytes()
    header = struct.pack(">IIBBBBB", len(values), 1, 16, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d))
              for t, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def picture(kind, width, height):
    """An open picture file of noise. LLaVA converts it to RGB with Pillow."""
    file, options = io.BytesIO(), {}
    if kind == "P":
        image = Image.fromarray(noise(height, width, 3)).quantize(17)
    elif kind in ("P clear", "L clear", "RGB clear"):  # one colour of many is transparent
        mode = kind.split()[0]
        bands = (3,) if mode == "RGB" else ()
        image = Image.fromarray(noise(height, width, *bands) // 64 * 64)
        image = image.quantize(17) if mode == "P" else image
        options = {"transparency": {"P": bytes([0, 99, 255]), "L": 64, "RGB": (0, 64, 0)}[mode]}
    elif kind == "GIF":
        image = Image.fromarray(noise(height, width, 3))
        options = {"save_all": True, "append_images": [Image.new("RGB", (width, height), "red")]}
    elif kind == "EXIF":
        image, options = Image.fromarray(noise(height, width, 3)), {"exif": Image.Exif()}
        options["exif"][0x0112] = 6  # orientation: turn by 90 degrees
    else:
        bands = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}[kind]
        image = Image.frombytes(kind, (width, height), noise(height, width, bands).tobytes())
    image.save(file, {"GIF": "GIF", "EXIF": "JPEG", "CMYK": "JPEG"}.get(kind, "PNG"), **options)
    file.seek(0)
    return file


def expand2square(image, colour):
    """LLaVA's rule in numpy: the picture in the middle, an odd pixel of padding below or right."""
    w, h = image.size
    side = max(w, h)
    canvas = np.empty((side, side, 3), np.uint8)
    canvas[:] = colour
    top, left = (side - h) // 2, (side - w) // 2
    canvas[top:top + h, left:left + w] = np.asarray(image)
    return Image.fromarray(canvas)


def reference_of(size):
    return CLIPImageProcessorPil(size={"shortest_edge": size},
                                 crop_size={"height": size, "width": size})


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind, width, height", [
    ("RGB", 1, 1), ("RGB", 3, 1000), ("RGB", 500, 3), ("RGB", 336, 336), ("RGB", 337, 501),
    ("RGB", 100, 37), ("RGB", 335, 336), ("L", 41, 60), ("P", 60, 41), ("LA", 50, 33),
    ("CMYK", 33, 70), ("RGBA", 70, 33), ("GIF", 40, 30), ("EXIF", 30, 50),
    ("P clear", 50, 33), ("L clear", 50, 33), ("RGB clear", 50, 33)])
def test_pixels_are_those_of_CLIPImageProcessor(kind, width, height):
    size = 48 if (width, height) == (500, 3) else 336
    reference = reference_of(size)
    # LLaVA's own conversion first: the processor would blend transparency with white
    theirs = Image.open(picture(kind, width, height)).convert("RGB")
    theirs.info.pop("transparency", None)
    opened = open_image(picture(kind, width, height), "p")
    ours = flatten(opened, "none")
    assert np.array_equal(np.asarray(ours), np.asarray(theirs)) and ours.size == (width, height)
    assert opened.mode == ("RGBA" if kind in ("LA", "RGBA") or "clear" in kind else "RGB")
    for aspect in ("pad", "crop"):
        padded = expand2square(theirs, (122, 116, 104)) if aspect == "pad" else theirs
        expected = reference(padded, return_tensors="pt")["pixel_values"][0]
        got = pixels(opened, Preprocess(size, aspect=aspect))
        assert got.dtype == torch.float32 and got.shape == (3, size, size) and got.is_contiguous()
        assert (got - expected).abs().max() < 1e-6


def test_pixels_follow_the_mean_and_std_they_are_given():
    prep = Preprocess(4, mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 1.0))
    got = pixels(Image.new("RGB", (4, 4), (255, 0, 51)), prep)
    assert torch.allclose(got[:, 0, 0], torch.tensor([1.0, -2.0, 0.0]), atol=1e-6)


def test_the_first_frame_is_taken_and_exif_does_not_turn_it():
    frames = [Image.new("RGB", (8, 4), colour) for colour in ("red", "blue")]
    gif, jpeg, exif = io.BytesIO(), io.BytesIO(), Image.Exif()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    frames[0].save(jpeg, "JPEG", exif=exif)
    assert open_image(gif, "g").getpixel((0, 0)) == (255, 0, 0)
    assert open_image(jpeg, "j").size == (8, 4)


def test_sixteen_bits_keep_their_upper_eight_in_grey_as_in_colour():
    values, expected = [0, 255, 256, 32768, 65535], [0, 0, 1, 128, 255]
    files = [png16(colour, values) for colour in (0, 2, 4)]
    files.append(b"P5\n5 1\n65535\n" + np.array(values, ">u2").tobytes())
    tiff = io.BytesIO()
    Image.fromarray(np.array([values], np.uint16)).save(tiff, "TIFF")
    for file in files + [tiff.getvalue()]:
        opened = np.asarray(flatten(open_image(io.BytesIO(file), "p"), "none"))
        assert opened.tolist() == [[[v] * 3 for v in expected]]
    by_pillow = Image.open(io.BytesIO(files[0])).convert("RGB")
    assert by_pillow.getpixel((2, 0)) == (255, 255, 255)  # 256 of 65535 becomes white
    image = open_image(io.BytesIO(files[0]), "p")
    reference = reference_of(8)
    expected = reference(image, return_tensors="pt")["pixel_values"][0]
    assert (pixels(image, Preprocess(8, aspect="crop")) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("values, expected", [
    ([0, 1, 255], [0, 1, 255]), ([0, 255, 256], [0, 63, 64]), ([0, 15, 4095], [0, 0, 255]),
    ([16, 1024, 2000], [1, 64, 125]), ([0, 64, 16383], [0, 1, 255]), ([0, 16384, 256], [0, 64, 1]),
    ([0, 0, 0], [0, 0, 0])])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_deep_grey_keeps_the_upper_eight_of_the_bits_that_its_values_need(values, expected, dtype):
    file = io.BytesIO()
    Image.fromarray(np.array([values], dtype)).save(file, "TIFF")
    assert np.asarray(open_image(file, "p"))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P clear", "L clear", "RGB clear"])
def test_with_background_white_transparency_is_blended_with_white_in_front_of_all_else(kind):
    opened = open_image(picture(kind, 40, 24), "p")
    alpha = np.asarray(Image.open(picture(kind, 40, 24)).convert("RGBA"), float)
    share = alpha[..., 3:] / 255
    assert share.min() < 1 and (kind == "LA" or share.max() == 1)
    blended = alpha[..., :3] * share + 255 * (1 - share)
    for aspect in ("pad", "crop"):
        dropped = Preprocess(24, aspect=aspect)
        white = pixels(opened, dataclasses.replace(dropped, background="white"))
        expected = pixels(Image.fromarray(blended.round().astype(np.uint8)), dropped)
        assert (white - expected).abs().max() < 0.03  # two of 255 steps
        assert (white - pixels(opened, dropped)).abs().max() > 1
    opaque = open_image(picture("RGB", 40, 24), "p")
    assert torch.equal(pixels(opaque, Preprocess(24, background="white")),
                       pixels(opaque, Preprocess(24)))


@pytest.mark.parametrize("values", [np.ones((2, 2), np.float32), np.full((2, 2), 70000, np.int32),
                                    np.full((2, 2), -1, np.int32)])
def test_pixels_without_a_certain_white_are_refused(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "TIFF")
    with pytest.raises(UserError, match="record 7: p.tif: .*bits"):
        open_image(file, "record 7: p.tif")


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.gif"])
@pytest.mark.parametrize("damage", [
    "missing", "empty", "text", "truncated", "folder", "forbidden", "large", "huge"])
def test_an_unreadable_picture_is_one_line_that_names_it(name, damage, tmp_path, monkeypatch):
    path = tmp_path / name
    Image.fromarray(noise(40, 40, 3)).save(path)
    whole = path.read_bytes()
    assert open_image(path, "p").size == (40, 40)
    if damage == "missing":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "forbidden":  # chmod would not stop root
        def refuse(*args):
            raise PermissionError(13, "Permission denied")
        monkeypatch.setattr("builtins.open", refuse)
    elif damage in ("large", "huge"):  # where Pillow warns, and where it raises
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", {"large": 1599, "huge": 700}[damage])
    else:
        path.write_bytes({"empty": b"", "text": b"not a picture",
                          "truncated": whole[:len(whole) // 2]}[damage])
    warns = contextlib.nullcontext()
    if damage == "large":
        warns = pytest.warns(Image.DecompressionBombWarning)
    with warns:
        with pytest.raises(UserError, match=f"^record 7: {name}: [^\n]+$"):
            open_image(path, f"record 7: {name}")


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
    layout = dataclasses.replace(LAYOUT, system=system)
    s = encode(turns, tokenizer, layout, "r", None if tagged is None else "x")
    trained = s.labels != IGNORE
    assert [tokenizer.decode(s.labels[a:b]) for a, b in spans(trained)] == [a for _, a in turns]
    assert all(s.labels[b - 1] == tokenizer.eos for _, b in spans(trained))
    assert np.array_equal(s.ids[trained], s.labels[trained])
    assert (s.ids[~trained] != tokenizer.eos).all()
    assert (s.ids == tokenizer.bos).nonzero()[0].tolist() == [0]
    assert (s.ids == IMAGE).sum() == (0 if tagged is None else 9)


def test_a_sample_is_its_pieces_one_after_the_other(tokenizer):
    e = tokenizer.encode
    s = encode(TURNS[:2], tokenizer, LAYOUT, "r", "x")
    assert s.ids.tolist() == (
        [1] + e(SYSTEM) + e("USER: ") + [IMAGE] * 9
        + e("\nWhat colour is the large circle? ASSISTANT:") + e("red") + [2]
        + e("USER: Is there a red square? ASSISTANT:") + e("A cat.") + [2])


def test_plain_is_picture_caption_newline_and_trains_the_last_two(tokenizer):
    plain = PromptFormat("plain", image_tokens=9)
    s = encode([("<image>\nDescribe.", "red")], tokenizer, plain, "r", "x")
    caption = tokenizer.encode("red\n")
    assert s.ids.tolist() == [1] + [IMAGE] * 9 + caption
    assert s.labels.tolist() == [IGNORE] * 10 + caption
    assert caption[-1] == 3 + ord("\n")
    assert set(s.pool_id) == set(s.use_id) == {-1} and s.turns == 1


def llava(processor, prompt):
    """LLaVA's tokenizer_image_token for a whole prompt, in Llama's legacy form.

    Each part gets its own space.
    """
    ids = [1]
    for i, chunk in enumerate(prompt.split("<image>")):
        ids += [IMAGE] * (i > 0)
        for j, part in enumerate(chunk.split("</s>")):
            ids += [2] * (j > 0) + processor.encode(part)
    return ids


@pytest.mark.parametrize("question, answer", [
    ("<image>\nWhat colour is it?", "red"), ("<image>", " red \n"),
    ("<image>\nIs it?\nAnswer <a>", ""), ("What is 日本?\n<image>", "  \t\n😀")])
def test_the_ids_are_llavas_in_their_legacy_form(slow, llama, question, answer):
    layout = dataclasses.replace(LAYOUT, image_tokens=1)
    first = data.front_tag(question)
    turns = [(first, answer), ("Is there a red square?", "A cat."), ("Why", "yes")]
    prompt = f"{SYSTEM} USER: {first} ASSISTANT:{' ' * bool(answer)}{answer}</s>"
    prompt += "USER: Is there a red square? ASSISTANT: A cat.</s>USER: Why ASSISTANT: yes</s>"
    sample = encode(turns, llama, layout, "r", "x")
    assert sample.ids.tolist() == llava(slow, prompt)
    trained = [slow.decode(sample.labels[a:b - 1].tolist())
               for a, b in spans(sample.labels != IGNORE)]
    assert trained == [answer, "A cat.", "yes"] and (sample.labels == 2).sum() == 3
    expected = llava(slow, prompt[:-len(" yes</s>")])
    assert encode_prompt(turns[:2], "Why", llama, layout, "x.png").ids.tolist() == expected


def test_a_space_comes_before_the_picture_and_another_before_the_newline_after_it(slow, llama):
    space, newline, what = map(slow.piece_to_id, ("▁", "<0x0A>", "▁What"))
    ids = encode(TURNS, llama, dataclasses.replace(LAYOUT, image_tokens=1), "r", "x").ids.tolist()
    at = ids.index(IMAGE)
    assert ids[at - 1:at + 3] == [space, IMAGE, space, newline]
    assert ids[:at] == [1] + slow.encode(SYSTEM + " USER: ")
    assert slow.decode(ids[at + 3:]).startswith("What")
    assert what not in ids  # there is no "▁What" after a newline
    user = slow.encode("USER:")
    assert ids[ids.index(2) + 1:][:len(user)] == user  # the same after </s> as at the start
    plain = encode(TURNS[:1], llama, PromptFormat("plain", image_tokens=1), "r", "x").ids.tolist()
    assert plain == [1, IMAGE] + slow.encode("red\n") and plain[-1] == newline


@pytest.mark.parametrize("pool", ["instruction", "prompt", "last"])
@pytest.mark.parametrize("tagged", [0, 1, None])
def test_a_prompt_is_a_prefix_of_the_prompt_with_its_answer(tokenizer, pool, tagged):
    layout = dataclasses.replace(LAYOUT, pool=pool)
    turns = tag(tagged)
    for t in range(len(turns)):
        has_image = tagged is not None and tagged <= t
        p = encode_prompt(turns[:t], turns[t][0], tokenizer, layout, "x.png" if has_image else None)
        s = encode(turns[:t + 1], tokenizer, layout, "r", "x" if has_image else None)
        whole = encode(turns, tokenizer, layout, "r", None if tagged is None else "x")
        for name in ("ids", "pool_id", "use_id"):
            ours = getattr(p, name).tolist()
            assert ours == getattr(s, name)[:len(ours)].tolist()
            assert ours == getattr(whole, name)[:len(ours)].tolist()
        assert p.turns == s.turns == t + 1 and (p.labels == IGNORE).all()
        assert s.labels[len(p.ids)] != IGNORE
        assert tokenizer.decode(s.ids[len(p.ids):]) == turns[t][1]
    plain = PromptFormat("plain", image_tokens=3)
    p = encode_prompt([], "", tokenizer, plain, "x.png").ids.tolist()
    assert p == [1] + [IMAGE] * 3 == encode([TURNS[0]], tokenizer, plain, "r", "x").ids.tolist()[:4]


def test_a_picture_without_a_tag_comes_before_the_first_question(tokenizer):
    untagged = [(QUESTIONS[0], "red")]
    expected = encode_prompt(TURNS[:1], "Why?", tokenizer, LAYOUT, "x.png").ids.tolist()
    assert encode_prompt(untagged, "Why?", tokenizer, LAYOUT, "x.png").ids.tolist() == expected
    tagged = [(QUESTIONS[0] + "\n<image>", "red")]
    assert encode_prompt(tagged, "Why?", tokenizer, LAYOUT, "x.png").ids.tolist() == expected
    with pytest.raises(UserError, match="no picture"):
        encode_prompt(tagged, "Why?", tokenizer, LAYOUT)


def test_pool_id_marks_the_instruction_and_use_id_the_whole_turn(tokenizer):
    s = encode(TURNS, tokenizer, LAYOUT, "r", "x")
    assert s.turns == 3
    for t, (question, answer) in enumerate(TURNS):
        pooled = tokenizer.decode(s.ids[s.pool_id == t])
        expected = f"USER: {question.removeprefix('<image>')} ASSISTANT:"
        assert pooled.replace("  ", " ") == expected.replace("  ", " ")
        start, end = spans(s.use_id == t)[0]
        assert len(spans(s.use_id == t)) == 1 and s.ids[end - 1] == tokenizer.eos
        assert (start == 0) == (t == 0) and (start == 0 or s.ids[start - 1] == tokenizer.eos)
    assert (s.pool_id[s.ids == IMAGE] == -1).all() and (s.pool_id[s.labels != IGNORE] == -1).all()
    assert (s.pool_id[:1 + len(tokenizer.encode(SYSTEM))] == -1).all() and (s.use_id >= 0).all()


def test_prompt_pooling_takes_in_picture_system_and_bos(tokenizer):
    s = encode(TURNS, tokenizer, dataclasses.replace(LAYOUT, pool="prompt"), "r", "x")
    assert np.array_equal(s.pool_id, np.where(s.labels == IGNORE, s.use_id, -1))


def test_last_pooling_takes_the_position_before_the_answer(tokenizer):
    s = encode(TURNS, tokenizer, dataclasses.replace(LAYOUT, pool="last"), "r", "x")
    for t in range(len(TURNS)):
        at, = np.flatnonzero(s.pool_id == t)
        assert s.use_id[at] == t and s.labels[at] == IGNORE and s.labels[at + 1] != IGNORE


def test_guidance_of_a_trained_position_never_comes_from_later(tokenizer):
    for pool in ("instruction", "prompt", "last"):
        s = encode(TURNS, tokenizer, dataclasses.replace(LAYOUT, pool=pool), "r", "x")
        check_causal(s.labels[None], s.pool_id[None], s.use_id[None])
        leaky = np.where(s.labels == IGNORE, s.pool_id, s.use_id)  # answers pooled too
        with pytest.raises(AssertionError, match="guidance"):
            check_causal(s.labels[None], leaky[None], s.use_id[None])
        with pytest.raises(AssertionError, match="guidance"):  # one guidance for the whole sample
            pooled = np.where(s.pool_id >= 0, 0, -1)
            check_causal(s.labels[None], pooled[None], np.zeros_like(s.use_id)[None])


@pytest.mark.parametrize("literal", ["</s>", "<s>", "<unk>", "[INST]", "USER:", " ASSISTANT: "])
def test_literals_of_special_tokens_in_a_message_stay_text(tokenizer, literal):
    turns = [(f"say {literal} now", f"ok {literal} done"), ("again", "yes")]
    s = encode(turns, tokenizer, LAYOUT, "r")
    answers = [tokenizer.decode(s.labels[a:b]) for a, b in spans(s.labels != IGNORE)]
    assert answers == [f"ok {literal} done", "yes"]
    assert (s.ids == 2).sum() == 2 and (s.ids == 1).sum() == 1


def test_tags_are_moved_to_the_front_where_there_is_a_picture():
    assert turns_of_record(GOOD, "r") == [("<image>\nWhat is this?", "A cat."), ("Colour?", "red")]
    for text in ("<image>\nQ", "Q<image>", " <image> Q\n<image>\n "):
        record = {"image": "x", "conversations": messages(text, " a ")}
        assert turns_of_record(record, "r") == [("<image>\nQ", " a ")]
    only_tag = {"image": "x", "conversations": messages("<image>", "a")}
    assert turns_of_record(only_tag, "r") == [("<image>", "a")]
    assert turns_of_record({"conversations": messages(" Q ", "a")}, "r") == [(" Q ", "a")]


def test_a_last_question_without_an_answer_is_left_out():
    assert turns_of_record({"conversations": messages("Q", "a", "R")}, "r") == [("Q", "a")]


def test_an_answer_before_the_first_question_is_left_out():
    opening = {"from": "gpt", "value": "hello"}
    two = {"conversations": [opening] + messages("Q", "a", "R", "b")}
    assert turns_of_record(two, "r") == [("Q", "a"), ("R", "b")]
    one = {"conversations": [opening] + messages("Q", "a", "R")}
    assert turns_of_record(one, "r") == [("Q", "a")]
    with_image = {"image": "x", "conversations": [opening] + messages("<image>\nQ", "a")}
    assert turns_of_record(with_image, "r") == [("<image>\nQ", "a")]


def test_a_tag_that_a_question_without_a_picture_mentions_is_text(llama, slow):
    question, answer = "What is the <image> tag of RSS?", "<image> is a channel's picture: <image>"
    turns = turns_of_record({"conversations": messages(question, answer)}, "r")
    assert turns == [(question, answer)]
    sample = encode(turns, llama, LAYOUT, "r")
    parts = [SYSTEM, f"USER: {question} ASSISTANT:", answer]
    assert sample.ids.tolist() == [1] + sum(map(slow.encode, parts), []) + [2]
    assert sample.image is None
    in_answer = encode([("<image>\nQ", answer)], llama, LAYOUT, "r", "x")
    assert slow.decode(in_answer.labels[in_answer.labels != IGNORE].tolist()) == answer
    assert (in_answer.ids == IMAGE).sum() == 9
    record = {"image": "x", "conversations": messages("Q<image>", answer)}
    assert turns_of_record(record, "r") == [("<image>\nQ", answer)]
    prompt = encode_prompt([], question, llama, LAYOUT).ids.tolist()
    assert prompt == sample.ids.tolist()[:len(prompt)]
    for tagged in ("<image>\nQ", "Q <image>", " <image>"):
        with pytest.raises(UserError, match="no picture"):
            turns_of_record({"conversations": messages(tagged, "a")}, "r")
        with pytest.raises(UserError, match="no picture"):
            encode_prompt([], tagged + "?" * (tagged == " <image>"), llama, LAYOUT)


def test_an_empty_answer_trains_only_its_end_token(llama):
    turns = turns_of_record({"conversations": messages("Q", "", "", "b")}, "r")
    labels = encode(turns, llama, LAYOUT, "r").labels
    trained = [labels[a:b].tolist() for a, b in spans(labels != IGNORE)]
    assert trained == [[2], llama.encode("b") + [2]]


def test_other_keys_and_ids_of_any_kind_do_no_harm(llama, tmp_path):
    records = [{"id": 7, "model": "", "source": ["x"], "conversations": messages("Q", "a")},
               {"id": None, "image": None,
                "conversations": [dict(m, weight=1) for m in messages("Q", "a")]}]
    dataset = Conversations(write_json(tmp_path, records), tmp_path, llama, LAYOUT)
    assert [s.record for s in dataset] == ["record 0 (id 7)", "record 1 (id None)"]
    assert dataset[0].ids.tolist() == dataset[1].ids.tolist()


@pytest.mark.parametrize("key, value", [
    ("images", ["x.png"]), ("video", "clip.mp4"), ("audios", ["a.wav"]), ("weight", 0),
    ("system", "Answer in French."), ("tools", "[{}]"), ("loss", False), ("history", [["Q", "a"]]),
    ("image_path", "x.png")])
def test_a_key_that_would_change_the_meaning_of_a_record_is_refused_by_name(key, value):
    record = {"conversations": messages("Explain this picture <image> please", "a")}
    with pytest.raises(UserError, match=f"^r: the key `{key}` would change its meaning"):
        turns_of_record({key: value, **record}, "r")
    with pytest.raises(UserError, match=f"^r: message 1: the key `{key}` "):
        turns_of_record({"conversations": [{"from": "human", "value": "Q"},
                                           {"from": "gpt", "value": "a", key: value}]}, "r")


def test_a_picture_that_is_named_in_a_message_is_refused():
    record = {"conversations": [dict(messages("Q <image>", "a")[0], image="x.png"),
                                messages("Q", "a")[1]]}
    with pytest.raises(UserError, match="^r: message 0: the key `image` would change its meaning"):
        turns_of_record(record, "r")


@pytest.mark.parametrize("values", [
    {"images": [], "video": None, "system": "", "tools": "[]", "weight": 1, "loss": True},
    {"weight": 1.0, "audios": {}, "source": "web", "width": 640, "image_id": 7}])
def test_a_key_that_changes_nothing_is_accepted(values):
    record = {"conversations": [dict(m, **values) for m in messages("Q", "a")], **values}
    assert turns_of_record(record, "r") == [("Q", "a")]


def test_a_malformed_record_is_quoted_in_a_short_line():
    for record, expected in [
            ({"messages": [], "id": 3}, "r: no `conversations`, but the keys messages, id"),
            ({"conversations": '[{"from": "human"}]'}, "`conversations` is '\\[{\"from"),
            ({"conversations": messages("Q", "a"), "image": "https://x.org/a.png"},
             "`image` is 'https://x.org/a.png', expected the path"),
            ({"conversations": messages("Q", "a"), "image": "data:image/png;base64," + "A" * 9999},
             "`image` is 'data:image/png;base64,A+, expected the path"),
            ({"conversations": [{"role": "user", "content": "x" * 9999}]},
             'message 0 does not have the form {"from": role, "value": text}: {\'role\': ')]:
        with pytest.raises(UserError, match=expected) as error:
            turns_of_record(record, "r")
        assert len(str(error.value)) < 200


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
    "a tag in an unanswered question":
        {"image": "x", "conversations": messages("Q", "a", "<image>\nR")},
    "a tag without a picture": {"conversations": messages("<image>\nQ", "a")},
    "two tags": {"image": "x", "conversations": messages("<image>\nQ", "a", "<image>", "b")},
    "a tag only in an answer": {"image": "x", "conversations": messages("Q", "<image>")},
    "two pictures": {"image": ["x", "y"], "conversations": messages("<image>\nQ", "a")},
    "an empty path": {"image": "", "conversations": messages("<image>\nQ", "a")},
    "no answer": {"conversations": messages("Q")},
    "no answer but the first": {"conversations": messages("Q", "a", "R")[1:]},
    "two answers in a row": {"conversations": messages("Q", "a", "R", "b")[1::2]},
    "two pictures in one list": {"image": ["x"], "conversations": messages("<image>\nQ", "a")},
    "a text that is null": {"conversations": [{"from": "human", "value": None}]},
    "a picture outside the folder": {"image": "../x", "conversations": messages("<image>\nQ", "a")},
    "half a character": {"conversations": messages("Q \ud83d", "a")},
}


@pytest.mark.parametrize("record", BAD.values(), ids=BAD)
def test_a_malformed_record_is_an_error_that_names_it(record, tokenizer, tmp_path):
    if isinstance(record, dict):
        record = {"id": "b7", **record}
    name = r"record 1 \(id b7\)" if isinstance(record, dict) else "record 1"
    with pytest.raises(UserError, match=name):
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
    for context in (1, first, first + 1, first + 8):
        layout = dataclasses.replace(LAYOUT, context=context)
        message = f"record 5: .*context of {context} ends before the picture"
        with pytest.raises(UserError, match=message):
            encode(TURNS, tokenizer, layout, "record 5: c", "x")


def test_if_no_answer_begins_within_the_context_nothing_is_trained_and_nothing_breaks(tokenizer):
    short = encode([("Q " * 500, "a")], tokenizer, LAYOUT, "long")
    assert len(short.ids) == LAYOUT.context and (short.labels == IGNORE).all() and short.turns == 1
    batch = collate([short, encode([("Q", "yes")], tokenizer, LAYOUT, "r")], [], (9, 32))
    assert batch.trained == 2 and (batch.at // batch.ids.shape[1] == 1).all()
    assert collate([short], [], (9, 32)).trained == 0


def test_a_sample_is_cut_before_a_later_picture_that_has_no_room(tokenizer):
    turns = [("Q", "a"), ("<image>\nR", "b"), ("S", "c")]
    whole = encode(turns, tokenizer, LAYOUT, "r", "x")
    picture = np.flatnonzero(whole.ids == IMAGE)
    for context in range(picture[0], picture[-1] + 3):
        s = encode(turns, tokenizer, dataclasses.replace(LAYOUT, context=context), "r", "x")
        fits = context > picture[-1]
        assert len(s.ids) == (context if fits else picture[0])
        assert s.image == ("x" if fits else None)
        assert np.array_equal(s.labels, whole.labels[:len(s.ids)])
        assert (s.ids == IMAGE).sum() == 9 * fits
        assert tokenizer.decode(s.labels[s.labels != IGNORE]) == "a"


def test_a_picture_whose_turn_is_cut_off_is_not_passed_on(tokenizer):
    turns = [("Q", "a"), ("<image>\nR", "b")]
    context = len(encode(turns[:1], tokenizer, LAYOUT, "r").ids) + 1
    short = dataclasses.replace(LAYOUT, context=context)
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
    exact, short = (dataclasses.replace(LAYOUT, context=context) for context in (n, n - 1))
    assert len(encode_prompt([], "Why?", tokenizer, exact, "x.png").ids) == n
    with pytest.raises(UserError, match=rf"\b{n}\b.*\b{n - 1}\b"):
        encode_prompt([], "Why?", tokenizer, short, "x.png")


def test_plain_refuses_everything_but_a_picture_with_its_caption(tokenizer, tmp_path):
    plain = PromptFormat("plain")
    with pytest.raises(UserError, match="record 1 .*plain"):  # immediately, not hours into a run
        short = dict(GOOD, conversations=GOOD["conversations"][:2])
        Conversations(write_json(tmp_path, [short, GOOD]), tmp_path, tokenizer, plain)
    for turns in ([("Q", "a")], TURNS):
        with pytest.raises(UserError, match="record 3"):
            encode(turns, tokenizer, plain, "record 3", "x")
    with pytest.raises(UserError):
        encode_prompt([], "", tokenizer, plain)


# The data set

def test_records_come_out_as_they_went_in(tokenizer, tmp_path):
    texts = [messages(f"<image>\nWhat {i} é😀?", f"answer {i}") for i in range(5)]
    records = [dict(GOOD, id=str(i), conversations=text) for i, text in enumerate(texts)]
    records.append({"conversations": messages("Q", "a")})
    dataset = Conversations(write_json(tmp_path, records), tmp_path, tokenizer, LAYOUT)
    assert len(dataset) == 6 and [dataset.record(i) for i in range(6)] == records
    names = [dataset[i].record for i in (0, 4, 5)]
    assert names == ["record 0 (id 0)", "record 4 (id 4)", "record 5"]
    assert dataset[1].image == str(tmp_path.resolve() / "x.png") and dataset[5].image is None
    expected = encode(turns_of_record(records[3], "r"), tokenizer, LAYOUT, "r", "x")
    assert np.array_equal(dataset[3].ids, expected.ids)
    assert np.array_equal(dataset[3].labels, expected.labels)
    assert np.array_equal(pickle.loads(pickle.dumps(dataset))[3].ids, expected.ids)
    assert len(list(dataset)) == 6


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", "3", "[" * 100_000, b"\xff\xfe["])
def test_a_file_that_is_not_a_list_of_records_is_an_error_that_names_it(text, tokenizer, tmp_path):
    path = tmp_path / "d.json"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match="d.json"):
        Conversations(str(path), tmp_path, tokenizer)


@pytest.mark.parametrize("begin", ["", "\n ", "\ufeff"])
def test_json_lines_are_read_like_a_list(begin, tokenizer, tmp_path):
    path = tmp_path / "d.json"
    records = [dict(GOOD, id="é"), {"conversations": messages("Q", "a\u2028b")}]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes((begin + lines[0] + "\r\n\n" + lines[1] + "\n").encode())
    dataset = Conversations(str(path), tmp_path, tokenizer, LAYOUT)
    assert [dataset.record(i) for i in range(len(dataset))] == records
    path.write_text("\n".join([lines[0], lines[1][:-9]]))
    with pytest.raises(UserError, match="d.json .* read as JSON Lines: line 2: not JSON"):
        Conversations(str(path), tmp_path, tokenizer)
    path.write_text(json.dumps({"data": records}))
    with pytest.raises(UserError, match="record 0: no `conversations`, but the keys data"):
        Conversations(str(path), tmp_path, tokenizer)
    path.write_text(json.dumps({"data": records}, indent=1))
    with pytest.raises(UserError, match="d.json: expected a non-empty JSON list"):
        Conversations(str(path), tmp_path, tokenizer)


def test_a_picture_outside_the_folder_is_refused(tokenizer, tmp_path):
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    (images / "sub").mkdir(parents=True)
    elsewhere.mkdir()
    for folder in (images / "sub", elsewhere):
        Image.new("RGB", (4, 4)).save(folder / "x.png")
    os.symlink(elsewhere, images / "coco")  # the user's own, and followed
    inside = str(images / "sub" / "x.png")
    bad = ["../elsewhere/x.png", "sub/../../elsewhere/x.png", f"{images}/../elsewhere/x.png",
           "coco/../x.png", f"{images}/coco/../x.png", str(images), f"{images}2/x.png",
           "/etc/passwd", ".", "..", "sub\0/x.png", f"{images}/sub\0/x.png"]
    good = ["sub/x.png", "coco/x.png", inside]
    path = write_json(tmp_path, [dict(GOOD, image=image) for image in good])
    dataset = Conversations(path, images, tokenizer, LAYOUT)
    assert [dataset[i].image for i in (0, 1, 2)] == [inside, str(images / "coco" / "x.png"), inside]
    assert dataset.pictures() == [dataset[0].image, dataset[1].image]
    assert data.image_path("/", inside, "r") == inside
    with pytest.raises(UserError, match="the picture '' is not inside .*: expected a path in the"):
        data.image_path(str(images), "", "r")  # a line of `sample.py --batch`
    for image in bad:
        with pytest.raises(UserError, match=r"record 1 \(id a1\).*not inside"):
            records = [dict(GOOD, image="sub/x.png"), dict(GOOD, image=image)]
            Conversations(write_json(tmp_path, records), images, tokenizer, LAYOUT)


def test_a_batch_is_padded_on_the_right_and_shifted_once(tokenizer):
    samples = [encode(TURNS, tokenizer, LAYOUT, "one", "x"),
               encode([("Q", "yes")], tokenizer, LAYOUT, "two"),
               encode(TURNS[:1], tokenizer, LAYOUT, "three", "y")]
    visual = [torch.full((3, 4, 4), 1.0), torch.full((3, 4, 4), 2.0)]
    batch = collate(samples, visual, (3, 4, 4), pad=7)
    T = len(samples[0].ids)
    assert batch.ids.shape == batch.pool_id.shape == batch.use_id.shape == (3, T)
    assert batch.turns == 3
    image_at = []
    for b, s in enumerate(samples):
        n, image = len(s.ids), s.ids == IMAGE
        image_at += [b * T + i for i in np.flatnonzero(image)]
        ids = np.where(image, 0, s.ids)  # image tokens have no id: `image_at` says where they are
        for name, values, fill in (("ids", ids, 7), ("pool_id", s.pool_id, -1),
                                   ("use_id", s.use_id, -1)):
            row = getattr(batch, name)[b]
            assert row.dtype == torch.int64 and row[:n].tolist() == values.tolist()
            assert (row[n:] == fill).all()
    assert batch.image_at.tolist() == image_at and len(image_at) == 18
    assert batch.lengths.tolist() == [len(s.ids) for s in samples]
    assert batch.records == ["one", "two", "three"]
    assert batch.visual[:, 0, 0, 0].tolist() == [1.0, 2.0]

    flat = batch.ids.flatten()
    labels = np.concatenate([np.r_[s.labels, [IGNORE] * (T - len(s.ids))] for s in samples])
    assert torch.equal(flat[batch.at + 1], batch.target)
    assert batch.at.tolist() == [i - 1 for i in np.flatnonzero(labels != IGNORE)]
    rows = [tokenizer.decode(batch.target[batch.at // T == b]) for b in range(3)]
    assert rows == ["red A cat. Black and white", "yes", "red"]
    first = batch.at[0]
    assert tokenizer.decode([flat[first]]) == "ASSISTANT:"
    assert tokenizer.decode([batch.target[0]]) == "red"
    moved = batch.to("meta")
    assert moved.ids.is_meta and moved.visual.is_meta and moved.target.is_meta
    assert moved.records == batch.records


def test_a_batch_without_pictures_brings_a_blank_one_that_nothing_refers_to(tokenizer):
    batch = collate([encode([("Q", "yes")], tokenizer, LAYOUT, "r")], [], (9, 32))
    assert batch.visual.shape == (1, 9, 32) and not batch.visual.any()
    assert not len(batch.image_at)
    with pytest.raises(AssertionError, match="pictures"):
        collate([encode(TURNS, tokenizer, LAYOUT, "r", "x")], [], (9, 32))


def test_padding_to_a_multiple_adds_nothing_to_learn(tokenizer):
    samples = [encode(TURNS, tokenizer, LAYOUT, "one", "x"),
               encode([("Q", "yes")], tokenizer, LAYOUT, "two")]
    plain, padded = (collate(samples, [torch.ones(3, 4, 4)], None, multiple=m) for m in (1, 16))
    T = plain.ids.shape[1]
    assert T % 16 and padded.ids.shape[1] == -(-T // 16) * 16 and len(padded.at) % 64 == 0
    assert padded.trained == plain.trained == len(plain.at)
    assert torch.equal(padded.lengths, plain.lengths)
    real = padded.target != IGNORE
    assert torch.equal(padded.target[real], plain.target)
    b, t = padded.at[real] // padded.ids.shape[1], padded.at[real] % padded.ids.shape[1]
    assert torch.equal(b * T + t, plain.at)
    for name, value in (("ids", 0), ("pool_id", -1), ("use_id", -1)):
        wide, narrow = getattr(padded, name), getattr(plain, name)
        assert torch.equal(wide[:, :T], narrow) and (wide[:, T:] == value).all()


@pytest.mark.parametrize("lengths", [None, np.arange(100) % 37])
def test_the_order_is_a_function_of_seed_and_epoch_alone(lengths):
    order = BatchSampler(100, 3, 8, lengths)
    first = order.epoch(1).tolist()
    assert sorted(first) == list(range(100))
    for epoch in (0, 2, 3):
        order.epoch(epoch)
    assert order.epoch(1).tolist() == first == BatchSampler(100, 3, 8, lengths).epoch(1).tolist()
    seeds_and_epochs = ((3, 0), (3, 2), (1, 3), (4, 1), (0, 1), (1, 0))
    others = [BatchSampler(100, seed, 8, lengths).epoch(e).tolist() for seed, e in seeds_and_epochs]
    assert all(first != other for other in others) and len({tuple(o) for o in others}) == 6


@pytest.mark.parametrize("n, batch_size", [(10, 4), (3, 4), (12, 4), (5, 12)])
@pytest.mark.parametrize("grouped", [False, True])
def test_steps_walk_through_the_epochs_without_a_gap(n, batch_size, grouped):
    order = BatchSampler(n, 5, batch_size, np.arange(n) if grouped else None)
    walked = [i for step in range(12) for i in order.step(step)]
    expected = [i for epoch in range(12 * batch_size // n + 1) for i in order.epoch(epoch).tolist()]
    assert walked == expected[:12 * batch_size]
    again = BatchSampler(n, 5, batch_size, np.arange(n) if grouped else None)
    assert again.step(7) == walked[7 * batch_size:8 * batch_size]


def test_grouping_puts_like_lengths_into_a_step_in_every_epoch():
    lengths = np.random.default_rng(0).integers(0, 1000, 5003)

    def spread(order):  # 400 steps are 5 epochs, 5003 = 78 * 64 + 11
        return np.mean([np.ptp(lengths[order.step(k)]) for k in range(400)])

    assert spread(BatchSampler(5003, 0, 64, lengths)) < 0.2 * spread(BatchSampler(5003, 0, 64))


def test_a_very_thin_picture_is_refused_before_it_takes_all_memory(tmp_path):
    Image.new("1", (1, 65000)).save(tmp_path / "thin.png")
    with pytest.raises(UserError, match="thin.png.*1 x 65000"):
        data.open_image(str(tmp_path / "thin.png"), "thin.png")
