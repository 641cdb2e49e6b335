"""Conversations in LLaVA's JSON format, as files."""
import json


def messages(*texts):
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


GOOD = {"id": "a1", "image": "x.png",
        "conversations": messages("What is this?\n<image>", "A cat.", "Colour?", "red")}


def write_json(folder, records):
    path = folder / "data.json"
    path.write_text(json.dumps(records))
    return str(path)
