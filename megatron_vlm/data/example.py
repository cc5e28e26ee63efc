"""One sample as it lies in the shards: its media and the tree of conversations about them. No tokens, no pixels.

Points are kept as fractions, not as text, so that the prompt format of a stage decides how they are written.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

#: What a sample key or a media key may hold; a leading or doubled `/` is refused on top of it.
KEY = re.compile(r"[A-Za-z0-9_-]+(/[A-Za-z0-9_-]+)*")
#: What a data set or a split may be called: it becomes part of a file name.
NAME = re.compile(r"[A-Za-z0-9_-]+")


class Point(NamedTuple):
    """A place in one image (or video frame)."""

    at: float
    """Which image, counted from 1; seconds in a video."""
    x: float
    """From the left, as a fraction of the width, 0 to 1."""
    y: float
    """From the top, as a fraction of the height, 0 to 1."""


@dataclass(frozen=True)
class Points:
    """An answer made of places. `points` empty says that there are none."""

    label: str
    """What is pointed at: `red cups`."""
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Turn:
    """A question and its answer: text, or places that the prompt format writes."""

    prompt: str
    answer: str | Points


@dataclass(frozen=True)
class Branch:
    """One conversation about the media. Branches of a sample do not see each other."""

    style: str
    """Kind of answer, as in prompts: `long_caption`, `pointing`, `point_count`, `vqa2`, `text_sft`, ..."""
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Media:
    """A stored file, by the sha256 of its content."""

    key: str
    """sha256 of the bytes, in hex."""
    width: int
    """Pixels as displayed: after the EXIF orientation."""
    height: int
    kind: str = "image"


@dataclass(frozen=True)
class Example:
    """A visual input (or none) with every conversation about it: the unit that is drawn and counted."""

    key: str
    """Unique in its data set and split."""
    branches: tuple[Branch, ...]
    media: tuple[Media, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    """Whatever evaluation needs (category, image id, ...); JSON values. Training never looks."""

    def check(self) -> None:
        """Raise ValueError, naming the sample, where something cannot be trained on."""
        if not KEY.fullmatch(self.key):
            raise ValueError(f"sample key {self.key!r}: use letters, digits, `_`, `-` and single `/` between them.")
        if not self.branches:
            raise ValueError(f"sample {self.key!r} has no branch: it needs at least one conversation.")
        for branch in self.branches:
            if not branch.turns:
                raise ValueError(f"sample {self.key!r}: a branch of style {branch.style!r} has no turn.")
            for turn in branch.turns:
                self._check_turn(branch.style, turn)

    def _check_turn(self, style: str, turn: Turn) -> None:
        where = f"sample {self.key!r}, style {style!r}"
        if isinstance(turn.answer, str):
            if not turn.answer.strip():
                raise ValueError(f"{where}: the answer is empty.")
            return
        if not turn.answer.label.strip():
            raise ValueError(f"{where}: the points have no label.")
        for point in turn.answer.points:
            if not all(math.isfinite(value) for value in point):
                raise ValueError(f"{where}: point {tuple(point)} is not finite.")
            if not (0.0 <= point.x <= 1.0 and 0.0 <= point.y <= 1.0):
                raise ValueError(f"{where}: point {tuple(point)} lies outside the picture (fractions 0 to 1 expected).")
            if self.media and self.media[0].kind == "image" and point.at not in range(1, len(self.media) + 1):
                raise ValueError(f"{where}: point {tuple(point)} names image {point.at}; there are {len(self.media)}.")


def to_json(example: Example) -> str:
    """The sample as one line of JSON; `from_json` gives it back equal."""
    record: dict[str, Any] = {
        "key": example.key,
        "media": [[media.key, media.width, media.height, media.kind] for media in example.media],
        "branches": [
            {"style": branch.style, "turns": [[turn.prompt, _answer(turn.answer)] for turn in branch.turns]}
            for branch in example.branches
        ],
    }
    if example.info:
        record["info"] = example.info
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> Example:
    """A sample from `to_json`'s line."""
    record = json.loads(text)
    return Example(
        key=record["key"],
        media=tuple(Media(*media) for media in record["media"]),
        branches=tuple(
            Branch(branch["style"], tuple(Turn(prompt, _parsed(answer)) for prompt, answer in branch["turns"]))
            for branch in record["branches"]
        ),
        info=record.get("info", {}),
    )


def _answer(answer: str | Points) -> str | dict[str, Any]:
    if isinstance(answer, str):
        return answer
    return {"label": answer.label, "points": [list(point) for point in answer.points]}


def _parsed(answer: str | dict[str, Any]) -> str | Points:
    if isinstance(answer, str):
        return answer
    return Points(answer["label"], tuple(Point(*point) for point in answer["points"]))
