"""A plan of one layout, the cheapest change that makes it fit, and all layouts ranked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_vlm.config import presets, rules
from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan import memory, params, time, workload
from megatron_vlm.plan.collectives import Collective, of_rank
from megatron_vlm.plan.hardware import Cluster
from megatron_vlm.plan.memory import Memory
from megatron_vlm.plan.time import StepTime

#: Degrees that the sweep tries.
DEGREES = (1, 2, 4, 8, 16, 32)
MICRO_BATCHES = (1, 2, 4, 8)
RECOMPUTE = ("none", "selective", "full")


@dataclass(frozen=True)
class Plan:
    """One configuration on one cluster."""

    config: Config
    cluster: Cluster
    layout: Layout
    row: workload.Row

    @cached_property
    def memory(self) -> tuple[Memory, ...]:
        """Of every pipeline stage, on its rank with the most crops."""
        load = workload.load(self.row, self.config, self.layout)
        stages = range(self.layout.pipeline)
        return tuple(memory.of_stage(self.config, self.layout, stage, load, cuda=True) for stage in stages)

    @cached_property
    def time(self) -> StepTime:
        return time.step(self.config, self.layout, self.cluster, self.row)

    @property
    def stages(self) -> list[list[params.Stage]]:
        arch = presets.architecture(self.config.model)
        return params.stages(arch, self.layout, self.config.parallel.pipeline_layers)

    def talks(self, rank: int) -> list[Collective]:
        """The collectives of a step on `rank`."""
        settings = memory.settings(self.config, self.layout, cuda=True)
        load = workload.load(self.row, self.config, self.layout)
        return of_rank(self.config, self.layout, rank, settings, load)

    @property
    def peak(self) -> int:
        """Most bytes on any rank."""
        return max(each.peak for each in self.memory)

    @property
    def fits(self) -> bool:
        return self.peak <= self.cluster.usable

    @property
    def imbalance(self) -> float:
        """Crops of the rank with the most over the mean of its replica."""
        crops = self.config.train.micro_batch * self.row.crops
        ranks = self.layout.crop_ranks
        return -(-crops // ranks) * ranks / crops if crops else 1.0

    @property
    def seconds_of_stage(self) -> float:
        """From the first to the last step, evaluation and checkpoints not counted."""
        return self.time.total * self.config.train.steps


@dataclass(frozen=True)
class Change:
    """Settings that differ, and the plan with them."""

    settings: dict[str, object]
    plan: Plan

    @property
    def words(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.settings.items())


def plan(config: Config, cluster: Cluster, row: workload.Row) -> Plan:
    """The plan of a configuration. Raises ValueError, with the numbers, where settings and cluster do not fit."""
    rules.check(config, cluster.world)
    if config.train.precision == "fp8" and not cluster.gpu.fp8_flops:
        raise ValueError(f"train.precision=fp8: {cluster.gpu.name} has no FP8 arithmetic. Set train.precision=bf16.")
    return Plan(config, cluster, Layout.of(config, cluster.world), row)


def changed(config: Config, settings: dict[str, object]) -> Config:
    """The configuration with `section.key` settings replaced."""
    sections: dict[str, dict[str, object]] = {}
    for name, value in settings.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


def remedy(found: Plan) -> Change | None:
    """The change that makes a plan fit at the least cost in time; None where nothing tried is enough.

    One setting first; several only if no single one is enough.
    """
    single = [change for change in _valid(found, _single_changes(found.config)) if change.plan.fits]
    if not single:
        single = [change for change in _valid(found, _layouts(found)) if change.plan.fits]
    return min(single, key=lambda change: change.plan.time.total, default=None)


def ranked(found: Plan) -> list[Change]:
    """Every layout that the rules allow: those that fit by speed, then the others by memory."""
    changes = list(_valid(found, _layouts(found)))
    return sorted(changes, key=lambda c: (not c.plan.fits, c.plan.time.total if c.plan.fits else c.plan.peak))


def _single_changes(config: Config) -> Iterator[dict[str, object]]:
    p, micro = config.parallel, config.train.micro_batch
    for kind in RECOMPUTE[RECOMPUTE.index(config.train.recompute) + 1 :]:
        yield {"train.recompute": kind}
    if micro > 1:
        yield {"train.micro_batch": micro // 2}
        yield {"train.micro_batch": 1}
    if p.tensor > 1 and not p.sequence:
        yield {"parallel.sequence": True}
    for degree in DEGREES[1:]:
        if degree > p.tensor:
            yield {"parallel.tensor": degree, "parallel.sequence": True}
        if degree > p.context:
            yield {"parallel.context": degree}
        if degree > p.pipeline:
            yield {"parallel.pipeline": degree, "parallel.pipeline_layers": ()}


def _layouts(found: Plan) -> Iterator[dict[str, object]]:
    """Degrees whose tensor-parallel groups stay inside a node."""
    world, inside = found.cluster.world, found.cluster.per_node
    for tensor in DEGREES:
        for context in DEGREES:
            for pipeline in DEGREES:
                if world % (tensor * context * pipeline) or tensor > inside:
                    continue
                for micro in MICRO_BATCHES:
                    for kind in RECOMPUTE:
                        yield {
                            "parallel.tensor": tensor,
                            "parallel.sequence": tensor > 1,
                            "parallel.context": context,
                            "parallel.pipeline": pipeline,
                            "parallel.virtual_pipeline": 1,
                            "parallel.pipeline_layers": (),
                            "train.micro_batch": micro,
                            "train.recompute": kind,
                        }


def _valid(found: Plan, candidates: Iterator[dict[str, object]]) -> Iterator[Change]:
    for settings in candidates:
        config = changed(found.config, settings)
        try:
            yield Change(settings, plan(config, found.cluster, found.row))
        except ValueError:
            continue


def pipeline_layers(found: Plan) -> tuple[int, ...] | None:
    """Decoder layers per stage that balance the first stage's vision work; None where an even split is best."""
    pipeline = found.layout.pipeline
    layers = presets.architecture(found.config.model).language.layers
    if pipeline == 1 or found.layout.virtual_pipeline > 1:
        return None
    stage = found.time.stages[0]
    count = sum(chunk.layers for chunk in found.stages[0])
    layer = (stage.busy - stage.vision) / max(1, count)
    first = max(1, round((layers - (pipeline - 1) * stage.vision / layer) / pipeline)) if layer else layers
    best: Sequence[int] | None = None
    quickest = found.time.total
    for own in range(max(1, first - 2), first + 3):
        rest = layers - own
        if rest < pipeline - 1:
            continue
        each, more = divmod(rest, pipeline - 1)
        counts = (own, *(each + (index < more) for index in range(pipeline - 1)))
        total = plan(changed(found.config, {"parallel.pipeline_layers": counts}), found.cluster, found.row).time.total
        if total < quickest * 0.99:
            best, quickest = counts, total
    return tuple(best) if best else None
