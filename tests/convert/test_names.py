"""The table of names at the real sizes: against the published counts, our own modules and transformers' (no memory)."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config, ModelConfig
from megatron_vlm.convert import describe
from megatron_vlm.convert.entries import entries
from megatron_vlm.parallel.layout import Layout
from tests.convert import world
from tests.torchvision import declare_operators

#: Parameters of the released models, by part.
PUBLISHED = {
    "molmo2_4b": {"vision": 382_505_936, "blocks": 3_633_509_376, "connector": 9_294_336 + 47_316_992,
                  "base": 388_956_160, "new": 327_680, "head": 388_956_160},
    "molmo2_8b": {"vision": 382_505_936, "blocks": 6_946_071_552, "connector": 9_294_336 + 78_643_200,
                  "base": 622_329_856, "new": 524_288, "head": 622_329_856},
}  # fmt: skip


#: A part's name in its tensors' keys; the first that fits. What is left are the decoder's layers.
PARTS = (
    ("vision", "image_vit"), ("connector", "vision_backbone"), ("base", "wte.embedding"), ("new", "new_embedding"),
    ("head", "lm_head"),
)  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_released_checkpoints_have_706_tensors_of_the_published_sizes(preset):
    counted = dict.fromkeys(PUBLISHED[preset], 0)
    stored = [
        (key, shape)
        for entry in entries(presets.PRESETS[preset])
        if "hub" in entry.cells
        for key, shape in entry.stored("hub").items()
    ]
    assert len(stored) == len(dict(stored)) == 706
    for key, shape in stored:
        part = next((part for part, name in PARTS if name in key), "blocks")
        counted[part] += math.prod(shape)
    # The last norm is not part of the blocks in the published numbers' table.
    counted["blocks"] -= presets.PRESETS[preset].language.hidden
    assert counted == PUBLISHED[preset]
    shapes = dict(stored)
    hidden = presets.PRESETS[preset].language.hidden
    assert shapes["model.transformer.blocks.35.self_attn.att_proj.weight"] == (6144, hidden)
    assert shapes["model.transformer.wte.new_embedding"] == (128, hidden)
    assert shapes["model.vision_backbone.image_vit.patch_embedding.weight"] == (1152, 588)
    assert shapes["model.vision_backbone.image_pooling_2d.wk.weight"] == (1152, 2304)


MODELS = [
    *(ModelConfig(preset) for preset in ("molmo2_4b", "molmo2_8b", "qwen3_0.6b", "qwen2.5_0.5b_clip", "like_4b")),
    *(ModelConfig("like_8b", kind, taps) for kind, taps in (("linear", ()), ("mlp", (1,)), ("resampler", (2, 0)))),
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: f"{model.preset} {model.connector}".strip())
def test_the_table_fills_every_tensor_of_our_model_once(model):
    """Built without memory, and asked by Megatron's means which tensors its checkpoint has."""
    from megatron_vlm.checkpoint import sharded
    from megatron_vlm.convert import answers, configs, plan
    from megatron_vlm.model.build import build

    with answers.alone(), torch.device("meta"):
        built = build(Config(model=model), Layout(1))
        tensors = sharded.tensors(sharded.build(built, None, is_loading=False))
        shapes = {tensor.key: tuple(tensor.global_shape) for tensor in tensors}
    arch = configs.architecture(model)
    assert plan.tensors(arch) == shapes
    filled = [key for entry in entries(arch) if not entry.copy for key in entry.stored("megatron")]
    assert len(filled) == len(set(filled))


@pytest.mark.parametrize(
    "preset",
    [pytest.param("molmo2_4b", marks=pytest.mark.slow), pytest.param("molmo2_8b", marks=pytest.mark.slow), "like_8b"],
)
def test_native_names_and_shapes_are_those_of_transformers(preset):
    declare_operators()
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    arch = presets.PRESETS[preset]
    with torch.device("meta"):
        model = Molmo2ForConditionalGeneration(Molmo2Config(**describe.native(arch, "float32")))
    table = {
        key: shape
        for entry in entries(arch)
        if "native" in entry.cells
        for key, shape in entry.stored("native").items()
    }
    assert table == {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("arch", [world.ARCH, world.CLIP], ids=["qwen3 siglip", "qwen2.5 clip"])
def test_names_of_parts_are_those_of_transformers(arch):
    for model, form in ((world.qwen(arch), "qwen"), (world.tower(arch), "clip" if arch is world.CLIP else "siglip")):
        found = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        table = {}
        for entry in entries(arch):
            if form in entry.cells:
                table |= entry.stored(form)
        assert {key: found.get(key) for key in table} == table


def test_parts_come_back_from_every_format():
    for arch in (world.ARCH, world.TIED, world.CLIP):
        for entry in entries(arch):
            parts = [torch.randn(shape) for shape in entry.shapes]
            for form in entry.cells:
                stored = entry.tensors(form, parts)
                assert {key: tuple(value.shape) for key, value in stored.items()} == entry.stored(form)
                for one, other in zip(entry.parts(form, stored.__getitem__), parts, strict=True):
                    assert one is None or torch.equal(one, other), (form, entry)
