"""From a loaded model to one that answers fast on its device. Next: packed.py, captured.py."""
from inference.captured import CapturedStep
from inference.packed import can_pack, pack
from inference.threads import choose_threads
from vlora import VLoRA


def ready_for_answers(model):
    """The model, changed in place: packed on a CPU, its decoding step captured on a GPU. On a CPU
    it also chooses the number of threads.

    A model in another precision than the CPU's kernels have, or too large for a second copy, stays
    as it is. VLoRA keeps its plain step on a GPU, because its weights would have to be static, too.
    """
    device = model.llm.embed_tokens.weight.device.type
    if device == "cpu":
        choose_threads()
        if can_pack(model):
            pack(model)
    if device == "cuda" and not isinstance(model, VLoRA):
        model.step = CapturedStep(model)
    return model
