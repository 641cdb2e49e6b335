"""What vlora.py claims, one test per sentence. CPU, no network.

W_s starts at zero, which hides a wrong product, a leak and a mixed-up row: `random_up` makes it
random.
"""
import contextlib
import dataclasses
import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig as HFLlamaConfig, LlamaForCausalLM

import benchmarks.ablation
import data
import formats.export
import formats.name_rules
import formats.weight_files
import sample
import train
import training.costs
import training.options
import training.plan
import weights
from cli import UserError
from data import encode, encode_prompt, IGNORE, IMAGE, Preprocess, PromptFormat
from formats.name_rules import vlora_rules
from model import Batch, generate, LlamaConfig, stream, VisionConfig, VLM, VLMConfig
from sample import Chat
from tests.helpers import (ask_dictated, batch_of, conversations, count_flops, counted, EVEN,
                           GROUPED,
    hf_clip, hf_llama, logits_of, look, noise, pictures, row_of_text, segments, size, TOKENIZER,
    TOWER,
    TURNS)
from tests.programs import Program, start_ranks, succeeds, words_of
from training.costs import forward_flops, paper_flops, token_flops
from vlora import (add_delta, Decoder, DeltaLinear, GeneratorConfig, merged, PerceptualWeights,
                   SITES,
    skip_tag, VLoRA, VLoRAConfig)

VISION = VisionConfig(image_size=28, patch=14, width=12, depth=1, heads=2, hidden=20)
LLAMA = LlamaConfig(width=32, depth=5, heads=4, kv_heads=4, hidden=48, vocab=64, context=64)
SMALL = GeneratorConfig(every=2, rank=3, embed=16, depth=2, heads=4)


# ---- Small models


def small_vlora(cfg=SMALL, dtype=torch.float64):
    """A VLoRA in which attention is far from uniform; its generators are as at the start."""
    torch.manual_seed(0)
    model = VLoRA(VLoRAConfig(VISION, LLAMA, vlora=cfg)).to(dtype)
    for block in model.llm.layers:
        for part in block.self_attn.children():
            nn.init.normal_(part.weight, std=(2 / part.in_features) ** 0.5)
    return model


def run(model, x, deltas=None, tag=None):
    """Logits float[B, T, V] of the Llama of a VLoRA on embeddings x, with these deltas; None:
    plain.
    """
    B, T, _ = x.shape
    changed = {n for n, delta in enumerate(deltas or []) if delta}
    assert changed <= set(model.cfg.vlora.blocks(model.cfg.llm)), "deltas of another config"
    model.set_deltas(deltas, tag)
    ids = torch.zeros(B, T, dtype=torch.int64)  # only their shape matters
    return model.llm.head(model.llm(x, Batch(ids, torch.full((B,), T))))


def generators(cfg=SMALL, dtype=torch.float64, llm=LLAMA):
    torch.manual_seed(1)
    return PerceptualWeights(cfg, VISION, llm).to(dtype)


def random_up(part):
    """The same with a random W_s: branches add as much as the weights beside them."""
    torch.manual_seed(2)
    nn.init.normal_(part.Bs, std=0.2)
    return part


def features(n, dtype=torch.float64, seed=3):
    return torch.randn(n, VISION.tokens, VISION.width,
                       generator=torch.Generator().manual_seed(seed)).to(dtype)


def prompts(model, rows, T=9, same=False):
    """Embeddings float[rows, T, D] of random tokens; `same`: the same ones in all rows."""
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(0, LLAMA.vocab, (1 if same else rows, T), generator=generator)
    return model.llm.embed_tokens(ids.expand(rows, -1)).detach()


def close(a, b, tolerance):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


# ---- A reference: the authors' modules, with their names, shapes and order of operations


class TheirBlock(nn.Module):
    def __init__(self, E, heads):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(E, heads, batch_first=True)
        self.multihead_attn = nn.MultiheadAttention(E, heads, batch_first=True)
        self.linear1, self.linear2 = nn.Linear(E, 4 * E), nn.Linear(4 * E, E)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(E), nn.LayerNorm(E), nn.LayerNorm(E)

    def forward(self, x, z):
        y = self.norm1(x)
        x = x + self.self_attn(y, y, y, need_weights=False)[0]
        x = x + self.multihead_attn(self.norm2(x), z, z, need_weights=False)[0]
        return x + self.linear2(F.gelu(self.linear1(self.norm3(x))))


class TheirGenerator(nn.Module):
    def __init__(self, E, depth, heads, queries, out):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, queries, E))
        self.decoders = nn.ModuleList(TheirBlock(E, heads) for _ in range(depth))
        self.norm, self.weights_head = nn.LayerNorm(E), nn.Linear(E, out)

    def forward(self, z):
        x = self.queries.expand(len(z), -1, -1)
        for block in self.decoders:
            x = block(x, z)
        return self.weights_head(self.norm(x))


class Theirs(nn.Module):
    """float[M, N, C] -> A float[M, sites * Q, D * R]; Bs alike, with M = 1."""

    def __init__(self, cfg, vision, llm):
        super().__init__()
        self.cfg, self.llm, queries = cfg, llm, llm.depth // cfg.every
        self.visual_proj = nn.Linear(vision.width, cfg.embed)
        self.pos_embed = nn.Parameter(torch.randn(1, vision.tokens, cfg.embed))
        self.gen = nn.ModuleList(TheirGenerator(cfg.embed, cfg.depth, cfg.heads, queries,
                                                llm.width * cfg.rank)
                                 for _ in cfg.sites)
        self.Bs = nn.Parameter(torch.randn(1, len(cfg.sites) * queries, llm.width * cfg.rank))

    def forward(self, f):
        z = self.visual_proj(f) + self.pos_embed
        return torch.cat([g(z) for g in self.gen], dim=1)


def published(theirs):
    return {f"model.mm_projector.{name}": tensor for name, tensor in theirs.state_dict().items()}


def in_a_model(part):
    """The module where the rules put it."""
    shell = nn.Module()
    shell.perceptual = part
    return shell


def loaded(state, folder):
    save_file(state, folder / "model.safetensors")
    with torch.device("meta"), weights.SkipInit():
        shell = in_a_model(PerceptualWeights(SMALL, VISION, LLAMA))
    weights.fill(shell, [(str(folder), vlora_rules())])
    return shell.perceptual


def test_each_of_the_749_published_tensors_has_its_place_and_no_place_is_left():
    with torch.device("meta"):
        theirs = published(Theirs(GeneratorConfig(), VisionConfig(), LlamaConfig()))
        ours = in_a_model(PerceptualWeights(GeneratorConfig(), VisionConfig(),
                                            LlamaConfig())).state_dict()
    norms, attention = ["weight", "bias"], ["in_proj_weight", "in_proj_bias", "out_proj.weight",
                                            "out_proj.bias"]
    block = [f"{a}.{p}" for a in ("self_attn", "multihead_attn") for p in attention]
    block += [f"{m}.{p}" for m in ("linear1", "linear2", "norm1", "norm2", "norm3") for p in norms]
    one = ["queries", "norm.weight", "norm.bias", "weights_head.weight", "weights_head.bias"]
    one += [f"decoders.{i}.{name}" for i in range(8) for name in block]
    names = ["visual_proj.weight", "visual_proj.bias", "pos_embed", "Bs"]
    names += [f"gen.{g}.{name}" for g in range(5) for name in one]
    assert len(names) == 749 and set(theirs) == {f"model.mm_projector.{n}" for n in names}
    mapped = {formats.name_rules.rename(name, vlora_rules()): tensor.shape for name,
              tensor in theirs.items()}
    assert len(mapped) == 749 and mapped == {name: tensor.shape for name, tensor in ours.items()}
    shapes = {"Bs": (1, 40, 262144), "pos_embed": (1, 576, 512), "visual_proj.weight": (512, 1024),
              "gen.4.queries": (1, 8, 512), "gen.0.weights_head.weight": (262144, 512),
              "gen.2.decoders.7.self_attn.in_proj.weight": (1536, 512),
              "gen.2.decoders.7.linear1.weight": (2048, 512)}
    assert all(mapped[f"perceptual.{name}"] == shape for name, shape in shapes.items())


def test_the_rules_leave_the_llama_and_the_tower_to_others():
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight",
                 "model.vision_tower.vision_tower.x"):
        assert formats.name_rules.rename(name, vlora_rules()) is None


