"""Where a place counts as a hit: a mask, or a circle; in an image or at moments of a video. And how places pair up.

Coordinates are fractions of the picture; masks are COCO's run lengths {"size": [height, width], "counts": text}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

#: Seconds by which a time in an answer, written in tenths, may miss a frame's.
SAME_TIME_S = 0.051


class Spot(NamedTuple):
    """Where an object is in one image, or at one moment."""

    at: float
    """Number of the image, from 1; seconds of a video."""
    x: float
    y: float
    radius: float = 0.0
    """As a fraction of the picture's longer side; of a circle."""
    mask: tuple[int, int, str] | None = None
    """(height, width, run lengths), in the place of a circle."""


@dataclass(frozen=True)
class Region:
    """One wanted object. A place hits it if it hits one of its spots."""

    x: float
    y: float
    at: float
    """Where the truth points; spots say how far around it."""
    spots: tuple[Spot, ...]

    def hit(self, at: float, x: float, y: float, size: tuple[int, int]) -> bool:
        """size: (width, height) of the picture."""
        return any(abs(spot.at - at) <= SAME_TIME_S and inside(spot, x, y, size) for spot in self.spots)


def inside(spot: Spot, x: float, y: float, size: tuple[int, int]) -> bool:
    """Whether a place lies in the spot's mask, or within its radius."""
    width, height = size
    if spot.mask is None:
        side = max(width, height)
        return math.hypot((x - spot.x) * width, (y - spot.y) * height) <= spot.radius * side
    mask = unpacked(*spot.mask)
    row, column = (round(place * length) for place, length in zip((y, x), mask.shape, strict=True))
    return bool(mask[min(max(row, 0), mask.shape[0] - 1), min(max(column, 0), mask.shape[1] - 1)])


@lru_cache(maxsize=256)
def unpacked(height: int, width: int, counts: str) -> np.ndarray:
    """(h, w) bool."""
    from pycocotools import mask as coco

    return coco.decode({"size": [height, width], "counts": counts.encode()}).astype(bool)


def packed(value: Any) -> tuple[int, int, str]:
    """A mask of an annotation: run lengths as an object, or rows of truth values. ValueError for anything else."""
    from pycocotools import mask as coco

    if isinstance(value, Mapping) and "counts" in value and len(value.get("size", ())) == 2:
        height, width = map(int, value["size"])
        counts = value["counts"]
        if isinstance(counts, list):  # run lengths as plain numbers
            counts = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
        return height, width, counts.decode() if isinstance(counts, bytes) else str(counts)
    rows = np.asarray(value)
    if rows.ndim != 2 or rows.dtype not in (np.dtype(bool), np.dtype(np.uint8), np.dtype(np.int64)):
        raise ValueError("a mask must be COCO run lengths {size, counts}, or rows of truth values.")
    found = coco.encode(np.asfortranarray(rows.astype(np.uint8)))
    return rows.shape[0], rows.shape[1], found["counts"].decode()


def paired(
    found: Sequence[Sequence[float]], wanted: Sequence[Sequence[float]], hits: np.ndarray | None = None
) -> list[tuple[int, int]]:
    """Pairs (found, wanted) with the least sum of distances, as many as the fewer of both; each place once.

    hits: (found, wanted) bool: pairs that hit come first, as many as there can be.
    """
    if not len(found) or not len(wanted):
        return []
    apart = np.asarray(found, float)[:, None] - np.asarray(wanted, float)[None]
    cost = np.sqrt((apart**2).sum(axis=-1))
    if hits is not None:
        # One hit more outweighs any sum of distances.
        cost = np.where(hits, cost, cost + 1.0 + cost.max() * min(cost.shape))
    rows, columns = linear_sum_assignment(cost)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))
