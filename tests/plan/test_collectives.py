"""Planned collectives and memory against a rehearsal: the trainer's own step on one rank, layout by layout."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_vlm.config import load
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan import memory, workload
from tests.test_imports import ROOT

# Rehearsals take half a minute together: the full run only.
pytestmark = pytest.mark.slow

LAYOUTS = [
    ("data", 4, []),
    ("tensor", 4, ["parallel.tensor=2"]),
    ("sequence", 2, ["parallel.tensor=2", "parallel.sequence=true", "data.bad_samples=skip"]),
    ("context", 4, ["parallel.context=2", "train.recompute=selective"]),
    ("gather", 4, ["parallel.context=4", "parallel.context_method=gather", "train.recompute=full"]),
    ("ring", 4, ["parallel.context=4", "parallel.context_method=ring", "train.recompute=full",
                 "train.precision=bf16"]),
    ("heads and gather", 8, ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=4",
                             "train.recompute=selective"]),
    ("pipeline", 4, ["parallel.pipeline=2", "model.freeze=[base_embeddings]"]),
    ("virtual", 4, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    ("all", 16, ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2", "parallel.pipeline=2",
                 "train.recompute=full", "train.precision=bf16"]),
    ("sharded tower", 4, ["parallel.tensor=2", "parallel.context=2", "parallel.vision=tensor"]),
    ("sharded tower, full", 4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.vision=tensor",
                                "train.recompute=full", "train.precision=bf16"]),
    ("sharded resampler", 2, ["parallel.tensor=2", "parallel.vision=tensor", "model.connector=resampler",
                              "train.recompute=full"]),
    ("sharded mlp, frozen tower", 2, ["parallel.tensor=2", "parallel.vision=tensor", "model.connector=mlp",
                                      "model.freeze=[vision, base_embeddings]"]),
    ("overlap", 4, ["parallel.tensor=2", "parallel.overlap_grad_reduce=true", "parallel.bucket_size=20000"]),
    ("overlap, virtual", 8, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.context=2",
                             "parallel.overlap_grad_reduce=true", "parallel.bucket_size=20000"]),
    ("frozen", 8, ["parallel.tensor=2", "parallel.context=2", "model.freeze=[vision, base_embeddings]"]),
]  # fmt: skip


@pytest.mark.parametrize("name, world, settings", LAYOUTS, ids=[each[0] for each in LAYOUTS])
def test_rehearsal(name, world, settings):
    """Kinds, groups, sizes and numbers of all collectives of a step; bytes of weights, gradients and optimizer."""
    from megatron_vlm.parallel import cpu

    cpu.enable("cpu")
    from megatron_vlm.train import rehearsal

    config = load.load(ROOT / "examples/recipes/tiny/stage1.yaml", [*settings, "train.micro_batch=1"])
    layout = Layout.of(config, world)
    train = dataclasses.replace(config.train, global_batch=2 * layout.data)
    config = dataclasses.replace(config, train=train)
    row = workload.assume(config)
    for rank in {0, layout.tensor * layout.context - 1, world - 1}:
        done = rehearsal.rehearse(config, layout, rank, row)
        found, expected = rehearsal.compare(done, config, layout, rank, row)
        assert found == expected, f"rank {rank}"
        # Megatron's optimizer keeps one or two scalars beside its state.
        assert 0 <= done.static - memory.static(config, layout, rank, cuda=False).total <= 8
        stage = layout.coordinates(rank).pipeline
        load_of_rank = workload.load(row, config, layout, rank)
        planned = memory.of_stage(config, layout, stage, load_of_rank, cuda=False)
        # A rehearsal sees the masks of its two rows, a run those of many.
        unseen = memory.masks(load_of_rank, memory.PLANNED_ROWS) - memory.masks(load_of_rank, 2)
        assert planned.peak - unseen == pytest.approx(done.peak, rel=0.1)
