"""Presets at full size on the meta device, components, stages, initial weights."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config, ModelConfig
from megatron_vlm.parallel.layout import Layout
from tests.model import tiny

VISION, POOLING = 382_505_936, 9_294_336
#: Published counts (molmo2.md section 0): projector, decoder layers, base rows, new rows, head.
PUBLISHED = {
    "molmo2_4b": (47_316_992, 3_633_509_376, 388_956_160, 327_680, 0),
    "molmo2_8b": (78_643_200, 6_946_071_552, 622_329_856, 524_288, 622_329_856),
    "qwen3_0.6b": (10_223_616, 440_466_432, 155_582_464, 131_072, 0),
}


def counts(preset: str) -> Counter[str]:
    """Parameters of each part of a full-size preset."""
    from megatron_vlm.model.build import build

    with torch.device("meta"):
        (model,) = build(Config(model=ModelConfig(preset=preset)), Layout(1))
    found: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        assert parameter.is_meta
        parts = name.split(".")
        depth = {"vision": 1, "connector": 2, "language": 3}[parts[0]]
        found[".".join(parts[:depth]).removesuffix(".weight")] += parameter.numel()
    return found


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_counts(one_rank, preset):
    projector, layers, base, new, head = PUBLISHED[preset]
    expected = {
        "vision": VISION,
        "connector.pooling": POOLING,
        "connector.projector": projector,
        "language.embedding.word_embeddings": base,
        "language.embedding.new_rows": new,
        "language.decoder.layers": layers,
        "language.decoder.final_layernorm": presets.PRESETS[preset].language.hidden,
    }
    assert counts(preset) == expected | ({"language.head": head} if head else {})


@pytest.mark.parametrize("preset", ["qwen3_0.6b", "qwen3_1.7b", "qwen3_4b", "qwen3_8b", "qwen2.5_0.5b_clip"])
def test_decoder_counts_of_transformers(one_rank, preset):
    from tests.model.test_language import transformers_model

    arch = presets.PRESETS[preset].language
    with torch.device("meta"):
        reference = transformers_model(arch)
    found = counts(preset)
    decoder = sum(count for part, count in found.items() if part.startswith("language."))
    assert decoder - arch.new_rows * arch.hidden == sum(parameter.numel() for parameter in reference.parameters())


def test_clip_tower_count_of_transformers(one_rank):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    arch = presets.CLIP_VIT_L_336
    config = CLIPVisionConfig(
        hidden_size=arch.width, intermediate_size=arch.mlp, num_hidden_layers=23, num_attention_heads=arch.heads,
        image_size=arch.image_size, patch_size=arch.patch_size,
    )  # fmt: skip
    with torch.device("meta"):
        reference = CLIPVisionModel(config)
    unused = 2 * arch.width  # the norm of the class token
    expected = sum(parameter.numel() for parameter in reference.parameters()) - unused
    assert counts("qwen2.5_0.5b_clip")["vision"] == expected


def test_components(one_rank):
    from megatron_vlm.model.build import build, component_of

    names = {name: component_of(name) for name, _ in build(tiny.config(tiny.ARCH), Layout(1))[0].named_parameters()}
    assert set(names.values()) == {"vision", "connector", "language", "base_embeddings"}
    assert names["language.embedding.new_rows"] == "connector"
    assert names["language.embedding.word_embeddings.weight"] == "base_embeddings"
    assert names["language.head.weight"] == "language"
    assert component_of("language.tied_head.weight") == "base_embeddings"


@pytest.mark.parametrize("component", ["vision", "connector", "language", "base_embeddings"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_frozen_components_get_no_gradients(one_rank, component, recompute):
    """All others do, the decoder's layers included where nothing before them trains."""
    from megatron_vlm.model.build import build, component_of

    for freeze in ((component,), tuple({"vision", "connector", "base_embeddings", "language"} - {component})):
        (model,) = build(tiny.config(tiny.ARCH, freeze=freeze, recompute=recompute), Layout(1))
        model(tiny.batch(tiny.ARCH, [0])).sum().backward()
        for name, parameter in model.named_parameters():
            trains = component_of(name) not in freeze
            assert parameter.requires_grad == trains
            assert (parameter.grad is not None) == trains, name


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_nothing(one_rank, recompute):
    """Losses and the decoder's gradients bit for bit, with dropout, and with two micro-batches in flight.

    The tower's taps add up their gradients in another order.
    """
    from megatron_vlm.model.build import build

    found = []
    for setting in ("none", recompute):
        (model,) = build(tiny.config(tiny.ARCH, recompute=setting, residual_dropout=0.2), Layout(1))
        losses = [model(tiny.batch(tiny.ARCH, [number])) for number in (0, 1)]
        for loss in losses:
            loss.sum().backward()
        found.append({"losses": torch.cat(losses)} | {name: p.grad for name, p in model.named_parameters()})
    for name, one in found[0].items():
        if name.startswith("vision"):
            torch.testing.assert_close(found[1][name], one, rtol=1e-5, atol=1e-6 * one.abs().max().item())
        else:
            assert torch.equal(found[1][name], one), name


def test_initial_weights(one_rank):
    from megatron_vlm.model.build import build

    settings = tiny.config(dataclasses.replace(tiny.ARCH, vision=dataclasses.replace(tiny.VISION, class_token=True)))
    (model,) = build(settings, Layout(1))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.3), name
    (again,) = build(settings, Layout(1))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), again.parameters(), strict=True))


def test_layers_per_chunk(one_rank):
    from megatron_vlm.model.build import layers_per_chunk

    layout = Layout(2, pipeline=2, virtual_pipeline=2)
    assert layers_per_chunk(tiny.config(tiny.ARCH), 6, layout) == (2, 2, 1, 1)
    chosen = tiny.config(tiny.ARCH, parallel={"pipeline_layers": (1, 2, 2, 1)})
    assert layers_per_chunk(chosen, 6, layout) == (1, 2, 2, 1)
    with pytest.raises(ValueError, match=r"has 4 entries with 6 layers; needed: 4 .* with 7"):
        layers_per_chunk(chosen, 7, layout)


@pytest.mark.parametrize("broken", [{"precision": "fp16"}, {"recompute": "some"}])
def test_unknown_settings(one_rank, broken):
    from megatron_vlm.model.build import build

    with pytest.raises(ValueError, match=next(iter(broken.values()))):
        build(tiny.config(tiny.ARCH, **broken), Layout(1))


def test_bf16(one_rank):
    from megatron_vlm.model.build import build

    (model,) = build(tiny.config(tiny.ARCH, precision="bf16", residual_dropout=0.1), Layout(1))
    losses = model(tiny.batch(tiny.ARCH, [0, 1]))
    losses.sum().backward()
    assert losses.dtype == torch.float32
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p.grad).all() for p in model.parameters())
    (exact,) = build(tiny.config(tiny.ARCH, residual_dropout=0.1), Layout(1))
    torch.testing.assert_close(losses, exact(tiny.batch(tiny.ARCH, [0, 1])), rtol=0.02, atol=0.02)
