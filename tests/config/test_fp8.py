"""Which models and layouts FP8 takes: sizes worked out by hand from the presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_vlm.config import fp8, load, presets
from megatron_vlm.config.schema import Config, DataConfig, Fp8Config, ModelConfig, ParallelConfig, TrainConfig

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def problems(preset: str, tokens: int, parallel: dict | None = None, **settings) -> list[str]:
    config = Config(
        model=ModelConfig(preset=preset),
        data=DataConfig(sequence_length=tokens),
        parallel=ParallelConfig(**(parallel or {})),
        train=TrainConfig(precision="fp8"),
        fp8=Fp8Config(**settings),
    )
    return list(fp8.problems(config, presets.architecture(config.model), 1))


PRESETS = ("qwen3_0.6b", "qwen3_1.7b", "molmo2_4b", "molmo2_8b")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("context", [1, 8])
@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8"])
def test_real_models_fit_at_16384_tokens(preset, tensor, context, recipe):
    """8 x 8 ranks leave 256 tokens each; the narrowest width is an eighth of 0.6B's 3,072: 384 = 12 x 32."""
    assert not problems(preset, 16_384, {"tensor": tensor, "context": context, "sequence": True}, recipe=recipe)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("context", [1, 8])
@pytest.mark.parametrize("recipe", ["blockwise", "delayed"])
def test_full_blocks_of_128_and_one_history(preset, tensor, context, recipe):
    """16,384 / 8 = 2,048 tokens a rank; of the MLP widths only 9,728 / 8 = 1,216 = 9.5 x 128 is refused."""
    settings = {"first_layers_bf16": 0, "last_layers_bf16": 0} if recipe == "delayed" else {}
    found = problems(preset, 16_384, {"tensor": tensor, "context": context}, recipe=recipe, **settings)
    assert bool(found) == (recipe == "blockwise" and preset == "molmo2_4b" and tensor == 8)


REFUSED = [
    (
        "molmo2_4b",
        2536,
        {"tensor": 2, "sequence": True},
        {},
        "rows on a rank (2536 x 1 tokens / 2) 1268 (= 79 x 16 + 4)",
    ),
    (
        "molmo2_4b",
        36_864,
        {"tensor": 8, "context": 8, "sequence": True},
        {"recipe": "blockwise"},
        "576 (= 4 x 128 + 64)",
    ),
    ("molmo2_4b", 16_384, {"tensor": 8}, {"recipe": "blockwise"}, "MLP width (9728 / 8) 1216 (= 9 x 128 + 64)"),
    ("molmo2_4b", 16_384, {}, {"components": ("vision",)}, "rows of a crop 729 (= 45 x 16 + 9)"),
    (
        "molmo2_4b",
        16_384,
        {"tensor": 2, "vision": "tensor"},
        {"components": ("vision",)},
        "MLP width (4304 / 2) 2152 (= 134 x 16 + 8)",
    ),
    (
        "molmo2_4b",
        16_384,
        {},
        {"components": ("vision",), "recipe": "mxfp8"},
        "MLP width (4304 / 1) 4304 (= 134 x 32 + 16)",
    ),
    ("molmo2_4b", 16_384, {}, {"components": ("connector",)}, "Connectors are computed in bf16"),
    ("molmo2_4b", 16_384, {}, {"recipe": "delayed"}, "cannot leave 2 in bf16"),
    (
        "molmo2_4b",
        16_384,
        {},
        {"first_layers_bf16": 30, "last_layers_bf16": 6},
        "leave none of the decoder's 36 layers",
    ),
    ("molmo2_4b", 16_384, {}, {"recipe": "delayed", "components": ("vision",)}, "one without images has none"),
    ("molmo2_4b", 16_384, {}, {"format": "e4m3"}, "gradients need the range of e5m2; set fp8.format=hybrid"),
    (
        "tiny",
        512,
        {},
        {"components": ("vision",), "shadow_every": 5},
        "fp8.shadow_every=5 compares decoder layers",
    ),
    ("molmo2_4b", 16_384, {"pipeline": 12}, {"last_layers_bf16": 4}, "is more than the 3 layers of a pipeline chunk"),
]


@pytest.mark.parametrize(
    ("preset", "tokens", "parallel", "settings", "words"), REFUSED, ids=[each[4] for each in REFUSED]
)
def test_what_does_not_fit_is_refused_with_the_numbers(preset, tokens, parallel, settings, words):
    assert any(words in problem for problem in problems(preset, tokens, parallel, **settings))


def test_delayed_scaling_without_bf16_layers_fits():
    assert not problems("molmo2_8b", 16_384, recipe="delayed", first_layers_bf16=0, last_layers_bf16=0)


def test_other_precisions_have_no_such_rules():
    config = Config(fp8=Fp8Config(components=("connector",)))
    assert not list(fp8.problems(config, presets.architecture(config.model), 1))
    assert not list(fp8.problems(dataclasses.replace(config, train=TrainConfig(precision="bf16")), None, 1))


@pytest.mark.parametrize("recipe", [f"molmo2_{size}/stage{stage}" for size in ("4b", "8b") for stage in (1, 2, 3)])
def test_the_large_recipes_fit_as_they_are(recipe):
    config = load.load(RECIPES / f"{recipe}.yaml", ["train.precision=fp8"])
    assert not list(fp8.problems(config, presets.architecture(config.model), 8))
