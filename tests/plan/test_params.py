"""Parameters and buffers against the built model: every preset at full size, several layouts, every stage."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_vlm.config import presets
from megatron_vlm.config.architecture import CONNECTORS
from megatron_vlm.config.schema import Config, ModelConfig, ParallelConfig
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan import params
from tests.model import tiny
from tests.plan.fake import rank_of

ALONE = Layout(1)


def config_of(model: ModelConfig, layout: Layout) -> Config:
    parallel = ParallelConfig(layout.tensor, layout.tensor > 1, layout.pipeline, layout.virtual_pipeline,
                              context=layout.context, vision=layout.vision)  # fmt: skip
    return Config(model=model, parallel=parallel)


def compare(config: Config, layout: Layout, rank: int) -> None:
    """Names, shapes, components and order of every parameter of this rank."""
    import torch

    from megatron_vlm.model.build import build, component_of

    arch = presets.architecture(config.model)
    with rank_of(layout, rank), torch.device("meta"):
        models = build(config, layout)
    chunks = params.stages(arch, layout, config.parallel.pipeline_layers)[layout.coordinates(rank).pipeline]
    assert len(models) == len(chunks)
    for model, chunk in zip(models, chunks, strict=True):
        planned = params.of_stage(arch, chunk, layout.tensor, layout.vision_tensor)
        built = [(name, tuple(each.shape), component_of(name)) for name, each in model.named_parameters()]
        assert [(each.name, each.shape, each.component) for each in planned] == built
        own_bucket = {name for name, each in model.named_parameters() if getattr(each, "shared_embedding", False)}
        assert {each.name for each in planned if each.own_bucket} == own_bucket


CASES = [
    *((preset, ALONE) for preset in presets.PRESETS),
    ("molmo2_4b", Layout(16, tensor=8, pipeline=2)),  # tied, a copy of the table on the last stage
    ("molmo2_4b", Layout(8, tensor=8, vision="tensor")),
    ("molmo2_8b", Layout(64, tensor=2, context=4, pipeline=4)),
    ("qwen3_0.6b", Layout(32, tensor=16, pipeline=2)),  # more ranks than key-value heads
    ("qwen2.5_0.5b_clip", Layout(8, tensor=2, pipeline=4)),  # biases of queries, keys and values
    ("tiny", Layout(8, tensor=2, pipeline=2, virtual_pipeline=2)),
]


@pytest.mark.parametrize("preset, layout", CASES, ids=lambda case: str(case).removeprefix("Layout"))
def test_parameters(preset, layout):
    for stage in range(layout.pipeline):
        compare(config_of(ModelConfig(preset), layout), layout, stage * layout.world // layout.pipeline)


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("taps, layout", [((), ALONE), ((1,), Layout(2, tensor=2, vision="tensor")), ((2, 0), ALONE)])
def test_parameters_of_connectors(connector, taps, layout):
    compare(config_of(ModelConfig("tiny", connector, taps), layout), layout, 0)


def test_uneven_stages():
    layout = Layout(2, pipeline=2)
    config = config_of(ModelConfig("tiny"), layout)
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, pipeline_layers=(1, 3)))
    for rank in (0, 1):
        compare(config, layout, rank)
    with pytest.raises(ValueError, match="has 3 entries with 4 layers; needed: 2 entries with 4"):
        params.stages(presets.PRESETS["tiny"], layout, (1, 1, 2))


BUFFERS = [
    (tiny.ARCH, Layout(1), (), "float32"),
    (tiny.ARCH, Layout(12, tensor=2, context=3), ("base_embeddings",), "bf16"),
    (tiny.TIED, Layout(4, pipeline=2), (), "bf16"),
    (tiny.TIED, Layout(8, tensor=2, pipeline=2), ("vision", "connector"), "float32"),
    (tiny.QWEN2_5, Layout(8, pipeline=2, virtual_pipeline=2), ("vision",), "float32"),
    (tiny.ARCH, Layout(7), (), "bf16"),
    (tiny.ARCH, Layout(7), ("base_embeddings",), "bf16", 3000),
    (tiny.TIED, Layout(8, pipeline=2, virtual_pipeline=2), (), "float32", 3000),
    (tiny.ARCH, Layout(4, tensor=2, context=2, vision="tensor"), (), "bf16"),
]


@pytest.mark.parametrize("case", BUFFERS)
def test_static_memory(case):
    """Bytes of weights, gradient buffer and optimizer state after a step of Megatron's optimizer, on every rank."""
    from megatron_vlm.plan import memory

    arch, layout, freeze, precision, *bucket = case
    for rank in range(layout.world):
        config = tiny.config(arch, freeze=freeze, precision=precision, parallel=dict(
            tensor=layout.tensor, context=layout.context, pipeline=layout.pipeline,
            virtual_pipeline=layout.virtual_pipeline, vision=layout.vision,
            overlap_grad_reduce=bool(bucket), bucket_size=sum(bucket)))  # fmt: skip
        planned = memory.static(config, layout, rank, cuda=False)
        assert measured_static(config, layout, rank) == dataclasses.astuple(planned), f"rank {rank}"


def measured_static(config: Config, layout: Layout, rank: int) -> tuple[int, int, int]:
    with rank_of(layout, rank):
        from megatron_vlm.model.build import build
        from megatron_vlm.train import optim

        models = optim.wrap(build(config, layout), config)
        optimizer = optim.build(models, config)
        optimizer.prepare_grads()
        optimizer.step_with_ready_grads()
        buffers = [buffer for model in models for buffer in model.buffers]
        weights = sum(buffer.param_data.nbytes for buffer in buffers)
        weights += sum(each.nbytes for model in models for each in model.parameters() if not each.requires_grad)
        state = 0
        for inner in optimizer.chained_optimizers:
            masters = [each for group in inner.shard_fp32_from_float16_groups for each in group]
            state += sum(each.nbytes for each in masters)
            state += sum(value.nbytes for tensors in inner.optimizer.state.values() for value in tensors.values())
        return weights, sum(buffer.grad_data.nbytes for buffer in buffers), state
