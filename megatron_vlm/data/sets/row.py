"""One row of a data set under our names for its columns; and the readers' way to say what is wrong with it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_vlm.data.example import Clip, Subtitle
from megatron_vlm.data.sets.draft import Reference

_CLOCK = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")
_SPAN = re.compile(r"\[?\s*([0-9.:]+)\s*[-:,]\s*([0-9.]+)\s*\]?")


class LeftOut(ValueError):
    """A sound row, or a part of one, that the recipe does not train on. Counted apart from rows that are not sound."""


def words(value: Any) -> str:
    """A text without the blanks around it, or a finite number as one; "" for anything else, so that no `None`, `nan` or
    `[]` is ever trained on. A text with half of a surrogate pair, which no file can hold, counts as none."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float):
            value = int(value) if value.is_integer() else value if math.isfinite(value) else ""
        return str(value)
    if not isinstance(value, str):
        return ""
    try:
        value.encode()
    except UnicodeEncodeError:
        return ""
    return value.strip()


class Row:
    """A row. `names` gives the data set's column for each of our names; a name that is missing there stands for itself.

    A column may be a path into nested values: `answer.points.x`, `options.0`.
    """

    def __init__(self, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
        if not isinstance(values, Mapping):
            raise ValueError(f"{_shown(values)} stands where an object was needed.")
        self.values = values
        self.names = names or {}

    def get(self, name: str) -> Any:
        """The value, or None where the row has no such column or nothing in it."""
        column = self.names.get(name, name)
        if column in self.values:
            return self.values[column]
        value: Any = self.values
        for step in column.split("."):
            if isinstance(value, Mapping):
                value = value.get(step)
            elif isinstance(value, Sequence) and not isinstance(value, str) and step.isdecimal():
                value = value[int(step)] if int(step) < len(value) else None
            else:
                return None
        return value

    def text(self, name: str) -> str:
        """A text (or a number) that is not empty. Raises ValueError, naming the column, for anything else."""
        value = self.get(name)
        if not (text := words(value)):
            raise self.bad(name, value, "a text")
        return text

    def texts(self, name: str) -> list[str]:
        """A list of texts (or numbers), [] where the column is missing. Raises ValueError where one is none."""
        values = self.items(name)
        found = [words(value) for value in values]
        if not all(found):
            raise self.bad(name, values, "a list of texts")
        return found

    def number(self, name: str) -> float:
        """A finite number, or a time as H:MM:SS. Raises ValueError for anything else."""
        return self._number(name, self.get(name))

    def items(self, name: str) -> list[Any]:
        """A list, [] where the column is missing. Raises ValueError where it is something else."""
        value = self.get(name)
        if value is None:
            return []
        if isinstance(value, (str, Mapping)) or not isinstance(value, Sequence):
            raise self.bad(name, value, "a list")
        return list(value)

    def span(self) -> tuple[float, float] | None:
        """`start` and `end`, or a `span` as [s, e], `s-e`, `[s:e]`, in seconds; None where the row names none."""
        value = self.get("span")
        if isinstance(value, str) and (match := _SPAN.fullmatch(value.strip())):
            value = [match[1], match[2]]
        if value is None and self.get("start") is not None and self.get("end") is not None:
            value = [self.get("start"), self.get("end")]
        if value is None:
            return None
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
            raise self.bad("span", value, "[start, end]")
        start, end = (self._number("span", moment) for moment in value)
        if not 0 <= start < end:
            raise self.bad("span", value, "a start of at least 0 and a later end")
        return start, end

    def clip(self, *, cut: bool = True) -> Clip | None:
        """The part of the video from `span` (where `cut`), with its `subtitles` [{start, end, text}], whose times are
        seconds of the file and become seconds of the clip. None where the row has neither."""
        span = self.span() if cut else None
        lines = [Row(line) for line in self.items("subtitles")]
        begin, end = span or (0.0, None)
        kept = []
        for line in lines:
            start, stop = line.number("start") - begin, line.number("end") - begin
            if line.get("text") and stop >= 0 and (end is None or start <= end - begin):
                kept.append(Subtitle(max(start, 0.0), stop, line.text("text")))
        return Clip(begin, end, subtitles=tuple(kept)) if span or kept else None

    def _number(self, name: str, value: Any) -> float:
        if isinstance(value, str):
            if clock := _CLOCK.fullmatch(value.strip()):
                return int(clock[1] or 0) * 3600 + int(clock[2]) * 60 + float(clock[3])
            try:
                value = float(value)
            except ValueError:
                raise self.bad(name, value, "a number") from None
        try:
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise self.bad(name, value, "a finite number")
            return float(value)
        except OverflowError:
            raise self.bad(name, value, "a number that is not as large") from None

    def bad(self, name: str, value: Any, needed: str) -> ValueError:
        """The error for a column's value."""
        column = self.names.get(name, name)
        found = ", ".join(map(str, self.values)) or "none"
        return ValueError(f"column {column!r} is {_shown(value)}; needed {needed}. Columns of the row: {found}.")

    def media(self, path: str = "") -> tuple[Reference, ...]:
        """The images or the video of the row, from whichever of our columns it has: image(s) (bytes, or a file name),
        image_url(s) with image_sha256(s), image_path(s), video (a file name), video_id, video_url.

        path: form of the file's name, made from the row's columns: `train2014/COCO_train2014_{image_id:012d}.jpg`.
        """
        found = tuple(self._media(path))
        if not found:
            raise ValueError(f"the row names no image and no video. Columns of the row: {', '.join(self.values)}.")
        return found

    def _media(self, path: str) -> Iterator[Reference]:
        video = self.get("video_id") if self.get("video") is None else self.get("video")
        if video is not None or self.get("video_url") is not None:
            name = words(video)
            if video is not None and not name:
                raise self.bad("video", video, "a file name")
            where = self.form(path) if path else name
            yield Reference("video", url=self._address("video_url"), path=where, id=name)
            return
        if path:
            yield Reference(path=self.form(path))
            return
        urls = self.items("image_urls") or [self.get("image_url")]
        hashes = self.items("image_sha256s") or [self.get("image_sha256")] * len(urls)
        for url, sha256 in zip(urls, hashes, strict=True):
            if url is not None:
                if not words(url):
                    raise self.bad("image_url", url, "an address")
                yield Reference(url=words(url), sha256=words(sha256).lower())
        for image in [*self.items("images"), self.get("image"), *self.items("image_paths"), self.get("image_path")]:
            if image is not None:
                yield self._image(image)

    def _image(self, image: Any) -> Reference:
        if isinstance(image, Mapping):
            data, path = image.get("bytes") or b"", words(image.get("path"))
            if isinstance(data, bytes) and (data or path):
                return Reference(data=data, path=path)
        if isinstance(image, bytes) and image:
            return Reference(data=image)
        if name := words(image) if isinstance(image, str) else "":
            return Reference(url=name) if name.startswith(("http://", "https://")) else Reference(path=name)
        raise self.bad("image", image, "bytes, a file name or an address")

    def _address(self, name: str) -> str:
        value = self.get(name)
        return words(value) if isinstance(value, str) else ""

    def form(self, form: str) -> str:
        """A file's name of this form, made from the row's columns. Raises ValueError where one does not fit."""
        values = {name: words(self.get(name)) for name in set(re.findall(r"{(\w+)", form))}
        try:
            if not all(values.values()):
                raise ValueError
            return form.format(**{k: int(v) if v.isdecimal() and f"{{{k}:" in form else v for k, v in values.items()})
        except (ValueError, TypeError):
            raise ValueError(f"no file name {form!r} can be made from {values}.") from None


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 100 else shown[:97] + "..."
