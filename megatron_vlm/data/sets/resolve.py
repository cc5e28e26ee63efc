"""Drafts -> Examples: finds each file that a draft names, stores it, reads masks and subtitles that lie beside it, and
turns pixels into fractions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megatron_vlm.data import image
from megatron_vlm.data.example import Branch, Clip, Example, Media, Point, Points, Subtitle, Turn
from megatron_vlm.data.masks import packed, unpacked
from megatron_vlm.data.sets.draft import Draft, MaskFile, Reference, SubtitleFile
from megatron_vlm.data.sets.places import inside
from megatron_vlm.data.sets.row import Row, words
from megatron_vlm.data.sets.source import stored_name

#: Most letters of a file name that a row may hold.
MAX_NAME = 1024
#: Endings tried for a video that is named without one.
VIDEO_ENDINGS = ("", ".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif")
#: (height, width, run lengths); None where an object is not seen.
Mask = tuple[int, int, str] | None


class Missing(ValueError):
    """A file that is not there: not downloaded, or to be got by hand."""


class Finder:
    """Files of references below a download directory.

    media: folder of the files that rows name by path, below the directory.
    """

    def __init__(self, folder: Path, media: PurePosixPath) -> None:
        self.folder, self.media = folder, media

    def path(self, reference: Reference) -> Path | None:
        """The file on disk; None where the row holds the bytes. Raises Missing, naming where it should lie."""
        if reference.data:
            return None
        looked = []
        if reference.url:
            looked.append(self.folder / stored_name(reference.url))
        if reference.path or reference.id:
            looked += self._by_name(reference)
        for path in looked:
            if path.is_file():
                return path
        what = reference.url or reference.path or reference.id
        raise Missing(f"{reference.kind} {what!r} is not at {looked[0] if looked else self.folder}.")

    def read(self, reference: Reference) -> bytes:
        """Its bytes. Raises Missing, or ValueError where they are not those of the published sha256."""
        path = self.path(reference)
        data = reference.data if path is None else path.read_bytes()
        if reference.sha256 and hashlib.sha256(data).hexdigest() != reference.sha256:
            raise ValueError(f"{reference.kind} {reference.url or path}: its sha256 is not {reference.sha256}.")
        return data

    def masks(self, file: MaskFile) -> list[Mask]:
        """Of each frame, or of the one image. Raises Missing, or ValueError for what holds no masks."""
        (path,) = self._by_name(Reference("mask", path=file.path))
        if path.suffix == ".json" and path.is_file():
            table = _json(path)
            if not isinstance(table, dict) or not isinstance(table.get(file.member), list):
                raise Missing(f"{path} holds no masks of {file.member!r}.")
            return [packed(one) if one else None for one in table[file.member]]
        pictures = sorted(path.glob("*.png")) if path.is_dir() else [path] if path.is_file() else []
        if not pictures:
            raise Missing(f"masks {file.path!r} are not at {path}.")
        return [packed(image.mask(one.read_bytes(), file.value, name=str(one))) for one in pictures]

    def subtitles(self, file: SubtitleFile) -> tuple[Subtitle, ...]:
        """The lines of a video, in seconds of it; none where a file for all videos has none of this one.

        Raises Missing, or ValueError for what is no subtitles.
        """
        (path,) = self._by_name(Reference("subtitles", path=file.path))
        if not path.is_file():
            raise Missing(f"subtitles {file.path!r} are not at {path}.")
        found = _json(path)
        if file.member:
            found = found.get(file.member, ()) if isinstance(found, dict) else None
        found = list(found.values()) if isinstance(found, dict) else found
        if not isinstance(found, list | tuple) or not all(isinstance(one, dict) for one in found):
            raise ValueError(f"{path} holds no subtitles of {file.member or 'the video'}.")
        lines = []
        for row in map(Row, found):
            span = row.items("timestamp") or [row.get("start"), row.get("end")]
            start, end = (*span, None, None)[:2]
            begin = Row({"start": start}).number("start") - file.start
            until = Row({"end": end}).number("end") - file.start if end is not None else file.seconds
            text = " ".join(words(row.get("text" if row.get("text") is not None else "line")).split())
            if text and until >= max(begin, 0.0) and (not file.seconds or begin <= file.seconds):
                lines.append(Subtitle(max(begin, 0.0), until, text))
        return tuple(lines)

    def beside(self, file: MaskFile | SubtitleFile) -> Sequence[Any]:
        """What a file holds that lies beside the media."""
        return self.masks(file) if isinstance(file, MaskFile) else self.subtitles(file)

    def _by_name(self, reference: Reference) -> list[Path]:
        name = PurePosixPath(reference.path or reference.id)
        if name.is_absolute() or ".." in name.parts or "\0" in str(name):
            raise ValueError(f"file name {str(name)!r} is refused: absolute, or it leaves the folder.")
        if len(str(name)) > MAX_NAME or any(len(part.encode(errors="replace")) > 240 for part in name.parts):
            raise ValueError(f"file name {str(name)[:60]!r}... is refused: it is longer than a name can be.")
        base = self.folder / self.media
        endings = VIDEO_ENDINGS if reference.kind == "video" else ("",)
        return [base / f"{name}{ending}" for ending in endings]


@lru_cache(maxsize=1)
def _json(path: Path) -> Any:
    """One file may serve all rows of a data set."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}).") from error


