"""Rows of a global batch to data-parallel ranks, so that no rank waits long for another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlm.config.architecture import Architecture

#: Most exchanges of rows, for each part, after the first dealing.
SWAPS_PER_PART = 4


def row_cost(arch: Architecture, lengths: Sequence[int], loss_tokens: int, crops: int) -> int:
    """Multiply-adds, forward, in which rows of one length differ: attention inside each sample, head, vision tower.

    lengths: tokens of each sample of the row. The other layers work on padding too and cost the same for every row.
    """
    language, vision = arch.language, arch.vision
    attention = sum(length * length for length in lengths) * language.heads * language.head_dim * language.layers
    head = loss_tokens * language.hidden * language.vocab_size
    per_patch = 4 * vision.width**2 + 2 * vision.width * vision.mlp + 2 * vision.patches * vision.width
    return attention + head + crops * vision.patches * per_patch * vision.layers


def deal(costs: Sequence[int], ranks: int, micro_batches: int) -> list[list[list[int]]]:
    """Rows by rank and micro-batch: [rank][micro-batch] -> row indices, ascending. Every rank gets as many rows.

    The dearest row goes first, to the cheapest rank that has room; then the dearest rank swaps rows with others while
    that helps. Inside a rank likewise for its micro-batches.
    Raises ValueError where the rows cannot be divided evenly.
    """
    if len(costs) % (ranks * micro_batches):
        raise ValueError(
            f"a global batch of {len(costs)} rows cannot be dealt to {ranks} data-parallel ranks x {micro_batches} "
            "micro-batches. Change train.global_batch or train.micro_batch."
        )
    by_rank = _spread(range(len(costs)), costs, ranks)
    return [_spread(rows, costs, micro_batches) for rows in by_rank]


def _spread(rows: Sequence[int], costs: Sequence[int], parts: int) -> list[list[int]]:
    room = len(rows) // parts
    loads = [0] * parts
    found: list[list[int]] = [[] for _ in range(parts)]
    for row in sorted(rows, key=lambda row: (-costs[row], row)):
        part = min((part for part in range(parts) if len(found[part]) < room), key=lambda part: (loads[part], part))
        loads[part] += costs[row]
        found[part].append(row)
    for _ in range(SWAPS_PER_PART * parts):
        if not _swap(found, loads, costs):
            break
    return [sorted(part) for part in found]


def _swap(found: list[list[int]], loads: list[int], costs: Sequence[int]) -> bool:
    """Exchange a row of the dearest part for one of another, so that the dearer of the two becomes cheapest."""
    dearest = max(range(len(loads)), key=lambda part: (loads[part], -part))
    mine = np.asarray([costs[row] for row in found[dearest]], dtype=np.float64)
    theirs = np.asarray([[costs[row] for row in part] for part in found], dtype=np.float64)
    moved = mine[:, None, None] - theirs[None]
    after = np.maximum(loads[dearest] - moved, np.asarray(loads, dtype=np.float64)[None, :, None] + moved)
    after[:, dearest] = np.inf
    best = int(after.argmin())
    place, part, other = np.unravel_index(best, after.shape)
    if after.flat[best] >= loads[dearest]:
        return False
    ours, yours = found[dearest][place], found[part][other]
    found[dearest][place], found[part][other] = yours, ours
    loads[dearest] += costs[yours] - costs[ours]
    loads[part] += costs[ours] - costs[yours]
    return True
