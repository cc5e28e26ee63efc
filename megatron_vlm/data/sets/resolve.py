"""Drafts -> Examples: finds each file that a draft names, stores it, and turns pixels into fractions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

from megatron_vlm.data.example import Branch, Example, Media, Points, Turn
from megatron_vlm.data.sets.draft import Draft, Reference
from megatron_vlm.data.sets.places import inside
from megatron_vlm.data.sets.row import Row
from megatron_vlm.data.sets.source import stored_name

#: Most letters of a file name that a row may hold.
MAX_NAME = 1024
#: Endings tried for a video that is named without one.
VIDEO_ENDINGS = ("", ".mp4", ".webm", ".mkv", ".avi", ".mov", ".gif")


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

    def _by_name(self, reference: Reference) -> list[Path]:
        name = PurePosixPath(reference.path or reference.id)
        if name.is_absolute() or ".." in name.parts or "\0" in str(name):
            raise ValueError(f"file name {str(name)!r} is refused: absolute, or it leaves the folder.")
        if len(str(name)) > MAX_NAME or any(len(part.encode(errors="replace")) > 240 for part in name.parts):
            raise ValueError(f"file name {str(name)[:60]!r}... is refused: it is longer than a name can be.")
        base = self.folder / self.media
        endings = VIDEO_ENDINGS if reference.kind == "video" else ("",)
        return [base / f"{name}{ending}" for ending in endings]


def resolve(key: str, draft: Draft, add: Callable[[Reference], Media]) -> Example:
    """The sample of a draft. add: stores the file of a reference and gives back its name and size.

    Raises ValueError, saying what is wrong, for one that cannot be trained on.
    """
    media = tuple(add(reference) for reference in draft.media)
    branches = draft.branches
    if draft.in_pixels:
        branches = tuple(_scaled(branch, media) for branch in branches)
    sample = Example(key, branches, media, draft.info)
    if draft.clip is not None:
        sample = replace(sample, clip=draft.clip)
    sample.check()
    return sample


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
