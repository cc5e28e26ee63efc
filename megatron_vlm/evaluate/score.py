"""Scores: shares with their uncertainty, places matched to places. Numbers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Quantile of the normal distribution for a two-sided interval of 95 %.
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """`hits` of `total`, with Wilson's interval of 95 %."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """NaN of nothing."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        if not self.total:
            return math.nan, math.nan
        n, p, square = self.total, self.value, Z_95**2
        middle = (p + square / (2 * n)) / (1 + square / n)
        half = Z_95 * math.sqrt(p * (1 - p) / n + square / (4 * n * n)) / (1 + square / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def as_dict(self) -> dict[str, float | int]:
        """For a report."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high, "hits": self.hits, "total": self.total}


Place = tuple[float, float]


def matched(found: Sequence[Place], wanted: Sequence[Place], radii: Sequence[float]) -> int:
    """Most pairs of a found and a wanted place, each used once, no further apart than the wanted one's radius.

    Coordinates and radii share a unit. Augmenting paths: the maximum, whatever the order.
    """
    near = [
        [i for i, place in enumerate(found) if math.dist(place, target) <= radius]
        for target, radius in zip(wanted, radii, strict=True)
    ]
    taken_by: dict[int, int] = {}

    def place_target(target: int, tried: set[int]) -> bool:
        for candidate in near[target]:
            if candidate in tried:
                continue
            tried.add(candidate)
            if candidate not in taken_by or place_target(taken_by[candidate], tried):
                taken_by[candidate] = target
                return True
        return False

    return sum(place_target(target, set()) for target in range(len(wanted)))


@dataclass(frozen=True)
class Pointing:
    """Places matched, given and wanted, over many answers."""

    hits: int
    found: int
    wanted: int

    @property
    def precision(self) -> float:
        """Share of the given places that hit. 0 of nothing."""
        return self.hits / self.found if self.found else 0.0

    @property
    def recall(self) -> float:
        """Share of the wanted places that were hit. 0 of nothing."""
        return self.hits / self.wanted if self.wanted else 0.0

    @property
    def f1(self) -> float:
        """Harmonic mean of both."""
        return 2 * self.hits / (self.found + self.wanted) if self.found + self.wanted else 0.0

    def as_dict(self) -> dict[str, float | int]:
        """For a report."""
        return {
            "value": self.f1,
            "precision": self.precision,
            "recall": self.recall,
            "hits": self.hits,
            "found": self.found,
            "wanted": self.wanted,
        }


def same_answer(said: str, wanted: str) -> bool:
    """Equal but for case, outer blanks and a last full stop."""
    return said.strip().rstrip(".").strip().lower() == wanted.strip().rstrip(".").strip().lower()
