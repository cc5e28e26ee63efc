"""Packing: every sample once, no budget broken, few rows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.data import pack as pack_module
from megatron_vlm.data.pack import lower_bound, pack


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 8)), max_size=80))
@settings(max_examples=100, deadline=None)
def test_every_sample_has_its_place(samples):
    tokens, crops = [size for size, _ in samples], [count for _, count in samples]
    rows = pack(tokens, crops, 100, 8)
    assert sorted(sample for row in rows for sample in row) == list(range(len(samples)))
    assert all(row == sorted(row) and row for row in rows)
    assert all(sum(tokens[s] for s in row) <= 100 and sum(crops[s] for s in row) <= 8 for row in rows)
    assert len(rows) >= lower_bound(tokens, crops, 100, 8)
    assert rows == pack(tokens, crops, 100, 8)


def test_perfect_fits_are_found():
    assert len(pack([50] * 20, [4] * 20, 100, 8)) == 10
    assert len(pack([60, 40] * 50, [1, 7] * 50, 100, 8)) == 50
    assert pack([], [], 100, 8) == []
    assert pack([100], [8], 100, 8) == [[0]]


@pytest.mark.parametrize("seed", range(3))
def test_few_rows_on_a_real_mix(seed):
    """Images, long and short texts, at 16,384 tokens and 128 crops: within a hundredth of the lower bound."""
    rng = np.random.default_rng(seed)
    crops = rng.choice([0, 2, 5, 7, 9, 40], 2048, p=[0.15, 0.1, 0.2, 0.25, 0.25, 0.05])
    tokens = np.minimum(crops * 150 + rng.lognormal(5.5, 1.0, 2048).astype(int) + 10, 16_384)
    rows = pack(tokens.tolist(), crops.tolist(), 16_384, 128)
    assert lower_bound(tokens, crops, 16_384, 128) / len(rows) >= 0.994


def test_room_of_two_rows_becomes_the_room_of_one():
    """Largest first leaves 2 free in both rows, and the last sample needs 4: 48 and 46 have to change places."""
    crops = [52, 50, 48, 46, 4]
    rows = pack([0] * 5, crops, 1, 100)
    assert sorted(sorted(crops[sample] for sample in row) for row in rows) == [[4, 46, 50], [48, 52]]


@pytest.mark.parametrize("needed", range(1002, 1030))
def test_the_fewest_rows_that_do(needed, monkeypatch):
    """The number of rows is doubled beyond what is needed, then halved back."""

    class Filling:
        def __init__(self, sizes, budget, rows):
            self.rows, self.placed = rows, np.arange(rows)

        def complete(self):
            return self.rows >= needed

    monkeypatch.setattr(pack_module, "_Filling", Filling)
    assert len(pack_module._fewest(np.zeros((1, 2)), np.ones(2), 1000)) == needed


def test_a_sample_larger_than_a_row_is_named():
    with pytest.raises(ValueError, match="sample 1 of the window has 101 tokens and 0 crops; a row holds 100 and 8"):
        pack([5, 101], [0, 0], 100, 8)
    with pytest.raises(ValueError, match="sample 0 of the window has 5 tokens and 9 crops"):
        pack([5, 100], [9, 0], 100, 8)
