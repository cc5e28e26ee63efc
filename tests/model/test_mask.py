"""The mask rule, and that the blocks of a plan are exactly the rule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.batch import PAD, PREFIX_BRANCH
from megatron_vlm.model import plan as plans
from megatron_vlm.model.mask import Mark, Places, marks, places, visible
from tests.model import tiny


def row_of(tokens: list[tuple[int, int, bool]], number: int = 0) -> torch.Tensor:
    """Marks (5, s) from (example, branch, is vision) of each token."""
    columns = torch.tensor([(e, b, int(v), number, 0) for e, b, v in tokens], dtype=torch.int64)
    return columns.t().contiguous()


def dense(row: torch.Tensor) -> torch.Tensor:
    """The rule written out for every pair: (s, s) bool."""
    examples, branches, vision = (row[mark].tolist() for mark in (Mark.EXAMPLE, Mark.BRANCH, Mark.VISION))
    s = row.shape[1]
    sees = torch.zeros(s, s, dtype=torch.bool)
    for q in range(s):
        for k in range(s):
            if PAD in (examples[q], examples[k]) or examples[q] != examples[k]:
                continue
            in_order = k <= q or (vision[q] and vision[k])
            sees[q, k] = bool(in_order and branches[q] <= branches[k])
    return sees


def from_rule(row: torch.Tensor) -> torch.Tensor:
    found = places(row)
    return visible(Places(*(x[:, None] for x in found)), Places(*(x[None] for x in found)))


def from_plan(row: torch.Tensor, first: int = 0, last: int | None = None) -> torch.Tensor:
    """What the blocks of queries [first, last) let through: (last - first, s) bool."""
    plan = plans.Plan(row, first, last)
    sees = torch.zeros(plan.queries[1] - first, row.shape[1], dtype=torch.bool)
    for block in plan.blocks:
        keys = [*range(block.prefix, block.prefix + block.before), *range(block.keys, block.keys_end)]
        shape = (block.end - block.start, len(keys))
        mask = plan.mask(block)
        part = torch.ones(shape, dtype=torch.bool) if mask is None else mask == 0
        if block.causal:
            assert mask is None and shape[0] == shape[1]
            part = part.tril()
        sees[block.start : block.end, keys] |= part
    return sees


def test_worked_example_of_molmo2():
    """Two examples in a row: example 0 has a prefix and two branches, example 1 only a prefix."""
    p, b0, b1, other = 0, 2, 3, 4
    row = row_of([(0, PREFIX_BRANCH, False)] * 2 + [(0, 0, False), (0, 1, False)] + [(1, PREFIX_BRANCH, False)] * 2)
    sees = from_rule(row)
    assert sees[b1, b1] and not sees[b1, b0] and sees[b1, p]
    assert not sees[other, p]
    assert not sees[p, b0]
    assert not sees[b0, other]


def test_image_tokens_see_ahead_inside_their_example_only():
    image, text = (0, PREFIX_BRANCH, True), (0, PREFIX_BRANCH, False)
    row = row_of([text, image, text, image, (1, PREFIX_BRANCH, True), (PAD, PAD, False), (PAD, PAD, True)])
    sees = from_rule(row)
    assert sees[1, 3] and sees[3, 1]
    assert not sees[1, 2] and not sees[0, 1] and not sees[2, 3]
    assert not sees[1, 4] and not sees[4, 1]
    assert not sees[5:].any() and not sees[:, 5:].any()


@st.composite
def rows(draw):
    """Packed rows: examples of a prefix with image and text tokens in any order, then branches, then padding."""
    tokens = []
    for example in range(draw(st.integers(0, 4))):
        vision = draw(st.lists(st.booleans(), min_size=0, max_size=12))
        tokens += [(example, PREFIX_BRANCH, v) for v in vision]
        for branch in range(draw(st.integers(0, 4))):
            tokens += [(example, branch, False)] * draw(st.integers(0, 4))
    return row_of(tokens + [(PAD, PAD, False)] * draw(st.integers(1, 5)))


@settings(deadline=None, max_examples=60)
@given(rows(), st.integers(1, 9), st.integers(1, 9), st.integers(0, 8))
def test_plans_are_the_rule(row, queries, branches, kept):
    saved = plans.QUERIES, plans.BRANCHES, plans.KEPT_PER_TOKEN
    plans.QUERIES, plans.BRANCHES, plans.KEPT_PER_TOKEN = queries, branches, kept
    try:
        expected = dense(row)
        assert torch.equal(from_rule(row), expected)
        assert torch.equal(from_plan(row), expected)
        cuts = (0, row.shape[1] // 3, row.shape[1] // 2, row.shape[1])
        parts = [from_plan(row, *part) for part in zip(cuts, cuts[1:], strict=False)]
        assert torch.equal(torch.cat(parts), expected)
    finally:
        plans.QUERIES, plans.BRANCHES, plans.KEPT_PER_TOKEN = saved


def test_plan_of_full_size_blocks_is_the_rule():
    image, text = (0, PREFIX_BRANCH, True), (0, PREFIX_BRANCH, False)
    tokens = [text] + [image] * 300 + [text] * 5 + [image] * 100 + [(0, branch, False) for branch in (0, 1) * 1]
    tokens += [(0, 2, False)] * 300 + [(1, 0, False)] * 10
    row = row_of(tokens)
    assert torch.equal(from_plan(row), from_rule(row))
    # 406 tokens of the prefix, 302 of branches, the other example.
    assert len(plans.Plan(row).blocks) == -(-406 // plans.QUERIES) + -(-302 // plans.QUERIES) + 1


def test_branches_are_asked_about_the_prefix_and_their_neighbours_only():
    """A prefix of 19 tokens and nine branches of 25: blocks of two branches and one."""
    tokens = [(0, PREFIX_BRANCH, 0 < i < 17) for i in range(19)]
    row = row_of(tokens + [(0, branch, False) for branch in range(9) for _ in range(25)])
    assert torch.equal(from_plan(row), from_rule(row))
    asked = [(block.end - block.start, block.before + block.keys_end - block.keys) for block in plans.Plan(row).blocks]
    assert asked == [(69, 69), *[(50, 19 + 50)] * 3, (25, 19 + 25)]


def test_a_branch_in_two_places_is_the_rule():
    row = row_of([(0, PREFIX_BRANCH, False)] * 3 + [(0, b, False) for b in (0, 1, 0, 2) for _ in range(70)])
    assert torch.equal(from_plan(row), from_rule(row))


def test_an_example_in_two_places_is_refused():
    with pytest.raises(ValueError, match="example 0 of a row stands in two places"):
        plans.Plan(row_of([(0, 0, False), (1, 0, False), (0, 0, False)]))


def test_plans_are_kept_by_row_number_and_checked_against_the_marks():
    kept = plans.Plans(rows=2)
    first = row_of([(0, 0, False)] * 3, number=7)
    assert kept.of(first, 0, 3) is kept.of(first.clone(), 0, 3)
    assert kept.of(first, 1, 3).queries == (1, 3)
    # An evaluation's row with the same number.
    other = row_of([(0, 0, False)] * 2 + [(PAD, PAD, False)], number=7)
    assert kept.of(other, 0, 3).blocks != kept.of(first, 0, 3).blocks
    for number in (8, 9):
        kept.of(row_of([(0, 0, False)], number=number), 0, 1)
    assert len(kept._kept) == 2


def test_marks_of_a_batch():
    batch = tiny.batch(tiny.ARCH, [3, 5])
    found = marks(batch)
    assert found.shape == (5, 2, 96) and found.dtype == torch.int64
    assert torch.equal(found[Mark.ROW, :, 0], torch.tensor([3, 5]))
    assert torch.equal(found[Mark.RESPONSE].bool(), batch.loss_weights != 0)
    assert torch.equal(found[Mark.VISION].bool(), batch.is_vision)
