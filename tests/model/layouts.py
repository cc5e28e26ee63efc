"""One training step's loss and gradients through Megatron's schedules, DDP and reductions, for any layout."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from megatron_vlm.batch import Batch
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.parallel.layout import Layout
from tests.model import tiny

#: Rows of the global batch, one per micro-batch.
ROWS = 4


def step(arch: Architecture, layout: Layout, parallel: dict, options: dict | None = None) -> dict[str, Any]:
    """Runs on every rank. `options`: further settings, see tiny.config; `quiet`: "all" rows as without_images makes
    them, or those with an "odd" number.

    Returns the sum of this rank's weighted losses and the parts of the gradients that this rank answers for:
    (checkpoint name, whole shape, offset, values), of components that train; and the initial weights likewise.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import context, groups

    groups.initialize(layout, seed=0, timeout_s=50)
    options = dict(options or {})
    quiet = options.pop("quiet", "")
    models = build(tiny.config(arch, parallel=parallel, **options), layout)
    with torch.no_grad():
        # Initial weights are so small that the image hardly counts; times 8, its gradients have the size of the others.
        for parameter in (parameter for model in models for parameter in model.parameters()):
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    weights = parts(models)
    at = layout.coordinates(dist.get_rank())
    rows = list(range(at.data, ROWS, layout.data))
    batches = [tiny.batch(arch, [number], layout.crop_rank(dist.get_rank()), layout.crop_ranks) for number in rows]
    if quiet:
        silent = [quiet == "all" or number % 2 == 1 for number in rows]
        batches = [without_images(batch) if each else batch for batch, each in zip(batches, silent, strict=True)]
    wrapped = [
        DistributedDataParallel(models[0].config, DistributedDataParallelConfig(), model, disable_bucketing=index > 0)
        for index, model in enumerate(models)
    ]
    models[0].config.finalize_model_grads_func = lambda models, *_, **__: finalize_model_grads(models, None)
    total = torch.zeros(())

    def forward_step(iterator, model):
        batch = next(iterator)
        output = model(batch)

        def loss(output):
            weighted = (output * context.chunk(batch.loss_weights, 1, groups.context())).sum()
            total.add_(weighted.detach())
            return weighted, torch.tensor(0, dtype=torch.int32), {}

        return output, loss

    iterators = [iter(batches) for _ in models]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=wrapped if len(models) > 1 else wrapped[0],
        num_microbatches=len(batches),
        seq_length=batches[0].tokens.shape[1],
        micro_batch_size=1,
        forward_only=False,
    )
    # All tensor-parallel ranks of the last stage have the same loss: one of them speaks.
    speaks = parallel_state.is_pipeline_last_stage(ignore_virtual=True) and at.tensor == 0
    with torch.no_grad():
        for model in models:
            for parameter in model.parameters():
                parameter.copy_(parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter))
    return {"loss": total.item() if speaks else 0.0, "gradients": parts(models), "weights": weights}


def step_with_flex(*args: Any) -> dict[str, Any]:
    """`step` with FlexAttention in the decoder. torch has its backward in plain operators, and refuses it on a CPU."""
    from torch.nn.attention import flex_attention

    from megatron_vlm.model import attention_kernels

    chosen = attention_kernels.AttentionKernels(images="flex", plain="flex")
    with (
        mock.patch.object(flex_attention, "_validate_device", lambda *_: None),
        mock.patch.object(attention_kernels, "of", lambda _: chosen),
    ):
        return step(*args)


def without_images(batch: Batch) -> Batch:
    """Rows without crops, and with losses in their first third only: some ranks have nothing to do."""
    weights = batch.loss_weights.clone()
    weights[:, batch.tokens.shape[1] // 3 :] = 0
    return dataclasses.replace(
        batch,
        tokens=batch.tokens.clamp(max=tiny.LANGUAGE.vocab_size - 1),
        is_vision=torch.zeros_like(batch.is_vision),
        loss_weights=weights,
        crops=batch.crops[:0],
        crop_counts=(0,) * len(batch.crop_counts),
        windows=batch.windows[:0],
    )


def parts(models: list) -> list[tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]]:
    """This rank's parts of all parameters, replicas included, as the checkpoint names them."""
    from megatron_vlm.model.state import shards

    return [
        (shard.key, tuple(shard.global_shape), tuple(shard.global_offset), shard.data.detach().clone())
        for shard in shards(models)
    ]


def assemble(ranks: list[dict[str, Any]], what: str) -> dict[str, torch.Tensor]:
    """Whole tensors by name from the parts of all ranks. Replicas must be equal."""
    whole: dict[str, torch.Tensor] = {}
    for found in ranks:
        for key, shape, start, values in found[what]:
            target = whole.setdefault(key, torch.full(shape, torch.nan))
            place = target[tuple(slice(a, a + n) for a, n in zip(start, values.shape, strict=True))]
            if not place.isnan().any():
                assert torch.equal(place, values), f"replicas of {key} differ by {(place - values).abs().max()}"
            place.copy_(values)
    assert not any(values.isnan().any() for values in whole.values())
    return whole


def by_module(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of each module (weight and bias together), flattened."""
    modules: dict[str, list[torch.Tensor]] = {}
    for name in sorted(gradients):
        modules.setdefault(name.rsplit(".", 1)[0], []).append(gradients[name].flatten())
    return {name: torch.cat(parts) for name, parts in modules.items()}


def worst(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest relative difference of a module's gradient, ||g - g'|| / ||g'||, and the module."""
    found, expected = by_module(found), by_module(expected)
    assert found.keys() == expected.keys()
    assert all(expected[name].any() or not values.any() for name, values in found.items()), "a frozen module's gradient"
    return max(
        ((found[name] - values).norm().item() / values.norm().item(), name)
        for name, values in expected.items()
        if values.any()  # frozen modules have none
    )
