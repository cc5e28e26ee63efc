"""Places as text: Molmo2's `<points coords="1 1 103 540 2 388 512">cups</points>`, written and read.

In a video a group begins with its time: `<tracks coords="0.0 1 105 220 2 700 410;0.5 1 110 222">player</tracks>`.
Coordinates are thousandths of the width and height. Reading forgives: a model's output, cut or half wrong, gives the
places that can be made out. Earlier Molmo's tags and the educational `<point t, x, y, id>` are read too.
"""

from __future__ import annotations

import math
import re
from itertools import groupby
from typing import NamedTuple

from megatron_vlm.data.example import Point, Points, Tracks

#: Between the groups of two images or frames, by prompt format: TAB in pre-training (html-v1), `;` later (html-v2).
SEPARATORS = {"style_and_length": "\t", "style": ";"}
NONE = "There are none."
NO_TRACKS = "No tracks available."
#: What stands around the tag, by style; any other style has the tag alone.
COUNT_AFTER = (
    "point_count",
    "point_then_count",
    "multi_image_point_then_count",
    "cosyn_point_count",
    "video_point_count",
)
COUNT_BEFORE = ("count_point", "count_then_point", "multi_image_count_then_point", "video_count_point")
COUNT_ONLY = ("count", "counting", "multi_image_counting", "video_count")
#: Ends of styles of tracks that name only the first and the last place of each object.
ENDS_ONLY = "_start_end"

# Read from what a model says: on any text each pattern takes linear time, and no number is too long for Python.
_TAG = re.compile(r"<(?:points|tracks)\b[^<]*?\bcoords=\"([0-9\t:;, .]+)")
_GROUP = re.compile(r"(?:^|[\t:,;]) *([0-9]{1,9}(?:\.[0-9]{1,9})?) ([0-9 .]+)")
_PLACE = re.compile(r"(?<![0-9])([0-9]{1,9}) ([0-9]{3,4}) ([0-9]{3,4})(?![0-9])")
_MOLMO1_TAG = re.compile(r"<points?\s([^<>]*)>")
_MOLMO1_PLACE = re.compile(
    r"\bx([0-9]{0,9})\s*=\s*(?:[\"']\s*)?([0-9.]{1,20})[\"']?\s+y\1\s*=\s*(?:[\"']\s*)?([0-9.]{1,20})"
)
_EDUCATIONAL = re.compile(r"<point\s+((?:[0-9.]{1,20}\s*,\s*){2,3}[0-9]{1,9})\s*/?>")
_COUNTS = (
    re.compile(r"shows a total of ([0-9]{1,9})(?![0-9])"),
    re.compile(r"[Tt]here (?:are|is) ([0-9]{1,9})(?![0-9])"),
    re.compile(r"^([0-9]{1,9})$"),
)
_NUMBERS = {
    word: number
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen twenty".split()
    )
}


class Place(NamedTuple):
    """One place read from text."""

    at: float
    """Number of the image, from 1; seconds in a video."""
    id: int
    """Number of the object, from 1."""
    x: float
    """Fraction of the width, 0 to 1."""
    y: float
    """Fraction of the height, 0 to 1."""


def write(answer: Points | Tracks, style: str, *, separator: str = ";", seconds: bool = False) -> str:
    """The answer as text in the words of `style`.

    seconds: `at` of the points is a time in a video, not the number of an image. Always so in tracks.
    """
    if isinstance(answer, Tracks):
        coordinates = _track_coordinates(answer, separator, ends_only=style.endswith(ENDS_ONLY))
        return f'<tracks coords="{coordinates}">{answer.label}</tracks>' if coordinates else NO_TRACKS
    count = len(answer.points)
    if style in COUNT_ONLY:
        return str(count)
    if not count:
        return NONE
    tag = f'<points coords="{_coordinates(answer, separator, seconds)}">{answer.label}</points>'
    if style in COUNT_AFTER:
        return f"Counting the {tag} shows a total of {count}."
    if style in COUNT_BEFORE:
        return f"There are {count} {tag}."
    return tag


def until(answer: Tracks, seconds: float) -> Tracks:
    """The tracks up to this moment, the last at which a frame is shown: what comes later cannot be seen."""
    objects = (tuple(p for p in places if round(p.at, 1) <= round(seconds, 1)) for places in answer.objects)
    return Tracks(answer.label, tuple(places for places in objects if places))


