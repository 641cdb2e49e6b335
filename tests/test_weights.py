"""What weights.py claims: the same numbers as transformers, strictness, and checkpoints that
survive being killed.
"""
import dataclasses
import json
import os
import resource
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import formats.configs
import formats.export
import formats.folders
import formats.name_rules
import formats.weight_files
import weights
from cli import UserError
from data import IMAGE, Preprocess
from formats.tokenizer import train_tokenizer
from model import Batch, CLIP, generate, Llama, LlamaConfig, VisionConfig, VLMConfig
from tests.helpers import CLIPS, hf_clip, hf_llama, LLAMAS, randomised
from tests.reference import (batch_of, Bomb, close, equal, hf_llava, opened, state_of, STATIC,
                             TEXTS, theirs_generate)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


def folders(path, tokenizer, clip=None, llama=None):
    """Folders `clip` and `llama` under path, as transformers writes them."""
    (clip or hf_clip()).save_pretrained(path / "clip")
    (llama or hf_llama()).save_pretrained(path / "llama")
    tokenizer.save(path / "llama")
    return str(path / "clip"), str(path / "llama")


def llama_logits(llm, ids):
    """The logits float[B, T, V] of a Llama without experts."""
    lengths = torch.full((len(ids),), ids.shape[1])
    return llm.head(llm(llm.embed_tokens(ids), Batch(ids, lengths)))


# ---- Parity with transformers


@pytest.mark.parametrize("kind", CLIPS)
@pytest.mark.parametrize("whole", [False, True])
@torch.no_grad()
def test_our_tower_gives_the_features_of_transformers_clip(tmp_path, tokenizer, kind, whole):
    theirs = hf_clip(**kind)
    clip, llama = folders(tmp_path, tokenizer, theirs)
    # a CLIPModel: vision_model. prefixes, a text tower and projections beside it, a nested config
    if whole:
        text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, vocab_size=60,
                    bos_token_id=1, eos_token_id=2)
        cfg = transformers.CLIPConfig(text_config=text, vision_config=theirs.config.to_dict(),
                                      projection_dim=8)
        both = transformers.CLIPModel(cfg)
        both.vision_model.load_state_dict(theirs.state_dict())
        shutil.rmtree(clip)
        both.save_pretrained(clip)
    model, _, _ = weights.assemble(clip, llama, STATIC)
    assert len(model.vision.layers) == kind["num_hidden_layers"] - 1
    for batch in (1, 4):
        pixels = torch.randn(batch, 3, kind["image_size"], kind["image_size"])
        assert close(model.vision(pixels),
                     theirs(pixels, output_hidden_states=True).hidden_states[-2])


@pytest.mark.parametrize("kind", LLAMAS)
@torch.no_grad()
def test_our_llama_gives_the_logits_of_transformers_llama(tmp_path, tokenizer, kind):
    theirs = hf_llama(**kind)
    model, _, _ = weights.assemble(*folders(tmp_path, tokenizer, llama=theirs), STATIC)
    for shape in ((1, 1), (1, 17), (4, 33)):
        ids = torch.randint(300, shape)
        assert close(llama_logits(model.llm, ids), theirs(ids).logits)


@pytest.mark.parametrize("clip_kind, llama_kind",
                         [(CLIPS[0], LLAMAS[0]), (CLIPS[1], LLAMAS[1]), (CLIPS[0], LLAMAS[2])])
@torch.no_grad()
def test_the_static_model_gives_the_logits_and_greedy_tokens_of_transformers_llava(
        tmp_path, tokenizer, clip_kind, llama_kind):
    clip, llama = hf_clip(**clip_kind), hf_llama(**llama_kind)
    model, _, _ = weights.assemble(*folders(tmp_path, tokenizer, clip, llama), STATIC)
    randomised(model.projector)
    llava = hf_llava(clip, llama, model)
    side, image = clip_kind["image_size"], [IMAGE] * model.cfg.vision.tokens
    visual = torch.randn(4, 3, side, side)
    rows = [[1, *torch.randint(3, 299, (n,)).tolist(), *image,
             *torch.randint(3, 299, (5 + 3 * n,)).tolist()]
            for n in range(1, 5)]
    for row, picture in zip(rows, visual):
        ids = torch.tensor([row])
        ours = model(batch_of([row], picture[None]))
        hf_ids = ids.masked_fill(ids == IMAGE, 299)
        assert close(ours, llava(input_ids=hf_ids, pixel_values=picture[None]).logits)
    expected = theirs_generate(llava, rows, visual, 8)
    assert sum(map(len, expected)) >= 24  # they do say something
    assert generate(model, batch_of(rows, visual), 8, 2) == expected
    assert generate(model, batch_of(rows[:1], visual[:1]), 8, 2) == expected[:1]


# ---- Files: formats, shards, and what must not pass


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tokenizer):
    """(clip folder, llama folder) to read, or to copy before spoiling."""
    return folders(tmp_path_factory.mktemp("pair"), tokenizer)


@pytest.fixture
def spoilt(tmp_path, pair):
    """A copy of the Llama folder, to spoil."""
    return Spoilt(pair, str(shutil.copytree(pair[1], tmp_path / "llama")))


