"""Which rows of a window make up which global batch: rows that cost about as much, drawn from all data sets.

Ranks wait for the dearest row of a step, so a step's rows should cost alike. Sorted by cost they do, but then some
steps are all films and others have none. So: sort, cut into batches, and exchange rows between batches until each has
the mixture's shares again, as near as chance alone would bring it, at the least loss of evenness.
Depends on costs and data sets alone, never on ranks: which rank takes which row of a batch is balance.py's matter.
Data sets are counted twice: each that a batch holds enough samples of, and by groups. d of them are counted together.
a, b two batches with A and B rows.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import numpy as np

#: A data set with fewer expected samples in a batch is counted together with the others of its group.
LEAST_EXPECTED = 5
#: Normal deviate of the largest chi-square value: a tenth of batches drawn by chance lie further from the mixture.
DEVIATE = 1.28
#: Most by which a batch's number of samples may differ from the mean, as a part of it.
SAMPLES = 0.5
#: Price of chi-square beyond the bound, in units of dearest / mean row. Low first: costs decide the large moves.
PRICES = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.1)
#: Price of a number of samples beyond SAMPLES, in chi-square.
SAMPLES_PRICE = 100.0
#: Most passes over all pairs of batches at one price, and exchanges between two batches in one pass.
PASSES, EXCHANGES = 20, 50
#: Exchanges that gain less are not worth their time.
LEAST_GAIN = 1e-6


def parts(rows: int, step: int, before: int, rows_of: Callable[[int], int]) -> list[int]:
    """How many of a window's rows each step takes, from `step` on, which has `before` rows of earlier windows.

    rows_of: rows of a step.
    """
    sizes: list[int] = []
    while rows:
        sizes.append(min(rows, rows_of(step) - before))
        rows, step, before = rows - sizes[-1], step + 1, 0
    return sizes


def arrange(
    costs: Sequence[int],
    samples: np.ndarray,
    rates: Sequence[float],
    groups: Sequence[int],
    sizes: Sequence[int],
    span: int,
    rng: random.Random,
) -> list[int]:
    """The window's rows in the order in which steps take them; those of one step ascending.

    costs: of each row, above 0. samples: (rows, sets), samples of each data set in each row. rates, groups: of each
    set, its share of samples and its group's number. sizes: rows of each step's part of the window, in order. The first
    and the last part may belong to steps that other windows complete. span: rows are exchanged among so many steps, or
    about so many.
    """
    assert sum(sizes) == len(costs)
    order: list[int] = []
    for some in np.array_split(np.arange(len(sizes)), max(1, round(len(sizes) / span))):
        mine = [sizes[one] for one in some]
        rows = np.arange(len(order), len(order) + sum(mine))
        marks = _marks(samples[rows], np.asarray(rates), np.asarray(groups), max(mine))
        if len(mine) > 1 and marks:
            open_ended = [place for place, one in enumerate(some) if one in (0, len(sizes) - 1)]
            parts = _Parts(np.asarray(costs, dtype=float)[rows], samples[rows].sum(axis=1), marks, mine)
            parts.cut(_levels(len(mine), open_ended, rng))
            parts.exchange()
            rows = np.concatenate([np.sort(rows[part]) for part in parts.rows])
        order += rows.tolist()
    return order


def _levels(parts: int, middle: Sequence[int], rng: random.Random) -> list[int]:
    """Parts from the dearest to the cheapest: by chance, but for those that another window's rows must match."""
    others = [part for part in range(parts) if part not in middle]
    rng.shuffle(others)
    half = len(others) // 2
    return [*others[:half], *middle, *others[half:]]


def _marks(samples: np.ndarray, rates: np.ndarray, groups: np.ndarray, size: int) -> list[np.ndarray]:
    """Arrays (rows, d): samples / root of the share, so that q = |sum of marks|^2 gives chi-square = q / n - n for n
    samples.

    Empty where there are several data sets and a batch of `size` rows holds too few samples to tell them apart.
    """
    expected = size * samples.sum() / len(samples)
    enough = rates * expected >= LEAST_EXPECTED
    found = []
    for names in (np.where(enough, np.arange(len(rates)) + groups.max() + 1, groups), groups):
        shares = np.bincount(names, rates)
        few = shares * expected < LEAST_EXPECTED
        names = np.where(few[names], shares.argmax(), names)
        kept = np.unique(names)
        if len(kept) > 1 or (rates > 0).sum() == 1:
            counts = np.stack([samples[:, names == name].sum(axis=1) for name in kept], axis=1)
            found.append(counts / np.sqrt(np.bincount(names, rates)[kept]))
    return found


