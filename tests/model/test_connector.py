"""Connectors: Molmo2's numbers, means, queries that see their own crop, windows without patches, exact sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_vlm.batch import PAD
from megatron_vlm.config.architecture import CONNECTORS, Architecture, ConnectorArchitecture
from megatron_vlm.config.presets import PRESETS, SIGLIP2_SO400M, TINY_LANGUAGE
from tests.model.reference import MOLMO2, load_molmo2_connector, load_tower, pixels, randomize

pytestmark = pytest.mark.usefixtures("one_rank")

#: Two heads of 72 in tower and pooling, 3 x 3 patches in a crop.
VISION = dataclasses.replace(SIGLIP2_SO400M, image_size=12, patch_size=4, width=144, heads=2, mlp=200, layers=4)

LANGUAGE = dataclasses.replace(TINY_LANGUAGE, hidden=128)


def architecture(kind: str, **changes: Any) -> Architecture:
    connector = ConnectorArchitecture(
        kind=kind, taps=(3, 1), image_pool=2, video_pool=3, width=144, heads=2, mlp=192,
        queries=5 if kind == "resampler" else 0, layers=2 if kind == "resampler" else 0,
    )  # fmt: skip
    return Architecture(VISION, dataclasses.replace(connector, **changes), LANGUAGE)


def connector(arch: Architecture, **settings: Any):
    from megatron_vlm.model.connector import build_connector
    from megatron_vlm.parallel import cpu, groups

    built = build_connector(arch, {**cpu.TRANSFORMER_SETTINGS, **settings}, groups.replicated())
    if not next(built.parameters()).is_meta:
        randomize(built)
    return built


def features(patches: int, width: int = 288) -> torch.Tensor:
    return torch.randn(patches, width, generator=torch.Generator().manual_seed(patches))


#: Full windows, windows with empty slots at either end, two crops in one window, the same patch twice.
WINDOWS = torch.tensor([[0, 1, 3, 4], [PAD, PAD, 2, 5], [6, PAD, 7, PAD], [8, 9, 17, 0], [PAD, PAD, PAD, 17]])
EMPTY = torch.full((1, 4), PAD)


@pytest.mark.parametrize("windows", [WINDOWS, torch.arange(18).view(2, 9)], ids=["image", "video"])
def test_backbone_and_connector_are_those_of_molmo2(windows):
    from transformers.models.molmo2.configuration_molmo2 import Molmo2AdapterConfig, Molmo2VisionConfig
    from transformers.models.molmo2.modeling_molmo2 import Molmo2Adapter, Molmo2VisionModel

    from megatron_vlm.model.vision import VisionTower
    from megatron_vlm.parallel import cpu, groups

    arch = architecture("attention_pooling")
    sizes = dict(hidden_size=144, num_attention_heads=2, num_key_value_heads=2, head_dim=72)
    their_tower = Molmo2VisionModel(
        Molmo2VisionConfig(**sizes, intermediate_size=200, num_hidden_layers=4, image_size=[12, 12], patch_size=4)
    ).eval()
    their_connector = Molmo2Adapter(
        Molmo2AdapterConfig(**sizes, vision_feature_layer=[3, 1], intermediate_size=192, text_hidden_size=128)
    ).eval()
    randomize(their_tower)
    randomize(their_connector, seed=1)
    our_tower = VisionTower(VISION, (3, 1), cpu.TRANSFORMER_SETTINGS, groups.replicated())
    our_connector = connector(arch)
    load_tower(our_tower, their_tower.state_dict(), MOLMO2)
    load_molmo2_connector(our_connector, their_connector.state_dict(), heads=2)

    generator = torch.Generator().manual_seed(0)
    crops = torch.randint(0, 256, (2, 9, 48), dtype=torch.uint8, generator=generator)
    images = pixels(crops, 4, VISION.mean, VISION.std)  # (2, 3, 12, 12); Molmo2 takes patches
    patches = images.view(2, 3, 3, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(2, 9, 48)
    with torch.no_grad():
        states = their_tower(patches, output_hidden_states=True).hidden_states
        their_features = torch.cat([states[4], states[2]], -1)
        expected = their_connector(their_features, windows)
        ours = our_tower(crops)
        found = our_connector(ours.flatten(0, 1), windows)
    torch.testing.assert_close(ours, their_features, atol=1e-4, rtol=0)
    assert found.shape == (len(windows), 1, 128)
    torch.testing.assert_close(found[:, 0], expected.last_hidden_state, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_means_of_windows_are_projected(kind):
    ours, patches = connector(architecture(kind)), features(18)
    means = torch.stack([patches[row[row != PAD]].mean(0) for row in WINDOWS])
    projector = ours.projector
    if kind == "linear":
        expected = means @ projector.weight.T + projector.bias
    else:
        inside = torch.nn.functional.gelu(means @ projector.linear_fc1.weight.T + projector.linear_fc1.bias)
        expected = inside @ projector.linear_fc2.weight.T + projector.linear_fc2.bias
    torch.testing.assert_close(ours(patches, WINDOWS)[:, 0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_shapes_and_finite_gradients_with_a_window_without_patches(kind):
    ours, patches = connector(architecture(kind)), features(18).requires_grad_()
    windows = torch.cat([WINDOWS, EMPTY])
    out = ours(patches, windows)
    assert out.shape == (6, 5 if kind == "resampler" else 1, 128)
    out.square().sum().backward()
    gradients = {"features": patches.grad, **{name: p.grad for name, p in ours.named_parameters()}}
    assert out.isfinite().all()
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.isfinite().all(), name


@pytest.mark.parametrize("kind", CONNECTORS)
def test_a_rank_without_patches_pools_windows_without_patches(kind):
    ours = connector(architecture(kind))
    empty = ours(torch.zeros(0, 288), EMPTY)
    assert torch.equal(empty, ours(features(9), EMPTY)) and empty.isfinite().all()


@pytest.mark.parametrize("kind", CONNECTORS)
def test_empty_slots_and_other_patches_do_not_matter(kind):
    ours, patches = connector(architecture(kind)), features(18)
    changed = patches.clone()
    changed[[0, 1, 3, 8]] = float("nan")  # 0 is what a clipped PAD would point to
    rows = WINDOWS[[1, 2, 4]]
    assert torch.equal(ours(patches, rows), ours(changed, rows))
    wider = torch.nn.functional.pad(rows, (0, 2), value=PAD)
    torch.testing.assert_close(ours(patches, wider), ours(patches, rows), atol=1e-6, rtol=1e-5)
    apart = torch.cat([ours(patches, row[None]) for row in WINDOWS])
    assert (ours(patches, WINDOWS) - apart).norm() < 1e-6 * apart.norm()


def test_many_windows_are_attended_to_in_parts(monkeypatch):
    from megatron_vlm.model import full_attention

    ours, patches = connector(architecture("attention_pooling")), features(18)
    whole = ours(patches, WINDOWS)
    monkeypatch.setattr(full_attention, "BATCHES", 2)
    torch.testing.assert_close(ours(patches, WINDOWS), whole, atol=1e-6, rtol=1e-5)


def test_resampler_reads_every_patch_of_its_crop_and_no_other():
    ours, patches = connector(architecture("resampler")), features(18).requires_grad_()
    ours(patches, torch.arange(18).view(2, 9))[1].square().sum().backward()
    assert not patches.grad[:9].any()
    assert (patches.grad[9:].norm(dim=1) > 0).all()
    assert (ours.pooling.queries.grad.norm(dim=1) > 0).all()


@pytest.mark.parametrize("kind", CONNECTORS)
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recompute_changes_no_gradient(kind, granularity):
    settings = {"recompute_granularity": granularity}
    if granularity == "full":
        settings |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    found = []
    for each in ({}, settings):
        ours, patches = connector(architecture(kind), **each), features(18).requires_grad_()
        ours(patches, WINDOWS).square().sum().backward()
        found.append([patches.grad, *(parameter.grad for parameter in ours.parameters())])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", CONNECTORS)
def test_no_windows_give_zero_gradients_to_features_and_parameters(kind):
    ours, patches = connector(architecture(kind)), features(18).requires_grad_()
    out = ours(patches, WINDOWS[:0])
    assert out.shape == (0, 5 if kind == "resampler" else 1, 128)
    out.sum().backward()
    for tensor in (patches, *ours.parameters()):
        assert tensor.grad is not None and not tensor.grad.any()


@pytest.mark.parametrize(
    ("preset", "projector"), [("molmo2_4b", 47_316_992), ("molmo2_8b", 78_643_200), ("qwen3_0.6b", 10_223_616)]
)
def test_parameters_of_molmo2_are_counted_without_memory(preset, projector):
    with torch.device("meta"):
        ours = connector(PRESETS[preset])
    assert sum(parameter.numel() for parameter in ours.pooling.parameters()) == 9_294_336
    assert sum(parameter.numel() for parameter in ours.projector.parameters()) == projector


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_parameter_has_a_checkpoint_key(kind):
    ours = connector(architecture(kind))
    state = ours.sharded_state_dict("connector.")
    assert {name.removeprefix("connector.") for name in state} == set(ours.state_dict())


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        (architecture("perceiver"), "'perceiver' does not exist; choose one of attention_pool"),
        (architecture("resampler", queries=0), "0 queries and 2 layers"),
        (architecture("attention_pooling", heads=7), "144 wide cannot have 7 heads"),
    ],
)
def test_a_connector_that_cannot_be_built_says_why(arch, message):
    with pytest.raises(ValueError, match=message):
        connector(arch)
