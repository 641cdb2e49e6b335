"""Check a data set before training: `python -m tools.check_data --data J.json --images DIR`.

Lists every record that training would refuse, and counts the rest by kind. `--show N` prints what
the model reads instead. The format is described in docs/data.md; data.py reads it.
"""
import collections
import dataclasses
import functools
import itertools
import json
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from tqdm import tqdm

from cli import main, parse, UserError
from data import (Conversations, encode_conversation, IGNORE, IMAGE, load_records, open_image,
                  PromptFormat, read_record, SYSTEM, TAG, truncate)
from formats.tokenizer import Tokenizer


@dataclass
class Options:
    """List bad records and pictures of a data set, count the others; exit code 1 if any is bad."""
    # data
    data: str | None = None    # LLaVA's JSON file
    images: str | None = None  # folder that the paths of its pictures start from
    llm: str | None = None     # folder with a tokenizer: for --show, and to count truncated records
    # output
    show: int = 0              # print the first N conversations instead, the trained part in [[ ]]
    json: bool = False         # with --show: ids, labels, pool_id and use_id as JSON lines
    # prompt format, as in train.py
    template: Literal["plain", "v1"] = "v1"  # plain for stage 1, v1 for stage 2
    system: str = SYSTEM       # text before the first turn
    image_tokens: int = 576    # positions of a picture; 0 for VLoRA
    context: int = 2048        # positions of a sample
    guidance_pool: Literal["instruction", "prompt", "last"] = "instruction"  # as in training

    def __post_init__(self):
        if self.context < 1:
            raise UserError(f"--context {self.context}: expected 1 or more")
        if self.image_tokens < 0:
            raise UserError(f"--image_tokens {self.image_tokens}: expected 0 or more")
        if re.search("[\ud800-\udfff]", self.system):
            raise UserError("--system is not valid Unicode")

    def prompt_format(self):
        return PromptFormat(self.template, self.system, self.image_tokens, self.context,
                            self.guidance_pool)


def kinds_of_record(record):
    """The kinds that a well-formed record is counted as.

    LLaVA silently trains on nothing for the last three kinds.
    """
    messages, has_image = record["conversations"], record.get("image") is not None
    questions, answers = ([m["value"] for m in messages if m["from"] == role]
                          for role in ("human", "gpt"))
    texts = questions + answers
    kinds = {
        "with a picture": has_image,
        "without a picture": not has_image,
        f"with {TAG} as text: it refers to no picture":
            any(TAG in text for text in (answers if has_image else texts)),
        f"with several {TAG} in a question: they count as one":
            has_image and any(text.count(TAG) > 1 for text in questions),
        "beginning with an answer: it is left out": messages[0]["from"] == "gpt",
        "ending with a question: it is left out": messages[-1]["from"] == "human",
        "with an empty message: it is kept": "" in texts,
        "with </s>, <unk> or ASSISTANT: in a message: read as text":
            re.search("</s>|<unk>| ASSISTANT: ", "\n".join(texts))}
    return [kind for kind, applies in kinds.items() if applies]


def truncation_kinds(turns, tokenizer, prompt_format, name, image):
    """The kind of a record that the context truncates, as a list: none or one."""
    whole = encode_conversation(turns, tokenizer, prompt_format, name, image)
    trained = (whole.labels != IGNORE).sum()
    kept = (truncate(whole, prompt_format.context).labels != IGNORE).sum()
    if kept == trained:
        return []
    return ["truncated: the context cuts its last answers partly or completely" if kept
            else "without an answer within the context: nothing is trained"]


def check(options):
    """Print each fault and the number of records of each kind; UserError if there is a fault."""
    records, counts = load_records(options.data), collections.Counter()
    prompt_format = options.prompt_format()
    tokenizer = Tokenizer.load(options.llm) if options.llm else None

    @functools.cache  # many records may share a picture
    def picture_fault(path):
        try:
            open_image(path, path)
        except UserError as error:
            return str(error)

    def inspect(i):
        """(the fault of record i or None, its kinds)"""
        try:
            name, turns, image = read_record(records[i], i, options.images, prompt_format)
            if image is not None and picture_fault(image):
                return f"{name}: {picture_fault(image)}", []
            kinds = kinds_of_record(records[i])
            if tokenizer:
                kinds += truncation_kinds(turns, tokenizer, prompt_format, name, image)
            return None, kinds
        except UserError as error:
            return str(error), []

    # Threads are enough: Pillow releases the GIL while it decodes
    bar = tqdm(total=len(records), unit=" records", disable=None)
    with ThreadPoolExecutor() as pool, bar:
        for start in range(0, len(records), 256):  # in slices: Ctrl-C waits only for one of them
            part = range(start, min(start + 256, len(records)))
            for fault, kinds in pool.map(inspect, part):
                if fault:
                    bar.write(fault, file=sys.stdout)
                counts.update(["that cannot be used"] if fault else kinds)
            bar.update(len(part))
    print(f"{len(records)} records")
    for kind, count in counts.most_common():
        print(f"{count:>10} {kind}")
    if counts["that cannot be used"]:
        raise UserError(f"{counts['that cannot be used']} of {len(records)} records cannot be used")


def marked_text(sample, tokenizer):
    """The text of a sample, with <s>, </s> and <image> spelled out, the trained part in [[ ]]."""
    names = {IMAGE: TAG, tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    text = ""
    marked = zip((sample.labels != IGNORE).tolist(), sample.ids.tolist())
    for trained, part in itertools.groupby(marked, key=lambda pair: pair[0]):
        runs = itertools.groupby((i for _, i in part), key=names.get)
        spelled = "".join(name or tokenizer.decode(list(run)) for name, run in runs)
        text += f" [[{spelled}]]" if trained else spelled
    return text


def show(options):
    """Print the first samples of a data set, as text or as JSON lines."""
    data = Conversations(options.data, options.images, Tokenizer.load(options.llm),
                         options.prompt_format())
    for i in range(min(options.show, len(data))):
        sample = data[i]
        if options.json:
            print(json.dumps(dataclasses.asdict(sample), default=np.ndarray.tolist))
        else:
            trained = int((sample.labels != IGNORE).sum())
            print(f"--- {sample.record}, picture {sample.image}, "
                  f"{len(sample.ids)} positions, {trained} trained")
            print(marked_text(sample, data.tokenizer))


def run():
    options = Options(**parse(Options))
    needed = ["data", "images"] + ["llm"] * (options.show > 0)
    missing = [f"--{name}" for name in needed if not getattr(options, name)]
    if missing:
        raise UserError(f"missing {', '.join(missing)}: expected --data J.json --images DIR, "
                        "and for --show also --llm DIR")
    if not os.path.isdir(options.images):
        raise UserError(f"--images {options.images}: folder not found")
    if options.show > 0:
        show(options)
    else:
        check(options)


if __name__ == "__main__":
    main(run)
