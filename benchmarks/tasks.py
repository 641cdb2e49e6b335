"""The table of tasks: what each one asks, what it needs, how it is scored, what was published.

`python eval.py --list` prints it. Paths are those of LLaVA's eval.zip, below --root; the three
tasks that only VLoRA reports are tables of VLMEvalKit. Next: questions.py.
"""
from dataclasses import dataclass

from benchmarks import choices, judged, questions, toy, vqa, yes_no
from benchmarks.questions import LETTER, LETTER_CN, WORD

EVALAI = "eval.ai/web/challenges/challenge-page/"
OPENMMLAB = "download.openmmlab.com/mmclassification/datasets"
VLMEVAL = "opencompass.openxlab.space/utils/VLMEval"
VIZWIZ = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + WORD


@dataclass(frozen=True)
class Task:
    """One benchmark."""
    title: str
    questions: str                 # file of the questions
    images: str = ""               # folder of the pictures; "": they are in the file
    suffix: str | None = ""        # what a question ends with; added to it where the file lacks it
    fits: str = ""                 # pattern of "question_id image category" in a file of LLaVA's
    split: str = ""                # rows to read of a table; "": all
    picture: tuple = ("image", "{}")  # key and name of the picture in a file of annotations
    read: object = questions.read_jsonl
    score: object = None           # None: only a server can
    metric: str = "accuracy"
    needs: tuple = ()              # other files that scoring reads
    ask: object = None             # the judge's requests
    submit: object = None          # (function, ending of the file)
    repeats: bool = False          # ids repeat, with other texts: two questions about a picture
    tokens: int = 128              # longest answer, as in LLaVA's script for the task
    source: str = ""               # where pictures and annotations come from
    published: tuple = ()          # LLaVA-1.5, HyperLLaVA, VLoRA: the papers' 7B figures


def table(title, path, suffix, published, **more):
    """A task whose questions and pictures are in one TSV."""
    return Task(title, path, suffix=suffix, read=questions.read_tsv, tokens=1024,
                published=published, **{"score": choices.score_table, **more})


