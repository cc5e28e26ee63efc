"""Rows of a global batch to data-parallel ranks, so that no rank waits long for another."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.geometry import ImageGeometry, VideoLayout
from megatron_vlm.cost import Work, forward
from megatron_vlm.data.tree import TokenizedExample

#: Most exchanges of rows, for each part, after the first dealing.
SWAPS_PER_PART = 4
_ADDED = ("pairs", "loss_tokens", "crops", "windows", "slots")


def attention_pairs(prefix: int, vision: int, branches: Sequence[int]) -> int:
    """Query-key pairs that the mask allows inside one sample: causal, image blocks of the prefix in both directions,
    each branch sees the prefix and itself.

    prefix: its tokens before the branches, `vision` of them in image blocks. branches: tokens of each.
    """
    pairs = prefix * (prefix + 1) // 2 + vision * (vision - 1) // 2
    return pairs + sum(length * prefix + length * (length + 1) // 2 for length in branches)


def sample_work(content: TokenizedExample, geometry: ImageGeometry) -> Work:
    """What one sample asks for, beside the places that it takes."""
    prefix = int(np.count_nonzero(content.branches == PREFIX_BRANCH))
    branches = np.bincount(content.branches[prefix:])
    pairs = attention_pairs(prefix, int(np.count_nonzero(content.is_vision)), branches.tolist())
    windows = sum(layout.placeholders for layout in content.layouts)
    slots = sum(
        layout.placeholders * (geometry.video_pool if isinstance(layout, VideoLayout) else geometry.pool) ** 2
        for layout in content.layouts
    )
    if geometry.queries:
        windows, slots = content.crops, content.crops * geometry.patches
    return Work(0, pairs, int(np.count_nonzero(content.loss_weights)), content.crops, windows, slots)


def row_cost(arch: Architecture, length: int, samples: Sequence[Work]) -> int:
    """Operations of a row's forward pass: those of its `length` places, padding too, and of what its samples ask for.

    samples: Work of each; its `tokens` do not count.
    """
    total = Work(length, *(sum(getattr(one, name) for one in samples) for name in _ADDED))
    flops = forward(arch, total)
    return flops.vision + flops.connector + flops.language


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
    cheapest = [(0, part) for part in range(parts)]  # a heap of the parts with room
    for row in sorted(rows, key=lambda row: (-costs[row], row)):
        load, part = heapq.heappop(cheapest)
        loads[part] = load + costs[row]
        found[part].append(row)
        if len(found[part]) < room:
            heapq.heappush(cheapest, (loads[part], part))
    # Kept beside `found`, not made anew for every exchange: that took most of the time with hundreds of ranks.
    held = np.asarray([[costs[row] for row in part] for part in found], dtype=np.float64)
    for _ in range(SWAPS_PER_PART * parts):
        if not _swap(found, loads, held, costs):
            break
    return [sorted(part) for part in found]


def _swap(found: list[list[int]], loads: list[int], held: np.ndarray, costs: Sequence[int]) -> bool:
    """Exchange a row of the dearest part for one of another, so that the dearer of the two becomes cheapest.

    held: (parts, rows of a part), the costs of the rows in `found`.
    """
    dearest = loads.index(max(loads))
    moved = held[dearest][:, None, None] - held[None]
    after = np.maximum(loads[dearest] - moved, np.asarray(loads, dtype=np.float64)[None, :, None] + moved)
    after[:, dearest] = np.inf
    best = int(after.argmin())
    place, part, other = np.unravel_index(best, after.shape)
    if after.flat[best] >= loads[dearest]:
        return False
    ours, yours = found[dearest][place], found[part][other]
    found[dearest][place], found[part][other] = yours, ours
    held[dearest, place], held[part, other] = costs[yours], costs[ours]
    loads[dearest] += costs[yours] - costs[ours]
    loads[part] += costs[ours] - costs[yours]
    return True
