"""What is kept of a step that a guard stopped at: token losses, and gradient norms per module. Collective."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate

from megatron_vlm.model.build import component_of
from megatron_vlm.parallel import groups
from megatron_vlm.train import optim


@dataclass(frozen=True)
class Seen:
    """One micro-batch on a rank of the last pipeline stage. s_local = this context rank's part of the row."""

    rows: torch.Tensor
    """(b,) int64."""
    losses: torch.Tensor
    """(b, s_local) float32, unweighted."""
    weights: torch.Tensor
    """(b, s_local) float32."""


@dataclass(frozen=True)
class Evidence:
    """The whole global batch."""

    rows: np.ndarray
    """(n,) int64, rising: numbers of the rows in the run's order."""
    losses: np.ndarray
    """(n, s) float32."""
    weights: np.ndarray
    """(n, s) float32."""
    norms: dict[str, float]
    """Gradient norm of each module that holds parameters, before clipping."""


def gather(
    seen: Sequence[Seen],
    models: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scales: dict[str, float],
) -> Evidence:
    """Put together what the ranks have of the last step, on every rank.

    scales: what clipping has multiplied the gradients by, as `optim.clip_scales` gives it.
    """
    mine = []
    if dist.get_rank(groups.tensor()) == 0:
        place = dist.get_rank(groups.context())
        mine = [(place, *(x.cpu().numpy() for x in (one.rows, one.losses, one.weights))) for one in seen]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (mine, _squares(models, optimizer, scales)))
    parts: dict[int, dict[int, tuple[np.ndarray, np.ndarray]]] = defaultdict(dict)
    squares: dict[str, float] = defaultdict(float)
    for batches, share in everywhere:
        for place, rows, losses, weights in batches:
            for row, loss, weight in zip(rows.tolist(), losses, weights, strict=True):
                parts[row][place] = (loss, weight)
        for name, square in share.items():
            squares[name] += square
    rows = sorted(parts)
    whole = [[np.concatenate([parts[row][place][i] for place in sorted(parts[row])]) for row in rows] for i in (0, 1)]
    norms = {name: math.sqrt(square) for name, square in squares.items()}
    return Evidence(np.array(rows, np.int64), np.stack(whole[0]), np.stack(whole[1]), norms)


def module_norms(
    models: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, scales: dict[str, float]
) -> dict[str, dict[str, float]]:
    """`gradients` (before clipping, as in `gather`) and `parameters`: norm of each module that trains. Collective."""
    everywhere: list[Any] = [None] * dist.get_world_size()
    mine = [_squares(models, optimizer, scales), _squares(models, optimizer, scales, of_parameters=True)]
    dist.all_gather_object(everywhere, mine)
    found = {}
    for index, kind in enumerate(("gradients", "parameters")):
        sums: dict[str, float] = defaultdict(float)
        for share in everywhere:
            for name, square in share[index].items():
                sums[name] += square
        found[kind] = {name: math.sqrt(square) for name, square in sums.items()}
    return found


def _squares(
    models: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scales: dict[str, float],
    *,
    of_parameters: bool = False,
) -> dict[str, float]:
    """Squared gradient norm of each module, of the part that this rank keeps; parts of all ranks add up.

    of_parameters: the norm of the weights instead.
    """
    squares: dict[str, float] = defaultdict(float)
    parts = optim.own_parts(optimizer)
    for model in models:
        names = _global_names(model)
        for name, parameter in model.named_parameters():
            if parameter not in parts or getattr(parameter, "shared", False):
                continue
            if not param_is_not_tensor_parallel_duplicate(parameter, groups.tensor()):
                continue
            scale = 1.0 if of_parameters else scales[component_of(name.removeprefix("module."))]
            whole = parameter.detach() if of_parameters else parameter.main_grad
            numbers = whole.view(-1)[parts[parameter]]
            module = name.rsplit(".", 1)[0]
            for local, globally in names:
                if module == local or module.startswith(f"{local}."):
                    module = globally + module[len(local) :]
                    break
            squares[module.removeprefix("module.")] += numbers.double().square().sum().item() / scale**2
    return dict(squares)


def _global_names(model: torch.nn.Module) -> list[tuple[str, str]]:
    """Names of transformer layers here, which count from 0 in each pipeline stage, and over the whole model."""
    found = []
    for name, module in model.named_modules():
        parent, _, last = name.rpartition(".")
        if last.isdigit() and hasattr(module, "layer_number"):
            found.append((name, f"{parent}.{module.layer_number - 1}"))
    return found
