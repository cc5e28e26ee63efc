"""A plan as a page of text with bars, and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_vlm.config.schema import Config
from megatron_vlm.plan import sweep
from megatron_vlm.plan.collectives import Collective, group_shape
from megatron_vlm.plan.hardware import FRAGMENTATION, GIB, RESERVED
from megatron_vlm.plan.memory import Memory
from megatron_vlm.plan.sweep import Change, Plan

#: Bytes of a stored image, and seconds of one core to decode it, resize it and cut it into crops: a photograph of about
#: a megapixel as JPEG. Frames of a video cost about the same (seeking included).
IMAGE_BYTES, IMAGE_CORE_S = 200_000, 0.012

BOUNDS = {
    "arithmetic": "matrix products",
    "memory": "GPU memory: norms, activations and other element-wise work",
    "exchange": "tensor and context parallel exchange",
    "bubble": "the pipeline bubble and uneven stages",
    "reduce": "gradient reduction between data-parallel ranks",
    "optimizer": "the optimizer",
}


def data(plan: Plan) -> dict[str, Any]:
    """Everything that a plan says, as plain values for JSON. Bytes, seconds."""
    time = plan.time
    return {
        "fits": plan.fits,
        "gpu": plan.cluster.gpu.name,
        "nodes": plan.cluster.nodes,
        "gpus_per_node": plan.cluster.per_node,
        "layout": {"data": plan.layout.data, **dataclasses.asdict(plan.layout)},
        "row": {**dataclasses.asdict(plan.row), "pairs": plan.row.pairs},
        "usable_bytes": plan.cluster.usable,
        "peak_bytes": plan.peak,
        "stages": [
            {
                "layers": [chunk.layers for chunk in chunks],
                "parameter_bytes": memory.static.parameters,
                "gradient_bytes": memory.static.gradients,
                "optimizer_bytes": memory.static.optimizer,
                "activation_bytes": memory.activations,
                "micro_batches_in_flight": memory.in_flight,
                "working_bytes": memory.working,
                "buffer_bytes": memory.buffers,
                "peak_bytes": memory.peak,
                "vision_s": stage.vision,
                "language_s": stage.language,
                "exchange_s": stage.exchange,
                "send_s": stage.send,
                "collectives": [dataclasses.asdict(each) for each in talks(plan, index)],
            }
            for index, (chunks, memory, stage) in enumerate(zip(plan.stages, plan.memory, time.stages, strict=True))
        ],
        "micro_batches": time.micro_batches,
        "model_flops": time.flops,
        "step_s": time.total,
        "step_s_by_cause": time.shares,
        "bound": time.bound,
        "mfu": time.mfu,
        "days": plan.seconds_of_stage / 86_400,
        "vision_imbalance": plan.imbalance,
        "reading": reading(plan),
    }


def talks(plan: Plan, stage: int) -> list[Collective]:
    """The collectives of the first rank of a stage."""
    return plan.talks(stage * plan.layout.world // plan.layout.pipeline)


def reading(plan: Plan) -> dict[str, float]:
    """What data loading has to keep up with, all ranks together, and cores per GPU of the first stage."""
    crops_per_image = 1 + plan.config.data.image_crops if not plan.row.video else 1
    images = plan.row.crops / crops_per_image * plan.config.train.global_batch / plan.time.total
    # Ranks that share an image's crops each decode it: about one image in excess at each border.
    readers = plan.layout.world // plan.layout.pipeline
    borders = (plan.layout.crop_ranks - 1) * plan.time.micro_batches * plan.layout.data / plan.time.total
    decoded = images + (borders if crops_per_image > 1 else 0.0)
    return {
        "images_per_s": images,
        "bytes_per_s": decoded * IMAGE_BYTES,
        "cores_per_gpu": decoded * IMAGE_CORE_S / readers,
    }


def page(plan: Plan, console: Console, change: Change | None = None) -> None:
    """Print a plan. change: what to do if it does not fit."""
    for part in _parts(plan, change):
        console.print(part)


def _parts(plan: Plan, change: Change | None) -> list[RenderableType]:
    config, cluster, layout, time = plan.config, plan.cluster, plan.layout, plan.time
    row = plan.row
    head = (
        f"{config.run.name}: {config.model.preset} on {cluster.nodes} x {cluster.per_node} {cluster.gpu.name}\n"
        f"layout: tensor {layout.tensor}{' with sequence' if config.parallel.sequence and layout.tensor > 1 else ''}, "
        f"context {layout.context}, pipeline {layout.pipeline} x {layout.virtual_pipeline}, data {layout.data}; "
        f"{_precision(config)}, recompute {config.train.recompute}; {config.train.global_batch} rows a step "
        f"in {time.micro_batches} micro-batches of {config.train.micro_batch}\n"
        f"row: {row.tokens:,} tokens, {row.crops} {'frames' if row.video else 'crops'} ({row.image_tokens:,} image "
        f"tokens), {row.loss_tokens:,} tokens with a loss, {row.examples} example(s)\n"
    )
    return [Text(head), _memory_table(plan), _bars(plan), _time_text(plan), _talk_table(plan), _verdict(plan, change)]


def _precision(config: Config) -> str:
    if config.train.precision != "fp8":
        return config.train.precision
    return f"fp8 {config.fp8.recipe} (memory as for bf16, without 8-bit copies of weights; MFU of the bf16 peak)"


def _gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def _memory_table(plan: Plan) -> Table:
    table = Table(title="Memory of a rank, GiB", title_justify="left", box=None, pad_edge=False)
    for name in ("stage", "layers", "weights", "gradients", "optimizer", "vision", "connector", "decoder", "head",
                 "in flight", "working", "buffers", "peak", "of"):  # fmt: skip
        table.add_column(name, justify="right")
    for index, (chunks, memory) in enumerate(zip(plan.stages, plan.memory, strict=True)):
        static = memory.static
        table.add_row(
            str(index),
            "+".join(str(chunk.layers) for chunk in chunks),
            *(_gib(size) for size in (static.parameters, static.gradients, static.optimizer)),
            *(_gib(memory.activations.get(part, 0)) for part in ("vision", "connector", "decoder", "head")),
            str(memory.in_flight),
            *(_gib(size) for size in (memory.working, memory.buffers, memory.peak, plan.cluster.usable)),
        )
    return table


def _bars(plan: Plan) -> Group:
    """One bar per stage: its peak against the device."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column()
    for index, memory in enumerate(plan.memory):
        for name, begin, end in _pieces(memory):
            label = f"stage {index}" if name == "weights" else ""
            color = "red" if memory.peak > plan.cluster.usable else "green"
            size = max(plan.cluster.usable, plan.peak)
            table.add_row(f"{label:8} {name:11}", Bar(size, begin, end, width=60, color=color))
    return Group(Text(""), table)


