"""What hypernet.py, projector.py and model.py claim, and data.py about causality, one test for
each claim. CPU, no network.

Up-projections start at zero, where leaks, mixed rows and stale caches all go unseen: `trained`
draws them at random.
"""
import dataclasses
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import weights
from data import encode, encode_prompt, IGNORE
from hypernet import Expert, HyperNetwork, pool, rms
from model import CLIP, generate, stream, VisionConfig, VLM, VLMConfig
from projector import Projector
from tests.helpers import (batch_of, by_steps, check_causal, close, config, conversations, EVERY,
                           KINDS, LAYOUT, LLAMA, logits_of, new_weights, pictures, PROMPTS,
                           prompts, segments, size, static, TOKENIZER, trained, TURNS, VISION,
                           whole_batch)

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


# ---- hypernet.py


def test_guidance_is_the_mean_of_each_turns_own_tokens_and_zero_without_any():
    torch.manual_seed(0)
    x, ids = torch.randn(3, 9, 5), torch.randint(-1, 3, (3, 9))
    ids[1], ids[2, 4:] = -1, -1
    ids[0, :3] = torch.arange(3)
    found = pool(x.bfloat16(), ids, 4)
    assert found.dtype == torch.float32 and found.shape == (3, 4, 5)
    for b in range(3):
        for u in range(4):
            own = [x[b, i].bfloat16().float() for i in range(9) if ids[b, i] == u]
            expected = sum(own) / len(own) if own else torch.zeros(5)
            assert torch.allclose(found[b, u], expected, atol=1e-6)
    assert not found[1].any() and not found[:, 3].any() and found[0, :3].abs().min() > 0


def test_generated_weights_are_a_two_layer_mlp_scaled_by_one_over_the_root_of_E():
    torch.manual_seed(0)
    net = HyperNetwork(inputs=5, outputs=7, embed=9, rank=3).double()
    e = torch.randn(2, 4, 9).double()
    torch.nn.init.normal_(net.up.weight)
    down, up = net(e)
    for b in range(2):
        for u in range(4):
            a = net.trunk.weight @ e[b, u] + net.trunk.bias
            a = a * torch.sigmoid(a) / 3  # 3 is the root of 9
            assert torch.allclose(down[b, u].flatten(), net.down.weight @ a)
            assert torch.allclose(up[b, u].flatten(), net.up.weight @ a)


def by_hand(x, expert, hypernet, guidance):
    """Eqs. 3 to 5 for one token float[inputs] and one guidance float[G], with the modules' weights.
    """
    g = guidance / (guidance.square().mean() + 1e-6).sqrt()
    E, G = expert.encoder.weight.shape
    e = expert.encoder.weight @ (g * E ** 0.5 / G) + expert.encoder.bias
    a = F.silu(hypernet.trunk.weight @ e + hypernet.trunk.bias) / len(e) ** 0.5
    down = (hypernet.down.weight @ a).view_as(expert.down) + expert.down
    up = (hypernet.up.weight @ a).view_as(expert.up) + expert.up
    both = down @ x
    gate, value = both[:len(up)], both[len(up):]
    return (gate * torch.sigmoid(gate) * value) @ up


def expert_with(inputs, outputs, guide, embed=6, rank=3):
    torch.manual_seed(0)
    net = HyperNetwork(inputs, outputs, embed, rank).double()
    expert = Expert(guide, inputs, outputs, embed, rank).double()
    torch.nn.init.normal_(net.up.weight)
    torch.nn.init.normal_(expert.up)
    return expert, net


def embedding(expert, net, guidance):
    """e of Eq. 3 for guidance float[B, U, G]."""
    found = []
    handle = expert.encoder.register_forward_hook(lambda module, inputs, e: found.append(e))
    expert.weights(guidance, net)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("guide", [64, 1024])
def test_the_embedding_starts_as_that_of_a_plain_linear_layer(guide):
    (expert, net), linear = expert_with(5, 7, guide, embed=16), torch.nn.Linear(guide, 16).double()
    guidance = torch.randn(2, 3, guide).double()
    for layer in (expert, linear):
        torch.manual_seed(1)
        layer.reset_parameters()
    assert torch.allclose(embedding(expert, net, guidance), linear(rms(guidance)))