def test_a_published_generator_makes_the_authors_weights_in_their_layout(tmp_path):
    torch.manual_seed(0)
    theirs = Theirs(SMALL, VISION, LLAMA).double()
    for p in theirs.parameters():  # biases and norms too
        nn.init.normal_(p, std=0.5)
    part, f = loaded(published(theirs), tmp_path), features(2)
    A = theirs(f).detach().view(2, 5, 2, 32, 3)  # (M, sites, Q, D, R)
    B = theirs.Bs.detach().view(5, 2, 32, 3)
    deltas = part(f, torch.arange(2))
    assert [n for n, delta in enumerate(deltas) if delta] == [1, 3]
    for slot, n in enumerate((1, 3)):
        assert list(deltas[n]) == list(SITES)
        for s, site in enumerate(SITES):
            down, up = deltas[n][site]
            assert close(down, A[:, s, slot], 1e-12) and torch.equal(up, B[s, slot].T)


def test_loading_is_strict(tmp_path):
    state = published(Theirs(SMALL, VISION, LLAMA))
    loaded(state, tmp_path)
    name = "model.mm_projector.gen.1.decoders.0.self_attn.in_proj_bias"
    words = r"no tensor for perceptual\.gen\.1\.decoders\.0\.self_attn\.in_proj\.bias"
    with pytest.raises(UserError, match=words):
        loaded({k: v for k, v in state.items() if k != name}, tmp_path)
    with pytest.raises(UserError, match="has no place in the model"):
        loaded({**state, "model.mm_projector.gen.5.queries": torch.zeros(1, 2, 16)}, tmp_path)
    with pytest.raises(UserError, match=r"pos_embed is \[1, 9, 16\]"):
        loaded({**state, "model.mm_projector.pos_embed": torch.zeros(1, 9, 16)}, tmp_path)


# ---- Sizes and first values


def test_the_full_generator_has_as_many_parameters_as_the_authors():
    with torch.device("meta"):
        part = PerceptualWeights(GeneratorConfig(), VisionConfig(), LlamaConfig())
        decoder = Decoder(GeneratorConfig())
    assert size(decoder) == 4_204_032 and size(part) == 851_891_712
    assert size(part.gen[0]) == 168_117_248 and size(part.gen[0].weights_head) == 134_479_872
    assert size(part.visual_proj) + part.pos_embed.numel() == 819_712
    assert part.Bs.numel() == 10_485_760
    assert list(part.blocks) == [3, 7, 11, 15, 19, 23, 27, 31]


@pytest.mark.parametrize("cfg", [SMALL, GeneratorConfig("qkm", 1, 2, 8, 3, 2),
                                 GeneratorConfig("o", 5, 7, 24, 1, 8)],
                         ids=lambda c: c.sites)
def test_the_number_of_parameters_follows_from_the_choices(cfg):
    E, Q, D, R, F_ = cfg.embed, 5 // cfg.every, 32, cfg.rank, 4 * cfg.embed
    decoder = 2 * (4 * E * E + 4 * E) + 2 * E * F_ + F_ + E + 6 * E
    one = Q * E + cfg.depth * decoder + 2 * E + (E + 1) * D * R
    shared = (VISION.width + 1) * E + VISION.tokens * E
    assert size(generators(cfg)) == shared + len(cfg.sites) * (one + Q * D * R)


def test_every_parameter_is_given_its_first_value():
    part = generators()
    with torch.no_grad():
        for p in part.parameters():
            p.fill_(float("nan"))
    part.reset_parameters()
    assert all(p.isfinite().all() for p in part.parameters()) and not part.Bs.any()


@pytest.mark.parametrize("embed, std", [(512, 0.02), (128, 0.04), (1024, 0.02)])
def test_first_values_are_the_authors_at_their_widths_and_as_large_in_effect_at_smaller_ones(
    embed, std):
    part = generators(GeneratorConfig("m", every=5, rank=8, embed=embed, depth=1, heads=16),
                      torch.float32)
    g = part.gen[0]
    block = g.decoders[0]
    for linear in (part.visual_proj, g.weights_head, block.linear1, block.multihead_attn.out_proj):
        assert 0.95 * std < linear.weight.std() < 1.05 * std and not linear.bias.any()
    bound = (6 / (4 * embed)) ** 0.5  # Xavier's, for one matrix of E x 3E
    for attention in (block.self_attn, block.multihead_attn):
        assert 0.95 * bound < attention.in_proj.weight.abs().max() <= bound
        assert not attention.in_proj.bias.any()
    assert 0.8 < g.queries.std() < 1.2 and 0.9 < part.pos_embed.std() < 1.1 and not part.Bs.any()
    # W_v
    assert 0.88 < g(torch.randn(1, 4, embed), torch.tensor([0])).std() / (std * embed ** 0.5) < 1.1


def test_a_generator_built_without_storage_starts_as_one_built_with_it():
    with torch.device("meta"), weights.SkipInit():
        shell = in_a_model(PerceptualWeights(SMALL, VISION, LLAMA))
    weights.initialise(shell, seed=0)
    assert all(p.isfinite().all() and p.device.type == "cpu" for p in shell.parameters())
    built = in_a_model(generators(dtype=torch.float32))
    # drawn alike, from another seed
    for p, q in zip(shell.parameters(), built.parameters(), strict=True):
        assert p.shape == q.shape and 0.5 * q.norm() <= p.norm() <= 2 * q.norm()


# ---- What is refused


def test_a_grouped_query_llama_is_refused_with_the_reason():
    grouped = LlamaConfig(width=32, depth=4, heads=4, kv_heads=2, hidden=48, vocab=64)
    with pytest.raises(UserError,
                       match="keys and values are as wide as its states.*kv_heads 2, heads 4"):
        PerceptualWeights(SMALL, VISION, grouped)


@pytest.mark.parametrize("bad, says", [
    (dict(sites="qx"), "sites 'qx'"), (dict(sites="qq"), "each once"), (dict(sites=""), "sites ''"),
    (dict(embed=10, heads=4), "embed 10 does not divide by heads 4"), (dict(rank=0), "rank 0"),
    (dict(every=0), "every 0"),
])
def test_a_choice_that_makes_no_sense_is_refused(bad, says):
    with pytest.raises(UserError, match=says):
        GeneratorConfig(**bad)


def test_a_llama_with_too_few_blocks_is_refused():
    with pytest.raises(UserError, match="only 5 blocks"):
        PerceptualWeights(GeneratorConfig(every=6, embed=16), VISION, LLAMA)


@pytest.mark.parametrize("every, depth, blocks",
                         [(4, 32, [3, 7, 11, 15, 19, 23, 27, 31]), (4, 6, [3]), (2, 5, [1, 3]),
                                                  (1, 3, [0, 1, 2]), (3, 3, [2])])
def test_the_last_of_every_so_many_blocks_is_changed(every, depth, blocks):
    assert list(GeneratorConfig(every=every).blocks(LlamaConfig(depth=depth))) == blocks


# ---- The start


def test_at_the_start_the_model_is_the_plain_llama_bit_for_bit():
    model, f = small_vlora(dtype=torch.float32), features(2, torch.float32)
    x = prompts(model, 3)
    expected = run(model, x)
    deltas = generators(dtype=torch.float32)(f, torch.tensor([0, 1, -1]))
    assert deltas[1]["q"][0].any()
    assert torch.equal(run(model, x, deltas), expected)


def gradients(part, model):
    part.zero_grad()
    logits = run(model, prompts(model, 2), part(features(2), torch.arange(2)))
    F.cross_entropy(logits.flatten(0, 1),
                    torch.arange(logits.shape[0] * logits.shape[1]) % LLAMA.vocab).backward()
    return {name: p.grad.abs().max().item() for name, p in part.named_parameters()}


def test_at_the_start_only_W_s_learns_and_one_step_later_all_of_the_generator_does():
    part, model = generators(), small_vlora()
    first = gradients(part, model)
    assert first.pop("Bs") > 0 and not any(first.values())
    assert (part.Bs.grad.view(5, 2, -1).abs().amax(-1) > 0).all()  # of each site in each block
    torch.optim.SGD(part.parameters(), lr=1.0).step()
    then = gradients(part, model)
    assert len(then) == len(dict(part.named_parameters())) and min(then.values()) > 0
    # in_proj holds three matrices. A bias of keys shifts all scores equally, which changes nothing.
    for generator in part.gen:
        for block in generator.decoders:
            for attention in (block.self_attn, block.multihead_attn):
                assert all(g.any() for g in attention.in_proj.weight.grad.chunk(3))