def resolve(
    key: str,
    draft: Draft,
    add: Callable[[Reference], Media],
    beside: Callable[[MaskFile | SubtitleFile], Sequence[Any]] = lambda file: (),
) -> Example:
    """The sample of a draft. add: stores the file of a reference and gives back its name and size. beside: what a file
    holds that lies beside the media.

    Raises ValueError, saying what is wrong, for one that cannot be trained on.
    """
    media = tuple(add(reference) for reference in draft.media)
    branches = draft.branches
    if draft.in_pixels:
        branches = tuple(_scaled(branch, media) for branch in branches)
    if draft.masks:
        draft, branches = _masked(draft, branches, [_rows(file, beside(file)) for file in draft.masks])
    sample = Example(key, branches, media, draft.info)
    if draft.subtitles is not None and (lines := tuple(beside(draft.subtitles))):
        draft = replace(draft, clip=replace(draft.clip or Clip(), subtitles=lines))
    if draft.clip is not None:
        sample = replace(sample, clip=draft.clip)
    sample.check()
    return sample


def _rows(file: MaskFile, masks: Sequence[Mask]) -> list[list[Any]]:
    """[at, height, width, run lengths] of each mask that is kept."""
    if not file.fps:
        return [[1, *mask] for mask in masks[:1] if mask]
    step = int(file.fps // file.rate)
    return [[number / file.fps, *mask] for number, mask in enumerate(masks) if mask and number % step == 0]


def _masked(draft: Draft, branches: tuple[Branch, ...], masks: list[list[Any]]) -> tuple[Draft, tuple[Branch, ...]]:
    """With the masks in its info, and places that are only known by a mask put into it, evenly in reading order."""
    (branch,) = branches
    answer = branch.turns[0].answer
    assert not isinstance(answer, str), "only places have masks"
    if isinstance(answer, Points):
        if not masks[0]:
            raise ValueError("the image has no mask.")
        mask = unpacked(*masks[0][0][1:])
        inside_it, count = np.argwhere(mask), len(answer.points)
        if len(inside_it) < count:
            raise ValueError(f"the mask has {len(inside_it)} pixels; needed {count} or more.")
        rows = inside_it[[(2 * number + 1) * len(inside_it) // (2 * count) for number in range(count)]]
        places = tuple(Point(1, (x + 0.5) / mask.shape[1], (y + 0.5) / mask.shape[0]) for y, x in rows.tolist())
        answer = replace(answer, points=places)
        branches = (replace(branch, turns=(replace(branch.turns[0], answer=answer),)),)
    return replace(draft, info={**draft.info, "masks": {answer.label: masks}}), branches


def _scaled(branch: Branch, media: tuple[Media, ...]) -> Branch:
    return replace(branch, turns=tuple(_scaled_turn(turn, media) for turn in branch.turns))


def _scaled_turn(turn: Turn, media: tuple[Media, ...]) -> Turn:
    if not isinstance(turn.answer, Points):
        return turn
    row, places = Row({}), []
    for place in turn.answer.points:
        shown = media[int(place.at) - 1]
        places.append(inside(row, place._replace(x=place.x / shown.width, y=place.y / shown.height)))
    return replace(turn, answer=replace(turn.answer, points=tuple(places)))
