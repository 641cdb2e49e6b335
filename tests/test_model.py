"""What model.py promises beside the claims of the paper, which are in the root's test_model.py: the
kernels, bf16, and how tokens are drawn.
"""
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from hypernet import Expert, HyperNetwork
from model import attend, Attention, generate, LayerCache, RMSNorm, sample_token
from tests.helpers import (batch_of, close, conversations, EVERY, LLAMA, logits_of, new_weights,
                           pictures, prompts, trained, whole_batch)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", ["not", "causal", "mask"])
def test_plain_attention_is_the_fused_kernels(kv_heads, masked):
    torch.manual_seed(0)
    T, past = 6, 0 if masked != "mask" else 3
    q, k, v = (torch.randn(2, h, t, 8).double() for h,
               t in ((4, T), (kv_heads, T + past), (kv_heads, T + past)))
    mask = torch.rand(2, 1, T, T + past) < 0.5
    mask[..., 0] = True
    added = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
    how = dict(mask=added if masked == "mask" else None, causal=masked == "causal")
    plain, fused = attend(q, k, v, eager=True, **how), attend(q, k, v, **how)
    assert plain.shape == (2, 4, T, 8) and torch.allclose(plain, fused, atol=1e-12)
    all_of_them = torch.ones(T, T, dtype=torch.bool)
    allowed = {"not": all_of_them, "causal": all_of_them.tril(), "mask": mask}[masked]
    # query head h reads head h // (H / kv_heads)
    k, v = (x[:, torch.arange(4) // (4 // kv_heads)] for x in (k, v))
    scores = (torch.einsum("bhik,bhjk->bhij", q, k) / 8 ** 0.5).where(allowed,
                                                                      torch.tensor(-torch.inf))
    assert torch.allclose(fused, scores.softmax(-1) @ v, atol=1e-12)


def test_a_model_gives_the_same_logits_with_plain_attention_and_norms():
    model, batch = trained(**EVERY), whole_batch()
    fused = logits_of(model, batch)
    for part in model.modules():
        if hasattr(part, "eager"):
            part.eager = True
    assert close(logits_of(model, batch), fused, 1e-6)
    assert sum(isinstance(part, Attention) and part.eager
               for part in model.modules()) == LLAMA.depth
    # the last one, guidance's
    assert sum(isinstance(part, RMSNorm) and part.eager
               for part in model.modules()) == 2 * LLAMA.depth + 2


def test_logits_can_be_had_at_some_positions_only():
    model, batch = trained(), whole_batch()
    some = model(batch)
    assert close(some, logits_of(model, batch).flatten(0, 1)[batch.at], 1e-12)


def test_a_bf16_model_computes_in_bf16_with_all_experts():
    model, dtypes = trained(torch.bfloat16, **EVERY), Counter()
    for part in model.modules():
        part.register_forward_hook(lambda part, inputs, out: dtypes.update(
            x.dtype for x in (out if isinstance(out, tuple) else [out])))
    batch = batch_of(conversations(), pictures(2, torch.bfloat16), torch.bfloat16)
    logits = logits_of(model, batch)
    assert set(dtypes) == {torch.bfloat16} and logits.isfinite().all()
    exact = logits_of(model.double(), whole_batch())
    assert F.cosine_similarity(logits.double(), exact, dim=-1).mean() > 0.99
    model.to(torch.bfloat16)
    loss = F.cross_entropy(logits_of(model, batch).flatten(0, 1)[batch.at].float(), batch.target)
    loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all()
               for p in new_weights(model).values())


def test_drawing_with_a_seed_can_be_repeated_and_a_nucleus_of_nothing_is_greedy():
    model, batch = trained(torch.float32, seed=3), prompts()

    def drawn(seed, **how):
        return generate(model, batch, 10, eos=-1, generator=torch.Generator().manual_seed(seed),
                        **how)

    assert drawn(0, temperature=1.5) == drawn(0, temperature=1.5) != drawn(1, temperature=1.5)
    greedy = generate(model, batch, 10, eos=-1)
    assert drawn(0, temperature=1.5, top_p=1e-9) == greedy != drawn(0, temperature=1.5)
    assert drawn(5, temperature=1e-4) == greedy


@pytest.mark.parametrize("top_p, kept",
                         [(1.0, (0, 1, 2, 3, 4)), (0.8, (1, 3, 4)), (0.5, (1, 3)), (0.3, (3,))])
def test_tokens_are_drawn_as_often_as_their_renormalised_probability_in_the_nucleus(top_p, kept):
    p, temperature, n = torch.tensor([0.06, 0.25, 0.09, 0.4, 0.2]), 0.5, 20_000
    logits = temperature * p.log() + 3
    drawn = sample_token(logits.expand(n, -1), temperature, top_p, torch.Generator().manual_seed(0))
    expected = torch.tensor([p[i] if i in kept else 0.0 for i in range(5)])
    expected = expected / expected.sum()
    found = drawn.bincount(minlength=5) / n
    assert ((found > 0) == (expected > 0)).all() and (
        found - expected).abs().max() < 4 * 0.5 / n ** 0.5
    assert (sample_token(logits.expand(3, -1), 0, top_p) == 3).all()


def test_a_row_that_uses_no_expert_goes_on_without_a_shift():
    expert, network = Expert(8, 8, 8, 4, 2), HyperNetwork(8, 8, 4, 2)
    for up in (expert.up, network.up.weight):
        torch.nn.init.normal_(up)
    weights = expert.weights(torch.randn(3, 2, 8), network)
    cache = LayerCache(None, None)
    cache.keep(weights, torch.tensor([[0, 1, 1], [-1, -1, -1], [0, 0, -1]]))
    x = torch.randn(3, 1, 8)
    shift = expert(x, cache.weights)
    assert torch.allclose(shift[0], expert(x, weights, torch.ones(3, 1, dtype=torch.int64))[0])
    assert torch.allclose(shift[2], expert(x, weights, torch.zeros(3, 1, dtype=torch.int64))[2])
    assert shift[1].eq(0).all() and shift[[0, 2]].abs().max() > 0.01