def test_a_frozen_llama_learns_to_say_which_picture_it_is_shown():
    model = small_vlora(dtype=torch.float32).requires_grad_(False)
    part, f, picture = generators(dtype=torch.float32), features(6, torch.float32), torch.arange(6)
    x, optimiser = prompts(model, 6, same=True), torch.optim.AdamW(part.parameters(), lr=5e-3)
    for _ in range(25):
        logits = run(model, x, part(f, picture))[:, -1]
        optimiser.zero_grad()
        F.cross_entropy(logits, picture).backward()
        optimiser.step()
    assert torch.equal(logits.argmax(-1), picture)


# ---- The product x W' + (x W_v) W_s


def test_a_branch_is_the_explicit_product_with_W_plus_the_change():
    part = random_up(generators(dtype=torch.float32))
    deltas = part(features(3, torch.float32), torch.tensor([2, 0, -1, 2]))
    linear, x = DeltaLinear(32, 32, bias=False), torch.randn(4, 7, 32)
    plain = linear(x)
    for n in (1, 3):
        for site in SITES:
            down, up = linear.delta = deltas[n][site]
            change = torch.stack([w @ up for w in down])  # ΔW, D x D for each row
            explicit = plain + torch.stack([row @ w for row, w in zip(x, change)])
            assert close(linear(x), explicit, 1e-5) and torch.equal(linear(x),
                                                                    add_delta(plain, x, down, up))
            assert not close(plain, explicit, 1e-2)
            assert all(torch.linalg.matrix_rank(w) == 3
                       for w in change[[0, 1, 3]]) and not change[2].any()
            assert not close(x @ change.mT, x @ change, 1e-2)  # nor would its transpose do


def test_a_site_that_is_not_chosen_is_left_alone():
    cfg = GeneratorConfig("qm", 2, 3, 16, 2, 4)
    deltas = random_up(generators(cfg))(features(1), torch.tensor([0]))
    model, x = small_vlora(cfg), torch.randn(1, 7, 32).double()
    assert [sorted(d) for d in deltas] == [[], ["m", "q"], [], ["m", "q"], []]
    model.set_deltas(deltas, None)
    for n, name, same in ((1, "k_proj", True), (0, "q_proj", True), (1, "q_proj", False)):
        linear = getattr(model.llm.layers[n].self_attn, name)
        assert torch.equal(linear(x), F.linear(x, linear.weight)) == same


def test_the_ffns_change_leads_around_the_whole_ffn():
    cfg = GeneratorConfig("m", 5, 3, 16, 1, 4)  # only in the last block
    model = small_vlora(cfg)
    deltas, x = random_up(generators(cfg))(features(1), torch.tensor([0])), prompts(model, 1)
    seen = {}
    last = model.llm.layers[-1]
    hook = last.post_attention_layernorm.register_forward_hook(lambda module, args,
                                                               out: seen.update(y=out, h=args[0]))
    run(model, x)
    hook.remove()
    y, (down, up) = seen["y"], deltas[4]["m"]
    state = seen["h"] + last.mlp.down_proj(
        F.silu(last.mlp.gate_proj(y)) * last.mlp.up_proj(y)) + y @ down[0] @ up
    assert close(run(model, x, deltas), model.llm.head(model.llm.norm(state)), 1e-12)


# ---- Rows


def test_a_row_of_text_alone_is_the_plain_llamas_bit_for_bit():
    model, part = small_vlora(dtype=torch.float32), random_up(generators(dtype=torch.float32))
    x, f = prompts(model, 3), features(1, torch.float32)
    expected = run(model, x)
    deltas = part(f, torch.tensor([-1, 0, -1]))
    found = run(model, x, deltas)
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and not close(found[1], expected[1], 1e-2)
    found[[0, 2]].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in part.parameters())


def test_a_batch_of_text_alone_touches_every_parameter_and_moves_none():
    model, part = small_vlora(), random_up(generators())
    run(model, prompts(model, 2),
        part(torch.zeros_like(features(1)), torch.tensor([-1, -1]))).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


def test_other_pictures_make_other_weights_and_other_answers():
    model, part = small_vlora(), random_up(generators())
    deltas = part(features(2), torch.arange(2))
    for n in (1, 3):
        for site in SITES:
            assert not close(deltas[n][site][0][0], deltas[n][site][0][1], 1e-2)
    factors = torch.stack([deltas[n][site][0][0] for n in (1, 3) for site in SITES])
    assert torch.pdist(factors.flatten(1)).min() > 0.1  # nor are those of two sites or blocks alike
    logits = run(model, prompts(model, 2, same=True), deltas)
    assert not close(logits[0], logits[1], 1e-2)


def test_a_row_does_not_know_its_batch_mates():
    model, part = small_vlora(), random_up(generators())
    f, x, picture = features(3), prompts(model, 5), torch.tensor([1, -1, 0, 2, 1])
    logits = run(model, x, part(f, picture))
    order = torch.tensor([3, 0, 4, 2, 1])
    assert close(run(model, x[order], part(f, picture[order])), logits[order], 1e-12)
    shuffled = torch.tensor([2, 0, 1])  # f[shuffled][i] is picture shuffled[i]
    where = torch.cat([shuffled.argsort(), torch.tensor([-1])])
    assert close(run(model, x, part(f[shuffled], where[picture])), logits, 1e-12)
    for b, m in enumerate(picture.tolist()):
        alone = part(f[[max(m, 0)]], torch.tensor([min(m, 0)]))
        assert close(run(model, x[[b]], alone), logits[[b]], 1e-12)


def test_no_position_knows_what_comes_after_it():
    model, deltas = small_vlora(), random_up(generators())(features(2), torch.arange(2))
    x = prompts(model, 2).requires_grad_()
    for i in range(x.shape[1]):
        gradient, = torch.autograd.grad(run(model, x, deltas)[:, i].sum(), x)
        assert not gradient[:, i + 1:].any() and gradient[:, :i + 1].abs().amax(-1).min() > 0


# ---- Merged


@pytest.mark.parametrize("sites", [SITES, "qkvo", "qko", "m"])
def test_merged_weights_answer_as_branches_do(sites):
    model = small_vlora(dtype=torch.float32)
    part = random_up(generators(GeneratorConfig(sites, 2, 3, 16, 2, 4), torch.float32))
    x, f = prompts(model, 3), features(1, torch.float32)
    with torch.no_grad():
        plain = run(model, x)
        branches = run(model, x, part(f, torch.zeros(3, dtype=torch.int64)))
        with merged(model.llm.layers, part(f, torch.tensor([0]))) as rest:
            assert all(set(delta) <= {"m"} for delta in rest)
            found = run(model, x, rest)
    assert close(found, branches, 1e-5) and not close(plain, branches, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_merging_the_llama_is_what_it_was_bit_for_bit_even_after_an_error(dtype):
    model, deltas = small_vlora(dtype=dtype), random_up(generators(dtype=dtype))(features(1, dtype),
                                                                                 torch.tensor([0]))
    before = dict(model.llm.named_parameters())
    bits = {name: p.detach().clone() for name, p in before.items()}
    with pytest.raises(KeyboardInterrupt), merged(model.llm.layers, deltas):
        changed = {name for name, p in model.llm.named_parameters()
                   if not torch.equal(p, bits[name])}
        assert changed == {f"layers.{n}.self_attn.{site}_proj.weight" for n in (1, 3)
                           for site in "qkvo"}
        assert all(p.dtype == dtype for p in model.llm.parameters())
        raise KeyboardInterrupt
    after = dict(model.llm.named_parameters())
    assert all(after[name] is p and torch.equal(p, bits[name]) and p.requires_grad for name,
               p in before.items())


def test_a_change_is_added_in_fp32_and_rounded_once():
    model, part = small_vlora(dtype=torch.bfloat16), random_up(generators(dtype=torch.bfloat16))
    deltas = part(features(1, torch.bfloat16), torch.tensor([0]))
    own, (down, up) = model.llm.layers[1].self_attn.v_proj.weight.detach(), deltas[1]["v"]
    exact = own.double() + (down[0].double() @ up.double()).T
    with merged(model.llm.layers, deltas):
        assert torch.equal(model.llm.layers[1].self_attn.v_proj.weight, exact.float().bfloat16())


def test_the_pictures_of_two_rows_are_not_merged_into_one_llama():
    model, deltas = small_vlora(), random_up(generators())(features(2), torch.arange(2))
    with pytest.raises(AssertionError, match="2 rows"), merged(model.llm.layers, deltas):
        pass


# ---- Decoding, and the published checkpoint's positions


@pytest.mark.parametrize("tag", [None, torch.tensor([1, -1, 3])], ids=["ours", "published"])
def test_cached_decoding_equals_one_pass(tag):
    model = small_vlora(dataclasses.replace(SMALL, tag=True))
    random_up(model.perceptual)
    ids = torch.randint(0, LLAMA.vocab, (3, 9), generator=torch.Generator().manual_seed(4))
    seen = dict(visual=features(2), picture=torch.tensor([1, -1, 0]), tag=tag)
    whole = model(Batch(ids, torch.full((3,), 9), **seen))
    cache = model.new_cache(3, "cpu", torch.float64)
    cache.reserve(9)
    steps = [model(Batch(ids[:, a:b], torch.full((3,), b - a), **({} if a else seen)), cache)
             for a, b in [(0, 5), (5, 6), (6, 9)]]  # later ones take what the cache holds
    assert close(torch.cat(steps, dim=1), whole, 1e-12)
    plain = without_pictures(model, Batch(ids, torch.full((3,), 9)))
    assert close(whole[1], plain[1], 1e-12) and not close(whole[[0, 2]], plain[[0, 2]], 1e-2)


def test_without_the_hidden_token_the_others_keep_the_positions_they_were_trained_with():
    model = small_vlora(dataclasses.replace(SMALL, tag=True))
    theirs = LlamaForCausalLM(HFLlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5,
        num_attention_heads=4,
        rms_norm_eps=LLAMA.eps, attn_implementation="eager")).double().eval()
    names = {k if k == "lm_head.weight" else f"model.{k}": v for k,
             v in model.llm.state_dict().items()}
    theirs.load_state_dict(names)
    ids = torch.randint(1, 64, (2, 10), generator=torch.Generator().manual_seed(5))
    tags, mask = torch.tensor([1, 6]), torch.ones(2, 10, dtype=torch.int64)
    # the authors put <unk> there, and no token attends to it
    ids[[0, 1], tags], mask[[0, 1], tags] = 0, 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask,
                          position_ids=torch.arange(10)[None].expand(2, -1)).logits
        there = mask.bool()
        x = model.llm.embed_tokens(ids[there].view(2, 9))
        assert close(run(model, x, [{}] * 5, tags), expected[there].view(2, 9, -1), 1e-6)
        assert not close(run(model, x, [{}] * 5), expected[there].view(2, 9, -1), 1e-3)