def _pieces(memory: Memory) -> list[tuple[str, int, int]]:
    """Parts of the peak with their beginning and end on the bar."""
    sizes = {
        "weights": memory.static.parameters,
        "gradients": memory.static.gradients,
        "optimizer": memory.static.optimizer,
        "activations": sum(memory.activations.values()),
        "working": memory.working + memory.buffers,
    }
    found, at = [], 0
    for name, size in sizes.items():
        found.append((name, at, at + size))
        at += size
    return found


def _time_text(plan: Plan) -> Text:
    time, need = plan.time, reading(plan)
    shares = ", ".join(f"{name} {seconds / time.total:.0%}" for name, seconds in time.shares.items() if seconds)
    stages = " ".join(f"{stage.busy * 1000:,.0f}" for stage in time.stages)
    tokens = plan.config.train.global_batch * plan.row.tokens / time.total
    lines = [
        "",
        f"Step {time.total:.2f} s ({shares}); {tokens:,.0f} tokens/s; {time.flops / 1e15:.2f} PFLOP; "
        f"MFU {time.mfu:.1%}; {plan.config.train.steps:,} steps take {plan.seconds_of_stage / 86_400:.1f} days.",
        f"Bounded by {BOUNDS[time.bound]}. A micro-batch takes {stages} ms per stage"
        + (f", of which vision {time.stages[0].vision * 1000:,.0f}." if time.stages[0].vision else "."),
        f"Crops: the fullest rank has {plan.imbalance:.2f} times the mean. Reading: {need['images_per_s']:,.0f} "
        f"images/s, {need['bytes_per_s'] / 1e9:.2f} GB/s, {need['cores_per_gpu']:.1f} cores a GPU to decode.",
    ]
    return Text("\n".join(lines))


