"""What baselines.py claims: the rows of the paper's Tables 5 and 6. One test per sentence.

They differ in where the weights of experts come from. Up-projections start at zero, which hides
leaks and mixed-up rows: `tuned` draws them at random.
"""
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import benchmarks.ablation
import formats.weight_files
import train
import training.options
import training.sharding
import weights
from baselines import (BaselineConfig, LatentExpert, LoRA, LoRALinear, MatrixExpert,
    MatrixNetwork)
from cli import UserError
from data import Preprocess
from hypernet import Expert, HyperNetwork
from model import generate, VLMConfig
from tests.helpers import (batch_of, by_steps, close, conversations, count_flops, EVEN, GROUPED,
    hf_clip, hf_llama, LLAMA, logits_of, noise, pictures, prompts, row_of_text, static, TOKENIZER,
    TOWER, VISION, whole_batch)
from training.costs import forward_flops

SOURCES = ["hyper", "static", "latent", "mlp", "lora", "gates"]
GUIDED = ("hyper", "mlp", "gates")
sources = pytest.mark.parametrize("source", SOURCES)
D, C, E, R, HIDDEN = LLAMA.width, VISION.width, 8, 4, LLAMA.hidden


def fields(source, language="all", visual="both"):
    """Options of make_config for experts at these places; LoRA changes only the Llama."""
    visual = "none" if source == "lora" else visual
    return dict(weight_source=source, language_expert=language, visual_expert=visual)


def config(**options):
    return weights.make_config(VISION, LLAMA, **{"expert_embed": E, "expert_rank": R, **options})


def build(cfg):
    """The model of a config, with random weights."""
    return weights.MODELS[type(cfg)](cfg)


def tuned(source, dtype=torch.float64, language="all", visual="both", **more):
    """A random VLM in which experts add as much as the layers beside them."""
    torch.manual_seed(0)
    model = build(config(**fields(source, language, visual), **more)).to(dtype).eval()
    for block in [*model.vision.layers, *model.llm.layers]:
        for part in block.self_attn.children():
            torch.nn.init.normal_(part.weight, std=(2 / part.in_features) ** 0.5)
    for part in model.modules():
        if isinstance(part, (Expert, MatrixExpert, LoRA)):
            torch.nn.init.normal_(part.up, std=0.1 if isinstance(part, MatrixExpert) else 0.5)
        elif isinstance(part, (HyperNetwork, MatrixNetwork)):
            torch.nn.init.normal_(part.up.weight, std=1.0)
    return model


def added(model):
    """{name: parameter} of all that the source adds to LLaVA."""
    plain = weights.names_of(VLMConfig(model.cfg.vision, model.cfg.llm, "none", "none"))
    return {name: p for name, p in model.named_parameters() if name not in plain}


# ---- The start


@sources
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_at_the_start_the_model_is_llava_bit_for_bit_whatever_the_source(source, dtype):
    torch.manual_seed(0)
    model = build(config(**fields(source))).to(dtype)
    batch = batch_of(conversations(), pictures(2, dtype), dtype)
    assert torch.equal(logits_of(model, batch), logits_of(static(model), batch))
    model = tuned(source, dtype)
    assert not close(logits_of(model, batch), logits_of(static(model), batch), 1e-2)


@sources
def test_the_first_step_moves_up_projections_alone_and_the_second_all_that_was_added(source):
    torch.manual_seed(0)
    model = build(config(**fields(source)))
    batch = batch_of(conversations(), pictures(2, torch.float32), torch.float32)
    new, moving = added(model), []
    optimiser = torch.optim.AdamW(new.values(), lr=1e-3, weight_decay=0)
    for _ in range(2):
        optimiser.zero_grad()
        F.cross_entropy(model(batch), batch.target).backward()
        moving.append({name for name, p in new.items() if p.grad is not None and p.grad.any()})
        optimiser.step()
    assert moving[0] == {name for name in new
                         if name.endswith((".up", ".up.weight"))} and moving[1] == set(new)


# ---- Whose weights


