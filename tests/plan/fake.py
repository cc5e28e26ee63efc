"""One rank of a world that is not there: collectives of torch's fake backend return at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_vlm.parallel.layout import Layout


@contextmanager
def rank_of(layout: Layout, rank: int) -> Iterator[None]:
    """Process groups of `layout` as `rank` sees them, and Megatron on the CPU."""
    from megatron_vlm.parallel import cpu

    cpu.enable("cpu")
    from megatron_vlm.train import pretend

    with pretend.rank_of(layout, rank):
        yield
