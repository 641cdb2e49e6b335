"""transformers' models beside ours: built from the same parts, asked the same, compared."""
import torch
import transformers

from data import IMAGE
from model import Batch

TEXTS = ["a red circle and a blue square.", "what colour is the ring?", "USER: ASSISTANT:"]
STATIC = dict(visual_expert="none", language_expert="none")


def close(ours, theirs):
    """Within 1e-4 of the range of the reference."""
    return (ours - theirs).abs().max() <= 1e-4 * (theirs.max() - theirs.min())


def state_of(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def batch_of(rows, visual):
    """A Batch of prompts that use no expert, padded on the right."""
    lengths = torch.tensor([len(r) for r in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for row, values in zip(ids, rows):
        row[:len(values)] = torch.tensor(values)
    none = torch.full_like(ids, -1)
    image_at = (ids == IMAGE).flatten().nonzero()[:, 0]
    return Batch(ids.clamp(min=0), lengths, none, none, visual=visual, image_at=image_at)


def hf_llava(clip, llama, model):
    """transformers' LLaVA from the same two parts, with the projector of our `model`; image token
    299.
    """
    cfg = transformers.LlavaConfig(vision_config=clip.config, text_config=llama.config,
                                   image_token_index=299,
                                   tie_word_embeddings=llama.config.tie_word_embeddings)
    llava = transformers.LlavaForConditionalGeneration(cfg)
    tower = getattr(llava.model.vision_tower, "vision_model", llava.model.vision_tower)
    tower.load_state_dict(clip.state_dict())
    llava.model.language_model.load_state_dict(llama.model.state_dict())
    llava.lm_head.load_state_dict(llama.lm_head.state_dict())
    for name in ("linear_1", "linear_2"):
        getattr(llava.model.multi_modal_projector,
                name).load_state_dict(getattr(model.projector, name).state_dict())
    return llava.eval()


def theirs_generate(llava, rows, visual, steps, image=299):
    """Their greedy tokens, a row at a time without padding, cut at the end token; `image` is their
    id of it.
    """
    answers = []
    for row, picture in zip(rows, visual):
        ids = torch.tensor([[image if i == IMAGE else i for i in row]])
        out = llava.generate(input_ids=ids, attention_mask=torch.ones_like(ids),
                             pixel_values=picture[None],
                             max_new_tokens=steps, do_sample=False, eos_token_id=2,
                             pad_token_id=0)[0, len(row):].tolist()
        answers.append(out[:out.index(2)] if 2 in out else out)
    return answers


def opened(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info[
        "mismatched_keys"], info
    return model.eval()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")