def made(model, batch):
    """{name of an expert: the weights that it ran with}."""
    found = {}
    handles = [part.register_forward_pre_hook(lambda m, inputs,
                                              name=name: found.update({name: inputs[1]}))
               for name, part in model.named_modules() if isinstance(part, (Expert, MatrixExpert))]
    logits_of(model, batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("source", ["hyper", "static", "latent", "mlp", "gates"])
@torch.no_grad()
def test_static_and_latent_weights_are_the_same_for_all_and_generated_ones_each_turns_own(source):
    model = tuned(source, language="posterior")
    def generated(batch):  # W_d of "gates" is learned
        return {name: parts[source == "gates":] for name, parts in made(model, batch).items()}

    found = generated(whole_batch())
    assert len(found) == 2 + 2
    for name, parts in found.items():
        for w in parts:
            if source in ("static", "latent"):
                assert w.shape[:2] == (1, 1)
            else:
                rows = [w[0, 0], w[1, 0]] if "projector" in name else [w[0, 0], w[0, 1], w[0, 2],
                                                                       w[2, 0]]
                assert all((a - b).abs().max() > 1e-3 for i,
                           a in enumerate(rows) for b in rows[:i]), name
    others = generated(batch_of(conversations(), pictures(2, seed=9)))
    same = [torch.equal(a, b) for name in found for a, b in zip(found[name], others[name])]
    assert all(same) if source in ("static", "latent") else not any(same)


@sources
@torch.no_grad()
def test_another_picture_or_question_changes_generated_weights_only(source):
    """The shift that one block's expert adds to the same features, for two guidances."""
    model = tuned(source)
    block = model.llm.layers[1]
    x = torch.randn(1, 5, D, dtype=torch.float64)
    if source == "lora":
        assert block.expert is None and isinstance(block.mlp.up_proj, LoRALinear)
        return
    g = torch.randn(2, 1, 1, D, dtype=torch.float64)
    shifts = [block.expert(x, block.expert.weights(one, model.llm.hypernet)) for one in g]
    assert torch.equal(*shifts) == (source in ("static", "latent")) and shifts[0].abs().max() > 0.01


# ---- Equations


def test_a_static_expert_is_the_adapter_of_equation_5_with_weights_of_its_own():
    model, x = tuned("static"), torch.randn(2, 3, D).double()
    expert = model.llm.layers[0].expert
    gate, value = (x @ expert.down.T).chunk(2, -1)
    assert torch.allclose(expert(x, expert.weights(None, None)), (F.silu(gate) * value) @ expert.up)


def test_a_gated_expert_multiplies_each_hidden_unit_by_a_factor_of_its_turn():
    expert = tuned("gates").llm.layers[0].expert
    x, g = torch.randn(2, 5, D).double(), torch.randn(2, 3, D).double()
    use_id = torch.tensor([[0, 1, 2, -1, 1], [2, 2, 0, 0, -1]])
    shift = expert(x, expert.weights(g, None), use_id)
    for b in range(2):
        for i in range(5):
            if use_id[b, i] < 0:
                assert not shift[b, i].any()
                continue
            f = g[b, use_id[b, i]] / (g[b, use_id[b, i]].square().mean() + 1e-6).sqrt()
            e = expert.encoder.weight @ (f * E ** 0.5 / D) + expert.encoder.bias
            factor = 1 + expert.project.weight @ (D / E * F.silu(e)) + expert.project.bias
            gate, value = (expert.down @ x[b, i]).chunk(2)
            expected = (F.silu(gate) * value * factor) @ expert.up
            assert torch.allclose(shift[b, i], expected) and (factor - 1).abs().min() > 1e-4


def test_a_latent_expert_is_equation_4_of_a_learned_vector():
    model = tuned("latent")
    expert, net = model.llm.layers[2].expert, model.llm.hypernet
    assert isinstance(expert, LatentExpert)
    a = F.silu(net.trunk.weight @ expert.encoder.weight.flatten() + net.trunk.bias) * E ** -0.5
    down, up = expert.weights(None, net)
    assert torch.allclose(down[0, 0], expert.down + (net.down.weight @ a).view(2 * R, D))
    assert torch.allclose(up[0, 0], expert.up + (net.up.weight @ a).view(R, D))


def test_a_matrix_expert_is_one_generated_linear_map_for_each_turn():
    model, x, g = tuned("mlp"), torch.randn(2, 4, D).double(), torch.randn(2, 3, D).double()
    expert, net = model.llm.layers[0].expert, model.llm.hypernet
    use_id = torch.tensor([[0, 1, 2, -1], [2, 2, 0, 1]])
    shift = expert(x, expert.weights(g, net), use_id)
    for b in range(2):
        for i, turn in enumerate(use_id[b].tolist()):
            guidance = g[b, turn] / (g[b, turn].square().mean() + 1e-6).sqrt()
            e = expert.encoder.weight @ (guidance * E ** 0.5 / D) + expert.encoder.bias
            a = F.silu(net.trunk.weight @ e + net.trunk.bias) * E ** -0.5
            expected = x[b, i] @ (expert.up + (net.up.weight @ a).view(D, D)) * (turn >= 0)
            assert torch.allclose(shift[b, i], expected) and (turn < 0 or expected.abs().max() > 0)


def test_the_encoder_of_a_matrix_expert_starts_as_that_of_an_expert():
    torch.manual_seed(0)
    matrix, expert = MatrixExpert(D, D, D, E, R), Expert(D, D, D, E, R)
    for part in (matrix, expert):
        torch.manual_seed(1)
        part.reset_parameters()
    assert torch.equal(matrix.encoder.weight, expert.encoder.weight)


@pytest.mark.parametrize("source", ["static", "latent", "lora"])
def test_what_reads_no_guidance_is_the_same_in_checkpoints_of_version_1(source):
    model = tuned(source)
    before = {name: p.clone() for name, p in model.named_parameters()}
    weights.rescale_encoders(model)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


def test_lora_is_the_explicit_change_of_seven_matrices_with_alpha_twice_the_rank():
    model, batch = tuned("lora", language="posterior"), whole_batch()
    found, plain = logits_of(model, batch), static(model)
    before = logits_of(plain, batch)
    for n, (block, own) in enumerate(zip(plain.llm.layers, model.llm.layers)):
        linears = {name: part for name, part in own.named_modules() if isinstance(part, LoRALinear)}
        assert len(linears) == (7 if n >= 2 else 0)
        for name, part in linears.items():
            assert torch.linalg.matrix_rank(part.lora.down @ part.lora.up) == R
            block.get_submodule(name).weight.data += 2 * (part.lora.down @ part.lora.up).T
    assert close(logits_of(plain, batch), found, 1e-9) and not close(before, found, 1e-2)


# ---- Rows, turns, decoding


@sources
@torch.no_grad()
def test_rows_are_strangers_and_decoding_in_steps_is_the_whole_pass(source):
    model, samples, seen = tuned(source), conversations(), pictures(2)
    full, visual = logits_of(model, batch_of(samples, seen)), {"a.png": seen[0], "b.png": seen[1]}
    for order in ((0,), (1,), (2,), (2, 0, 1), (0, 0, 2)):
        some = [samples[i] for i in order]
        found = logits_of(model, batch_of(some, [visual[s.image] for s in some if s.image]))
        for row, s, i in zip(found, some, order):
            assert close(row[:len(s.ids)], full[i, :len(s.ids)])
    for rows in ([0], [0, 0]):
        cached = by_steps(model, [samples[i] for i in rows], torch.stack([seen[0]] * len(rows)),
                          200)
        assert all(close(found, full[0, :len(samples[0].ids)]) for found in cached)


@sources
@torch.no_grad()
def test_a_batch_with_unequal_numbers_of_turns_is_answered_as_the_whole_sequences_say(source):
    model, batch = tuned(source, torch.float32), prompts()
    assert batch.turns == 3 and batch.use_id.amax(1).min() == 0
    for b, row in enumerate(generate(model, batch, 6, eos=-1)):
        n, one = int(batch.lengths[b]), prompts([b])
        ids = torch.cat([one.ids, torch.tensor([row])], 1)
        pool_id = torch.cat([one.pool_id, torch.full((1, 6), -1)], 1)
        use_id = torch.cat([one.use_id, one.use_id[:, -1:].expand(1, 6)], 1)
        whole = dataclasses.replace(one, ids=ids, pool_id=pool_id, use_id=use_id, at=None)
        assert model(whole)[0, n - 1:-1].argmax(-1).tolist() == row


@sources
def test_no_trained_position_knows_what_comes_after_it_whatever_the_source(source):
    model, batch = tuned(source), whole_batch()
    x = model.llm.embed_tokens(batch.ids).detach().requires_grad_()
    logits = model.llm.head(model.llm(x, batch))
    for p in batch.at[::4].tolist():
        b, i = divmod(p, batch.ids.shape[1])
        gradient, = torch.autograd.grad(logits[b, i].sum(), x, retain_graph=True)
        assert not gradient[b, i + 1:].any() and gradient[b, :i + 1].any()
    # pools guidance over answers, too
    over_answers = dataclasses.replace(batch, pool_id=batch.use_id)
    leaking = model.llm.head(model.llm(x, over_answers))
    b, i = divmod(batch.at[0].item(), batch.ids.shape[1])
    gradient, = torch.autograd.grad(leaking[b, i].sum(), x)
    assert gradient[b, i + 1:].any() == (source in GUIDED)


@sources
@torch.no_grad()
def test_with_its_up_projections_at_zero_any_model_is_llava_again(source):
    model, batch = tuned(source, torch.float32), batch_of(conversations(),
                                                          pictures(2, torch.float32), torch.float32)
    before = logits_of(model, batch)
    with benchmarks.ablation.experts_off(model):
        assert torch.equal(logits_of(model, batch), logits_of(static(model), batch))
    assert torch.equal(logits_of(model, batch), before)


@sources
@torch.no_grad()
def test_with_anothers_generated_weights_an_answer_changes_and_with_everyones_it_does_not(source):
    model, batch = tuned(source, torch.float32), batch_of(conversations(),
                                                          pictures(2, torch.float32), torch.float32)
    before = logits_of(model, batch)
    with benchmarks.ablation.experts_swapped(model):
        assert close(logits_of(model, batch), before, 1e-6) == (source not in GUIDED)


# ---- Names and counts


def matrix(inputs, outputs):
    return (inputs * E + E) + inputs * outputs  # E_n, b^(n)


NUMBERS = {  # parameters of one site, with G = inputs; parameters that a modality shares
    "hyper": (lambda i, o: i * E + E + R * (2 * i + o), lambda i,
              o: E * E + E + E * R * (2 * i + o)),
    "static": (lambda i, o: R * (2 * i + o), lambda i, o: 0),
    "latent": (lambda i, o: E + R * (2 * i + o), lambda i, o: E * E + E + E * R * (2 * i + o)),
    "mlp": (matrix, lambda i, o: E * E + E + E * i * o),
    "gates": (lambda i, o: i * E + E + E * R + R + R * (2 * i + o), lambda i, o: 0)}


@pytest.mark.parametrize("source", list(NUMBERS))
@pytest.mark.parametrize("language, sites",
                         [("none", []), ("anterior", [0, 1]), ("posterior", [2, 3]),
                          ("all", [0, 1, 2, 3])])
@pytest.mark.parametrize("visual", ["none", "1", "2", "both"])
def test_a_row_adds_exactly_the_parameters_that_the_formulas_say(source, language, sites, visual):
    own, shared = NUMBERS[source]
    new = added(weights.build_empty(config(**fields(source, language, visual))))
    counts = {}
    for name, p in new.items():
        part = ".".join(name.split(".")[:4] if ".layers." in name else name.split(".")[:2])
        counts[part] = counts.get(part, 0) + p.numel()
    expected = {f"llm.layers.{n}.expert": own(D, D) for n in sites}
    expected |= {f"projector.expert_{k}": own(w, D) + shared(w, D) for k,
                 w in ((1, C), (2, D)) if visual in (str(k), "both")}
    if sites and shared(1, 1):
        expected["llm.hypernet"] = shared(D, D)
    if sites and source in GUIDED:
        expected["llm.guidance_norm"] = D
    assert counts == expected


@pytest.mark.parametrize("language, sites",
                         [("none", 0), ("anterior", 2), ("posterior", 2), ("all", 4)])
def test_lora_adds_two_thin_matrices_to_each_linear_of_its_blocks(language, sites):
    new = added(weights.build_empty(config(**fields("lora", language))))
    kv = LLAMA.kv_heads * D // LLAMA.heads
    one = R * (2 * 2 * D + 2 * (D + kv) + 3 * (D + HIDDEN))
    assert sum(p.numel() for p in new.values()) == sites * one and len(new) == sites * 14
    assert all(".lora." in name for name in new)


def test_llavas_lora_of_7b_has_the_319_million_parameters_of_its_recipe():
    cfg = BaselineConfig(visual_expert="none", language_expert="all", weight_source="lora",
                         expert_rank=128)
    assert sum(p.numel() for p in added(weights.build_empty(cfg)).values()) == 319_815_680


@pytest.mark.parametrize("flag, value, other", [
    ("expert_rank", 4, 5), ("expert_embed", 8, 9), ("guidance_after", 2, 3),
    ("visual_expert", "1", "2"),
    ("language_expert", "posterior", "all"), ("weight_source", "hyper", "static")])
def test_a_flag_changes_what_it_names_and_nothing_of_llava(flag, value, other):
    shapes = []
    for choice in (value, other):
        kind = {"visual_expert": "1", "language_expert": "posterior", flag: choice}
        model = weights.build_empty(config(**kind))
        shapes.append({name: tuple(p.shape) for name, p in model.named_parameters()})
    changed = {name for name in shapes[0].keys() | shapes[1].keys()
               if shapes[0].get(name) != shapes[1].get(name)}
    roots = {"expert_rank": {"down", "up"}, "expert_embed": {"encoder", "trunk", "down", "up"}}
    assert changed and all("expert" in name
                           or name.startswith(("llm.hypernet", "llm.guidance_norm"))
                           for name in changed)
    if flag in roots:
        assert {next(w for w in reversed(name.split(".")) if w not in ("weight", "bias"))
                for name in changed} == roots[flag]
    if flag == "expert_embed":
        assert not any(name.endswith(("expert.down", "expert.up")) for name in changed)
    if flag == "guidance_after":
        assert {name.split(".")[2] for name in changed} == {"2"}
    if flag == "visual_expert":
        assert all(name.startswith("projector.expert_") for name in changed)
    if flag == "language_expert":
        assert {name.split(".")[2] for name in changed} == {"0", "1"}
    if flag == "weight_source":
        assert not any(name.endswith(("expert.down", "expert.up")) for name in changed)


# ---- What it costs


@sources
@pytest.mark.parametrize("llm, places, turns",
                         [(GROUPED, ("posterior", "1"), 1), (EVEN, ("all", "both"), 3)],
                         ids=["paper's places", "everywhere, 3 turns"])
def test_the_count_of_operations_is_what_torch_counts_whatever_the_source(source, llm, places,
                                                                          turns):
    cfg = weights.make_config(TOWER, llm, expert_embed=12, expert_rank=5, **fields(source, *places))
    vlm, batch = build(cfg), row_of_text(cfg, 9, turns=turns)
    found = count_flops(lambda: vlm(batch), vlm)
    assert sum(found["Global"].values()) == sum(forward_flops(cfg, 9, turns).values())


# ---- Refusals


def test_whole_matrices_are_for_small_models_and_lora_is_for_the_llama():
    words = "weight_source mlp .* with 1,073,741,824 numbers for one of 4096 x 4096"
    with pytest.raises(UserError, match=words):
        BaselineConfig(weight_source="mlp")
    with pytest.raises(UserError,
                       match="visual_expert 1: weight_source lora changes only the Llama"):
        BaselineConfig(weight_source="lora")


# ---- Checkpoints and training


@sources
def test_a_checkpoint_keeps_the_source_of_its_weights(source, tmp_path):
    model = tuned(source, torch.float32)
    state = {n: p.detach() for n, p in model.named_parameters()}
    weights.save(str(tmp_path / "x"), model.cfg, state, TOKENIZER, Preprocess(28), "", stage=2,
                 sources={}, training={})
    batch = batch_of(conversations(), pictures(2, torch.float32), torch.float32)
    point = weights.load(str(tmp_path / "x"))
    assert point.model.cfg == model.cfg and close(logits_of(point.model, batch),
                                                  logits_of(model, batch), 1e-6)
    asked = {**fields(source), "expert_embed": E, "expert_rank": R}
    other = "latent" if source == "static" else "static"
    with pytest.raises(UserError, match=f"weight_source is {source} there, not {other}"):
        weights.load(str(tmp_path / "x"), experts={**asked, "weight_source": other})
    broken = {n: t for n, t in state.items()
              if not n.endswith(("layers.3.expert.up", "layers.3.mlp.up_proj.lora.up"))}
    weights.save(str(tmp_path / "x"), model.cfg, broken, TOKENIZER, Preprocess(28), "", stage=2,
                 sources={}, training={})
    with pytest.raises(UserError, match="no tensor for llm.layers.3"):
        weights.load(str(tmp_path / "x"))


@pytest.fixture(scope="module")
def given(tmp_path_factory, mesh):
    """Options of a stage 2 on four pictures, which starts from a stage 1 without visual experts."""
    root = tmp_path_factory.mktemp("data")
    hf_clip().save_pretrained(root / "clip")
    hf_llama(num_hidden_layers=4, vocab_size=TOKENIZER.vocab).save_pretrained(root / "llama")
    TOKENIZER.save(root / "llama")
    turn = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    records = [{"id": str(i), "image": f"{i}.png",
                "conversations": turn("<image>\nHow many?", f"{i}.")} for i in range(4)]
    (root / "captions.json").write_text(json.dumps(records))
    for i, record in enumerate(records):
        noise(i).save(root / f"{i}.png")
        record["conversations"] += turn("Is there a square?", "no.")
    (root / "talks.json").write_text(json.dumps(records))
    options = {"preset": "7b", "images": str(root), "batch_size": 4, "steps": 3, "workers": 0,
               "dtype": "float32", "device": "cpu",
               "context": 128, "checkpointing": "none", "system": "", "lr": 1e-2, "warmup": 0.0,
               "visual_expert": "none",
               "expert_embed": 4, "expert_rank": 2, "vision": str(root / "clip"),
               "llm": str(root / "llama"),
               "allow_random_llm": True}
    train.run_stage(options | {"data": str(root / "captions.json"), "out": str(root / "out"),
                               "steps": 1}, 1, mesh)
    return options | {"data": str(root / "talks.json"), "init": str(root / "out" / "stage1")}


@sources
@pytest.mark.parametrize("tune", ["full", "peft"])
def test_stage_2_trains_what_its_source_adds_and_the_llama_only_if_asked_to(given, mesh, tmp_path,
                                                                            source, tune):
    """And the linear layers beside a LoRA start as they were stored."""
    o = training.options.complete(
        given | {"out": str(tmp_path), "weight_source": source, "tune": tune}, 2)
    (tmp_path / "stage2").mkdir()
    stage, after = train.vlm_stage(o), {}
    before = {n: p.detach().clone() for n, p in stage.model.named_parameters()}
    llama = {n: t for n, t, _ in formats.weight_files.tensors(given["llm"])}
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        assert torch.equal(before[f"llm.layers.3.{name}.weight"],
                           llama[f"model.layers.3.{name}.weight"])
    new = set(added(stage.model))
    stage.write, stage.keeps = after.update, ("",)
    train.train(stage, o, mesh)
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert len(new) > 0 and new <= moved
    assert moved == {n for n in before if n in new or n.startswith("projector.") or tune == "full"
                     and n.startswith("llm.")}
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "stage2" / "log.jsonl")]
    assert losses[2] < losses[0]