TASKS = {
    "vqav2": Task(
        "VQAv2 test-dev", "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", "vqav2/test2015", WORD,
        r"\d+ COCO_test2015_\S+ .*", needs=("vqav2/llava_vqav2_mscoco_test2015.jsonl",),
        submit=(vqa.submit_vqav2, "json"), source=f"{EVALAI}830; images.cocodataset.org test2015",
        published=(78.5, 79.1, None)),
    "vqav2_val": Task(
        "VQAv2 validation", "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", "vqav2/val2014",
        WORD, picture=("image_id", "COCO_val2014_{:012d}.jpg"), read=questions.read_val,
        score=vqa.score_vqa, needs=("vqav2/v2_mscoco_val2014_annotations.json",),
        source="visualqa.org"),
    "gqa": Task(
        "GQA", "gqa/llava_gqa_testdev_balanced.jsonl", "gqa/data/images", WORD,
        r"\d+ n?\d+\.jpg .*", score=vqa.score_gqa,
        needs=("gqa/data/questions1.2/testdev_balanced_questions.json",),
        source="cs.stanford.edu/people/dorarad/gqa", published=(62.0, 62.7, None)),
    "vizwiz": Task(
        "VizWiz test", "vizwiz/llava_test.jsonl", "vizwiz/test", VIZWIZ, r"\d+ VizWiz_test_\S+ .*",
        submit=(vqa.submit_vizwiz, "json"), source=f"{EVALAI}2185; vizwiz.org",
        published=(50.0, 51.9, None)),
    "vizwiz_val": Task(
        "VizWiz validation", "vizwiz/val.json", "vizwiz/val", VIZWIZ, read=questions.read_val,
        score=vqa.score_vqa, source="vizwiz.org"),
    "scienceqa": Task(
        "ScienceQA-IMG", "scienceqa/llava_test_CQM-A.json", "scienceqa/images/test", LETTER,
        read=questions.read_scienceqa, score=choices.score_scienceqa, metric="accuracy, IMG",
        needs=("scienceqa/problems.json", "scienceqa/pid_splits.json"), tokens=1024,
        source="github.com/lupantech/ScienceQA", published=(66.8, 70.4, 66.4)),
    "textvqa": Task(
        "TextVQA", "textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/train_images", WORD,
        r"(\w{16}) \1\.jpg .*", score=vqa.score_textvqa, repeats=True,
        needs=("textvqa/TextVQA_0.5.1_val.json",), source="textvqa.org/dataset",
        published=(58.2, 58.5, None)),
    "pope": Task(
        "POPE", "pope/llava_pope_test.jsonl", "pope/val2014", WORD,
        r"\d+ COCO_val2014_\S+ (adversarial|popular|random)", score=yes_no.score_pope,
        metric="F1, mean of 3", needs=tuple(f"pope/coco/coco_pope_{s}.json" for s in yes_no.POPE),
        source="github.com/AoiDragon/POPE at e3e39262; images.cocodataset.org val2014",
        published=(85.9, 86.3, None)),
    "mme": Task(
        "MME", "MME/llava_mme.jsonl", "MME/MME_Benchmark_release_version", WORD,
        r"(\w+)/\S+ \1/\S+ \1", score=yes_no.score_mme, metric="perception", repeats=True,
        needs=("MME/MME_Benchmark_release_version",), published=(1510.7, 1481.2, 1311.3),
        source="github.com/BradyFU/Awesome-Multimodal-Large-Language-Models"),
    "mmbench": table("MMBench dev", "mmbench/mmbench_dev_20230712.tsv", LETTER, (64.3, 65.9, 63.4),
                     submit=(choices.submit_table, "xlsx"), source=f"{OPENMMLAB}/mmbench"),
    "mmbench_cn": table("MMBench-CN dev", "mmbench_cn/mmbench_dev_cn_20231003.tsv", LETTER_CN,
                        (58.3, 60.6, None), submit=(choices.submit_table, "xlsx"),
                        source=f"{OPENMMLAB}/mmbench"),
    "seed": Task(
        "SEED-Bench", "seed_bench/llava-seed-bench.jsonl", "seed_bench", LETTER, r"v?\d+ SEED.*",
        score=choices.score_seed, needs=("seed_bench/SEED-Bench.json",),
        source="github.com/AILab-CVC/SEED-Bench, DATASET.md", published=(58.6, 61.4, None)),
    "llava_bench": Task(
        "LLaVA-Bench (wild)", "llava-bench-in-the-wild/questions.jsonl",
        "llava-bench-in-the-wild/images", fits=r"\d+ \S+ (conv|detail|complex)", tokens=1024,
        score=judged.score_llava_bench, metric="% of GPT-4's", ask=judged.ask_llava_bench,
        needs=tuple(f"llava-bench-in-the-wild/{name}" for name in
                    ("context.jsonl", "answers_gpt4.jsonl", "rule.json")),
        source="huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
        published=(63.4, 64.0, None)),
    "mm_vet": Task(
        "MM-Vet", "mm-vet/llava-mm-vet.jsonl", "mm-vet/images", fits=r"\d+ v1_\S+ .*", tokens=1024,
        score=judged.score_mm_vet, metric="mean grade", ask=judged.ask_mm_vet,
        submit=(judged.submit_mm_vet, "json"),
        needs=("mm-vet/mm-vet.json", "mm-vet/mm-vet_evaluator.py"),
        source="github.com/yuweihao/MM-Vet, release v1", published=(30.5, 31.0, None)),
    "hallusion": table("HallusionBench", "HallusionBench.tsv", "", (27.6, None, 26.4),
                       score=yes_no.score_hallusion, metric="mean of 3", source=VLMEVAL),
    "mmmu": table("MMMU validation", "MMMU_DEV_VAL.tsv", None, (35.7, None, 36.0),
                  score=choices.score_mmmu, split="validation", source=VLMEVAL),
    "ccbench": table("CCBench", "CCBench.tsv", None, (27.5, None, 28.6), source=VLMEVAL),
    "toy": Task("the toy world", "world/ beside the model", score=toy.score, source="train.py"),
}


def describe():
    """The table as text: what each task needs, and where it comes from."""
    lines = []
    for name, task in TASKS.items():
        by = "by a judge" if task.ask else "here" if task.score else "by a server"
        lines += [f"{name:12s} {task.title}; scored {by}: {task.metric}",
                  f"    questions {task.questions}"]
        lines += [f"    pictures  {task.images}/"] if task.images else []
        lines += [f"    needs     {path}" for path in task.needs]
        lines += [f"    from      {task.source}"]
    return "\n".join(lines)
