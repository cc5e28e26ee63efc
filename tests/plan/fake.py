"""One rank of a world that is not there: collectives of torch's fake backend return at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_vlm.parallel.layout import Layout


@contextmanager
def rank_of(layout: Layout, rank: int) -> Iterator[None]:
    """Process groups of `layout` as `rank` sees them."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_vlm.parallel import cpu

    cpu.enable("cpu")
    from megatron_vlm.parallel import groups

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    new_group = dist.new_group
    try:
        # Megatron asks for gloo twins of its groups by name; there is nobody to connect to.
        dist.new_group = lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})
        groups.initialize(layout, backend="fake")
        dist.new_group = new_group
        yield
    finally:
        dist.new_group = new_group
        groups.destroy()
        dist.destroy_process_group()
