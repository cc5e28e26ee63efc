"""Samples into rows of two budgets, tokens and crops. Every sample gets a place; none is cut or put off.

A fixed number of rows near the lower bound is filled: large samples are spread, small ones fill tight. If they do not
fit, rows are added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Rows beyond the lower bound at the first try, and more at each new one, as a part of the bound.
SLACK = 0.002
#: Samples smaller than this part of a row fill tight; larger ones are spread.
SMALL = 0.2


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
    step = int(least * SLACK)
    rows = least + step
    while (placed := _fill(sizes, budget, rows)) is None:
        rows += max(1, step)
    found: list[list[int]] = [[] for _ in range(rows)]
    for sample, row in enumerate(placed):
        found[row].append(sample)
    return [row for row in found if row]


def _fill(sizes: np.ndarray, budget: np.ndarray, rows: int) -> list[int] | None:
    """The row of each sample, or None where one finds no place in so many rows."""
    shares = sizes / budget
    # How scarce each budget is: where crops run out first, a row's free tokens are worth little.
    worth = shares.sum(axis=0) / rows / budget
    # Largest first, by the larger of its two shares; equal ones in their given order.
    order = np.argsort(-shares.max(axis=1), kind="stable")
    free_tokens = np.full(rows, float(budget[0]))
    free_crops = np.full(rows, float(budget[1]))
    free = free_tokens * worth[0] + free_crops * worth[1]
    placed = [0] * len(sizes)
    for sample in order.tolist():
        tokens, crops = sizes[sample].tolist()
        fits = (free_tokens >= tokens) & (free_crops >= crops)
        if shares[sample].max() < SMALL:
            score = np.where(fits, free, np.inf)
        else:
            # Where there is most of what it needs most.
            wanted = free_tokens * (tokens * worth[0] / budget[0]) + free_crops * (crops * worth[1] / budget[1])
            score = np.where(fits, -wanted, np.inf)
        row = int(score.argmin())
        if not fits[row]:
            return None
        placed[sample] = row
        free_tokens[row] -= tokens
        free_crops[row] -= crops
        free[row] -= tokens * worth[0] + crops * worth[1]
    return placed
