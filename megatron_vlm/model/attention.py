"""Attention over packed rows: Megatron's `core_attention` slot with the mask rule of mask.py and context parallelism.

The work is done by one of three kernels (attention_kernels.py): `blocks`, here, example by example through the blocks
of plan.py; flex.py; flash.py. None has an S x S tensor. Letters: s tokens in a row, t tokens in this context rank's
chunk, b rows, h query heads and k key-value heads of this tensor-parallel rank, d numbers in a head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vlm.model import block_kernels, flash, replicated, ring_attention
from megatron_vlm.model.attention_kernels import AttentionKernels
from megatron_vlm.model.flex import FlexRows
from megatron_vlm.model.plan import ROWS, Plan, Plans
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.context import Exchange


class Rows(Protocol):
    """What some queries of a micro-batch's rows see, as a kernel wants to know it."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Query (q, b, h, d), key and value (s, b, k, d) -> (q, b, h, d); padding gives zeros."""


class BlockRows:
    """The same for `blocks`."""

    def __init__(self, plans: list[Plan]):
        self.plans = plans

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """See `attend`."""
        return attend(query, key, value, self.plans, scale)


class Kept:
    """What was made of the marks of the micro-batches in flight, for the other layers, for backward and for recompute.

    Found by where the marks lie: to read them would stop the host at every layer until the GPU has caught up. They are
    kept with it, so no other tensor can lie there.
    """

    def __init__(self, rows: int = ROWS):
        self._most = rows
        self._kept: OrderedDict[tuple, tuple[torch.Tensor, Any]] = OrderedDict()

    def of(self, marks: torch.Tensor, key: tuple, make: Callable[[], Any]) -> Any:
        """What `make` gave for these marks, (5, b, s), and this key; made now if need be."""
        place = (marks.data_ptr(), marks.shape, *key)
        if place not in self._kept:
            self._kept[place] = (marks, make())
        self._kept.move_to_end(place)
        while len(self._kept) > 1 and sum(each.shape[1] for each, _ in self._kept.values()) > self._most:
            self._kept.popitem(last=False)
        return self._kept[place][1]


#: All layers see the same rows.
_kept, _plans = Kept(), Plans()


class PackedAttention(nn.Module):
    """Softmax attention under the mask rule; the marks of the whole row come in the place of `attention_mask`."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        kernels: AttentionKernels | None = None,
        **unused: Any,
    ):
        super().__init__()
        assert pg_collection is not None, "the spec builds attention with process groups"
        self.scale = softmax_scale
        self.kernels = kernels or AttentionKernels()
        # "p2p": Megatron's word for keys and values in turns.
        self.exchange = Exchange(*pg_collection.hcp, ring=config.cp_comm_type == "p2p")

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor,
        **unused: Any,
    ) -> torch.Tensor:
        """Query (t, b, h, d), key and value (t, b, k, d), marks (5, b, s) -> (t, b, h x d); padding gives zeros.

        In and out: each context rank holds its chunk of the row. Moves: what parallel.context.Exchange does.
        """
        tokens = attention_mask.shape[2]
        query, key, value = self.exchange.before(query, key, value, tokens)
        queries = self.exchange.queries(tokens)
        rows = _kept.of(attention_mask, (queries, self.kernels), lambda: self._rows(attention_mask, *queries))
        if self.exchange.ring:
            counts = self.exchange.lines(tokens)
            out = ring_attention.attend(query, key, value, rows.plans, counts, self.exchange.keys, self.scale)
        elif len(query):
            out = rows.attend(query, key, value, self.scale)
        else:  # fewer tokens than ranks
            out = replicated.anchor(query, key, value)
        return self.exchange.after(out, tokens).flatten(2)

    def _rows(self, marks: torch.Tensor, first: int, last: int) -> Rows:
        """What the queries at [first, last) see; `flash` where all rows are plain."""
        if self.kernels.images == "blocks":
            return BlockRows([_plans.of(marks[:, row], first, last) for row in range(marks.shape[1])])
        if self.kernels.plain == "flash" and flash.plain(marks):
            return flash.FlashRows(marks, first, last)
        return FlexRows(marks, first, last)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plans: list[Plan], scale: float | None = None
) -> torch.Tensor:
    """Query (q, b, h, d), key and value (s, b, k, d), a plan for each of the b rows -> (q, b, h, d).

    q: the plans' queries, all of the row or a part of it.

    `scale` multiplies the scores; None = 1 / sqrt(d).
    """
    if query.device.type == "cpu":
        return _BlockAttention.apply(query, key, value, plans, scale)
    return _block_by_block(query, key, value, plans, scale)


def _block_by_block(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plans: list[Plan], scale: float | None
) -> torch.Tensor:
    """The same blocks through torch's own attention, which picks a kernel for the device."""
    # Tied to all three: a rank with nothing but padding takes part in the collectives of backward.
    out = replicated.anchor(torch.zeros_like(query), query, key, value)
    for row, (plan, q, k, v) in enumerate(zip(plans, *map(_rows, (query, key, value)), strict=True)):
        places = out[:, row].transpose(0, 1)[None]  # not of _rows: autograd lets nobody write into one of several views
        for block in plan.blocks:
            mask = plan.mask(block)
            part = nn.functional.scaled_dot_product_attention(
                block.of_queries(q),
                block.of_keys(k),
                block.of_keys(v),
                attn_mask=None if mask is None else mask.to(q.dtype),
                is_causal=block.causal,
                scale=scale,
                enable_gqa=True,
            )
            block.of_queries(places).copy_(part)
    return out


