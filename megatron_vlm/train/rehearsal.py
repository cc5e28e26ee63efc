"""One training step of one rank at real sizes, without the other ranks, without a GPU and without numbers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_vlm.batch import PAD, PREFIX_BRANCH, Batch
from megatron_vlm.config import presets
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.split import even_counts, offsets
from megatron_vlm.plan import collectives, memory, workload
from megatron_vlm.plan.workload import Row
from megatron_vlm.train.pretend import Call, Pretend, rank_of


@dataclass(frozen=True)
class Rehearsal:
    """What a rank did and needed. Bytes."""

    calls: Counter[Call]
    """The collectives of the step."""
    static: int
    """Weights, gradient buffers and optimizer state."""
    peak: int
    """Most bytes at once during the step, batches included."""


def rehearse(
    config: Config, layout: Layout, rank: int, row: Row, say: Callable[[str], None] = lambda _: None
) -> Rehearsal:
    """Build what `rank` builds and run one step in which every row is `row`. say: hears what happens.

    Megatron must have been sent to the CPU. Raises what the trainer would raise.
    """
    with rank_of(layout, rank), Pretend() as pretend:
        from megatron_vlm.model.build import build
        from megatron_vlm.train import faults, optim
        from megatron_vlm.train.step import Stepper

        say("building")
        models = optim.wrap(build(config, layout), config)
        optimizer = optim.build(models, config)
        optimizer.prepare_grads()
        optimizer.step_with_ready_grads()  # makes the optimizer's state
        stepper = Stepper(models, optimizer, config, ["data"])
        static = pretend.live
        arch = presets.architecture(config.model)
        count = config.train.global_batch // (layout.data * config.train.micro_batch)
        own = 0  # crops that this rank encodes: only the first stage has the tower
        if layout.coordinates(rank).pipeline == 0:
            own = even_counts(config.train.micro_batch * row.crops, layout.crop_ranks)[layout.crop_rank(rank)]
        say(f"{count} micro-batches")
        batches = [_fake_crops(batch(arch, row, config.train.micro_batch, number, layout), own, pretend)
                   for number in range(count)]  # fmt: skip
        pretend.calls.clear()
        pretend.peak = pretend.live
        if config.data.bad_samples == "skip":
            faults.most(0, 0)
        stepper.train(batches, 1)
        return Rehearsal(pretend.calls, static, pretend.peak)


#: Kind, ranks of the group and bytes of a collective.
Key = tuple[str, int, int]


def compare(done: Rehearsal, config: Config, layout: Layout, rank: int, row: Row) -> tuple[Counter[Key], Counter[Key]]:
    """The collectives that were made and those that the plan expects; groups of one rank and receives left out."""
    found: Counter[Key] = Counter()
    for call, count in done.calls.items():
        if len(call.ranks) > 1 and call.kind != "receive" and call.size:
            found[call.kind, 2 if call.kind == "send" else len(call.ranks), call.size] += count
    expected: Counter[Key] = Counter()
    for each in planned(config, layout, rank, row):
        ranks = 2 if each.kind == "send" else collectives.group_shape(each.group, layout)[0]
        expected[each.kind, ranks, each.size] += each.count
    return found, expected


def planned(config: Config, layout: Layout, rank: int, row: Row) -> list[collectives.Collective]:
    """The collectives of a step by the plan."""
    settings = memory.settings(config, layout, cuda=False)
    return collectives.of_rank(config, layout, rank, settings, workload.load(row, config, layout, rank))


def _fake_crops(made: Batch, own: int, pretend: Pretend) -> Batch:
    """The batch with pixels that have a size only."""
    shape = (own, *made.crops.shape[1:])
    with pretend.fake:
        return dataclasses.replace(made, crops=torch.empty(shape, dtype=torch.uint8))


def batch(arch: Architecture, row: Row, rows: int, number: int, layout: Layout) -> Batch:
    """Micro-batch `number` of such rows, without crops."""
    tokens, examples, vision = _tokens(arch, row)
    weights = torch.zeros(row.tokens, dtype=torch.int64)
    parts = even_counts(row.tokens, layout.context)
    for start, chosen in zip(offsets(parts), even_counts(row.loss_tokens, layout.context), strict=False):
        weights[start : start + chosen] = 1
    whole = {
        "tokens": tokens,
        "targets": torch.zeros_like(tokens),
        "loss_weights": weights.float(),  # from integers: real (see pretend.py)
        "positions": torch.arange(row.tokens),
        "examples": examples,
        "branches": torch.full_like(examples, PREFIX_BRANCH),
        "is_vision": vision,
        "sources": torch.zeros_like(examples),
    }
    return Batch(
        **{name: tensor.expand(rows, -1).contiguous() for name, tensor in whole.items()},
        crops=torch.empty(0, arch.vision.patches, arch.vision.patch_values, dtype=torch.uint8),
        crop_counts=even_counts(rows * row.crops, layout.crop_ranks),
        windows=_windows(arch, row, rows),
        rows=torch.arange(rows) + number * rows,
    )


def _tokens(arch: Architecture, row: Row) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, example numbers and image marks of one row: each example begins with its image block."""
    tokens = torch.zeros(row.tokens, dtype=torch.int64)
    examples = torch.full((row.tokens,), PAD, dtype=torch.int32)
    vision = torch.zeros(row.tokens, dtype=torch.bool)
    placeholders = row.windows * max(1, arch.connector.queries)
    start = 0
    for number, (length, images, patches) in enumerate(
        zip(*(even_counts(n, row.examples) for n in (row.tokens, row.image_tokens, placeholders)), strict=True)
    ):
        examples[start : start + length] = number
        vision[start : start + images] = True
        tokens[start : start + images] = arch.token_id("<im_col>")
        tokens[start : start + patches] = arch.token_id("<im_patch>")
        start += length
    return tokens, examples, vision


def _windows(arch: Architecture, row: Row, rows: int) -> torch.Tensor:
    """(n, w) patches of each window, every crop's windows within the crop."""
    crops = rows * row.crops
    found = []
    for crop, windows in enumerate(even_counts(rows * row.windows, max(1, crops))):
        inside = torch.arange(windows * row.slots) % arch.vision.patches
        found.append(inside.view(windows, row.slots) + crop * arch.vision.patches)
    return torch.cat(found) if crops else torch.empty(0, 1, dtype=torch.int64)
