"""The vision tower: transformers' hidden states, no sight beyond a crop, gradients with recompute and without crops."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_vlm.config.architecture import VisionArchitecture
from megatron_vlm.config.presets import CLIP_VIT_L_336, PRESETS, SIGLIP2_SO400M
from tests.model.reference import CLIP, SIGLIP, load_tower, pixels, randomize

pytestmark = pytest.mark.usefixtures("one_rank")

#: Heads of 72 as in so400m; 3 x 3 patches of 4 x 4 pixels.
SMALL = dataclasses.replace(SIGLIP2_SO400M, image_size=12, patch_size=4, width=144, heads=2, mlp=200, layers=4)
SMALL_CLIP = dataclasses.replace(CLIP_VIT_L_336, image_size=12, patch_size=4, width=96, heads=4, mlp=160, layers=4)


def tower(arch: VisionArchitecture, taps: tuple[int, ...], **settings: Any):
    from megatron_vlm.model.vision import VisionTower
    from megatron_vlm.parallel import cpu, groups

    built = VisionTower(arch, taps, {**cpu.TRANSFORMER_SETTINGS, **settings}, groups.replicated())
    if not next(built.parameters()).is_meta:
        randomize(built)
    return built


def crops(count: int, arch: VisionArchitecture) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, arch.patches, arch.patch_values), dtype=torch.uint8, generator=generator)


def reference(arch: VisionArchitecture):
    """transformers' tower of the same sizes, with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    sizes: dict[str, Any] = dict(
        hidden_size=arch.width,
        intermediate_size=arch.mlp,
        num_hidden_layers=arch.layers,
        num_attention_heads=arch.heads,
        image_size=arch.image_size,
        patch_size=arch.patch_size,
        layer_norm_eps=arch.norm_eps,
    )
    if arch.class_token:
        model = CLIPVisionModel(CLIPVisionConfig(**sizes, hidden_act="quick_gelu"))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**sizes, vision_use_head=False))
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("taps", [(3, 1), (1,), (0, 2, 1), ()])
@pytest.mark.parametrize("arch", [SMALL, SMALL_CLIP], ids=["siglip2", "clip"])
def test_hidden_states_are_those_of_transformers(arch, taps):
    theirs, ours = reference(arch), tower(arch, taps)
    weights = {name.removeprefix("vision_model."): value for name, value in theirs.state_dict().items()}
    load_tower(ours, weights, CLIP if arch.class_token else SIGLIP)
    images = crops(3, arch)
    with torch.no_grad():
        out = theirs(pixels(images, arch.patch_size, arch.mean, arch.std), output_hidden_states=True)
        found = ours(images)
    # hidden_states[0] are the embeddings.
    states = [out.hidden_states[tap + 1] for tap in taps] or [out.last_hidden_state]
    expected = torch.cat(states, -1)[:, int(arch.class_token) :]
    assert found.shape == expected.shape == (3, arch.patches, ours.width_out)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_layers_after_the_deepest_tap_are_not_built():
    built = sum(len(block.layers) for block in tower(SMALL, (2, 0)).blocks)
    assert built == 3


@pytest.mark.parametrize("arch", [SMALL, SMALL_CLIP], ids=["siglip2", "clip"])
def test_a_crop_is_encoded_as_if_it_were_alone(arch):
    ours = tower(arch, (3, 1)).eval()
    images = crops(4, arch)
    together = ours(images)
    for index in range(4):
        torch.testing.assert_close(together[index], ours(images[index : index + 1])[0], atol=1e-5, rtol=1e-5)