def _talk_table(plan: Plan) -> Group:
    table = Table(title="Moved in a step by the first rank of each stage", title_justify="left", box=None,
                  pad_edge=False)  # fmt: skip
    for name in ("stage", "what", "kind", "group", "ranks", "calls", "GiB"):
        table.add_column(name, justify="left" if name in ("what", "kind", "group") else "right")
    for stage in range(plan.layout.pipeline):
        for talk in talks(plan, stage):
            if talk.bytes < 1_000_000:
                continue
            ranks = str(group_shape(talk.group, plan.layout)[0])
            table.add_row(str(stage), talk.what, talk.kind, talk.group, ranks, f"{talk.count:,}", _gib(talk.bytes))
    return Group(Text(""), table if table.row_count else Text("One rank: nothing is moved."))


def _verdict(plan: Plan, change: Change | None) -> Text:
    usable, gpu = plan.cluster.usable, plan.cluster.gpu
    spare = (
        f"{_gib(usable)} GiB are for tensors: {_gib(gpu.memory)} of the device without {_gib(RESERVED)} for CUDA, NCCL "
        f"and libraries, and {FRAGMENTATION:.0%} lost between blocks."
    )
    if plan.fits:
        advice = ""
        counts = sweep.pipeline_layers(plan)
        if counts:
            advice = f" The first stage also has the tower: parallel.pipeline_layers={list(counts)} is faster."
        return Text(f"\nFits: {_gib(plan.peak)} GiB of {_gib(usable)}. {spare}{advice}")
    worst = max(range(len(plan.memory)), key=lambda index: plan.memory[index].peak)
    text = f"\nDoes not fit: stage {worst} needs {_gib(plan.peak)} GiB of {_gib(usable)}. {spare}\n"
    if change is None:
        return Text(
            text + "No change of layout, recompute or micro-batch that was tried is enough: more or larger GPUs."
        )
    return Text(
        text + f"Cheapest change: {change.words} ({_gib(change.plan.peak)} GiB, {change.plan.time.total:.2f} s a step "
        f"instead of {plan.time.total:.2f})."
    )


def ranking(changes: Sequence[Change], console: Console, most: int = 20) -> None:
    """Print the layouts of a sweep, the best first."""
    table = Table(title=f"{len(changes)} layouts, the best {min(most, len(changes))}", title_justify="left", box=None,
                  pad_edge=False)  # fmt: skip
    for name in ("tensor", "context", "pipeline", "data", "micro", "recompute", "peak GiB", "step s", "MFU", "days",
                 "bound by", ""):  # fmt: skip
        table.add_column(name, justify="left" if name in ("recompute", "bound by") else "right")
    for change in changes[:most]:
        plan = change.plan
        layout, time = plan.layout, plan.time
        table.add_row(
            *(str(degree) for degree in (layout.tensor, layout.context, layout.pipeline, layout.data)),
            str(plan.config.train.micro_batch),
            plan.config.train.recompute,
            _gib(plan.peak),
            f"{time.total:.2f}",
            f"{time.mfu:.1%}",
            f"{plan.seconds_of_stage / 86_400:.1f}",
            time.bound,
            "" if plan.fits else "too large",
        )
    console.print(table)


def ranking_data(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """The same for JSON."""
    return [
        {
            "settings": {name: list(v) if isinstance(v, tuple) else v for name, v in change.settings.items()},
            "fits": change.plan.fits,
            "peak_bytes": change.plan.peak,
            "step_s": change.plan.time.total,
            "mfu": change.plan.time.mfu,
            "bound": change.plan.time.bound,
        }
        for change in changes
    ]
