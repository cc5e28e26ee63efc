"""Attention while keys and values travel around the context ranks: no rank ever holds those of the whole row.

Each rank keeps its queries and works on one rank's keys at a time; the parts of a query's output are put together by
the log-sum-exp of their scores. Backward walks the same way, and the gradients of keys and values travel with them, in
float32, until they are home. Letters: q tokens of this rank, b rows, h query and k key-value heads, d numbers in a
head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_vlm.model import block_kernels
from megatron_vlm.model.plan import Plan
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.ring import Passing, turns
from megatron_vlm.parallel.split import offsets


class Part(NamedTuple):
    """A block of a plan against keys that one rank holds."""

    row: int
    queries: slice
    keys: slice
    """In that rank's chunk."""
    causal: bool
    mask: torch.Tensor | None


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plans: Sequence[Plan],
    counts: Sequence[int],
    group: dist.ProcessGroup,
    scale: float | None = None,
) -> torch.Tensor:
    """Query (q, b, h, d), key and value (q, b, k, d) of this rank's tokens -> (q, b, h, d).

    plans: of these queries, one for each row. counts: tokens of each rank of `group`, in the order of the row.
    Moves: keys and values ranks - 1 times to the next rank; in backward that again, and their gradients ranks times.
    """
    return _RingAttention.apply(query, key, value, plans, counts, group, scale)


def parts(plans: Sequence[Plan], start: int, end: int) -> Iterator[Part]:
    """What the plans' queries have to do with the keys at [start, end) of the rows."""
    for row, plan in enumerate(plans):
        for block in plan.blocks:
            queries = slice(block.start, block.end)
            keys, keys_end = max(block.prefix, start), min(block.prefix + block.before, end)
            if keys < keys_end:
                yield Part(row, queries, slice(keys - start, keys_end - start), False, None)
            keys, keys_end = max(block.keys, start), min(block.keys_end, end)
            if keys >= keys_end:
                continue
            mask = None
            if block.masked and keys_end > block.seen:
                mask = plan.mask(block)
                assert mask is not None
                column = keys - block.keys + block.before
                mask = mask[:, column : column + keys_end - keys]
            # A causal block begins where its example or the rank's chunk does: its keys are all of this rank.
            assert not block.causal or (keys, keys_end) == (block.keys, block.keys_end)
            yield Part(row, queries, slice(keys - start, keys_end - start), block.causal, mask)


def _padded(key: torch.Tensor, value: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Keys and values in one tensor, (2, tokens of the rank with most, b, k, d)."""
    both, missing = torch.stack((key, value)), max(counts) - len(key)
    return torch.nn.functional.pad(both, (0, 0, 0, 0, 0, 0, 0, missing)) if missing else both


def _heads_first(tensor: torch.Tensor, tokens: slice, row: int) -> torch.Tensor:
    """(tokens, b, heads, d) -> (1, heads, tokens, d), a view."""
    return tensor[tokens, row].transpose(0, 1)[None]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, plans, counts, group, scale):
        starts = offsets(counts)
        out = torch.zeros_like(query, dtype=torch.float32)
        # (b, q, h): the order in which the CPU kernel has it.
        sums = torch.full((query.shape[1], *query.shape[0:3:2]), -torch.inf, dtype=torch.float32, device=query.device)
        with cpu.direct():
            for owner, held in turns(_padded(key, value, counts), group):
                for part in parts(plans, starts[owner], starts[owner + 1]):
                    q = _heads_first(query, part.queries, part.row)
                    k, v = (_heads_first(each, part.keys, part.row) for each in held)
                    found, found_sums = block_kernels.forward(q, k, v, part.causal, part.mask, scale)
                    _merge(out[part.queries, part.row], sums[part.row, part.queries], found[0], found_sums[0])
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.plans, ctx.counts, ctx.group, ctx.scale = plans, counts, group, scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, sums = ctx.saved_tensors
        starts, grad_query = offsets(ctx.counts), torch.zeros_like(query, dtype=torch.float32)
        passing: Passing | None = None
        with cpu.direct():
            for owner, held in turns(_padded(key, value, ctx.counts), ctx.group):
                grads = torch.zeros_like(held, dtype=torch.float32)
                for part in parts(ctx.plans, starts[owner], starts[owner + 1]):
                    q, upward, output = (_heads_first(x, part.queries, part.row) for x in (query, gradient, out))
                    k, v = (_heads_first(each, part.keys, part.row) for each in held)
                    of_part = sums[part.row, part.queries].t()[None]
                    dq, *dkv = block_kernels.backward(
                        upward, q, k, v, output, of_part, part.causal, part.mask, ctx.scale
                    )
                    grad_query[part.queries, part.row] += dq[0].transpose(0, 1)
                    for whole, found in zip(grads, dkv, strict=True):
                        whole[part.keys, part.row] += found[0].transpose(0, 1)
                if passing is not None:
                    grads += passing.arrived()
                passing = Passing(grads, ctx.group, tag=1)
            assert passing is not None
            grad_key, grad_value = (each[: len(key)].to(key.dtype) for each in passing.arrived())
        return grad_query.to(query.dtype), grad_key, grad_value, None, None, None, None


def _merge(out: torch.Tensor, sums: torch.Tensor, found: torch.Tensor, found_sums: torch.Tensor) -> None:
    """Put a part's output into `out`, in place.

    out (q, h, d) float32 and sums (q, h): so far; found (h, q, d) and found_sums (h, q): of other keys. A part in which
    a query sees nothing has scores of -1e30 there, and weighs exactly 0.
    """
    found_sums = found_sums.t()
    total = torch.logaddexp(sums, found_sums)
    out.mul_((sums - total).exp_()[..., None])
    out.addcmul_(found.transpose(0, 1).float(), (found_sums - total).exp_()[..., None])
    sums.copy_(total)