@pytest.mark.parametrize("guide", [64, 1024])
def test_a_step_of_adam_moves_the_embedding_equally_far_at_every_width_of_the_guidance(guide):
    (expert, net), guidance = expert_with(5, 7, guide, embed=16), torch.randn(1, 1, guide).double()
    before = embedding(expert, net, guidance)
    (before * torch.randn(16)).sum().backward()
    torch.optim.AdamW(expert.encoder.parameters(), lr=1e-3, weight_decay=0.0).step()
    moved = (embedding(expert, net, guidance) - before).abs() / 1e-3
    assert (moved - (1 + 0.8 * 16 ** 0.5)).abs().max() < 0.3  # the bias moves by lr


def test_every_token_runs_with_the_weights_of_its_own_turn_and_without_a_turn_gets_exactly_zero():
    expert, net = expert_with(inputs=5, outputs=7, guide=4)
    x, guidance = torch.randn(2, 11, 5).double(), torch.randn(2, 3, 4).double()
    use_id = torch.randint(-1, 3, (2, 11))
    use_id[0, :4], use_id[1, -2:] = torch.tensor([2, -1, 0, 1]), -1
    shift = expert(x, expert.weights(guidance, net), use_id)
    for b in range(2):
        for i in range(11):
            if use_id[b, i] < 0:
                assert (shift[b, i] == 0).all()
            else:
                expected = by_hand(x[b, i], expert, net, guidance[b, use_id[b, i]])
                assert torch.allclose(shift[b, i], expected) and expected.abs().min() > 0


def test_without_use_id_all_tokens_run_with_the_one_turn():
    expert, net = expert_with(inputs=5, outputs=7, guide=4)
    x, made = torch.randn(2, 6, 5).double(), expert.weights(torch.randn(2, 1, 4).double(), net)
    assert torch.allclose(expert(x, made), expert(x, made, torch.zeros(2, 6, dtype=torch.int64)))


def test_the_weights_of_two_samples_differ_and_the_size_of_the_guidance_does_not_matter():
    expert, net = expert_with(inputs=5, outputs=7, guide=4)
    guidance = torch.randn(2, 1, 4).double()
    for made, scaled in zip(expert.weights(guidance, net), expert.weights(1000 * guidance, net)):
        assert (made[0] - made[1]).abs().max() > 0.1 and torch.allclose(made, scaled, rtol=1e-4,
                                                                        atol=1e-4)


def test_the_experts_of_a_7b_model_have_the_sizes_that_are_written_out_here():
    E, R, D, C = 64, 16, 4096, 1024
    for where, sites, expected in (("posterior", 16, 19_928_128), ("all", 32, 27_269_184)):
        llm = weights.build_empty(VLMConfig(visual_expert="both", language_expert=where))
        language = size(llm.llm.hypernet) + sum(size(b.expert) for b in llm.llm.layers
                                                if b.expert is not None)
        assert language == expected
        assert expected == sites * (D * E + E) + (E * E + E) + E * 3 * R * D + sites * 3 * R * D
        # and guidance_norm
        assert sum(p.numel() for n, p in new_weights(llm.llm).items()) == expected + 4096
    assert size(llm.projector.expert_1) == 6_459_520 == (
        (C * E + E) + (E * E + E) + (E + 1) * R * (2 * C + D))
    assert size(llm.projector.expert_2) == 13_045_888
    assert size(llm.projector.linear_1) + size(llm.projector.linear_2) == 20_979_712


# ---- projector.py


@pytest.mark.parametrize("variant", ["none", "1", "2", "both"])
def test_the_projector_is_equation_6_written_out(variant):
    torch.manual_seed(0)
    projector, f = Projector(5, 7, variant, embed=6, rank=3).double(), torch.randn(2, 4, 5).double()
    for part in projector.modules():
        if isinstance(part, HyperNetwork):
            torch.nn.init.normal_(part.up.weight)
    one, two = projector.linear_1, projector.linear_2

    def expert(part, x):
        return torch.stack([by_hand(token, part.expert, part.hypernet, x.mean(0)) for token in x])

    found = projector(f)
    for m in range(2):  # picture by picture: none sees the other
        first = F.gelu(f[m] @ one.weight.T + one.bias)
        shifted = first + expert(projector.expert_1, f[m]) if variant in ("1", "both") else first
        expected = shifted @ two.weight.T + two.bias
        if variant in ("2", "both"):
            expected = expected + expert(projector.expert_2, first)
        assert torch.allclose(found[m], expected, atol=1e-5)  # guidance is pooled in fp32
    assert (projector.expert_1 is not None) == (variant in ("1", "both"))
    assert (projector.expert_2 is not None) == (variant in ("2", "both"))


