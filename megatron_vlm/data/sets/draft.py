"""What a reader makes of a row: a sample whose media are still names. `resolve.py` finds the media and makes Examples.

A draft's points may be in pixels: only the file knows its size. Its key follows from its media, so that rows about the
same image can be put together wherever they stand.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_vlm.data.example import Branch, Clip, Example, from_json, to_json


@dataclass(frozen=True)
class Reference:
    """An image or a video that a row names. What is known of it: its bytes, its address, or where it should lie."""

    kind: str = "image"
    """image | video."""
    url: str = ""
    """http(s) address; tools/download_data.py stores it by the address's hash."""
    path: str = ""
    """File below the folder of the data set's media, for sets whose files are got by hand."""
    data: bytes = b""
    """The file itself, where the rows hold it."""
    sha256: str = ""
    """Of the content, where the data set publishes it."""
    id: str = ""
    """The name that a table of addresses (Entry.addresses) knows it by."""

    @property
    def identity(self) -> str:
        """Equal for two names of the same file, as far as the rows tell."""
        if self.data:
            return hashlib.sha256(self.data).hexdigest()
        return self.sha256 or self.url or f"{self.kind}:{self.path or self.id}"


@dataclass(frozen=True)
class MaskFile:
    """Masks of one object that lie in files of their own, below the folder of the data set's media."""

    path: str
    """A picture; a folder of pictures, one a frame, in the order of their names; or a JSON file of run lengths."""
    member: str = ""
    """Of the JSON file: a list of the run lengths of each frame, null where there are none."""
    value: int = 0
    """Of the object's pixels in pictures. 0 = all bright ones."""
    fps: float = 0.0
    """Frames a second. 0 = the mask of one image."""
    rate: float = 0.0
    """Masks a second that are kept."""


@dataclass(frozen=True)
class SubtitleFile:
    """Subtitles of a video that lie in a JSON file of their own, below the folder of the data set's media."""

    path: str
    """A list, or an object whose members are numbered, of {start, end, text}."""
    member: str = ""
    """Of a file for all videos: the video's. "" = the file is that of the video."""
    start: float = 0.0
    """Seconds on the subtitles' clock at which the video begins."""
    seconds: float = 0.0
    """Of the video, for a line that does not say when it ends."""


@dataclass(frozen=True)
class Draft:
    """A sample, or a piece of one: drafts of equal `identity` are branches of one sample."""

    branches: tuple[Branch, ...]
    media: tuple[Reference, ...] = ()
    in_pixels: bool = False
    """x and y of the points are pixels of the file, not fractions."""
    clip: Clip | None = None
    """Part of the video that the sample is about; times in answers count from its beginning."""
    part: str = ""
    """Parts with other names about the same media are samples of their own."""
    info: dict[str, Any] = field(default_factory=dict)
    masks: tuple[MaskFile, ...] = ()
    """One for each object of the only answer, or one for the places of an image, which then are not known otherwise."""
    subtitles: SubtitleFile | None = None

    @property
    def identity(self) -> str:
        """32 hex digits: of the media and the clip; of the text where there is no media."""
        if self.media:
            known: Iterable[object] = [*(medium.identity for medium in self.media), self.clip]
        else:
            known = self.branches
        digest = hashlib.sha256("\n".join(map(repr, known)).encode()).hexdigest()[:32]
        return f"{digest}-{self.part}" if self.part else digest


def to_line(draft: Draft) -> str:
    """The draft as one line of JSON; `from_line` gives it back equal."""
    media = [
        [one.kind, one.url, one.path, base64.b64encode(one.data).decode(), one.sha256, one.id] for one in draft.media
    ]
    text = to_json(Example(draft.part, draft.branches, clip=draft.clip, info=draft.info))
    masks = [[one.path, one.member, one.value, one.fps, one.rate] for one in draft.masks]
    lines = [[one.path, one.member, one.start, one.seconds] for one in (draft.subtitles,) if one]
    return json.dumps([text, draft.in_pixels, media, masks, lines], ensure_ascii=False)


def from_line(line: str) -> Draft:
    """A draft from `to_line`'s line."""
    text, in_pixels, media, masks, lines = json.loads(line)
    example = from_json(text)
    references = tuple(
        Reference(kind, url, path, base64.b64decode(data), sha256, id) for kind, url, path, data, sha256, id in media
    )
    files = tuple(MaskFile(*one) for one in masks)
    subtitles = SubtitleFile(*lines[0]) if lines else None
    return Draft(example.branches, references, in_pixels, example.clip, example.key, example.info, files, subtitles)
