"""Rows to ranks: as many for each, and about as much work."""

import numpy as np
import pytest

from megatron_vlm.config.presets import PRESETS
from megatron_vlm.data.balance import deal, row_cost


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


def test_costs_grow_with_what_costs():
    arch = PRESETS["molmo2_4b"]
    base = row_cost(arch, [1000, 1000], 500, 10)
    assert base < row_cost(arch, [2000], 500, 10)
    assert base < row_cost(arch, [1000, 1000], 501, 10) < row_cost(arch, [1000, 1000], 500, 20)
    # 9 crops through 25 layers of 400M parameters' worth: about 16.6 TFLOP forward and backward, 2.8 TMAC forward.
    assert 2.4e12 < row_cost(arch, [], 0, 9) < 3.3e12
