"""Where rows of weights stand in different formats: pure rearrangements, each with its inverse. No number changes.

A part is a weight that has a meaning of its own (queries, keys, gate, ...): (rows, ...), a bias included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def join(parts: Sequence[torch.Tensor], order: Sequence[int] = ()) -> torch.Tensor:
    """Parts below each other; `order` says which part comes first, second, ... (as given by default)."""
    return torch.cat([parts[index] for index in order] if order else list(parts))


def split(whole: torch.Tensor, rows: Sequence[int], order: Sequence[int] = ()) -> list[torch.Tensor]:
    """The parts of `join`, views of `whole`. rows: of each part."""
    order = order or range(len(rows))
    taken = whole.split([rows[index] for index in order])
    return [taken[list(order).index(index)] for index in range(len(rows))]


def interleave(parts: Sequence[torch.Tensor], groups: int) -> torch.Tensor:
    """Megatron's fused projections: group by group the rows of each part.

    For attention a group is a key-value head with the query heads that share it: [q q q q k v] [q q q q k v] ...
    """
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def separate(whole: torch.Tensor, rows: Sequence[int], groups: int) -> list[torch.Tensor]:
    """The parts of `interleave`. rows: of each part, all groups together."""
    taken = whole.unflatten(0, (groups, -1)).split([size // groups for size in rows], dim=1)
    return [part.flatten(0, 1) for part in taken]


def from_kernel(kernel: torch.Tensor) -> torch.Tensor:
    """A convolution over patches, (width, channel, row, column), as a matrix over patches flattened as
    (row, column, channel): (width, rows x columns x channels)."""
    return kernel.permute(0, 2, 3, 1).flatten(1)


def to_kernel(matrix: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The convolution of `from_kernel`."""
    return matrix.unflatten(1, (patch_size, patch_size, -1)).permute(0, 3, 1, 2).contiguous()