def losses_of(options, folder, mesh):
    train.run_stage(options | {"out": str(folder)}, 2, mesh)
    lines = (folder / "stage2" / "log.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_dropout_of_lora_changes_the_steps_and_a_resumed_run_draws_the_same(given, mesh, tmp_path,
                                                                           monkeypatch):
    options = given | {"weight_source": "lora", "tune": "peft", "steps": 4, "save_every": 2,
                       "lora_dropout": 0.5, "projector_lr": 1e-3}
    whole = losses_of(options, tmp_path / "whole", mesh)
    without = losses_of(options | {"lora_dropout": 0.0}, tmp_path / "without", mesh)
    assert whole[0] == without[0]  # the change starts at zero
    assert all(a != b for a, b in zip(whole[2:], without[2:]))

    def stopping(model, optimisers, batches, step, *args, go_on=train.train_step, **more):
        if step == 3:
            raise KeyboardInterrupt
        return go_on(model, optimisers, batches, step, *args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", stopping)
        losses_of(options, tmp_path / "broken", mesh)
    torch.rand(7)  # another process draws from another place
    assert losses_of(options | {"resume": True}, tmp_path / "broken", mesh) == whole


def test_lora_drops_nothing_without_gradients():
    model, batch = tuned("lora", torch.float32), prompts()
    before = logits_of(model, batch)
    training.sharding.set_modules(model, eager=False, dropout=0.5)
    assert not torch.allclose(logits_of(model, batch), before)
    with torch.no_grad():
        assert torch.equal(logits_of(model, batch), before)
