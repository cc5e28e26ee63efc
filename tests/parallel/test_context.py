"""The Ulysses exchange: attention over ranks equals attention in one place, with gradients, for any row length."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.parallel.layout import Layout

#: float32; measured 4.8e-7 at most. Heads in the wrong order give differences near 1.
TOLERANCE = 1e-5


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal grouped-query attention over (s, b, h, d)."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).permute(2, 0, 1, 3)


def compare(layout: Layout, s: int, heads: int, kv_heads: int) -> float:
    """Largest difference, over output and input gradients, between the exchange and attention in one place."""
    from megatron_vlm.parallel import context, groups

    groups.initialize(layout, timeout_s=30)
    group = groups.context()
    torch.manual_seed(1)
    whole = [torch.randn(s, 2, h, 8, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    weight = torch.randn(s, 2, heads, 8)
    expected = attend(*whole)
    (expected * weight).sum().backward()

    parts = [context.chunk(x.detach(), 0, group).clone().requires_grad_() for x in whole]
    query = parts[0]
    key, value = (context.repeat_heads(x, heads, group) for x in parts[1:])
    dealt = [context.heads_to_ranks(x, s, group) for x in (query, key, value)]
    assert dealt[0].shape == (s, 2, heads // group.size(), 8)
    output = context.tokens_to_ranks(attend(*dealt), group)
    (output * context.chunk(weight, 0, group)).sum().backward()

    pairs = [(output, context.chunk(expected, 0, group))]
    pairs += [(part.grad, context.chunk(x.grad, 0, group)) for part, x in zip(parts, whole, strict=True)]
    return max((a - b).abs().max().item() if a.numel() else 0.0 for a, b in pairs)


@pytest.mark.parametrize(
    ("context", "s", "heads", "kv_heads"),
    [(2, 16, 4, 2), (2, 13, 4, 1), (4, 18, 8, 2), (4, 3, 4, 4), (4, 10, 12, 6), (1, 5, 4, 2)],
)
def test_equals_attention_in_one_place(pool, context, s, heads, kv_heads):
    world = max(context, 2)
    layout = Layout(world, context=context)
    assert max(pool(world).run(compare, layout, s, heads, kv_heads)) < TOLERANCE


def exchange_bfloat16(layout: Layout) -> bool:
    from megatron_vlm.parallel import context, groups

    groups.initialize(layout, timeout_s=30)
    group = groups.context()
    whole = torch.arange(math.prod((6, 1, 4, 2))).reshape(6, 1, 4, 2).bfloat16()
    part = context.chunk(whole, 0, group)
    dealt = context.heads_to_ranks(part, 6, group)
    rank = group.rank()
    return bool(
        torch.equal(dealt, whole[:, :, rank * 2 : rank * 2 + 2])
        and torch.equal(context.tokens_to_ranks(dealt, group), part)
    )


def test_moves_bfloat16_bit_for_bit(pool):
    assert pool(2).run(exchange_bfloat16, Layout(2, context=2)) == [True, True]


def refusals(layout: Layout) -> list[str]:
    from megatron_vlm.parallel import context, groups

    groups.initialize(layout, timeout_s=30)
    group = groups.context()
    messages = []
    for call in (
        lambda: context.heads_to_ranks(torch.zeros(4, 1, 3, 2), 8, group),
        lambda: context.heads_to_ranks(torch.zeros(3, 1, 4, 2), 8, group),
        lambda: context.repeat_heads(torch.zeros(4, 1, 3, 2), 9, group),
    ):
        try:
            call()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_refusals_hold_the_numbers(pool):
    heads, tokens, keys = pool(2).run(refusals, Layout(2, context=2))[1]
    assert "3 attention heads cannot be dealt to 2 context ranks" in heads
    assert "context rank 1 of 2 holds 3 tokens, but its part of a row of 8 is 4" in tokens
    assert "9 query heads and 3 key-value heads" in keys and "6 key-value heads would be needed" in keys
