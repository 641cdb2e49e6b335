"""What sample.py and formats/answers.py claim, and the cache that goes on from turn to turn.

CPU, no network.
"""
import contextlib
import dataclasses
import io
import json
import os
import pty
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import cli
import data
import formats.answers
import sample
import weights
from data import collate, encode, encode_prompt, IMAGE, pad_right, Preprocess
from formats.runs import choose_checkpoint
from model import end_turn, generate, stream, VLM
from sample import Chat, Options
from tests.helpers import (ask_dictated, batch_of, close, counted, dictated, EVERY, hf_clip,
    hf_llama, KINDS, LAYOUT, logits_of, look, noise, pictures, randomised, segments, TOKENIZER,
    trained, TURNS)

CPU = ["--device=cpu", "--dtype=float32"]
CONTEXT = 20_000  # of the checkpoints on disk: an answer that never ends takes longer than any test


def checkpoint_of(model, pool="instruction"):
    return weights.Checkpoint(model, TOKENIZER, Preprocess(28), "A chat.",
                              {"training": {"guidance_pool": pool}})


def talker(**kind):
    return checkpoint_of(trained(torch.float32, seed=3, **kind))


def answer_of(checkpoint, image, *questions, o=Options(max_new_tokens=6)):
    """The answer to the last of some questions, the others being the conversation before it."""
    chat = Chat(checkpoint, image, o)
    return ["".join(chat.ask(question)) for question in questions][-1]


# ---- A chat is the whole conversation


@torch.no_grad()
def whole_logits(checkpoint, turns, image):
    """(Sample, Batch, logits float[T, V]) of a conversation run at once, as in training."""
    name = None if image is None else "x.png"
    whole = encode(turns, TOKENIZER, checkpoint.prompt_format(), "whole", name)
    batch = batch_of([whole], [] if image is None else [look(image)], torch.float32)
    return whole, batch, logits_of(checkpoint.model, batch)[0]


POOLS = {**{name: (kind, "instruction") for name, kind in KINDS.items()},
         "pooled over the prompt": ({}, "prompt"), "the last token of the prompt": ({}, "last"),
         "no expert": (dict(visual_expert="none", language_expert="none"), "instruction")}


@pytest.mark.parametrize("kind, pool", POOLS.values(), ids=POOLS)
@pytest.mark.parametrize("image", [noise(0), None], ids=["picture", "text"])
@torch.no_grad()
def test_a_chat_equals_the_whole_conversation_and_a_turn_costs_its_own_tokens_only(kind, pool,
        image):
    checkpoint = checkpoint_of(trained(torch.float32, seed=3, **kind), pool)
    turns = TURNS if image is not None else [("What colour is the circle?", TURNS[0][1]),
                                             *TURNS[1:]]
    whole, batch, full = whole_logits(checkpoint, turns, image)
    chat, found, costs = Chat(checkpoint, image, Options()), [], []
    for turn, (question, answer) in enumerate(turns):
        with counted(checkpoint.model) as count:
            found.append(ask_dictated(chat, question, TOKENIZER.encode(answer), cut=turn == 1))
        costs.append(dict(count))
    assert chat.ids == whole.ids.tolist()

    (p0, a0), (p1, a1), (p2, a2) = segments(whole)
    due = [full[a0.start - 1:a0.stop - 1], full[a1.start - 1:a1.stop - 2],
           full[a2.start - 1:a2.stop - 1]]
    assert all(close(f, d, 1e-5) for f, d in zip(found, due))
    # an end token is never run before the next turn, nor is the last one of an answer that was cut
    tokens = [a0.stop - 1, 1 + a1.stop - 2 - a0.stop, 2 + a2.stop - 1 - a1.stop]
    assert [c["tokens"] for c in costs] == tokens
    assert sum(c["tokens"] for c in costs) == len(whole.ids) - 1
    assert [c.get("pictures", 0) for c in costs] == [int(image is not None), 0, 0]

    # The same comparison fails where anything runs with another turn's weights
    wrong = {"the end of an answer in the next turn": (batch.pool_id, batch.use_id.clone()),
             "one guidance for all": (batch.pool_id.clamp(max=0), batch.use_id.clamp(max=0)),
             "the last turn's weights for all": (batch.pool_id, torch.full_like(batch.use_id, 2))}
    wrong["the end of an answer in the next turn"][1][0, a0.stop - 1] = 1
    for pool_id, use_id in wrong.values():
        other = logits_of(checkpoint.model, dataclasses.replace(
            batch, visual=batch.visual if image is not None else None, pool_id=pool_id,
            use_id=use_id, turns=3))[0]
        assert close(other, full, 1e-5) == (kind.get("language_expert") == "none")


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_rows_of_a_batch_go_on_from_their_own_ends_in_one_cache(kind):
    model, look = trained(torch.float32, seed=3, **kind), pictures(2, torch.float32)
    samples = [encode(TURNS, TOKENIZER, LAYOUT, "0", "a.png"),
               encode([("How many?", "two."), ("What colour?", "red, a red one. yes."),
                       ("Is there?", "no.")],
                      TOKENIZER, LAYOUT, "1"),
               encode([("<image>\nIs there a red one?", "yes"), ("Is there?", "yes."),
                       ("How?", "a circle, a red one.")],
                      TOKENIZER, LAYOUT, "2", "b.png")]
    full = [logits_of(model,
                      batch_of([s], look[:1] if s is samples[0] else look[1:] if s.image else [],
                                      torch.float32))[0] for s in samples]
    spans, eos = [list(segments(s)) for s in samples], TOKENIZER.eos
    cache, tails, cut, early = model.new_cache(3, "cpu", torch.float32), None, 0, 0
    for turn in range(3):
        prompts = [SimpleNamespace(**{n: getattr(s, n)[own[turn][0]]
                                      for n in ("ids", "labels", "pool_id", "use_id")},
                                   turns=1, image=s.image if turn == 0 else None, record="",
                                   tag=s.tag if turn == 0 else -1)
                   for s, own in zip(samples, spans)]
        for p in prompts:
            p.pool_id, p.use_id = (p.pool_id == turn) - 1, p.use_id * 0
        batch = collate(prompts, look if turn == 0 else [], (3, 28, 28))
        batch.visual = batch.visual if turn == 0 else None
        # Each ends with eos; one step less cuts the longest one before it
        said = [s.ids[own[turn][1]].tolist() for s, own in zip(samples, spans)]
        steps = max(map(len, said)) - 1
        if tails is not None:
            end_turn(model, pad_right([np.array(t) for t in tails], 0),
                     torch.tensor([len(t) for t in tails]), cache)
        dictate = (torch.tensor([(row + [7] * steps)[i] for row in said]) for i in range(steps))
        with dictated(dictate) as seen:
            out = torch.stack(list(stream(model, batch, steps, eos, cache=cache)), 1).tolist()
        for b, (row, own) in enumerate(zip(said, spans)):
            n = min(steps, len(row))
            assert out[b] == row[:n] + [eos] * (steps - n)
            start = own[turn][1].start
            assert close(torch.stack(seen, 1)[b, :n], full[b][start - 1:start - 1 + n], 1e-5)
        tails = [row[-2:] if len(row) > steps else [eos] for row in said]
        cut, early = cut + sum(len(t) == 2 for t in tails), early + sum(len(row) < steps
                                                                        for row in said)
    assert cut == 3 and early >= 4


