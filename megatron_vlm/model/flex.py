"""FlexAttention under the mask rule: one call for all rows of a micro-batch, with the blocks that nobody sees left out.

The mask that the kernel asks for inside a block is mask.visible itself. Compiled on CUDA; on a CPU torch has a forward
only, which the tests compare with the rule. Letters: b rows, s tokens in a row, q queries (all of the row or a part of
it), h query heads, k key-value heads, d numbers in a head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from megatron_vlm.model.mask import Mark, Places, visible

#: Side of a block of the mask.
BLOCK = 128
#: Queries whose part of the mask is in memory at once while the blocks are counted: QUERIES x s booleans.
QUERIES = 1024


class FlexRows:
    """What the queries at [first, last) of a micro-batch's rows see."""

    def __init__(self, marks: torch.Tensor, first: int, last: int):
        """`marks`: (5, b, s) int64."""
        self.mask = block_mask(marks, first, last)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Query (q, b, h, d), key and value (s, b, k, d) -> (q, b, h, d); padding gives zeros."""
        heads_first = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = query.shape[2] != key.shape[2]
        out = _kernel(query.device.type)(*heads_first, block_mask=self.mask, scale=scale, enable_gqa=grouped)
        return out.permute(2, 0, 1, 3)


def block_mask(marks: torch.Tensor, first: int, last: int) -> Any:
    """FlexAttention's BlockMask of the queries at [first, last), from marks (5, b, s).

    torch's own create_block_mask asks for every pair of the row at once: at 36,864 tokens that takes several S x S
    tensors.
    """
    from torch.nn.attention.flex_attention import BlockMask

    rows = marks[[Mark.EXAMPLE, Mark.BRANCH, Mark.VISION]].to(torch.int32)  # what the kernel reads
    index = torch.arange(marks.shape[2], dtype=torch.int32, device=marks.device).expand(rows[0].shape)
    keys = Places(rows[0], rows[1], rows[2].bool(), index.contiguous())
    query = Places(*(x[:, first:last].contiguous() for x in keys))

    def sees(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return visible(Places(*(x[b, q] for x in query)), Places(*(x[b, k] for x in keys)))

    some, whole = _blocks(query, keys)
    return BlockMask.from_kv_blocks(
        *_in_order(some & ~whole),
        *_in_order(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=sees,
        seq_lengths=(last - first, marks.shape[2]),
    )


def _blocks(query: Places, keys: Places) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether any, and whether every query of a block sees a key of a block: (b, 1, blocks of q, blocks of s) bool."""
    counts = []
    missing_keys = -keys.example.shape[1] % BLOCK
    for start in range(0, query.example.shape[1], QUERIES):
        part = Places(*(x[:, start : start + QUERIES, None] for x in query))
        sees = visible(part, Places(*(x[:, None] for x in keys)))
        sees = torch.nn.functional.pad(sees, (0, missing_keys, 0, -sees.shape[1] % BLOCK))
        counts.append(sees.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK)).sum((2, 4), dtype=torch.int32))
    number = torch.cat(counts, 1)[:, None]
    return number > 0, number == BLOCK * BLOCK


def _in_order(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many blocks each line has, and which: those first, in order."""
    order = torch.argsort(blocks.to(torch.int32), dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


@cache
def _kernel(device: str) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    if device == "cpu":
        return flex_attention
    # fullgraph: uncompiled, it would make a tensor of all scores; then rather an error.
    return torch.compile(flex_attention, fullgraph=True)
