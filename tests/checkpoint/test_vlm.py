"""The real model with the real optimizer groups: every component's weights and moments survive a change of layout."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vlm.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron_vlm.parallel.layout import Layout
from tests.checkpoint.test_load import check_same_everywhere, differing


def settings(layout: Layout, sequence: bool, freeze: tuple[str, ...], precision: str) -> Config:
    parallel = ParallelConfig(
        tensor=layout.tensor,
        context=layout.context,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        sequence=sequence,
        vision=layout.vision,
    )
    model = ModelConfig(preset="tiny", freeze=freeze)
    return Config(parallel=parallel, model=model, train=TrainConfig(precision=precision))


def build(config: Config, layout: Layout, seed: int) -> tuple[list[Any], Any]:
    from megatron_vlm.model.build import build as build_models
    from megatron_vlm.parallel import groups
    from megatron_vlm.train import optim

    groups.initialize(layout, seed=seed, timeout_s=60)
    models = optim.wrap(build_models(config, layout), config)
    optimizer = optim.build(models, config)
    optim.set_learning_rates(optimizer, config, 1)
    return models, optimizer


def step(models: list[Any], optimizer: Any, number: int) -> None:
    """An optimizer step on made-up gradients, equal where ranks hold the same parameter."""
    for chunk in models:
        chunk.zero_grad_buffer()
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + number)
                parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step()


def write(layout: Layout, directory: Path, sequence: bool, freeze: tuple[str, ...], precision: str) -> None:
    from megatron_vlm.checkpoint import save

    config = settings(layout, sequence, freeze, precision)
    models, optimizer = build(config, layout, seed=1)
    for number in (1, 2):
        step(models, optimizer, number)
    save.save(directory, models=models, optimizer=optimizer, step=2, config=config, state={})


def rewrite(
    layout: Layout, source: Path, directory: Path, sequence: bool, freeze: tuple[str, ...], precision: str
) -> tuple[list[str], dict[float, float]]:
    """Load into other weights and save; names of tensors that changed, learning rates by group tag."""
    from megatron_vlm.checkpoint import load, save

    config = settings(layout, sequence, freeze, precision)
    models, optimizer = build(config, layout, seed=99)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    load.load(source, models=models, optimizer=optimizer, config=config)
    again = save.save(directory, models=models, optimizer=optimizer, step=2, config=config, state={})
    return differing(source, again), {group["lr_mult"]: group["lr"] for group in optimizer.param_groups}


TENSOR_AND_SEQUENCE = (Layout(2, tensor=2), True)
#: Tower and connector sharded too.
EVERYTHING_SHARDED = (Layout(2, tensor=2, vision="tensor"), True)
PIPELINE = (Layout(2, pipeline=2), False)
EVERY_LAYOUT = [
    TENSOR_AND_SEQUENCE,
    (Layout(1), False),
    (Layout(2), False),
    PIPELINE,
    (Layout(2, context=2), False),
    (Layout(2, pipeline=2, virtual_pipeline=2), False),
    (Layout(2, tensor=2, vision="tensor"), False),
]
#: What each stage of training trains: connector alone (alignment), everything but the base embeddings.
ALIGNMENT = ("vision", "language", "base_embeddings")
TRAINING = ("base_embeddings",)


@pytest.mark.parametrize(
    ("freeze", "precision", "layouts"),
    [
        pytest.param(ALIGNMENT, "float32", [TENSOR_AND_SEQUENCE, PIPELINE], id="alignment"),
        pytest.param(TRAINING, "bf16", [EVERYTHING_SHARDED, PIPELINE, EVERYTHING_SHARDED], id="training"),
        pytest.param(TRAINING, "float32", EVERY_LAYOUT, id="every layout", marks=pytest.mark.slow),
    ],
)
def test_chain_of_layouts_keeps_every_bit(pool, tmp_path, freeze, precision, layouts):
    (first, sequence), *others = layouts
    pool(first.world).run(write, first, tmp_path / "0", sequence, freeze, precision, timeout_s=120)
    source = tmp_path / "0" / "iter_0000002"
    for index, (layout, sequence) in enumerate(others, start=1):
        target = tmp_path / str(index)
        arguments = (layout, source, target, sequence, freeze, precision)
        ranks = pool(layout.world).run(rewrite, *arguments, timeout_s=120)
        for changed, _ in ranks:
            assert changed == [], f"{layout}"
        # A stage that trains nothing has empty groups, which keep what they had.
        assert any(rates and all(rate > 0 for rate in rates.values()) for _, rates in ranks)
        source = target / "iter_0000002"
    original = tmp_path / "0" / "iter_0000002"
    assert pool(2).run(check_same_everywhere, original, source) == [[], []]
