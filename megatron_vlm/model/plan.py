"""How one packed row is cut into attention calls, so that no call covers two examples and no mask is S x S.

A block is a run of queries against a run of keys of the same example. Plans are derived from the row's marks (mask.py)
and kept for the other layers, for backward and for recompute.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch

from megatron_vlm.batch import PAD, PREFIX_BRANCH
from megatron_vlm.model.block_kernels import UNSEEN
from megatron_vlm.model.mask import Mark, Places, places, visible

#: Queries in a block that needs a mask. A mask holds QUERIES x keys numbers.
QUERIES = 256
#: Tokens of branches, at least, that make a block of their own where others follow: so the branches before them, of
#: which they see nothing, are left out. Below it another call costs more than what is left out.
BRANCHES = 48
#: Numbers of masks that a plan keeps per token of its row; masks beyond are made anew at each use.
KEPT_PER_TOKEN = 512
#: Rows whose plans are kept: the layers of a few micro-batches in flight.
ROWS = 16


@dataclass(frozen=True)
class Block:
    """Queries [start, end) of the plan's against keys [keys, keys_end) of the row."""

    start: int
    end: int
    keys: int
    keys_end: int
    causal: bool = False
    """Each query sees the keys up to its own place, and nothing else has to be masked."""
    masked: bool = False
    """A mask is needed."""
    alike: bool = False
    """All queries see the same keys: one row of a mask serves them."""
    seen: int = 0
    """Every query sees the keys [keys, seen)."""
    prefix: int = 0
    """First of `before` keys that come before those, which every query sees; what stands between them nobody sees."""
    before: int = 0
    kept: torch.Tensor | None = None
    """The mask, if it is kept."""

    def of_queries(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block's queries of (1, heads, queries of the plan, d): a view."""
        return tensor.narrow(2, self.start, self.end - self.start)

    def of_keys(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block's keys of (1, heads, tokens of the row, d): a view, or a copy where there is a prefix."""
        own = tensor.narrow(2, self.keys, self.keys_end - self.keys)
        return torch.cat((tensor.narrow(2, self.prefix, self.before), own), 2) if self.before else own

    def add_to_keys(self, tensor: torch.Tensor, part: torch.Tensor) -> None:
        """The inverse of `of_keys`: add `part` to these places of `tensor`."""
        if self.before:
            tensor.narrow(2, self.prefix, self.before).add_(part.narrow(2, 0, self.before))
            part = part.narrow(2, self.before, part.shape[2] - self.before)
        tensor.narrow(2, self.keys, self.keys_end - self.keys).add_(part)


class Plan:
    """The blocks of the queries at [first, last) of one row. Queries outside every block are padding."""

    def __init__(self, row: torch.Tensor, first: int = 0, last: int | None = None):
        """`row`: (5, s) int64, the row's marks; last = None: all from `first` on.

        Raises ValueError where an example is not contiguous.
        """
        self.row = row
        self.queries = (first, row.shape[1] if last is None else last)
        found = places(row)
        self._query, self._key = Places(*(x[:, None] for x in found)), Places(*(x[None] for x in found))
        self._budget = KEPT_PER_TOKEN * row.shape[1]
        self.blocks: list[Block] = []
        for start, end in _runs(row[Mark.EXAMPLE]):
            self._cut(start, end)
        ends = [0, *(block.end for block in self.blocks)]
        # For each block the queries before it, which are padding, then its own.
        self._sizes = [
            size
            for block, end in zip(self.blocks, ends, strict=False)
            for size in (block.start - end, block.end - block.start)
        ]
        self._sizes.append(self.queries[1] - first - ends[-1])

    def mask(self, block: Block) -> torch.Tensor | None:
        """Numbers to add to the scores, float32 (queries, keys), those of the prefix first, one row where all queries
        are alike; None where nothing is masked (or all is causal)."""
        if not block.masked:
            return None
        return self._additive(block) if block.kept is None else block.kept

    def of_queries(self, tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Each block's queries of (1, heads, queries of the plan, d), as Block.of_queries gives them, in one call."""
        return tensor.split_with_sizes(self._sizes, 2)[1::2]

    def _cut(self, start: int, end: int) -> None:
        """Add the blocks of the example at [start, end): of its queries among the plan's."""
        first, last = max(start, self.queries[0]), min(end, self.queries[1])
        if first >= last:
            return
        branch, vision = self.row[Mark.BRANCH, start:end], self.row[Mark.VISION, start:end].bool()
        images = (start + vision.nonzero()[:, 0]).tolist()
        # At most the prefix and one branch, and no image block to look ahead in: plain causal.
        plain = len(images) <= 1 and bool((branch[1:] <= branch[:-1]).all())
        offset = self.queries[0]
        # Kernels know causal only where the first query is the first key.
        if plain and first == start:
            self.blocks.append(Block(start - offset, last - offset, start, last, causal=True))
            return
        last_image = images[-1] + 1 if images else start
        prefix_end = start + int((branch == PREFIX_BRANCH).sum())
        # Not on a GPU: what is copied of the prefix would be kept for backward, block by block.
        apart = self.row.device.type == "cpu" and last_image <= prefix_end
        begins = _branches(branch, start) if apart else []
        at = first
        while at < last:
            stop = min(at + QUERIES, last)
            keys, before = start, 0
            if begins:
                stop = min([stop, *(begin for begin in begins if begin - at >= BRANCHES)])
                own = max(begin for begin in begins if begin <= at)
                if own > prefix_end:
                    keys, before = own, prefix_end - start
            inside = bisect_left(images, stop) - bisect_left(images, at)
            keys_end = max(stop, last_image) if inside else stop
            # The tokens of an image block see each other, what stands before the block, and the same tokens behind.
            alike = stop - at == 1 or (stop <= prefix_end and inside == stop - at)
            seen = max(keys, min(at, prefix_end))
            self._add(Block(at - offset, stop - offset, keys, keys_end, False, False, alike, seen, start, before))
            at = stop

    def _add(self, block: Block) -> None:
        at = block.start + self.queries[0]
        if block.alike and bool(self._sees(at, at + 1, block.keys, block.keys_end).all()):
            self.blocks.append(block)
            return
        block = replace(block, masked=True)
        numbers = (1 if block.alike else block.end - block.start) * (block.before + block.keys_end - block.keys)
        if numbers <= self._budget:
            self._budget -= numbers
            block = replace(block, kept=self._additive(block))
        self.blocks.append(block)

    def _additive(self, block: Block) -> torch.Tensor:
        """The mask of a block. Most keys of a long example stand before a block or behind it: those are not asked one
        by one."""
        at, end = (place + self.queries[0] for place in (block.start, block.end))
        stop = at + 1 if block.alike else end
        first = block.keys - block.before  # the key in the mask's first column, were there no gap
        mask = torch.zeros(stop - at, block.keys_end - first, dtype=torch.float32, device=self.row.device)
        mask[:, block.seen - first : end - first].masked_fill_(~self._sees(at, stop, block.seen, end), UNSEEN)
        if block.keys_end > end:
            # Of what stands behind the block, queries of one branch see the same if both are or are not of an image.
            kinds, kind = torch.unique(
                self.row[[Mark.EXAMPLE, Mark.BRANCH, Mark.VISION], at:stop], dim=1, return_inverse=True
            )
            query = Places(kinds[0, :, None], kinds[1, :, None], kinds[2, :, None].bool(), kinds.new_tensor(end - 1))
            sees = visible(query, Places(*(x[:, end : block.keys_end] for x in self._key)))
            behind = torch.zeros(sees.shape, dtype=mask.dtype, device=mask.device).masked_fill_(~sees, UNSEEN)
            for each, row in enumerate(behind):
                mask[kind == each, end - first :] = row
        return mask

    def _sees(self, at: int, stop: int, keys: int, keys_end: int) -> torch.Tensor:
        query = Places(*(x[at:stop] for x in self._query))
        return visible(query, Places(*(x[:, keys:keys_end] for x in self._key)))


class Plans:
    """Plans of the rows seen last, by row number.

    Found by number, then compared with the marks: rows of an evaluation may carry the numbers of training rows.
    """

    def __init__(self, rows: int = ROWS):
        self._rows = rows
        self._kept: OrderedDict[int, Plan] = OrderedDict()

    def of(self, row: torch.Tensor, first: int, last: int) -> Plan:
        """The plan of the queries at [first, last) of a row from its marks (5, s)."""
        number = int(row[Mark.ROW, 0])
        plan = self._kept.get(number)
        known = plan is not None and plan.queries == (first, last) and plan.row.device == row.device
        if plan is None or not known or not torch.equal(plan.row, row):
            plan = self._kept[number] = Plan(row.clone(), first, last)
        self._kept.move_to_end(number)
        while len(self._kept) > self._rows:
            self._kept.popitem(last=False)
        return plan


def _runs(examples: torch.Tensor) -> list[tuple[int, int]]:
    """Where each example begins and ends; padding left out."""
    values, counts = torch.unique_consecutive(examples, return_counts=True)
    found: list[tuple[int, int]] = []
    seen: set[int] = set()
    at = 0
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if value != PAD:
            if value in seen:
                raise ValueError(
                    f"example {value} of a row stands in two places; the tokens of an example must be one run."
                )
            seen.add(value)
            found.append((at, at + count))
        at += count
    return found


def _branches(branch: torch.Tensor, start: int) -> list[int]:
    """Where the prefix and each branch of an example begin in the row, from its tokens' branch numbers and its first
    token. Empty where a branch stands in two places."""
    numbers, counts = torch.unique_consecutive(branch, return_counts=True)
    values = numbers.tolist()
    if len(set(values)) < len(values) or PREFIX_BRANCH in values[1:]:
        return []
    return (start + counts.cumsum(0) - counts).tolist()
