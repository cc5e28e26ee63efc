"""Activations and peak against what torch allocates, for tiny and small models on the CPU."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_vlm.batch import Batch
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.parallel.layout import Layout
from tests.model import tiny
from tests.plan import measure
from tests.plan.fake import rank_of

SMALL = Architecture(
    dataclasses.replace(tiny.VISION, width=96, heads=4, mlp=256),
    dataclasses.replace(tiny.CONNECTOR, width=96, heads=4, mlp=256),
    dataclasses.replace(tiny.LANGUAGE, hidden=128, heads=8, kv_heads=4, mlp=384, vocab_size=2048, layers=6),
)


def clip() -> Architecture:
    vision = dataclasses.replace(
        tiny.VISION, class_token=True, pre_norm=True, patch_bias=False, activation="quick_gelu", post_norm=False
    )
    return dataclasses.replace(tiny.ARCH, vision=vision)


def untapped() -> Architecture:
    return dataclasses.replace(tiny.ARCH, connector=dataclasses.replace(tiny.CONNECTOR, taps=()))


CASES: dict[str, dict] = {
    "tiny": {},
    "one row": {"rows": (0,)},
    "bf16": {"precision": "bf16"},
    "full": {"recompute": "full"},
    "selective": {"recompute": "selective"},
    "tied": {"arch": tiny.TIED},
    "biases, no head norms": {"arch": tiny.QWEN2_5},
    "dropout": {"residual_dropout": 0.1},
    "frozen tower": {"freeze": ("vision",)},
    "frozen tower and table, full, bf16": {"freeze": ("vision", "base_embeddings"), "recompute": "full",
                                           "precision": "bf16"},
    "frozen decoder": {"freeze": ("language", "base_embeddings")},
    "linear": {"arch": tiny.connector("linear")},
    "mlp": {"arch": tiny.connector("mlp")},
    "resampler": {"arch": tiny.connector("resampler", queries=4, layers=2)},
    "clip tower": {"arch": clip()},
    "no taps": {"arch": untapped()},
    "small, bf16": {"arch": SMALL, "precision": "bf16", "rows": (0, 1, 2)},
    "small, full": {"arch": SMALL, "recompute": "full", "logit_chunk": 1024},
    "small, selective, bf16": {"arch": SMALL, "recompute": "selective", "precision": "bf16", "rows": (3,)},
}  # fmt: skip
LAYOUTS: dict[str, tuple[Layout, dict, dict]] = {
    "tensor": (Layout(2, tensor=2), {"tensor": 2}, {}),
    "sequence": (Layout(2, tensor=2), {"tensor": 2, "sequence": True}, {}),
    "sequence, bf16, full": (Layout(2, tensor=2), {"tensor": 2, "sequence": True},
                             {"precision": "bf16", "recompute": "full"}),
    "context": (Layout(2, context=2), {"context": 2}, {}),
    "context, selective": (Layout(2, context=2), {"context": 2}, {"recompute": "selective"}),
    "gather": (Layout(2, context=2, ulysses=1), {"context": 2, "context_method": "gather"}, {}),
    "gather, bf16, selective": (Layout(3, context=3, ulysses=1), {"context": 3},
                                {"precision": "bf16", "recompute": "selective"}),
    "ring, bf16": (Layout(2, context=2, ulysses=1), {"context": 2, "context_method": "ring"}, {"precision": "bf16"}),
    "sharded tower": (Layout(2, tensor=2, vision="tensor"), {"tensor": 2, "vision": "tensor"}, {"precision": "bf16"}),
    "all": (Layout(4, tensor=2, context=2), {"tensor": 2, "sequence": True, "context": 2}, {"precision": "bf16"}),
}  # fmt: skip


def batch_of(arch: Architecture, rows: tuple[int, ...], rank: int = 0, layout: Layout | None = None) -> Batch:
    """Rows of 96 tokens with images."""
    layout = layout or Layout(1)
    return tiny.batch(arch, list(rows), layout.crop_rank(rank), layout.crop_ranks)


def agree(measured: measure.Measured, planned: measure.Measured) -> None:
    assert planned.kept == pytest.approx(measured.kept, rel=0.05)
    assert planned.peak == pytest.approx(measured.peak, rel=0.05)


@pytest.mark.parametrize("name", CASES)
def test_one_process(one_rank, name):
    case = dict(CASES[name])
    arch, rows, freeze = case.pop("arch", tiny.ARCH), case.pop("rows", (0, 1)), case.pop("freeze", ())
    config, batch = tiny.config(arch, freeze=freeze, **case), batch_of(arch, rows)
    load = measure.load_of(batch, Layout(1), 0)
    agree(measure.allocations(config, Layout(1), batch), measure.planned(config, Layout(1), load))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "all"])  # patches travel: real processes only
def test_layouts(name):
    """Each rank alone: the others' answers are not needed to see what is allocated."""
    layout, parallel, options = LAYOUTS[name]
    config = tiny.config(SMALL, parallel=parallel, **options)
    for rank in range(layout.world):
        batch = batch_of(SMALL, (0, 1), rank, layout)
        with rank_of(layout, rank):
            measured = measure.allocations(config, layout, batch)
        agree(measured, measure.planned(config, layout, measure.load_of(batch, layout, rank)))


def in_pool(layout: Layout, parallel: dict, options: dict) -> tuple[measure.Measured, measure.Measured]:
    import torch.distributed as dist

    from megatron_vlm.parallel import groups

    groups.initialize(layout, timeout_s=50)
    config = tiny.config(SMALL, parallel=parallel, **options)
    batch = batch_of(SMALL, (0, 1), dist.get_rank(), layout)
    load = measure.load_of(batch, layout, dist.get_rank())
    return measure.allocations(config, layout, batch), measure.planned(config, layout, load)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sequence", "context", "all"])
def test_layouts_with_their_neighbours(pool, name):
    """The same with real processes."""
    layout, parallel, options = LAYOUTS[name]
    for measured, planned in pool(layout.world).run(in_pool, layout, parallel, options):
        agree(measured, planned)
