"""The fast ways to answer give what model.py gives: packed layers on a CPU, a captured step."""
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import benchmarks.toy
import sample
import weights
from data import Preprocess
from inference import captured, threads
from inference.captured import CapturedStep
from inference.packed import has_kernels, pack, PackedAttention, PackedLinear, PackedMLP
from inference.prepare import ready_for_answers
from model import generate, stream
from sample import Chat
from tests.helpers import (by_steps, close, conversations, dictated, KINDS, LAYOUT, LLAMA,
                           logits_of, noise, prompts, PROMPTS, TOKENIZER, trained, VISION,
                           whole_batch)

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
needs_kernels = pytest.mark.skipif(not has_kernels(torch.float32), reason="needs oneDNN on x86")
needs_bf16 = pytest.mark.skipif(not has_kernels(torch.bfloat16), reason="needs bf16 in oneDNN")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]


def in_fp32(batch):
    return dataclasses.replace(batch, visual=batch.visual.float())


# ---- Packed


@needs_kernels
@kinds
@torch.no_grad()
def test_a_packed_model_computes_what_the_plain_one_does(kind):
    plain, batch = trained(torch.float32, **kind), in_fp32(whole_batch())
    packed = pack(copy.deepcopy(plain))
    assert close(logits_of(packed, batch), logits_of(plain, batch), 1e-5)
    names = {type(module) for module in packed.modules()}
    assert names >= {PackedAttention, PackedMLP, PackedLinear}


@needs_kernels
@kinds
@torch.no_grad()
def test_a_packed_model_decodes_as_in_one_pass(kind):
    samples = conversations()[:1]
    packed, batch = pack(trained(torch.float32, **kind)), in_fp32(whole_batch())
    full = logits_of(packed, batch)[0, :len(samples[0].ids)]
    assert close(by_steps(packed, samples, batch.visual[:1], 200)[0], full, 1e-5)


@needs_bf16
@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3, 4]], ids=["one", "rows of several lengths"])
@torch.no_grad()
def test_in_bf16_a_packed_model_is_as_close_to_fp32_as_the_plain_one(rows):
    exact = trained(torch.float32)
    plain = copy.deepcopy(exact).bfloat16()
    packed, found = pack(copy.deepcopy(plain)), {}
    for name, model in (("exact", exact), ("plain", plain), ("packed", packed)):
        batch = prompts(rows)
        batch.visual = batch.visual.to(model.llm.norm.weight.dtype)
        tokens = (torch.full((len(rows),), 5 + i) for i in range(6))
        found[name] = dictated_logits(model, batch, tokens)
    scale = found["exact"].max() - found["exact"].min()
    plain, packed = ((found[n].float() - found["exact"]).abs().mean() / scale
                     for n in ("plain", "packed"))
    assert packed < 1.5 * plain < 0.03


def dictated_logits(model, batch, tokens):
    """float[steps, B, V], the logits at which the given tokens, int64[B] each, were chosen."""
    tokens = list(tokens)
    with dictated(tokens) as seen:
        list(stream(model, batch, len(tokens), 2))
    return torch.stack(seen)


@needs_kernels
@torch.no_grad()
def test_layers_with_lora_or_a_generated_change_stay_as_they_are():
    for options in (dict(visual_expert="none", weight_source="lora"),
                    dict(visual_expert="none", language_expert="none",
                         vlora=weights.GeneratorConfig("qm", 2, 3, 8, 1, 2))):
        llm = dataclasses.replace(LLAMA, kv_heads=LLAMA.heads)
        cfg = weights.make_config(VISION, llm, **{"expert_embed": 8, "expert_rank": 4, **options})
        plain = weights.MODELS[type(cfg)](cfg).eval()
        for p in plain.parameters():
            nn.init.normal_(p, std=0.2)
        batch = in_fp32(whole_batch(image_tokens=cfg.image_tokens))
        packed = pack(copy.deepcopy(plain))
        assert close(logits_of(packed, batch), logits_of(plain, batch), 1e-5)


