"""Samples into rows of two budgets, tokens and crops. Every sample gets a place; none is cut or put off.

A fixed number of rows near the lower bound is filled: large samples are spread, small ones fill tight. What finds no
room takes the place of something smaller, and two rows exchange samples so that the room left in both becomes the room
of one. If samples are still left over, there must be more rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Rows beyond the lower bound at the first try, and more at each new one, as parts of the bound.
SLACK, STEP = 0.002, 0.001
#: Samples smaller than this part of a row fill tight; larger ones are spread.
SMALL = 0.2
#: Most samples left over after the first filling, as a part of all: with more of them, exchanges are hopeless.
LEFT_OVER = 0.02
#: Rows that lack least room for a sample, tried with an exchange.
ROWS_OFFERED = 128


def lower_bound(tokens: Sequence[int], crops: Sequence[int], max_tokens: int, max_crops: int) -> int:
    """Rows that any packing needs at least."""
    return max(-(-sum(tokens) // max_tokens), -(-sum(crops) // max_crops), 1 if len(tokens) else 0)


def pack(tokens: Sequence[int], crops: Sequence[int], max_tokens: int, max_crops: int) -> list[list[int]]:
    """Rows as lists of sample indices, ascending in each row; depends on nothing but the arguments.

    Raises ValueError for a sample that is larger than a row.
    """
    sizes = np.stack([np.asarray(tokens, dtype=np.int64), np.asarray(crops, dtype=np.int64)], axis=1).reshape(-1, 2)
    budget = np.asarray([max_tokens, max_crops], dtype=np.int64)
    too_large = np.flatnonzero((sizes > budget).any(axis=1))
    if len(too_large):
        first = int(too_large[0])
        raise ValueError(
            f"sample {first} of the window has {sizes[first, 0]} tokens and {sizes[first, 1]} crops; a row holds "
            f"{max_tokens} and {max_crops}."
        )
    if not len(sizes):
        return []
    placed = _fewest(sizes, budget, lower_bound(tokens, crops, max_tokens, max_crops))
    found: list[list[int]] = [[] for _ in range(int(placed.max()) + 1)]
    for sample, row in enumerate(placed.tolist()):
        found[row].append(sample)
    return [row for row in found if row]


def _fewest(sizes: np.ndarray, budget: np.ndarray, least: int) -> np.ndarray:
    """Row of each sample, in the fewest rows that do: more and more are added, then the last step is halved back."""
    first, step = least + int(least * SLACK), max(1, int(least * STEP))

    def attempt(number: int) -> np.ndarray | None:
        filling = _Filling(sizes, budget, first + number * step)
        return filling.placed if filling.complete() else None

    failed, number = -1, 0
    while (placed := attempt(number)) is None:
        failed, number = number, max(1, 2 * number)
    while number - failed > 1:
        middle = (failed + number) // 2
        if (fewer := attempt(middle)) is None:
            failed = middle
        else:
            number, placed = middle, fewer
    return placed


class _Filling:
    """A try with so many rows. n samples."""

    def __init__(self, sizes: np.ndarray, budget: np.ndarray, rows: int) -> None:
        self.tokens, self.crops = sizes[:, 0], sizes[:, 1]
        self._shares = sizes / budget
        # How scarce each budget is: where crops run out first, a row's free tokens are worth little.
        self._worth = self._shares.sum(axis=0) / rows / budget
        self._value = sizes @ self._worth
        self.free_tokens = np.full(rows, budget[0])
        self.free_crops = np.full(rows, budget[1])
        self.placed = np.full(len(sizes), -1)
        """Row of each sample; -1 = left over."""

    def complete(self) -> bool:
        """Every sample has its place."""
        left = self._fill()
        if len(left) > 1 + LEFT_OVER * len(self.placed):
            return False
        while left:
            sample = max(left, key=lambda one: (self._value[one], -one))
            left.remove(sample)
            if self._gather(sample):
                continue
            evicted = self._instead_of(sample)
            if evicted is None:
                return False
            left.append(evicted)
        return True

    def _fill(self) -> list[int]:
        """Largest first, by the larger of a sample's two shares. Returns those without a place."""
        free_tokens, free_crops = self.free_tokens.astype(float), self.free_crops.astype(float)
        free = free_tokens * self._worth[0] + free_crops * self._worth[1]
        largest = self._shares.max(axis=1)
        wants = self._shares * self._worth
        left = []
        for sample in np.argsort(-largest, kind="stable").tolist():
            tokens, crops = int(self.tokens[sample]), int(self.crops[sample])
            fits = (free_tokens >= tokens) & (free_crops >= crops)
            if largest[sample] < SMALL:
                score = np.where(fits, free, np.inf)
            else:
                # Where there is most of what it needs most.
                score = np.where(fits, -(free_tokens * wants[sample, 0] + free_crops * wants[sample, 1]), np.inf)
            row = int(score.argmin())
            if not fits[row]:
                left.append(sample)
                continue
            self.placed[sample] = row
            free_tokens[row] -= tokens
            free_crops[row] -= crops
            free[row] -= self._value[sample]
        self.free_tokens, self.free_crops = free_tokens.astype(np.int64), free_crops.astype(np.int64)
        return left

    def _put(self, sample: int, row: int) -> None:
        if self.placed[sample] >= 0:
            self.free_tokens[self.placed[sample]] += self.tokens[sample]
            self.free_crops[self.placed[sample]] += self.crops[sample]
        self.placed[sample] = row
        if row >= 0:
            self.free_tokens[row] -= self.tokens[sample]
            self.free_crops[row] -= self.crops[sample]

    def _instead_of(self, sample: int) -> int | None:
        """Put the sample in the place of the least valuable one whose row has room for it then."""
        fits = (self.placed >= 0) & (self._value < self._value[sample])
        fits &= self.free_tokens[self.placed] + self.tokens >= self.tokens[sample]
        fits &= self.free_crops[self.placed] + self.crops >= self.crops[sample]
        score = np.where(fits, self._value, np.inf)
        evicted = int(score.argmin())
        if not fits[evicted]:
            return None
        row = int(self.placed[evicted])
        self._put(evicted, -1)
        self._put(sample, row)
        return evicted

    def _gather(self, sample: int) -> bool:
        """Put the sample where there is room, if need be after an exchange of two samples between two rows."""
        tokens, crops = int(self.tokens[sample]), int(self.crops[sample])
        fits = (self.free_tokens >= tokens) & (self.free_crops >= crops)
        free = self.free_tokens * self._worth[0] + self.free_crops * self._worth[1]
        if fits.any():
            self._put(sample, int(np.where(fits, free, np.inf).argmin()))
            return True
        lack = np.maximum(tokens - self.free_tokens, 0) * self._worth[0]
        lack += np.maximum(crops - self.free_crops, 0) * self._worth[1]
        for row in np.argsort(lack, kind="stable")[:ROWS_OFFERED].tolist():
            if self._exchange(row, tokens - int(self.free_tokens[row]), crops - int(self.free_crops[row])):
                self._put(sample, row)
                return True
        return False

    def _exchange(self, row: int, tokens: int, crops: int) -> bool:
        """Give a sample of `row` for a smaller one of another row, so that it gains so many tokens and crops."""
        mine = np.flatnonzero(self.placed == row)
        gained_tokens = self.tokens[mine, None] - self.tokens[None]
        gained_crops = self.crops[mine, None] - self.crops[None]
        fits = (gained_tokens >= tokens) & (gained_crops >= crops) & (self.placed != row) & (self.placed >= 0)
        fits &= (self.free_tokens[self.placed] >= gained_tokens) & (self.free_crops[self.placed] >= gained_crops)
        if not fits.any():
            return False
        # The least that will do: what the other row keeps may serve later.
        gained = gained_tokens * self._worth[0] + gained_crops * self._worth[1]
        place, other = np.unravel_index(int(np.where(fits, gained, np.inf).argmin()), fits.shape)
        theirs = int(self.placed[other])
        self._put(int(other), row)
        self._put(int(mine[place]), theirs)
        return True
