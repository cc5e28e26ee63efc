"""How far FP8 is from bf16, layer by layer: the same rows forward by both."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vlm.batch import Batch
from megatron_vlm.model.specs import DecoderLayer
from megatron_vlm.train.step import Stepper


def errors(stepper: Stepper, micro_batches: Sequence[Batch]) -> dict[str, float]:
    """||fp8 - bf16|| / ||bf16|| of what each decoder layer gives, all layers before it included. Collective.

    Of the first micro-batches of the step, as few as the schedule takes; nothing that trains is touched. bf16's outputs
    wait in host memory.
    """
    parallel = stepper.config.parallel
    few = micro_batches[: parallel.pipeline if parallel.virtual_pipeline > 1 else 1]
    modules = [module for model in stepper.models for module in model.modules()]
    layers = {module.layer_number - 1: module for module in modules if isinstance(module, DecoderLayer)}
    plain: dict[int, list[torch.Tensor]] = {number: [] for number in layers}
    with _in_bf16(modules), ExitStack() as hooks:
        for number, layer in layers.items():
            keep = plain[number].append
            hook = layer.register_forward_hook(lambda _, inputs, out, keep=keep: keep(out[0].cpu()))
            hooks.callback(hook.remove)
        stepper.evaluate(iter([few]))
    squares = torch.zeros(2, stepper.models[0].config.num_layers, dtype=torch.float64)
    with ExitStack() as hooks:
        for number, layer in layers.items():
            hook = layer.register_forward_hook(
                lambda _, inputs, out, number=number: _add(squares[:, number], out[0], plain[number].pop(0))
            )
            hooks.callback(hook.remove)
        stepper.evaluate(iter([few]))
    squares = squares.to(stepper.device)
    dist.all_reduce(squares)
    apart, norm = squares.sqrt().tolist()
    return {f"language.decoder.layers.{number}": a / b for number, (a, b) in enumerate(zip(apart, norm, strict=True))}


def _add(squares: torch.Tensor, found: torch.Tensor, plain: torch.Tensor) -> None:
    expected = plain.to(found.device).double()
    squares += torch.stack([(found.double() - expected).square().sum(), expected.square().sum()]).cpu()


@contextmanager
def _in_bf16(modules: Sequence[Any]) -> Iterator[None]:
    """Inside, Megatron opens no FP8 context."""
    configs = {id(config): config for config in (getattr(module, "config", None) for module in modules)}
    found = [(config, config.fp8) for config in configs.values() if isinstance(config, TransformerConfig)]
    try:
        for config, _ in found:
            config.fp8 = None
        yield
    finally:
        for config, fp8 in found:
            config.fp8 = fp8