# ---- model.py


def test_the_tower_is_built_one_block_short_and_its_features_leave_out_cls():
    torch.manual_seed(0)
    model, seen = VLM(config()), {}
    whole = CLIP(dataclasses.replace(VISION, depth=VISION.depth + 1))  # as a checkpoint has it
    missing = whole.load_state_dict(model.vision.state_dict(), strict=False).missing_keys
    assert {name.split(".")[1] for name in missing} == {"2"}
    whole.layers[2].register_forward_pre_hook(lambda part, inputs: seen.update(x=inputs[0]))
    x = torch.stack(pictures(2, torch.float32))
    whole(x)
    features = model.features(x)
    assert features.shape == (2, VISION.tokens, VISION.width)
    assert torch.equal(features, seen["x"][:, 1:])
    assert model.features(features) is features
    assert VisionConfig().depth == 24 - 1  # of CLIP-L


@kinds
@torch.no_grad()
def test_a_block_with_an_expert_is_equation_7_with_guidance_from_where_the_config_says(kind):
    model, batch, seen = trained(**kind), whole_batch(), {}
    torch.nn.init.normal_(model.llm.guidance_norm.weight)
    for n, block in enumerate(model.llm.layers):
        block.register_forward_hook(
            lambda part, inputs, out, n=n: seen.update({n: (inputs[0], out, *inputs[1:3])}))
    logits_of(model, batch)
    where, k = model.cfg.language_expert, model.cfg.guidance_after
    sites = [n for n, block in enumerate(model.llm.layers) if block.expert is not None]
    assert sites == list(range(0, 2) if where == "anterior" else range(0, 4) if where == "all"
                         else range(k, 4))
    # what block k reads is what k blocks wrote
    normed = rms(seen[k][0], LLAMA.eps) * model.llm.guidance_norm.weight
    block, (x, out, cos, sin) = model.llm.layers[sites[-1]], seen[sites[-1]]
    h = x + block.self_attn(block.input_layernorm(x), cos, sin)
    y = block.post_attention_layernorm(h)
    for b in range(3):
        for turn in set(batch.use_id[b].tolist()) - {-1}:
            guidance = normed[b, batch.pool_id[b] == turn].mean(0)
            i = int((batch.use_id[b] == turn).nonzero()[-1])
            shift = by_hand(y[b, i], block.expert, model.llm.hypernet, guidance)
            assert torch.allclose(out[b, i], h[b, i] + block.mlp(y[b, i]) + shift, atol=1e-5)
            assert shift.abs().max() > 0.01


def test_image_tokens_take_the_places_of_their_pictures_in_order():
    model, batch, seen = trained(**EVERY), whole_batch(), {}
    model.llm.register_forward_pre_hook(lambda part, inputs: seen.update(x=inputs[0]))
    logits_of(model, batch)
    tokens = model.projector(model.features(batch.visual))
    here = torch.zeros_like(batch.ids, dtype=torch.bool)
    here.view(-1)[batch.image_at] = True
    assert here.sum(1).tolist() == [4, 0, 4]
    assert torch.equal(seen["x"][0, here[0]], tokens[0]) and torch.equal(seen["x"][2, here[2]],
                                                                         tokens[1])
    assert torch.equal(seen["x"][~here], model.llm.embed_tokens(batch.ids[~here]))


# ---- Causality: what teacher forcing gives a trained position is what generation knows