class _BlockAttention(torch.autograd.Function):
    """torch's flash attention for CPUs, block by block, with the gradients of keys and values summed in place.

    As one function because autograd would allocate a gradient of the whole row for every block.
    """

    @staticmethod
    def forward(ctx, query, key, value, plans, scale):
        out = torch.zeros_like(query)
        logsumexps = []
        with cpu.direct():
            for plan, q_row, k, v, place_row in zip(plans, *map(_rows, (query, key, value, out)), strict=True):
                of_queries = map(plan.of_queries, (q_row, place_row))
                for block, q, place in zip(plan.blocks, *of_queries, strict=True):
                    part, logsumexp = block_kernels.forward(
                        q, block.of_keys(k), block.of_keys(v), block.causal, plan.mask(block), scale
                    )
                    place.copy_(part)
                    logsumexps.append(logsumexp)
        ctx.save_for_backward(query, key, value, out, *logsumexps)
        ctx.plans, ctx.scale = plans, scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, *logsumexps = ctx.saved_tensors
        # Several blocks may add to a key's gradient: in float32, so that bf16 does not round in between.
        shared = any(block.causal is False for plan in ctx.plans for block in plan.blocks)
        sums = torch.float32 if shared else key.dtype
        grad_query, grad_key, grad_value = (
            torch.zeros_like(query), *(torch.zeros_like(x, dtype=sums) for x in (key, value))
        )  # fmt: skip
        sums_of_blocks = iter(logsumexps)
        with cpu.direct():
            tensors = (key, value, grad_key, grad_value, gradient, query, out, grad_query)
            for plan, k, v, into_k, into_v, *of_row in zip(ctx.plans, *map(_rows, tensors), strict=True):
                of_queries = map(plan.of_queries, of_row)
                for block, upward, q, o, into_q in zip(plan.blocks, *of_queries, strict=True):
                    dq, dk, dv = block_kernels.backward(
                        upward,
                        q,
                        block.of_keys(k),
                        block.of_keys(v),
                        o,
                        next(sums_of_blocks),
                        block.causal,
                        plan.mask(block),
                        ctx.scale,
                    )
                    into_q.copy_(dq)
                    block.add_to_keys(into_k, dk)
                    block.add_to_keys(into_v, dv)
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _rows(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(tokens, b, heads, d) -> (1, heads, tokens, d) of each row, views."""
    return tensor.permute(1, 2, 0, 3).split(1)
