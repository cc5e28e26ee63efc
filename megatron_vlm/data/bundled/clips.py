"""Short clips: drawn objects that move in straight lines over a photograph, so that places and times are exact.

A clip is planned first, as plain data, then painted frame by frame. Coordinates are pixels of a frame, times seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_vlm.data import encode
from megatron_vlm.data.bundled import objects
from megatron_vlm.data.bundled.draw import Draw
from megatron_vlm.data.bundled.scenes import CONTRAST, GRAY, SIDE

FPS = 8
SECONDS = 4
#: Times a second at which places are given: twice, as in Molmo2's data.
RATE = 2
DIAMETERS = (16, 23)
#: How often a clip has 1, 2, 3 objects.
OBJECTS = (4, 4, 2)
#: Share of the objects that come later than the beginning, and that go before the end.
LATE_SHARE, EARLY_SHARE = 0.25, 0.2
#: Objects whose way is shorter than this many pixels stay where they are.
STILL = 10


@dataclass(frozen=True)
class Moving:
    """An object on its way from one place to another in the time of the clip; drawn while it is there."""

    color: str
    kind: str
    diameter: int
    begin: tuple[float, float]
    """Left and top of its square at 0 s."""
    end: tuple[float, float]
    """The same at the clip's end."""
    first: float
    """From when on it is there."""
    last: float
    """Until before when; the clip's end if it stays."""

    def square(self, at: float) -> tuple[int, int]:
        """Left and top of its square at a time."""
        share = at / SECONDS
        return (
            round(self.begin[0] + share * (self.end[0] - self.begin[0])),
            round(self.begin[1] + share * (self.end[1] - self.begin[1])),
        )

    def there(self, at: float) -> bool:
        return self.first <= at < self.last

    def place(self, at: float) -> tuple[float, float]:
        """A pixel on it as fractions of the frame's side; see objects.anchor."""
        x, y = objects.anchor(self.kind, self.diameter)
        left, top = self.square(at)
        return (left + x + 0.5) / SIDE, (top + y + 0.5) / SIDE

    def track(self) -> tuple[tuple[float, float, float], ...]:
        """(time, x, y) at every moment of RATE at which it is there."""
        times = [number / RATE for number in range(SECONDS * RATE)]
        return tuple((at, *self.place(at)) for at in times if self.there(at))

    @property
    def direction(self) -> str:
        """Where it goes, in words: `to the left`; "" where it stays."""
        across, down = self.end[0] - self.begin[0], self.end[1] - self.begin[1]
        if max(abs(across), abs(down)) < STILL:
            return ""
        words = [("up", "down")[down > 0]] if abs(down) >= STILL else []
        words += [("to the left", "to the right")[across > 0]] if abs(across) >= STILL else []
        return " and ".join(words)


@dataclass(frozen=True)
class Film:
    """What moves where."""

    key: str
    photo: str
    topic: str
    pan: tuple[float, float, float, float]
    """Left, top at the beginning and at the end of the piece of the photograph, as shares of the room there is."""
    objects: tuple[Moving, ...]

    def info(self) -> dict[str, object]:
        """For evaluation: colour, kind, radius (fraction of the side) and track of every object."""
        rows = [[one.color, one.kind, one.diameter / 2 / SIDE, [list(p) for p in one.track()]] for one in self.objects]
        return {"film": self.key, "objects": rows}


def plan(key: str, photos: Sequence[tuple[str, str]], wanted: str) -> Film:
    """A clip drawn from its key alone. photos, wanted: as for scenes.plan, without new kinds."""
    draw = Draw(f"film/{key}")
    photo, topic = draw.pick(photos)
    pan = (draw.between(0, 1), draw.between(0, 1), draw.between(0, 1), draw.between(0, 1))
    placed: list[Moving] = []
    for color, kind in _pairs(draw, wanted):
        found = _free_way(draw, placed, color, kind)
        if found is not None:
            placed.append(found)
    order = sorted(placed, key=lambda one: (one.first, one.color, one.kind, one.begin))
    return Film(key, photo, topic, pan, tuple(order))


def _pairs(draw: Draw, wanted: str) -> list[tuple[str, str]]:
    """(colour, kind) of each object; sometimes two are alike. The first is a held-out one where that is wanted."""
    count = 1 + draw.weighted(OBJECTS)
    chosen = [draw.pick(sorted(objects.HELD_OUT_PAIRS))] if wanted == "held_out" else []
    while len(chosen) < count:
        pair = (draw.pick(tuple(objects.COLORS)), draw.pick(objects.TRAIN_KINDS))
        if chosen and draw.chance(0.3):
            pair = chosen[0]
        if wanted == "held_out" or pair not in objects.HELD_OUT_PAIRS:
            chosen.append(pair)
    return chosen


def _free_way(draw: Draw, placed: Sequence[Moving], color: str, kind: str) -> Moving | None:
    """A way on which the object meets none of the others; None where 60 tries find none."""
    for _ in range(60):
        diameter = DIAMETERS[0] + draw.below(DIAMETERS[1] - DIAMETERS[0] + 1)
        room = SIDE - diameter
        begin, end = ((float(draw.below(room)), float(draw.below(room))) for _ in range(2))
        first = draw.pick((1.0, 1.5)) if draw.chance(LATE_SHARE) else 0.0
        last = draw.pick((2.5, 3.0)) if draw.chance(EARLY_SHARE) else float(SECONDS)
        found = Moving(color, kind, diameter, begin, end, first, last)
        if all(_apart(found, other) for other in placed):
            return found
    return None


def _apart(one: Moving, other: Moving) -> bool:
    """Whether their squares never touch, whoever is there."""
    for number in range(SECONDS * FPS + 1):
        (left, top), (other_left, other_top) = one.square(number / FPS), other.square(number / FPS)
        across = left + one.diameter <= other_left or other_left + other.diameter <= left
        if not (across or top + one.diameter <= other_top or other_top + other.diameter <= top):
            return False
    return True


def paint(plan: Film, scenery: Mapping[str, Image.Image]) -> bytes:
    """The clip as an MP4. scenery: as for scenes.paint."""
    draw = Draw(f"film ground/{plan.key}")
    photo = scenery[plan.photo]
    side = round(min(photo.size) * draw.between(0.5, 0.8))
    gray = round(draw.between(*GRAY))
    table = [round(CONTRAST * value + (1 - CONTRAST) * gray) for value in range(256)]
    # Enough of the photograph for the whole way of the camera, already small and faded.
    scale = SIDE / side
    small = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BOX).point(
        table * 3
    )
    room = small.width - SIDE, small.height - SIDE
    frames = []
    for number in range(SECONDS * FPS):
        at = number / FPS
        left, top = (
            round(room[axis] * (plan.pan[axis] + (plan.pan[axis + 2] - plan.pan[axis]) * at / SECONDS))
            for axis in (0, 1)
        )
        frame = small.crop((left, top, left + SIDE, top + SIDE))
        for one in plan.objects:
            if one.there(at):
                picture = objects.picture(one.kind, one.color, one.diameter)
                frame.paste(picture, one.square(at), picture)
        frames.append(np.asarray(frame))
    return encode.mp4(frames, FPS, crf=12)
