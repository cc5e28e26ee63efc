"""Real training steps on a small world of data, on the ranks of a pool; gradients in checkpoint names."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_vlm.config import presets
from megatron_vlm.config.schema import ComponentOptimConfig, Config, ModelConfig, OptimConfig, ParallelConfig
from megatron_vlm.data.loader import Loader
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.train import parity
from tests.data import world as data


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
    from megatron_vlm.train import optim
    from megatron_vlm.train.state import share
    from megatron_vlm.train.step import Stepper

    layout = Layout.of(settings, dist.get_world_size())
    groups.initialize(layout, seed=settings.train.seed, timeout_s=30)
    loader = Loader(settings, presets.architecture(settings.model), share(layout))
    models = optim.wrap(build(settings, layout), settings)
    return Stepper(models, optim.build(models, settings), settings, loader.sources), loader


def steps(settings: Config, record: tuple[int, ...] = ()) -> dict[str, Any]:
    """Train `settings.train.steps` steps; losses, norms and, after the steps in `record`, gradients before clipping."""
    from megatron_vlm.train import optim, pieces

    trainer, loader = stepper(settings)
    clip, found = optim.clip, {}

    def watched_clip(optimizer: Any, settings: Config) -> dict[str, float]:
        if step in record:
            found[step] = pieces.gradients(trainer.models, optimizer)
        return clip(optimizer, settings)

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


def assemble(by_rank: list[parity.Pieces]) -> dict[str, np.ndarray]:
    """Whole tensors by checkpoint name from the parts of all ranks; copies must agree."""
    whole, apart = parity.assemble(by_rank)
    for key, difference in apart.items():
        assert difference <= 1e-4 * np.linalg.norm(whole[key]) + 1e-7, f"{key}: copies differ"
    return whole
