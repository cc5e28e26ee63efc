"""Composed scenes: drawn objects on faded pieces of the photographs, so that points, counts and relations are exact.

A scene is planned first (what, where, how large), as plain data, then painted. Coordinates are pixels of the scene.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from PIL import Image

from megatron_vlm.data.bundled import objects
from megatron_vlm.data.bundled.draw import Draw

#: Side of a scene in pixels.
SIDE = 64
#: Smallest and largest diameter of an object, in pixels; free pixels between two objects.
DIAMETERS = (14, 23)
GAP = 1
#: How often a scene has 1, 2, 3 groups of like objects, and a group 1, 2, 3, 4 members.
GROUPS = (5, 3, 2)
MEMBERS = (8, 3, 2, 1)
MOST_OBJECTS = 6
#: Share of the photograph's own contrast that stays under the objects, and the range of the gray it fades towards.
CONTRAST = 0.3
GRAY = (95, 190)


@dataclass(frozen=True)
class Placed:
    """One object in a scene."""

    color: str
    """Empty for a cut-out of a photograph."""
    kind: str
    x: int
    """A pixel on the object, near its centre of gravity."""
    y: int
    left: int
    top: int
    diameter: int

    @property
    def point(self) -> tuple[float, float]:
        """Middle of that pixel, as fractions of the scene's side."""
        return (self.x + 0.5) / SIDE, (self.y + 0.5) / SIDE

    @property
    def center(self) -> tuple[float, float]:
        return self.left + self.diameter / 2, self.top + self.diameter / 2


@dataclass(frozen=True)
class Scene:
    """What is where."""

    key: str
    photo: str
    topic: str
    objects: tuple[Placed, ...]

    def info(self) -> dict[str, object]:
        """For evaluation: colour, kind, point and radius of every object, as fractions of the side."""
        rows = [[item.color, item.kind, *item.point, item.diameter / 2 / SIDE] for item in self.objects]
        return {"scene": self.key, "objects": rows}


def plan(key: str, photos: Sequence[tuple[str, str]], wanted: str) -> Scene:
    """A scene drawn from its key alone.

    photos: (name, topic) that it may lie on.
    wanted: train (no held-out pair, no held-out kind), held_out (at least one held-out pair) or new_kinds (one kind
            that training never shows, in a colour that no other object has).
    """
    draw = Draw(f"scene/{key}")
    photo, topic = draw.pick(photos)
    placed: list[Placed] = []
    for color, kind in _groups(draw, wanted):
        for _ in range(1 + draw.weighted(MEMBERS)):
            spot = free_spot(draw, placed, DIAMETERS, partial(objects.anchor, kind))
            if spot is not None and len(placed) < MOST_OBJECTS:
                placed.append(Placed(color, kind, *spot))
    return Scene(key, photo, topic, tuple(sorted(placed, key=lambda item: (item.color, item.kind, item.x, item.y))))


def _groups(draw: Draw, wanted: str) -> list[tuple[str, str]]:
    """Different (colour, kind) pairs; the first is the one that `wanted` is about."""
    first: tuple[str, str] | None = None
    if wanted == "held_out":
        first = draw.pick(sorted(objects.HELD_OUT_PAIRS))
    elif wanted == "new_kinds":
        first = (draw.pick(tuple(objects.COLORS)), draw.pick(objects.HELD_OUT_KINDS))
    chosen = [first] if first else []
    for _ in range(1 + draw.weighted(GROUPS) - len(chosen)):
        pair = (draw.pick(tuple(objects.COLORS)), draw.pick(objects.TRAIN_KINDS))
        own_color = wanted == "new_kinds" and first is not None and pair[0] == first[0]
        if pair not in objects.HELD_OUT_PAIRS and pair not in chosen and not own_color:
            chosen.append(pair)
    return chosen or _groups(draw, wanted)


def free_spot(
    draw: Draw, placed: Sequence[Placed], diameters: tuple[int, int], anchor: Callable[[int], tuple[int, int]]
) -> tuple[int, int, int, int, int] | None:
    """x, y, left, top, diameter of a free place; None where 40 tries find none. anchor: diameter -> the point in it."""
    for _ in range(40):
        diameter = diameters[0] + draw.below(diameters[1] - diameters[0] + 1)
        left = 1 + draw.below(SIDE - diameter - 1)
        top = 1 + draw.below(SIDE - diameter - 1)
        apart = (
            left + diameter + GAP <= other.left
            or other.left + other.diameter + GAP <= left
            or top + diameter + GAP <= other.top
            or other.top + other.diameter + GAP <= top
            for other in placed
        )
        if all(apart):
            x, y = anchor(diameter)
            return left + x, top + y, left, top, diameter
    return None


def drawn(item: Placed) -> Image.Image:
    """A drawn object as it is pasted."""
    return objects.picture(item.kind, item.color, item.diameter)


def paint(scene: Scene, scenery: Mapping[str, Image.Image], picture: Callable[[Placed], Image.Image] = drawn) -> bytes:
    """The scene as a PNG. scenery: photo name -> the part of it that scenes may lie on."""
    draw = Draw(f"ground/{scene.key}")
    image = _ground(draw, scenery[scene.photo])
    for item in scene.objects:
        pasted = picture(item)
        image.paste(pasted, (item.left, item.top), pasted)
    return png(image)


def _ground(draw: Draw, photo: Image.Image) -> Image.Image:
    """A square piece of the photograph, brought to SIDE x SIDE and faded towards a gray."""
    longest = min(photo.size)
    side = round(longest * draw.between(0.5, 1.0))
    left = draw.below(photo.width - side + 1)
    top = draw.below(photo.height - side + 1)
    piece = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE), Image.Resampling.BOX)
    gray = round(draw.between(*GRAY))
    # Steps of 4 halve the size of the PNG.
    table = [4 * round((CONTRAST * value + (1 - CONTRAST) * gray) / 4) for value in range(256)]
    return piece.point(table * 3)


def png(image: Image.Image) -> bytes:
    """The image as PNG bytes. Pixels are exact; the bytes may differ between versions of zlib."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=6)
    return stream.getvalue()
