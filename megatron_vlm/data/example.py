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
#: Seconds by which a point may lie behind the end of its video.
TIME_SLACK = 1.0


class Point(NamedTuple):
    """A place in one image (or video frame)."""

    at: float
    """Which image, counted from 1; in a video, seconds from the start of its clip."""
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
class Tracks:
    """An answer that follows objects through a video. `objects` empty says that there are none."""

    label: str
    """What is followed: `the red car`."""
    objects: tuple[tuple[Point, ...], ...]
    """The places of each object at the times when it is visible, ascending. Numbers are given when it is written."""


@dataclass(frozen=True)
class Turn:
    """A question and its answer: text, or places that the prompt format writes."""

    prompt: str
    answer: str | Points | Tracks


@dataclass(frozen=True)
class Branch:
    """One conversation about the media. Branches of a sample do not see each other."""

    style: str
    """Kind of answer, as in prompts: `long_caption`, `pointing`, `point_count`, `vqa2`, `text_sft`, ..."""
    turns: tuple[Turn, ...]
    weight: float = field(default=1.0, repr=False)  # not in the repr, from which keys are made
    """Multiplies the weights of its loss tokens, unless the data set has a flat weight."""


@dataclass(frozen=True)
class Media:
    """A stored file, by the sha256 of its content."""

    key: str
    """sha256 of the bytes, in hex."""
    width: int
    """Pixels as displayed: after the EXIF orientation."""
    height: int
    kind: str = "image"
    """image or video."""
    seconds: float = 0.0
    """Length of a video."""
    fps: float = 0.0
    """Mean frames per second of a video."""
    frames: int = 0
    """Frames in a video."""


@dataclass(frozen=True)
class Subtitle:
    """Words that are said or shown in a part of a video. Seconds from the clip's start."""

    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Clip:
    """Which part of its video a sample is about, and how it is looked at."""

    start: float = 0.0
    """Seconds from the video's first frame; all other times of the sample count from here."""
    end: float | None = None
    """Seconds from the video's first frame. None, or beyond the video = to its end."""
    rate: int = 0
    """Times a second at which tracks were annotated: frames are taken at a multiple of it. 0 = as all other videos."""
    subtitles: tuple[Subtitle, ...] = ()


@dataclass(frozen=True)
class Example:
    """A visual input (or none) with every conversation about it: the unit that is drawn and counted."""

    key: str
    """Unique in its data set and split."""
    branches: tuple[Branch, ...]
    media: tuple[Media, ...] = ()
    info: dict[str, Any] = field(default_factory=dict)
    """Whatever evaluation needs (category, image id, ...); JSON values. Training never looks."""
    clip: Clip | None = None
    """Of a sample with a video. None = all of it."""

    @property
    def video(self) -> Media | None:
        """The sample's video, which is then its only media."""
        return self.media[0] if self.media and self.media[0].kind == "video" else None

    @property
    def seconds(self) -> float:
        """Length of the part of the video that the sample is about; 0 without a video."""
        if self.video is None:
            return 0.0
        if self.clip is None:
            return self.video.seconds
        end = self.video.seconds if self.clip.end is None else min(self.clip.end, self.video.seconds)
        return end - self.clip.start

    def check(self) -> None:
        """Raise ValueError, naming the sample, where something cannot be trained on."""
        if not KEY.fullmatch(self.key):
            raise ValueError(f"sample key {self.key!r}: use letters, digits, `_`, `-` and single `/` between them.")
        self.check_media()
        if not self.branches:
            raise ValueError(f"sample {self.key!r} has no branch: it needs at least one conversation.")
        for branch in self.branches:
            if not branch.turns:
                raise ValueError(f"sample {self.key!r}: a branch of style {branch.style!r} has no turn.")
            if not 0 < branch.weight < math.inf:
                raise ValueError(
                    f"sample {self.key!r}: a branch has the weight {branch.weight}; needed a number above 0."
                )
            for turn in branch.turns:
                self._check_turn(branch.style, turn)

    def check_media(self) -> None:
        """Raise ValueError, naming the sample, where its media and its clip do not fit together."""
        kinds = sorted({media.kind for media in self.media})
        if not set(kinds) <= {"image", "video"} or (self.video and len(self.media) > 1) or len(kinds) > 1:
            raise ValueError(
                f"sample {self.key!r} has {len(self.media)} media of kind {' and '.join(kinds)}; needed any number of "
                "images, or one video."
            )
        clip = self.clip
        if clip is None:
            return
        if self.video is None:
            raise ValueError(f"sample {self.key!r} names a clip, but has no video.")
        numbers = [
            clip.start,
            0.0 if clip.end is None else clip.end,
            *(time for line in clip.subtitles for time in (line.start, line.end)),
        ]
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"sample {self.key!r}: a time of its clip or subtitles is not finite.")
        if clip.start < 0 or self.seconds <= 0:
            raise ValueError(
                f"sample {self.key!r}: its clip from {clip.start} to {clip.end} s lies outside the video of "
                f"{self.video.seconds:.2f} s."
            )
        if clip.rate < 0:
            raise ValueError(f"sample {self.key!r}: its tracks were annotated {clip.rate} times a second.")

    def _check_turn(self, style: str, turn: Turn) -> None:
        where = f"sample {self.key!r}, style {style!r}"
        answer = turn.answer
        if isinstance(answer, str):
            if not answer.strip():
                raise ValueError(f"{where}: the answer is empty.")
            return
        if not answer.label.strip():
            raise ValueError(f"{where}: the points have no label.")
        if isinstance(answer, Points):
            self._check_points(where, answer.points)
            return
        if self.video is None:
            raise ValueError(f"{where}: tracks need a video.")
        for places in answer.objects:
            if not places:
                raise ValueError(f"{where}: an object of the tracks is nowhere visible. Leave it out.")
            self._check_points(where, places)

    def _check_points(self, where: str, points: tuple[Point, ...]) -> None:
        for point in points:
            if not all(math.isfinite(value) for value in point):
                raise ValueError(f"{where}: point {tuple(point)} is not finite.")
            if not (0.0 <= point.x <= 1.0 and 0.0 <= point.y <= 1.0):
                raise ValueError(f"{where}: point {tuple(point)} lies outside the picture (fractions 0 to 1 expected).")
            if self.video is not None:
                # Annotations are on a grid of their own and may end a little after the last frame.
                if not 0.0 <= point.at <= self.seconds + TIME_SLACK:
                    raise ValueError(f"{where}: point {tuple(point)} is not in the {self.seconds:.2f} s of the video.")
            elif self.media and point.at not in range(1, len(self.media) + 1):
                raise ValueError(f"{where}: point {tuple(point)} names image {point.at}; there are {len(self.media)}.")


