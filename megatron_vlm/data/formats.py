"""One line of JSON of one's own -> an Example. Reads image and video files, writes nothing.

A line is an object. Its media, if any: `"image_path": "a.jpg"`, `"image_paths": ["a.jpg", "b.jpg"]` or `"video_path":
"v.mp4"`, relative to the media folder and not out of it. Its conversation is one of

    {"image_path": "a.jpg", "caption": "A cat on a mat ..."}
    {"image_path": "a.jpg", "question": "What is it?", "answer": "A cat."}
    {"image_path": "a.jpg", "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
    {"image_path": "a.jpg", "label": "cats", "points": [[103, 54], [388, 51]], "unit": "pixels"}
    {"prompt": "...", "answer": "..."}                                 text only: no image_path
    {"text": "..."}                                                    text only, nothing asked
    {"image_path": "a.jpg", "branches": [{"caption": "..."}, {"label": ...}]}       several that share the image

LLaVA's spelling of messages is read too: `"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", ...}]`,
with `<image>` and `<video>` in it dropped. `unit` of points: pixels (of the image as displayed), percent or fraction; a
point is [x, y], or [x, y, n] for the n-th image. An empty list of points says that there are none. Every conversation
may have a `style` (`short_caption`, `point_count`, ...); every line a `key`, and `info` that is kept for evaluation.

A video takes all of these, and tracks: one list of places for each object. A place in it is [x, y, seconds].

    {"video_path": "v.mp4", "label": "goals", "points": [[310, 40, 2.5]]}
    {"video_path": "v.mp4", "label": "the ball", "tracks": [[[12, 80, 0.0], [30, 71, 0.5]]], "rate": 2}
    {"video_path": "v.mp4", "start": 3.0, "end": 9.5, "caption": "...", "subtitles": [[0.0, 1.5, "Hello."]]}

`start` and `end` (seconds of the file) choose a part of it; all other times count from `start`. `rate` says how many
times a second tracks were made: frames are shown at a multiple of it. Other videos are shown at 0, 0.5, 1, ... seconds
(data.frames_per_second), so points at those times are on a frame that the model sees.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_vlm.data.example import Branch, Example, Media, Points, Tracks, Turn
from megatron_vlm.data.line_places import CLIP_KEYS, read_clip, read_points, read_tracks

#: Keys that name the media of a line.
_MEDIA_KEYS = ("image_path", "image_paths", "video_path")
#: Keys of a line that are not part of a conversation.
_LINE_KEYS = frozenset((*_MEDIA_KEYS, *CLIP_KEYS, "key", "info", "branches"))
#: What makes a conversation, by the key that tells its form -> all keys that the form may have.
_FORMS = {
    "caption": frozenset(("caption", "style")),
    "messages": frozenset(("messages", "style")),
    "conversations": frozenset(("conversations", "style")),
    "points": frozenset(("points", "label", "unit", "style", "prompt")),
    "tracks": frozenset(("tracks", "label", "unit", "style", "prompt")),
    "answer": frozenset(("answer", "question", "prompt", "style")),
    "text": frozenset(("text", "style")),
}
_USER = ("user", "human")
_ASSISTANT = ("assistant", "gpt")


def read_line(
    line: str | bytes,
    *,
    key: str,
    folder: Path,
    add_image: Callable[[bytes], Media],
    add_video: Callable[[bytes], Media],
) -> Example:
    """The sample of one line.

    key:       its key where the line names none.
    folder:    that paths of images and videos start from.
    add_image, add_video: store a file's bytes and give back its name and size.
    Raises ValueError, saying what is wrong with the line or its files.
    """
    record = parsed(line)
    store = add_video if "video_path" in record else add_image
    media = []
    for path in _paths(record):
        try:
            media.append(store(_read(folder, path)))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return read_record(record, key=key, media=tuple(media))


def parsed(text: str | bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError for anything else, and for one that has a name twice."""
    try:
        record = json.loads(text.decode() if isinstance(text, bytes) else text, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise ValueError(f"this is not UTF-8 ({error}).") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"this is not JSON ({error}).") from error
    except RecursionError:
        raise ValueError("its JSON is nested too deeply.") from None
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, not a {type(record).__name__}.")
    return record


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        twice = next(name for number, (name, _) in enumerate(pairs) if name in dict(pairs[:number]))
        raise ValueError(f"{twice!r} stands in it twice. Remove the wrong one.")
    return record


def has_conversation(record: dict[str, Any]) -> bool:
    """Whether an object says what is said, in one of the forms."""
    return "branches" in record or any(name in record for name in _FORMS)


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    base = os.path.abspath(folder)
    if os.path.commonpath([base, os.path.abspath(path)]) != base:
        raise ValueError(
            f"it lies outside the media folder {folder}. Give --media a folder that holds all files (`--media /` holds "
            "every absolute name)."
        )
    try:
        if not path.is_file():
            raise ValueError(f"{path} is {'no regular file' if path.exists() else 'not there'}.")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}).") from error


def read_record(record: dict[str, Any], *, key: str, media: tuple[Media, ...]) -> Example:
    """The sample of a line's object whose media are stored already. Raises ValueError, saying what is wrong."""
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
    named = record.get("key", key)
    if not isinstance(named, (str, int)) or isinstance(named, bool):
        raise ValueError(f"key must be a word, not {named!r}.")
    bare = Example(str(named), (), media, info, read_clip(record, media))
    bare.check_media()
    sample = replace(bare, branches=tuple(_branch(body, bare) for body in bodies))
    sample.check()
    return sample


def _paths(record: dict[str, Any]) -> list[str]:
    named = [name for name in _MEDIA_KEYS if name in record]
    if len(named) > 1:
        raise ValueError(f"a line has either {' or '.join(named)}.")
    if not named:
        return []
    value = record[named[0]]
    paths = value if named[0] == "image_paths" else [value]
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError("image_path and video_path must be a file name, image_paths a list of file names.")
    return paths


def _branch(body: dict[str, Any], sample: Example) -> Branch:
    """A conversation about the media and the clip of `sample`."""
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
    video = sample.video is not None
    if form == "caption":
        return Branch(style or ("video_long_caption" if video else "long_caption"), (Turn("", _text(body, "caption")),))
    if form == "text":
        return Branch(style or "text_sft", (Turn("", _text(body, "text")),))
    if form in ("points", "tracks"):
        label = _text(body, "label")
        if form == "points":
            usual = "video_point" if video else "pointing"
            answer: Points | Tracks = read_points(body, label, sample.media, sample.seconds)
        else:
            usual = "video_point_track_per_frame"
            answer = read_tracks(body, label, sample.media, sample.seconds, sample.clip)
        return Branch(style or usual, (Turn(_text(body, "prompt") if "prompt" in body else label, answer),))
    default = "user_qa" if sample.media else "text_sft"
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
        if "from" in message and not index % 2:
            text = text.replace("<image>", "").replace("<video>", "").strip()
        texts.append(text)
    return tuple(Turn(asked, said) for asked, said in zip(texts[::2], texts[1::2], strict=True))