class Spoilt:
    """A Llama folder that a test spoils: `state` is what model.safetensors holds."""

    def __init__(self, pair, folder):
        self.clip, self.folder = pair[0], folder
        self.file = os.path.join(folder, "model.safetensors")
        self.state = load_file(self.file)

    def load(self, dtype=torch.float32):
        return weights.assemble(self.clip, self.folder, STATIC, dtype)[0]

    def refused(self, *words):
        """Assembling fails with a message of one line that says all of `words`."""
        with pytest.raises(UserError) as caught:
            self.load()
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)

    def config(self, **changes):
        path = os.path.join(self.folder, "config.json")
        with open(path) as f:
            values = {**json.load(f), **changes}
        with open(path, "w") as f:
            json.dump({k: v for k, v in values.items() if v is not ...}, f)

    def shard(self, ending, repeat=None, forget=None):
        """Write two shards and an index instead; `repeat` a tensor in the second, `forget` one in
        the index.
        """
        os.remove(self.file)
        names, write = sorted(self.state), {"safetensors": save_file, "bin": torch.save}[ending]
        stem = {"safetensors": "model", "bin": "pytorch_model"}[ending]
        halves = [names[:len(names) // 2], names[len(names) // 2:]]
        weight_map, files = {}, [f"{stem}-{i:05}-of-00002.{ending}" for i in (1, 2)]
        for file, half in zip(files, halves):
            weight_map.update(dict.fromkeys(half, file))
        weight_map.pop(forget, None)
        halves[1] += [repeat] if repeat else []
        for file, half in zip(files, halves):
            write({n: self.state[n] for n in half}, os.path.join(self.folder, file))
        with open(os.path.join(self.folder, f"{stem}.{ending}.index.json"), "w") as f:
            json.dump({"metadata": {}, "weight_map": weight_map}, f)
        return files


def to_bin(s, **kind):
    os.remove(s.file)
    torch.save(s.state, os.path.join(s.folder, "pytorch_model.bin"), **kind)


@pytest.mark.parametrize("rewrite", [
    to_bin, lambda s: to_bin(s, _use_new_zipfile_serialization=False),
    lambda s: s.shard("safetensors"), lambda s: s.shard("bin")],
    ids=["bin", "old bin", "shards", "bin shards"])
# as stored and mapped once; cast and mapped anew for each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_file_format_gives_the_same_model(spoilt, pair, rewrite, dtype, monkeypatch):
    maps, open_shard = [], formats.weight_files.open_shard
    monkeypatch.setattr(formats.weight_files, "open_shard",
                        lambda path: maps.append(path) or open_shard(path))
    monkeypatch.setattr(formats.weight_files, "REMAP", 0)
    rewrite(spoilt)
    expected = weights.assemble(*pair, STATIC)[0]
    maps.clear()
    model = spoilt.load(dtype)
    assert (len(maps) > 20) == (dtype == torch.bfloat16)
    assert equal(state_of(model), state_of(expected.to(dtype)))


def test_weights_that_need_no_cast_are_not_copied(pair):
    model = weights.assemble(*pair, STATIC)[0]
    with safe_open(os.path.join(pair[1], "model.safetensors"), "pt") as f:
        assert f.keys()
    mapped = [line for line in open("/proc/self/maps") if pair[1] in line]
    address = model.llm.norm.weight.data_ptr()
    assert any(int(a, 16) <= address < int(b, 16) for a,
               b in (line.split()[0].split("-") for line in mapped))


def test_a_cast_model_has_one_dtype(pair):
    model = weights.assemble(*pair, {}, torch.bfloat16)[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def spoil(change):
    """Apply `change` to the dict of tensors and write it."""
    def run(s):
        change(s.state)
        save_file(s.state, s.file)
    return run
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop(NORM), ["llm.layers.1.input_layernorm.weight"]),
    (lambda t: t.update({"model.layers.1.norm.weight": t.pop(NORM)}),
     ["model.layers.1.norm.weight"]),
    (lambda t: t.update({NORM: torch.ones(31)}), [NORM, "[31]", "[32]"]),
    (lambda t: t.update({NORM: torch.ones(1, 32)}), [NORM, "[1, 32]"]),
    (lambda t: t.update({NORM: torch.ones(32, dtype=torch.int8)}), [NORM, "int8"]),
    (lambda t: t.update({"model.extra.weight": torch.ones(2)}), ["model.extra.weight", "no place"]),
    (lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
     ["model.layers.3.mlp.up_proj.weight"]),
    (lambda t: t.pop("lm_head.weight"), ["llm.lm_head.weight"]),
], ids=["dropped", "renamed", "reshaped", "unsqueezed", "quantised", "extra", "another layer",
        "head"])
def test_a_tensor_that_is_not_as_it_should_be_is_named(spoilt, change, words):
    spoil(change)(spoilt)
    spoilt.refused("llama", *words)


