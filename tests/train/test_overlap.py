"""Gradients reduced during the backward pass: in the same order everywhere, and the same numbers as afterwards.

tests/train/test_layouts.py and tests/tools/test_parity.py compare with one process.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_vlm.config.schema import ComponentOptimConfig, DataConfig, OptimConfig
from megatron_vlm.parallel.layout import Layout
from tests.model import tiny
from tests.model.layouts import without_images

#: Rows of a step, one a micro-batch; numbers of a bucket that give the first stage several.
ROWS, SMALL = 8, 3000


class Bucket:
    """What Megatron's bucket group is to `Turns`."""

    def __init__(self, name, parameters, log):
        self.params, self.is_last_microbatch = set(parameters), True
        self.start_grad_sync = lambda force_all_reduce: log.append(name)


def test_buckets_start_in_one_order_whatever_is_ready_first():
    from megatron_vlm.train.overlap import Turns

    log: list[str] = []
    a, b, c, d = (torch.nn.Parameter(torch.zeros(1)) for _ in range(4))
    buckets = [Bucket("first", [a, b], log), Bucket("second", [c], log), Bucket("third", [d], log)]
    turns = Turns(buckets)
    buckets[0].is_last_microbatch = False
    turns.register_grad_ready(a)  # of an earlier micro-batch
    buckets[0].is_last_microbatch = True
    for parameter, started in ((c, []), (a, []), (b, ["first", "second"])):
        turns.register_grad_ready(parameter)
        assert log == started
    with pytest.raises(AssertionError, match="two gradients"):
        turns.register_grad_ready(c)
    turns.finish()  # d got no gradient
    turns.finish()  # for the next chunk of the model
    assert log == ["first", "second", "third"]
    turns.begin()
    turns.register_grad_ready(c)
    assert len(log) == 3
    turns.finish()
    assert log[3:] == ["first", "second", "third"]


def steps(arch: Any, layout: Layout, parallel: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Three steps on every rank; options: of tiny.config, and `quiet`: odd rows, which are those of the data-parallel
    rank 1 of 2, have no images. Buckets: how many had been started when a backward pass ended, and all; early: when its
    last gradient came."""
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups
    from megatron_vlm.train import optim, overlap, pieces
    from megatron_vlm.train.step import Stepper

    groups.initialize(layout, seed=0, timeout_s=50)
    quiet = options.pop("quiet", False)
    component = ComponentOptimConfig(lr=1e-2)
    sections = {
        "data": DataConfig(sequence_length=96),
        "optim": OptimConfig(vision=component, connector=component, language=component),
    }
    config = tiny.config(arch, parallel=parallel, global_batch=ROWS, sections=sections, **options)
    models = optim.wrap(build(config, layout), config)
    stepper = Stepper(models, optim.build(models, config), config, ["data"])
    finish, started = overlap.Turns.finish, []
    register, early = overlap.Turns.register_grad_ready, []

    def counted(self: Any, *arguments: Any) -> None:
        started.append((self._next, len(self._groups)))
        finish(self, *arguments)

    def watched(self: Any, parameter: Any, *arguments: Any) -> None:
        if len(self._ready) == len(self._of) - 1:
            early.append(self._next)
        register(self, parameter, *arguments)

    overlap.Turns.finish, overlap.Turns.register_grad_ready = counted, watched
    rank = dist.get_rank()
    outcomes = []
    try:
        for step in range(1, 4):
            numbers = range(step * ROWS + layout.coordinates(rank).data, (step + 1) * ROWS, layout.data)
            batches = [tiny.batch(arch, [n], layout.crop_rank(rank), layout.crop_ranks) for n in numbers]
            batches = [
                without_images(batch) if quiet and n % 2 else batch for n, batch in zip(numbers, batches, strict=True)
            ]
            outcomes.append(dataclasses.astuple(stepper.train(batches, step)))
    finally:
        overlap.Turns.finish, overlap.Turns.register_grad_ready = finish, register
    buckets = {"buckets": min(started, default=(0, 0)), "early": min(early, default=0)}
    return {"outcomes": outcomes, "weights": pieces.weights(models), **buckets}


CASES = {
    "dp2, images on one rank": (Layout(2), {}, {"quiet": True}),
    "dp2, connector alone": (Layout(2), {}, {"freeze": ("vision", "language", "base_embeddings"), "quiet": True}),
    "cp2, full recompute": (Layout(2, context=2), {"context": 2}, {"recompute": "full"}),
    "dp2 tp2 sp": (Layout(4, tensor=2), {"tensor": 2, "sequence": True}, {"quiet": True}),
    "dp2 tp2, sharded tower": (Layout(4, tensor=2, vision="tensor"), {"tensor": 2, "vision": "tensor"}, {}),
    "dp2 pp2": (Layout(4, pipeline=2), {"pipeline": 2}, {"recompute": "full", "quiet": True}),
    "dp2 pp2 vpp2": (Layout(4, pipeline=2, virtual_pipeline=2), {"pipeline": 2, "virtual_pipeline": 2}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_reductions_after_the_backward_pass(pool, case):
    """Of two ranks' numbers the sum has one order: the same bits where the optimizer's shards are the same, too.

    Buckets of another size shard the squares of the norms otherwise, whose sums then differ in float64's last digits.
    """
    layout, parallel, options = CASES[case]
    arch = tiny.TIED if layout.pipeline > 1 else tiny.ARCH  # the table's copies are buckets of their own

    def run(**settings):
        return pool(layout.world).run(steps, arch, layout, parallel | settings, dict(options), timeout_s=100)

    after = run(overlap_grad_reduce=False)
    assert all(rank["buckets"] == (0, 0) for rank in after)
    assert len({rank["outcomes"][0][0] for rank in after}) == 1 and after[0]["outcomes"][2][0] < 10
    for bucket, tolerance in ((0, 0.0), (SMALL, 1e-6)):
        during = run(overlap_grad_reduce=True, bucket_size=bucket)
        for found, expected in zip(during, after, strict=True):
            started, buckets = found["buckets"]
            assert started == buckets > 0
            for one, other in zip(found["outcomes"], expected["outcomes"], strict=True):
                assert one[0] == pytest.approx(other[0], rel=tolerance, abs=0)
                assert one[4] == pytest.approx(other[4], rel=tolerance, abs=0)
            for name, (_, parts) in expected["weights"].items():
                for (_, one), (_, other) in zip(found["weights"][name][1], parts, strict=True):
                    np.testing.assert_allclose(one, other, rtol=0, atol=tolerance, err_msg=name)
        if bucket:  # the first stage has one bucket otherwise, or with the table's two or three
            assert during[0]["buckets"][0] > (1 if "connector" in case else 5)
            # They do not wait for the end: the order is that in which gradients come.
            assert during[0]["early"] >= during[0]["buckets"][0] // 2