def test_skip_tag_moves_what_follows_the_tag_by_one():
    positions = torch.arange(5)[None]
    assert skip_tag(positions, torch.tensor([2, 0, -1, 5])).tolist() == [
        [0, 1, 3, 4, 5], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert skip_tag(torch.tensor([[7], [1]]), torch.tensor([2, 2])).tolist() == [[8], [1]]


# ---- costs.py


def test_the_papers_figures():
    found = {name: round(count, 1) for name, count in paper_flops().items()}
    assert found == {"text": 412.9, "table": 619.0, "merged": 620.6, "branches": 670.6,
                     "llava": 8027.8}
    for visual, figure in [(32, 827), (256, 3754), (576, 8027)]:  # other rows of its Table 1
        assert int(paper_flops(visual=visual)["llava"] + 0.5 * (visual == 32)) == figure


def test_a_generator_at_full_size_costs_38_gflops_a_picture():
    count = forward_flops(VLoRAConfig(), 32)
    assert round(count["generator"] / 1e9, 1) == 38.2 and round(count["branches"] / 32e6, 1) == 41.9


@pytest.mark.parametrize("llm, experts, turns, at", [
    (GROUPED, dict(visual_expert="none", language_expert="none"), 1, None),
    (EVEN, dict(visual_expert="none", language_expert="none"), 1, 3),
    (GROUPED, dict(), 1, None), (EVEN, dict(visual_expert="both", language_expert="all"), 3, 5),
    (GROUPED, dict(visual_expert="2", language_expert="anterior"), 2, 1),
    (GROUPED, dict(visual_expert="none", guidance_after=3), 2, None),
], ids=["LLaVA", "LLaVA, tied", "paper's", "all, 3 turns", "anterior", "block 3"])
def test_the_count_for_llava_and_hyperllava_is_what_torch_counts(llm, experts, turns, at):
    cfg = VLMConfig(TOWER, llm, **{"expert_embed": 12, "expert_rank": 5, **experts})
    vlm, text, B = VLM(cfg), 9, 2
    batch = row_of_text(cfg, text, B, turns, None if at is None else at * B)
    found = count_flops(lambda: vlm(batch), vlm)
    parts = forward_flops(cfg, text, turns, at)
    assert sum(found["Global"].values()) == B * sum(parts.values())
    assert sum(found["VLM.vision"].values()) == B * parts["vision"]
    if experts == dict(visual_expert="none", language_expert="none"):
        assert sum(found["VLM.projector"].values()) == B * parts["projector"] and not parts[
            "experts"]


@pytest.mark.parametrize("vlora",
                         [SMALL, GeneratorConfig("qkm", 1, 8, 32, 3, 2),
                          GeneratorConfig("o", 3, 2, 48, 1, 8)],
                         ids=lambda v: v.sites)
def test_the_count_for_vlora_is_what_torch_counts(vlora):
    cfg, text, B = VLoRAConfig(TOWER, EVEN, vlora=vlora), 9, 2
    model, batch = VLoRA(cfg), row_of_text(cfg, text, B)
    found = count_flops(lambda: model(batch), model)
    parts = forward_flops(cfg, text)
    assert sum(found["Global"].values()) == B * sum(parts.values())
    assert sum(found["VLoRA.perceptual"].values()) == B * parts["generator"]


@pytest.mark.parametrize("llm, options", [
    (GROUPED, dict(visual_expert="none", language_expert="none")), (GROUPED, dict()),
    (EVEN, dict(language_expert="all", guidance_after=0)),
    (GROUPED, dict(weight_source="static")), (GROUPED, dict(weight_source="latent")),
    (GROUPED, dict(weight_source="mlp")), (GROUPED, dict(weight_source="gates")),
    (GROUPED, dict(visual_expert="none", weight_source="lora")),
    (EVEN, dict(visual_expert="none", language_expert="none", vlora=SMALL)),
], ids=["LLaVA", "paper's", "all", "static", "latent", "mlp", "gates", "lora", "VLoRA"])
def test_the_count_of_a_further_token_is_what_torch_counts(llm, options):
    cfg = weights.make_config(TOWER, llm, **{"expert_embed": 12, "expert_rank": 5, **options})
    model, ids = weights.MODELS[type(cfg)](cfg), np.array([IMAGE] * cfg.image_tokens + [1] * 9)
    prompt = data.Sample(ids, ids, 0 * ids, 0 * ids, 1, "picture", "record", 0)
    batch = sample.make_batch([prompt], [torch.randn(TOWER.tokens, TOWER.width)], model)
    found, length = [], len(ids) + 2
    for tokens in (1, 2):
        cache = model.new_cache(1, "cpu", torch.float32)
        cache.reserve(length)
        found.append(count_flops(lambda: list(stream(model, batch, tokens, -1, cache=cache)),
                                 model))
    one, two = (sum(counts["Global"].values()) for counts in found)
    assert two - one == token_flops(cfg, len(ids) + 1)


# ---- The whole model: collate, forward, chat, generate

TEXT = LlamaConfig(width=32, depth=4, heads=4, kv_heads=4, hidden=48, vocab=TOKENIZER.vocab,
                   context=200)
PLACES = PromptFormat(system="A chat.", image_tokens=0, context=200)


def vlm(dtype=torch.float64, start=False, **changes):
    """A VLoRA in which attention is far from uniform and pictures matter; with `start` not yet."""
    torch.manual_seed(0)
    whole = VLoRA(VLoRAConfig(VISION, TEXT, vlora=dataclasses.replace(SMALL, **changes))).to(
        dtype).eval()
    for block in [*whole.vision.layers, *whole.llm.layers]:
        for part in block.self_attn.children():
            nn.init.normal_(part.weight, std=(2 / part.in_features) ** 0.5)
    nn.init.normal_(whole.perceptual.visual_proj.weight, std=1.0)
    if not start:
        random_up(whole.perceptual)
    return whole


def answer(whole, batch, **changes):
    """Logits float[B, T, V] of a batch, as training runs it."""
    return logits_of(whole, dataclasses.replace(batch, **changes))


def talked(dtype=torch.float64):
    """Three turns about one picture, two turns of text only, one turn about another picture."""
    return batch_of(conversations(PLACES), pictures(2, dtype), dtype)


def without_pictures(whole, batch):
    """Logits of its Llama without any change."""
    whole.set_deltas(None, None)
    return whole.llm.head(whole.llm(whole.llm.embed_tokens(batch.ids), batch))


def test_a_picture_takes_no_position_and_each_row_knows_its_own():
    samples, longer = conversations(PLACES), conversations(
        dataclasses.replace(PLACES, image_tokens=4))
    batch = batch_of(samples, pictures(2))
    assert batch.picture.tolist() == [0, -1, 1] and (batch.ids >= 0).all()
    for short, long, tag in zip(samples, longer, batch.tag.tolist()):
        assert short.ids.tolist() == long.ids[long.ids != IMAGE].tolist()
        assert short.labels[short.labels != IGNORE].tolist() == long.labels[long.labels
                                                                            != IGNORE].tolist()
        places = (long.ids == IMAGE).nonzero()[0]
        assert tag == (places[0] if len(places) else -1)
    turn = samples[0].tag
    assert TOKENIZER.decode(samples[0].ids[:turn]) == "A chat. USER: "


def test_a_picture_beyond_the_context_is_not_shown():
    turns = [("Is there a square?", "yes."), ("<image>\nHow many?", "two.")]
    whole = encode(turns, TOKENIZER, PLACES, "r", "x")
    for context, shown in ((whole.tag, False), (whole.tag + 1, True)):
        sample = encode(turns, TOKENIZER, dataclasses.replace(PLACES, context=context), "r", "x")
        assert (sample.image is not None) == shown == (sample.tag
                                                       >= 0) and len(sample.ids) == context


def test_at_the_start_a_vlora_is_its_llama_bit_for_bit():
    whole, batch = vlm(torch.float32, start=True), talked(torch.float32)
    assert torch.equal(answer(whole, batch), without_pictures(whole, batch))


def test_the_first_step_of_stage_1_moves_W_s_alone_and_the_second_all_of_the_generator():
    whole, batch = vlm(torch.float32, start=True), talked(torch.float32)
    train.freeze(whole, train.TRAINS[1, "full"])
    moving = []
    for _ in range(2):
        whole.zero_grad()
        whole.loss(batch).backward()
        moving.append({name for name, p in whole.named_parameters()
                       if p.grad is not None and p.grad.any()})
        torch.optim.SGD(whole.perceptual.parameters(), lr=0.1).step()
    assert moving[0] == {"perceptual.Bs"}
    assert moving[1] == {f"perceptual.{n}" for n, _ in whole.perceptual.named_parameters()}


def test_text_alone_is_the_llamas_and_other_pictures_make_other_answers_to_one_prompt():
    whole, batch = vlm(), talked()
    logits, plain = answer(whole, batch), without_pictures(whole, batch)
    assert torch.equal(logits[1], plain[1])
    assert all(not close(logits[b], plain[b], 1e-2) for b in (0, 2))
    one = encode_prompt([], "How many?", TOKENIZER, PLACES, "x")
    a, b = answer(whole, batch_of([one, one], pictures(2)))
    assert not close(a, b, 1e-2)


def test_a_row_of_a_vlora_depends_neither_on_its_batch_mates_nor_on_their_order():
    whole, samples, seen = vlm(), conversations(PLACES), dict(zip(("a.png", "b.png"), pictures(2)))
    full = answer(whole, talked())
    for order in ((0,), (1,), (2,), (2, 0, 1), (1, 2), (0, 0, 2)):
        some = [samples[i] for i in order]
        found = answer(whole, batch_of(some, [seen[s.image] for s in some if s.image]))
        for row, s, i in zip(found, some, order):
            assert close(row[:len(s.ids)], full[i, :len(s.ids)], 1e-12)


def test_no_trained_position_knows_what_comes_after_it():
    whole, batch = vlm(), talked()
    x = whole.llm.embed_tokens(batch.ids).detach().requires_grad_()
    whole.set_deltas(whole.image_weights(batch.visual, batch.picture), batch.tag)
    logits = whole.llm.head(whole.llm(x, batch))
    for p in batch.at[::5].tolist():
        b, i = divmod(p, batch.ids.shape[1])
        gradient, = torch.autograd.grad(logits[b, i].sum(), x, retain_graph=True)
        assert not gradient[b, i + 1:].any() and gradient[b, :i + 1].any() and not gradient[
            :b].any()


def checkpoint_of(whole):
    return weights.Checkpoint(whole, TOKENIZER, Preprocess(28), "A chat.", {})


@pytest.mark.parametrize("tag", [False, True], ids=["ours", "published"])
@pytest.mark.parametrize("merge", [False, True], ids=["branches", "merged"])
@torch.no_grad()
def test_a_chat_equals_the_whole_conversation_turn_by_turn(merge, tag):
    checkpoint, image = checkpoint_of(vlm(torch.float32, tag=tag)), noise(0)
    before = {name: p.clone() for name, p in checkpoint.model.named_parameters()}
    chat, found, costs = Chat(checkpoint, image, sample.Options(merge=merge)), [], []
    for turn, (question, said) in enumerate(TURNS):
        with counted(checkpoint.model) as count:
            found.append(ask_dictated(chat, question, TOKENIZER.encode(said), cut=turn == 1))
        costs.append(dict(count))
    whole = encode(TURNS, TOKENIZER, checkpoint.prompt_format(), "whole", "x.png")
    batch = batch_of([whole], [look(image)], torch.float32)
    full = answer(checkpoint.model, batch)[0]
    assert chat.ids == whole.ids.tolist() and (whole.ids >= 0).all()
    for (_, own), logits, cut in zip(segments(whole), found, (0, 1, 0)):
        assert close(logits, full[own.start - 1:own.stop - 1 - cut], 1e-5)
    assert sum(c["tokens"] for c in costs) == len(whole.ids) - 1
    assert [c.get("pictures", 0) for c in costs] == [1, 0, 0]  # the tower sees the picture once
    others = {"another picture": batch_of([whole], [look(noise(1))], torch.float32),
              "positions counted otherwise": dataclasses.replace(batch, tag=batch.tag + 40)}
    for name, other in others.items():
        same = close(answer(checkpoint.model, other)[0], full, 1e-3)
        assert same == (name.startswith("positions") and not tag), name
    assert all(torch.equal(p, before[name]) for name, p in checkpoint.model.named_parameters())


def test_a_batch_answers_as_each_of_its_rows_does_alone_and_as_a_merged_chat_does():
    checkpoint = checkpoint_of(vlm(torch.float32))
    o, images = sample.Options(max_new_tokens=12), [noise(0), None, noise(1)]
    asked = ["How many?", "Is there a square?", "How many?"]
    samples = [encode_prompt([], q, TOKENIZER, checkpoint.prompt_format(), i and "x") for q,
               i in zip(asked, images)]
    visual = [look(i) for i in images if i]
    batch = sample.make_batch(samples, visual, checkpoint.model)
    texts = [TOKENIZER.decode(ids) for ids in generate(checkpoint.model, batch, 12, TOKENIZER.eos)]
    assert len(set(texts)) == 3
    for merge in (True, False):
        o.merge = merge
        assert ["".join(Chat(checkpoint, i, o).ask(q)) for q, i in zip(asked, images)] == texts


@pytest.mark.parametrize("end", ["whole", "closed", "stopped"])
def test_after_a_merged_answer_the_llama_is_what_it_was_however_it_ended(end):
    checkpoint = checkpoint_of(vlm(torch.float32))
    before = dict(checkpoint.model.named_parameters())
    bits = {name: p.detach().clone() for name, p in before.items()}
    chat, during = Chat(checkpoint, noise(0), sample.Options(max_new_tokens=5, merge=True)), set()
    pieces = chat.ask("How many?")
    with contextlib.suppress(KeyboardInterrupt):
        for i, _ in enumerate(pieces):
            during |= {name for name, p in checkpoint.model.named_parameters()
                       if not torch.equal(p, bits[name])}
            if i == 2 and end == "stopped":
                pieces.throw(KeyboardInterrupt)
            if i == 2 and end == "closed":
                pieces.close()
                break
    assert during == {f"llm.layers.{n}.self_attn.{site}_proj.weight" for n in (1, 3)
                      for site in "qkvo"}
    after = dict(checkpoint.model.named_parameters())
    assert all(after[name] is p and torch.equal(p, bits[name]) for name, p in before.items())


@pytest.mark.parametrize("merge", [False, True], ids=["branches", "merged"])
def test_a_new_conversation_and_another_picture_start_from_what_is_seen_then(merge):
    checkpoint, o = checkpoint_of(vlm(torch.float32)), sample.Options(max_new_tokens=8, merge=merge)
    first, other = (["".join(c.ask(q)) for q in ("How many?", "Is there?")] for c in
                    (Chat(checkpoint, noise(0), o), Chat(checkpoint, noise(1), o)))
    chat = Chat(checkpoint, noise(0), o)
    for _ in range(2):
        assert ["".join(chat.ask(q)) for q in ("How many?", "Is there?")] == first != other
        chat.reset()


def test_without_its_generated_weights_a_vlora_is_blind_and_with_anothers_it_sees_that_picture():
    whole, batch = vlm(torch.float32), talked(torch.float32)
    one = encode_prompt([], "How many?", TOKENIZER, PLACES, "x")
    batch = batch_of([one, one], pictures(2, torch.float32), torch.float32)
    logits = answer(whole, batch)
    with benchmarks.ablation.experts_off(whole):
        assert torch.equal(answer(whole, batch), without_pictures(whole, batch))
    with benchmarks.ablation.experts_swapped(whole):
        assert torch.equal(answer(whole, batch), logits.flip(0))
    assert torch.equal(answer(whole, batch), logits)


# ---- Configs


def test_a_llama_with_grouped_queries_and_experts_beside_a_vlora_are_refused():
    grouped = dataclasses.replace(TEXT, kv_heads=2)
    words = "keys and values are as wide as its states; this one has kv_heads 2, heads 4"
    with pytest.raises(UserError, match=words):
        VLoRAConfig(VISION, grouped, vlora=SMALL)
    for experts in (("1", "none"), ("none", "posterior")):
        with pytest.raises(UserError, match="VLoRA has no experts, both must be none"):
            VLoRAConfig(VISION, TEXT, *experts, vlora=SMALL)


# ---- Checkpoints of ours


def saved(whole, folder, **more):
    held = {n: p.detach().clone() for n,
            p in whole.named_parameters() if n.startswith(more.pop("part", ""))}
    weights.save(str(folder), whole.cfg, held, TOKENIZER, Preprocess(28), "A chat.", stage=2,
                 sources=more.pop("sources", {}), training={})
    return str(folder)


def test_a_saved_vlora_loads_with_the_same_logits(tmp_path):
    whole, batch = vlm(torch.float32, tag=True), talked(torch.float32)
    found = weights.load(saved(whole, tmp_path / "x"))
    assert found.model.cfg == whole.cfg and found.prompt_format().image_tokens == 0
    assert torch.equal(answer(found.model, batch), answer(whole, batch))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("perceptual.Bs"), "no tensor for perceptual.Bs"),
    (lambda t: t.update({"perceptual.gen.5.queries": t.pop("perceptual.gen.0.queries")}),
     "gen.5.queries has no place"),
    (lambda t: t.update({"perceptual.pos_embed": torch.zeros(1, 9, 16)}),
     r"perceptual.pos_embed is \[1, 9, 16\]"),
    (lambda t: t.update({"projector.linear_1.weight": torch.zeros(2, 2)}),
     "projector.linear_1.weight has no place"),
], ids=["dropped", "renamed", "reshaped", "extra"])
def test_a_damaged_vlora_is_refused_by_the_name_of_the_tensor(tmp_path, change, words):
    folder = saved(vlm(torch.float32), tmp_path / "x")
    state = load_file(f"{folder}/model.safetensors")
    change(state)
    save_file(state, f"{folder}/model.safetensors")
    with pytest.raises(UserError, match=words):
        weights.load(folder)


