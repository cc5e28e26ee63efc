"""Rank arithmetic, against the groups that Megatron-core itself makes."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch.distributed as dist

from megatron_vlm.config.schema import Config, ParallelConfig
from megatron_vlm.parallel.layout import Coordinates, Layout


def megatron_coordinates(layout: Layout) -> tuple[Coordinates, int, int, list[int]]:
    from megatron.core import parallel_state

    from megatron_vlm.parallel import groups

    groups.initialize(layout, timeout_s=30)
    at = Coordinates(
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_context_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    shared = groups.crops(layout)
    return at, dist.get_rank(shared), shared.size(), dist.get_process_group_ranks(shared)


@pytest.mark.parametrize(
    "layout",
    [
        *(Layout(4, tensor=2, context=2, vision=vision) for vision in ("data", "tensor")),
        Layout(4, tensor=2, pipeline=2),
        Layout(4, context=2),
        Layout(4, pipeline=2),
    ],
    ids=str,
)
def test_coordinates_are_megatrons(pool, layout):
    for rank, (at, position, size, members) in enumerate(pool(4).run(megatron_coordinates, layout)):
        assert layout.coordinates(rank) == at
        assert layout.rank(at) == rank
        assert layout.crop_rank(rank) == position
        assert layout.crop_ranks == size
        assert members[position] == rank


def config(**parallel) -> Config:
    """The tiny model: 4 query heads, 2 key-value heads."""
    return Config(parallel=ParallelConfig(**parallel))


@pytest.mark.parametrize(
    ("parallel", "head_ranks", "key_ranks"),
    [
        ({"context": 4}, 4, 1),
        ({"context": 8}, 4, 2),
        ({"context": 3}, 1, 3),
        ({"context": 4, "tensor": 2}, 2, 2),
        ({"context": 4, "tensor": 4}, 1, 4),
        ({"context": 4, "context_method": "gather"}, 1, 4),
        ({"context": 4, "context_method": "ulysses"}, 4, 1),
    ],
)
def test_heads_go_round_as_many_context_ranks_as_they_can(parallel, head_ranks, key_ranks):
    layout = Layout.of(config(**parallel), 16 if parallel["context"] != 3 else 6)
    assert (layout.head_ranks, layout.key_ranks) == (head_ranks, key_ranks)


def test_data_parallel_degree_follows():
    layout = Layout.of(config(tensor=2, context=4, pipeline=2, virtual_pipeline=3), 64)
    assert (layout.data, layout.crop_ranks, layout.chunks) == (4, 8, 6)
    assert layout.coordinates(37) == Coordinates(tensor=1, context=2, data=0, pipeline=1)


def test_groups_of_context_ranks():
    layout = Layout(16, tensor=2, context=4, pipeline=2, ulysses=2)
    heads, keys = (list(layout.context_groups(heads=each)) for each in (True, False))
    assert heads[:3] == [(0, 2), (1, 3), (4, 6)] and keys[:3] == [(0, 4), (1, 5), (2, 6)]
    for groups in (heads, keys):
        assert sorted(rank for group in groups for rank in group) == list(range(16))
        for group in groups:
            assert len({dataclasses.replace(layout.coordinates(rank), context=0) for rank in group}) == 1


def test_refusals_hold_the_numbers():
    with pytest.raises(
        ValueError, match=r"6 processes cannot hold whole models of 4 .*tensor 2 x context 2 x pipeline 1"
    ):
        Layout.of(config(tensor=2, context=2), 6)
    with pytest.raises(ValueError, match="virtual_pipeline=2 needs parallel.pipeline > 1"):
        Layout.of(config(virtual_pipeline=2), 2)
    with pytest.raises(ValueError, match="context is 0"):
        Layout.of(config(context=0), 2)
    with pytest.raises(ValueError, match="among 3 of 4 context ranks; needed a divisor of 4"):
        Layout(4, context=4, ulysses=3)
    with pytest.raises(ValueError, match="rank 4 does not exist in a world of 4"):
        Layout(4).coordinates(4)


def test_no_torch_is_imported():
    code = "import sys, megatron_vlm.parallel.layout, megatron_vlm.parallel.split; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
