"""The scales of fp8.recipe=delayed as plain tensors.

Transformer Engine scales a tensor by what it has seen in the steps before, and keeps that in each linear layer:
`scale` [tensors] and `amax_history` [steps, tensors], float32, for input, weight and output ("fwd") and for the
gradients ("bwd"). It saves them as a pickle, which no checkpoint of ours may hold. Between steps they are the same on
all ranks of a pipeline stage: largest values are exchanged before every update.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context

from megatron_vlm.model.specs import DecoderLayer


def delayed(models: Iterable[Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, state) of every decoder layer with delayed scaling in these models; the state itself, not a copy.

    Names are those of the layers in checkpoints, whatever the layout. A layer that has not computed yet gets the state
    that it would begin with.
    """
    for model in models:
        for layer in (module for module in model.modules() if isinstance(module, DecoderLayer)):
            config = layer.config
            if not config.fp8 or config.fp8_recipe != "delayed":
                continue
            for name, module in layer.named_modules():
                if not hasattr(module, "init_fp8_metadata"):
                    continue
                if not module.fp8_meta_tensors_initialized:
                    with torch.no_grad(), get_fp8_context(config):  # with gradients, its end would update scales
                        module.init_fp8_metadata()
                for way in ("fwd", "bwd"):
                    state = module.fp8_meta[f"scaling_{way}"]
                    place = f"language.decoder.layers.{layer.layer_number - 1}.{name}.{way}"
                    yield f"{place}.scale", state.scale
                    yield f"{place}.amax_history", state.amax_history


def begin(models: Iterable[Any]) -> None:
    """Back to the state before the first step."""
    for name, state in delayed(models):
        state.fill_(1 if name.endswith(".scale") else 0)


def forget_unused(models: Iterable[Any]) -> None:
    """After a forward pass without gradients: drop the largest values that it saw, from which the next step would take
    its scales. The newest line of a history is zero between steps."""
    for name, state in delayed(models):
        if name.endswith(".amax_history"):
            state[0].zero_()
