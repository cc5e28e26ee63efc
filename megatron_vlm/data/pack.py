"""Samples into rows of two budgets, tokens and crops. Every sample gets a place; none is cut or put off.

A fixed number of rows near the lower bound is filled: large samples are spread, small ones fill tight. If they do not
fit, rows are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: More rows by this part of the lower bound at each new try.
SLACK = 0.004


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
    least = lower_bound(tokens, crops, max_tokens, max_crops)
    rows = least
    while (placed := _fill(sizes, budget, rows)) is None:
        rows += max(1, int(least * SLACK))
    found: list[list[int]] = [[] for _ in range(rows)]
    for sample, row in enumerate(placed):
        found[row].append(sample)
    return [row for row in found if row]


def _fill(sizes: np.ndarray, budget: np.ndarray, rows: int) -> list[int] | None:
    """The row of each sample, or None where one finds no place in so many rows."""
    scaled = sizes / budget
    # Largest first, by the larger of its two shares; equal ones in their given order.
    order = np.argsort(-scaled.max(axis=1), kind="stable")
    free = np.ones((rows, 2))
    exact = np.tile(budget, (rows, 1))
    placed = [0] * len(sizes)
    pressure = np.maximum(scaled.sum(axis=0) / rows, 1e-9)
    for sample in order:
        size, share = sizes[sample], scaled[sample]
        fits = ((exact - size) >= 0).all(axis=1)
        if not fits.any():
            return None
        left = (free - share) * pressure
        score = left[:, 0] ** 2 + left[:, 1] ** 2 if share.max() < SMALL else -(free * (share * pressure)).sum(axis=1)
        row = int(np.where(fits, score, np.inf).argmin())
        placed[int(sample)] = row
        free[row] -= share
        exact[row] -= size
    return placed


#: Samples smaller than this part of a row fill tight; larger ones are spread.
SMALL = 0.15