@pytest.mark.parametrize("call, kept", [(1, None), (2, None), (3, 1), (5, 3)],
                         ids=["end of the last turn", "prompt", "first token", "third token"])
@pytest.mark.parametrize("layer", [0, 2, 3])
@torch.no_grad()
def test_a_chat_goes_on_from_an_answer_that_was_stopped_anywhere(call, kept, layer):
    checkpoint, image = talker(**EVERY), noise(0)
    chat, calls = Chat(checkpoint, image, Options()), []
    ask_dictated(chat, *[TURNS[0][0], TOKENIZER.encode(TURNS[0][1])], cut=True)

    def stop(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    handle = checkpoint.model.llm.layers[layer].register_forward_hook(stop)
    said = TOKENIZER.encode(TURNS[1][1])
    with pytest.raises(KeyboardInterrupt):
        ask_dictated(chat, TURNS[1][0], said)
    handle.remove()
    turns = [TURNS[0], TURNS[2]]
    if kept is not None:
        turns[1:1] = [(TURNS[1][0], TOKENIZER.decode(said[:kept]))]
        assert TOKENIZER.encode(turns[1][1]) == said[:kept]
    found = ask_dictated(chat, TURNS[2][0], TOKENIZER.encode(TURNS[2][1]))
    whole, _, full = whole_logits(checkpoint, turns, image)
    assert chat.ids == whole.ids.tolist()
    *_, (_, answer) = segments(whole)
    assert close(found, full[answer.start - 1:answer.stop - 1], 1e-5)


def test_a_new_conversation_about_the_same_picture_does_not_look_at_it_again():
    checkpoint = talker()
    chat = Chat(checkpoint, noise(0), Options(max_new_tokens=6))
    with counted(checkpoint.model) as count:
        first = [list(chat.ask(q)) for q in (TURNS[0][0], "How many?")]
        chat.reset()
        assert [list(chat.ask(q)) for q in (TURNS[0][0], "How many?")] == first
    assert count["pictures"] == 1
    chat.reset()
    assert list(chat.ask("How many?")) != first[1]


def test_a_question_too_long_for_the_context_leaves_the_conversation_as_it_was():
    checkpoint = talker()
    chat, same = (Chat(checkpoint, noise(0), Options(max_new_tokens=5)) for _ in range(2))
    for c in (chat, same):
        list(c.ask("How many?"))
    held = len(chat.ids) + (chat.ids[-1] != TOKENIZER.eos)
    words = f"the conversation before it {held}; there is no room for an answer.*/reset"
    with pytest.raises(cli.UserError, match=words):
        list(chat.ask("How" + "\n" * 185 + "many?"))
    with pytest.raises(cli.UserError, match="empty"):
        list(chat.ask(" "))
    with pytest.raises(cli.UserError, match="not valid Unicode"):
        list(chat.ask("How \udcff?"))
    assert list(chat.ask("Is there?")) == list(same.ask("Is there?"))


def test_a_conversation_ends_where_the_context_does_and_says_so(capsys):
    checkpoint = checkpoint_of(trained(torch.float32, seed=3))
    checkpoint.model.llm.lm_head.weight.data[TOKENIZER.eos] = 0  # no answer ends by itself
    chat = Chat(checkpoint, noise(0), Options(max_new_tokens=120))
    sample.print_answer(chat, "How many?")
    first = len(chat.ids)
    assert f"--max_new_tokens 120" in capsys.readouterr().err and first < LAYOUT.context - 30
    sample.print_answer(chat, "How many?")
    n = LAYOUT.context - first - 1 - len(chat.tokenizer.encode("USER: How many? ASSISTANT:"))
    assert f"the answer is cut at {n} tokens: the context holds 200" in capsys.readouterr().err
    assert len(chat.ids) == LAYOUT.context
    with pytest.raises(cli.UserError, match="no room"):
        sample.print_answer(chat, "a")
    assert capsys.readouterr().out == ""


def test_a_character_of_several_tokens_comes_when_it_is_whole():
    encode = TOKENIZER.encode
    whole, word, broken = encode("é")[-2:], encode("red"), encode("日")[-3:-1]
    ids = whole + word + broken
    chat = Chat(talker(), None, Options(max_new_tokens=len(ids)))
    with dictated(torch.tensor([i]) for i in ids):
        pieces = list(chat.ask("How many?"))
    assert "".join(pieces) == TOKENIZER.decode(ids)
    assert pieces[:2] == ["", "é"] and len(pieces) == len(ids) + 1
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces[:-1])


