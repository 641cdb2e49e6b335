"""TODO"""
import dataclasses
import os

from cli import main, parse, UserError
from formats.export import write_llava
from weights import load


# ---- python weights.py


@dataclasses.dataclass
class Options:
    """Write a model without experts in the layout of llava-hf, for transformers to open."""
    model: str | None = None     # checkpoint: a folder or hub name
    export: str | None = None    # folder to write

    def __post_init__(self):
        if not self.model or not self.export:
            raise UserError("say --model CHECKPOINT --export FOLDER")
        if os.path.exists(os.path.join(self.export, "config.json")):
            raise UserError(f"--export {self.export}: holds a checkpoint already")


def run():
    o = Options(**parse(Options))
    point = load(o.model)
    write_llava(o.export, point.model, point.tokenizer, point.preprocess, point.system)


if __name__ == "__main__":
    main(run)
