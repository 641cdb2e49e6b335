"""TODO"""
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
from data import (Conversations, encode_conversation, IGNORE, load_records, open_image,
    PromptFormat, read_record, SYSTEM, TAG, truncate)
from formats.tokenizer import Tokenizer
from model import IMAGE


# 5. Looking at data

@dataclass
class Options:
    """Look at training data: --check finds what is bad in it, --show N prints what the model reads."""
    data: str = ""            # LLaVA's JSON file
    images: str = ""          # folder that its pictures' paths start from
    llm: str = ""             # folder with the tokenizer: for --show, and for --check to count what the context cuts
    check: bool = False       # list malformed records, missing and unreadable pictures; exit 1 if any; count the rest
    show: int = 0             # how many conversations to print, the trained part in [[ ]]
    json: bool = False        # with --show: ids, labels, pool_id and use_id as JSON lines
    template: Literal["plain", "v1"] = "v1"  # plain for stage 1, v1 for stage 2
    system: str = SYSTEM      # the text before the first turn
    image_tokens: int = 576   # positions of a picture; 0 for VLoRA
    context: int = 2048       # positions of a sample
    guidance_pool: Literal["instruction", "prompt"] = "instruction"  # what guidance is averaged over

    def __post_init__(self):
        if self.context < 1 or self.image_tokens < 0:
            raise UserError(f"--context {self.context} --image_tokens {self.image_tokens}: expected at least 1, and at least 0")
        if re.search("[\ud800-\udfff]", self.system):
            raise UserError("--system is no valid Unicode")

    def layout(self):
        return PromptFormat(self.template, self.system, self.image_tokens, self.context, self.guidance_pool)


def kinds_of_record(record):
    """What `check` counts a well-formed record as. Of the last three kinds LLaVA learns nothing, without a word."""
    said = {who: [m["value"] for m in record["conversations"] if m["from"] == who] for who in ("human", "gpt")}
    questions, answers = said["human"], said["gpt"]
    texts, pictured = questions + answers, record.get("image") is not None
    found = {
        "with a picture": pictured,
        "of text only": not pictured,
        f"with {TAG} as text: there is no picture for it": any(TAG in t for t in (answers if pictured else texts)),
        f"with several {TAG} in a question: one picture": pictured and any(text.count(TAG) > 1 for text in questions),
        "beginning with an answer: left out": record["conversations"][0]["from"] == "gpt",
        "ending with a question: left out": record["conversations"][-1]["from"] == "human",
        "with an empty message: kept": "" in texts,
        "with </s>, <unk> or ASSISTANT: in a message: text": re.search("</s>|<unk>| ASSISTANT: ", "\n".join(texts))}
    return [kind for kind, true in found.items() if true]


def truncation_kinds(turns, tokenizer, layout, name, image):
    """The kinds of a record that the context cuts."""
    whole = encode_conversation(turns, tokenizer, layout, name, image)
    due = (whole.labels != IGNORE).sum()
    kept = (truncate(whole, layout.context).labels != IGNORE).sum()
    lost = "cut by the context: its last answers are learned in part or not at all"
    return [lost if kept else "with no answer within the context: nothing to learn"] if kept < due else []


def check(o):
    """Print a line for every fault in a data set and how many records are of which kind; UserError if one is faulty."""
    records, layout, counts = load_records(o.data), o.layout(), collections.Counter()
    tokenizer = Tokenizer.load(o.llm) if o.llm else None

    @functools.cache  # a picture may have many records
    def unreadable(path):
        try:
            open_image(path, path)
        except UserError as error:
            return str(error)

    def look(i):
        """(the fault of record i or None, its kinds)"""
        try:
            name, turns, image = read_record(records[i], i, o.images, layout)
            if image is not None and unreadable(image):
                return f"{name}: {unreadable(image)}", []
            return None, kinds_of_record(records[i]) + (truncation_kinds(turns, tokenizer, layout, name, image) if tokenizer else [])
        except UserError as error:
            return str(error), []

    # Pillow decodes outside the interpreter's lock
    with ThreadPoolExecutor() as pool, tqdm(total=len(records), unit=" records", disable=None) as bar:
        for start in range(0, len(records), 256):  # in slices: Ctrl-C waits for what was handed over
            part = range(start, min(start + 256, len(records)))
            for fault, found in pool.map(look, part):
                if fault:
                    bar.write(fault, file=sys.stdout)
                counts.update(["that cannot be used"] if fault else found)
            bar.update(len(part))
    print(f"{len(records)} records")
    for kind, count in counts.most_common():
        print(f"{count:>10} {kind}")
    if counts["that cannot be used"]:
        raise UserError(f"{counts['that cannot be used']} of {len(records)} records cannot be used")


def marked_text(sample, tokenizer):
    """The text of a sample: <s> and </s> spelt out, the picture as a tag, the trained part in [[ ]]."""
    names = {IMAGE: TAG, tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
    text = ""
    marked = zip((sample.labels != IGNORE).tolist(), sample.ids.tolist())
    for trained, part in itertools.groupby(marked, key=lambda pair: pair[0]):
        runs = itertools.groupby((i for _, i in part), key=names.get)
        spelt = "".join(name or tokenizer.decode(list(run)) for name, run in runs)
        text += f" [[{spelt}]]" if trained else spelt
    return text


def show(options):
    """Print the first samples of a data set, as text or as JSON lines."""
    data = Conversations(options.data, options.images, Tokenizer.load(options.llm), options.layout())
    for i in range(min(options.show, len(data))):
        sample = data[i]
        if options.json:
            fields = dataclasses.asdict(sample).items()
            print(json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in fields}))
        else:
            trained = int((sample.labels != IGNORE).sum())
            print(f"--- {sample.record}, picture {sample.image}, "
                  f"{len(sample.ids)} positions, {trained} trained")
            print(marked_text(sample, data.tokenizer))


def run():
    options = Options(**parse(Options))
    needed = ["data", "images"] + ["llm"] * (options.show > 0)
    missing = [f"--{name}" for name in needed if not getattr(options, name)]
    if not (options.check or options.show > 0) or missing:
        raise UserError(f"say --check or --show N, with --data and --images (and --llm to show); "
                        f"missing: {', '.join(missing) or '--check or --show'}")
    if not os.path.isdir(options.images):
        raise UserError(f"--images {options.images}: there is no such folder")
    if options.check:
        check(options)
    if options.show > 0:
        show(options)


if __name__ == "__main__":
    main(run)
