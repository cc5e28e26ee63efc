"""Parts that every rank holds whole: one writer in checkpoints, counted once in norms, zero gradients without work."""

from __future__ import annotations

import dataclasses

import torch

from megatron_vlm.config.presets import PRESETS
from megatron_vlm.parallel.layout import Layout

ARCH = dataclasses.replace(PRESETS["tiny"], vision=dataclasses.replace(PRESETS["tiny"].vision, width=24, mlp=32))


def writers(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Replica id of each sharded tensor of tower and connector on this rank; (0, 0, 0) writes."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
    from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate

    from megatron_vlm.model.connector import build_connector
    from megatron_vlm.model.vision import VisionTower
    from megatron_vlm.parallel import cpu, groups

    groups.initialize(layout, timeout_s=30)
    tower = VisionTower(ARCH.vision, ARCH.connector.taps, cpu.TRANSFORMER_SETTINGS, groups.replicated())
    connector = build_connector(ARCH, cpu.TRANSFORMER_SETTINGS, groups.replicated())
    first = groups.tensor().rank() == 0
    for parameter in (*tower.parameters(), *connector.parameters()):
        assert param_is_not_tensor_parallel_duplicate(parameter) == first
    found = {}
    for key, value in {**tower.sharded_state_dict("vision."), **connector.sharded_state_dict("connector.")}.items():
        pieces = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        found |= {f"{key} {index}": piece.replica_id for index, piece in enumerate(pieces)}
    return found


def test_one_rank_writes_each_tensor_and_counts_it_in_the_norm(pool):
    for layout in (Layout(2, tensor=2), Layout(4, tensor=2, context=2), Layout(4, tensor=2)):
        by_rank = pool(layout.world).run(writers, layout)
        for key in by_rank[0]:
            replicas = [ids[key] for ids in by_rank]
            assert replicas.count((0, 0, 0)) == 1 and len(set(replicas)) == len(replicas), key


def test_an_anchored_result_gives_exact_zeros_even_beside_infinities():
    from megatron_vlm.model.replicated import anchor

    weight = torch.full((2, 3), float("inf"), requires_grad=True)
    frozen = torch.ones(2)
    out = anchor(torch.ones(4), weight, frozen)
    out.sum().backward()
    assert torch.equal(out, torch.ones(4))
    assert torch.equal(weight.grad, torch.zeros(2, 3))
    assert not anchor(torch.ones(4), frozen).requires_grad