def _coordinates(answer: Points, separator: str, seconds: bool) -> str:
    # Sorted after rounding, so that the order can be told from the text alone; ids run through all groups.
    places = sorted(_rounded(point, seconds) for point in answer.points)
    numbered = [(at, number, x, y) for number, (at, x, y) in enumerate(places, start=1)]
    return _groups(numbered, separator, seconds)


def _track_coordinates(answer: Tracks, separator: str, *, ends_only: bool) -> str:
    """Objects are numbered by their first appearance, those of one frame from left to right."""
    objects = sorted(sorted(_rounded(point, True) for point in places) for places in answer.objects if places)
    numbered = [
        (at, number, x, y)
        for number, places in enumerate(objects, start=1)
        for at, x, y in (dict.fromkeys((places[0], places[-1])) if ends_only else places)
    ]
    return _groups(sorted(numbered), separator, True)


def _groups(places: list[tuple[float, int, int, int]], separator: str, seconds: bool) -> str:
    """(time or image, id, x, y), sorted: one group for each time or image; of an id's places in a group the first."""
    groups = []
    for at, members in groupby(places, key=lambda place: place[0]):
        words, seen = [str(at) if seconds else str(int(at))], set()
        for _, number, x, y in members:
            if number not in seen:
                seen.add(number)
                words.append(f"{number} {x:03d} {y:03d}")
        groups.append(" ".join(words))
    return separator.join(groups)


def _rounded(point: Point, seconds: bool) -> tuple[float, int, int]:
    """As it is written: tenths of a second, thousandths of the picture."""
    return round(float(point.at), 1) if seconds else point.at, _thousandths(point.x), _thousandths(point.y)


def _thousandths(fraction: float) -> int:
    if not math.isfinite(fraction):
        raise ValueError(f"a coordinate is {fraction}; needed a fraction from 0 to 1.")
    return round(1000 * min(max(fraction, 0.0), 1.0))


def parse(text: str) -> list[Place]:
    """Every place in `text` that can be made out, in its order; places outside the picture are left out.

    An id used twice in one image or frame counts once.
    """
    places: list[Place] = []
    for match in _TAG.finditer(text):
        places.extend(_molmo2_places(match[1]))
    if not places:
        places = [*_educational_places(text)] or [*_molmo1_places(text)]
    return [place for place in places if 0 <= place.x <= 1 and 0 <= place.y <= 1]


def parse_count(text: str) -> int | None:
    """The number that an answer states, in digits or as a word alone; else that of its places; None without either."""
    if NONE in text:
        return 0
    stated = text.strip().removesuffix(".").rstrip()
    for pattern in _COUNTS:
        if match := pattern.search(stated):
            return int(match[1])
    word = _NUMBERS.get(stated.lower())
    return word if word is not None else len(parse(text)) or None


def _molmo2_places(coordinates: str) -> list[Place]:
    places: list[Place] = []
    for group in _GROUP.finditer(coordinates):
        seen: set[str] = set()
        for number, x, y in _PLACE.findall(group[2]):
            if number not in seen:
                seen.add(number)
                places.append(Place(float(group[1]), int(number), int(x) / 1000, int(y) / 1000))
    return places


def _molmo1_places(text: str) -> list[Place]:
    """`<point x="10.5" y="20" alt="cat">` and `<points x1=".." y1=".." x2=...>`: percent of the width and height."""
    places: list[Place] = []
    for tag in _MOLMO1_TAG.finditer(text):
        for _, x, y in _MOLMO1_PLACE.findall(tag[1]):
            if (across := _number(x)) is not None and (down := _number(y)) is not None:
                places.append(Place(1, len(places) + 1, across / 100, down / 100))
    return places


def _educational_places(text: str) -> list[Place]:
    """`<point x, y, id>` and `<point t, x, y, id>`: fractions, ids from 0."""
    places: list[Place] = []
    for tag in _EDUCATIONAL.finditer(text):
        words = tag[1].split(",")
        numbers = [number for word in words if (number := _number(word)) is not None]
        if len(numbers) == len(words):
            at, x, y, number = numbers if len(numbers) == 4 else [1, *numbers]
            places.append(Place(at, int(number) + 1, x, y))
    return places


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