@needs_kernels
def test_a_model_on_a_cpu_is_packed_before_it_answers():
    ready = ready_for_answers(trained(torch.float32))
    assert isinstance(ready.llm.layers[0].mlp, PackedMLP)
    norm = ready.llm.norm
    assert ready_for_answers(ready).llm.norm is norm  # as it was
    plain = trained(torch.float64)  # there are no kernels for it
    assert ready_for_answers(plain).llm.layers[0].mlp.gate_proj.weight.dtype == torch.float64


@needs_kernels
@torch.no_grad()
def test_every_program_that_answers_makes_its_model_ready(tmp_path):
    model = trained(torch.float32)
    weights.save(str(tmp_path / "model"), model.cfg, dict(model.named_parameters()), TOKENIZER,
                 Preprocess(28), "A chat.", stage=2, sources={}, training={})
    o = sample.Options(model=str(tmp_path / "model"), device="cpu", dtype="float32")
    loaded = sample.load(o, o.model)[0].model
    answerer = benchmarks.toy.Answerer(weights.load(o.model, torch.float32))
    for ready in (loaded, answerer.checkpoint.model):
        assert isinstance(ready.llm.layers[0].mlp, PackedMLP)


def test_a_cache_whose_growth_was_interrupted_grows_the_next_time(monkeypatch):
    cache, real, left = trained(torch.float32).new_cache(1, "cpu", torch.float32), F.pad, [3]

    def pad(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(F, "pad", pad)
    with pytest.raises(KeyboardInterrupt):
        cache.reserve(5)
    cache.reserve(5)
    assert {x.shape[2] for layer in cache.layers for x in (layer.keys, layer.values)} == {5}


# ---- A captured step. On a CPU there is no graph: the same step runs with the same static tensors


def pair(device, **kind):
    """The same model twice; the second one has a captured step."""
    plain = trained(torch.float32, **kind).to(device)
    captured = copy.deepcopy(plain)
    captured.step = CapturedStep(captured)
    return plain, captured


@pytest.fixture
def prepared(monkeypatch):
    """The (rows, slots) of each capture."""
    found, real = [], CapturedStep.make_step

    def make_step(self, cache, rows, slots):
        found.append((rows, slots))
        real(self, cache, rows, slots)

    monkeypatch.setattr(CapturedStep, "make_step", make_step)
    return found


@pytest.fixture(params=["run", "graph"])
def graph_on_a_cpu(request, monkeypatch):
    """With "graph", a step on a CPU runs four times when it is captured, as on a GPU."""
    real = captured.capture

    def capture(run, device):
        for _ in range(4 * (device.type == "cpu")):
            run()
        return real(run, device)

    if request.param == "graph":
        monkeypatch.setattr(captured, "capture", capture)


@pytest.mark.usefixtures("graph_on_a_cpu")
@pytest.mark.parametrize("device", DEVICES)
@kinds
@torch.no_grad()
def test_a_captured_step_computes_what_the_plain_one_does(kind, device):
    plain, captured = pair(device, **kind)
    for rows in ([0], [0, 1, 2, 3, 4], [2, 0]):
        batch = prompts(rows).to(device)
        tokens = [torch.full((len(rows),), 5 + i, device=device) for i in range(6)]
        tokens[3][0] = 2  # ends the first row; its logits from then on mean nothing
        wanted = dictated_logits(plain, batch, tokens)
        found = dictated_logits(captured, batch, tokens)
        assert len(found) == (4 if len(rows) == 1 else 6)
        assert close(found[:4], wanted[:4], 1e-5)
        assert len(rows) == 1 or close(found[:, 1:], wanted[:, 1:], 1e-5)
        assert generate(captured, batch, 9, 2) == generate(plain, batch, 9, 2)


@pytest.mark.usefixtures("graph_on_a_cpu")
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_a_step_is_captured_once_for_prompts_of_all_lengths(prepared, device):
    plain, captured = pair(device)
    for row in range(len(PROMPTS)):
        batch = prompts([row]).to(device)
        assert generate(captured, batch, 7, 2) == generate(plain, batch, 7, 2)
    assert len({len(prompts([row]).ids[0]) for row in range(len(PROMPTS))}) > 2
    assert prepared == [(1, 1024)]
    batch = prompts([0]).to(device)
    assert generate(captured, batch, 1030, -1) == generate(plain, batch, 1030, -1)
    assert prepared == [(1, 1024), (1, 2048)]


def test_ctrl_c_during_a_capture_leaves_a_step_that_works(monkeypatch):
    plain, fast = pair("cpu")
    real, left = captured.capture, [0, 1, 0, 1]

    def capture(run, device):
        run()
        if left.pop():
            raise KeyboardInterrupt
        return real(run, device)

    monkeypatch.setattr(captured, "capture", capture)
    for length in (9, 1030):  # the first capture, and one for more slots
        with pytest.raises(KeyboardInterrupt):
            generate(fast, prompts([0]), length, -1)
        assert generate(fast, prompts([0]), length, -1) == generate(plain, prompts([0]), length, -1)
    assert not left


@pytest.mark.usefixtures("graph_on_a_cpu")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", [{}, dict(visual_expert="none", language_expert="none")],
                         ids=["experts", "LLaVA"])
