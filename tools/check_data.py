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

from cli import check_numbers, main, MOST, parse, UserError
from data import (Conversations, encode_conversation, IGNORE, IMAGE, open_image, PromptFormat,
                  read_record, TAG, truncate)
from formats.configs import llama_config
from formats.json_files import read_json_list, read_json_object
from formats.pictures import flatten, is_flat
from formats.records import MESSAGE_KEYS, other_keys, RECORD_KEYS
from formats.tokenizer import Tokenizer
from weights import load


@dataclass
class Options:
    """List bad records and pictures of a data set, count the others; exit code 1 if any is bad."""
    # data
    data: str | None = None    # LLaVA's JSON file
    images: str | None = None  # folder that the paths of its pictures start from
    llm: str | None = None     # checkpoint, or folder with a tokenizer: for --show, and to count
                               # truncated records
    # output
    show: int = 0              # print the first N conversations instead, the trained part in [[ ]]
    json: bool = False         # with --show: ids, labels, pool_id and use_id as JSON lines
    # prompt format, as in train.py
    template: Literal["plain", "v1"] = "v1"  # plain for stage 1, v1 for stage 2
    system: str | None = None  # text before the first turn (default: that of --llm, or Vicuna's)
    image_tokens: int | None = None  # positions of a picture; 0 for VLoRA (default: those of --llm,
                               # or 576)
    context: int | None = None  # positions of a sample (default: those of --llm, at most 2048)
    background: Literal["none", "white"] = "none"  # white: behind transparent pixels; none:
                               # transparency is dropped
    guidance_pool: Literal["instruction", "prompt", "last"] | None = None  # as in training
                               # (default: that of --llm, or instruction)

    def __post_init__(self):
        check_numbers(self, {name: (0, MOST, "0 or more") for name in ("show", "image_tokens")})
        if re.search("[\ud800-\udfff]", self.system or ""):
            raise UserError("--system is not valid Unicode")


def tokenizer_and_format(o):
    """(Tokenizer of --llm or None, PromptFormat): what is not given is read from --llm."""
    known = {}
    if o.llm and os.path.exists(path := os.path.join(o.llm, "config.json")):
        if read_json_object(path).get("model_type") == "llama":
            known = {"context": llama_config(o.llm).context}
        else:
            known = dataclasses.asdict(load(o.llm).prompt_format())
        known["context"] = min(2048, known["context"])  # as in training
    given = {"template": o.template, "system": o.system, "image_tokens": o.image_tokens,
             "context": o.context, "pool": o.guidance_pool}
    known |= {name: value for name, value in given.items() if value is not None}
    return Tokenizer.load(o.llm) if o.llm else None, PromptFormat(**known)


def kinds_of_record(record):
    """The kinds that a well-formed record is counted as; docs/data.md says what LLaVA does."""
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
            re.search("</s>|<unk>| ASSISTANT: ", "\n".join(texts)),
        "with <s> in a message: read as text": "<s>" in "\n".join(texts)}
    keys = set(other_keys(record, RECORD_KEYS)).union(
        *(other_keys(message, MESSAGE_KEYS) for message in messages))
    return ([kind for kind, applies in kinds.items() if applies]
            + [f"with the key {key}: it is not read" for key in sorted(keys)])


def truncation_kinds(turns, tokenizer, prompt_format, name, image):
    """The kind of a record that the context truncates, as a list: none or one."""
    whole = encode_conversation(turns, tokenizer, prompt_format, name, image)
    trained = (whole.labels != IGNORE).sum()
    kept = (truncate(whole, prompt_format.context).labels != IGNORE).sum()
    if kept == trained:
        return []
    return ["truncated: the context cuts its last answers partly or completely" if kept
            else "without an answer within the context: nothing is trained"]


def flat_kind(image, background):
    """What is counted if a picture has one colour as the model sees it, else None."""
    if not is_flat(flatten(image, background)):
        return None
    change = {"none": "transparency is dropped", "white": "it is on white"}[background]
    return "pictures are one flat colour" + ("" if is_flat(image) else f" once {change}")


def check(options):
    """Print each fault and the number of records of each kind; UserError if there is a fault."""
    records, counts = read_json_list(options.data), collections.Counter()
    tokenizer, prompt_format = tokenizer_and_format(options)
    cut = (f"cut by the context of {prompt_format.context} positions, "
           f"{prompt_format.image_tokens} for a picture")
    flat = {}  # path: kind, of pictures of one colour

    @functools.cache  # many records may share a picture
    def picture_fault(path):
        try:
            kind = flat_kind(open_image(path, path), options.background)
        except UserError as error:
            return str(error)
        if kind:
            flat[path] = kind

    def inspect(i):
        """(the fault of record i or None, its kinds)"""
        try:
            name, turns, image = read_record(records[i], i, options.images, prompt_format)
            if image is not None and picture_fault(image):
                return f"{name}: {picture_fault(image)}", []
            kinds = kinds_of_record(records[i])
            if tokenizer:
                truncated = truncation_kinds(turns, tokenizer, prompt_format, name, image)
                kinds += truncated + [cut] * len(truncated)
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
    if tokenizer:
        counts[cut] += 0  # named also if there is none
    counts.update(flat.values())
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
    data = Conversations(options.data, options.images, *tokenizer_and_format(options))
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
