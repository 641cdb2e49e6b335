"""Small files in the layout of each benchmark, with made-up questions and pictures.

`make_eval(root)` writes all of them: N questions a task, answers that can be known, 28 px pictures.
"""
import base64
import csv
import io
import json
import os

from benchmarks.questions import LETTER, WORD
from benchmarks.tasks import VIZWIZ
from benchmarks.yes_no import COGNITION, PERCEPTION, POPE
from tests.helpers import noise

N = 20
COLOURS = ["red", "blue", "green", "two"]


def write(root, path, value):
    """Write `value`: bytes, text, a list of lines as JSON Lines, anything else as JSON."""
    path = os.path.join(root, path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if isinstance(value, list):
        value = "".join(json.dumps(row) + "\n" for row in value)
    if not isinstance(value, bytes):
        value = (value if isinstance(value, str) else json.dumps(value)).encode()
    with open(path, "wb") as f:
        f.write(value)


def png(seed):
    """The bytes of a small picture."""
    file = io.BytesIO()
    noise(seed, (30, 20)).save(file, "png")
    return file.getvalue()


def write_table(root, path, rows):
    with open(os.path.join(root, path), "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, list(rows[0]), delimiter="\t", lineterminator="\n")
        out.writeheader()
        out.writerows(rows)


def make_vqa(root):
    rows = [{"question_id": i, "image": f"COCO_test2015_{i:012d}.jpg",
             "text": f"What is {i}?{WORD}", "category": "default"} for i in range(N)]
    write(root, "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl", rows)
    write(root, "vqav2/llava_vqav2_mscoco_test2015.jsonl", rows + [{**rows[0], "question_id": 77}])
    answers = [{"answer": COLOURS[j % 3]} for j in range(10)]
    write(root, "vqav2/v2_OpenEnded_mscoco_val2014_questions.json", {"questions": [
        {"question_id": 10 * i, "image_id": i, "question": f"What is {i}?"} for i in range(N)]})
    write(root, "vqav2/v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_id": 10 * i, "answer_type": "other", "answers": answers} for i in range(N)]})
    write(root, "gqa/llava_gqa_testdev_balanced.jsonl", [
        {"question_id": f"20{i}", "image": f"n{i}.jpg", "text": f"Is it {i}?{WORD}",
         "category": "default"} for i in range(N)])
    write(root, "gqa/data/questions1.2/testdev_balanced_questions.json", {
        f"20{i}": {"answer": "yes", "isBalanced": True,
                   "types": {"structural": ["query", "verify"][i % 2], "semantic": "obj"}}
        for i in range(N)})
    write(root, "vizwiz/llava_test.jsonl", [
        {"question_id": i, "image": f"VizWiz_test_{i:08d}.jpg", "text": f"What is {i}?{VIZWIZ}",
         "category": "default"} for i in range(N)])
    write(root, "vizwiz/val.json", json.dumps([
        {"image": f"VizWiz_val_{i:08d}.jpg", "question": f"What is {i}?", "answer_type": "other",
         "answers": answers} for i in range(N)]))
    # Two questions about each picture, as in the real file
    names, ocr = [f"{i // 2:016x}" for i in range(N)], "\nReference OCR token: A, B"
    write(root, "textvqa/llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": name, "image": f"{name}.jpg", "text": f"What Brand {i}?{ocr}{WORD}",
         "category": "default"} for i, name in enumerate(names)])
    write(root, "textvqa/TextVQA_0.5.1_val.json", {"data": [
        {"image_id": name, "question": f"What brand {i}?", "answers": ["red"] * 6 + ["Blue."] * 4}
        for i, name in enumerate(names)]})
    for i in range(N):
        for path in (f"vqav2/test2015/COCO_test2015_{i:012d}.jpg", f"gqa/data/images/n{i}.jpg",
                     f"vqav2/val2014/COCO_val2014_{i:012d}.jpg",
                     f"textvqa/train_images/{names[i]}.jpg",
                     f"vizwiz/test/VizWiz_test_{i:08d}.jpg", f"vizwiz/val/VizWiz_val_{i:08d}.jpg"):
            write(root, path, png(i))