def test_buffers_of_old_versions_are_skipped(spoilt, pair):
    spoil(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(
        spoilt)
    assert equal(state_of(spoilt.load()), state_of(weights.assemble(*pair, STATIC)[0]))


def test_a_head_that_the_config_ties_is_skipped(spoilt):
    spoilt.config(tie_word_embeddings=True)
    assert spoilt.load().llm.lm_head is None


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_tensor_in_two_shards_is_refused(spoilt, ending):
    first, second = spoilt.shard(ending, repeat="lm_head.weight")
    spoilt.refused("lm_head.weight", first, second)


def test_two_names_of_one_parameter_are_refused(pair):
    model = weights.build_empty(weights.assemble(*pair, STATIC)[0].cfg)
    rules = [(r"model\.layers\.\d\.(mlp\..+)",
              r"llm.layers.0.\1")] + formats.name_rules.llama_rules(False)
    with pytest.raises(UserError, match="llm.layers.0.mlp.*but so does.*layers.0"):
        weights.fill(model, [(pair[1], rules)])


def test_an_index_that_names_a_missing_shard_is_refused(spoilt):
    first, _ = spoilt.shard("safetensors")
    os.remove(os.path.join(spoilt.folder, first))
    spoilt.refused("model.safetensors.index.json", first)


def test_an_index_that_forgets_a_tensor_is_refused(spoilt):
    first, _ = spoilt.shard("safetensors", forget="lm_head.weight")
    spoilt.refused(first, "lm_head.weight")


def test_a_shard_that_lacks_a_tensor_of_the_index_is_refused(spoilt):
    first, _ = spoilt.shard("safetensors")
    path = os.path.join(spoilt.folder, first)
    state = load_file(path)
    name = sorted(state)[0]
    del state[name]
    save_file(state, path)
    spoilt.refused(first, name)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 5, 3000, -1])
def test_a_half_downloaded_shard_is_refused(spoilt, ending, keep):
    _, second = spoilt.shard(ending)
    path = os.path.join(spoilt.folder, second)
    with open(path, "rb") as f:
        content = f.read()
    with open(path, "wb") as f:
        f.write(content[:keep])
    spoilt.refused(second)


@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(spoilt, tmp_path, new):
    os.remove(spoilt.file)
    spoilt.state[NORM] = Bomb(str(tmp_path / "ran"))
    path = os.path.join(spoilt.folder, "pytorch_model.bin")
    torch.save(spoilt.state, path, _use_new_zipfile_serialization=new)
    spoilt.refused("pytorch_model.bin", "code")
    assert not (tmp_path / "ran").exists()


def test_a_bin_file_with_more_than_tensors_is_refused(spoilt):
    os.remove(spoilt.file)
    torch.save({"model": spoilt.state}, os.path.join(spoilt.folder, "pytorch_model.bin"))
    spoilt.refused("pytorch_model.bin", "dict")


def test_a_folder_without_weights_says_what_was_looked_for(spoilt):
    os.remove(spoilt.file)
    spoilt.refused(spoilt.folder, "model.safetensors", "pytorch_model.bin.index.json")


def test_a_tokenizer_of_another_model_is_refused(spoilt):
    train_tokenizer([chr(c) for c in range(1000, 1100)], 400).save(spoilt.folder)
    spoilt.refused(spoilt.folder, "the tokenizer has", "300")


def test_a_folder_without_config_is_refused(spoilt):
    os.remove(os.path.join(spoilt.folder, "config.json"))
    spoilt.refused(spoilt.folder, "config.json")


@pytest.mark.parametrize("changes", [
    dict(model_type="mistral"), dict(rope_scaling={"type": "linear", "factor": 2.0}),
    dict(rope_parameters={"rope_type": "llama3", "rope_theta": 1e4}), dict(hidden_act="gelu"),
    dict(attention_bias=True),
    dict(mlp_bias=True), dict(sliding_window=128), dict(head_dim=16), dict(num_attention_heads=5),
    dict(num_key_value_heads=3), dict(hidden_size="32"), dict(num_hidden_layers=0),
    dict(rope_theta=None, rope_parameters=None),
], ids=lambda c: next(iter(c)))
def test_a_llama_that_we_do_not_build_is_refused_by_the_name_of_the_field(spoilt, changes):
    spoilt.config(**changes)
    spoilt.refused("config.json", next(iter(changes)))


@pytest.mark.parametrize("changes", [
    dict(hidden_act="gelu"), dict(num_attention_heads=5), dict(num_channels=1),
    dict(model_type="siglip_vision_model")],
    ids=lambda c: next(iter(c)))
def test_a_tower_that_we_do_not_build_is_refused_by_the_name_of_the_field(tmp_path, pair, changes):
    s = Spoilt(pair, str(shutil.copytree(pair[0], tmp_path / "clip")))
    s.config(**changes)
    with pytest.raises(UserError, match=next(iter(changes))):
        formats.configs.vision_config(s.folder)


def test_absent_fields_of_a_llama_mean_what_they_mean_to_transformers(spoilt, pair):
    spoilt.config(rope_parameters=..., head_dim=..., num_key_value_heads=...,
                  tie_word_embeddings=..., torch_dtype="float16")
    assert formats.configs.llama_config(spoilt.folder) == formats.configs.llama_config(pair[1])
    spoilt.config(rope_theta=500, rope_scaling=None)
    assert formats.configs.llama_config(spoilt.folder).theta == 500.0


