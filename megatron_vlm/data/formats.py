"""One line of JSON of one's own -> an Example. Reads image files, writes nothing.

A line is an object. Its images, if any: `"image_path": "a.jpg"` or `"image_paths": ["a.jpg", "b.jpg"]`, relative to the
image folder. Its conversation is one of

    {"image_path": "a.jpg", "caption": "A cat on a mat ..."}
    {"image_path": "a.jpg", "question": "What is it?", "answer": "A cat."}
    {"image_path": "a.jpg", "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"image_path": "a.jpg", "label": "cats", "points": [[103, 54], [388, 51]], "unit": "pixels"}
    {"prompt": "...", "answer": "..."}                                 text only: no image_path
    {"text": "..."}                                                    text only, nothing asked
    {"image_path": "a.jpg", "branches": [{"caption": "..."}, {"label": ...}]}       several that share the image

LLaVA's spelling of messages is read too: `"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]`,
with `<image>` in it dropped. `unit` of points: pixels (of the image as displayed), percent or fraction; a point is
[x, y], or [x, y, n] for the n-th image. An empty list of points says that there are none. Every conversation may have
a `style` (`short_caption`, `point_count`, ...); every line a `key`, and `info` that is kept for evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_vlm.data.example import Branch, Example, Media, Point, Points, Turn

UNITS = ("pixels", "percent", "fraction")
#: Keys of a line that are not part of a conversation.
_LINE_KEYS = frozenset(("image_path", "image_paths", "key", "info", "branches"))
#: What makes a conversation, by the key that tells its form -> all keys that the form may have.
_FORMS = {
    "caption": frozenset(("caption", "style")),
    "messages": frozenset(("messages", "style")),
    "conversations": frozenset(("conversations", "style")),
    "points": frozenset(("points", "label", "unit", "style", "prompt")),
    "answer": frozenset(("answer", "question", "prompt", "style")),
    "text": frozenset(("text", "style")),
}
_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt")


def read_line(line: str, *, key: str, images: Path, add_image: Callable[[bytes], Media]) -> Example:
    """The sample of one line.

    key:       its key where the line names none.
    images:    folder that image paths start from.
    add_image: stores a file's bytes and gives back its name and size.
    Raises ValueError, saying what is wrong with the line, OSError for an image that cannot be read.
    """
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON ({error}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, not a {type(record).__name__}.")
    media = tuple(add_image((images / path).read_bytes()) for path in _image_paths(record))
    return read_record(record, key=key, media=media)


def read_record(record: dict[str, Any], *, key: str, media: tuple[Media, ...]) -> Example:
    """The sample of a line's object whose images are stored already. Raises ValueError, saying what is wrong."""
    bodies = record.get("branches")
    if bodies is None:
        bodies = [{name: value for name, value in record.items() if name not in _LINE_KEYS}]
    else:
        surplus = sorted(set(record) - _LINE_KEYS)
        if surplus:
            raise ValueError(f"a line with branches has {', '.join(surplus)} beside them: move it into a branch.")
    if not isinstance(bodies, list) or not all(isinstance(body, dict) for body in bodies):
        raise ValueError("branches must be a list of objects.")
    info = record.get("info", {})
    if not isinstance(info, dict):
        raise ValueError("info must be an object.")
    sample = Example(str(record.get("key", key)), tuple(_branch(body, media) for body in bodies), media, info)
    sample.check()
    return sample


def _image_paths(record: dict[str, Any]) -> list[str]:
    if "image_path" in record and "image_paths" in record:
        raise ValueError("a line has either image_path or image_paths.")
    paths = [record["image_path"]] if "image_path" in record else record.get("image_paths", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError("image_path must be a file name, image_paths a list of file names.")
    return paths


def _branch(body: dict[str, Any], media: tuple[Media, ...]) -> Branch:
    form = next((name for name in _FORMS if name in body), None)
    if form is None:
        found = ", ".join(sorted(body)) or "nothing"
        raise ValueError(f"no conversation: needed one of {', '.join(_FORMS)}; found {found}.")
    unknown = sorted(set(body) - _FORMS[form])
    if unknown:
        allowed = ", ".join(sorted(_FORMS[form] - {form}))
        raise ValueError(f"{', '.join(unknown)} cannot stand beside {form}; it may have {allowed}.")
    style = body.get("style")
    if style is not None and (not isinstance(style, str) or not style):
        raise ValueError(f"style must be a word, not {style!r}.")
    if form == "caption":
        return Branch(style or "long_caption", (Turn("", _text(body, "caption")),))
    if form == "text":
        return Branch(style or "text_sft", (Turn("", _text(body, "text")),))
    if form == "points":
        answer = _points(body, media)
        return Branch(style or "pointing", (Turn(str(body.get("prompt", answer.label)), answer),))
    default = "user_qa" if media else "text_sft"
    if form == "answer":
        if "question" in body and "prompt" in body:
            raise ValueError("a conversation has either question or prompt.")
        asked = "question" if "question" in body else "prompt"
        return Branch(style or default, (Turn(_text(body, asked), _text(body, "answer")),))
    return Branch(style or default, _turns(body[form]))


def _text(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text, not {value!r}.")
    return value


def _turns(messages: Any) -> tuple[Turn, ...]:
    """Pairs of user and assistant messages, in either spelling."""
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise ValueError("messages must be a list that alternates user and assistant, and ends with the assistant.")
    texts = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"message {index} must be an object, not a {type(message).__name__}.")
        role = message.get("role", message.get("from"))
        expected = _ASSISTANT if index % 2 else _USER
        if role not in expected:
            raise ValueError(f"message {index} is from {role!r}; needed {' or '.join(expected)} there.")
        text = _text(message, "content" if "content" in message else "value")
        texts.append(text.replace("<image>", "").strip() if "from" in message and not index % 2 else text)
    return tuple(Turn(asked, said) for asked, said in zip(texts[::2], texts[1::2], strict=True))


def _points(body: dict[str, Any], media: tuple[Media, ...]) -> Points:
    label, unit = _text(body, "label"), body.get("unit", "pixels")
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} does not exist; choose one of {', '.join(UNITS)}.")
    if not media:
        raise ValueError("points need an image_path.")
    if not isinstance(body["points"], list):
        raise ValueError("points must be a list of [x, y].")
    places = []
    for place in body["points"]:
        numbers = isinstance(place, list) and all(type(number) in (int, float) for number in place)
        if not numbers or len(place) not in (2, 3):
            raise ValueError(f"point {place!r} must be [x, y] or [x, y, number of the image].")
        at = place[2] if len(place) == 3 else 1
        if at not in range(1, len(media) + 1):
            raise ValueError(f"point {place} names image {at}; the line has {len(media)}.")
        shown = media[int(at) - 1]
        width, height = {"pixels": (shown.width, shown.height), "percent": (100, 100), "fraction": (1, 1)}[unit]
        if not (0 <= place[0] <= width and 0 <= place[1] <= height):
            raise ValueError(f"point {place} lies outside the image: x to {width}, y to {height} in {unit}.")
        places.append(Point(int(at), place[0] / width, place[1] / height))
    return Points(label, tuple(places))
