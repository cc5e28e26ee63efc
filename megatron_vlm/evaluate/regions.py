"""Where a place counts as a hit: a mask, or a circle; in an image or at moments of a video. And how places pair up.

Coordinates are fractions of the picture; masks are those of data/masks.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from megatron_vlm.data.masks import unpacked

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