def test_absent_fields_of_a_clip_mean_what_they_mean_to_transformers(tmp_path):
    for inner in ("vision_config", "vision_config_dict"):
        (tmp_path / "config.json").write_text(
            json.dumps({"model_type": "clip", inner: {"patch_size": 16}}))
        d = transformers.CLIPVisionConfig()
        assert formats.configs.vision_config(str(tmp_path))[0] == VisionConfig(
            d.image_size, 16, d.hidden_size, d.num_hidden_layers - 1, d.num_attention_heads,
            d.intermediate_size,
            d.layer_norm_eps)
    both = {"vision_config": {"hidden_size": 64, "num_attention_heads": 4},
            "vision_config_dict": {"hidden_size": 128}}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", **both}))
    assert formats.configs.vision_config(str(tmp_path))[0].width == 128


@pytest.mark.parametrize("crop", [28, {"height": 28, "width": 28}])
def test_the_preprocessor_file_is_obeyed(tmp_path, pair, crop):
    folder = shutil.copytree(pair[0], tmp_path / "clip")
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"crop_size": crop, "image_mean": [0.1, 0.2, 0.3],
                                "image_std": [0.4, 0.5, 0.6]}))
    assert formats.configs.vision_config(str(folder))[1] == Preprocess(28, (0.1, 0.2, 0.3),
                                                                       (0.4, 0.5, 0.6))
    path.write_text(json.dumps({"crop_size": 56}))
    with pytest.raises(UserError, match="crop_size 56.*28"):
        formats.configs.vision_config(str(folder))


