"""Write CLIP, Llama and LLaVA in Hugging Face's layout, for transformers to open.

The toy's stand-ins for CLIP and Llama are written so, and any model without experts can be
(`python -m tools.export_llava`). Each folder is written whole or not at all.
"""
import dataclasses
import json
import os
import re

import tokenizers
import torch

from cli import UserError
from data import TAG
from formats.configs import image_values, LLAVA_FIXED, text_values, vision_values
from formats.folders import atomic_folder
from formats.json_files import write_json
from formats.name_rules import BY_ID, rename, TO_LLAVA
from formats.weight_files import dtype_name, write_tensors
from vlora import VLoRAConfig
from model import VisionBlock


def write_vision(folder, state, config, preprocess):
    """Write a CLIP tower, for `vision_config` or transformers' CLIPVisionModel to read.

    state   {name in model.CLIP: tensor} of all blocks, and post_layernorm.weight and .bias
    config  VisionConfig of that tower; its depth counts all blocks
    """
    names = {n: "vision_model." + re.sub(r"^layers", "encoder.layers", n) for n in state}
    with atomic_folder(folder) as new:
        write_tensors(new, {names[n]: t for n, t in state.items()})
        write_json(os.path.join(new, "preprocessor_config.json"),
                   image_values(preprocess, "CLIPImageProcessor"))
        write_json(os.path.join(new, "config.json"), {
            "architectures": ["CLIPVisionModel"], **vision_values(config, config.depth),
            "torch_dtype": dtype_name(state)})


def write_llama(folder, state, config, tokenizer):
    """Write a Llama, for `llama_config` or transformers' LlamaForCausalLM to read.

    state  {name in model.Llama: tensor}
    """
    with atomic_folder(folder) as new:
        write_tensors(new, {n if n.startswith("lm_head") else f"model.{n}": t
                            for n, t in state.items()})
        tokenizer.save(new)
        write_json(os.path.join(new, "config.json"), {
            "architectures": ["LlamaForCausalLM"],
            **text_values(config, tokenizer.bos, tokenizer.eos), "torch_dtype": dtype_name(state)})


# ---- LLaVA


def llava_state(model, vocab):
    """{name in transformers' LLaVA: tensor} of a model without experts.

    Parts that only LLaVA has: the tower's last block and last norm, which features do not pass
    through, are zeros. New rows of embedding and head, up to `vocab`, are the mean of the others:
    the logit of such an id is the mean of all logits, and so never the greatest.
    """
    state = {}
    for name, p in model.named_parameters():
        t = p.detach()
        if name in BY_ID and vocab > len(t):
            mean = t.float().mean(0, keepdim=True).to(t.dtype)
            t = torch.cat([t, mean.expand(vocab - len(t), -1)])
        state[rename(name, TO_LLAVA)] = t
    norm, depth = model.vision.pre_layrnorm.weight, model.cfg.vision.depth
    with torch.device("meta"):
        block = VisionBlock(model.cfg.vision)
    shapes = {f"vision.layers.{depth}.{n}": p.shape for n, p in block.named_parameters()}
    shapes |= {f"vision.post_layernorm.{n}": norm.shape for n in ("weight", "bias")}
    return state | {rename(n, TO_LLAVA): torch.zeros(shape, dtype=norm.dtype)
                    for n, shape in shapes.items()}


def write_llava_tokenizer(folder, tokenizer, context):
    """Write the tokenizer with <image> and <pad> added and <s> before every text.

    Returns the ids of <image> and <pad>, and the number of ids.
    """
    path = os.path.join(folder, "tokenizer.json")
    tokenizer.save(folder)
    inner = tokenizers.Tokenizer.from_file(path)
    inner.add_special_tokens([TAG, "<pad>"])  # tokens that exist already keep their ids
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.bos)])
    inner.save(path)
    write_json(os.path.join(folder, "tokenizer_config.json"), {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "LlavaProcessor",
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "padding_side": "left", "model_max_length": context, "clean_up_tokenization_spaces": False})
    for text, id in tokenizer.words.items():
        if inner.token_to_id(text) != id:
            raise UserError(f"the added token {text} has the id {id}; transformers would give it "
                            f"{inner.token_to_id(text)}, because ids before it are free")
    image, pad = inner.token_to_id(TAG), inner.token_to_id("<pad>")
    return image, pad, max(image, pad, inner.get_vocab_size() - 1) + 1


