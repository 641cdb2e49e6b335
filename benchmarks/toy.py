"""The toy's benchmark, for eval.py (`python eval.py --model out/toy/stage2`) and `python train.py`.

Every question of the held-out pictures is asked as a single turn and answered greedily; exact
matches are counted. The same questions with another picture, or with the experts off or swapped,
show where the answers come from. scores.json and gallery.png go beside the checkpoint's folder.

Next: ablation.py takes the experts away; toy/files.py makes the questions.
"""
import collections
import dataclasses
import math
import os
import shlex
import time
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from benchmarks.ablation import experts_off, experts_swapped
from data import encode_prompt, open_image, pixels
from formats.json_files import read_json_list
from inference.prepare import ready_for_answers
from sample import answer
from toy.files import write_atomically
from toy.questions import objects_in
from toy.world import FAMILIES
from weights import load

BATCH = 128  # questions answered at once
ROWS = {  # key in scores.json: name in the table
    "heldout": "held-out pictures", "combination": "unseen colour-shape pairs",
    "shuffled": "pictures exchanged", "majority": "constant answer",
    "experts_off": "experts off", "experts_swapped": "experts swapped"}


@dataclass
class PictureQuestion:
    """One question of a test set, as a single turn about one picture."""
    family: str
    template: str
    text: str
    answer: str
    image: str  # path, or the name given to `Answerer.add_picture`


def load_questions(folder, split):
    """The `PictureQuestion`s of folder/SPLIT.json."""
    rows = read_json_list(os.path.join(folder, f"{split}.json"))
    return [PictureQuestion(row["family"], row["template"],
                            *(message["value"] for message in row["conversations"]),
                            os.path.join(folder, "images", row["image"])) for row in rows]


# ---- Answers


class Answerer:
    """A checkpoint that answers `PictureQuestion`s; each picture goes through the tower once.

    The checkpoint's model is made ready for answers: it cannot be trained any more.
    """

    def __init__(self, checkpoint, max_new_tokens=72):
        ready_for_answers(checkpoint.model.eval())
        self.checkpoint, self.max_new_tokens = checkpoint, max_new_tokens
        self.features = {}  # name of a picture: float[N, C]

    @torch.no_grad()
    def add_picture(self, name, image):
        """Encode a PIL image. Questions refer to it by `name`."""
        model = self.checkpoint.model
        visual = pixels(image, self.checkpoint.preprocess)[None].to(model.llm.embed_tokens.weight)
        self.features[name] = model.features(visual)[0]

    def features_of(self, name):
        """Features float[N, C] of a picture. A name that was not added is the path of a file."""
        if name not in self.features:
            self.add_picture(name, open_image(name, name))
        return self.features[name]

    def __call__(self, questions, label):
        """The answers, list[str], in order. label: of the progress bar."""
        tokenizer, layout = self.checkpoint.tokenizer, self.checkpoint.prompt_format()
        answers = []
        for i in tqdm(range(0, len(questions), BATCH), label, mininterval=5):
            some = questions[i:i + BATCH]
            samples = [encode_prompt([], q.text, tokenizer, layout, q.image) for q in some]
            visual = [self.features_of(q.image) for q in some]
            ids = answer(self.checkpoint, samples, visual, self.max_new_tokens)
            answers += [tokenizer.decode(row).strip() for row in ids]
        return answers


# ---- Scores


def exact(questions, answers):
    """{"n", "mean", "families": {family: accuracy}} of exact matches; the mean is over families."""
    right = collections.defaultdict(list)
    for q, a in zip(questions, answers):
        right[q.family].append(a == q.answer)
    order = [f for f in dict.fromkeys((*FAMILIES, *right)) if f in right]
    families = {f: sum(right[f]) / len(right[f]) for f in order}
    mean = sum(families.values()) / len(families)
    return {"n": len(questions), "mean": mean, "families": families}


def majority(questions, reference):
    """For each question, the commonest answer to its template among the questions `reference`, ""
    if they do not have it.

    This is the best that can be done without seeing the picture.
    """
    answers = collections.defaultdict(collections.Counter)
    for q in reference:
        answers[q.template][q.answer] += 1
    commonest = {template: max(counts, key=counts.get) for template, counts in answers.items()}
    return [commonest.get(q.template, "") for q in questions]


def exchanged(questions):
    """The same questions about another picture: each picture's questions go to the next one."""
    images = list(dict.fromkeys(q.image for q in questions))
    following = dict(zip(images, images[1:] + images[:1]))
    return [dataclasses.replace(q, image=following[q.image]) for q in questions]


def object_f1(questions, answers):
    """F1 of the (size, colour, shape) that captions name, over all captions together."""
    hits = predicted = actual = 0
    for q, a in zip(questions, answers):
        found, expected = objects_in(a), objects_in(q.answer)
        hits += (found & expected).total()
        predicted += found.total()
        actual += expected.total()
    return 2 * hits / max(1, predicted + actual)


