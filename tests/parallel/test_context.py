"""Context parallelism: attention over ranks equals attention in one place, with gradients; how much it moves."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_vlm.parallel.layout import Layout

#: float32; measured 4.8e-7 at most. Heads in the wrong order give differences near 1.
TOLERANCE = 1e-5


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, first: int = 0) -> torch.Tensor:
    """Causal grouped-query attention over (s, b, h, d); the queries' places begin at `first`."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    before = torch.arange(k.shape[2]) <= torch.arange(q.shape[2])[:, None] + first
    return F.scaled_dot_product_attention(q, k, v, attn_mask=before, enable_gqa=True).permute(2, 0, 1, 3)


def compare(layout: Layout, s: int, heads: int, kv_heads: int) -> float:
    """Largest difference, over output and input gradients, between the exchange and attention in one place."""
    from megatron_vlm.parallel import context, groups

    groups.initialize(layout, timeout_s=30)
    group = groups.context()
    exchange = context.Exchange(*groups.megatron().hcp)
    torch.manual_seed(1)
    whole = [torch.randn(s, 2, h, 8, requires_grad=True) for h in (heads, kv_heads, kv_heads)]
    weight = torch.randn(s, 2, heads, 8)
    expected = attend(*whole)
    (expected * weight).sum().backward()

    parts = [context.chunk(x.detach(), 0, group).clone().requires_grad_() for x in whole]
    query, key, value = exchange.before(*parts, s)
    first, last = exchange.queries(s)
    assert query.shape == (last - first, 2, heads // layout.head_ranks, 8)
    assert key.shape == (s, 2, math.lcm(kv_heads, layout.head_ranks) // layout.head_ranks, 8)
    output = exchange.after(attend(query, key, value, first), s)
    (output * context.chunk(weight, 0, group)).sum().backward()

    pairs = [(output, context.chunk(expected, 0, group))]
    pairs += [(part.grad, context.chunk(x.grad, 0, group)) for part, x in zip(parts, whole, strict=True)]
    return max((a - b).abs().max().item() if a.numel() else 0.0 for a, b in pairs)


@pytest.mark.parametrize(
    ("context", "ulysses", "s", "heads", "kv_heads"),
    [
        *((2, 2, 16, 4, 2), (2, 2, 13, 4, 1), (4, 4, 18, 8, 2), (4, 4, 3, 4, 4), (4, 4, 10, 12, 6), (1, 1, 5, 4, 2)),
        # Keys gathered by all, and by two ranks of each pair that deals heads; also where some ranks hold nothing.
        *((2, 1, 13, 3, 1), (4, 1, 3, 4, 2), (4, 1, 16, 4, 2), (4, 2, 18, 2, 1), (4, 2, 7, 6, 3), (4, 2, 2, 2, 2)),
    ],
)
def test_equals_attention_in_one_place(pool, context, ulysses, s, heads, kv_heads):
    world = max(context, 2)
    layout = Layout(world, context=context, ulysses=ulysses)
    assert max(pool(world).run(compare, layout, s, heads, kv_heads)) < TOLERANCE


def exchange_bfloat16(layout: Layout) -> bool:
    from megatron_vlm.parallel import context, groups

    groups.initialize(layout, timeout_s=30)
    group = groups.context()
    exchange = context.Exchange(*groups.megatron().hcp)
    whole = torch.arange(math.prod((6, 1, 4, 2))).reshape(6, 1, 4, 2).bfloat16()
    part = context.chunk(whole, 0, group)
    dealt = exchange.before(part, part, part, 6)
    rank = group.rank()
    return bool(
        all(torch.equal(each, whole[:, :, rank * 2 : rank * 2 + 2]) for each in dealt)
        and torch.equal(exchange.after(dealt[0], 6), part)
    )


def test_moves_bfloat16_bit_for_bit(pool):
    assert pool(2).run(exchange_bfloat16, Layout(2, context=2)) == [True, True]


def moved(layout: Layout, s: int, heads: int, kv_heads: int, size: int) -> dict[str, list[tuple[str, int, int]]]:
    """Of forward and backward: each collective, the numbers that this rank sends to others, and gets from them."""
    import torch.distributed as dist
    from megatron.core.tensor_parallel import mappings

    from megatron_vlm.parallel import context, groups

    groups.initialize(layout, timeout_s=30)
    exchange = context.Exchange(*groups.megatron().hcp)
    direction, calls = "forward", {"forward": [], "backward": []}

    def all_to_all(received, sent, received_counts, sent_counts, group):
        """Counts are of the first dimension; what a rank keeps for itself does not travel."""
        rank = group.rank()
        numbers = [
            (len(x) - counts[rank]) * x[:1].numel() for x, counts in ((sent, sent_counts), (received, received_counts))
        ]
        calls[direction].append(("all_to_all", *numbers))
        return real[0](received, sent, received_counts, sent_counts, group=group)

    def gather(received, sent, group):
        calls[direction].append(("all_gather", sent.numel(), received.numel() - sent.numel()))
        return real[1](received, sent, group=group)

    def scatter(received, sent, group):
        calls[direction].append(("reduce_scatter", sent.numel() - received.numel(), received.numel()))
        return real[2](received, sent, group=group)

    places = [(dist, "all_to_all_single"), (mappings, "dist_all_gather_func"), (mappings, "dist_reduce_scatter_func")]
    real = [getattr(*place) for place in places]
    try:
        for place, counted in zip(places, (all_to_all, gather, scatter), strict=True):
            setattr(*place, counted)
        parts = [
            context.chunk(torch.randn(s, 1, h, size), 0, groups.context()).clone().requires_grad_()
            for h in (heads, kv_heads, kv_heads)
        ]
        query, key, value = exchange.before(*parts, s)
        out = exchange.after(attend(query, key, value, exchange.queries(s)[0]), s)
        direction = "backward"
        out.sum().backward()
    finally:
        for place, function in zip(places, real, strict=True):
            setattr(*place, function)
    return calls


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 4), (8, 8), (8, 2), (4, 1)])
def test_ulysses_moves_no_more_than_the_row_shared_out(pool, heads, kv_heads):
    """At most 2 x (query width + key-value width) x tokens / ranks, in each direction of each layer."""
    cp, s, size = 4, 64, 8
    dealt_kv_heads = math.lcm(kv_heads, cp)  # heads are repeated where there are fewer than ranks
    for calls in pool(cp).run(moved, Layout(cp, context=cp), s, heads, kv_heads, size):
        for direction, made in calls.items():
            assert [kind for kind, *_ in made] == ["all_to_all"] * 4, direction
            sent, got = (sum(call[i] for call in made) for i in (1, 2))
            limit = 2 * (heads + dealt_kv_heads) * size * s // cp
            # Queries and outputs, keys and values; of each the part that a rank keeps stays.
            assert sent == got == limit * (cp - 1) // cp
            if dealt_kv_heads == kv_heads:
                assert sent <= 2 * (heads + kv_heads) * size * s / cp
            print(f"{heads}/{kv_heads} heads, {direction}: {sent} numbers; without repeating keys and values "
                  f"{2 * (heads + kv_heads) * size * s // cp * (cp - 1) // cp}")  # fmt: skip


def test_gathering_moves_keys_and_values_of_the_row_and_no_query(pool):
    cp, s, heads, kv_heads, size = 4, 64, 8, 2, 8
    tokens = kv_heads * size * s
    for calls in pool(cp).run(moved, Layout(cp, context=cp, ulysses=1), s, heads, kv_heads, size):
        assert calls["forward"] == [("all_gather", tokens // cp, tokens * (cp - 1) // cp)] * 2
        assert calls["backward"] == [("reduce_scatter", tokens * (cp - 1) // cp, tokens // cp)] * 2


def refusals(layout: Layout) -> list[str]:
    from megatron_vlm.parallel import context, groups

    groups.initialize(layout, timeout_s=30)
    group = groups.context()
    messages = []
    for call in (
        lambda: context.heads_to_ranks(torch.zeros(4, 1, 3, 2), (4, 4), group),
        lambda: context.heads_to_ranks(torch.zeros(3, 1, 4, 2), (4, 4), group),
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
    assert "context rank 1 of 2 holds 3 tokens, but its part of 8 is 4" in tokens
    assert "9 query heads and 3 key-value heads" in keys and "6 key-value heads would be needed" in keys
