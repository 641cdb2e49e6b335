"""What vlora.py and flops.py claim, one test per sentence. CPU, no network.

W_s starts at zero, where a wrong product, a leak and a mixed-up row all go unseen: `drawn` makes it random.
"""
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig as TheirConfig
from transformers import LlamaForCausalLM

import model
import weights
from cli import UserError
from flops import flops, paper_flops
from model import CLIP, VLM, LlamaConfig, VisionConfig, VLMConfig, rotary
from vlora import SITES, Decoder, Generator, PerceptualWeights, VLoRAConfig, branch, merged, skip_tag, vlora_rules

torch.set_num_threads(1)

VISION = VisionConfig(image_size=28, patch=14, width=12, depth=1, heads=2, hidden=20)
LLAMA = LlamaConfig(width=32, depth=5, heads=4, kv_heads=4, hidden=48, vocab=64, context=64)
SMALL = VLoRAConfig(every=2, rank=3, embed=16, depth=2, heads=4)


# ---- A Llama that runs with generated weights: model.py's, with `branch` around five of its modules


class Attention(model.Attention):
    def forward(self, x, cos, sin, delta, memory=None):
        B, T, _ = x.shape
        parts = zip("qkv", (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (branch(p, x, delta, site).view(B, T, -1, self.width).transpose(1, 2) for site, p in parts)
        q, k = model.rotate(q, cos, sin), model.rotate(k, cos, sin)
        if memory is None:
            out = model.attend(q, k, v, causal=True)
        else:
            out = model.attend(q, *memory.update(k, v), mask=memory.mask)
        return branch(self.o_proj, out.transpose(1, 2).reshape(B, T, -1), delta, "o")


class Block(model.Block):
    def forward(self, x, cos, sin, delta, memory=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, delta, memory)
        return x + branch(self.mlp, self.post_attention_layernorm(x), delta, "m")


class Llama(model.Llama):
    def forward(self, x, deltas, tag=None, cache=None, lengths=None):
        positions = torch.arange(x.shape[1])[None] if cache is None else cache.advance(x.shape[1], lengths)
        positions = positions if tag is None else skip_tag(positions, tag)
        cos, sin = rotary(positions, self.cfg.width // self.cfg.heads, self.cfg.theta)
        for n, block in enumerate(self.layers):
            x = block(x, cos, sin, deltas[n], cache and cache.blocks[n])
        return self.head(self.norm(x))


def plain_llama(cfg=LLAMA, dtype=torch.float64):
    torch.manual_seed(0)
    llama = model.Llama(cfg, VLMConfig(VISION, cfg, "none", "none")).to(dtype)
    for block in llama.layers:
        for part in block.self_attn.children():
            nn.init.normal_(part.weight, std=(2 / part.in_features) ** 0.5)
    return llama


def perceiving(llama):
    """The same Llama, run with generated weights."""
    llama.__class__ = Llama
    for block in llama.layers:
        block.__class__, block.self_attn.__class__ = Block, Attention
    return llama


def generators(cfg=SMALL, dtype=torch.float64, llm=LLAMA):
    torch.manual_seed(1)
    return PerceptualWeights(cfg, VISION, llm).to(dtype)


def drawn(part):
    """The same with W_s at random: branches add as much as the weights they stand beside."""
    torch.manual_seed(2)
    nn.init.normal_(part.Bs, std=0.2)
    return part


def features(n, dtype=torch.float64, seed=3):
    return torch.randn(n, VISION.tokens, VISION.width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prompts(llama, rows, T=9, same=False):
    ids = torch.randint(0, LLAMA.vocab, (1 if same else rows, T), generator=torch.Generator().manual_seed(4))
    return llama.embed_tokens(ids.expand(rows, -1)).detach()


def close(a, b, tolerance):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * b.abs().max()


def size(part):
    return sum(p.numel() for p in part.parameters())


# ---- The authors' modules, as far as names, shapes and order of operations go; a reference for ours


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
        self.gen = nn.ModuleList(TheirGenerator(cfg.embed, cfg.depth, cfg.heads, queries, llm.width * cfg.rank)
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
    with torch.device("meta"), weights.Undrawn():
        shell = in_a_model(PerceptualWeights(SMALL, VISION, LLAMA))
    weights.fill(shell, [(str(folder), vlora_rules())])
    return shell.perceptual


def test_each_of_the_749_published_tensors_has_its_place_and_no_place_is_left():
    with torch.device("meta"):
        theirs = published(Theirs(VLoRAConfig(), VisionConfig(), LlamaConfig()))
        ours = in_a_model(PerceptualWeights(VLoRAConfig(), VisionConfig(), LlamaConfig())).state_dict()
    norms, attention = ["weight", "bias"], ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    block = [f"{a}.{p}" for a in ("self_attn", "multihead_attn") for p in attention]
    block += [f"{m}.{p}" for m in ("linear1", "linear2", "norm1", "norm2", "norm3") for p in norms]
    one = ["queries", "norm.weight", "norm.bias", "weights_head.weight", "weights_head.bias"]
    one += [f"decoders.{i}.{name}" for i in range(8) for name in block]
    names = ["visual_proj.weight", "visual_proj.bias", "pos_embed", "Bs"]
    names += [f"gen.{g}.{name}" for g in range(5) for name in one]
    assert len(names) == 749 and set(theirs) == {f"model.mm_projector.{n}" for n in names}
    mapped = {weights.rename(name, vlora_rules()): tensor.shape for name, tensor in theirs.items()}
    assert len(mapped) == 749 and mapped == {name: tensor.shape for name, tensor in ours.items()}
    shapes = {"Bs": (1, 40, 262144), "pos_embed": (1, 576, 512), "visual_proj.weight": (512, 1024),
              "gen.4.queries": (1, 8, 512), "gen.0.weights_head.weight": (262144, 512),
              "gen.2.decoders.7.self_attn.in_proj.weight": (1536, 512), "gen.2.decoders.7.linear1.weight": (2048, 512)}
    assert all(mapped[f"perceptual.{name}"] == shape for name, shape in shapes.items())


def test_the_rules_leave_the_llama_and_the_tower_to_others():
    for name in ("model.layers.0.mlp.up_proj.weight", "lm_head.weight", "model.vision_tower.vision_tower.x"):
        assert weights.rename(name, vlora_rules()) is None


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
    with pytest.raises(UserError, match=r"no tensor for perceptual\.gen\.1\.decoders\.0\.self_attn\.in_proj\.bias"):
        loaded({k: v for k, v in state.items() if k != name}, tmp_path)
    with pytest.raises(UserError, match="has no place in the model"):
        loaded({**state, "model.mm_projector.gen.5.queries": torch.zeros(1, 2, 16)}, tmp_path)
    with pytest.raises(UserError, match=r"pos_embed is \[1, 9, 16\]"):
        loaded({**state, "model.mm_projector.pos_embed": torch.zeros(1, 9, 16)}, tmp_path)


# ---- Sizes and first values


def test_the_full_generator_has_as_many_parameters_as_the_authors():
    with torch.device("meta"):
        part = PerceptualWeights(VLoRAConfig(), VisionConfig(), LlamaConfig())
        decoder = Decoder(VLoRAConfig())
    assert size(decoder) == 4_204_032 and size(part) == 851_891_712
    assert size(part.gen[0]) == 168_117_248 and size(part.gen[0].weights_head) == 134_479_872
    assert size(part.visual_proj) + part.pos_embed.numel() == 819_712 and part.Bs.numel() == 10_485_760
    assert list(part.blocks) == [3, 7, 11, 15, 19, 23, 27, 31]


@pytest.mark.parametrize("cfg", [SMALL, VLoRAConfig("qkm", 1, 2, 8, 3, 2), VLoRAConfig("o", 5, 7, 24, 1, 8)],
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


@pytest.mark.parametrize("embed, std", [(512, 0.02), (128, 0.04)])
def test_first_values_are_the_authors_at_their_width_and_as_large_in_effect_at_others(embed, std):
    part = generators(VLoRAConfig("m", every=5, rank=8, embed=embed, depth=1, heads=16), torch.float32)
    g = part.gen[0]
    block = g.decoders[0]
    for linear in (part.visual_proj, g.weights_head, block.linear1, block.multihead_attn.out_proj):
        assert 0.95 * std < linear.weight.std() < 1.05 * std and not linear.bias.any()
    bound = (6 / (4 * embed)) ** 0.5  # Xavier's, for one matrix of E x 3E
    for attention in (block.self_attn, block.multihead_attn):
        assert 0.95 * bound < attention.in_proj.weight.abs().max() <= bound and not attention.in_proj.bias.any()
    assert 0.8 < g.queries.std() < 1.2 and 0.9 < part.pos_embed.std() < 1.1 and not part.Bs.any()
    assert 0.4 < g(torch.randn(1, 4, embed), torch.tensor([0])).std() < 0.5  # W_v


def test_a_generator_built_without_storage_starts_as_one_built_with_it():
    with torch.device("meta"), weights.Undrawn():
        shell = in_a_model(PerceptualWeights(SMALL, VISION, LLAMA))
    weights.initialise(shell, seed=0)
    assert all(p.isfinite().all() and p.device.type == "cpu" for p in shell.parameters())
    built = in_a_model(generators(dtype=torch.float32))
    for p, q in zip(shell.parameters(), built.parameters(), strict=True):  # drawn alike, from another seed
        assert p.shape == q.shape and 0.5 * q.norm() <= p.norm() <= 2 * q.norm()


# ---- What is refused


def test_a_grouped_query_llama_is_refused_with_the_reason():
    grouped = LlamaConfig(width=32, depth=4, heads=4, kv_heads=2, hidden=48, vocab=64)
    with pytest.raises(UserError, match="keys and values are as wide as its states.*kv_heads 2, heads 4"):
        PerceptualWeights(SMALL, VISION, grouped)


@pytest.mark.parametrize("bad, says", [
    (dict(sites="qx"), "sites 'qx'"), (dict(sites="qq"), "each once"), (dict(sites=""), "sites ''"),
    (dict(embed=10, heads=4), "embed 10 does not divide by heads 4"), (dict(rank=0), "rank 0"),
    (dict(every=0), "every 0"),
])
def test_a_choice_that_makes_no_sense_is_refused(bad, says):
    with pytest.raises(UserError, match=says):
        VLoRAConfig(**bad)


def test_a_llama_with_too_few_blocks_is_refused():
    with pytest.raises(UserError, match="only 5 blocks"):
        PerceptualWeights(VLoRAConfig(every=6, embed=16), VISION, LLAMA)


@pytest.mark.parametrize("every, depth, blocks", [(4, 32, [3, 7, 11, 15, 19, 23, 27, 31]), (4, 6, [3]), (2, 5, [1, 3]),
                                                  (1, 3, [0, 1, 2]), (3, 3, [2])])
def test_the_last_of_every_so_many_blocks_is_changed(every, depth, blocks):
    assert list(VLoRAConfig(every=every).blocks(LlamaConfig(depth=depth))) == blocks


# ---- The start


def test_at_the_start_the_model_is_the_plain_llama_bit_for_bit():
    llama, f = plain_llama(dtype=torch.float32), features(2, torch.float32)
    x = prompts(llama, 3)
    expected = llama.head(llama(x))
    deltas = generators(dtype=torch.float32)(f, torch.tensor([0, 1, -1]))
    assert deltas[1]["q"][0].any()
    assert torch.equal(perceiving(llama)(x, deltas), expected)


def gradients(part, llama):
    part.zero_grad()
    logits = llama(prompts(llama, 2), part(features(2), torch.arange(2)))
    F.cross_entropy(logits.flatten(0, 1), torch.arange(logits.shape[0] * logits.shape[1]) % LLAMA.vocab).backward()
    return {name: p.grad.abs().max().item() for name, p in part.named_parameters()}


def test_at_the_start_only_W_s_learns_and_one_step_later_all_of_the_generator_does():
    part, llama = generators(), perceiving(plain_llama())
    first = gradients(part, llama)
    assert first.pop("Bs") > 0 and not any(first.values())
    assert (part.Bs.grad.view(5, 2, -1).abs().amax(-1) > 0).all()  # of each site in each block
    torch.optim.SGD(part.parameters(), lr=1.0).step()
    then = gradients(part, llama)
    assert len(then) == len(dict(part.named_parameters())) and min(then.values()) > 0
    for generator in part.gen:  # in_proj holds three matrices; a bias of keys shifts all scores alike, to no effect
        for block in generator.decoders:
            for attention in (block.self_attn, block.multihead_attn):
                assert all(g.any() for g in attention.in_proj.weight.grad.chunk(3))


def test_a_frozen_llama_learns_to_say_which_picture_it_is_shown():
    llama = perceiving(plain_llama(dtype=torch.float32)).requires_grad_(False)
    part, f, picture = generators(dtype=torch.float32), features(6, torch.float32), torch.arange(6)
    x, optimiser = prompts(llama, 6, same=True), torch.optim.AdamW(part.parameters(), lr=5e-3)
    for _ in range(25):
        logits = llama(x, part(f, picture))[:, -1]
        optimiser.zero_grad()
        F.cross_entropy(logits, picture).backward()
        optimiser.step()
    assert torch.equal(logits.argmax(-1), picture)


# ---- The product x W' + (x W_v) W_s


def test_a_branch_is_the_explicit_product_with_W_plus_the_change():
    part = drawn(generators(dtype=torch.float32))
    deltas = part(features(3, torch.float32), torch.tensor([2, 0, -1, 2]))
    linear, x = nn.Linear(32, 32, bias=False), torch.randn(4, 7, 32)
    for n in (1, 3):
        for site in SITES:
            down, up = deltas[n][site]
            change = torch.stack([w @ up for w in down])  # ΔW, D x D for each row
            explicit = linear(x) + torch.stack([row @ w for row, w in zip(x, change)])
            assert close(branch(linear, x, deltas[n], site), explicit, 1e-5)
            assert not close(linear(x), explicit, 1e-2)
            assert all(torch.linalg.matrix_rank(w) == 3 for w in change[[0, 1, 3]]) and not change[2].any()
            assert not close(x @ change.mT, x @ change, 1e-2)  # nor would its transpose do


def test_a_site_that_is_not_chosen_is_left_alone():
    deltas = drawn(generators(VLoRAConfig("qm", 2, 3, 16, 2, 4)))(features(1), torch.tensor([0]))
    linear, x = nn.Linear(32, 32).double(), torch.randn(1, 7, 32).double()
    assert [sorted(d) for d in deltas] == [[], ["m", "q"], [], ["m", "q"], []]
    assert torch.equal(branch(linear, x, deltas[1], "k"), linear(x))
    assert torch.equal(branch(linear, x, deltas[0], "q"), linear(x))


def test_the_ffns_change_leads_around_the_whole_ffn():
    llama = plain_llama()
    cfg = VLoRAConfig("m", 5, 3, 16, 1, 4)  # in the last block alone
    deltas, x = drawn(generators(cfg))(features(1), torch.tensor([0])), prompts(llama, 1)
    seen = {}
    last = llama.layers[-1]
    hook = last.post_attention_layernorm.register_forward_hook(lambda module, args, out: seen.update(y=out, h=args[0]))
    llama(x)
    hook.remove()
    y, (down, up) = seen["y"], deltas[4]["m"]
    state = seen["h"] + last.mlp.down_proj(F.silu(last.mlp.gate_proj(y)) * last.mlp.up_proj(y)) + y @ down[0] @ up
    assert close(perceiving(llama)(x, deltas), llama.head(llama.norm(state)), 1e-12)


# ---- Rows


def test_a_row_of_text_alone_is_the_plain_llamas_bit_for_bit():
    llama, part = plain_llama(dtype=torch.float32), drawn(generators(dtype=torch.float32))
    x, f = prompts(llama, 3), features(1, torch.float32)
    expected = llama.head(llama(x))
    deltas = part(f, torch.tensor([-1, 0, -1]))
    found = perceiving(llama)(x, deltas)
    assert torch.equal(found[[0, 2]], expected[[0, 2]]) and not close(found[1], expected[1], 1e-2)
    found[[0, 2]].sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in part.parameters())


def test_a_batch_of_text_alone_touches_every_parameter_and_moves_none():
    llama, part = perceiving(plain_llama()), drawn(generators())
    llama(prompts(llama, 2), part(torch.zeros_like(features(1)), torch.tensor([-1, -1]))).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in part.parameters())


def test_other_pictures_make_other_weights_and_other_answers():
    llama, part = perceiving(plain_llama()), drawn(generators())
    deltas = part(features(2), torch.arange(2))
    for n in (1, 3):
        for site in SITES:
            assert not close(deltas[n][site][0][0], deltas[n][site][0][1], 1e-2)
    factors = torch.stack([deltas[n][site][0][0] for n in (1, 3) for site in SITES])
    assert torch.pdist(factors.flatten(1)).min() > 0.1  # nor are those of two sites or blocks alike
    logits = llama(prompts(llama, 2, same=True), deltas)
    assert not close(logits[0], logits[1], 1e-2)


def test_a_row_does_not_know_its_batch_mates():
    llama, part = perceiving(plain_llama()), drawn(generators())
    f, x, picture = features(3), prompts(llama, 5), torch.tensor([1, -1, 0, 2, 1])
    logits = llama(x, part(f, picture))
    order = torch.tensor([3, 0, 4, 2, 1])
    assert close(llama(x[order], part(f, picture[order])), logits[order], 1e-12)
    shuffled = torch.tensor([2, 0, 1])  # f[shuffled][i] is picture shuffled[i]
    where = torch.cat([shuffled.argsort(), torch.tensor([-1])])
    assert close(llama(x, part(f[shuffled], where[picture])), logits, 1e-12)
    for b, m in enumerate(picture.tolist()):
        alone = part(f[[max(m, 0)]], torch.tensor([min(m, 0)]))
        assert close(llama(x[[b]], alone), logits[[b]], 1e-12)


def test_no_position_knows_what_comes_after_it():
    llama, deltas = perceiving(plain_llama()), drawn(generators())(features(2), torch.arange(2))
    x = prompts(llama, 2).requires_grad_()
    for i in range(x.shape[1]):
        gradient, = torch.autograd.grad(llama(x, deltas)[:, i].sum(), x)
        assert not gradient[:, i + 1:].any() and gradient[:, :i + 1].abs().amax(-1).min() > 0


# ---- Merged


@pytest.mark.parametrize("sites", [SITES, "qkvo", "qko", "m"])
def test_merged_weights_answer_as_branches_do(sites):
    llama = perceiving(plain_llama(dtype=torch.float32))
    part = drawn(generators(VLoRAConfig(sites, 2, 3, 16, 2, 4), torch.float32))
    x, f = prompts(llama, 3), features(1, torch.float32)
    with torch.no_grad():
        plain = llama(x, [{}] * LLAMA.depth)
        branches = llama(x, part(f, torch.zeros(3, dtype=torch.int64)))
        with merged(llama.layers, part(f, torch.tensor([0]))) as rest:
            assert all(set(delta) <= {"m"} for delta in rest)
            found = llama(x, rest)
    assert close(found, branches, 1e-5) and not close(plain, branches, 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_after_merging_the_llama_is_what_it_was_bit_for_bit_even_after_an_error(dtype):
    llama, deltas = plain_llama(dtype=dtype), drawn(generators(dtype=dtype))(features(1, dtype), torch.tensor([0]))
    before = dict(llama.named_parameters())
    bits = {name: p.detach().clone() for name, p in before.items()}
    with pytest.raises(KeyboardInterrupt), merged(llama.layers, deltas):
        changed = {name for name, p in llama.named_parameters() if not torch.equal(p, bits[name])}
        assert changed == {f"layers.{n}.self_attn.{site}_proj.weight" for n in (1, 3) for site in "qkvo"}
        assert all(p.dtype == dtype for p in llama.parameters())
        raise KeyboardInterrupt
    after = dict(llama.named_parameters())
    assert all(after[name] is p and torch.equal(p, bits[name]) and p.requires_grad for name, p in before.items())


def test_a_change_is_added_in_fp32_and_rounded_once():
    llama, part = plain_llama(dtype=torch.bfloat16), drawn(generators(dtype=torch.bfloat16))
    deltas = part(features(1, torch.bfloat16), torch.tensor([0]))
    own, (down, up) = llama.layers[1].self_attn.v_proj.weight.detach(), deltas[1]["v"]
    exact = own.double() + (down[0].double() @ up.double()).T
    with merged(llama.layers, deltas):
        assert torch.equal(llama.layers[1].self_attn.v_proj.weight, exact.float().bfloat16())


def test_the_pictures_of_two_rows_are_not_merged_into_one_llama():
    llama, deltas = plain_llama(), drawn(generators())(features(2), torch.arange(2))
    with pytest.raises(AssertionError, match="2 rows"), merged(llama.layers, deltas):
        pass


# ---- Decoding, and the published checkpoint's positions


@pytest.mark.parametrize("tag", [None, torch.tensor([1, -1, 3])], ids=["ours", "published"])
def test_cached_decoding_equals_one_pass(tag):
    llama, part = perceiving(plain_llama()), drawn(generators())
    x, deltas = prompts(llama, 3), part(features(2), torch.tensor([1, -1, 0]))
    whole, cache = llama(x, deltas, tag), model.Cache(LLAMA, 3, 9, "cpu", torch.float64)
    steps = [llama(x[:, a:b], deltas, tag, cache, torch.full((3,), b - a)) for a, b in [(0, 5), (5, 6), (6, 9)]]
    assert close(torch.cat(steps, dim=1), whole, 1e-12)


def test_without_the_hidden_token_the_others_keep_the_positions_they_were_trained_with():
    llama = plain_llama()
    theirs = LlamaForCausalLM(TheirConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
        rms_norm_eps=LLAMA.eps, attn_implementation="eager")).double().eval()
    names = {k if k == "lm_head.weight" else f"model.{k}": v for k, v in llama.state_dict().items()}
    theirs.load_state_dict(names)
    ids = torch.randint(1, 64, (2, 10), generator=torch.Generator().manual_seed(5))
    tags, mask = torch.tensor([1, 6]), torch.ones(2, 10, dtype=torch.int64)
    ids[[0, 1], tags], mask[[0, 1], tags] = 0, 0  # the authors put <unk> there, and nobody attends to it
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=torch.arange(10)[None].expand(2, -1)).logits
        there = mask.bool()
        x = llama.embed_tokens(ids[there].view(2, 9))
        perceiving(llama)
        assert close(llama(x, [{}] * 5, tags), expected[there].view(2, 9, -1), 1e-6)
        assert not close(llama(x, [{}] * 5), expected[there].view(2, 9, -1), 1e-3)


def test_skip_tag_moves_what_follows_the_tag_by_one():
    positions = torch.arange(5)[None]
    assert skip_tag(positions, torch.tensor([2, 0, -1, 5])).tolist() == [
        [0, 1, 3, 4, 5], [1, 2, 3, 4, 5], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
    assert skip_tag(torch.tensor([[7], [1]]), torch.tensor([2, 2])).tolist() == [[8], [1]]


# ---- flops.py


def test_the_papers_figures():
    found = {name: round(count, 1) for name, count in paper_flops().items()}
    assert found == {"text": 412.9, "table": 619.0, "merged": 620.6, "branches": 670.6, "llava": 8027.8}
    for visual, figure in [(32, 827), (256, 3754), (576, 8027)]:  # other rows of its Table 1
        assert int(paper_flops(visual=visual)["llava"] + 0.5 * (visual == 32)) == figure


def test_a_generator_at_full_size_costs_38_gflops_a_picture():
    count = flops(VLMConfig(), 32, vlora=VLoRAConfig())
    assert round(count["generator"] / 1e9, 1) == 38.2 and round(count["branches"] / 32e6, 1) == 41.9


def counted(run, *parts):
    for part in parts:  # the counter's names for modules trip over views of parameters that want gradients
        part.requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_flop_counts()


GROUPED = LlamaConfig(width=64, depth=4, heads=4, kv_heads=2, hidden=80, vocab=50)
EVEN = LlamaConfig(width=32, depth=3, heads=2, kv_heads=2, hidden=100, vocab=70, tied=True)
TOWER = VisionConfig(image_size=56, patch=14, width=24, depth=2, heads=2, hidden=72)


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
    ids = torch.cat([torch.full((B, TOWER.tokens), model.IMAGE), torch.ones(B, text, dtype=torch.int64)], dim=1)
    turn = torch.zeros_like(ids)
    where = None if at is None else torch.arange(at * B)
    found = counted(lambda: vlm(ids, torch.randn(B, 3, 56, 56), turn, turn, turns, where), vlm)
    parts = flops(cfg, text, turns, at)
    assert sum(found["Global"].values()) == B * sum(parts.values())
    assert sum(found["VLM.vision"].values()) == B * parts["vision"]
    if experts == dict(visual_expert="none", language_expert="none"):
        assert sum(found["VLM.projector"].values()) == B * parts["projector"] and not parts["experts"]


@pytest.mark.parametrize("vlora", [SMALL, VLoRAConfig("qkm", 1, 8, 32, 3, 2), VLoRAConfig("o", 3, 2, 48, 1, 8)],
                         ids=lambda v: v.sites)
def test_the_count_for_vlora_is_what_torch_counts(vlora):
    cfg, text, B = VLMConfig(TOWER, EVEN, "none", "none"), 9, 2
    clip, part = CLIP(TOWER), PerceptualWeights(vlora, TOWER, EVEN)
    llama = perceiving(model.Llama(EVEN, cfg))
    picture, ids = torch.arange(B), torch.ones(B, text, dtype=torch.int64)

    def run():
        llama(llama.embed_tokens(ids), part(clip(torch.randn(B, 3, 56, 56))[:, 1:], picture))

    found, parts = counted(run, clip, part, llama), flops(cfg, text, vlora=vlora)
    assert sum(found["Global"].values()) == B * sum(parts.values())
    assert sum(found["PerceptualWeights"].values()) == B * parts["generator"]
