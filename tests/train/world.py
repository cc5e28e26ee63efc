"""Real training steps on a small world of data, on the ranks of a pool; gradients in checkpoint names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_vlm.config import presets
from megatron_vlm.config.schema import ComponentOptimConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from megatron_vlm.data.loader import Loader
from megatron_vlm.parallel.layout import Layout
from tests.data import world as data

#: Key -> (global shape, [(global offset, values)]).
Pieces = dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], np.ndarray]]]]


def config(folder: Path, *, freeze: tuple[str, ...] = ("base_embeddings",), **parallel: Any) -> Config:
    """Settings over the files of `data.build(folder)`: short rows, rates that move all components."""
    component = ComponentOptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=2)
    settings = data.config(folder, sequence_length=192, max_crops=8, image_crops=2, window=32)
    return dataclasses.replace(
        settings,
        model=ModelConfig(freeze=freeze),
        parallel=ParallelConfig(**parallel),
        optim=OptimConfig(vision=component, connector=component, language=component, weight_decay=0.1),
        train=dataclasses.replace(settings.train, steps=10),
    )


def stepper(settings: Config) -> tuple[Any, Loader]:
    """The stepper and the loader of this rank, Megatron's groups made."""
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups
    from megatron_vlm.train import loop, optim
    from megatron_vlm.train.step import Stepper

    layout = Layout.of(settings.parallel, dist.get_world_size())
    groups.initialize(layout, seed=settings.train.seed, timeout_s=30)
    loader = Loader(settings, presets.architecture(settings.model), loop._share(layout))
    models = optim.wrap(build(settings, layout), settings)
    return Stepper(models, optim.build(models, settings), settings, loader.sources), loader


def steps(settings: Config, record: tuple[int, ...] = ()) -> dict[str, Any]:
    """Train `settings.train.steps` steps; losses, norms and, after the steps in `record`, gradients before clipping."""
    from megatron_vlm.train import optim

    trainer, loader = stepper(settings)
    clip, found = optim.clip, {}

    def watched_clip(optimizer: Any, clip_norm: float) -> dict[str, float]:
        if step in record:
            found[step] = gradients(trainer.models, optimizer)
        return clip(optimizer, clip_norm)

    optim.clip = watched_clip
    outcomes = []
    try:
        batches = iter(loader)
        for step in range(1, settings.train.steps + 1):  # noqa: B007 (watched_clip reads it)
            outcomes.append(trainer.train(next(batches).micro_batches, step))
    finally:
        optim.clip = clip
        loader.close()
    return {
        "losses": [outcome.loss for outcome in outcomes],
        "by_source": [outcome.losses for outcome in outcomes],
        "norms": [outcome.norms for outcome in outcomes],
        "gradients": found,
    }


def gradients(models: list[Any], optimizer: Any) -> Pieces:
    """This rank's part of every gradient, in the names and places that checkpoints use."""
    return _pieces(models, _whole_gradients(models, optimizer))


def weights(models: list[Any]) -> Pieces:
    """The same of the weights."""
    return _pieces(models, lambda parameter: parameter.data)


def _pieces(models: list[Any], value: Callable[[torch.nn.Parameter], torch.Tensor | None]) -> Pieces:
    """Values of the parameters, cut as their checkpoint shards are: shown through the parameters for a moment."""
    from megatron_vlm.model import state

    bare = [model.module for model in models]
    kept = {}
    for parameter in (p for model in bare for p in model.parameters()):
        shown = value(parameter)
        kept[parameter] = parameter.data
        parameter.data = torch.zeros_like(parameter.data) if shown is None else shown.clone()
    pieces: Pieces = {}
    for shard in state.shards(bare):
        part = shard.data.detach().numpy().reshape(shard.local_shape).copy()
        pieces.setdefault(shard.key, (shard.global_shape, []))[1].append((shard.global_offset, part))
    for parameter, old in kept.items():
        parameter.data = old
    return pieces


def _whole_gradients(models: list[Any], optimizer: Any) -> Callable[[torch.nn.Parameter], torch.Tensor | None]:
    """The distributed optimizer leaves each data-parallel rank a part of each gradient: put them together."""
    from megatron_vlm.parallel import groups

    (sharded,) = optimizer.chained_optimizers
    whole = {}
    for parameter in (p for model in models for p in model.parameters() if p.requires_grad):
        flat = torch.zeros(parameter.numel())
        if parameter in sharded.model_param_gbuf_map:
            try:
                part = sharded._get_model_param_range_map(parameter)["param"]
                flat[part.start : part.end] = parameter.main_grad.view(-1)[part.start : part.end]
            except KeyError:
                pass  # all of it belongs to other ranks
        dist.all_reduce(flat, group=groups.data_and_context())
        whole[parameter] = flat.view_as(parameter)
    return whole.get


def assemble(by_rank: list[Pieces]) -> dict[str, np.ndarray]:
    """Whole tensors by checkpoint name from the parts of all ranks; copies must agree."""
    whole: dict[str, np.ndarray] = {}
    for pieces in by_rank:
        for key, (shape, parts) in pieces.items():
            target = whole.setdefault(key, np.full(shape, np.nan, np.float32))
            for offset, part in parts:
                place = tuple(slice(start, start + size) for start, size in zip(offset, part.shape, strict=True))
                before = target[place]
                assert np.isnan(before).all() or np.allclose(before, part, rtol=1e-4, atol=1e-7), (
                    f"{key}: copies differ"
                )
                target[place] = part
    assert not any(np.isnan(tensor).any() for tensor in whole.values()), "a part is missing"
    return whole


def by_module(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One vector per module: its parameters one after the other."""
    modules: dict[str, list[np.ndarray]] = {}
    for key in sorted(tensors):
        modules.setdefault(key.rsplit(".", 1)[0], []).append(tensors[key].ravel())
    return {name: np.concatenate(parts) for name, parts in modules.items()}
