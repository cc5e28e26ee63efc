"""Families of tracking: where the objects of an expression are, frame by frame."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.data import points
from megatron_vlm.data.example import Branch, Clip, Point, Points, Tracks, Turn
from megatron_vlm.data.sets.draft import Draft
from megatron_vlm.data.sets.places import inside, pairs
from megatron_vlm.data.sets.row import LeftOut, Row

#: What is asked, by the configuration of the published sets.
STYLES = {
    "track": "video_point_track_per_frame",
    "ground": "video_point_track_start_end",
    "single_point_track": "video_single_point_track_per_frame",
}


def tracks(row: Row, *, task: str, clamp: bool = False, path: str = "") -> Iterator[Draft]:
    """`frame_trajectories` [{time, points: [{id, point: [x, y], occluded}]}] in pixels of a video `width` x `height`.

    Hidden objects are left out. Raises LeftOut for rows whose `fps` is no multiple of `sampling_fps`, and where no
    object is there to be followed from a given place.
    task:   track (every frame), ground (first and last frame), single_point_track (one object from a given place).
    clamp:  move places outside the picture onto its edge, however far they are.
    """
    fps, rate = row.number("fps"), row.number("sampling_fps")
    if rate <= 0 or fps <= 0 or fps % rate or rate != int(rate):
        raise LeftOut(f"{fps:g} frames a second are no multiple of {rate:g}.")
    width, height = row.number("width"), row.number("height")
    if width <= 0 or height <= 0:
        raise row.bad("width", (width, height), "the size of the video")
    objects: dict[float, list[Point]] = {}
    for frame in map(Row, row.items("frame_trajectories")):
        time = frame.number("time")
        for seen in map(Row, frame.items("points")):
            if seen.get("occluded"):
                continue
            ((x, y),) = pairs(Row({"point": [seen.get("point")]}), "point")
            x, y = x / width, y / height
            if clamp:
                x, y = min(max(x, 0.0), 1.0), min(max(y, 0.0), 1.0)
            objects.setdefault(seen.number("id"), []).append(inside(row, Point(time, x, y)))
    label = row.text("expression")
    label = label if row.get("label_cased") else label.lower()
    style, prompt = STYLES[task], label
    if task == "single_point_track":
        if not objects:
            raise LeftOut("no object is seen in it.")
        first = min(places[0] for places in objects.values())
        prompt = points.write(Points(label, (first,)), "video_point", seconds=True)
    answer = Tracks(label, tuple(tuple(places) for _, places in sorted(objects.items())))
    yield Draft((Branch(style, (Turn(prompt, answer),)),), row.media(path), clip=Clip(rate=int(rate)))
