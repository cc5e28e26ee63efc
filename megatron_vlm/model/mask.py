"""The mask rule: which token may attend to which. Stated once; every attention kernel is tested against `visible`.

Also the marks: the few integers per token that the rule (and dropout) needs, in one tensor that travels through
Megatron's blocks in the place of `attention_mask`. Letters: b rows, s tokens in a row.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch

from megatron_vlm.batch import PAD, Batch


class Mark(IntEnum):
    """First index of the marks."""

    EXAMPLE = 0
    """Example inside the row, or PAD."""
    BRANCH = 1
    """PREFIX_BRANCH, or the branch inside the example, or PAD."""
    VISION = 2
    """1 where the token belongs to the image block of its example."""
    ROW = 3
    """Global number of the row, the same for all its tokens."""
    RESPONSE = 4
    """1 where the token carries a loss."""


class Places(NamedTuple):
    """What the rule asks of a set of tokens: tensors of one shape, or of shapes that broadcast."""

    example: torch.Tensor
    branch: torch.Tensor
    vision: torch.Tensor
    index: torch.Tensor


def marks(batch: Batch) -> torch.Tensor:
    """The marks of a micro-batch: (5, b, s) int64, see Mark."""
    return torch.stack(
        [
            batch.examples.long(),
            batch.branches.long(),
            batch.is_vision.long(),
            batch.rows[:, None].expand_as(batch.tokens),
            (batch.loss_weights != 0).long(),
        ]
    )


def places(row: torch.Tensor) -> Places:
    """The places of one row's tokens, each (s,), from its marks (5, s)."""
    return Places(
        row[Mark.EXAMPLE], row[Mark.BRANCH], row[Mark.VISION].bool(), torch.arange(row.shape[1], device=row.device)
    )


def visible(query: Places, key: Places) -> torch.Tensor:
    """Whether each query token sees each key token; the arguments broadcast against each other. bool.

    A token sees its own example only: what stands before it, and, if both belong to the image block, what stands
    behind it as well. A branch sees itself and the prefix (whose branch number is larger than any branch's), never
    another branch; the prefix sees only itself. Nothing sees padding.
    """
    before = key.index <= query.index
    image_block = query.vision & key.vision
    same_example = (query.example == key.example) & (key.example != PAD)
    return same_example & (before | image_block) & (query.branch <= key.branch)
