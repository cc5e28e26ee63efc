"""Layouts: written out by hand once, and every one undone by its inverse."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.convert import layout


def rows(*numbers):
    """A part whose rows are the given numbers, three times side by side."""
    return torch.tensor(numbers)[:, None].expand(-1, 3).contiguous()


def test_megatron_puts_the_heads_of_a_group_together():
    # 4 query heads of 2 rows in 2 groups, one key and one value head each.
    query, key, value = rows(*range(8)), rows(*range(10, 14)), rows(*range(20, 24))
    fused = layout.interleave([query, key, value], groups=2)
    assert fused[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 20, 21, 4, 5, 6, 7, 12, 13, 22, 23]


def test_joined_parts_stand_in_the_order_given():
    gate, up = rows(0, 1), rows(2, 3)
    assert layout.join([gate, up])[:, 0].tolist() == [0, 1, 2, 3]
    assert layout.join([gate, up], (1, 0))[:, 0].tolist() == [2, 3, 0, 1]


def test_a_kernel_becomes_rows_by_row_column_channel():
    kernel = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    matrix = layout.from_kernel(kernel)
    assert matrix.shape == (2, 12)
    assert matrix[0].tolist() == [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.permutations([0, 1, 2]))
def test_every_layout_has_an_inverse(groups, size, queries, width, order):
    shape = (width,) if width else ()
    parts = [torch.randn(groups * size * count, *shape) for count in (queries, 1, 1)]
    counts = [len(part) for part in parts]
    for found in (
        layout.separate(layout.interleave(parts, groups), counts, groups),
        layout.split(layout.join(parts, order), counts, order),
        layout.split(layout.join(parts), counts),
    ):
        assert all(torch.equal(one, other) for one, other in zip(found, parts, strict=True))
    kernel = torch.randn(queries, 3, size, size)
    assert torch.equal(layout.to_kernel(layout.from_kernel(kernel), size), kernel)
