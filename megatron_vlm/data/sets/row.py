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


class Row:
    """A row. `names` gives the data set's column for each of our names; a name that is missing there stands for itself.

    A column may be a path into nested values: `answer.points.x`, `options.0`.
    """

    def __init__(self, values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
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
        """A text that is not empty. Raises ValueError, naming the column, for anything else."""
        value = self.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
            value = str(int(value)) if value == int(value) else str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.bad(name, value, "a text")
        return value.strip()

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
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.bad(name, value, "a finite number")
        return float(value)

    def bad(self, name: str, value: Any, needed: str) -> ValueError:
        """The error for a column's value."""
        column = self.names.get(name, name)
        shown = repr(value) if len(repr(value)) < 100 else repr(value)[:97] + "..."
        found = ", ".join(map(str, self.values)) or "none"
        return ValueError(f"column {column!r} is {shown}; needed {needed}. Columns of the row: {found}.")

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
            name = str(video or "")
            where = self._path(path) if path else name
            yield Reference("video", url=self._address("video_url"), path=where, id=name)
            return
        if path:
            yield Reference(path=self._path(path))
            return
        urls = self.items("image_urls") or [self.get("image_url")]
        hashes = self.items("image_sha256s") or [self.get("image_sha256")] * len(urls)
        for url, sha256 in zip(urls, hashes, strict=True):
            if url is not None:
                yield Reference(url=str(url), sha256=str(sha256 or "").lower())
        for image in [*self.items("images"), self.get("image"), *self.items("image_paths"), self.get("image_path")]:
            if image is not None:
                yield self._image(image)

    def _image(self, image: Any) -> Reference:
        if isinstance(image, Mapping) and (image.get("bytes") or image.get("path")):
            return Reference(data=image.get("bytes") or b"", path=str(image.get("path") or ""))
        if isinstance(image, bytes) and image:
            return Reference(data=image)
        if isinstance(image, str) and image:
            return Reference(url=image) if image.startswith(("http://", "https://")) else Reference(path=image)
        raise self.bad("image", image, "bytes, a file name or an address")

    def _address(self, name: str) -> str:
        value = self.get(name)
        return value if isinstance(value, str) else ""

    def _path(self, form: str) -> str:
        values = {name: self.get(name) for name in set(re.findall(r"{(\w+)", form))}
        try:
            return form.format(**{k: int(v) if str(v).isdecimal() and f"{{{k}:" in form else v
                                  for k, v in values.items()})  # fmt: skip
        except (ValueError, TypeError):
            raise ValueError(f"no file name {form!r} can be made from {values}.") from None
