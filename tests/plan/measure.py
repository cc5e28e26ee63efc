"""What tensors really occupy: every allocation that torch's dispatcher shows, and when it is freed."""

from __future__ import annotations

import dataclasses

import torch

from megatron_vlm.batch import Batch
from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.split import even_counts, offsets
from megatron_vlm.plan import memory, params
from megatron_vlm.plan.layers import Load
from megatron_vlm.plan.parts import Parts
from megatron_vlm.train.pretend import Meter


@dataclasses.dataclass(frozen=True)
class Measured:
    """Bytes over what was there before."""

    kept: int
    """Between forward and backward."""
    peak: int
    """At once, in forward and backward."""


def allocations(config: Config, layout: Layout, batch: Batch) -> Measured:
    """Forward and backward of one micro-batch on the only stage of this rank, inside Megatron's data parallelism.

    Process groups exist. What was there before: weights, gradient buffers, the batch, the plans of its rows, the
    tensor that sequence parallelism gathers into.
    """
    from megatron.core import parallel_state

    from megatron_vlm.model.build import build
    from megatron_vlm.train import optim

    (model,) = optim.wrap(build(config, layout), config)
    with torch.no_grad():
        model(batch)  # plans of the rows
    meter = Meter()
    for tensor in (*model.parameters(), *(getattr(batch, field.name) for field in dataclasses.fields(batch))):
        if isinstance(tensor, torch.Tensor):
            meter.known(tensor.data)
    for parameter in model.parameters():
        if parameter.requires_grad:
            meter.known(parameter.main_grad)
    for buffer in parallel_state.get_global_memory_buffer().buffer.values():
        meter.known(buffer)
    with meter:
        losses = model(batch)
        kept = meter.live
        losses.sum().backward()
    return Measured(kept, meter.peak)


def load_of(batch: Batch, layout: Layout, rank: int) -> Load:
    """What this batch asks of `rank`, for the plan."""
    at = layout.coordinates(rank)
    rows, length = batch.tokens.shape
    parts = even_counts(length, layout.context)
    start = offsets(parts)[at.context]
    weights = batch.loss_weights[:, start : start + parts[at.context]]
    most = max(batch.crop_counts)
    longest = max(int((row == example).sum()) for row in batch.examples for example in row.unique() if example >= 0)
    windows, slots = batch.windows.shape
    pooled = -(-windows * most // max(1, sum(batch.crop_counts)))
    return Load(
        rows, length, parts[at.context], batch.crop_counts[layout.crop_rank(rank)],
        pooled, pooled, slots, windows, int((weights != 0).sum()), longest, 0, -(-length // layout.key_ranks),
    )  # fmt: skip


def planned(config: Config, layout: Layout, load: Load) -> Measured:
    """The plan's numbers for the same."""
    arch = presets.architecture(config.model)
    parts = Parts(arch, memory.settings(config, layout, cuda=False), load, frozenset(config.model.freeze))
    stage = params.Stage(True, True, arch.language.layers)
    found = memory.activations(
        memory.segments(parts, stage, config.train.recompute), carried=memory.tied_gradient(config, stage, layout)
    )
    # Kept by the layers (marks: by recomputed ones); a plan counts them among the buffers.
    marks, angles = 5 * 8 * load.rows * load.length, parts.e * load.rows * load.part * arch.language.head_dim
    tables = angles + (0 if config.train.recompute == "none" else marks)
    return Measured(found.total + tables, found.peak + marks + angles)
