"""Write a checkpoint without experts in the layout of llava-hf, which transformers opens.

The layout itself is in formats/export.py.
"""
import os
from dataclasses import dataclass

from cli import main, parse, UserError
from formats.export import write_llava
from weights import load


@dataclass
class Options:
    """Write a model without experts in the layout of llava-hf, for transformers to open."""
    model: str | None = None   # checkpoint: a folder or a name on the Hugging Face hub
    base: str | None = None    # of a LoRA: the model below it; none: the one that it names
    export: str | None = None  # folder to write

    def __post_init__(self):
        if not self.model or not self.export:
            raise UserError("expected --model CHECKPOINT --export FOLDER")
        if os.path.exists(os.path.join(self.export, "config.json")):
            raise UserError(f"--export {self.export}: holds a checkpoint already")


def run():
    options = Options(**parse(Options))
    checkpoint = load(options.model, base=options.base)
    write_llava(options.export, checkpoint.model, checkpoint.tokenizer, checkpoint.preprocess,
                checkpoint.system)


if __name__ == "__main__":
    main(run)
