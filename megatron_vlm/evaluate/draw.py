"""Draw places on pictures and films: what a model said as crosses, what is true as rings. No torch.

Places are fractions of the picture, as in Point and Place; h, w are pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_vlm.data import encode, points, video
from megatron_vlm.data.example import Points, Tracks
from megatron_vlm.data.points import Place
from megatron_vlm.data.timeline import Timeline

#: Colours of objects by their number, or of branches by theirs.
COLORS = ("#ff2d55", "#00c7be", "#ffd60a", "#af52de", "#32d74b", "#ff9f0a", "#0a84ff", "#ffffff")
#: Small pictures are enlarged until their longer side has about this many pixels.
SHOWN_SIDE = 336
#: Height of the line of text above a picture, in pixels.
TITLE = 18
#: Frames a second of a drawn film, at most.
FILM_FPS = 12
#: Seconds for which a place stays marked where nothing follows it.
HELD_S = 0.6
#: Frames on a sheet, at most, and in a row of it.
SHEET_FRAMES, SHEET_COLUMNS = 12, 4


class Mark(NamedTuple):
    """Something to draw at a place."""

    x: float
    y: float
    color: str
    shape: str = "cross"
    """cross | ring | dot."""
    text: str = ""
    """Beside it: the number of the object."""
    size: int = 0
    """Pixels from the middle to the edge; 0 = by the picture's size."""


