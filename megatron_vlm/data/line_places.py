"""What a line of one's own data says about places and times: points, tracks, and the part of a video that it is about.

Used by formats.py, which documents the forms. Coordinates become fractions, times seconds of the clip.
"""

from __future__ import annotations

from typing import Any

from megatron_vlm.data.example import TIME_SLACK, Clip, Media, Point, Points, Subtitle, Tracks

UNITS = ("pixels", "percent", "fraction")
#: Keys of a line that choose a part of its video.
CLIP_KEYS = ("start", "end", "rate", "subtitles")
#: Tracks must lie so close to the frames that are shown for them, in seconds.
GRID_SLACK = 0.051
#: Most times a second that tracks can have been made.
MAX_RATE = 1000


def read_clip(record: dict[str, Any], media: tuple[Media, ...]) -> Clip | None:
    """The part of the line's video; None where the line names none. Raises ValueError, saying what is wrong."""
    named = [name for name in CLIP_KEYS if name in record]
    if not named:
        return None
    if not _is_video(media):
        raise ValueError(f"{', '.join(named)} need a video_path.")
    start, end, rate = record.get("start", 0.0), record.get("end"), record.get("rate", 0)
    for name, value in (("start", start), ("end", end)):
        if not _is_number(value) and (name, value) != ("end", None):
            raise ValueError(f"{name} must be a time in seconds, not {value!r}.")
    if type(rate) is not int or not 0 <= rate <= MAX_RATE:
        raise ValueError(f"rate must be a whole number, how many times a second the tracks were made, not {rate!r}.")
    lines = record.get("subtitles", [])
    sound = isinstance(lines, list) and all(
        isinstance(line, list) and len(line) == 3 and all(map(_is_number, line[:2])) and isinstance(line[2], str)
        for line in lines
    )
    if not sound:
        raise ValueError("subtitles must be a list of [start, end, text], in seconds from the start of the clip.")
    return Clip(float(start), None if end is None else float(end), rate, tuple(Subtitle(*line) for line in lines))


def read_points(body: dict[str, Any], label: str, media: tuple[Media, ...], seconds: float) -> Points:
    """The `points` of a conversation. seconds: length of the clip; 0 = the line has images."""
    if not media:
        raise ValueError("points need an image_path or a video_path.")
    if not isinstance(body["points"], list):
        raise ValueError("points must be a list of [x, y].")
    return Points(label, tuple(_point(place, _unit(body), media, seconds) for place in body["points"]))


def read_tracks(
    body: dict[str, Any], label: str, media: tuple[Media, ...], seconds: float, clip: Clip | None
) -> Tracks:
    """The `tracks` of a conversation, one list of places for each object."""
    if not _is_video(media):
        raise ValueError("tracks need a video_path.")
    rate = clip.rate if clip else 0
    if not rate:
        raise ValueError('tracks need "rate": how many times a second they were made, a whole number.')
    objects = body["tracks"]
    if not isinstance(objects, list) or not all(isinstance(places, list) and places for places in objects):
        raise ValueError("tracks must be a list with a list of [x, y, seconds] for each object.")
    unit = _unit(body)
    found = tuple(tuple(_point(place, unit, media, seconds) for place in places) for places in objects)
    for places in found:
        for before, after in zip(places, places[1:], strict=False):
            if after.at <= before.at:
                raise ValueError(f"a track has a place at {after.at:g} s behind one at {before.at:g} s: sort by time.")
        for place in places:
            if abs(place.at - round(place.at * rate) / rate) > GRID_SLACK:
                raise ValueError(
                    f"a track has a place at {place.at:g} s, but with rate {rate} frames are shown every "
                    f"{1 / rate:g} s."
                )
    return Tracks(label, found)


def _unit(body: dict[str, Any]) -> str:
    unit = body.get("unit", "pixels")
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r} does not exist; choose one of {', '.join(UNITS)}.")
    return str(unit)


def _point(place: Any, unit: str, media: tuple[Media, ...], seconds: float) -> Point:
    sound = isinstance(place, list) and all(map(_is_number, place))
    if _is_video(media):
        if not sound or len(place) != 3:
            raise ValueError(f"point {place!r} must be [x, y, seconds] in a video.")
        if not 0 <= place[2] <= seconds + TIME_SLACK:
            raise ValueError(f"point {place} is at {place[2]} s; the clip lasts {seconds:.2f} s.")
        at, shown = float(place[2]), media[0]
    else:
        if not sound or len(place) not in (2, 3):
            raise ValueError(f"point {place!r} must be [x, y] or [x, y, number of the image].")
        at = place[2] if len(place) == 3 else 1
        if at not in range(1, len(media) + 1):
            raise ValueError(f"point {place} names image {at}; the line has {len(media)}.")
        at, shown = int(at), media[int(at) - 1]
    width, height = {"pixels": (shown.width, shown.height), "percent": (100, 100), "fraction": (1, 1)}[unit]
    if not (0 <= place[0] <= width and 0 <= place[1] <= height):
        what = "frame" if _is_video(media) else "image"
        raise ValueError(f"point {place} lies outside the {what}: x to {width}, y to {height} in {unit}.")
    return Point(at, place[0] / width, place[1] / height)


def _is_video(media: tuple[Media, ...]) -> bool:
    return bool(media) and media[0].kind == "video"


def _is_number(value: Any) -> bool:
    """Any float, as NaN is told of later; no integer that is too large for one."""
    return type(value) is float or (type(value) is int and abs(value) < 2**63)
