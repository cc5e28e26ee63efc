"""The packing that the Molmo2 reference describes, for comparison: a two-dimensional 0/1 knapsack over a buffer.

48 samples wait in a buffer. The subset of most value (tokens + 30 a crop) that fits a row becomes a row, and the buffer
is filled up again. Tokens are counted in 512 steps of a row, rounded up; crops exactly. At the end of the stream the
buffer is emptied the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BUFFER = 48
CROP_VALUE = 30
STEPS = 512


def pack(tokens: Sequence[int], crops: Sequence[int], max_tokens: int, max_crops: int) -> list[list[int]]:
    """Rows as lists of sample indices, in the order in which they leave the buffer."""
    step = max(1, max_tokens // STEPS)
    capacity = -(-max_tokens // step)
    buffer: list[int] = []
    rows = []
    for sample in range(len(tokens)):
        if len(buffer) == BUFFER:
            rows.append(_best(buffer, tokens, crops, step, capacity, max_crops))
            buffer = [one for one in buffer if one not in rows[-1]]
        buffer.append(sample)
    while buffer:
        rows.append(_best(buffer, tokens, crops, step, capacity, max_crops))
        buffer = [one for one in buffer if one not in rows[-1]]
    return rows


def _best(
    buffer: list[int], tokens: Sequence[int], crops: Sequence[int], step: int, capacity: int, max_crops: int
) -> list[int]:
    """The subset of most value. best[t, c]: of the samples so far, in t steps of tokens and c crops."""
    best = np.zeros((capacity + 1, max_crops + 1), dtype=np.int64)
    taken = np.zeros((len(buffer), capacity + 1, max_crops + 1), dtype=bool)
    sizes = [(-(-tokens[one] // step), crops[one]) for one in buffer]
    for place, (one, (wide, high)) in enumerate(zip(buffer, sizes, strict=True)):
        value = tokens[one] + CROP_VALUE * crops[one]
        with_it = best[: capacity + 1 - wide, : max_crops + 1 - high] + value
        better = with_it > best[wide:, high:]
        taken[place, wide:, high:] = better
        best[wide:, high:] = np.where(better, with_it, best[wide:, high:])
    chosen, t, c = [], capacity, max_crops
    for place in range(len(buffer) - 1, -1, -1):
        if taken[place, t, c]:
            chosen.append(buffer[place])
            t, c = t - sizes[place][0], c - sizes[place][1]
    return chosen
