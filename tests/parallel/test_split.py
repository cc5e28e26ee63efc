"""Even parts: everything is in exactly one part, and no part is more than one larger than another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vlm.parallel.split import even_counts, offsets


@given(st.integers(0, 1000), st.integers(1, 50))
def test_parts_cover_the_total_evenly(total, parts):
    counts = even_counts(total, parts)
    assert len(counts) == parts and sum(counts) == total
    assert max(counts) - min(counts) <= 1
    assert list(counts) == sorted(counts, reverse=True)
    assert offsets(counts)[0] == 0 and offsets(counts)[-1] == total


def test_example_and_refusals():
    assert even_counts(10, 4) == (3, 3, 2, 2)
    assert offsets((3, 3, 2, 2)) == (0, 3, 6, 8, 10)
    with pytest.raises(ValueError, match="5 things cannot be cut into 0 parts"):
        even_counts(5, 0)
