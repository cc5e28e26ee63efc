"""Random choices, the same on every machine and Python: from `random.random()` alone, whose values Python promises."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Choices keyed by text: `Draw("scenes/train/7")` always chooses alike."""

    def __init__(self, key: str) -> None:
        self._random = random.Random(key)

    def below(self, count: int) -> int:
        """An integer in 0 .. count - 1."""
        return int(self._random.random() * count)

    def between(self, low: float, high: float) -> float:
        """A number in low .. high."""
        return low + (high - low) * self._random.random()

    def chance(self, probability: float) -> bool:
        return self._random.random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[self.below(len(options))]

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, drawn in proportion to the weights."""
        rest = self._random.random() * sum(weights)
        for index, weight in enumerate(weights):
            rest -= weight
            if rest < 0:
                return index
        return len(weights) - 1

    def shuffled(self, options: Sequence[T]) -> list[T]:
        rest = list(options)
        return [rest.pop(self.below(len(rest))) for _ in range(len(rest))]