@pytest.mark.parametrize("field, other",
                         [("sites", "qk"), ("every", 1), ("rank", 2), ("embed", 32), ("depth", 1),
                                          ("heads", 2)])
def test_a_trained_generator_keeps_its_form(tmp_path, field, other):
    whole = vlm(torch.float32, tag=True)
    folder = saved(whole, tmp_path / "x")
    asked = {"visual_expert": "none", "language_expert": "none", "vlora": SMALL}
    # its `tag` is kept, also if the options say otherwise
    assert weights.load(folder, experts=asked).model.cfg == whole.cfg
    words = f"{field} is {getattr(SMALL, field)} there, not {other}.*--vlora_{field}"
    with pytest.raises(UserError, match=words):
        weights.load(folder, experts=asked
                     | {"vlora": dataclasses.replace(SMALL, **{field: other})})


def test_neither_method_goes_on_with_the_others_checkpoint_nor_does_a_vlora_pass_for_a_llava(
    tmp_path):
    asked = {"visual_expert": "none", "language_expert": "none", "vlora": SMALL}
    folder = saved(vlm(torch.float32), tmp_path / "vlora")
    with pytest.raises(UserError, match="holds a VLoRA.*--method vlora"):
        weights.load(folder, experts={"visual_expert": "1"})
    static = saved(VLM(VLMConfig(VISION, TEXT, "none", "none")), tmp_path / "static")
    with pytest.raises(UserError, match="holds no VLoRA.*--method hyperllava"):
        weights.load(static, experts=asked)
    point = weights.load(folder)
    with pytest.raises(UserError, match="a VLoRA does not fit into LLaVA's layout"):
        formats.export.write_llava(str(tmp_path / "out"), point.model, TOKENIZER, point.preprocess,
                                   "")
    assert not (tmp_path / "out").exists()