def make_yes_no(root):
    rows = [{"question_id": start + i, "image": f"COCO_val2014_{i // 2:012d}.jpg",
             "text": f"Is there a {COLOURS[i % 4]} thing in the image?{WORD}", "category": split}
            for split, start in (("adversarial", 1), ("random", 10000001), ("popular", 20000001))
            for i in range(N)]
    write(root, "pope/llava_pope_test.jsonl", rows)
    for split in POPE:
        write(root, f"pope/coco/coco_pope_{split}.json", [
            {"question_id": i + 1, "image": f"COCO_val2014_{i // 2:012d}.jpg", "text": "...",
             "label": ["yes", "no"][i % 2]} for i in range(N)])
    for i in range(N // 2):
        write(root, f"pope/val2014/COCO_val2014_{i:012d}.jpg", png(i))
    lines, folder = [], "MME/MME_Benchmark_release_version"
    for s, subtask in enumerate(PERCEPTION + COGNITION):
        deep = s % 2 == 0  # half of the subtasks have two folders more
        place = f"{subtask}/images/000{s}.png" if deep else f"{subtask}/000{s}.png"
        asked = [f"Is this {word}?" for word in ("a cat", "a dog")]
        lines += [{"question_id": place, "image": place, "text": text + WORD, "category": subtask}
                  for text in asked]
        truth = f"{subtask}/questions_answers_YN/000{s}.txt" if deep else f"{subtask}/000{s}.txt"
        space = " " if s % 3 else "  "
        write(root, f"{folder}/{truth}", "".join(
            f"{text}{space}Please answer yes or no.\t{answer}\n"
            for text, answer in zip(asked, ("Yes", "No"))))
        write(root, f"{folder}/{place}", png(s))
    write(root, "MME/llava_mme.jsonl", lines)
    write_table(root, "HallusionBench.tsv", [
        {"index": f"H_{kind}_chart_{s}_{f}_{q}", "category": kind, "l2-category": "chart",
         "question": "Is it so?", "answer": ["Yes", "No"][(f + q) % 2],
         "image": "" if kind == "VS" and f == 0 else base64.b64encode(png(f)).decode()}
        for kind in ("VD", "VS") for s in range(2) for f in range(3) for q in range(2)])


def option_rows(index, **more):
    """Rows of a table, the options rotated once for every second question."""
    rows, options = [], ["cat", "dog", "red car"]
    for i in range(N):
        for r in range(1 + i % 2):
            turned = options[r:] + options[:r]
            rows.append({"index": index(i, r), "question": f"What is {i}?",
                         "hint": "A hint." * (i % 3), **dict(zip("ABCD", [*turned, "nan"])),
                         "answer": "ABC"[(i - r) % 3], "category": "xy"[i % 2],
                         "image": base64.b64encode(png(i)).decode(),
                         "source": "s", "l2-category": "z", "comment": "", "split": "dev", **more})
    return rows


def make_choices(root):
    rows = []
    for i in range(N):
        image = {"image": f"{i}/image.png"} if i % 2 else {}
        tag = "<image>\n" if i % 2 else ""
        rows.append({"id": str(i), **image, "conversations": [
            {"from": "human", "value": f"{tag}Context: c\nWhich is {i}?\nA. cat\nB. dog"},
            {"from": "gpt", "value": "AB"[i % 2]}]})
        write(root, f"scienceqa/images/test/{i}/image.png", png(i))
    write(root, "scienceqa/llava_test_CQM-A.json", json.dumps(rows))
    write(root, "scienceqa/problems.json",
          {str(i): {"choices": ["cat", "dog"], "answer": i % 2} for i in range(N)})
    write(root, "scienceqa/pid_splits.json", {"test": [str(i) for i in range(N)]})
    ids = [f"v{i}" if i % 4 == 0 else str(i) for i in range(N)]
    write(root, "seed_bench/llava-seed-bench.jsonl", [
        {"question_id": name if name[0] == "v" else i, "image": f"SEED-Bench-image/{i}.png",
         "text": f"What is {i}?\nA. cat\nB. dog\nC. car\nD. sun{LETTER}", "category": "default"}
        for i, name in enumerate(ids)])
    write(root, "seed_bench/SEED-Bench.json", {
        "question_type": {"Scene": 1, "Action": 10},
        "questions": [{"question_id": name, "question_type_id": 10 if name[0] == "v" else 1,
                       "data_type": "video" if name[0] == "v" else "image", "answer": "ABCD"[i % 4]}
                      for i, name in enumerate(ids)]})
    for i in range(N):
        write(root, f"seed_bench/SEED-Bench-image/{i}.png", png(i))
    for folder, name in (("mmbench", "mmbench_dev_20230712"),
                         ("mmbench_cn", "mmbench_dev_cn_20231003")):
        os.makedirs(os.path.join(root, folder), exist_ok=True)
        rows = option_rows(lambda i, r: i + r * 10**6, D="none")  # ends the list for LLaVA
        write_table(root, f"{folder}/{name}.tsv", rows)
    write_table(root, "CCBench.tsv", option_rows(lambda i, r: 2 * i + r, question="这是什么?"))
    rows = option_rows(lambda i, r: f"validation_Art_{2 * i + r}")
    for i, row in enumerate(rows):
        row["split"] = "validation" if i % 4 else "dev"
    rows[5] |= {"A": "", "B": "", "C": "", "answer": "24"}  # an open question
    rows[6]["image"] = str([base64.b64encode(png(n)).decode() for n in (8, 9)])
    rows[7]["image"] = rows[3]["index"]  # the picture of that row
    write_table(root, "MMMU_DEV_VAL.tsv", rows)


def make_judged(root):
    folder = "llava-bench-in-the-wild"
    write(root, f"{folder}/questions.jsonl", [
        {"question_id": i, "image": f"{i:03d}.jpg", "text": f"What is {i}?",
         "category": ["conv", "detail", "complex"][i % 3]} for i in range(N)])
    write(root, f"{folder}/context.jsonl", [
        {"image": f"{i:03d}.jpg", "caption": ["one", "two"] if i % 2 else "three"}
        for i in range(N)])
    write(root, f"{folder}/answers_gpt4.jsonl",
          [{"question_id": i, "text": f"It is {i}."} for i in range(N)])
    write(root, f"{folder}/rule.json", {
        f"llava_bench_{kind}": {"role": "Assistant", "prompt": "Rate."}
        for kind in ("conv", "detail", "complex")})
    write(root, "mm-vet/llava-mm-vet.jsonl", [
        {"image": f"v1_{i}.png", "text": f"What is {i}?", "category": "conv", "question_id": i}
        for i in range(N)])
    write(root, "mm-vet/mm-vet.json", {
        f"v1_{i}": {"question": f"What is {i}?", "answer": "a<AND>b<OR>c",
                    "capability": [["ocr", "math"], ["rec"]][i % 2]} for i in range(N)})
    write(root, "mm-vet/mm-vet_evaluator.py", 'import nothing\nprompt = """Grade it.\n"""\n')
    for i in range(N):
        write(root, f"{folder}/images/{i:03d}.jpg", png(i))
        write(root, f"mm-vet/images/v1_{i}.png", png(i))


def make_eval(root):
    """Write the files of all tasks below `root`."""
    for make in (make_vqa, make_yes_no, make_choices, make_judged):
        make(root)


def make_own(root):
    """mine.json: N conversations of two turns about a picture, below `root`."""
    write(root, "mine.json", json.dumps([
        {"id": f"r{i}", "image": "0.png", "conversations": [
            {"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": "A cat"},
            {"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "yes"}]}
        for i in range(N)]))
    write(root, "pictures/0.png", png(0))