def test_an_answer_is_written_out_token_by_token(monkeypatch):
    out, ids, shown = io.BytesIO(), TOKENIZER.encode("How many? a red one."), []
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="utf-8"))
    with dictated(shown.append(out.getvalue().decode()) or torch.tensor([i]) for i in ids):
        sample.print_answer(Chat(talker(), None, Options(max_new_tokens=len(ids))), "How many?")
    assert shown == [TOKENIZER.decode(ids[:n]) for n in range(len(ids))] and len(ids) > 4
    assert out.getvalue().decode() == TOKENIZER.decode(ids) + "\n"


def test_ids_that_the_tokenizer_lacks_are_never_drawn():
    model, vocab = trained(torch.float32, seed=3), TOKENIZER.vocab - 100
    model.llm.lm_head.weight.data[vocab:] *= 10
    batch = batch_of([encode_prompt([], "How many?", TOKENIZER, LAYOUT)] * 8, [], torch.float32)

    def drawn(**how):
        return generate(model, batch, 10, -1, temperature=1.0,
                        generator=torch.Generator().manual_seed(0), **how)

    assert max(map(max, drawn())) >= vocab > max(map(max, drawn(vocab=vocab)))
    assert generate(model, batch, 10, -1, vocab=vocab) == generate(model, batch, 10, -1)


