"""Keys and values in turns around the ranks give what they give in one place; what a rank holds and moves."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.model import block_kernels
from megatron_vlm.parallel.layout import Layout
from tests.model.test_attention import HEADS, KV_HEADS, ROWS, SIZE, Largest, random_qkv, renumbered

#: Of outputs and gradients near 1; measured 1.4e-6 and 0.016. A part that is weighed wrongly gives 0.1 and more.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def compare(layout: Layout, length: int, dtype: torch.dtype) -> dict[str, float]:
    """Largest difference, in output and input gradients, between a ring of ranks and attention in one place."""
    from megatron_vlm.model import attention, ring_attention
    from megatron_vlm.model.plan import Plan
    from megatron_vlm.parallel import context, groups

    groups.initialize(layout, timeout_s=30)
    exchange = context.Exchange(*groups.megatron().hcp, ring=True)
    rows = [renumbered(tokens[:length]) for tokens in ROWS]
    whole = [x[:length].detach().requires_grad_() for x in random_qkv(len(ROWS[0]), len(rows), dtype)]
    upward = torch.randn(length, len(rows), HEADS, SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = attention.attend(*whole, [Plan(row) for row in rows])
    expected.backward(upward)

    own = [context.chunk(x.detach(), 0, groups.context()).clone().requires_grad_() for x in whole]
    query, key, value = exchange.before(*own, length)
    plans = [Plan(row, *exchange.queries(length)) for row in rows]
    out = ring_attention.attend(query, key, value, plans, exchange.lines(length), exchange.keys)
    out = exchange.after(out, length)
    out.backward(context.chunk(upward, 0, groups.context()))
    pairs = {"out": (out, expected)} | {
        name: (part.grad, x.grad) for name, part, x in zip(("query", "key", "value"), own, whole, strict=True)
    }
    return {
        name: (part.float() - context.chunk(x, 0, groups.context()).float()).abs().max().item()
        for name, (part, x) in pairs.items()
        if part.numel()
    }


@pytest.mark.parametrize(
    ("ranks", "ulysses", "length", "dtype"),
    [
        (3, 1, 670, torch.float32),  # uneven chunks, cut inside images and branches
        pytest.param(2, 1, 660, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(4, 2, 670, torch.float32, marks=pytest.mark.slow),  # heads dealt in pairs, the pairs a ring
        pytest.param(4, 1, 3, torch.float32, marks=pytest.mark.slow),  # a rank without a token
    ],
)
def test_a_ring_equals_attention_in_one_place(pool, ranks, ulysses, length, dtype):
    found = pool(ranks).run(compare, Layout(ranks, context=ranks, ulysses=ulysses), length, dtype)
    print(found)
    assert max(error for each in found for error in each.values()) < TOLERANCE[dtype]


@pytest.mark.parametrize("case", ["causal", "mask", "one mask for all", "nothing hidden"])
def test_plain_products_equal_the_fused_kernel(case):
    """What other devices than a CPU run; more queries than it holds scores of at once."""
    generator = torch.Generator().manual_seed(0)
    shape = (300, 300 if case == "causal" else 170)
    query, key, value, upward = (
        torch.randn(1, heads, tokens, SIZE, generator=generator)
        for heads, tokens in ((HEADS, shape[0]), (KV_HEADS, shape[1]), (KV_HEADS, shape[1]), (HEADS, shape[0]))
    )
    mask = None
    if "mask" in case:
        rows = shape[0] if case == "mask" else 1
        mask = torch.where(torch.rand(rows, shape[1], generator=generator) < 0.5, 0.0, -1e30)
    arguments = (case == "causal", mask, 0.3)
    expected = block_kernels.forward(query, key, value, *arguments)
    found = block_kernels.plain(query, key, value, *arguments)
    expected += block_kernels.backward(upward, query, key, value, *expected, *arguments)
    found += block_kernels.plain_backward(upward, query, key, value, *found, *arguments)
    for name, one, other in zip(("out", "sums", "query", "key", "value"), found, expected, strict=True):
        assert one.shape == other.shape and (one - other).abs().max() < 2e-5, name


def moved(layout: Layout, length: int) -> tuple[list[int], list[int], int]:
    """Bytes that a rank sends in forward and in backward, and numbers in the largest tensor."""
    import torch.distributed as dist

    from megatron_vlm.model import ring_attention
    from megatron_vlm.model.plan import Plan
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.split import even_counts
    from tests.model.test_mask import row_of

    groups.initialize(layout, timeout_s=30)
    row = row_of([(0, 0, False)] * length)
    counts = even_counts(length, layout.context)
    first = groups.context().rank() * counts[0]
    query, key, value = (torch.randn(counts[0], 1, 2, 1024, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    sent: list[int] = []
    send = dist.batch_isend_irecv

    def counted(operations: list) -> list:
        sent.append(operations[0].tensor.nbytes)
        return send(operations)

    dist.batch_isend_irecv = counted
    try:
        with Largest() as largest:
            plan = Plan(row, first, first + counts[0])
            out = ring_attention.attend(query, key, value, [plan], counts, groups.context())
            forward = len(sent)
            out.sum().backward()
    finally:
        dist.batch_isend_irecv = send
    return sent[:forward], sent[forward:], largest.numbers


def test_a_rank_passes_on_its_share_and_never_holds_the_keys_of_the_row(pool):
    ranks, length = 3, 768
    pair = 2 * length // ranks * 2 * 1024  # numbers of a rank's keys and values
    for forward, backward, largest in pool(ranks).run(moved, Layout(ranks, context=ranks, ulysses=1), length):
        assert forward == [2 * pair] * (ranks - 1)  # bf16
        # Again, and the gradients in float32, which come home.
        assert sorted(backward) == [2 * pair] * (ranks - 1) + [4 * pair] * ranks
        assert largest == pair
