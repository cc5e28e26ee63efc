"""Context parallelism by Ulysses: a row in contiguous chunks outside attention, all of the row for some heads inside.

Letters: s tokens in a row, t tokens in this rank's chunk, b rows, h heads, d numbers in a head, cp ranks in the group.
Chunks are those of split.even_counts, so s need not divide by cp. A group of one rank changes and moves nothing.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from megatron_vlm.parallel.split import even_counts, offsets


def chunk(tensor: torch.Tensor, dim: int, group: dist.ProcessGroup) -> torch.Tensor:
    """This rank's contiguous part of `tensor`, which every rank of `group` holds whole, along `dim` (a view)."""
    counts = even_counts(tensor.shape[dim], group.size())
    return tensor.narrow(dim, offsets(counts)[group.rank()], counts[group.rank()])


def heads_to_ranks(tensor: torch.Tensor, sequence_length: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Before attention.

    In: (t, b, h, d), this rank's chunk, all heads. Out: (s, b, h/cp, d), the row, this rank's heads.
    Moves: one all-to-all, and its inverse in backward. Raises ValueError where cp does not divide h, or where t is not
    the chunk that a row of `sequence_length` tokens gives this rank.
    """
    cp = group.size()
    if cp == 1:
        return tensor
    counts = even_counts(sequence_length, cp)
    if tensor.shape[0] != counts[group.rank()]:
        raise ValueError(
            f"context rank {group.rank()} of {cp} holds {tensor.shape[0]} tokens, but its part of a row of "
            f"{sequence_length} is {counts[group.rank()]}; cut rows with context.chunk."
        )
    if tensor.shape[2] % cp:
        raise ValueError(
            f"{tensor.shape[2]} attention heads cannot be dealt to {cp} context ranks; parallel.context must divide "
            "the heads that a tensor-parallel rank holds (repeat key and value heads with context.repeat_heads)."
        )
    return _HeadsToRanks.apply(tensor, counts, group)


def tokens_to_ranks(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """After attention.

    In: (s, b, h/cp, d), the row, this rank's heads. Out: (t, b, h, d), this rank's chunk, all heads.
    Moves: one all-to-all, and its inverse in backward.
    """
    if group.size() == 1:
        return tensor
    return _TokensToRanks.apply(tensor, even_counts(tensor.shape[0], group.size()), group)


def repeat_heads(tensor: torch.Tensor, query_heads: int, group: dist.ProcessGroup) -> torch.Tensor:
    """Key or value heads repeated so that they can be dealt to the ranks beside their queries.

    In: (t, b, k, d). Out: (t, b, k', d), k' the least multiple of k that divides by cp; head i stands k'/k times in a
    row, so grouped-query attention of `query_heads` over k' heads gives what it gives over k. Gradients of copies add
    up.
    Raises ValueError where `query_heads` (of this tensor-parallel rank) is no multiple of k'.
    """
    heads = tensor.shape[2]
    needed = math.lcm(heads, group.size())
    if query_heads % needed:
        raise ValueError(
            f"{query_heads} query heads and {heads} key-value heads on a tensor-parallel rank cannot be dealt to "
            f"{group.size()} context ranks: {needed} key-value heads would be needed, which do not divide "
            f"{query_heads}. Lower parallel.context."
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