# The conversation template of data.py, for transformers' processor
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for c in content if c.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for c in content if c.type == 'text' -%}{{ c.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{{ SYSTEM }}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{{ 'USER: ' + text(message.content) + ' ASSISTANT:' }}
{%- else -%}{{ ' ' + text(message.content) + '</s>' }}{%- endif -%}
{%- endfor -%}
"""


def write_llava_processor(folder, preprocess, system, patch):
    """Write how transformers' AutoProcessor makes pixels and prompts."""
    write_json(os.path.join(folder, "preprocessor_config.json"), {
        **image_values(preprocess, "LlavaImageProcessor"), "do_pad": preprocess.aspect == "pad",
        "processor_class": "LlavaProcessor"})
    write_json(os.path.join(folder, "processor_config.json"), {
        "processor_class": "LlavaProcessor", "patch_size": patch, "image_token": TAG,
        "num_additional_image_tokens": 1,  # CLS, which the next option drops
        "vision_feature_select_strategy": LLAVA_FIXED["vision_feature_select_strategy"]})
    with open(os.path.join(folder, "chat_template.jinja"), "w", encoding="utf-8") as f:
        f.write(CHAT_TEMPLATE.replace("SYSTEM", json.dumps(system and system + " ")))


def check_exportable(cfg):
    """UserError if a model has weights that depend on the input: LLaVA has no place for them."""
    if isinstance(cfg, VLoRAConfig):
        raise UserError("a VLoRA does not fit into LLaVA's layout, which has visual tokens and no "
                        "generated weights")
    if (cfg.visual_expert, cfg.language_expert) != ("none", "none"):
        raise UserError(f"visual_expert {cfg.visual_expert}, language_expert "
                        f"{cfg.language_expert}: a model with experts does not fit into LLaVA's "
                        "layout, only one trained with --visual_expert none --language_expert none")


def write_llava(folder, model, tokenizer, preprocess, system):
    """Write a model without experts for LlavaForConditionalGeneration and AutoProcessor.

    Where the vocabulary has no room for <image> and <pad>, it grows to a multiple of 64.
    weights.load gives the same model back, bit for bit.
    Raises UserError if the model has experts or is a VLoRA.
    """
    cfg = model.cfg
    check_exportable(cfg)
    with atomic_folder(folder) as new:
        image, pad, ids = write_llava_tokenizer(new, tokenizer, cfg.llm.context)
        write_llava_processor(new, preprocess, system, cfg.vision.patch)
        vocab = cfg.llm.vocab if ids <= cfg.llm.vocab else -(-ids // 64) * 64
        state = llava_state(model, vocab)
        write_tensors(new, state)
        llm = dataclasses.replace(cfg.llm, vocab=vocab)
        write_json(os.path.join(new, "generation_config.json"), {
            "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": pad})
        write_json(os.path.join(new, "config.json"), {
            "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
            "image_token_index": image, "image_seq_length": cfg.vision.tokens, "pad_token_id": pad,
            **LLAVA_FIXED, "tie_word_embeddings": cfg.llm.tied, "torch_dtype": dtype_name(state),
            "vision_config": vision_values(cfg.vision, cfg.vision.depth + 1),
            "text_config": text_values(llm, tokenizer.bos, tokenizer.eos),
            # only weights.load reads these
            "image_aspect_ratio": {"pad": "pad", "crop": "square"}[preprocess.aspect],
            "background": preprocess.background,
            "system_prompt": system, "added_rows": vocab - cfg.llm.vocab})
