"""Families of pointing: places in one image, in several, in a video. Counts follow from the places."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_vlm.data.example import Branch, Clip, Point, Points, Turn
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.masks import packed
from megatron_vlm.data.sets.draft import Draft, Reference
from megatron_vlm.data.sets.row import LeftOut, Row

#: Molmo2 leaves out labels with more places than this.
MAX_POINTS = 60
#: Annotators click past the edge: so far outside (share of the side) a place is moved onto it. Farther is an error.
TOLERANCE = 0.02
#: Share of the requests about several images that name all of them.
ALL_IMAGES_SHARE = 0.5
#: Videos are annotated at two frames a second.
GRID_S = 0.5


def image_points(
    row: Row, *, styles: Sequence[str] = ("point_count", "pointing"), in_pixels: bool = False
) -> Iterator[Draft]:
    """All places of `label` in an image: `points` as [{x, y}] or {x: [], y: []}, in percent or in pixels of the file.

    styles: a sample for each; Molmo2 asks each label for its count and for its places.
    `masks`, one for each place, where the set is for evaluation. Raises LeftOut where there are more than MAX_POINTS.
    """
    scale = 1.0 if in_pixels else 100.0
    places = tuple(Point(1, x / scale, y / scale) for x, y in pairs(row, "points"))
    if len(places) > MAX_POINTS:
        raise LeftOut(_too_many(len(places), 1))
    if not in_pixels:
        places = tuple(inside(row, place) for place in places)
    label, media = _label(row), row.media()
    masks = [[[1, *packed(mask)]] for mask in row.items("masks")]
    info = {"masks": {label: masks}} if masks else {}
    for style in styles:
        branch = Branch(style, (Turn(label, Points(label, places)),))
        yield Draft((branch,), media, in_pixels=in_pixels, part=style, info=info)


def question_points(row: Row, *, style: str = "cosyn_point") -> Iterator[Draft]:
    """CoSyn-point: `questions`, for each of them `answer_points` {x: [], y: []} in percent and a name in `names`."""
    branches, too_long = [], []
    asked, answers, names = row.texts("questions"), row.items("answer_points"), row.texts("names")
    for question, answer, name in zip(asked, answers, names, strict=True):
        found = tuple(inside(row, Point(1, x / 100, y / 100)) for x, y in pairs(Row({"points": answer}), "points"))
        if len(found) <= MAX_POINTS:
            branches.append(Branch(style, (Turn(question, Points(name, found)),)))
        else:
            too_long.append(len(found))
    yield from _kept(branches, row.media(), too_long)


def multi_image_points(row: Row) -> Iterator[Draft]:
    """Several `images`, for each of them a label in `labels` and a list of places in percent in `points`.

    Asked label by label about the images that have it: half of the requests about all of them, the others about some;
    half ask for the count too.
    """
    media = row.media()
    labels, points = row.texts("labels"), row.items("points")
    if not len(labels) == len(points) == len(media):
        raise ValueError(
            f"{len(media)} images, {len(labels)} labels and {len(points)} lists of points: needed as many."
        )
    names = [label.lower() for label in labels]
    branches, too_long = [], []
    for label in dict.fromkeys(names):
        rng = generator("images", media[0].identity, label)
        chosen = [number for number, name in enumerate(names, 1) if name == label]
        if len(chosen) > 1 and rng.random() >= ALL_IMAGES_SHARE:
            chosen = sorted(rng.sample(chosen, rng.randint(1, len(chosen) - 1)))
        everywhere = len(chosen) == len(media) > 1
        where = "in all images" if everywhere else "in " + ", ".join(f"image_{number}" for number in chosen)
        found = tuple(
            inside(row, Point(number, x / 100, y / 100))
            for number in chosen
            for x, y in pairs(Row({"points": points[number - 1]}), "points")
        )
        if len(found) > MAX_POINTS:
            too_long.append(len(found))
            continue
        style = rng.choice(("multi_image_pointing", "multi_image_point_then_count"))
        verb = "Point to" if style == "multi_image_pointing" else "Point to and count"
        branches.append(Branch(style, (Turn(f"{verb} the {label} {where}.", Points(label, found)),)))
    yield from _kept(branches, media, too_long)


def video_points(
    row: Row, *, min_count: int = 0, max_count: int = MAX_POINTS, max_clip_s: float = 63.0, path: str = ""
) -> Iterator[Draft]:
    """Places of `label` in a video: `timestamps` (seconds of the file) and for each of them `points` [{x, y}] in
    percent, in a clip from `start` to `end`. Asked by its `question` for the count, or by its label for the places.

    Raises LeftOut for rows that the annotator was unsure of, with a number of places outside min_count .. max_count,
    and for clips longer than max_clip_s.
    """
    if row.get("annotator_unsure") is True:
        raise LeftOut("the annotator was unsure of it.")
    times = [Row({"timestamps": time}).number("timestamps") for time in row.items("timestamps")]
    by_time = [pairs(Row({"points": places}), "points") for places in row.items("points")]
    span = row.span()
    begin, end = span or (0.0, None)
    count = sum(map(len, by_time))
    if not min_count <= count <= max_count:
        raise LeftOut(f"it has {count} places; this set is of those with {min_count} to {max_count}.")
    if end is not None and end - begin > max_clip_s:
        raise LeftOut(f"its clip lasts longer than {max_clip_s:g} s.")
    found = []
    for time, places in zip(times, by_time, strict=True):
        at = round((time - begin) / GRID_S) * GRID_S
        if at < 0 or (end is not None and at > end - begin):
            raise ValueError(f"a place is at {time} s, outside the clip from {begin} to {end} s.")
        found += [inside(row, Point(at, x / 100, y / 100)) for x, y in places]
    label, media = _label(row), row.media(path)
    rng = generator("video_points", media[0].identity, label)
    style = rng.choice(("video_point_count", "video_point"))
    asked = row.text("question") if style == "video_point_count" and row.get("question") else label
    clip = Clip(begin, end) if span else None
    yield Draft((Branch(style, (Turn(asked, Points(label, tuple(found))),)),), media, clip=clip)


def _kept(branches: list[Branch], media: tuple[Reference, ...], too_long: list[int]) -> Iterator[Draft]:
    """The branches as a draft; then LeftOut for those that had too many places."""
    if branches:
        yield Draft(tuple(branches), media)
    if too_long:
        raise LeftOut(_too_many(max(too_long), len(too_long)))


def _too_many(count: int, labels: int) -> str:
    return f"{labels} of its labels have more than {MAX_POINTS} places, as many as {count}."


def pairs(row: Row, name: str) -> list[tuple[float, float]]:
    """Places as [{x, y}], [[x, y]] or {x: [], y: []}; [] where there are none. ValueError for anything else."""
    value = row.get(name)
    if isinstance(value, Mapping):
        sides = Row(value)
        if not {"x", "y"} <= set(value):
            raise row.bad(name, value, "lists of x and y")
        value = list(zip(sides.items("x"), sides.items("y"), strict=True))
    elif value is None and row.get("count") == 0:
        value = []
    elif not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise row.bad(name, value, "a list of places")
    return [_pair(row, name, place) for place in value]


def inside(row: Row, place: Point) -> Point:
    """The place, moved onto the edge where it lies just outside. Raises ValueError farther away, or for NaN."""
    x, y = (min(max(value, 0.0), 1.0) for value in (place.x, place.y))
    if not (abs(x - place.x) <= TOLERANCE and abs(y - place.y) <= TOLERANCE):
        raise ValueError(f"point ({place.x:g}, {place.y:g}) lies outside the picture (fractions of its sides).")
    return Point(place.at, x, y)


def _pair(row: Row, name: str, place: Any) -> tuple[float, float]:
    if isinstance(place, Mapping):
        place = (place.get("x"), place.get("y"))
    if not isinstance(place, Sequence) or isinstance(place, (str, bytes)) or len(place) != 2:
        raise row.bad(name, place, "x and y")
    one = Row({"x": place[0], "y": place[1]})
    return one.number("x"), one.number("y")


def _label(row: Row) -> str:
    """Lower case, but for rows that keep their own."""
    label = row.text("label")
    return label if row.get("label_cased") else label.lower()