def answers(batch):
    """(row, position) of all tokens of answers, their end tokens included."""
    places = [(int(p) // batch.ids.shape[1], int(p) % batch.ids.shape[1] + 1) for p in batch.at]
    assert [int(batch.ids[place]) for place in places] == batch.target.tolist()
    return places


def altered(batch, b, p):
    """The batch with another token at position p of row b."""
    ids = batch.ids.clone()
    ids[b, p] = (ids[b, p] + 7) % TOKENIZER.vocab
    return dataclasses.replace(batch, ids=ids)


def leaks(model, batch):
    """Tokens of answers that change the logits at a position before their own, or another row's."""
    found, before = [], logits_of(model, batch)
    for b, p in answers(batch):
        moved = (logits_of(model, altered(batch, b, p)) != before).any(-1)  # bool[B, T]
        # a token that changes nothing would prove nothing
        assert moved[b, p:batch.lengths[b]].all()
        if moved[b, :p].any() or moved[torch.arange(len(moved)) != b].any():
            found.append((b, p))
    return found


@kinds
@pytest.mark.parametrize("pool", ["instruction", "prompt", "last"])
@torch.no_grad()
def test_a_token_of_an_answer_changes_no_logits_before_it(kind, pool):
    assert leaks(trained(**kind), whole_batch(pool=pool)) == []


@kinds
@torch.no_grad()
def test_the_leak_test_finds_every_leak_where_guidance_is_pooled_over_answers_too(kind):
    batch = whole_batch()
    # all tokens of a turn: what a mean over the training sequence does
    batch.pool_id = batch.use_id
    assert leaks(trained(**kind), batch) == answers(batch)


def test_the_check_of_the_data_alone_tells_good_pooling_from_bad():
    batch = whole_batch()
    labels = torch.full_like(batch.ids, IGNORE)
    for b, p in answers(batch):
        labels[b, p] = batch.ids[b, p]
    check_causal(labels, batch.pool_id, batch.use_id)
    with pytest.raises(AssertionError, match="guidance reaches"):
        check_causal(labels, batch.use_id, batch.use_id)
    late = batch.pool_id.clone()
    late[0, answers(batch)[0][1]] = 0  # a single token of an answer
    with pytest.raises(AssertionError, match="row 0"):
        check_causal(labels, late, batch.use_id)


def guidance_in(model, batch):
    """Logits, and the embedding e of the guidance float[B, U, E] at the first site."""
    seen = []
    handle = model.llm.hypernet.register_forward_pre_hook(
        lambda part, inputs: seen.append(inputs[0]))
    logits = logits_of(model, batch)
    handle.remove()
    return logits, seen[0]


@kinds
@torch.no_grad()
def test_a_token_of_an_instruction_changes_its_guidance_and_its_answer_but_no_earlier_turn(kind):
    model, batch = trained(**kind), whole_batch()
    before, e = guidance_in(model, batch)
    for b, p in (batch.pool_id >= 0).nonzero().tolist():
        turn = int(batch.pool_id[b, p])
        after, e_after = guidance_in(model, altered(batch, b, p))
        moved = (after != before).any(-1)
        start = int((batch.use_id[b] == turn).nonzero()[0])
        supervised = [q - 1 for row, q in answers(batch) if row == b
                      and batch.use_id[row, q] == turn]
        assert not moved[b, :start].any() and moved[b, supervised].all()
        assert not moved[torch.arange(3) != b].any()
        assert (e_after[b, turn] != e[b, turn]).all() and torch.equal(e_after[b, :turn],
                                                                      e[b, :turn])


@torch.no_grad()
def test_guidance_reaches_the_answer_by_the_generated_weights_too():
    model, batch = trained(), whole_batch()
    before = logits_of(model, batch)
    turn = batch.pool_id[0] == 1
    pooled = batch.pool_id.clone()
    pooled[0, turn.nonzero()[0]] = -1  # the same tokens, another mean
    moved = (logits_of(model, dataclasses.replace(batch, pool_id=pooled)) - before).abs().amax(-1)
    own = batch.use_id == 1
    assert moved[0, own[0]].min() > 1e-3
    assert not moved[0, :own[0].nonzero()[0]].any() and not moved[1:].any()


def gradients(model, batch):
    """For each trained position, (row, position, d its logits / d all input embeddings float[B, T,
    D]).
    """
    seen = {}

    def into_a_leaf(part, inputs):
        seen["x"] = inputs[0].detach().requires_grad_()
        return seen["x"], *inputs[1:]

    handle = model.llm.register_forward_pre_hook(into_a_leaf)
    logits = model(batch)
    handle.remove()
    direction = torch.randn(logits.shape[1], generator=torch.Generator().manual_seed(2)).double()
    for (b, p), row in zip(answers(batch), logits):
        yield b, p - 1, torch.autograd.grad(row @ direction, seen["x"], retain_graph=True)[0]


@kinds
def test_the_derivative_of_a_trained_position_by_any_later_input_is_exactly_zero(kind):
    model, batch = trained(**kind), whole_batch()
    for b, i, grad in gradients(model, batch):
        assert not grad[b, i + 1:].any() and not grad[torch.arange(3) != b].any()
        assert grad[b, :i + 1].abs().amax(-1).min() > 0
    batch.pool_id = batch.use_id
    assert all(grad[b, i + 1].any() for b, i, grad in gradients(model, batch))


@kinds
@torch.no_grad()
def test_a_dialogue_of_three_turns_decoded_with_a_cache_gives_the_logits_of_teacher_forcing(kind):
    model, samples = trained(**kind), [conversations()[0]]
    full = logits_of(model, batch_of(samples, pictures(1)))[0]
    cached = by_steps(model, samples, torch.stack(pictures(1)), len(full))[0]
    assert close(cached, full)
    answered = [i for _, answer in segments(samples[0]) for i in range(answer.start, answer.stop)]
    # decoded as a step of the turn that it ends
    assert samples[0].ids[answered[-1]] == TOKENIZER.eos


@torch.no_grad()
def test_rows_of_a_cache_advance_at_their_own_pace():
    other = [("<image>\nHow many?", "two of them, a red one."),
             ("What colour is the circle? Is there a square?", "red."),
             ("Is there?", "yes, three of them.")]
    samples = [conversations()[0], encode(other, TOKENIZER, LAYOUT, "other", "b.png")]
    model, batch = trained(**EVERY), batch_of(samples, pictures(2))
    stepped = by_steps(model, samples, batch.visual, 200)
    for full, found, length in zip(logits_of(model, batch), stepped, batch.lengths):
        assert close(found, full[:length])


@kinds
@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch_mates_nor_on_their_order(kind):
    model, samples, seen = trained(**kind), conversations(), pictures(2)
    full, visual = logits_of(model, batch_of(samples, seen)), {"a.png": seen[0], "b.png": seen[1]}
    for order in ((0,), (1,), (2,), (2, 0, 1), (1, 2), (2, 1, 0), (0, 0, 2)):
        some = [samples[i] for i in order]
        found = logits_of(model, batch_of(some, [visual[s.image] for s in some if s.image]))
        for row, s, i in zip(found, some, order):
            assert close(row[:len(s.ids)], full[i, :len(s.ids)])
    assert not close(full[0, :20], full[2, :20], 1e-2)


@torch.no_grad()
def test_with_use_id_minus_one_no_language_expert_takes_part():
    model, batch = trained(visual_expert="none", language_expert="all"), whole_batch()
    none = torch.full_like(batch.ids, -1)
    found = model(dataclasses.replace(batch, pool_id=none, use_id=none, turns=1, at=None))
    assert torch.equal(found, logits_of(static(model), batch)) and not close(
        found, logits_of(model, batch), 1e-2)


@torch.no_grad()
def test_a_prompt_ends_where_training_starts_to_predict_the_answer():
    model = trained()
    whole = conversations()[0]
    full = logits_of(model, batch_of([whole], pictures(1)))[0]
    for turn, (prompt, _) in enumerate(segments(whole)):
        asked = encode_prompt(TURNS[:turn], TURNS[turn][0], TOKENIZER, LAYOUT, "a.png")
        n = prompt.stop
        for name in ("ids", "pool_id", "use_id"):
            assert getattr(asked, name).tolist() == getattr(whole, name)[:n].tolist()
        assert close(logits_of(model, batch_of([asked], pictures(1)))[0], full[:n])


# ---- The start


@pytest.mark.parametrize("where", ["posterior", "anterior", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_at_the_start_the_model_is_llava_bit_for_bit(where, dtype):
    torch.manual_seed(0)
    model = VLM(config(visual_expert="both", language_expert=where)).to(dtype)
    batch = batch_of(conversations(), pictures(2, dtype), dtype)
    assert torch.equal(logits_of(model, batch), logits_of(static(model), batch))
    model = trained(dtype, language_expert=where)
    assert not torch.equal(logits_of(model, batch), logits_of(static(model), batch))


@kinds
def test_the_first_step_moves_the_up_projections_alone_and_the_second_every_part_of_every_expert(
    kind):
    torch.manual_seed(0)
    model = VLM(config(**kind))
    batch = batch_of(conversations(), pictures(2, torch.float32), torch.float32)
    experts = new_weights(model)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    moving = []
    for _ in range(2):
        optimiser.zero_grad()
        logits = model(batch)
        F.cross_entropy(logits, batch.target).backward()
        moving.append({name for name, p in experts.items() if p.grad is not None and p.grad.any()})
        optimiser.step()
    assert moving[0] == {name for name in experts if name.endswith((".up", ".up.weight"))}
    assert moving[1] == set(experts) and len(experts) > 0


# ---- Generation


def talker(**kind):
    return trained(torch.float32, seed=3, **kind)


def first_logits(model, batch, monkeypatch):
    """What `sample_token` is given at the first step, float[B, V]."""
    seen = []

    def likeliest(logits, *rest):
        seen.append(logits)
        return logits.argmax(-1)

    with monkeypatch.context() as patch:
        patch.setattr("model.sample_token", likeliest)
        generate(model, batch, 1, eos=-1)
    return seen[0]


@kinds
def test_a_batch_of_prompts_gets_the_answers_that_each_gets_alone(kind, monkeypatch):
    model, batch = talker(**kind), prompts()
    assert len(set(batch.lengths.tolist())) == len(PROMPTS)
    together, logits = generate(model, batch, 12, eos=-1), first_logits(model, batch, monkeypatch)
    assert len({tuple(row) for row in together}) == len(PROMPTS)
    for i in range(len(PROMPTS)):
        assert generate(model, prompts([i]), 12, eos=-1) == [together[i]]
        assert close(first_logits(model, prompts([i]), monkeypatch)[0], logits[i], 1e-5)
    assert generate(model, prompts([3, 1, 0]), 12, eos=-1) == [together[i] for i in (3, 1, 0)]


@kinds
@torch.no_grad()
def test_greedy_answers_are_the_likeliest_tokens_of_the_whole_sequence_without_a_cache(kind):
    model, batch = talker(**kind), prompts()
    for b, row in enumerate(generate(model, batch, 8, eos=-1)):
        n, one = int(batch.lengths[b]), prompts([b])
        ids = torch.cat([one.ids, torch.tensor([row])], 1)
        pool_id = torch.cat([one.pool_id, torch.full((1, 8), -1)], 1)
        use_id = torch.cat([one.use_id, one.use_id[:, -1:].expand(1, 8)], 1)
        whole = dataclasses.replace(one, ids=ids, pool_id=pool_id, use_id=use_id, at=None)
        logits = model(whole)[0]
        assert logits[n - 1:-1].argmax(-1).tolist() == row


def test_each_row_stops_at_its_own_end_token():
    model, batch = talker(), prompts()
    endless = generate(model, batch, 20, eos=-1)
    counts = Counter(token for row in endless for token in set(row))
    # where rows would end if t were eos
    places = {t: {row.index(t) for row in endless if t in row} for t in counts}
    eos = next(t for t, n in counts.most_common() if 1 < n < len(endless) and len(places[t]) > 1)
    expected = [row[:row.index(eos)] if eos in row else row for row in endless]
    assert generate(model, batch, 20, eos=eos) == expected and len(set(map(len, expected))) > 2
    steps = torch.stack(list(stream(model, batch, 20, eos)), 1)
    assert all((row[len(answer):] == eos).all() for row, answer in zip(steps, expected))

    ending = [i for i, row in enumerate(endless) if eos in row]
    steps = list(stream(model, prompts(ending), 20, eos))
    assert len(steps) == 1 + max(len(expected[i]) for i in ending)


def test_weights_are_generated_once_for_an_answer_however_long():
    model, calls = talker(**EVERY), Counter()
    for name, part in model.named_modules():
        if isinstance(part, (HyperNetwork, Expert)):
            part.register_forward_hook(lambda *_, name=name: calls.update([name]))
    assert len(generate(model, prompts(), 9, eos=-1)[0]) == 9
    assert calls["llm.hypernet"] == LLAMA.depth  # once for each site, all turns at once
    assert calls["projector.expert_1.hypernet"] == calls["projector.expert_2.hypernet"] == 1
    assert all(calls[f"llm.layers.{n}.expert"] == 9 for n in range(LLAMA.depth))


def test_another_question_makes_other_weights_and_they_last_for_the_answer():
    model, batch, used = talker(), prompts([2]), []
    expert = model.llm.layers[-1].expert
    expert.register_forward_pre_hook(lambda part, inputs: used.append((inputs[1][0], inputs[2])))
    generate(model, batch, 4, eos=-1)
    made = used[0][0]
    assert made.shape[:2] == (1, 3) and (made[0, 2] - made[0, 1]).abs().max() > 1e-3
    for kept, use_id in used[1:]:
        assert torch.equal(kept[0, 0], made[0, 2]) and use_id is None
