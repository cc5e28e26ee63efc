"""Every recipe loads, keeps the rules, its model is built at its own layout for every rank of a replica, and steps at
its own sequence length.

Weights have sizes but no numbers (train/pretend.py); what a rank holds is compared with what the plan counts.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import pytest

from megatron_vlm.config import load, presets, rules
from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan import workload

FOLDER = Path(__file__).parents[1] / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*/stage*.yaml"))
#: As named on the command line; tower and connector sharded, a pipeline with virtual stages.
OTHERS = {
    "molmo2_4b/stage1.yaml": ("parallel.tensor=2", "parallel.sequence=true", "parallel.vision=tensor"),
    "molmo2_8b/stage2.yaml": ("parallel.tensor=2", "parallel.pipeline=2", "parallel.virtual_pipeline=2"),
    "molmo2_8b/stage3.yaml": ("parallel.context=8", "parallel.tensor=1", "parallel.sequence=false"),
}
CASES = [(path, ()) for path in RECIPES] + [(FOLDER / name, words) for name, words in OTHERS.items()]
#: Processes that the stages are planned for (examples/slurm/README.md), beside a single replica.
CLUSTERS = (2, 4, 8, 32, 256)


def name_of(case: object) -> str:
    return f"{case.parent.name}-{case.stem}" if isinstance(case, Path) else " ".join(case)  # type: ignore[arg-type]


def replica(config: Config) -> int:
    return config.parallel.tensor * config.parallel.context * config.parallel.pipeline


def test_all_recipes_are_here():
    assert len(RECIPES) == len(list(FOLDER.glob("*/stage*"))) >= 17


@pytest.mark.parametrize("path, words", CASES, ids=name_of)
def test_rules(path, words):
    """On one replica, and on every cluster that holds whole replicas and no more rows than a step has."""
    config = load.load(path, words)
    rules.check(config, replica(config))
    for world in () if words else CLUSTERS:
        data = world // replica(config)
        if world % replica(config) == 0 and data * config.train.micro_batch <= config.train.global_batch:
            rules.check(config, world)


@pytest.mark.slow
@pytest.mark.parametrize("path, words", CASES, ids=name_of)
def test_build(path, words):
    """Every rank of a replica."""
    config = load.load(path, words)
    layout = Layout.of(config, replica(config))
    for rank in range(layout.world):
        built, planned = held(key(config), layout, rank, path, words)
        assert built == planned, rank


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_step(path):
    """Rows of its own length forward and back on the last rank of a replica, at its own widths and layout, with two
    layers of the tower and two of the decoder: the others are like them. The collectives are those of the plan."""
    config = load.load(path)
    row = workload.assume(config)
    assert row.tokens == config.data.sequence_length
    found, expected = stepped(f"{key(config)} {row} {config.train.micro_batch}", path)
    assert found == expected and (found or replica(config) == 1)


@cache
def stepped(what: str, path: Path) -> tuple[Counter, Counter]:
    """Collectives of a step and those that the plan counts. what: as in `held`."""
    from megatron_vlm.parallel import cpu

    cpu.enable("cpu")
    from megatron_vlm.train import rehearsal

    config = load.load(path)
    layout = Layout.of(config, replica(config))
    config = replace(config, train=replace(config.train, global_batch=config.train.micro_batch * layout.data))
    whole = presets.PRESETS[config.model.preset]
    shallow = replace(
        whole,
        vision=replace(whole.vision, layers=2),
        connector=replace(whole.connector, taps=(1, 0)[: len(whole.connector.taps)]),
        language=replace(whole.language, layers=2),
    )
    row, rank = workload.assume(config), layout.world - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, config.model.preset, shallow)
        return rehearsal.compare(rehearsal.rehearse(config, layout, rank, row), config, layout, rank, row)


def key(config: Config) -> str:
    """What the model of a rank depends on: stages that differ in nothing of it are built once."""
    parts = {name: asdict(getattr(config, name)) for name in ("model", "parallel")}
    return json.dumps(parts | {"train": [config.train.precision, config.train.recompute]}, sort_keys=True)


@cache
def held(what: str, layout: Layout, rank: int, path: Path, words: tuple[str, ...]) -> tuple[int, int]:
    """Parameters that the rank's part of the model has, and that the plan counts."""
    from megatron_vlm.parallel import cpu

    cpu.enable("cpu")
    from megatron_vlm.model.build import build
    from megatron_vlm.plan import params
    from megatron_vlm.train.pretend import Pretend, rank_of

    config = load.load(path, words)
    with rank_of(layout, rank), Pretend():
        models = build(config, layout)
        built = sum(parameter.numel() for model in models for parameter in model.parameters())
    arch = presets.architecture(config.model)
    chunks = params.stages(arch, layout, config.parallel.pipeline_layers)[layout.coordinates(rank).pipeline]
    planned = [params.of_stage(arch, chunk, layout.tensor, layout.vision_tensor) for chunk in chunks]
    return built, sum(parameter.numel for chunk in planned for parameter in chunk)
