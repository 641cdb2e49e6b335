"""Speed: `python -m experiments.bench --what WHAT --size SIZE`. The files are in speed/.

    prefill  a picture and 70 tokens, up to the logits of the last position
    decode   64 tokens after that and the first, in batches of 1 and of 8
    train    a training step of stage 2, 4 rows with about 50 supervised tokens each
    experts  the same three with generated experts, against none; and a step on 8 turns a row,
             against static experts of the same rank
    pixels   a JPEG to the tower's input
    tokens   a conversation to ids, labels and turns
    load     a checkpoint like llava-hf's in --out, made if it is not there; and sample.py's start
    stages   both stages of train.py in --out, without and with experts
    all      everything but stages; what cannot be done here is left out and named

Ours and transformers' have the same random weights, or the same files, and take turns in one
process; both must first compute the same. Peaks of memory are those of processes of their own. The
floor is the least time by this machine's own rates: of copying for decode, of a product of two
matrices for the others. The last line of standard output is one JSON object. Needs Linux and, but
for stages, transformers.
"""
# cli before torch: from then on, Ctrl-C ends the slow imports with one line
from cli import check_numbers, main, MOST, parse, UserError

import importlib.metadata
import importlib.util
import json
import platform
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from benchmarks.run import commit
from experiments.speed import inputs, loading, models, stages
from experiments.speed.shapes import SHAPES
from training.options import device_of
from weights import fast_dtype

REST = {"pixels": inputs.pixel_rows, "tokens": inputs.token_rows, "load": loading.rows,
        "stages": stages.compare_training}
ALL = ("pixels", "tokens", *models.CASES, "load")


@dataclass
class Options:
    """Measure the speed of training, answering and loading, here and in transformers."""
    what: Literal[(*models.CASES, *REST, "all")] = "all"  # see below
    size: Literal[(*SHAPES,)] = "small"  # of the model, with random weights. toy: the toy's; small:
                                      # for a CPU; 7b, 13b: LLaVA-1.5's; 7b8: 8 of 7b's blocks;
                                      # 1b: 0.5 billion weights; tiny: for tests
    device: Literal["cuda", "cpu"] | None = None  # none: cuda if available
    dtype: Literal["bfloat16", "float32"] | None = None  # none: bfloat16 where it is fast; loading
                                      # is always measured in bfloat16
    rounds: int = 7                   # how often each side is timed; one round more comes before
    batch_size: int | None = None     # rows of a batch, of stages: of a micro-batch; none: as
                                      # told below, 16 for stages
    peak: bool = True                 # also measure peaks of memory, in processes of their own
    out: str | None = None            # folder of stages, or of the checkpoint that load reads and
                                      # makes if it is not there; none: a temporary one
    cold: bool = False                # load: drop the files from the system's cache first
    model: str | None = None          # load: the checkpoint that sample.py answers with; none:
                                      # out/toy/stage2, if it exists
    steps: int = 12                   # stages: steps of each; the first two are not counted
    save: bool = False                # stages: save the state once, 12 bytes a parameter

    def __post_init__(self):
        self.device = device_of(self)
        self.dtype = self.dtype or fast_dtype(self.device)
        fewest = stages.WARM + self.save + 1
        words = f"more than {fewest - 1}, {stages.WARM} are not counted"
        check_numbers(self, {"steps": (fewest, MOST, words)})
        for name, parts in (("out", ("load", "stages", "all")), ("cold", ("load", "all")),
                            ("model", ("load", "all")), ("save", ("stages",))):
            if getattr(self, name) and self.what not in parts:
                raise UserError(f"--{name} is for --what {' or '.join(parts)}, not {self.what}")
        if self.what == "stages" and not self.out:
            raise UserError("--what stages writes large files: say where with --out FOLDER")

    @classmethod
    def help_epilog(cls):
        return __doc__.split("\n\n", 1)[1]

    @property
    def torch_dtype(self):
        return getattr(torch, self.dtype)


def rows_of(what, o):
    """The rows of one kind of measurement, list[dict]."""
    return models.rows(what, o) if what in models.CASES else REST[what](o)


def all_rows(o):
    """(rows of all that can be measured here, {what: why not} of the rest)."""
    rows, left_out = [], {}
    for what in ALL:
        try:
            rows += rows_of(what, o)
        except UserError as error:
            left_out[what] = str(error)
            print(f"{what} is left out: {error}", flush=True)
    return rows, left_out


def device_name(device):
    """The name of the GPU, or of the CPU as Linux has it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with open("/proc/cpuinfo") as f:
        names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    return names[0] if names else platform.machine()


def run():
    o = Options(**parse(Options))
    has_transformers = importlib.util.find_spec("transformers") is not None
    if not has_transformers and o.what != "stages":
        raise UserError("there is no transformers to compare with: "
                        "pip install -r requirements-dev.txt")
    rows, left_out = all_rows(o) if o.what == "all" else (rows_of(o.what, o), {})
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "transformers": importlib.metadata.version("transformers")
                if has_transformers else None}
    print(json.dumps({"device": device_name(o.device), "threads": torch.get_num_threads(),
                      "versions": versions, "commit": commit(), "options": asdict(o),
                      "dtype": o.dtype, "size": o.size, "rows": rows, "left_out": left_out}))


if __name__ == "__main__":
    main(run)