def score(model, folder, out, began, base=None, device="cpu"):
    """Score a toy checkpoint; write out/scores.json and out/gallery.png; print what came out.

    model   folder of the checkpoint; folder: of the world
    began   time.perf_counter() when the run began whose "seconds" are counted
    base    of a LoRA, see `weights.load`
    device  cuda or cpu, where the model answers
    """
    checkpoint = load(model, base=base)
    checkpoint.model.to(device)
    os.makedirs(out, exist_ok=True)
    answerer = Answerer(checkpoint)
    everything, splits = load_questions(folder, "heldout"), {}
    captions = [q for q in everything if q.family == "caption"]
    held_out = [q for q in everything if q.family != "caption"]
    unseen = [q for q in load_questions(folder, "combination") if q.family != "caption"]

    def ask(key, questions):
        answers = answerer(questions, ROWS[key])
        splits[key] = exact(questions, answers)
        return answers

    answers = ask("heldout", held_out)
    ask("combination", unseen)
    ask("shuffled", exchanged(held_out))
    splits["majority"] = exact(held_out, majority(held_out, load_questions(folder, "validation")))
    with experts_off(checkpoint.model):
        ask("experts_off", held_out)
    with experts_swapped(checkpoint.model):
        ask("experts_swapped", held_out)
    f1 = object_f1(captions, answerer(captions, "captions"))
    gallery(held_out, answers, os.path.join(out, "gallery.png"))
    scores = {"seconds": round(time.perf_counter() - began, 1), "splits": splits,
              "captions": {"object_f1": f1}}
    write_atomically(os.path.join(out, "scores.json"), scores)
    print(table(scores), closing(model, out, example(held_out, answers)), sep="\n\n")


def table(scores):
    """The scores as aligned text, at most 100 columns wide, in per cent."""
    heads = "".join(f"{family:>8s}" for family in FAMILIES)
    lines = [f"{'right answers, %':25s}{heads}{'mean':>6s}{'n':>5s}"]
    for key, row in scores["splits"].items():
        cells = "".join(f"{100 * row['families'].get(f, math.nan):8.1f}" for f in FAMILIES)
        lines.append(f"{ROWS[key]:25s}{cells}{100 * row['mean']:6.1f}{row['n']:5d}")
    f1 = 100 * scores["captions"]["object_f1"]
    lines.append(f"captions: object F1 {f1:.1f} %    total time: {scores['seconds']:.0f} s")
    return "\n".join(lines)


def example(questions, answers):
    """A question to try: one with a right answer, about a shape if possible."""
    right = [q for q, a in zip(questions, answers) if a == q.answer] or questions
    return next((q for q in right if q.family == "shape"), right[0])


def closing(model, out, question):
    """Where the results are, and a command to try: `question`, put to the checkpoint."""
    prompt = shlex.quote(question.text.removeprefix("<image>\n"))
    return "\n".join([
        f"checkpoint  {model}",
        f"scores      {os.path.join(out, 'scores.json')}",
        f"gallery     {os.path.join(out, 'gallery.png')}: pictures with questions and answers",
        *(f"curves      {path}: loss of all stages" for path in [os.path.join(out, "curves.png")]
          if os.path.exists(path)),
        f"try         python sample.py --model {shlex.quote(model)} --prompt {prompt} \\",
        f"                --image {shlex.quote(question.image)}"])


# ---- The gallery


def gallery(questions, answers, path, *, columns=4, rows=3, scale=4):
    """Write a sheet of pictures, each with three of its questions and the answers.

    A right answer is green, a wrong one red, followed by the truth.
    """
    by_image = collections.defaultdict(list)
    for q, a in zip(questions, answers):
        by_image[q.image].append((q.text.removeprefix("<image>\n"), a, q.answer))
    images = list(by_image)[::max(1, len(by_image) // (columns * rows))][:columns * rows]
    panels = [(open_image(image, image), by_image[image][i % 3::3][:3])
              for i, image in enumerate(images)]
    font = ImageFont.load_default(13)
    side = scale * max(max(picture.size) for picture, _ in panels)
    lengths = [round(font.getlength(text)) for _, turns in panels for text, _, _ in turns]
    width, height = 30 + max(side, *lengths), side + 125
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (picture, turns) in enumerate(panels):
        x, y = i % columns * width + 10, i // columns * height + 10
        size = picture.width * scale, picture.height * scale
        sheet.paste(picture.resize(size, Image.Resampling.NEAREST), (x, y))
        for j, turn in enumerate(turns):
            write_turn(pen, font, (x, y + side + 5 + 34 * j), *turn)
    sheet.save(path)


def write_turn(pen, font, place, question, answer, truth):
    """Write a question at `place`, (x, y) in pixels, and the answer below it."""
    x, y = place
    text, colour = (answer, "green") if answer == truth else (f"{answer}   (truth: {truth})", "red")
    pen.text((x, y), question, "black", font)
    pen.text((x, y + 15), text, colour, font)
