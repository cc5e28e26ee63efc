"""Operators of the plan against cost.py: the same operations, counted one by one and by formula."""

from __future__ import annotations

import pytest

from megatron_vlm import cost
from megatron_vlm.config import load, presets
from megatron_vlm.config.architecture import CONNECTORS
from megatron_vlm.config.schema import Config, ModelConfig, ParallelConfig
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan import memory, params, workload
from megatron_vlm.plan.parts import Parts
from tests.test_imports import ROOT

RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "examples" / "recipes").glob("*/stage*.yaml"))


def forward_flops(config: Config, row: workload.Row) -> int:
    arch = presets.architecture(config.model)
    load_of_rank = workload.load(row, config, Layout(1))
    parts = Parts(arch, memory.settings(config, Layout(1), cuda=True), load_of_rank, frozenset())
    stage = params.Stage(True, True, arch.language.layers)
    found = memory.segments(parts, stage, "none")
    return sum(segment.count * flops for segment in found for flops, *_ in segment.profile.forward_work)


def check(config: Config, row: workload.Row) -> None:
    expected = cost.forward(presets.architecture(config.model), workload.work(row, config.train.micro_batch))
    assert forward_flops(config, row) == expected.vision + expected.connector + expected.language


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("connector", CONNECTORS)
def test_presets(preset, connector):
    config = Config(model=ModelConfig(preset, connector))
    check(config, workload.assume(config))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe):
    config = load.load(ROOT / recipe, ["parallel.context=1", "parallel.tensor=1", "parallel.sequence=false"])
    check(config, workload.assume(config))


def test_ranks_share_the_work():
    """Tensor and context parallelism divide the decoder's work."""
    one = Config(model=ModelConfig("qwen3_0.6b"))
    row = workload.assume(one, crops=0)
    layout = Layout(8, tensor=4, context=2)
    shared = Config(model=one.model, parallel=ParallelConfig(tensor=4, sequence=True, context=2))
    arch = presets.architecture(one.model)
    parts = Parts(arch, memory.settings(shared, layout, cuda=True), workload.load(row, shared, layout), frozenset())
    found = memory.segments(parts, params.Stage(True, True, arch.language.layers), "none")
    flops = sum(segment.count * flops for segment in found for flops, *_ in segment.profile.forward_work)
    assert flops * 8 == forward_flops(one, row)