@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "no-such-owner/no-such-model"])
def test_a_name_that_leads_nowhere_is_refused_in_one_line(name, monkeypatch):
    def offline(*args, **kwargs):
        raise ConnectionError("no network\nat all")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError,
                       match=f"{name}(: no such folder| is not a folder here)") as caught:
        formats.folders.resolve(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("held", ["safetensors", "bin"])
def test_a_hub_name_is_fetched_in_one_format_only(tmp_path, monkeypatch, held):
    asked = []

    def download(name, allow_patterns):
        asked.append(allow_patterns[0])
        (tmp_path / f"x.{held}").touch()
        return str(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert formats.folders.resolve("owner/name") == str(tmp_path)
    assert asked == ["model*.safetensors"] + ["pytorch_model*.bin"] * (held == "bin")


# ---- New parts


def test_new_parts_start_as_the_modules_themselves_would_start_them(pair):
    state = state_of(weights.assemble(*pair, dict(visual_expert="both", language_expert="all"),
                                      seed=1)[0])
    for name, value in state.items():
        if name.endswith(("hypernet.up.weight", "expert.up")):
            assert not value.any(), name
        elif name.endswith("guidance_norm.weight"):
            assert (value == 1).all()
        elif name.endswith(("hypernet.down.weight", "expert.down")):
            assert 0.7 < value.std() * 32 ** 0.5 < 1.4, name
        else:
            assert value.isfinite().all() and value.any(), name


def test_the_seed_alone_decides_how_a_new_part_starts(pair):
    projector = lambda seed, **kind: state_of(weights.assemble(*pair, kind, seed=seed)[0].projector)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = projector(1)
    assert torch.equal(before, torch.get_rng_state())  # the caller's own draws go on undisturbed
    assert equal(first, projector(1, language_expert="none"))
    assert not torch.equal(first["linear_1.weight"], projector(2)["linear_1.weight"])
    assert not torch.equal(first["linear_1.weight"].flatten()[:64],
                           first["linear_2.weight"].flatten()[:64])


# ---- Our own checkpoints


class World:
    """A model with experts, trained a little, and what a checkpoint of it needs."""

    def __init__(self, pair, tokenizer):
        self.pair, self.tokenizer = pair, tokenizer
        self.model, _, self.preprocess = weights.assemble(
            *pair, dict(expert_embed=4, expert_rank=2))
        torch.manual_seed(3)
        for p in [*self.model.projector.parameters(), *self.model.llm.hypernet.parameters()]:
            p.data = p.data + 0.1 * torch.randn_like(p)

    def save(self, folder, stage=2, shift=0.0):
        state = {n: t + shift for n, t in state_of(self.model).items()}
        cfg, sources = self.model.cfg, {}
        if stage == 1:
            cfg = dataclasses.replace(cfg, language_expert="none", guidance_after=None)
            state = {n: t for n, t in state.items() if n.startswith("projector.")}
            sources = {"vision": weights.source_entry(self.pair[0], folder),
                       "llm": weights.source_entry(self.pair[1], folder)}
        weights.save(str(folder), cfg, state, self.tokenizer, self.preprocess, "Be kind.",
                     stage=stage, sources=sources, training={"lr": 1e-3})

    def logits(self, model):
        torch.manual_seed(0)
        batch = batch_of([[1, *[IMAGE] * 4, 5, 6, 7, 8, 9]], torch.randn(1, 3, 28, 28))
        batch.pool_id = torch.tensor([[-1] * 5 + [0, 0, -1, -1, -1]])
        batch.use_id = torch.tensor([[-1] * 7 + [0, 0, 0]])
        with torch.no_grad():
            return model(batch)


@pytest.fixture
def world(pair, tokenizer):
    return World(pair, tokenizer)


def test_a_saved_model_loads_with_the_same_logits(world, tmp_path):
    world.save(tmp_path / "x")
    loaded = weights.load(str(tmp_path / "x"))
    assert torch.equal(world.logits(loaded.model), world.logits(world.model))
    assert loaded.model.cfg == world.model.cfg and loaded.preprocess == world.preprocess
    assert loaded.system == "Be kind." and loaded.config["training"] == {
        "lr": 1e-3} and loaded.config["stage"] == 2
    assert loaded.tokenizer.encode("a red ring") == world.tokenizer.encode("a red ring")
    assert {p.dtype for p in weights.load(str(tmp_path / "x"),
                                          torch.float16).model.parameters()} == {torch.float16}


@pytest.mark.parametrize("stage", [1, 2])
def test_the_encoders_of_version_1_are_converted_and_added_ones_are_not(world, tmp_path, stage):
    world.save(tmp_path / "x", stage)
    expected = weights.load(str(tmp_path / "x"), experts=EXPERTS).model
    file, config = tmp_path / "x" / "model.safetensors", tmp_path / "x" / "config.json"
    state = load_file(file)
    encoders = [name for name in state if name.endswith("encoder.weight")]
    assert len(encoders) == (3 if stage == 2 else 1)
    for name in encoders:
        E, G = state[name].shape
        state[name] = state[name] * E ** 0.5 / G  # version 1 multiplied the guidance by 1
    save_file(state, file)
    config.write_text(json.dumps(json.loads(config.read_text()) | {"version": 1}))
    loaded = weights.load(str(tmp_path / "x"), experts=EXPERTS).model
    for (name, p), q in zip(expected.named_parameters(), loaded.parameters(), strict=True):
        assert torch.allclose(p, q) if name in encoders else torch.equal(p, q), name
    assert close(world.logits(loaded), world.logits(expected))


def test_whoever_may_read_the_config_may_read_the_weights(world, tmp_path):
    world.save(tmp_path / "x")
    modes = {os.stat(tmp_path / "x" / name).st_mode for name in os.listdir(tmp_path / "x")}
    assert len(modes) == 1


def test_a_large_model_is_saved_in_shards_with_an_index_and_loads_the_same(world, tmp_path,
                                                                           monkeypatch):
    world.save(tmp_path / "x")
    monkeypatch.setattr(formats.weight_files, "SHARD", 80_000)
    world.save(tmp_path / "x")
    names = os.listdir(tmp_path / "x")
    assert "model.safetensors" not in names and len(names) > 5
    assert all(os.path.getsize(tmp_path / "x" / n) < 90_000 for n in names)
    assert equal(state_of(weights.load(str(tmp_path / "x")).model), state_of(world.model))


@pytest.mark.parametrize("shard", [5 * 10**9, 80_000])
def test_the_bytes_of_the_weights_depend_on_the_weights_alone(world, tmp_path, shard, monkeypatch):
    monkeypatch.setattr(formats.weight_files, "SHARD", shard)
    world.save(tmp_path / "x")
    turned = dict(reversed(state_of(world.model).items()))
    weights.save(str(tmp_path / "y"), world.model.cfg, turned, world.tokenizer, world.preprocess,
                 "Other.", stage=2, sources={}, training={"a": 1})
    content = lambda n: {p.name: p.read_bytes() for p in (tmp_path / n).glob("model*")}
    assert content("x") == content("y")
    world.save(tmp_path / "y", shift=0.5)
    assert content("x") != content("y")


def test_a_model_loaded_from_a_folder_can_be_saved_over_it(world, tmp_path):
    world.save(tmp_path / "x")
    world.model = weights.load(str(tmp_path / "x")).model
    weights.save(str(tmp_path / "x"), world.model.cfg, dict(world.model.named_parameters()),
                 world.tokenizer,
                 world.preprocess, "", stage=2, sources={}, training={})
    assert equal(state_of(weights.load(str(tmp_path / "x")).model), state_of(world.model))
EXPERTS = dict(visual_expert="1", language_expert="posterior", guidance_after=None, expert_embed=4,
               expert_rank=2)


def test_a_stage_1_checkpoint_holds_what_was_trained_and_finds_the_rest(world, tmp_path):
    world.save(tmp_path / "x", stage=1)
    held = load_file(tmp_path / "x" / "model.safetensors")
    assert held and all(n.startswith("projector.") for n in held)
    expected = {n: p for n, p in state_of(world.model).items()
                if not any(part in n for part in (".layers.1.expert", ".layers.2.expert",
                                                  "llm.hypernet", "guidance_norm"))}
    assert equal(state_of(weights.load(str(tmp_path / "x")).model), expected)


def test_language_experts_join_a_stage_1_checkpoint_as_they_would_join_the_llama(world, tmp_path):
    world.save(tmp_path / "x", stage=1)
    model = weights.load(str(tmp_path / "x"), experts=EXPERTS, seed=7).model
    assert model.cfg == world.model.cfg and {p.dtype for p in model.parameters()} == {torch.float32}
    fresh = weights.assemble(*world.pair, EXPERTS, seed=7)[0]
    assert equal(state_of(model.llm), state_of(fresh.llm))
    assert equal(state_of(model.projector), state_of(world.model.projector))
    static = weights.load(str(tmp_path / "x")).model
    assert torch.equal(world.logits(model), world.logits(static))  # at first they add nothing


@pytest.mark.parametrize("field, other",
                         [("visual_expert", "both"), ("language_expert", "all"),
                          ("expert_embed", 8),
                                          ("expert_rank", 1), ("guidance_after", 2)])
def test_experts_that_were_trained_keep_their_form(world, tmp_path, field, other):
    world.save(tmp_path / "x")
    assert torch.equal(world.logits(weights.load(str(tmp_path / "x"), experts=EXPERTS).model),
                       world.logits(world.model))
    with pytest.raises(UserError,
                       match=f"{field} is {getattr(world.model.cfg, field)} there, not {other}"):
        weights.load(str(tmp_path / "x"), experts={**EXPERTS, field: other})


def test_a_stage_1_checkpoint_is_strict_about_what_it_holds(world, tmp_path):
    world.save(tmp_path / "x", stage=1)
    path = tmp_path / "x" / "model.safetensors"
    state = load_file(path)
    name = "projector.expert_1.expert.down"
    save_file({n: t for n, t in state.items() if n != name}, path)
    with pytest.raises(UserError, match=f"no tensor for {name}"):
        weights.load(str(tmp_path / "x"))
    save_file({**state, "llm.norm.weight": torch.ones(32)}, path)
    with pytest.raises(UserError, match="model.norm.weight fills llm.norm.weight, but so does"):
        weights.load(str(tmp_path / "x"))
    save_file({**state, "llm.hypernet.up.weight": world.model.llm.hypernet.up.weight.data}, path)
    for experts in (None, EXPERTS):
        with pytest.raises(UserError, match="llm.hypernet.up.weight has no place"):
            weights.load(str(tmp_path / "x"), experts=experts)


def test_a_stage_1_checkpoint_gives_its_dtype_to_the_frozen_parts(world, tmp_path):
    world.model.bfloat16()
    world.save(tmp_path / "x", stage=1)
    assert {p.dtype for p in weights.load(str(tmp_path / "x")).model.parameters()} == {
        torch.bfloat16}
    assert {p.dtype for p in weights.load(str(tmp_path / "x"),
                                          torch.float32).model.parameters()} == {torch.float32}


def test_a_stage_1_checkpoint_moves_together_with_its_sources(world, tmp_path):
    shutil.copytree(os.path.dirname(world.pair[0]), tmp_path / "a")
    world.pair = str(tmp_path / "a" / "clip"), str(tmp_path / "a" / "llama")
    world.save(tmp_path / "a" / "out" / "x", stage=1)
    os.rename(tmp_path / "a", tmp_path / "b")
    assert torch.equal(weights.load(str(tmp_path / "b" / "out" / "x")).model.llm.norm.weight,
                       world.model.llm.norm.weight)
    shutil.rmtree(tmp_path / "b" / "clip")
    with pytest.raises(UserError, match="needs the model.*clip"):
        weights.load(str(tmp_path / "b" / "out" / "x"))


def test_a_stage_1_checkpoint_refuses_frozen_parts_that_have_changed(world, tmp_path):
    shutil.copytree(world.pair[1], tmp_path / "llama")
    world.pair = world.pair[0], str(tmp_path / "llama")
    world.save(tmp_path / "x", stage=1)
    weights.load(str(tmp_path / "x"))
    hf_llama(seed=1).save_pretrained(tmp_path / "llama")
    with pytest.raises(UserError, match="llama: .*fingerprints differ"):
        weights.load(str(tmp_path / "x"))


@pytest.mark.parametrize("change, words", [
    (lambda t: t.pop("projector.linear_1.bias"), "no tensor for projector.linear_1.bias"),
    (lambda t: t.pop("llm.layers.2.expert.down"), "no tensor for llm.layers.2.expert.down"),
    (lambda t: t.update({"llm.more": torch.ones(1)}), "llm.more has no place"),
    (lambda t: t.update({"more": torch.ones(1)}), "more has no place"),
    (lambda t: t.update({"projector.linear_1.bias": torch.ones(2)}), r"linear_1.bias is \[2\]"),
])
def test_our_own_checkpoints_are_read_as_strictly(world, tmp_path, change, words):
    world.save(tmp_path / "x")
    path = tmp_path / "x" / "model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path)
    with pytest.raises(UserError, match=words):
        weights.load(str(tmp_path / "x"))


@pytest.mark.parametrize("change, words", [
    (lambda c: c.update(format="other"), "format 'other' cannot be opened"),
    (lambda c: c.pop("format"), "format None cannot be opened"),
    (lambda c: c.update(version=3), "version 3, this code reads 1 and 2"),
    (lambda c: c.update(colour="red"), "unknown key 'colour'"),
    (lambda c: c["model"].update(colour="red"), "model: unknown key 'colour'"),
    (lambda c: c["model"]["llm"].update(colour="red"), "model.llm: unknown key 'colour'"),
    (lambda c: c["model"]["llm"].pop("heads"), "model.llm: no 'heads'"),
    (lambda c: c.pop("preprocess"), "no 'preprocess'"),
    (lambda c: c["model"]["llm"].update(heads=0),
     "model.llm: heads is 0, expected a whole number more than 0"),
    (lambda c: c["model"]["llm"].update(heads=3), "model.llm: width 32 does not divide by heads 3"),
    (lambda c: c["model"]["vision"].update(heads=5),
     "model.vision: width .* does not divide by heads 5"),
    (lambda c: c["model"]["llm"].update(kv_heads=3),
     "model.llm: 4 heads of 8, 3 of keys: expected heads of an even size"),
    (lambda c: c["model"].update(guidance_after=-1),
     "guidance_after is -1, expected a whole number of 0 or more, or null"),
    (lambda c: c["model"]["llm"].update(width="192"),
     "model.llm: width is '192', expected a whole number more than 0"),
    (lambda c: c["model"]["llm"].update(tied=1), "model.llm: tied is 1, expected true or false"),
    (lambda c: c["model"]["llm"].update(eps=float("nan")), "model.llm: eps is nan"),
    (lambda c: c["model"]["vision"].update(patch=8.5), "model.vision: patch is 8.5"),
    (lambda c: c["model"].update(guidance_after="1"), "model: guidance_after is '1'"),
    (lambda c: c["model"].update(guidance_after=0.0), "model: guidance_after is 0.0"),
    (lambda c: c["model"].update(visual_expert=[]),
     "model: visual_expert is .., expected one of 'none', '1', '2', 'both'"),
    (lambda c: c["model"].update(vlora=[]), "model.vlora: expected an object"),
    (lambda c: c["preprocess"].update(mean=[0.5, 0.5]), "preprocess: mean is"),
])
def test_a_config_of_ours_that_says_more_or_less_is_refused(world, tmp_path, change, words):
    world.save(tmp_path / "x")
    path = tmp_path / "x" / "config.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=words):
        weights.load(str(tmp_path / "x"))


def test_opening_what_is_no_checkpoint_says_so(tmp_path, pair):
    with pytest.raises(UserError, match="config.json: file not found"):
        weights.load(str(tmp_path))
    with pytest.raises(UserError,
                       match="format 'llama' cannot be opened, expected one of hyperllava"):
        weights.load(pair[1])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file, expected the folder"):
        weights.load(str(tmp_path / "file"))


# ---- Whole or not at all


class Killed(BaseException):
    pass


def kill_at(monkeypatch, k):
    """Raise Killed at the k-th call that changes the disk, and at every later one: nothing is
    tidied up either.
    """
    calls = []
    for owner, name in [(os, "replace"), (os, "remove"), (os, "unlink"), (os, "rmdir"),
                        (os, "link"), (os, "makedirs"),
                        (formats.weight_files, "save_file"), (weights, "write_json"),
                        (formats.weight_files, "write_json")]:
        def dying(*args, act=getattr(owner, name), **kwargs):
            calls.append(act)
            if len(calls) >= k:
                raise Killed
            return act(*args, **kwargs)
        monkeypatch.setattr(owner, name, dying)
    return calls


def value(model):
    return model.vision.pre_layrnorm.bias[0].item()


def shift_of(folder, world):
    """By how much the checkpoint in `folder` is shifted against the model of `world`."""
    return round(value(weights.load(str(folder)).model) - value(world.model), 3)


def test_a_save_that_is_killed_anywhere_leaves_the_old_or_the_new_checkpoint(world, tmp_path,
                                                                             monkeypatch):
    found, k = set(), 0
    while True:
        k += 1
        folder = tmp_path / str(k) / "x"
        world.save(folder)
        (folder / "log.jsonl").write_text("kept")
        with monkeypatch.context() as patch:
            if k % 2:  # files that the other one has not
                patch.setattr(formats.weight_files, "SHARD", 20_000)
            calls = kill_at(patch, k)
            try:
                world.save(folder, shift=1.0)
            except Killed:
                pass
        found.add(shift_of(folder, world))
        assert (folder / "log.jsonl").read_text() == "kept"
        world.save(folder, shift=2.0)  # the next one succeeds whatever the killed one left
        assert shift_of(folder, world) == 2.0
        assert os.listdir(folder.parent) == ["x"]
        assert sorted(os.listdir(folder)) == ["config.json", "log.jsonl", "model.safetensors",
                                              "tokenizer.json"]
        if len(calls) < k:
            break
    assert found == {0.0, 1.0} and k > 15


def test_two_killed_saves_in_a_row_still_leave_a_checkpoint(world, tmp_path, monkeypatch):
    for k in range(8, 24):
        folder = tmp_path / str(k)
        world.save(folder)
        for attempt in (k, k // 2, k - 3):
            with monkeypatch.context() as patch:
                kill_at(patch, attempt)
                with pytest.raises(Killed):
                    world.save(folder, shift=1.0)
                    raise Killed
            assert shift_of(folder, world) in (0.0, 1.0)


def test_a_disk_that_fills_up_leaves_the_old_checkpoint(world, tmp_path):
    world.save(tmp_path / "x")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises((OSError, UserError)):
            world.save(tmp_path / "x", shift=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert shift_of(tmp_path / "x", world) == 0.0
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("call", ["makedirs", "replace", "remove"])
def test_a_folder_that_may_not_be_written_leaves_the_old_checkpoint(world, tmp_path, monkeypatch,
                                                                    call):
    world.save(tmp_path / "x")

    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, forbidden)
        with pytest.raises(PermissionError):
            world.save(tmp_path / "x", shift=1.0)
    assert shift_of(tmp_path / "x", world) == 0.0


def test_a_file_system_without_links_is_good_enough(world, tmp_path, monkeypatch):
    world.save(tmp_path / "x")

    def unsupported(*args, **kwargs):
        raise OSError(95, "Operation not supported")
    monkeypatch.setattr(os, "link", unsupported)
    world.save(tmp_path / "x", shift=1.0)
    assert shift_of(tmp_path / "x", world) == 1.0 and os.listdir(tmp_path) == ["x"]


def test_a_folder_called_old_that_a_user_made_is_not_removed(world, tmp_path):
    world.save(tmp_path / "x")
    os.rename(tmp_path / "x", tmp_path / "x.old")
    world.save(tmp_path / "x", shift=1.0)
    assert shift_of(tmp_path / "x.old", world) == 0.0
    with pytest.raises(UserError, match="x.old is in the way"):
        world.save(tmp_path / "x", shift=2.0)
    assert (tmp_path / "x.old" / "config.json").exists()


# ---- Folders that transformers opens


@pytest.mark.parametrize("kind", CLIPS)
@torch.no_grad()
def test_transformers_opens_the_tower_that_we_write(tmp_path, kind):
    cfg = VisionConfig(kind["image_size"], kind["patch_size"], kind["hidden_size"],
                       kind["num_hidden_layers"],
                       kind["num_attention_heads"], kind["intermediate_size"], eps=1e-4)
    torch.manual_seed(0)
    tower, norm = randomised(CLIP(cfg)), torch.nn.LayerNorm(cfg.width, 1e-4)
    state = {**state_of(tower), **{f"post_layernorm.{n}": t for n, t in state_of(norm).items()}}
    formats.export.write_vision(str(tmp_path / "x"), state, cfg,
                                Preprocess(cfg.image_size, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    theirs = opened(transformers.CLIPVisionModel, tmp_path / "x")
    pixels = torch.randn(2, 3, cfg.image_size, cfg.image_size)
    assert close(tower(pixels), theirs(pixels).last_hidden_state)
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "x")
    assert tuple(processor.image_mean) == (0.1, 0.2,
                                           0.3) and processor.crop_size["height"] == cfg.image_size
    back, preprocess = formats.configs.vision_config(str(tmp_path / "x"))
    assert back.depth == cfg.depth - 1 and back.eps == 1e-4 and preprocess.std == (0.4, 0.5, 0.6)


@pytest.mark.parametrize("cfg", [LlamaConfig(32, 2, 4, 4, 48, 300, 1e-5, 10000.0, 128),
                                 LlamaConfig(48, 2, 6, 2, 64, 300, 1e-4, 500.0, 64, tied=True)],
                                 ids=["plain", "tied"])
@torch.no_grad()
def test_transformers_opens_the_llama_that_we_write(tmp_path, tokenizer, cfg):
    torch.manual_seed(0)
    ours = randomised(Llama(VLMConfig(llm=cfg, **STATIC)))
    formats.export.write_llama(str(tmp_path / "x"), state_of(ours), cfg, tokenizer)
    theirs = opened(transformers.LlamaForCausalLM, tmp_path / "x")
    ids = torch.randint(300, (2, 20))
    assert close(llama_logits(ours, ids), theirs(ids).logits)
    assert theirs.config.eos_token_id == 2 and formats.configs.llama_config(
        str(tmp_path / "x")) == cfg


@pytest.mark.parametrize("name, flags, dtype", [
    ("AMD EPYC", ("avx512_bf16",), "bfloat16"),
    ("Intel Xeon", ("avx512_bf16",), "float32"),  # half as fast as fp32 on an Emerald Rapids
    ("Intel Xeon", ("avx512_bf16", "amx_bf16"), "bfloat16"),
    ("AMD EPYC", (), "float32"),
    (None, (), "float32"),                        # an ARM: other names
])
def test_a_cpu_computes_in_bf16_only_if_it_is_fast_at_it(monkeypatch, name, flags, dtype):
    known = {"avx512_bf16": False, "amx_bf16": False, "cpu_name": name} if name else {"neon": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known | dict.fromkeys(flags, True))
    assert weights.fast_dtype("cpu") == dtype
    assert weights.fast_dtype("cuda") == "bfloat16"
