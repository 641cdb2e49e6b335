"""The rows of the papers' tables, and of some of our own, as options of train.py.

Tables 2, 3, 5, 6 and Figures 3, 4 are from arXiv 2403.13447, vlora.. from arXiv 2405.20339.
Next: ablate.py.
"""
import os
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A row of a table."""
    name: str                                    # as in the paper
    options: dict = field(default_factory=dict)  # of train.py
    paper: tuple = ()                            # the paper's figures for Table.columns
    times: int = 1                               # stage 2 runs `times` x --steps


@dataclass(frozen=True)
class Table:
    """Rows that are compared with each other."""
    title: str
    rows: tuple
    reference: int = -1     # index of the row that the others are compared with
    columns: tuple = ("GQA", "SQA-I", "VQA-T", "POPE", "MME")  # of the paper
    data: str = "instruct"  # file of the toy's world that stage 2 learns from
    splits: tuple = ("heldout", "combination", "grounds", "numbers")  # the first one counts
    axis: str | None = None  # label of the x axis, if the paper shows a figure
    tuned: int = 0           # all rows start from one LLaVA, after so many steps of stage 2


NO_EXPERTS = {"visual_expert": "none", "language_expert": "none"}
LLAVA = Row("LLaVA", NO_EXPERTS)
EQUAL = Row("both static, of equal parameters", {"weight_source": "static", "expert_rank": 185})
PEFT = {"visual_expert": "none", "tune": "peft"}  # Table 6: the Llama is frozen
VLORA = ("MMB", "MME", "SQA", "Hallu", "MMMU", "CCB")


def vlora(**options):
    return {"method": "vlora", **options}


TABLES = {
    "2": Table("where the visual expert sits", (
        Row("w/o E_V", {"visual_expert": "none"}, (62.5, 70.4, 58.1, 85.9, 1486.0)),
        Row("E_V2", {"visual_expert": "2"}, (62.0, 69.8, 58.0, 86.4, 1442.6)),
        Row("E_V1 & E_V2", {"visual_expert": "both"}, (60.1, 69.5, 54.4, 86.1, 1449.8)),
        Row("E_V1", {}, (62.7, 70.4, 58.5, 86.3, 1481.2)))),
    "3": Table("which blocks have a language expert", (
        Row("w/o E_L", {"language_expert": "none"}, (61.9, 70.7, 57.5, 85.6, 1492.0)),
        Row("anterior half", {"language_expert": "anterior"}, (62.5, 69.4, 58.5, 85.9, 1481.4)),
        Row("all", {"language_expert": "all"}, (62.7, 69.5, 58.6, 86.0, 1460.3)),
        Row("posterior half", {}, (62.7, 70.4, 58.5, 86.3, 1481.2)))),
    "5": Table("where the experts' weights come from", (
        Row("Adapter", {"weight_source": "static"}, (57.7, 69.4, 53.5, 83.5, 1371.8)),
        Row("Hypernetwork+MLP", {"weight_source": "mlp"}, (60.2, 68.8, 52.9, 84.6, 1460.7)),
        Row("Hypernetwork+Adapter", {"weight_source": "latent"}, (62.1, 69.9, 57.0, 85.4, 1494.4)),
        Row("ours", {}, (62.7, 70.4, 58.5, 86.3, 1481.2)))),
    "6": Table("tuning with a frozen Llama", (
        Row("LoRA", PEFT | {"weight_source": "lora"}, (63.0, 68.4, 58.2, 86.4, 1496.9)),
        Row("Adapter", PEFT | {"weight_source": "static"}, (42.6, 61.2, 41.0, 81.2, 874.4)),
        Row("Hypernetwork+Adapter", PEFT | {"weight_source": "latent"}, (49.0, 63.6, 48.3, 84.6, 1140.0)),
        Row("Language Expert", PEFT, (62.5, 70.4, 58.1, 85.9, 1486.0)))),
    "experts": Table("one expert, both, or as many static parameters", (
        LLAVA, Row("E_V", {"language_expert": "none"}), Row("E_L", {"visual_expert": "none"}), Row("both", {}),
        Row("both static, of equal operations", {"weight_source": "static", "expert_rank": 20}),
        EQUAL), reference=3, columns=()),
    # with --align 200 --steps 660
    "long": Table("the experts, trained as long as in the main run", (
        LLAVA, Row("both"), EQUAL), reference=1, columns=()),
    "vlora": Table("pictures as tokens or as weights", (
        Row("LLaVA", NO_EXPERTS, (64.6, 1470.0, 67.7, 27.4, 33.8, 25.3)),  # aligned, as VLoRA is, on CapsFusion
        Row("VLoRA", vlora(), (63.4, 1311.3, 66.4, 26.4, 36.0, 28.6))), reference=0, columns=VLORA),
    "vlora6": Table("tokens or weights, six times the steps", (
        Row("LLaVA", NO_EXPERTS, times=6), Row("VLoRA", vlora(), times=6)), reference=0, columns=()),
    "vlora12": Table("tokens or weights, VLoRA twice the steps", (
        Row("LLaVA", NO_EXPERTS, times=6), Row("VLoRA", vlora(), times=12)), reference=0, columns=()),
    # with --pictures 64000 --seeds 3: no picture is seen more than twice
    "vlora24": Table("tokens or weights, VLoRA four times the steps", (
        Row("LLaVA", NO_EXPERTS, times=6), Row("VLoRA", vlora(), times=24)), reference=0, columns=()),
    # with --validate --seeds 1
    "vlora_rates": Table("VLoRA: the rates of AdamW and Muon in stage 2", tuple(
        Row(f"{lr}, {muon_lr}", vlora(lr=lr, muon_lr=muon_lr), times=2) for lr, muon_lr in (
            (1e-3, 7e-3), (5e-4, 7e-3), (2.5e-4, 7e-3), (2e-3, 7e-3), (1e-3, 3.5e-3), (1e-3, 14e-3), (5e-4, 3.5e-3))),
        reference=0, columns=()),
    "dialect": Table("a map that the question names", (
        Row("Adapter", PEFT | {"weight_source": "static"}),
        Row("Adapter, equal parameters", PEFT | {"weight_source": "static", "expert_rank": 150}),
        Row("LoRA in the same blocks, equal parameters", PEFT | {"weight_source": "lora", "expert_rank": 24}),
        Row("LoRA in all blocks, equal parameters", PEFT | {"weight_source": "lora", "expert_rank": 12, "language_expert": "all"}),
        Row("gates", PEFT | {"weight_source": "gates"}),
        Row("gates, equal parameters", PEFT | {"weight_source": "gates", "expert_rank": 140}),
        Row("generated", PEFT)), columns=(), data="dialect", splits=("heldout_dialect",), tuned=150),
    "fig3": Table("the block after which guidance is taken", tuple(
        Row(str(k), {"guidance_after": k} if k != 2 else {}) for k in (1, 2, 3)), reference=1, columns=(), axis="blocks before guidance"),
    "fig4": Table("the width of the embedding (rank 16), the rank (embedding 16)", tuple(
        [Row(f"E={e}", {"expert_embed": e} if e != 16 else {}) for e in (4, 8, 16, 32, 64)]
        + [Row(f"R={r}", {"expert_rank": r} if r != 16 else {}) for r in (2, 4, 8, 16, 32)]), reference=2, columns=(),
        axis="E: width of the embedding, R: of the bottleneck"),
    "vlora3": Table("VLoRA: which weights a picture changes", (
        Row("qkvom", vlora(), (63.4, 1311.3, 66.4, 26.4, 36.0, 28.6)),
        Row("qkvm", vlora(vlora_sites="qkvm"), (59.6, 1227.5, 64.6, 23.4, 34.7, 24.9)),
        Row("qkv", vlora(vlora_sites="qkv"), (59.4, 1267.9, 65.8, 23.2, 33.9, 28.8)),
        Row("qko", vlora(vlora_sites="qko"), (57.2, 1240.5, 64.0, 23.4, 34.6, 24.9)),
        Row("qk", vlora(vlora_sites="qk"), (53.3, 1169.8, 65.0, 23.5, 36.7, 21.8))), reference=0, columns=VLORA),
    "vlora4": Table("VLoRA: the rank (of 4096 there, of 192 here)", (
        Row("16 / 4", vlora(vlora_rank=4), (59.4, 1212.7, 67.1, 22.9, 39.3, 24.5)),
        Row("32 / 8", vlora(vlora_rank=8), (60.7, 1235.6, 67.2, 23.5, 36.0, 25.3)),
        Row("64 / 16", vlora(), (63.4, 1311.3, 66.4, 26.4, 36.0, 28.6)),
        Row("128 / 32", vlora(vlora_rank=32), (61.0, 1228.4, 68.0, 23.8, 33.4, 26.7))), reference=2, columns=VLORA),
    "vlora5": Table("VLoRA: the generators' blocks (there / here)", (
        Row("4 / 1", vlora(vlora_depth=1), (60.7, 1289.3, 63.9, 24.4, 32.0, 26.7)),
        Row("8 / 2", vlora(), (63.4, 1311.3, 66.4, 26.4, 36.0, 28.6)),
        Row("12 / 3", vlora(vlora_depth=3), (61.3, 1289.3, 67.1, 25.5, 34.7, 30.2))), reference=1, columns=VLORA),
}


def row_name(options):
    return ",".join(f"{k}={v}" for k, v in sorted(options.items())) or "ours"


def steps_of(o, row):
    """The steps of a row's stage 2."""
    return o.steps * row.times


def row_folder(o, row, seed):
    """Where stage 2 of a row is trained."""
    folder = f"{TABLES[o.table].data}_{o.align}_{steps_of(o, row)}"
    return os.path.join(o.out, folder, row_name(row.options), f"seed{seed}")


def splits_of(o):
    """The test sets that the rows are scored on; the first one counts."""
    if not o.validate:
        return TABLES[o.table].splits
    return ("validation_dialect" if TABLES[o.table].data == "dialect" else "validation",)


def scores_file(o, folder):
    """Where the scores of the row in `folder` are."""
    return os.path.join(folder, "validation.json" if o.validate else "scores.json")