# ---- The program


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with pictures and two checkpoints; only answers of `model` may end."""
    folder = tmp_path_factory.mktemp("place")
    model = trained(torch.float32, seed=3)
    cfg = dataclasses.replace(model.cfg, llm=dataclasses.replace(model.cfg.llm, context=CONTEXT))
    model.llm.lm_head.weight.data[3:259] = 0  # no bytes: they may not form whole characters
    for name in ("model", "endless"):
        state = {name: p.detach() for name, p in model.named_parameters()}
        weights.save(str(folder / name), cfg, state, TOKENIZER, Preprocess(28), "A chat.",
                     stage=2, sources={}, training={})
        model.llm.lm_head.weight.data[TOKENIZER.eos] = 0
    noise(0).save(folder / "x.png")
    noise(1).save(folder / "y.png")
    (folder / "half.png").write_bytes((folder / "x.png").read_bytes()[:1500])
    return folder


@pytest.fixture(scope="module")
def known(place):
    """The checkpoint `model`, to say what is expected."""
    return weights.load(str(place / "model"))


def arguments(place, *more):
    return [f"--model={place / 'model'}", "--max_new_tokens=6", *CPU, *more]


def typed(monkeypatch, content):
    """Let standard input be a pipe with this content."""
    content = content if isinstance(content, bytes) else content.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


Q0, Q1, Q2 = "What colour is the circle?", "Is there a square?", "How many?"


def test_prompts_are_turns_of_one_chat(place, known, monkeypatch, capsys):
    code, out, err = run_here(monkeypatch, capsys,
                              *arguments(place, f"--image={place / 'x.png'}", "--prompt", Q0,
                                         f"--prompt={Q1}"))
    expected = [answer_of(known, noise(0), Q0), answer_of(known, noise(0), Q0, Q1)]
    assert code == 0 and out == "".join(f"{answer}\n" for answer in expected)
    assert expected[1] != answer_of(known, noise(0), Q1)
    assert f"{place / 'model'} on cpu in float32\n" in err
    assert err.count("tokens/s") == err.count("the first after") == 2


def test_a_chat_through_a_pipe_answers_line_by_line_and_survives_mistakes(place, known,
        monkeypatch, capsys):
    typed(monkeypatch, "\n".join([Q1, "", f"/image {place / 'half.png'}", "/look", Q2, "/reset", Q2,
                                  f"/image {place / 'y.png'}", Q0, "/image", "/quit", Q0]))
    code, out, err = run_here(monkeypatch, capsys,
                              *arguments(place, f"--image={place / 'x.png'}", f"--prompt={Q0}",
                                         "--chat"))
    x, y = noise(0), noise(1)
    expected = [answer_of(known, x, Q0), answer_of(known, x, Q0, Q1),
                answer_of(known, x, Q0, Q1, Q2),
                answer_of(known, x, Q2), answer_of(known, y, Q0)]
    assert len(set(expected)) == 5
    assert code == 0 and out == "".join(f"{answer}\n" for answer in expected)
    mistakes = [line for line in err.splitlines() if "error:" in line]
    words = ("empty", "unreadable picture", "/look is", "/image needs")
    assert [word in line for word, line in zip(words, mistakes)] == [True] * 4
    assert len(mistakes) == 4 and ">" not in err
    assert f"a new conversation about {place / 'y.png'}\n" in err and "/image PATH" in mistakes[3]


def test_a_chat_without_a_first_question_waits_for_one_and_ends_with_its_input(place, known,
        monkeypatch, capsys):
    # One line is not text, and there is no newline at the end
    typed(monkeypatch, Q0.encode() + b"\nHow \xff?\n" + Q2.encode())
    code, out, err = run_here(monkeypatch, capsys, *arguments(place, "--chat"))
    assert code == 0 and out == f"{answer_of(known, None, Q0)}\n{answer_of(known, None, Q0, Q2)}\n"
    assert err.count("error:") == 1 and "not valid Unicode" in err


def test_ctrl_c_ends_a_chat_through_a_pipe_and_keeps_what_was_answered(place, known, monkeypatch,
        capsys):
    def ask(chat, question):
        if question == Q1:
            raise KeyboardInterrupt
        yield from real(chat, question)

    real = Chat.ask
    with monkeypatch.context() as patch:
        patch.setattr(Chat, "ask", ask)
        typed(patch, f"{Q0}\n{Q1}\n{Q2}\n")
        code, out, err = run_here(patch, capsys, *arguments(place, "--chat"))
    assert code == 130 and out == answer_of(known, None, Q0) + "\n" and err.endswith("\nstopped\n")


def test_a_picture_may_come_through_standard_input(place, known, monkeypatch, capsys):
    typed(monkeypatch, (place / "x.png").read_bytes())
    code, out, _ = run_here(monkeypatch, capsys, *arguments(place, "--image", "-", "--prompt", Q0))
    assert code == 0 and out == answer_of(known, noise(0), Q0) + "\n"
    typed(monkeypatch, b"")
    code, out, err = run_here(monkeypatch, capsys, *arguments(place, "--image", "-"))
    assert code.startswith("error: standard input: unreadable picture") and (out, err) == ("", "")


MISTAKES = {
    "two readers": (["--image=-", "--chat"], "both read standard input"),
    "batch and prompt": (["--batch=q.jsonl", "--prompt=a"], "leave out --image, --prompt"),
    "batch and chat": (["--batch=q.jsonl", "--chat"], "--chat"),
    "out without batch": (["--out=a.jsonl"], "belong to --batch"),
    "a batch merged": (["--batch=a.jsonl", "--merge"], "--merge is for one picture"),
    "merge, but no VLoRA": (["--merge"], "is not a VLoRA, --merge works only with one"),
    "batch of none": (["--batch=q.jsonl", "--batch_size=0"], "at least 1"),
    "no such file": (["--batch=nowhere.jsonl"], "nowhere.jsonl"),
    "an empty later turn": (["--prompt=How many?", "--prompt= "], "empty"),
    "a later turn with the tag": (["--image=-", "--prompt=How many?", "--prompt=<image> a"],
                                  "<image> in a later question: only the first"),
}


@pytest.mark.parametrize("argv, words", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_mend(place, argv, words, monkeypatch, capsys):
    code, out, err = run_here(monkeypatch, capsys, *arguments(place, *argv))
    assert isinstance(code, str) and code.startswith("error: ") and words in code
    assert "\n" not in code
    assert (out, err) == ("", "")


@contextlib.contextmanager
def endless(place, *argv, stdin=None):
    """The program as a process that gives an endless answer; it is killed at the end."""
    argv = [sys.executable, sample.__file__, f"--model={place / 'endless'}",
            f"--max_new_tokens={CONTEXT}", *CPU, *argv]
    with subprocess.Popen(argv, stdin=stdin, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as done:
        try:
            yield done
        finally:
            done.kill()


def until(stream, end):
    """What comes from a stream up to some bytes."""
    found = b""
    while not found.endswith(end):
        byte = stream.read(1)
        assert byte, found
        found += byte
    return found


def test_at_a_terminal_ctrl_c_stops_an_answer_and_at_the_prompt_the_program(place):
    master, slave = pty.openpty()
    with endless(place, "--chat", stdin=slave) as done:
        assert until(done.stderr, b"\n> ").endswith(b"/quit\n> ")
        for question in (Q0, Q1):
            os.write(master, f"{question}\n".encode())
            until(done.stdout, b" ")
            done.send_signal(signal.SIGINT)
            assert b"stopped" in until(done.stderr, b"> ")
            until(done.stdout, b"\n")
        done.send_signal(signal.SIGINT)
        out, err = done.communicate(timeout=300)
    os.close(master), os.close(slave)
    assert done.returncode == 130 and (out, err) == (b"", b"stopped\n")


def test_an_answer_whose_reader_goes_away_ends_without_a_word(place):
    with endless(place) as done:
        assert done.stdout.read(1)
        done.stdout.close()
        assert done.wait(timeout=300) == 141
        assert done.stderr.read() == f"{place / 'endless'} on cpu in float32\n".encode()


def test_a_second_picture_is_refused_and_not_dropped(place, monkeypatch, capsys):
    pictures = [f"--image={place / name}" for name in ("x.png", "y.png")]
    code, out, _ = run_here(monkeypatch, capsys, *arguments(place), *pictures)
    assert (code, out) == ("error: --image is given 2 times, expected once", "")


def test_a_transparent_picture_is_seen_as_in_training_or_as_the_options_say(place, tmp_path,
        monkeypatch, capsys):
    clear = data.open_image(place / "x.png", "x").convert("RGBA")
    clear.putalpha(data.open_image(place / "y.png", "y").convert("L"))
    clear.save(tmp_path / "clear.png")
    on_white = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    seen, real = [], sample.pixels
    monkeypatch.setattr(sample, "pixels", lambda *a: seen.append(real(*a)) or seen[-1])
    for more, picture in (([], clear.convert("RGB")), (["--background=white"], on_white)):
        argv = [*arguments(place, *more), str(tmp_path / "clear.png")]
        code, *_ = run_here(monkeypatch, capsys, *argv)
        assert code == 0 and torch.equal(seen.pop(), real(picture, Preprocess(28)))


# ---- Files of questions

ROWS = [{"id": 7, "image": "x.png", "prompt": Q0}, {"prompt": Q2},
        {"image": "y.png", "prompt": "Is there? " * 9, "é": ["é"]},
        {"image": None, "prompt": Q1}, {"image": "y.png", "prompt": Q2},
        {"prompt": "How?", "image": "sub/x.png"},
        {"question_id": "b", "prompt": Q0}]


@pytest.fixture
def questions(place, tmp_path):
    """A folder with ROWS in q.jsonl and their pictures."""
    (tmp_path / "sub").mkdir()
    for name in ("x.png", "y.png", "sub/x.png"):
        (tmp_path / name).write_bytes((place / os.path.basename(name)).read_bytes())
    write_rows(tmp_path, ROWS)
    return tmp_path


def write_rows(folder, rows):
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def batch(place, folder, monkeypatch, capsys, *more, n=12):
    """(code, answers in the file, rows of ids that the model gave, stderr) of --batch q.jsonl."""
    rows = []
    monkeypatch.setattr(sample, "generate",
                        lambda *a, **k: rows.extend(found := generate(*a, **k)) or found)
    code, out, err = run_here(monkeypatch, capsys, f"--model={place / 'model'}",
                              f"--batch={folder / 'q.jsonl'}", "--batch_size=3",
                            f"--max_new_tokens={n}", *CPU, *more)
    assert out == ""
    file = folder / "q.answers.jsonl"
    lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else None
    return code, lines and list(map(json.loads, lines)), rows, err


def alone(checkpoint, folder, row, n=12):
    """(text, ids) of the answer to one row, by a chat."""
    image = data.open_image(folder / row["image"], "x") if row.get("image") else None
    chat = Chat(checkpoint, image, Options(max_new_tokens=n))
    start = len(chat.prompt(row["prompt"])[0].ids)
    text = "".join(chat.ask(row["prompt"]))
    return text, [i for i in chat.ids[start:] if i != TOKENIZER.eos]


def test_answers_of_a_file_are_those_of_single_questions_token_for_token_in_order(place, known,
        questions, monkeypatch, capsys):
    code, found, ids, err = batch(place, questions, monkeypatch, capsys)
    expected = [alone(known, questions, row) for row in ROWS]
    assert code == 0 and ids == [ids for _, ids in expected]
    assert len(set(map(tuple, ids))) == len(ROWS)
    assert found == [{**row, "answer": text} for row, (text, _) in zip(ROWS, expected)]
    assert [list(row) for row in found] == [[*row, "answer"] for row in ROWS]
    assert "é" in (questions / "q.answers.jsonl").read_text() and "7/7" in err
    cut = sum(len(ids) == 12 for ids in ids)
    assert 0 < cut and f"{cut} answers were cut" in err


def test_a_row_of_a_file_is_cut_where_its_own_context_ends(known):
    context = len(encode_prompt([], ROWS[2]["prompt"], TOKENIZER, LAYOUT, "y.png").ids) + 4
    small = dataclasses.replace(known,
                                model=VLM(dataclasses.replace(known.model.cfg,
                                                              llm=dataclasses.replace(
        known.model.cfg.llm, context=context))))
    small.model.load_state_dict(known.model.state_dict())
    o = Options(max_new_tokens=30)
    rows = [{"prompt": ROWS[2]["prompt"]}, {"prompt": Q2}]
    found = sample.answer_rows(small, list(zip("ab", rows)), ".", o, 0)
    assert found == [(answer_of(small, None, row["prompt"], o=o), True) for row in rows]
    with pytest.raises(cli.UserError, match="^b takes .* the context"):
        sample.answer_rows(small,
                           [("a", rows[1]), ("b", {"prompt": "Is" + "\n" * context + "there?"})],
                           ".", o, 0)


@pytest.mark.parametrize("cut", [1, 40, 100_000],
                         ids=["last line half written", "one line less", "nothing"])
def test_a_file_goes_on_where_it_stopped(place, questions, monkeypatch, capsys, cut):
    _, found, ids, _ = batch(place, questions, monkeypatch, capsys)
    file = questions / "q.answers.jsonl"
    whole = file.read_bytes()
    kept = whole[:-cut]
    file.write_bytes(kept)
    code, again, more, err = batch(place, questions, monkeypatch, capsys)
    assert code == 0 and again == found and file.read_bytes() == whole
    done = kept.count(b"\n")
    assert more == ids[done:] and (f"{done} of 7" in err) == (done > 0)
    code, _, more, err = batch(place, questions, monkeypatch, capsys)
    assert code == 0 and more == [] and "all 7 answers" in err and file.read_bytes() == whole


def test_a_run_that_is_stopped_keeps_the_batches_that_it_answered(place, questions, monkeypatch,
        capsys):
    _, found, _, _ = batch(place, questions, monkeypatch, capsys)
    (questions / "q.answers.jsonl").unlink()
    calls, real = [], sample.answer_rows

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(sample, "answer_rows", stopped)
        code, kept, _, _ = batch(place, questions, patch, capsys)
    assert code == 130 and kept == found[:6]
    assert batch(place, questions, monkeypatch, capsys)[1] == found


@pytest.mark.parametrize("change", [
    lambda lines: [lines[1], lines[0], *lines[2:]], lambda lines: lines + lines[:1],
    lambda lines: [b"notes\n"],
    lambda lines: [b"half a note"], lambda lines: lines + [b"{"],
    lambda lines: [lines[0].replace(b"circle", b"square")],
    lambda lines: [lines[0], lines[1][:9] + b"x"]])
def test_a_file_that_does_not_hold_these_answers_is_refused_and_left_alone(place, questions,
        monkeypatch, capsys, change):
    batch(place, questions, monkeypatch, capsys, n=1)
    file = questions / "q.answers.jsonl"
    other = b"".join(change(file.read_bytes().splitlines(keepends=True)))
    file.write_bytes(other)
    code, *_ = run_here(monkeypatch, capsys, f"--model={place / 'model'}",
                        f"--batch={questions / 'q.jsonl'}", *CPU)
    assert "not the answer to that question" in code and file.read_bytes() == other


BAD = {"not JSON": ('{"prompt": "a"', "not JSON"), "no UTF-8": ("\udcff", "not JSON"),
       "empty": ("", "not JSON"),
       "half a surrogate": (r'{"prompt": "\ud800"}', "not JSON"), "list": ("[1]", "expected"),
       "no prompt": ("{}", "expected"),
       "empty prompt": ('{"prompt": " "}', "expected"),
       "picture": ('{"prompt": "a", "image": 3}', "expected the path"),
       "answered": ('{"prompt": "a", "answer": "b"}', "where the answer will go")}


@pytest.mark.parametrize("line, words", BAD.values(), ids=BAD)
def test_a_malformed_line_is_named_before_anything_is_answered(place, questions, monkeypatch,
        capsys, line, words):
    lines = [json.dumps(row) for row in ROWS[:4]] + [line, json.dumps(ROWS[5])]
    (questions / "q.jsonl").write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    code, found, _, err = batch(place, questions, monkeypatch, capsys)
    assert "q.jsonl line 5: " in code and words in code and "\n" not in code
    assert (found, err) == (None, "")


def test_a_file_without_questions_is_named(place, questions, monkeypatch, capsys):
    (questions / "q.jsonl").write_text("")
    code, found, _, err = batch(place, questions, monkeypatch, capsys)
    assert code.startswith("error: ") and "q.jsonl: no questions, expected lines like" in code
    assert (found, err) == (None, "")


@pytest.mark.parametrize("row, words", [
    ({"prompt": "a", "image": "none.png"}, "there is no such picture"),
    ({"prompt": "a", "image": "q.jsonl"}, "unreadable"),
    ({"prompt": "a", "image": "../x.png"}, "is not inside"),
    ({"prompt": "<image> a"}, "no picture")])
def test_a_row_that_cannot_be_used_is_named_and_what_was_answered_is_kept(place, questions,
        monkeypatch, capsys, row, words):
    write_rows(questions, [*ROWS[:4], row, *ROWS[5:]])
    code, found, _, _ = batch(place, questions, monkeypatch, capsys)
    assert "q.jsonl line 5" in code and words in code and "\n" not in code
    write_rows(questions, ROWS)
    assert len(found) == 3 and batch(place, questions, monkeypatch, capsys)[1][:3] == found


def test_the_pictures_and_the_answers_may_lie_elsewhere(place, questions, monkeypatch, capsys):
    write_rows(questions, ROWS[5:6])
    (questions / "sub" / "x.png").rename(questions / "x.png")
    (questions / "deep" / "sub").mkdir(parents=True)
    (questions / "x.png").rename(questions / "deep" / "sub" / "x.png")
    code, found, _, _ = batch(place, questions, monkeypatch, capsys,
                              f"--images={questions / 'deep'}", f"--out={questions / 'a'}")
    assert code == 0 and found is None
    assert json.loads((questions / "a").read_text())["image"] == "sub/x.png"


def test_drawn_answers_of_a_file_depend_on_the_seed_only(place, questions, monkeypatch, capsys):
    found = []
    for seed in (0, 0, 1):
        found.append(batch(place, questions, monkeypatch, capsys, "--temperature=2",
                           f"--seed={seed}")[1])
        (questions / "q.answers.jsonl").unlink()
    assert found[0] == found[1] != found[2]


CHANGES = {"other weights": ("--model=other", "answers of other weights"),
           "temperature": ("--temperature=2", "--temperature 0.0, not 2.0"),
           "top_p": ("--top_p=0.5", "--top_p 1.0, not 0.5"),
           "seed": ("--seed=1", "--seed 0, not 1"),
           "longest answer": ("--max_new_tokens=9", "--max_new_tokens 12, not 9")}


@pytest.mark.parametrize("option, words", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kept", [3, 7], ids=["a part", "all"])
def test_a_file_of_answers_is_refused_by_another_model_and_by_other_options(
        place, questions, monkeypatch, capsys, option, words, kept):
    batch(place, questions, monkeypatch, capsys)
    file = questions / "q.answers.jsonl"
    lines = b"".join(file.read_bytes().splitlines(keepends=True)[:kept])
    file.write_bytes(lines)
    option = option.replace("other", str(place / "endless"))
    code, _, ids, err = batch(place, questions, monkeypatch, capsys, option)
    assert code.startswith("error: ") and words in code and "name another --out" in code
    assert "\n" not in code and (ids, err) == ([], "") and file.read_bytes() == lines


def test_what_made_the_answers_is_noted_before_the_first_and_the_model_may_move(
        place, questions, monkeypatch, capsys):
    monkeypatch.setattr(sample, "answer_rows", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        batch(place, questions, monkeypatch, capsys)
    monkeypatch.undo()
    noted = json.loads((questions / "q.answers.meta.json").read_text())
    assert noted.pop("fingerprint") and noted == {
        "model": str(place / "model"), "temperature": 0.0, "top_p": 1.0, "max_new_tokens": 12,
        "seed": 0, "background": None, "base": None}
    _, found, _, _ = batch(place, questions, monkeypatch, capsys)
    file, moved = questions / "q.answers.jsonl", questions / "moved"
    file.write_bytes(file.read_bytes()[:-1])
    os.symlink(place / "model", moved)
    code, again, ids, _ = batch(place, questions, monkeypatch, capsys, f"--model={moved}")
    assert code == 0 and again == found and len(ids) == 1
    (questions / "q.answers.meta.json").unlink()
    code, *_ = batch(place, questions, monkeypatch, capsys)
    assert "q.answers.meta.json, which says how" in code and "is missing" in code


def test_the_bar_of_a_file_is_drawn_every_5_seconds_where_no_terminal_is(
        place, questions, monkeypatch, capsys):
    pauses, real = [], formats.answers.tqdm
    monkeypatch.setattr(formats.answers, "tqdm",
                        lambda **k: pauses.append(k["mininterval"]) or real(**k))
    assert batch(place, questions, monkeypatch, capsys)[0] == 0
    (questions / "q.answers.jsonl").unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert batch(place, questions, monkeypatch, capsys)[0] == 0
    assert pauses == [5, 0.1]


# ---- The newest checkpoint


def test_a_checkpoint_that_was_set_aside_counts_where_its_successor_was_never_finished(tmp_path):
    for age, name in enumerate(("a/stage2", "a/stage2.old", "b/stage1.old")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
        os.utime(tmp_path / name / "config.json", (age, age))
    assert choose_checkpoint(None, str(tmp_path)) == str(tmp_path / "b" / "stage1")
    (tmp_path / "b" / "stage1.old" / "config.json").unlink()
    assert choose_checkpoint(None, str(tmp_path)) == str(tmp_path / "a" / "stage2")
    os.utime(tmp_path / "a" / "stage2" / "config.json", (0, 0))
    (tmp_path / "c" / "stage1").mkdir(parents=True)
    (tmp_path / "c" / "stage1" / "config.json").touch()
    # newer than a/stage2, older than what that replaced
    os.utime(tmp_path / "c" / "stage1" / "config.json", (.5, .5))
    assert choose_checkpoint(None, str(tmp_path)) == str(tmp_path / "c" / "stage1")


def test_the_program_finds_a_checkpoint_whose_successor_was_killed(place, known, tmp_path,
        monkeypatch, capsys):
    (tmp_path / "out" / "x").mkdir(parents=True)
    os.symlink(place / "model", tmp_path / "out" / "x" / "stage2.old")
    monkeypatch.chdir(tmp_path)
    code, out, err = run_here(monkeypatch, capsys, f"--prompt={Q0}", "--max_new_tokens=6", *CPU)
    assert code == 0 and out == answer_of(known, None, Q0) + "\n" and "stage2 on cpu" in err


def test_a_run_stands_for_its_newest_stage_and_several_runs_are_mentioned(tmp_path, capsys):
    for age, name in enumerate(("a/stage1", "a/stage2", "b/stage1")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
        os.utime(tmp_path / name / "config.json", (age, age))
    assert choose_checkpoint(str(tmp_path / "a")) == str(tmp_path / "a" / "stage2")
    assert choose_checkpoint(str(tmp_path / "a" / "stage1")) == str(tmp_path / "a" / "stage1")
    for name in ("owner/name", str(tmp_path / "none")):
        assert choose_checkpoint(name) == name
    assert capsys.readouterr() == ("", "")
    newest = str(tmp_path / "b" / "stage1")
    assert choose_checkpoint(None, str(tmp_path)) == choose_checkpoint(str(tmp_path)) == newest
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 2 and err.count(newest) == 2 and "--model" in err


# ---- Commands


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a checkpoint, pictures good and bad, and a folder that is no checkpoint."""
    folder = tmp_path_factory.mktemp("small")
    model = trained(torch.float32, seed=3)
    model.llm.lm_head.weight.data[:259] = 0  # no bytes: they may not form whole characters
    state = {name: p.detach() for name, p in model.named_parameters()}
    weights.save(str(folder / "model"), model.cfg, state, TOKENIZER, Preprocess(28), "A chat.",
                 stage=2, sources={}, training={})
    noise = torch.randint(0, 256, (40, 30, 3),
                          generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    Image.fromarray(noise.numpy()).save(folder / "x.png")
    (folder / "empty.png").touch()
    (folder / "half.png").write_bytes((folder / "x.png").read_bytes()[:1500])
    (folder / "bare").mkdir()
    return folder


def command(small, **changes):
    """The arguments of sample.py: by default a question that can be answered."""
    options = dict(image=small / "x.png", prompt="What colour is the circle?",
                   model=small / "model", device="cpu",
                   dtype="float32", max_new_tokens=6)
    return [f"--{name}={value}" for name, value in {**options, **changes}.items()]


def run_here(monkeypatch, capsys, *argv):
    """(exit code or message, stdout, stderr) of sample.py, run in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *argv])
    code = 0
    try:
        cli.main(sample.run)
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


def expected_answer(small, text, n):
    """What `generate` gives the checkpoint asked about x.png."""
    checkpoint = weights.load(str(small / "model"))
    asked = encode_prompt([], text, TOKENIZER, LAYOUT, "x.png")
    look = data.pixels(data.open_image(small / "x.png", "x.png"), checkpoint.preprocess)
    return TOKENIZER.decode(generate(checkpoint.model, batch_of([asked], [look], torch.float32), n,
                                     TOKENIZER.eos)[0])


def run_process(*argv):
    return subprocess.run([sys.executable, *map(str, argv)], capture_output=True, text=True,
                          encoding="utf-8",
                          cwd=os.path.dirname(sample.__file__),
                          env={**os.environ, "PYTHONUTF8": "1"})


def test_the_program_prints_the_answer_and_nothing_else(small):
    done = run_process("sample.py", *command(small))
    assert done.returncode == 0
    answer = expected_answer(small, "What colour is the circle?", 6)
    assert done.stdout == answer + "\n" and answer
    assert str(small / "model") in done.stderr and "Traceback" not in done.stderr


def test_the_program_ends_a_mistake_with_one_line_and_exit_code_1(small):
    done = run_process("sample.py", *command(small, image=small / "none.png"))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {small / 'none.png'}: there is no such picture\n"


COMMAND_MISTAKES = {
    "missing picture": (dict(image="none.png"), "no such picture"),
    "zero bytes": (dict(image="empty.png"), "unreadable picture"),
    "truncated": (dict(image="half.png"), "unreadable picture"),
    "a folder as picture": (dict(image="bare"), "unreadable picture"),
    "empty prompt": (dict(prompt=" "), "empty"),
    "long prompt": (dict(prompt="How many? " * 200), "the context has 200"),
    "no config": (dict(model="bare"), "config.json: file not found"),
    "no folder": (dict(model="nowhere"), "no such folder"),
    "unknown flag": (dict(max_new_token="3"), "did you mean --max_new_tokens?"),
    "wrong type": (dict(temperature="warm"), "expected float"),
    "wrong choice": (dict(dtype="float8"), "expected one of bfloat16, float32"),
    "no new tokens": (dict(max_new_tokens=0), "at least 1 token"),
    "cold": (dict(temperature=-1), "--temperature -1.0: expected 0 or"),
    "no nucleus": (dict(top_p=0), "--top_p 0.0: expected above 0"),
    "unknown device": (dict(device="abacus"), "abacus"),
}


@pytest.mark.parametrize("changes, words", COMMAND_MISTAKES.values(), ids=COMMAND_MISTAKES)
def test_a_mistake_in_a_command_is_one_line_that_says_what_to_mend(small, changes, words,
        monkeypatch, capsys):
    paths = {k: small / v for k, v in changes.items() if k in ("image", "model")}
    code, out, err = run_here(monkeypatch, capsys, *command(small, **{**changes, **paths}))
    assert isinstance(code, str)  # a str: printed, exit code 1
    assert code.startswith("error: ") and words in code
    assert "\n" not in code and (out, err) == ("", "")


def test_a_bare_word_is_the_picture(small, monkeypatch, capsys):
    options = [word for word in command(small) if not word.startswith("--image")]
    expected = run_here(monkeypatch, capsys, *command(small))[:2]
    for argv in ([small / "x.png", *options], [*options, small / "x.png"]):
        assert run_here(monkeypatch, capsys, *map(str, argv))[:2] == expected


WATCH = """import runpy, sys, time
class Watch:
    def find_spec(self, name, *_):
        if name == {name!r}:
            print("ready", flush=True)
            time.sleep(2)
sys.meta_path.insert(0, Watch())
runpy.run_path("sample.py", run_name="__main__")"""


@pytest.mark.parametrize("name", ["numpy", "torch", "torch.nn"])
def test_ctrl_c_during_the_imports_ends_with_one_line(name):
    with subprocess.Popen([sys.executable, "-c", WATCH.format(name=name)], text=True,
                          cwd=os.path.dirname(sample.__file__),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as done:
        assert done.stdout.readline() == "ready\n"
        done.send_signal(signal.SIGINT)
        out, err = done.communicate(timeout=60)
    assert err == "stopped\n" and not out.replace("ready\n", "")  # a library may try again
    assert done.returncode in (130, -signal.SIGINT)


def test_an_answer_longer_than_the_context_is_cut_and_said_to_be(small, monkeypatch, capsys):
    asked = "How many? " * 50
    room = LAYOUT.context - len(encode_prompt([], asked, TOKENIZER, LAYOUT, "x.png").ids)
    assert 0 < room < 100
    code, out, err = run_here(monkeypatch, capsys,
                              *command(small, prompt=asked, max_new_tokens=100))
    assert code == 0 and out == expected_answer(small, asked, room) + "\n"
    assert f"cut at {room} tokens" in err
    shorter = command(small, prompt=asked, max_new_tokens=room)
    assert "cut at" not in run_here(monkeypatch, capsys, *shorter)[2]
    assert out.startswith(expected_answer(small, asked, room - 1))


def test_a_prompt_that_fills_the_context_leaves_no_room_for_an_answer(small, monkeypatch, capsys):
    length = lambda text: len(encode_prompt([], text, TOKENIZER, LAYOUT, "x.png").ids)
    full = "a" + "\n" * (LAYOUT.context - length("a\nb") + 1) + "b"
    assert length(full) == LAYOUT.context
    code, out, _ = run_here(monkeypatch, capsys, *command(small, prompt=full))
    assert "no room for an answer" in code and out == ""


def test_a_question_without_a_picture_is_answered_too(small, monkeypatch, capsys):
    argv = [a for a in command(small) if not a.startswith("--image")]
    code, out, _ = run_here(monkeypatch, capsys, *argv)
    other = expected_answer(small, "What colour is the circle?", 6)
    assert code == 0 and out != other + "\n" and len(out) > 1


def test_drawn_answers_depend_on_the_seed_only(small, monkeypatch, capsys):
    said = [run_here(monkeypatch, capsys, *command(small, temperature=2, seed=seed))[1]
            for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def test_the_newest_checkpoint_is_taken_where_none_is_named(tmp_path):
    with pytest.raises(cli.UserError, match="train.py"):
        choose_checkpoint(None, str(tmp_path))
    for age, name in enumerate(("toy/stage1", "toy/stage2", "other/stage1", "toy/stage0")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").touch()
        os.utime(tmp_path / name / "config.json", (age, age))
    (tmp_path / "last" / "stage2").mkdir(parents=True)  # not finished: without a config.json
    assert choose_checkpoint(None, str(tmp_path)) == str(tmp_path / "other" / "stage1")


def test_training_and_sampling_need_no_library_but_the_few_that_are_stated():
    unwanted = ("transformers deepspeed peft flash_attn wandb torchvision matplotlib "
                "sentencepiece").split()
    done = run_process("-c",
                       "import sys, train, sample; "
                       f"print(*set(sys.modules) & set({unwanted}), flush=True)")
    assert (done.returncode, done.stdout) == (0, "\n"), done.stderr


# ---- The same text as transformers


@torch.no_grad()
def test_greedy_text_is_that_of_transformers_for_fifty_pictures_and_prompts(tmp_path):
    torch.manual_seed(0)
    image_id, vocab = TOKENIZER.vocab, TOKENIZER.vocab + 64
    clip, llama = hf_clip().config, hf_llama(vocab_size=vocab, max_position_embeddings=256).config
    theirs = randomised(transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(
        vision_config=clip, text_config=llama, image_token_index=image_id, vision_feature_layer=-2,
        vision_feature_select_strategy="default")))
    theirs.save_pretrained(tmp_path)
    TOKENIZER.save(tmp_path)
    checkpoint = weights.load(str(tmp_path), torch.float32)
    assert checkpoint.preprocess == Preprocess(28) and checkpoint.system == data.SYSTEM

    rng = np.random.default_rng(0)
    words = "What colour is the circle Is there a square How many yes two of them".split()
    images = [noise(i, rng.integers(1, 90, 2)) for i in range(50)]
    asked = [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(50)]
    samples = [encode_prompt([], q, TOKENIZER, checkpoint.prompt_format(), "x.png", f"pair {i}")
               for i, q in enumerate(asked)]
    looks = [look(image) for image in images]
    ours = generate(checkpoint.model, batch_of(samples, looks, torch.float32), 16, TOKENIZER.eos)

    expected = []
    for start in range(0, 50, 10):  # they pad on the left
        some = [torch.from_numpy(s.ids).masked_fill(torch.from_numpy(s.ids) == IMAGE, image_id)
                for s in samples[start:start + 10]]
        longest = max(map(len, some))
        ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0), value=0)
                           for row in some])
        mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in some]).long()
        out = theirs.generate(input_ids=ids, attention_mask=mask,
                              pixel_values=torch.stack(looks[start:start + 10]),
                              max_new_tokens=16, do_sample=False, eos_token_id=TOKENIZER.eos,
                              pad_token_id=TOKENIZER.eos)
        expected += [row[:row.index(TOKENIZER.eos)] if TOKENIZER.eos in row else row
                     for row in out[:, longest:].tolist()]
    assert ours == expected
    assert len(set(map(tuple, ours))) >= 45 and len({token for row in ours for token in row}) > 80
    chats = [answer_of(checkpoint, images[i], asked[i], o=Options(max_new_tokens=16))
             for i in range(0, 50, 10)]
    assert chats == [TOKENIZER.decode(expected[i]) for i in range(0, 50, 10)]


@pytest.mark.parametrize("option",
                         [{"temperature": float("nan")}, {"temperature": 1e-45}, {"top_p": 1e-300},
                          {"seed": 2**70}])
def test_a_number_that_cannot_be_drawn_with_is_refused(option):
    with pytest.raises(cli.UserError, match=next(iter(option))):
        Options(**option)