def gradients(ours, images: torch.Tensor) -> dict[str, torch.Tensor]:
    ours.zero_grad()
    out = ours(images)
    (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
    return {name: parameter.grad.clone() for name, parameter in ours.named_parameters()}


@pytest.mark.parametrize("arch", [SMALL, SMALL_CLIP], ids=["siglip2", "clip"])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recompute_changes_no_gradient(arch, granularity):
    settings = {"recompute_granularity": granularity}
    if granularity == "full":
        settings |= {"recompute_method": "uniform", "recompute_num_layers": 3}
    plain, recomputed = tower(arch, (3, 1)), tower(arch, (3, 1), **settings)
    images = crops(2, arch)
    expected, found = gradients(plain, images), gradients(recomputed, images)
    assert expected.keys() == found.keys()
    for name in expected:
        # Not bit for bit: the gradients of a residual stream may be added up in another order.
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-5, msg=name)
        assert "bias" in name or expected[name].abs().sum() > 0, name


@pytest.mark.parametrize("taps", [(3, 1), ()])
@pytest.mark.parametrize("settings", [{}, {"recompute_granularity": "full"}], ids=["plain", "recompute"])
def test_no_crops_give_no_features_and_zero_gradients(taps, settings):
    if settings:
        settings = {**settings, "recompute_method": "uniform", "recompute_num_layers": 1}
    ours = tower(SMALL, taps, **settings)
    assert ours(crops(0, SMALL)).shape == (0, SMALL.patches, ours.width_out)
    for name, gradient in gradients(ours, crops(0, SMALL)).items():
        assert not gradient.any(), name


def test_a_frozen_tower_without_crops_needs_no_gradient():
    ours = tower(SMALL, (1,)).requires_grad_(False)
    assert not ours(crops(0, SMALL)).requires_grad


def test_bf16_weights_take_pixels_normalised_in_float32():
    ours = tower(SMALL, (1,), params_dtype=torch.bfloat16, bf16=True)
    seen = []
    ours.patch_embedding.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = crops(2, SMALL)
    assert ours(images).dtype == torch.bfloat16
    expected = ((images.float() / 255 - 0.5) / 0.5).to(torch.bfloat16)
    assert torch.equal(seen[0], expected)


def checkpoint_keys(ours) -> dict[str, tuple[int, ...]]:
    state = ours.sharded_state_dict("vision.")
    return {value.key: value.global_shape for value in state.values() if hasattr(value, "global_shape")}


def test_checkpoint_keys_do_not_know_where_the_chain_is_cut():
    cut, whole = checkpoint_keys(tower(SMALL, (3, 1))), checkpoint_keys(tower(SMALL, (3,)))
    assert cut == whole
    assert cut["vision.layers.3.mlp.linear_fc1.weight"] == (200, 144)
    assert {key.split(".")[2] for key in cut if ".layers." in key} == {"0", "1", "2", "3"}
    assert "vision.post_norm.weight" in checkpoint_keys(tower(SMALL, ()))
    assert {"vision.class_token", "vision.pre_norm.bias"} < checkpoint_keys(tower(SMALL_CLIP, (1,))).keys()


def test_every_parameter_has_a_checkpoint_key_and_loads_under_its_own_name():
    ours = tower(SMALL_CLIP, (3, 1))
    state = ours.sharded_state_dict("vision.")
    assert {name.removeprefix("vision.") for name in state} == set(ours.state_dict())
    assert len({value.key for value in state.values()}) == len(state)


def test_parameters_of_so400m_are_counted_without_memory():
    arch = PRESETS["molmo2_4b"]
    with torch.device("meta"):
        ours = tower(arch.vision, arch.connector.taps)
    assert sum(parameter.numel() for parameter in ours.parameters()) == 382_505_936
    assert [len(block.layers) for block in ours.blocks] == [19, 6]


@pytest.mark.parametrize(
    ("arch", "taps", "message"),
    [
        (dataclasses.replace(SMALL, activation="relu"), (), "'relu' is not built; choose one of gelu_tanh, quick_gelu"),
        (dataclasses.replace(SMALL, heads=7), (), "144 wide cannot have 7 heads"),
        (SMALL, (1, 4), r"taps \[4\] lie outside the vision tower's layers 0 to 3"),
    ],
)
def test_a_tower_that_cannot_be_built_says_why(arch, taps, message):
    with pytest.raises(ValueError, match=message):
        tower(arch, taps)
