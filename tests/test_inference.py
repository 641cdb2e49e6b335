"""The fast ways to answer give what model.py gives: packed layers on a CPU, a captured step."""
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sample
import weights
from data import Preprocess
from inference import threads
from inference.captured import CapturedStep
from inference.packed import can_pack, pack, PackedAttention, PackedLinear, PackedMLP
from inference.prepare import ready_for_answers
from model import generate, stream
from sample import Chat
from tests.helpers import (by_steps, close, conversations, dictated, KINDS, LAYOUT, LLAMA, logits_of,
                           noise, prompts, PROMPTS, TOKENIZER, trained, VISION, whole_batch)

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
needs_kernels = pytest.mark.skipif(not can_pack(torch.float32), reason="needs oneDNN on x86")
needs_bf16 = pytest.mark.skipif(not can_pack(torch.bfloat16), reason="needs bf16 in oneDNN on x86")
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
    plain = trained(torch.float64)  # there are no kernels for it
    assert ready_for_answers(plain).llm.layers[0].mlp.gate_proj.weight.dtype == torch.float64


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
    found, real = [], CapturedStep.prepare

    def prepare(self, cache, rows, slots):
        found.append((rows, slots))
        real(self, cache, rows, slots)

    monkeypatch.setattr(CapturedStep, "prepare", prepare)
    return found


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


def threads_chosen(monkeypatch, times, all_threads):
    """The number of threads chosen if products with n threads take times[n] seconds."""
    now, tried = [0.0], []
    monkeypatch.setattr(threads, "most", {"threads": all_threads})
    monkeypatch.setattr(threads.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "set_num_threads", tried.append)

    class Tensor:
        def __matmul__(self, other):
            now[0] += times[tried[-1]]

    monkeypatch.setattr(torch, "ones", lambda *shape: Tensor())
    threads.choose_threads()
    assert now[0] <= sum(times[n] for n in set(tried)) * (1 + threads.PRODUCTS)
    return tried[-1], now[0]


def test_more_threads_are_used_as_long_as_they_are_faster(monkeypatch):
    idle = {n: 1e-3 / n for n in (1, 2, 4, 6)}
    assert threads_chosen(monkeypatch, idle, 6)[0] == 6
    assert threads_chosen(monkeypatch, idle, 1)[0] == 1
    one_core_taken = idle | {6: 10e-3}
    assert threads_chosen(monkeypatch, one_core_taken, 6)[0] == 4
    # A product that takes as long as all of them with one thread is not repeated
    chosen, spent = threads_chosen(monkeypatch, {1: 1e-3, 2: 20e-3}, 2)
    assert chosen == 1 and spent < 0.06


def test_answers_choose_their_threads_anew(monkeypatch):
    calls = []
    monkeypatch.setattr(sample, "choose_threads", lambda: calls.append(torch.get_num_threads()))
    model = trained(torch.float32)
    checkpoint = SimpleNamespace(model=model, tokenizer=TOKENIZER, preprocess=Preprocess(28),
                                 prompt_format=lambda: LAYOUT)
    chat = Chat(checkpoint, None, SimpleNamespace(max_new_tokens=2, temperature=0.0, top_p=1.0,
                                                  seed=0, merge=False))
    list(chat.ask("How many?"))
    list(chat.ask("How many?"))
    sample.answer(checkpoint, [chat.prompt("How many?")[0]], [], 2)
    assert len(calls) == 3
