"""From a loaded model to one that answers fast on its device. Next: packed.py, captured.py."""
from inference.captured import CapturedStep
from inference.packed import can_pack, pack
from vlora import VLoRA


def ready_for_answers(model):
    """The model, changed in place: packed on a CPU, its decoding step captured on a GPU.

    VLoRA keeps its plain step on a GPU, because its weights would have to be static, too.
    """
    weight = model.llm.embed_tokens.weight
    if weight.device.type == "cpu" and can_pack(weight.dtype):
        pack(model)
    if weight.device.type == "cuda" and not isinstance(model, VLoRA):
        model.step = CapturedStep(model)
    return model
