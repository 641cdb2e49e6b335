"""Questions to be answered with yes or no: POPE, MME, HallusionBench.

The three tools read an answer differently; `first_word` is the kind reading of --strict.
Next: choices.py.
"""
import collections
import glob
import os
import re

import numpy as np

from benchmarks.questions import checked, WORD
from benchmarks.report import Score, unanswered
from benchmarks.vqa import split_marks
from cli import UserError
from formats.json_files import read_bytes, read_json_lines

POPE = "adversarial", "popular", "random"
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
COGNITION = "commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"


def first_word(text):
    """yes or no, whichever comes first as a word, in any case; None if neither does."""
    found = re.search(r"\b(yes|no)\b", text.lower())
    return found and found[1]


# ---- POPE


def pope_answer(text):
    """no if the first sentence contains No, no or not as a word, else yes: also for "NO" and ""."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def f1_of(means):
    """F1 from the means of true positives, false positives and false negatives."""
    hits, false, missed = means
    return 2 * hits / (2 * hits + false + missed) if hits else 0.0


def pope_labels(questions, labels, name, by_id):
    """The labels of a split's questions: in the order of both files, or by question_id.

    The ids of LLaVA's file are those of POPE's plus 0, 10,000,000 or 20,000,000.
    """
    if not by_id:
        return [checked(row, label, "label")["label"] for label, row in labels]
    rows = {checked(row, label, "question_id", "image", "label")["question_id"]: row
            for label, row in labels}
    found = [rows.get(int(q.id) % 10**7, {}) for q in questions]
    for q, row in zip(questions, found):
        if row.get("image") != q.row["image"]:
            raise UserError(f"{q.label}: {name} has no question about {q.row['image']} with its id")
    return [row["label"] for row in found]


def score_pope(questions, texts, root, strict):
    """F1, the mean of three splits; a split also has accuracy, precision, recall and yes-share."""
    unanswered(questions, texts)
    groups, details, notes = [], {}, []
    for split in POPE:
        name = os.path.join(root, f"pope/coco/coco_pope_{split}.json")
        some = [(q, t) for q, t in zip(questions, texts) if q.row["category"] == split]
        labels = pope_labels([q for q, _ in some], read_json_lines(name), name, strict)
        if not some or not labels:
            raise UserError(f"POPE's split {split} has {len(some)} questions, and {len(labels)} "
                            f"labels in {name}")
        if len(labels) != len(some):
            notes.append(f"{split}: {len(some)} questions, but {len(labels)} labels in {name}; "
                         "they are paired by order, so the rest of the longer file is left out")
        said = [first_word(t) if strict else pope_answer(t) for _, t in some]
        pairs = list(zip(said, (label != "no" for label in labels)))
        rows = [(yes and say == "yes", not yes and say != "no", yes and say != "yes",
                 not yes and say == "no") for say, yes in pairs]
        counts = np.array(rows, float)
        hits, false, missed, rejected = counts.mean(0)
        groups.append(counts[:, :3])
        details |= {f"{split} F1": 100 * f1_of(counts.mean(0)[:3]),
                    f"{split} accuracy": 100 * (hits + rejected),
                    f"{split} precision": 100 * hits / (hits + false) if hits else 0.0,
                    f"{split} recall": 100 * hits / (hits + missed) if hits else 0.0,
                    f"{split} yes": 100 * said.count("yes") / len(said)}
    return Score(groups, lambda means: 100 * sum(map(f1_of, means)) / len(means), details, notes)


# ---- MME


def mme_answer(text):
    """yes or no if one stands in the first four characters, else None: a wrong answer."""
    start = text.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else None


def mme_truth(root):
    """{(subtask, file, question): Yes or No} of MME_Benchmark_release_version."""
    folder, truth = os.path.join(root, "MME/MME_Benchmark_release_version"), {}
    for subtask in PERCEPTION + COGNITION:
        place = os.path.join(folder, subtask)
        deeper = os.path.join(place, "questions_answers_YN")
        for path in glob.glob(os.path.join(deeper if os.path.isdir(deeper) else place, "*.txt")):
            for n, line in enumerate(read_bytes(path).splitlines(), 1):
                question, _, answer = line.decode(errors="replace").strip().partition("\t")
                if answer.lower() not in ("yes", "no"):
                    raise UserError(f"{path} line {n}: expected a question, a tab, and Yes or No")
                truth[subtask, os.path.basename(path), question] = answer
    return truth


def mme_label(question, truth):
    """yes or no: MME's answer to a question of LLaVA's file, which words the ending differently."""
    subtask, file = question.id.split("/")[0], os.path.basename(question.id).split(".")[0] + ".txt"
    text = question.prompt.replace(WORD.strip(), "").strip()
    for space in (" ", "  "):  # some of MME's questions have two
        if answer := truth.get((subtask, file, f"{text}{space}Please answer yes or no.")):
            return answer.lower()
    raise UserError(f"{question.label}: {subtask}/{file} of MME_Benchmark_release_version does not "
                    "have this question")


def score_mme(questions, texts, root, strict):
    """The sum over the subtasks of perception of 100 accuracy + 100 accuracy+, 2,000 at most.

    Each picture has two questions; accuracy+ counts the pictures with both right.
    """
    unanswered(questions, texts)
    truth, right = mme_truth(root), collections.defaultdict(lambda: collections.defaultdict(list))
    for q, text in zip(questions, texts):
        # The tool fails on a line break or a tab in an answer: it tells users to delete them
        said = first_word(text) if strict else mme_answer(re.sub(r"[\r\n\t]", " ", text))
        right[q.id.split("/")[0]][q.id].append(said == mme_label(q, truth))
    pairs, details, notes = {}, {}, []
    for name, pictures in right.items():
        for id, answers in pictures.items():
            if len(answers) != 2:
                raise UserError(f"the question file of MME has {len(answers)} questions about "
                                f"{id}, expected 2")
        two = np.array([*pictures.values()], float)
        pairs[name] = np.stack([two.mean(1), two.prod(1)], axis=1)
        accuracy, plus = 100 * pairs[name].mean(0)
        details |= {f"{name}: score": accuracy + plus, f"{name}: accuracy": accuracy,
                    f"{name}: accuracy+": plus}
    lacking = [name for name in PERCEPTION + COGNITION if name not in pairs]
    if lacking:
        notes.append(f"no questions of {', '.join(lacking)}")

    def total(means):
        return 100 * sum(mean.sum() for mean in means)

    perception, cognition = ([pairs[name] for name in names if name in pairs]
                             for names in (PERCEPTION, COGNITION))
    details |= {"perception": total([rows.mean(0) for rows in perception]),
                "cognition": total([rows.mean(0) for rows in cognition])}
    return Score(perception, total, details, notes)


# ---- HallusionBench


def hallusion_answer(text):
    """VLMEvalKit's reading: Yes or No if one of them is a word of the answer and the other is not.
    """
    words = split_marks(text.lower(), r"(?<!\d)\.(?!\d)").split()
    found = [word for word in ("yes", "no") if word in words]
    return found[0] if len(found) == 1 else None


def score_hallusion(questions, texts, root, strict):
    """The mean of three accuracies: over questions, over figures and over questions' texts, of
    which all have to be right. A resample draws whole sets."""
    unanswered(questions, texts)
    right = []
    for q, text in zip(questions, texts):
        parts = str(q.id).split("_")
        if len(parts) < 6 or not q.row.get("l2-category"):
            raise UserError(f"{q.label}: expected an index with set, figure and question, "
                            "and an l2-category")
        said = first_word(text) if strict else hallusion_answer(text)
        right.append(((q.row["l2-category"], *parts[3:6]), said == str(q.row["answer"]).lower()))
    sums = collections.defaultdict(lambda: np.zeros(6))
    for key, value in right:
        sums[key[:2]] += value, 0, 0, 1, 0, 0
    for column, parts in ((1, (0, 1, 2)), (2, (0, 1, 3))):
        whole = collections.defaultdict(list)
        for key, value in right:
            whole[tuple(key[i] for i in parts)].append(value)
        for key, values in whole.items():
            sums[key[:2]][[column, 3 + column]] += all(values), 1
    rows = np.array([*sums.values()])

    def accuracies(means):
        return 100 * means[:3] / means[3:]

    details = dict(zip(("aAcc", "fAcc", "qAcc"), map(float, accuracies(rows.mean(0)))))
    return Score([rows], lambda means: accuracies(means[0]).mean(), details)
