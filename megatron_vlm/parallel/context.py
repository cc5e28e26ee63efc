"""Context parallelism: a row in contiguous chunks outside attention; inside, all keys of the row for a rank's queries.

Letters: s tokens in a row, t tokens in this rank's chunk, b rows, h query and k key-value heads, d numbers in a head.
Chunks are those of split.even_counts, so s need not divide by the ranks.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_vlm.parallel.split import even_counts, offsets


def chunk(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's contiguous part of `tensor`, which every rank of `group` holds whole, along `dim` (a view)."""
    counts = even_counts(tensor.shape[dim], group.size())
    return tensor.narrow(dim, offsets(counts)[group.rank()], counts[group.rank()])


class Exchange:
    """What attention moves so that the queries of a rank see the keys of the whole row.

    The context ranks stand in a table: ranks of one line hold neighbouring chunks and deal heads among themselves
    (Ulysses: tokens of all heads become the line's tokens of some heads); ranks of one column then have the same heads
    and gather each other's keys and values. Ulysses alone is one line, gathering alone one column. With `ring`, a
    column gathers nothing here: attention passes keys and values around it (model/ring_attention.py).
    """

    def __init__(self, heads: dist.ProcessGroup, keys: dist.ProcessGroup, *, ring: bool = False):
        """`heads`: the ranks of this rank's line, `keys`: those of its column."""
        self.heads, self.keys, self.ring = heads, keys, ring and keys.size() > 1

    def queries(self, sequence_length: int) -> tuple[int, int]:
        """Which tokens of the row this rank's line holds, [start, end): the queries after `before`."""
        starts = offsets(self.lines(sequence_length))
        return starts[self.keys.rank()], starts[self.keys.rank() + 1]

    def before(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sequence_length: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Before attention.

        In: (t, b, h, d) and twice (t, b, k, d), this rank's chunk, all heads. Out: queries (line's tokens, b, h/line,
        d), keys and values (s, b, k'/line, d), k' as repeat_heads gives it; with `ring` only the line's tokens of them.
        Moves: three all-to-all in a line, two all-gathers in a column; in backward their inverses.
        """
        if self.heads.size() > 1:
            counts = self._chunks(sequence_length)
            key, value = (repeat_heads(x, query.shape[2], self.heads) for x in (key, value))
            query, key, value = (heads_to_ranks(x, counts, self.heads) for x in (query, key, value))
        if self.keys.size() > 1 and not self.ring:
            lines = self.lines(sequence_length)
            key, value = (_gather(x, lines, self.keys) for x in (key, value))
        return query, key, value

    def after(self, out: torch.Tensor, sequence_length: int) -> torch.Tensor:
        """After attention: (line's tokens, b, h/line, d) -> (t, b, h, d). Moves: one all-to-all in a line."""
        if self.heads.size() == 1:
            return out
        return _TokensToRanks.apply(out, self._chunks(sequence_length), self.heads)

    def _all(self, sequence_length: int) -> tuple[int, ...]:
        return even_counts(sequence_length, self.heads.size() * self.keys.size())

    def _chunks(self, sequence_length: int) -> tuple[int, ...]:
        """Tokens of each rank of the line."""
        first = self.keys.rank() * self.heads.size()
        return self._all(sequence_length)[first : first + self.heads.size()]

    def lines(self, sequence_length: int) -> tuple[int, ...]:
        """Tokens of each line."""
        chunks, width = self._all(sequence_length), self.heads.size()
        return tuple(sum(chunks[first : first + width]) for first in range(0, len(chunks), width))


def heads_to_ranks(tensor: torch.Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """(t, b, h, d), this rank's chunk, all heads -> (tokens of all, b, h/ranks, d). counts: tokens of each rank.

    Moves: one all-to-all, and its inverse in backward. Raises ValueError where the ranks do not divide h, or where t is
    not this rank's count.
    """
    ranks = group.size()
    if tensor.shape[0] != counts[group.rank()]:
        raise ValueError(
            f"context rank {group.rank()} of {ranks} holds {tensor.shape[0]} tokens, but its part of {sum(counts)} "
            f"is {counts[group.rank()]}; cut rows with context.chunk."
        )
    if tensor.shape[2] % ranks:
        raise ValueError(
            f"{tensor.shape[2]} attention heads cannot be dealt to {ranks} context ranks. Lower parallel.context, or "
            "set parallel.context_method=auto."
        )
    return _HeadsToRanks.apply(tensor, counts, group)


def repeat_heads(tensor: torch.Tensor, query_heads: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Key or value heads repeated so that they can be dealt to the ranks beside their queries.

    In: (t, b, k, d). Out: (t, b, k', d), k' the least multiple of k that divides by the ranks; head i stands k'/k
    times in a row, so grouped-query attention of `query_heads` over k' heads gives what it gives over k. Gradients of
    copies add up.
    Raises ValueError where `query_heads` (of this tensor-parallel rank) is no multiple of k'.
    """
    heads = tensor.shape[2]
    needed = math.lcm(heads, group.size())
    if query_heads % needed:
        raise ValueError(
            f"{query_heads} query heads and {heads} key-value heads on a tensor-parallel rank cannot be dealt to "
            f"{group.size()} context ranks: {needed} key-value heads would be needed, which do not divide "
            f"{query_heads}. Lower parallel.context, or set parallel.context_method=auto."
        )
    return tensor if needed == heads else tensor.repeat_interleave(needed // heads, dim=2)


def _deal_heads(tensor: torch.Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """(t, b, h, d) -> (s, b, h/cp, d)."""
    t, b, h, d = tensor.shape
    cp, s = group.size(), sum(counts)
    sent = tensor.reshape(t, b, cp, h // cp, d).permute(2, 0, 1, 3, 4).reshape(cp * t, b, h // cp, d)
    received = tensor.new_empty((s, b, h // cp, d))
    # Chunks arrive in the order of the ranks, which is the order of the row.
    dist.all_to_all_single(received, sent.contiguous(), list(counts), [t] * cp, group=group)
    return received


def _deal_tokens(tensor: torch.Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """(s, b, h/cp, d) -> (t, b, h, d)."""
    _, b, h, d = tensor.shape
    cp, t = group.size(), counts[group.rank()]
    received = tensor.new_empty((cp * t, b, h, d))
    dist.all_to_all_single(received, tensor.contiguous(), [t] * cp, list(counts), group=group)
    return received.view(cp, t, b, h, d).permute(1, 2, 0, 3, 4).reshape(t, b, cp * h, d)


def _gather(tensor: torch.Tensor, counts: tuple[int, ...], group: dist.ProcessGroup) -> torch.Tensor:
    """(tokens of this rank, b, h, d) -> (tokens of all, b, h, d), in the order of the ranks; in backward added up."""
    most = max(counts)
    if len(tensor) < most:
        tensor = torch.cat([tensor, tensor.new_zeros(most - len(tensor), *tensor.shape[1:])])
    # "Tensor-parallel output": Megatron's word for a backward that sums over the group.
    gathered = gather_from_sequence_parallel_region(tensor, tensor_parallel_output_grad=True, group=group)
    if min(counts) == most:
        return gathered
    return torch.cat([part[:count] for part, count in zip(gathered.split(most), counts, strict=True)])


class _HeadsToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, counts, group):
        ctx.counts, ctx.group = counts, group
        return _deal_heads(tensor, counts, group)

    @staticmethod
    def backward(ctx, gradient):
        return _deal_tokens(gradient, ctx.counts, ctx.group), None, None


class _TokensToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, counts, group):
        ctx.counts, ctx.group = counts, group
        return _deal_tokens(tensor, counts, group)

    @staticmethod
    def backward(ctx, gradient):
        return _deal_heads(gradient, ctx.counts, ctx.group), None, None