class _Parts:
    """The batches of a span while rows are exchanged. costs, counts (of samples): (rows,); marks: each (rows, d)."""

    def __init__(self, costs: np.ndarray, counts: np.ndarray, marks: list[np.ndarray], sizes: Sequence[int]) -> None:
        self._costs, self._counts, self._sizes = costs, counts, sizes
        self._marks = [(each, (each**2).sum(axis=1), _bound(each.shape[1] - 1)) for each in marks]
        self._samples_a_row = counts.mean()

    def cut(self, levels: Sequence[int]) -> None:
        """Rows by cost, the dearest to the first of `levels`."""
        ends = np.cumsum([self._sizes[part] for part in levels])
        by_level = np.split(np.argsort(-self._costs, kind="stable"), ends[:-1])
        self.rows = [rows for _, rows in sorted(zip(levels, by_level, strict=True), key=lambda pair: pair[0])]
        self._sums = [[marks[rows].sum(axis=0) for marks, *_ in self._marks] for rows in self.rows]
        self._held = [self._counts[rows].sum() for rows in self.rows]

    def exchange(self) -> None:
        """Exchange rows two by two while that helps, first where composition costs little, then where it costs much."""
        pairs = list(itertools.combinations(range(len(self.rows)), 2))
        for price in PRICES:
            waiting = set(pairs)
            for _ in range(PASSES):
                for pair in pairs:
                    if pair in waiting and self._between(*pair, price):
                        waiting |= {other for other in pairs if set(other) & set(pair)}
                    waiting.discard(pair)
                if not waiting:
                    break

    def _between(self, a: int, b: int, price: float) -> bool:
        """Exchange rows between two batches, the best first. Whether there was one."""
        for number in range(EXCHANGES):
            after = self._after(a, b, price)
            best = int(after.argmin())
            if after.flat[best] > self._now(a, price) + self._now(b, price) - LEAST_GAIN:
                return number > 0
            mine, theirs = divmod(best, len(self.rows[b]))
            self._swap(a, b, mine, theirs)
        return True

    def _swap(self, a: int, b: int, mine: int, theirs: int) -> None:
        one, other = self.rows[a][mine], self.rows[b][theirs]
        self.rows[a][mine], self.rows[b][theirs] = other, one
        for part, sign in ((a, 1), (b, -1)):
            for sums, (marks, *_) in zip(self._sums[part], self._marks, strict=True):
                sums += sign * (marks[other] - marks[one])
            self._held[part] += sign * (self._counts[other] - self._counts[one])

    def _now(self, part: int, price: float) -> float:
        costs = self._costs[self.rows[part]]
        far = self._far(part, [sums @ sums for sums in self._sums[part]], self._held[part])
        return float(costs.max() / costs.mean() / len(self.rows) + price * far)

    def _after(self, a: int, b: int, price: float) -> np.ndarray:
        """(A, B): what both batches are worth, were these two rows exchanged. Less is better."""
        mine, theirs = self.rows[a], self.rows[b]
        total = np.zeros((len(mine), len(theirs)))
        dearer = self._costs[theirs][None] - self._costs[mine][:, None]
        more = self._counts[theirs][None] - self._counts[mine][:, None]
        apart = [
            squares[mine][:, None] + squares[theirs][None] - 2 * marks[mine] @ marks[theirs].T
            for marks, squares, _ in self._marks
        ]
        for part, sign, stay, comes in (
            (a, 1, _others(self._costs[mine])[:, None], self._costs[theirs][None]),
            (b, -1, _others(self._costs[theirs])[None], self._costs[mine][:, None]),
        ):
            squares = [
                sums @ sums + between + 2 * sign * ((marks[theirs] @ sums)[None] - (marks[mine] @ sums)[:, None])
                for sums, between, (marks, *_) in zip(self._sums[part], apart, self._marks, strict=True)
            ]
            cost = self._costs[self.rows[part]].sum() + sign * dearer
            total += self._sizes[part] * np.maximum(stay, comes) / cost / len(self.rows)
            total += price * self._far(part, squares, self._held[part] + sign * more)
        return total

    def _far(self, part: int, squares: Sequence[np.ndarray], held: np.ndarray) -> np.ndarray:
        """How much too far a batch is from the mixture: chi-square beyond the bounds."""
        usual = self._sizes[part] * self._samples_a_row
        far = SAMPLES_PRICE * np.maximum(0, abs(held / usual - 1) - SAMPLES)
        for square, (*_, bound) in zip(squares, self._marks, strict=True):
            far = far + np.maximum(0, square / held - held - bound)
        return far


def _bound(freedom: int) -> float:
    """The chi-square value at DEVIATE, by Wilson and Hilferty's approximation."""
    spread = 2 / (9 * freedom) if freedom else 0.0
    return freedom * (1 - spread + DEVIATE * math.sqrt(spread)) ** 3


def _others(costs: np.ndarray) -> np.ndarray:
    """For each row the dearest of the others; 0 where there is none."""
    second, first = np.partition(np.append(costs, 0.0), -2)[-2:]
    return np.where(costs == first, second, first)
