"""Families of tracking: where the objects of an expression are, frame by frame."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from megatron_vlm.data import points
from megatron_vlm.data.example import Branch, Clip, Point, Points, Tracks, Turn
from megatron_vlm.data.sets.draft import Draft, MaskFile
from megatron_vlm.data.sets.places import inside, pairs
from megatron_vlm.data.sets.row import LeftOut, Row, words

#: What is asked, by the configuration of the published sets.
STYLES = {
    "track": "video_point_track_per_frame",
    "ground": "video_point_track_start_end",
    "single_point_track": "video_single_point_track_per_frame",
}


def tracks(row: Row, *, task: str, clamp: bool = False, masks: str = "", path: str = "") -> Iterator[Draft]:
    """`frame_trajectories` [{time, points: [{id, point: [x, y], occluded}]}] in pixels of a video `width` x `height`.

    Hidden objects are left out. Raises LeftOut for rows whose `fps` is no multiple of `sampling_fps`, and where no
    object is there to be followed from a given place.
    task:   track (every frame), ground (first and last frame), single_point_track (one object from a given place).
    clamp:  move places outside the picture onto its edge, however far they are.
    masks:  for evaluation, form of the name of the file with an object's masks, from the row's columns and `{object}`,
            what the list `object` says at the place that the object's id has in `mask_id`. Of a JSON file that is the
            member; of pictures whose name does not depend on it, the value of the object's pixels.
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
    files: tuple[MaskFile, ...] = ()
    part = ""
    if masks:
        if not objects:
            raise row.bad("frame_trajectories", row.get("frame_trajectories"), "an object that is seen")
        files = tuple(_mask_file(row, masks, id, fps, rate) for id in sorted(objects))
        part = hashlib.sha256(label.encode()).hexdigest()[:8]  # of a video's expressions each has its own files
    branch = Branch(style, (Turn(prompt, answer),))
    yield Draft((branch,), row.media(path), clip=Clip(rate=int(rate)), part=part, masks=files)


def _mask_file(row: Row, form: str, id: float, fps: float, rate: float) -> MaskFile:
    ids, names = [words(one) for one in row.items("mask_id")], [words(one) for one in row.items("object")]
    if words(id) not in ids or (names and len(names) != len(ids)):
        raise row.bad("mask_id", ids, f"the id {words(id)} of a point, and as many names of masks")
    name = names[ids.index(words(id))] if names else ""
    path = Row({**row.values, "object": name}).form(form)
    member = form.endswith(".json")
    value = int(name) if name.isdecimal() and len(name) < 4 and "{object}" not in form and not member else 0
    return MaskFile(path, name if member else "", value, fps, rate)
