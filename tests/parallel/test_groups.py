"""Groups: replicated parts see groups of one, seeds agree where weights must, and making them again works."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.parallel.layout import Layout


def sizes_and_draws(layout: Layout) -> dict[str, object]:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megatron_vlm.parallel import groups

    groups.initialize(layout, seed=7, timeout_s=30)
    groups.destroy()
    groups.initialize(layout, seed=7, timeout_s=30)
    common = torch.rand(1).item()
    with get_cuda_rng_tracker().fork():
        own = torch.rand(1).item()
    alone, whole = groups.replicated(), groups.megatron()
    number = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(number, group=alone.tp)
    return {
        "alone": [alone.tp.size(), alone.cp.size(), alone.pp.size(), alone.dp.size()],
        "whole": [whole.tp.size(), whole.cp.size(), whole.pp.size(), whole.dp.size()],
        "named": [g().size() for g in (groups.tensor, groups.context, groups.pipeline, groups.data)],
        "shared": [groups.tensor_and_context().size(), groups.data_and_context().size()],
        "sum_alone": number.item(),
        "common": common,
        "own": own,
    }


def test_groups_and_seeds(pool):
    ranks = pool(4).run(sizes_and_draws, Layout(4, tensor=2, context=2))
    for rank, found in enumerate(ranks):
        assert found["whole"] == found["named"] == [2, 2, 1, 1]
        assert found["alone"] == [1, 1, 1, 1]
        assert found["shared"] == [4, 2]
        assert found["sum_alone"] == rank
    assert len({found["common"] for found in ranks}) == 1
    # Megatron's tracker: the same on ranks that hold the same shard, different between shards.
    assert ranks[0]["own"] == ranks[2]["own"] != ranks[1]["own"] == ranks[3]["own"]


def initialize_for(world: int) -> None:
    from megatron_vlm.parallel import groups

    groups.initialize(Layout(world))


def test_wrong_world_is_refused(pool):
    with pytest.raises(RuntimeError, match="ValueError: the layout is for 4 processes, but torch.distributed has 2"):
        pool(2).run(initialize_for, 4)