def to_json(example: Example) -> str:
    """The sample as one line of JSON; `from_json` gives it back equal."""
    record: dict[str, Any] = {
        "key": example.key,
        "media": [_media(media) for media in example.media],
        "branches": [
            {
                "style": branch.style,
                "turns": [[turn.prompt, _answer(turn.answer)] for turn in branch.turns],
                **({"weight": branch.weight} if branch.weight != 1 else {}),
            }
            for branch in example.branches
        ],
    }
    if example.info:
        record["info"] = example.info
    if example.clip:
        clip = example.clip
        lines = [[line.start, line.end, line.text] for line in clip.subtitles]
        record["clip"] = {"start": clip.start, "end": clip.end, "rate": clip.rate, "subtitles": lines}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def from_json(text: str) -> Example:
    """A sample from `to_json`'s line."""
    record = json.loads(text)
    return Example(
        key=record["key"],
        media=tuple(Media(*media) for media in record["media"]),
        branches=tuple(
            Branch(
                branch["style"],
                tuple(Turn(prompt, _parsed(answer)) for prompt, answer in branch["turns"]),
                branch.get("weight", 1.0),
            )
            for branch in record["branches"]
        ),
        info=record.get("info", {}),
        clip=_clip(record["clip"]) if "clip" in record else None,
    )


def _media(media: Media) -> list[Any]:
    image = [media.key, media.width, media.height, media.kind]
    return [*image, media.seconds, media.fps, media.frames] if media.kind == "video" else image


def _clip(record: dict[str, Any]) -> Clip:
    subtitles = tuple(Subtitle(*line) for line in record["subtitles"])
    return Clip(record["start"], record["end"], record["rate"], subtitles)


def _answer(answer: str | Points | Tracks) -> str | dict[str, Any]:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, Tracks):
        return {"label": answer.label, "tracks": [[list(point) for point in places] for places in answer.objects]}
    return {"label": answer.label, "points": [list(point) for point in answer.points]}


def _parsed(answer: str | dict[str, Any]) -> str | Points | Tracks:
    if isinstance(answer, str):
        return answer
    if "tracks" in answer:
        return Tracks(answer["label"], tuple(tuple(Point(*point) for point in places) for places in answer["tracks"]))
    return Points(answer["label"], tuple(Point(*point) for point in answer["points"]))
