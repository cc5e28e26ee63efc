"""What each rank writes and reads of the optimizer: its own numbers, as boxes of the whole model's tensors."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vlm.parallel.layout import Layout
from tests.checkpoint import toy


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4), (2, 3, 4)])
def test_boxes_are_the_run_of_numbers_in_order(shape):
    from megatron_vlm.checkpoint.sharded import boxes

    array = np.arange(np.prod(shape)).reshape(shape)
    for start in range(array.size + 1):
        for end in range(start, array.size + 1):
            found = list(boxes(shape, start, end))
            cut = [array[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].ravel() for box in found]
            assert np.concatenate([*cut, []]).tolist() == list(range(start, end))
            assert len(found) < 2 * len(shape)  # a piece before the whole rows, those, a piece after them


def held(layout: Layout) -> dict[str, int]:
    """Numbers of the optimizer's tensors in this rank's state, to save and to load; of the whole, and of a shard; and
    of the weights, those that this rank writes."""
    from megatron.core.dist_checkpointing.mapping import is_main_replica

    from megatron_vlm.checkpoint import sharded

    models, optimizer = toy.build(layout)
    saved = sharded.build(models, None, is_loading=False)
    weights = sum(each.data.numel() for each in sharded.tensors(saved) if is_main_replica(each.replica_id))
    saves, loads = (
        sum(tensor.data.numel() for tensor in sharded.tensors(state["optimizer"]))
        for state in (sharded.build(models, optimizer, is_loading=is_loading) for is_loading in (False, True))
    )
    (model,) = models
    whole = 3 * sum(parameter.numel() for parameter in model.parameters())
    shard = 3 * sum(buffer.numel for buffer in model.buffers) // layout.data
    return {"saves": saves, "loads": loads, "whole": whole, "shard": shard, "weights": weights}


def test_no_rank_holds_more_of_the_optimizer_than_its_share(pool):
    """Neither saving nor loading brings a replica's optimizer together on a rank."""
    first, second = pool(2).run(held, Layout(2))
    for rank in (first, second):
        assert rank["saves"] == rank["loads"] <= rank["shard"] < 0.6 * rank["whole"]
        assert rank["weights"] < 0.6 * rank["whole"] / 3
    assert first["saves"] + second["saves"] == first["whole"] == 3 * (first["weights"] + second["weights"])
