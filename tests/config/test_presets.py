"""Presets with the settings of a recipe applied."""

from __future__ import annotations

import pytest

from megatron_vlm.config import presets
from megatron_vlm.config.architecture import CONNECTORS, NEW_TOKENS
from megatron_vlm.config.schema import ModelConfig


def test_new_tokens_follow_the_base_vocabulary_as_in_molmo2():
    arch = presets.architecture(ModelConfig("molmo2_4b"))
    ids = {name: arch.token_id(name) for name in NEW_TOKENS}
    assert ids["<im_start>"] == 151_936 and ids["<im_patch>"] == 151_938 and ids["<frame_end>"] == 151_944
    assert len(NEW_TOKENS) <= arch.language.new_rows


def test_molmo2_taps_the_third_and_ninth_last_layer_of_27_in_this_order():
    assert presets.architecture(ModelConfig("molmo2_8b")).connector.taps == (24, 18)


@pytest.mark.parametrize("preset", presets.PRESETS)
@pytest.mark.parametrize("connector", CONNECTORS)
def test_every_preset_takes_every_connector(preset, connector):
    arch = presets.architecture(ModelConfig(preset, connector=connector))
    assert arch.connector.kind == connector
    assert (arch.connector.queries > 0) == (connector == "resampler")


def test_settings_win_over_the_preset_and_zero_or_none_keeps_it():
    plain = presets.architecture(ModelConfig("tiny")).connector
    assert (plain.image_pool, plain.video_pool, plain.taps) == (2, 3, (2, 0))
    changed = presets.architecture(ModelConfig("tiny", image_pool=1, video_pool=7, vision_layers=())).connector
    assert (changed.image_pool, changed.video_pool, changed.taps) == (1, 7, ())
    assert changed.kind == plain.kind


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (ModelConfig("qwen4"), r"model\.preset='qwen4' is not a preset; choose one of tiny, "),
        (ModelConfig(connector="conv"), r"model\.connector='conv' does not exist; choose one of attention_pooling"),
        (ModelConfig(vision_layers=(0, 9)), r"model\.vision_layers names layers \[9\], .* layers 0 to 2"),
        (ModelConfig(vision_layers=(-1,)), r"model\.vision_layers names layers \[-1\]"),
    ],
)
def test_what_does_not_exist_is_named(model, message):
    with pytest.raises(ValueError, match=message):
        presets.architecture(model)