# ---- The published checkpoint's layout with small shapes: Theirs, and transformers' CLIP and Llama

# 16 heads: only the authors' code says so, not their config
GEN = GeneratorConfig(every=2, rank=3, embed=32, depth=2, tag=True)


CONFIG = {"model_type": "llava_vlora", "mm_vision_tower": "clip", "mm_projector_type": "vlora",
          "mm_hidden_size": 32,
          "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
          "mm_use_im_start_end": False,
          "mm_use_im_patch_token": False, "use_mm_proj": True, "image_aspect_ratio": "pad",
          "vlora_dim": 32, "vlora_depth": 2,
          "vlora_visual_dim": 32, "vlora_pos_num": 4, "vlora_llm_dim": 32, "vlora_llm_depth": 4,
          "vlora_rank": 3,
          "vlora_type": "qkvom", "vlora_alpha": 3, "weights_sep": True, "skip_layers": 2}


class Published:
    """Such a folder, and its parts as the authors' code has them."""

    def __init__(self, root, inside):
        self.folder = root / "vlora"
        self.clip, self.llama = hf_clip(), hf_llama(num_hidden_layers=4, vocab_size=TOKENIZER.vocab)
        llm = dataclasses.replace(TEXT, eps=1e-6)
        cfg = VLoRAConfig(VisionConfig(28, 14, 32, 2, 2, 48), llm, vlora=GEN)
        torch.manual_seed(5)
        self.theirs = Theirs(GEN, cfg.vision, cfg.llm)
        for p in self.theirs.parameters():
            nn.init.normal_(p, std=0.3)
        self.cfg = cfg
        self.state = {n: p.detach().clone() for n,
                      p in self.llama.named_parameters()} | published(self.theirs)
        tower = {f"model.vision_tower.vision_tower.{n}": p.detach().clone() for n,
                 p in self.clip.named_parameters()}
        if inside:  # as the authors' transformers spelt it
            self.state |= {n.replace("vision_tower.vision_tower.",
                                     "vision_tower.vision_tower.vision_model.") if
                           "vision_model." not in n else n: t for n, t in tower.items()}
        self.clip.save_pretrained(root / "clip")
        self.folder.mkdir()
        TOKENIZER.save(self.folder)
        self.config = {**self.llama.config.to_dict(), **CONFIG}
        self.write()

    def write(self):
        (self.folder / "config.json").write_text(json.dumps(self.config))
        torch.save(self.state, self.folder / "pytorch_model.bin")

    def logits(self, ids, tag, pixels):
        """Their forward pass: <unk> stands for the tag, no token attends to it, and five modules
        have branches."""
        f = self.clip(pixels[None], output_hidden_states=True).hidden_states[-2][:, 1:]
        A = self.theirs(f).view(5, 2, 32, 3)
        B = self.theirs.Bs.view(5, 2, 32, 3)
        handles = []
        for slot, n in enumerate((1, 3)):
            layer = self.llama.model.layers[n]
            places = [getattr(layer.self_attn, f"{s}_proj") for s in "qkvo"] + [layer.mlp]
            for place, a, b in zip(places, A[:, slot], B[:, slot]):
                handles.append(place.register_forward_hook(lambda m, args, out, a=a,
                                                           b=b: out + args[0] @ a @ b.T))
        whole = torch.tensor([[*ids[:tag], 0, *ids[tag:]]])
        mask = torch.ones_like(whole)
        mask[0, tag] = 0
        out = self.llama(whole, attention_mask=mask,
                         position_ids=torch.arange(whole.shape[1])[None]).logits[0]
        for handle in handles:
            handle.remove()
        return torch.cat([out[:tag], out[tag + 1:]])


@pytest.fixture(params=[False, True], ids=["tower apart", "tower inside"])
def theirs(request, tmp_path):
    return Published(tmp_path, request.param)


