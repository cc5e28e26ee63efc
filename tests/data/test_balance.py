"""Rows to ranks: as many for each, and about as much work."""

import dataclasses

import numpy as np
import pytest

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.config.geometry import VideoLayout, frame_layout, image_geometry, image_layout
from megatron_vlm.config.presets import PRESETS
from megatron_vlm.cost import Work, forward
from megatron_vlm.data.balance import attention_pairs, deal, row_cost, sample_work
from megatron_vlm.data.tree import nothing


@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 1), (1, 8), (4, 2), (8, 1), (16, 4)])
def test_every_row_is_dealt_once(ranks, micro_batches):
    costs = np.random.default_rng(0).integers(1, 1000, 64).tolist()
    dealt = deal(costs, ranks, micro_batches)
    assert len(dealt) == ranks and all(len(rank) == micro_batches for rank in dealt)
    assert {len(batch) for rank in dealt for batch in rank} == {64 // ranks // micro_batches}
    assert sorted(row for rank in dealt for batch in rank for row in batch) == list(range(64))


def test_ranks_get_about_as_much():
    costs = np.random.default_rng(1).lognormal(5, 0.3, 256).astype(int).tolist()
    loads = [sum(costs[row] for batch in rank for row in batch) for rank in deal(costs, 64, 4)]
    assert max(loads) / (sum(loads) / 64) < 1.05
    plain = [sum(costs[rank * 4 : rank * 4 + 4]) for rank in range(64)]
    assert max(plain) / (sum(plain) / 64) > 1.1


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="10 rows cannot be dealt to 4 data-parallel ranks x 1"):
        deal([1] * 10, 4, 1)


def test_costs_are_those_of_the_cost_module():
    arch = PRESETS["molmo2_4b"]
    one, other = Work(0, 1000, 50, 9, 900, 3600), Work(0, 2000, 0, 2, 81, 729)
    whole = forward(arch, Work(4096, 3000, 50, 11, 981, 4329))
    assert row_cost(arch, 4096, [one, other]) == whole.vision + whole.connector + whole.language
    assert row_cost(arch, 4096, []) == forward(arch, Work(4096, 0, 0, 0, 0, 0)).language


def test_the_work_of_a_sample_is_that_of_its_windows_and_branches():
    """An image pooled 2x2, a video pooled 3x3; two branches behind a prefix of 6 tokens, 4 of them in blocks."""
    geometry = image_geometry(PRESETS["molmo2_4b"], 8)
    image, video = image_layout(640, 480, geometry), VideoLayout((0.0, 0.5), 0.0, frame_layout(geometry))
    branches = np.asarray([PREFIX_BRANCH] * 6 + [0] * 3 + [1] * 2, dtype=np.int32)
    content = dataclasses.replace(
        nothing(),
        branches=branches,
        is_vision=np.asarray([False] + [True] * 4 + [False] * 6),
        loss_weights=np.asarray([0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 1], dtype=np.float32),
        layouts=(image, video),
    )
    crops, windows, slots = image.crops + 2, image.placeholders + 2 * 81, 4 * image.placeholders + 9 * 2 * 81
    assert sample_work(content, geometry) == Work(0, attention_pairs(6, 4, [3, 2]), 3, crops, windows, slots)
    resampler = dataclasses.replace(geometry, queries=5)
    found = sample_work(content, resampler)
    assert (found.crops, found.windows, found.slots) == (crops, crops, crops * 729)


@pytest.mark.parametrize(
    ("prefix", "vision", "branches"), [(9, 5, [4, 3]), (1, 0, [6]), (7, 6, [2]), (3, 2, [1, 1, 5])]
)
def test_pairs_are_those_of_the_mask_rule(prefix, vision, branches):
    """Against the rule written out: causal or both in image blocks, and no other branch."""
    branch = [None] * prefix + [number for number, length in enumerate(branches) for _ in range(length)]
    seen = [1 <= place <= vision for place in range(len(branch))]
    allowed = sum(
        (key <= query or (seen[query] and seen[key])) and branch[key] in (None, branch[query])
        for query in range(len(branch))
        for key in range(len(branch))
    )
    assert attention_pairs(prefix, vision, branches) == allowed