def marked(pixels: np.ndarray, marks: Iterable[Mark], title: str = "", side: int = 0) -> Image.Image:
    """(h, w, 3) uint8 pixels, enlarged where small, with marks on them and a line of text above.

    side: the longer side has at most so many pixels, so that marks and text stay as large as they are drawn; 0 = any.
    """
    image = Image.fromarray(pixels)
    if side and max(image.size) > side:
        image.thumbnail((side, side))
    scale = max(1, (side or SHOWN_SIDE) // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    top = TITLE if title else 0
    canvas = Image.new("RGB", (image.width, image.height + top), "white")
    canvas.paste(image, (0, top))
    pen = ImageDraw.Draw(canvas)
    if title:
        font = ImageFont.load_default(12)
        pen.text((4, 2), _shortened(title, lambda text: 8 + pen.textlength(text, font) <= canvas.width), "black", font)
    for mark in marks:
        size = mark.size or max(6, min(image.size) // 40)
        _draw(pen, mark, mark.x * image.width, mark.y * image.height + top, size)
    return canvas


def _draw(pen: ImageDraw.ImageDraw, mark: Mark, x: float, y: float, size: int) -> None:
    for color, width in (("black", 5), (mark.color, 2)):  # an edge of black, so that it shows on every ground
        if mark.shape == "ring":
            pen.ellipse((x - size, y - size, x + size, y + size), outline=color, width=width)
        elif mark.shape == "dot":
            half = size // 2 - (color != "black")  # a trail: smaller than what it leads to
            pen.ellipse((x - half, y - half, x + half, y + half), fill=color)
        else:
            pen.line((x - size, y - size, x + size, y + size), fill=color, width=width)
            pen.line((x - size, y + size, x + size, y - size), fill=color, width=width)
    if mark.text:
        font = ImageFont.load_default(14)
        length, right = pen.textlength(mark.text, font), x + size + 3
        left = right if right + length < pen.im.size[0] else x - size - 3 - length  # not over the picture's edge
        pen.text((left, max(1, y - size - 6)), mark.text, mark.color, font, stroke_width=1, stroke_fill="black")


def _shortened(text: str, fits: Callable[[str], bool]) -> str:
    """The text, or as much of its beginning as fits."""
    ends = (text, *(text[:count].rstrip() + "..." for count in range(len(text) - 1, 0, -1)))
    return next((one for one in ends if fits(one)), "")


def crosses(said: Sequence[Place], at: float) -> list[Mark]:
    """The places at one image, as numbered crosses."""
    return [Mark(p.x, p.y, _color(p.id), text=str(p.id)) for p in said if p.at == at]


def rings(true: Iterable[tuple[float, float]]) -> list[Mark]:
    """True places."""
    return [Mark(x, y, "#ffffff", "ring") for x, y in true]


def beside(pictures: Sequence[Image.Image], columns: int = SHEET_COLUMNS) -> Image.Image:
    """Pictures as one, in rows of so many, with a gap between them."""
    width, height = max(one.width for one in pictures), max(one.height for one in pictures)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + 6) - 6, rows * (height + 6) - 6), "white")
    for number, one in enumerate(pictures):
        sheet.paste(one, (number % columns * (width + 6), number // columns * (height + 6)))
    return sheet


def true_places(answer: object) -> list[Place]:
    """The places of an answer of a sample; none where it is a text, or None."""
    if isinstance(answer, Tracks):
        return [Place(p.at, number, p.x, p.y) for number, track in enumerate(answer.objects, 1) for p in track]
    if isinstance(answer, Points):
        return [Place(p.at, number, p.x, p.y) for number, p in enumerate(answer.points, 1)]
    return []


def on_film(said: Sequence[Place], at: float, *, true: bool = False) -> list[Mark]:
    """What is marked at a moment of a film: each object where it was said to be last, with a trail to there; where
    they are `true`, a ring instead.

    Nothing is made up between two places; the last one of an object goes after HELD_S.
    """
    marks = []
    for number in sorted({place.id for place in said}):
        track = sorted(place for place in said if place.id == number)
        past = [place for place in track if place.at <= at + 1e-6]
        ahead = any(place.at > at for place in track)
        if past and (ahead or at - past[-1].at <= HELD_S):
            x, y = past[-1].x, past[-1].y
            if true:
                marks += rings([(x, y)])
            else:
                marks += [Mark(p.x, p.y, _color(number), "dot") for p in past[:-1]]
                marks.append(Mark(x, y, _color(number), text=str(number)))
    return marks


@dataclass(frozen=True)
class Film:
    """A clip of a video, and what is drawn on its frames."""

    data: bytes
    """The file."""
    timeline: Timeline
    said: str
    """An answer; the places that it names are drawn as crosses."""
    start: float
    seconds: float
    """Of the clip in the file."""
    title: str = ""
    true: object = None
    """The right answer, drawn as rings."""
    side: int = 0
    """Most pixels of a frame's longer side. 0 = small ones are enlarged, no other is changed."""

    def write(self, path: Path) -> int:
        """As an MP4 (H.264); returns how many frames it has."""
        moments = film_moments(self.timeline, self.seconds).tolist()
        drawn = (np.asarray(picture) for picture in self._frames(moments))
        path.write_bytes(encode.mp4(drawn, min(self.timeline.fps, FILM_FPS)))
        return len(moments)

    def sheet(self) -> Image.Image:
        """Frames on one picture: those with places first, then evenly spread ones."""
        named = {place.at for place in [*points.parse(self.said), *true_places(self.true)]}
        moments = key_moments(sorted(at for at in named if at <= self.seconds), self.seconds, SHEET_FRAMES)
        return beside(list(self._frames(moments)))

    def _frames(self, moments: Sequence[float]) -> Iterator[Image.Image]:
        """At these seconds of the clip."""
        said, true = points.parse(self.said), true_places(self.true)
        frames = video.read(self.data, self.timeline, [self.start + at for at in moments], name="film")
        for at, pixels in zip(moments, frames, strict=True):
            marks = [*on_film(true, at, true=True), *on_film(said, at)]
            yield marked(pixels, marks, f"{at:.1f} s  {self.title}", self.side)


def film_moments(timeline: Timeline, seconds: float) -> np.ndarray:
    """Moments of the clip at which a drawn film shows a frame, in seconds from the clip's start."""
    return np.arange(0.0, seconds, 1 / min(timeline.fps, FILM_FPS)) if seconds > 0 else np.zeros(1)


def key_moments(named: Sequence[float], seconds: float, most: int) -> list[float]:
    """At most so many moments of a clip, ascending: the named ones, thinned out evenly if they are more; between them
    evenly spread ones."""
    if len(named) >= most:
        return [named[round(i * (len(named) - 1) / max(1, most - 1))] for i in range(most)]
    spread = np.linspace(0, seconds, most).tolist()
    free = [at for at in spread if all(abs(at - other) > seconds / most / 2 for other in named)]
    return sorted([*named, *free[: most - len(named)]])


def _color(number: int) -> str:
    return COLORS[(number - 1) % len(COLORS)]
