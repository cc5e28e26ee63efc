"""Names of layouts: what they mean, and that layouts which fit nothing are refused with the numbers."""

import dataclasses

import pytest

from megatron_vlm.config.schema import Config, DataConfig, ParallelConfig, TrainConfig
from megatron_vlm.train import variant
from megatron_vlm.train.variant import Variant

#: The tiny model: 4 query heads, 2 key-value heads, 4 layers.
CONFIG = Config(data=DataConfig(image_crops=0), train=TrainConfig(global_batch=8, recompute="selective"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("one", Variant("one")),
        ("packed", Variant("packed")),
        (
            "tp2_sp_pp3_vpp4_cp5_dp16",
            Variant("tp2_sp_pp3_vpp4_cp5_dp16", 2, True, 3, 4, 5, data=16),
        ),
        ("recompute_full_cp2", Variant("recompute_full_cp2", context=2, recompute="full")),
        ("dp2_unpacked", Variant("dp2_unpacked", data=2, packed=False)),
        ("cp4_gather", Variant("cp4_gather", context=4, context_method="gather")),
        ("tp2_vision_tensor", Variant("tp2_vision_tensor", 2, vision="tensor")),
    ],
)
def test_names_say_how_to_run(name, expected):
    assert variant.parse(name) == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "empty name"),
        ("tp", "'tp' is no part"),
        ("tp0", "'tp0' is no part"),
        ("tp2sp", "'tp2sp' is no part"),
        ("tp2_", "no part"),
        ("cp2_ep2", "'ep2' is no part"),
        ("recompute", "'recompute' is no part"),
        ("tp2_tp4", "sets tensor twice"),
        ("packed_unpacked", "sets packed twice"),
    ],
)
def test_other_names_are_refused_with_the_grammar(name, said):
    with pytest.raises(ValueError, match=said) as error:
        variant.parse(name)
    assert "N pipeline stages" in str(error.value)


def test_processes_and_settings_follow_from_the_name():
    way = variant.parse("tp2_sp_pp2_dp2_recompute_full")
    settings = way.settings(dataclasses.replace(CONFIG, parallel=ParallelConfig(context=4)))
    assert way.world == 8 and settings.run.device == "cpu"
    assert settings.parallel == ParallelConfig(tensor=2, sequence=True, pipeline=2)
    assert settings.train.recompute == "full"
    assert variant.parse("cp2").settings(CONFIG).train.recompute == "selective"
    sharded = dataclasses.replace(CONFIG, parallel=ParallelConfig(vision="tensor"))
    assert variant.parse("tp2").settings(sharded).parallel.vision == "tensor"
    assert variant.parse("tp2_vision_data").settings(sharded).parallel.vision == "data"


def test_layers_of_stages_stay_where_they_fit():
    config = dataclasses.replace(CONFIG, parallel=ParallelConfig(pipeline=2, pipeline_layers=(1, 3)))
    assert variant.parse("pp2_tp2").settings(config).parallel.pipeline_layers == (1, 3)
    assert variant.parse("pp4").settings(config).parallel.pipeline_layers == ()


@pytest.mark.parametrize(
    ("name", "changes", "numbers"),
    [
        ("tp3", {}, ("layout tp3 (3 processes)", "parallel.tensor=3", "the 4 query heads")),
        ("cp8_ulysses", {}, ("parallel.context=8", "the 4 query heads", "only to 4 of them")),
        ("tp2_cp4_ulysses", {}, ("parallel.context=4", "the 2 query heads", "only to 2 of them")),
        ("pp3", {}, ("4 decoder layers", "3 pipeline chunks")),
        ("pp2_vpp4", {}, ("4 decoder layers", "8 pipeline chunks")),
        ("vpp2", {}, ("parallel.pipeline=1",)),
        ("sp", {}, ("parallel.tensor=1",)),
        ("dp3", {}, ("train.global_batch=8", "3 data-parallel ranks")),
        ("cp4", {"sequence_length": 510}, ("data.sequence_length=510", "multiple of 4", "508 and 512")),
        ("one", {"image_crops": 8, "max_crops": 4}, ("data.max_crops=4", "9")),
    ],
)
def test_layouts_that_fit_nothing_are_refused_with_the_numbers(name, changes, numbers):
    config = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **changes))
    with pytest.raises(ValueError) as error:
        variant.parse(name).settings(config)
    for number in numbers:
        assert number in str(error.value)


def test_unpacked_rows_and_dropout_are_refused_together():
    config = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, response_dropout=0.1))
    with pytest.raises(ValueError, match="train.response_dropout=0"):
        variant.parse("unpacked").settings(config)
    assert variant.parse("packed").settings(config).train.response_dropout == 0.1
