"""What a record of LLaVA's data may hold: checks that name the record. data.py reads the rest."""
import re

from cli import UserError

RECORD_KEYS, MESSAGE_KEYS = ("id", "image", "conversations"), ("from", "value")

# Keys of other trainers' formats that change what a record or a message means
UNSUPPORTED = ("image", "images", "Image", "image_path", "image_file", "image_url", "img", "imgs",
               "pictures", "video", "videos", "video_path", "audio", "audios", "audio_path",
               "system", "tools", "history", "weight", "loss", "loss_mask", "mask", "train")


def other_keys(values, known):
    """The keys of a record or a message that are not read. A value may say nothing: "", true, 1."""
    return [key for key, value in values.items()
            if key not in known and value not in (None, "", "[]", [], {}, 1)]


def check_keys(values, known, label):
    """UserError that names a key of UNSUPPORTED."""
    for key in other_keys(values, known):
        if key in UNSUPPORTED:
            raise UserError(f"{label}: the key `{key}` would change its meaning, but is not "
                            f"supported: expected only {', '.join(known)}")


def check_messages(messages, name):
    """Raise UserError unless `messages` is a list of texts by human and gpt in alternation."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{name}: `conversations` is {messages!r:.60}, "
                        "expected a non-empty list of messages")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            raise UserError(f"{name}: message {i} does not have the form "
                            f'{{"from": role, "value": text}}: {message!r:.60}')
        check_keys(message, MESSAGE_KEYS, f"{name}: message {i}")
        role = message.get("from")
        if role not in ("human", "gpt"):
            raise UserError(f"{name}: message {i} has the role {role!r}, expected human or gpt")
        if i and role == messages[i - 1]["from"]:
            raise UserError(f"{name}: messages {i - 1} and {i} are both from {role}: "
                            "roles must alternate")
        if re.search("[\ud800-\udfff]", message["value"]):
            raise UserError(f"{name}: message {i} is not valid Unicode (half a surrogate pair)")


def check_record(record, name):
    """Raise UserError unless a record has messages and, if any, the path of one picture."""
    if not isinstance(record, dict):
        raise UserError(f"{name}: expected an object, found {type(record).__name__}")
    check_keys(record, RECORD_KEYS, name)
    if "conversations" not in record:
        raise UserError(f"{name}: no `conversations`, but the keys {', '.join(record)}")
    image = record.get("image")
    is_path = isinstance(image, str) and image and not re.match(r"data:|\w+://", image)
    if image is not None and not is_path:
        raise UserError(f"{name}: `image` is {image!r:.60}, expected the path of one picture")
    check_messages(record["conversations"], name)