def test_chats_that_take_turns_share_a_captured_step(kind, device, prepared):
    models = pair(device, **kind)
    questions = ["What colour is the circle?", "How many?", "Is there a square?"]
    answers = []
    for model in models:
        checkpoint = SimpleNamespace(model=model, tokenizer=TOKENIZER, preprocess=Preprocess(28),
                                     prompt_format=lambda: LAYOUT)
        o = SimpleNamespace(max_new_tokens=8, temperature=0.0, top_p=1.0, seed=0, merge=False)
        chats = [Chat(checkpoint, noise(seed), o) for seed in (1, 2)]
        answers.append([["".join(chat.ask(q)) for chat in chats] for q in questions])
        answers[-1].append([chat.ids for chat in chats])
    assert answers[0] == answers[1]
    assert prepared == [(1, 1024)]


# ---- Threads


def threads_chosen(monkeypatch, times, most):
    """(number of threads chosen, seconds it took) if a product with n threads takes times[n]."""
    now, tried = [0.0], []
    monkeypatch.setattr(threads, "all_threads", lambda: most)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", tried.append)

    class Tensor:
        def __matmul__(self, other):
            now[0] += times[tried[-1]]

    monkeypatch.setattr(torch, "ones", lambda *shape: Tensor())
    threads.choose_threads()
    return (tried or [most])[-1], now[0]


def test_fewer_threads_are_used_only_where_all_wait_for_each_other(monkeypatch):
    idle = {n: 1e-3 / n for n in (1, 2, 3, 4, 6)}
    assert threads_chosen(monkeypatch, idle, 6)[0] == 6
    assert threads_chosen(monkeypatch, idle, 1) == (1, 0)
    assert threads_chosen(monkeypatch, dict.fromkeys(idle, 1e-3), 6)[0] == 6  # they do not matter
    assert threads_chosen(monkeypatch, idle | {6: 1.2e-3}, 6)[0] == 6         # noise
    assert threads_chosen(monkeypatch, idle | {6: 10e-3}, 6)[0] == 3          # a core is taken
    # One product that takes longer than all of them with one thread is enough
    chosen, spent = threads_chosen(monkeypatch, {1: 1e-3, 2: 20e-3}, 2)
    assert chosen == 1 and spent < 0.06


def test_each_answer_of_a_chat_chooses_its_threads(monkeypatch):
    calls = []
    monkeypatch.setattr(sample, "choose_threads", lambda: calls.append(torch.get_num_threads()))
    model = trained(torch.float32)
    checkpoint = SimpleNamespace(model=model, tokenizer=TOKENIZER, preprocess=Preprocess(28),
                                 prompt_format=lambda: LAYOUT)
    chat = Chat(checkpoint, None, SimpleNamespace(max_new_tokens=2, temperature=0.0, top_p=1.0,
                                                  seed=0, merge=False))
    list(chat.ask("How many?"))
    list(chat.ask("How many?"))
    assert len(calls) == 2
