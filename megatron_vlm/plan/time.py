"""How long a step takes, by roofline: every operator by arithmetic or memory, every collective by its wire. Seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_vlm import cost
from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan import memory, params, workload
from megatron_vlm.plan.collectives import Collective, group_shape, of_rank
from megatron_vlm.plan.hardware import Cluster
from megatron_vlm.plan.parts import Parts

#: Collectives that run between micro-batches, so that a pipeline can hide nothing of them.
PER_STEP = ("data", "weights", "world", "embedding")

#: Share of a micro-batch's time that its backward pass takes.
BACKWARD = 2 / 3


@dataclass(frozen=True)
class StageTime:
    """One micro-batch on one pipeline stage."""

    vision: float
    language: float
    """Connector, decoder and head."""
    exchange: float
    """Collectives of tensor and context parallelism, waited for."""
    send: float
    """To and from the neighbours; the steady state of a pipeline hides it."""
    arithmetic: float
    """The part of vision and language that arithmetic bounds; memory bounds the rest."""

    @property
    def busy(self) -> float:
        return self.vision + self.language + self.exchange


@dataclass(frozen=True)
class StepTime:
    """One optimizer step."""

    stages: tuple[StageTime, ...]
    micro_batches: int
    bubble: float
    reduce: float
    """Gradients and weights between data-parallel ranks, beyond what the backward pass hides."""
    optimizer: float
    mfu: float
    flops: int
    """Of the model, all ranks, recomputation not counted."""

    @property
    def slowest(self) -> StageTime:
        return max(self.stages, key=lambda stage: stage.busy)

    @property
    def total(self) -> float:
        return self.micro_batches * self.slowest.busy + self.bubble + self.reduce + self.optimizer

    @property
    def shares(self) -> dict[str, float]:
        """Seconds by what they are spent on, of the slowest stage; they add up to the total."""
        stage, m = self.slowest, self.micro_batches
        return {
            "arithmetic": m * stage.arithmetic,
            "memory": m * (stage.vision + stage.language - stage.arithmetic),
            "exchange": m * stage.exchange,
            "bubble": self.bubble,
            "reduce": self.reduce,
            "optimizer": self.optimizer,
        }

    @property
    def bound(self) -> str:
        """The largest share."""
        return max(self.shares, key=lambda name: self.shares[name])


def step(config: Config, layout: Layout, cluster: Cluster, row: workload.Row) -> StepTime:
    """The time of a step in which every row is `row`."""
    arch = presets.architecture(config.model)
    load = workload.load(row, config, layout)
    settings = memory.settings(config, layout, cuda=True)
    parts = Parts(arch, settings, load, frozenset(config.model.freeze))
    micro_batches = config.train.global_batch // (layout.data * config.train.micro_batch)
    bucket = params.bucket_numbers(config.parallel, layout.data, layout.data * layout.context, cuda=True)
    stages: list[StageTime] = []
    reduce = 0.0
    for index, chunks in enumerate(params.stages(arch, layout, config.parallel.pipeline_layers)):
        rank = index * layout.tensor * layout.context * layout.data
        talks = of_rank(config, layout, rank, settings, load)
        stages.append(_stage(config, layout, cluster, parts, chunks, talks, micro_batches))
        once = [talk for talk in talks if talk.group in PER_STEP or talk.what.startswith("gradients of")]
        sums = [_seconds([talk], layout, cluster) for talk in once if talk.what == "gradients"]
        reduce = max(reduce, _seconds(once, layout, cluster) - _hidden(sums, stages) * (bucket is not None))
    slowest = max(stage.busy for stage in stages)
    others = sum(stage.busy for stage in stages) - slowest + sum(stage.send for stage in stages)
    stage_ranks = range(0, layout.world, layout.world // layout.pipeline)
    held = max((memory.static(config, layout, r, cuda=True) for r in stage_ranks), key=lambda static: static.optimizer)
    # Gradient, moments and weight read, moments and weights written; torch's AdamW passes over them several times.
    touched = 3 * held.optimizer + held.gradients * 2
    flops = cost.training(arch, workload.work(row, config.train.global_batch), config.model.freeze)
    found = StepTime(
        tuple(stages),
        micro_batches,
        others / layout.virtual_pipeline,
        reduce,
        touched / (cluster.gpu.bandwidth * cluster.reach.memory),
        0.0,
        flops,
    )
    peak = cluster.gpu.flops if config.train.precision != "float32" else cluster.gpu.float32_flops
    return replace(found, mfu=flops / (found.total * cluster.world * peak))


def _stage(
    config: Config,
    layout: Layout,
    cluster: Cluster,
    parts: Parts,
    chunks: Sequence[params.Stage],
    talks: Sequence[Collective],
    micro_batches: int,
) -> StageTime:
    spent = {"vision": 0.0, "language": 0.0}
    arithmetic = 0.0
    precision = "float32" if config.train.precision == "float32" else "bf16"
    for chunk in chunks:
        for segment in memory.segments(parts, chunk, config.train.recompute):
            profile = segment.profile
            work = profile.forward_work + (profile.backward_work if profile.trains else ())
            name = "vision" if segment.name == "vision" else "language"
            share = _fp8_share(config, segment.name, chunk)
            for flops, moved, cast in work:
                for part, kind in ((share, "fp8"), (1 - share, precision)) if cast else ((1.0, precision),):
                    if part:
                        seconds = part * segment.count * cluster.seconds(flops, moved, kind)
                        spent[name] += seconds
                        if flops and cluster.seconds(flops, 0, kind) >= cluster.seconds(0, moved, kind):
                            arithmetic += seconds
                spent[name] += share * segment.count * cluster.seconds(0, _CASTS[config.fp8.recipe] * cast, precision)
    exchanged = [talk for talk in talks if talk.group in ("tensor", "heads", "keys", "crops")]
    exchanged = [talk for talk in exchanged if not talk.what.startswith("gradients of")]
    sent = [talk for talk in talks if talk.kind == "send" and talk.group == "pipeline"]
    return StageTime(
        spent["vision"],
        spent["language"],
        _seconds(exchanged, layout, cluster) / micro_batches,
        _seconds(sent, layout, cluster) / micro_batches,
        arithmetic,
    )


def _hidden(sums: Sequence[float], stages: Sequence[StageTime]) -> float:
    """Seconds that the sums of gradients of the last of `stages` take while a backward pass runs.

    The first stage's last bucket starts when all is over. Others are ready while the stages before still go back.
    """
    first, *_ = stages
    going = sum(stage.busy for stage in stages[:-1] or (first,)) * BACKWARD
    return min(going, sum(sums[:-1]) if len(stages) == 1 else sum(sums))


#: Passes over a bf16 operand (2 bytes a number) before its product in FP8: read once, and written in 8 bits along rows
#: and along columns; tensorwise reads it before that for its largest number.
_CASTS = {"tensorwise": 3, "delayed": 2, "blockwise": 2, "mxfp8": 2}


def _fp8_share(config: Config, segment: str, chunk: params.Stage) -> float:
    """Share of the linear layers of a segment that are computed in FP8."""
    fp8, component = config.fp8, {"vision": "vision", "decoder": "language"}.get(segment)
    if config.train.precision != "fp8" or component not in fp8.components:
        return 0.0
    if component == "vision":
        return 1.0
    kept = fp8.first_layers_bf16 * chunk.first + fp8.last_layers_bf16 * chunk.last
    return (chunk.layers - kept) / chunk.layers if chunk.layers else 0.0


def _seconds(talks: Sequence[Collective], layout: Layout, cluster: Cluster) -> float:
    found = 0.0
    for talk in talks:
        ranks, stride = group_shape(talk.group, layout)
        if talk.kind == "send":
            ranks = 2
        found += talk.count * cluster.transfer(talk.kind, talk.size, ranks, stride)
    return found