@torch.no_grad()
def test_the_published_layout_opens_with_the_logits_of_the_authors_modules(theirs):
    point = weights.load(str(theirs.folder))
    llm = dataclasses.replace(theirs.cfg.llm, context=128)
    assert point.model.cfg == dataclasses.replace(theirs.cfg, llm=llm)
    assert point.system == data.SYSTEM and point.prompt_format().image_tokens == 0
    assert point.preprocess.aspect == "pad"
    conversation = encode(TURNS, TOKENIZER,
                          dataclasses.replace(point.prompt_format(), system="A chat."), "r", "x")
    batch = batch_of([conversation], pictures(1, torch.float32), torch.float32)
    expected = theirs.logits(conversation.ids.tolist(), conversation.tag, batch.visual[0])
    assert close(answer(point.model, batch)[0], expected, 1e-4)
    # positions matter
    assert not close(answer(point.model, batch, tag=torch.tensor([-1]))[0], expected, 1e-2)
    chat = Chat(dataclasses.replace(point, system="A chat."), noise(0), sample.Options())
    said = [ask_dictated(chat, q, TOKENIZER.encode(a)) for q, a in TURNS]
    expected = theirs.logits(conversation.ids.tolist(), conversation.tag, look(noise(0)))
    # their own decoding is one position short here
    for (_, own), logits in zip(segments(conversation), said):
        assert close(logits, expected[own.start - 1:own.stop - 1], 1e-4)
NAME = "model.mm_projector.gen.1.decoders.0.self_attn.in_proj_bias"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(NAME), "no tensor for perceptual.gen.1.decoders.0.self_attn.in_proj.bias"),
    (lambda t: t.update({NAME.replace("gen.1", "gen.5"): t.pop(NAME)}),
     "gen.5.decoders.0.self_attn.in_proj_bias has no place"),
    (lambda t: t.update({"model.mm_projector.Bs": torch.zeros(1, 8, 96)}),
     r"mm_projector.Bs is \[1, 8, 96\]"),
    (lambda t: t.update({"model.mm_projector.0.weight": torch.zeros(2, 2)}),
     "mm_projector.0.weight has no place"),
    (lambda t: t.pop("model.layers.2.mlp.up_proj.weight"),
     "no tensor for llm.layers.2.mlp.up_proj.weight"),
    (lambda t: t.update({NAME: torch.zeros(96, dtype=torch.int8)}), "int8"),
], ids=["dropped", "renamed", "reshaped", "extra", "llama", "quantised"])
def test_a_damaged_published_checkpoint_is_refused_by_the_name_of_the_tensor(theirs, change, words):
    change(theirs.state)
    theirs.write()
    with pytest.raises(UserError, match=words):
        weights.load(str(theirs.folder))


@pytest.mark.parametrize("field, value", [
    ("mm_projector_type", "mlp2x_gelu"), ("weights_sep", False), ("vlora_alpha", 6),
    ("vlora_pos_num", 9),
    ("vlora_llm_depth", 8), ("vlora_llm_dim", 64), ("vlora_visual_dim", 16), ("vlora_type", "qx"),
    ("skip_layers", 9), ("vlora_rank", "3"),
    ("num_key_value_heads", 2), ("mm_vision_select_layer", -1)])
def test_another_vlora_than_ours_is_refused_by_the_name_of_the_field(tmp_path, field, value):
    theirs = Published(tmp_path, False)
    theirs.config[field] = value
    theirs.write()
    words = {"num_key_value_heads": "kv_heads 2", "skip_layers": "every 9",
             "vlora_type": "sites 'qx'"}.get(field, field)
    with pytest.raises(UserError, match=words):
        weights.load(str(theirs.folder))


# ---- Training


FLAGS = {"vlora_every": 2, "vlora_rank": 3, "vlora_embed": 32, "vlora_depth": 2, "vlora_heads": 4}


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Options of stage 1 at full scale's preset, for a small CLIP and Llama and eight pictures."""
    root = tmp_path_factory.mktemp("data")
    hf_clip().save_pretrained(root / "clip")
    hf_llama(num_hidden_layers=4, vocab_size=TOKENIZER.vocab).save_pretrained(root / "llama")
    TOKENIZER.save(root / "llama")
    turn = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    captions, talks = [], []
    for i in range(8):
        noise(i).save(root / f"{i}.png")
        first = turn("<image>\nHow many?", f"{i % 5}.")
        captions.append({"id": str(i), "image": f"{i}.png", "conversations": first})
        talks.append({"id": f"t{i}", "image": f"{i}.png",
                      "conversations": first + turn("Is there a square?", "no.")})
    talks += [{"id": f"x{i}", "conversations": turn("How many?", "of what?")} for i in range(4)]
    (root / "captions.json").write_text(json.dumps(captions))
    (root / "talks.json").write_text(json.dumps(talks))
    return {"method": "vlora", "preset": "7b", "vision": str(root / "clip"),
            "llm": str(root / "llama"), "images": str(root),
            "data": str(root / "captions.json"), "batch_size": 4, "micro_batch_size": 4, "steps": 4,
            "workers": 0,
            "dtype": "float32", "device": "cpu", "context": 128, "checkpointing": "none",
            "allow_random_llm": True, "lr": 1e-2,
            "warmup": 0.0, "val_every": 2, **FLAGS}


@pytest.fixture(scope="module")
def aligned(given, mesh, tmp_path_factory):
    """A folder with a finished stage 1."""
    out = str(tmp_path_factory.mktemp("aligned"))
    train.run_stage(given | {"out": out}, 1, mesh)
    return out


def tuning(given, aligned, out, **more):
    """Options of stage 2."""
    talks = given["data"].replace("captions", "talks")
    return given | {"data": talks, "init": f"{aligned}/stage1", "out": str(out),
                    "system": ""} | more


def log_of(out, stage):
    return [json.loads(line) for line in open(os.path.join(out, f"stage{stage}", "log.jsonl"))]


def losses(out, stage=2):
    return [(row["loss"], row["grad_norm"]) for row in log_of(out, stage)]


@pytest.mark.parametrize("part", training.options.PARTS)
def test_the_stand_ins_of_the_toy_are_trained_alike_for_both_methods(part, mesh):
    plain, other = (training.options.complete({"part": part, "method": method}, 0)
                    for method in ("hyperllava", "vlora"))
    assert dataclasses.replace(other, method="hyperllava") == plain


@pytest.mark.parametrize("stage, tune, moves",
                         [(1, "full", ("perceptual.",)), (2, "full", ("perceptual.", "llm.")),
                                                (2, "peft", ("perceptual.",))])
def test_a_stage_of_vlora_moves_exactly_what_it_names(given, aligned, mesh, tmp_path, stage, tune,
                                                      moves):
    options = (tuning(given, aligned, tmp_path) if stage == 2
               else given | {"out": str(tmp_path)}) | {"tune": tune}
    o = training.options.complete(options, stage)
    os.makedirs(training.options.stage_folder(o))
    stage, after = train.vlm_stage(o), {}
    before = {n: p.detach().clone() for n, p in stage.model.named_parameters()}
    stage.write, stage.keeps = after.update, ("",)
    train.train(stage, o, mesh)
    assert before.keys() == after.keys()
    assert {n for n in before if not torch.equal(before[n], after[n])} == {n for n in before
                                                                           if n.startswith(moves)}


def test_stage_1_keeps_the_generator_alone_and_stage_2_goes_on_from_its_very_loss(given, aligned,
                                                                                  mesh, tmp_path):
    names = {name for name, _, _ in formats.weight_files.tensors(f"{aligned}/stage1")}
    assert names and all(name.startswith("perceptual.") for name in names)
    point = weights.load(f"{aligned}/stage1")
    assert point.model.cfg.vlora == GeneratorConfig("qkvom", 2, 3, 32, 2,
                                                    4) and point.model.perceptual.Bs.any()
    train.run_stage(tuning(given, aligned, tmp_path, batch_size=12, micro_batch_size=12), 2, mesh)
    o = training.options.complete(tuning(given, aligned, tmp_path, batch_size=12), 2)
    batch = train.vlm_stage(o).data.batch(range(12))
    assert batch.picture.tolist() == [*range(8), -1, -1, -1, -1] and (batch.ids >= 0).all()
    with torch.no_grad():
        first = point.model.loss(batch).item() / batch.trained
    assert log_of(tmp_path, 2)[0]["loss"] == pytest.approx(first, rel=1e-6)
    assert weights.load(str(tmp_path / "stage2")).model.cfg == point.model.cfg


