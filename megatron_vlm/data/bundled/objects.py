"""Drawn objects: plane figures and small icons in one colour with a dark outline, on a transparent square.

Each is a list of polygons in a square of -1 .. 1 (y down), drawn at four times its size and reduced.
"""

from __future__ import annotations

import math
from functools import cache

from PIL import Image, ImageDraw, ImageFilter

Polygon = tuple[tuple[float, float], ...]

COLORS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 85, 225),
    "yellow": (245, 215, 50),
    "purple": (140, 60, 175),
    "orange": (245, 140, 35),
    "white": (245, 245, 245),
    "black": (30, 30, 30),
}
#: Drawn larger than needed by this factor, then reduced: smooth edges.
OVERSAMPLING = 4


def _arc(x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, steps: int = 32) -> Polygon:
    angles = [math.radians(start + (stop - start) * i / steps) for i in range(steps + 1)]
    return tuple((x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles)


def _box(left: float, top: float, right: float, bottom: float) -> Polygon:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def _star(corners: int, inner: float) -> Polygon:
    radii = [1.0, inner] * corners
    turn = math.pi / corners
    return tuple((r * math.sin(i * turn), -r * math.cos(i * turn)) for i, r in enumerate(radii))


def _heart() -> Polygon:
    angles = [math.radians(6 * i) for i in range(60)]
    return tuple(
        (
            math.sin(a) ** 3,
            -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) / 16 - 0.05,
        )
        for a in angles
    )


def _moon() -> Polygon:
    return _arc(0, 0, 1, 1, 50, 310) + _arc(0.45, 0, 0.78, 0.78, 287, 73)


def _mug() -> tuple[Polygon, ...]:
    handle = _arc(0.45, 0.05, 0.52, 0.5, -90, 90) + _arc(0.45, 0.05, 0.26, 0.26, 90, -90)
    return handle, _box(-0.85, -0.75, 0.5, 0.85)


def _flower() -> tuple[Polygon, ...]:
    turns = [math.radians(72 * i - 90) for i in range(5)]
    return tuple(_arc(0.58 * math.cos(a), 0.58 * math.sin(a), 0.42, 0.42) for a in turns) + (_arc(0, 0, 0.4, 0.4),)


#: Kind -> its polygons, filled one after the other.
KINDS: dict[str, tuple[Polygon, ...]] = {
    "circle": (_arc(0, 0, 0.92, 0.92),),
    "square": (_box(-0.82, -0.82, 0.82, 0.82),),
    "triangle": (((0, -0.95), (0.98, 0.8), (-0.98, 0.8)),),
    "star": (_star(5, 0.42),),
    "heart": (_heart(),),
    "cross": (
        (
            (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
            (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
        ),
    ),
    "moon": (_moon(),),
    "mug": _mug(),
    "fish": (((0.3, 0.0), (1.0, -0.6), (1.0, 0.6)), _arc(-0.2, 0, 0.8, 0.55)),
    "house": (_box(-0.75, -0.1, 0.75, 0.9), ((0, -0.95), (0.98, -0.08), (-0.98, -0.08))),
    # Never in a training scene:
    "flower": _flower(),
    "boat": (((-0.98, 0.35), (0.98, 0.35), (0.6, 0.9), (-0.6, 0.9)), ((-0.05, -0.95), (0.8, 0.38), (-0.05, 0.38))),
    "arrow": (
        (
            (-0.95, -0.28), (0.1, -0.28), (0.1, -0.75), (0.98, 0.0), (0.1, 0.75), (0.1, 0.28), (-0.95, 0.28),
        ),
    ),
}  # fmt: skip
PLURALS = {"cross": "crosses", "fish": "fish"}
#: Whole kinds that no training scene shows.
HELD_OUT_KINDS = ("flower", "boat", "arrow")
TRAIN_KINDS = tuple(kind for kind in KINDS if kind not in HELD_OUT_KINDS)


def _held_out_pairs() -> frozenset[tuple[str, str]]:
    """One colour in eight of every kind, each colour about as often: (colour, kind) pairs that training never shows."""
    colors = tuple(COLORS)
    return frozenset((colors[(3 * i + 2) % len(colors)], kind) for i, kind in enumerate(TRAIN_KINDS))


HELD_OUT_PAIRS = _held_out_pairs()


def plural(kind: str) -> str:
    return PLURALS.get(kind, kind + "s")


@cache
def picture(kind: str, color: str, diameter: int) -> Image.Image:
    """The object as an RGBA image of diameter x diameter pixels."""
    side = diameter * OVERSAMPLING
    large = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    pen = ImageDraw.Draw(large)
    fill = COLORS[color]
    outline = (110, 110, 110) if color == "black" else tuple(channel * 2 // 5 for channel in fill)
    width = max(2, side // 20)
    for polygon in KINDS[kind]:
        half = side / 2 - width / 2
        corners = [(round(side / 2 + x * half), round(side / 2 + y * half)) for x, y in polygon]
        pen.polygon(corners, fill=(*fill, 255))
        pen.line([*corners, corners[0]], fill=(*outline, 255), width=width, joint="curve")
    return large.resize((diameter, diameter), Image.Resampling.BOX)


@cache
def anchor(kind: str, diameter: int) -> tuple[int, int]:
    """x, y inside the object's square: a pixel on the object, see `mask_anchor`."""
    return mask_anchor(picture(kind, next(iter(COLORS)), diameter).getchannel("A"))


def mask_anchor(alpha: Image.Image) -> tuple[int, int]:
    """The opaque pixel nearest to the centre of gravity, two pixels from the edge where the object is thick enough.

    A crescent's centre of gravity lies in its hollow: pointing there would be wrong.
    """
    opaque = alpha.point([0] * 128 + [255] * 128)
    covered = _pixels(opaque)
    if not covered:
        raise ValueError("an object without one opaque pixel cannot be pointed at.")
    x = sum(place[0] for place in covered) / len(covered)
    y = sum(place[1] for place in covered) / len(covered)
    inside = next(pixels for size in (5, 3, 1) if (pixels := _pixels(opaque.filter(ImageFilter.MinFilter(size)))))
    return min(inside, key=lambda place: ((place[0] - x) ** 2 + (place[1] - y) ** 2, place))


def _pixels(mask: Image.Image) -> list[tuple[int, int]]:
    return [(i % mask.width, i // mask.width) for i, value in enumerate(mask.tobytes()) if value]
