"""Cut a total into contiguous parts of nearly equal size. Integers only."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def even_counts(total: int, parts: int) -> tuple[int, ...]:
    """Sizes of `parts` contiguous parts of `total` things; they differ by at most one, larger ones first.

    Raises ValueError for a negative total or fewer than one part.
    """
    if total < 0 or parts < 1:
        raise ValueError(f"{total} things cannot be cut into {parts} parts; needed: total >= 0 and parts >= 1.")
    size, larger = divmod(total, parts)
    return (size + 1,) * larger + (size,) * (parts - larger)


def offsets(counts: Sequence[int]) -> tuple[int, ...]:
    """Where each part begins, and where the last one ends: one number more than there are parts."""
    return (0, *accumulate(counts))
