"""Weights and gradients of a model that is spread over ranks, in the names and places that checkpoints use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.model import state
from megatron_vlm.parallel import groups
from megatron_vlm.train import optim
from megatron_vlm.train.parity import Pieces


def weights(models: Sequence[Any]) -> Pieces:
    """This rank's part of every weight. `models`: as optim.wrap gives them."""
    return _pieces(models, lambda parameter: parameter.data)


def gradients(models: Sequence[Any], optimizer: Any) -> Pieces:
    """This rank's part of every gradient; zeros where a parameter does not train. Collective.

    Call it when the gradients are reduced and not yet clipped.
    """
    return _pieces(models, _whole_gradients(models, optimizer).get)


def _pieces(models: Iterable[Any], value: Callable[[torch.nn.Parameter], torch.Tensor | None]) -> Pieces:
    """Values of the parameters, cut as their checkpoint shards are: shown through the parameters for a moment."""
    bare = [model.module for model in models]
    kept = {}
    for parameter in (p for model in bare for p in model.parameters()):
        shown = value(parameter)
        kept[parameter] = parameter.data
        # In the parameter's dtype: data of another one would part it from the hooks that add up its gradient.
        parameter.data = torch.zeros_like(kept[parameter]) if shown is None else shown.to(kept[parameter], copy=True)
    pieces: Pieces = {}
    try:
        for shard in state.shards(bare):
            part = shard.data.detach().float().cpu().numpy().reshape(shard.local_shape).copy()
            pieces.setdefault(shard.key, (tuple(shard.global_shape), []))[1].append((tuple(shard.global_offset), part))
    finally:
        for parameter, old in kept.items():
            parameter.data = old
    return pieces


def _whole_gradients(models: Iterable[Any], optimizer: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """The distributed optimizer leaves each data-parallel rank a part of each gradient: put them together."""
    parts, whole = optim.own_parts(optimizer), {}
    for parameter in (p for model in models for p in model.parameters() if p.requires_grad):
        flat = torch.zeros(parameter.numel(), device=parameter.device)
        if parameter in parts:
            flat[parts[parameter]] = parameter.main_grad.view(-1)[parts[parameter]]
        dist.all_reduce(flat, group=groups.data_and_context())
        whole[parameter] = flat.view_as(parameter)
    return whole