def test_vlora_learns_by_heart_what_each_picture_shows(given, aligned, mesh, tmp_path):
    options = tuning(given, aligned, tmp_path, data=given["data"], steps=50, batch_size=8,
                     micro_batch_size=8, lr=5e-3)
    train.run_stage(options, 2, mesh)
    found = [row["loss"] for row in log_of(tmp_path, 2)]
    captions = data.Conversations(given["data"], given["images"], TOKENIZER, PLACES)
    tokens = sum(int((captions[i].labels != IGNORE).sum()) for i in range(8))
    # Without the picture, the digit of a row costs ln 8 - 3/4 ln 2 nats: of 8 rows, three pairs
    # share a digit.
    assert found[0] > 2 and found[-1] < 0.5 * (math.log(8) - 0.75 * math.log(2)) * 8 / tokens


def test_accumulation_and_checkpointing_leave_a_run_of_vlora_as_it_is(given, aligned, mesh,
                                                                      tmp_path):
    for name, more in (("plain", {}), ("one by one", {"micro_batch_size": 1}),
                       ("again", {"checkpointing": "full"})):
        train.run_stage(tuning(given, aligned, tmp_path / name, **more), 2, mesh)
    plain, cut, again = (torch.tensor(losses(tmp_path / name))
                         for name in ("plain", "one by one", "again"))
    assert torch.allclose(plain, cut, rtol=2e-4) and torch.equal(plain, again)


def test_a_stopped_run_of_vlora_goes_on_bit_for_bit(given, aligned, mesh, tmp_path, monkeypatch):
    train.run_stage(tuning(given, aligned, tmp_path / "whole"), 2, mesh)
    step, taken = train.train_step, []

    def stopping(*args, **more):
        taken.append(1)
        if len(taken) == 4:
            raise KeyboardInterrupt
        return step(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopping)
        train.run_stage(tuning(given, aligned, tmp_path / "broken", save_every=2), 2, mesh)
    train.run_stage(tuning(given, aligned, tmp_path / "broken", save_every=2, resume=True), 2, mesh)
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    files = [(tmp_path / name / "stage2" / "model.safetensors").read_bytes()
             for name in ("whole", "broken")]
    assert files[0] == files[1]


def test_the_presets_are_the_papers_and_the_scripts(given, mesh, tmp_path):
    bare = {k: given[k] for k in ("method", "preset", "vision", "llm", "images", "data",
                                  "device")} | {"out": str(tmp_path)}
    one, two = training.options.complete(bare, 1), training.options.complete(
        bare | {"init": str(tmp_path)}, 2)
    assert (one.batch_size, one.lr, one.template, one.aspect, one.epochs) == (768, 5e-5, "plain",
                                                                              "crop", 1)
    assert (two.batch_size, two.lr, two.template, two.aspect,
            two.order) == (128, 2e-5, "v1", "pad", "modality")
    assert train.model_options(one)["vlora"] == GeneratorConfig() == train.model_options(two)[
        "vlora"]
    # of one small card
    assert one.micro_batch_size == 96 and training.options.complete(bare | {"preset": "1b"},
                                                                    1).micro_batch_size == 16


@pytest.mark.parametrize("more, words", [
    ({"visual_expert": "1"}, "--visual_expert is no option of --method vlora"),
    ({"guidance_pool": "prompt"}, "--guidance_pool is no option of --method vlora"),
    ({"projector_lr": 1e-4}, "--projector_lr is no option of --method vlora"),
    ({"method": "hyperllava"}, "--vlora_depth is no option of --method hyperllava"),
    ({"vlora_sites": "qz"}, "sites 'qz'"), ({"vlora_every": 5}, "every 5: the Llama has only 4"),
    ({"vlora_embed": 30}, "embed 30 does not divide by heads 4")])
def test_flags_that_do_not_fit_are_refused(given, mesh, tmp_path, more, words):
    with pytest.raises(UserError, match=words):
        train.vlm_stage(training.options.complete(given | {"out": str(tmp_path)} | more, 1))


def test_a_projector_is_no_start_for_vlora(given, mesh, tmp_path):
    torch.save({}, tmp_path / "mm_projector.bin")
    with pytest.raises(UserError, match="a projector, but VLoRA has none"):
        train.vlm_stage(training.options.complete(
            given | {"out": str(tmp_path), "init": str(tmp_path / "mm_projector.bin")}, 2))


def test_a_step_counts_the_operations_of_generators_and_branches_instead_of_a_projector(
    given, aligned, mesh, tmp_path):
    o = training.options.complete(tuning(given, aligned, tmp_path), 2)
    stage = train.vlm_stage(o)
    batch, cfg = stage.data.batch([0, 1]), stage.model.cfg
    n = batch.lengths.sum().item()
    found = training.costs.step_flops(cfg, batch, True)
    static = training.costs.step_flops(VLMConfig(cfg.vision, cfg.llm, "none", "none"), batch, True)
    cfg = VLoRAConfig(cfg.vision, cfg.llm, vlora=GeneratorConfig("qkvom", 2, 3, 32, 2, 4))
    parts, v, D = forward_flops(cfg, n), cfg.vision, cfg.llm.width
    projector = 3 * 2 * 2 * v.tokens * D * (v.width + D)
    assert found - (static - projector) == 3 * (2 * parts["generator"] + parts["branches"])


def test_what_autograd_keeps_of_a_generator_and_its_branches_is_foreseen(given):
    small = dataclasses.replace(VISION, width=64, image_size=112)
    text = dataclasses.replace(TEXT, width=64, hidden=160, vocab=10)
    vlora = GeneratorConfig(every=2, rank=16, embed=64, depth=2, heads=4)
    cfg = VLoRAConfig(small, text, vlora=vlora)
    torch.manual_seed(0)
    model = VLoRA(cfg).bfloat16()
    x = torch.randn(2, 48, 64, dtype=torch.bfloat16, requires_grad=True)
    f = torch.randn(2, small.tokens, 64, dtype=torch.bfloat16)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def kept(run_it):
        found = {}
        keep = lambda t: found.update(
            {t.untyped_storage().data_ptr(): (t, t.untyped_storage().nbytes())}) or t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            run_it()
        return sum(bytes for at, (_, bytes) in found.items() if at not in own)

    plain = kept(lambda: run(model, x))
    real = kept(lambda: run(model, x, model.image_weights(f, torch.arange(2)))) - plain
    bare = VLMConfig(small, text, "none", "none")
    with_pictures, text_only = training.plan.MicroBatch(2, 48, 0,
                                                        2), training.plan.MicroBatch(2, 48, 0, 0)
    foreseen = (training.plan.activations(cfg, with_pictures, size=2, trains_llm=True)
                - training.plan.activations(bare, text_only, size=2, trains_llm=True))
    assert abs(foreseen / real - 1) < 0.15, (foreseen, real)


@pytest.mark.slow
def test_two_ranks_take_the_same_steps_of_vlora_as_one(given, aligned, tmp_path):
    """With one row at a time, often one rank has only text while the other has a picture."""
    for ranks in (1, 2):
        options = tuning(given, aligned, tmp_path / str(ranks), batch_size=4, micro_batch_size=1,
                         steps=6)
        for rank in start_ranks(ranks, "train.py", *words_of(options)):
            succeeds(rank)
    one, two = (torch.tensor(losses(tmp_path / str(ranks))) for ranks in (1, 2))
    assert torch.allclose(one, two, rtol=1e-4)


@pytest.mark.slow
def test_the_toy_runs_with_vlora_from_nothing_to_scores(tmp_path):
    words = ("--method", "vlora", "--pictures", 20, "--steps", 3, "--batch_size", 8,
             "--allow_random_llm")
    succeeds(Program("train.py", *words, "--out", tmp_path / "a"))
    scores = json.load(open(tmp_path / "a" / "scores.json"))
    assert scores["splits"]["heldout"]["n"] > 100
    config = json.load(open(tmp_path / "a" / "stage2" / "config.json"))
    assert config["model"]["vlora"]["every"] == 1 and config["model"]["visual_expert"] == "none"
    picture = next((tmp_path / "a" / "world" / "images").iterdir())
    for more in ((), ("--merge",)):
        succeeds(Program("sample.py", "--model", tmp_path / "a" / "stage2", "--image", picture,
                         "--prompt", "How many?", *more))
    succeeds(Program("train.py", *words, "--stage", 1, "--out", tmp_path / "b", "--vision",
                     tmp_path / "a" / "stage0" / "clip", "--llm",
                     tmp_path / "a" / "stage0" / "llm"))
    assert not (tmp_path / "b" / "stage0").exists()
