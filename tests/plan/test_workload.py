"""Assumed rows keep the limits of the settings."""

from __future__ import annotations

import pytest

from megatron_vlm.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan import workload


def config(length: int, crops: int, preset: str = "molmo2_4b", image_crops: int = 8) -> Config:
    data = DataConfig(sequence_length=length, max_crops=crops, image_crops=image_crops)
    return Config(model=ModelConfig(preset), data=data, train=TrainConfig(micro_batch=2))


@pytest.mark.parametrize("length, crops", [(2536, 16), (2536, 400), (16_384, 128), (36_864, 384)])
@pytest.mark.parametrize("video", [False, True])
def test_limits(length, crops, video):
    row = workload.assume(config(length, crops), video=video)
    assert 0 < row.crops <= crops
    assert row.image_tokens <= length * 0.9 and row.windows <= row.image_tokens
    assert 0 < row.loss_tokens <= length - row.image_tokens
    assert row.pairs <= length * length
    # One of the two limits is reached.
    assert row.crops >= crops - 9 or row.image_tokens > length * 0.9 - 1500


def test_video_row():
    row = workload.assume(config(36_864, 384), video=True)
    assert (row.crops, row.windows, row.slots, row.examples) == (372, 372 * 81, 9, 1)


def test_text_row():
    row = workload.assume(config(4096, 16), crops=0)
    assert (row.crops, row.windows, row.image_tokens, row.loss_tokens) == (0, 0, 0, 2048)
    assert row.pairs == 4096 * 4097 // 2 and row.masked == 0


def test_pairs_count_the_image_block_twice():
    row = workload.Row(tokens=10, crops=1, windows=4, slots=4, image_tokens=4, loss_tokens=1, examples=1)
    allowed = sum(key <= query or (query < 4 and key < 4) for query in range(10) for key in range(10))
    assert row.pairs == allowed


def test_load_of_the_fullest_rank():
    settings = config(2536, 16)
    row = workload.assume(settings, crops=10)
    load = workload.load(row, settings, Layout(8, tensor=2, context=4))
    assert load.crops == 3  # 20 crops of two rows over 8 ranks
    assert load.part == 634 and load.all_windows == 2 * row.windows
    assert (load.queries, load.pairs) == (2536, 2 * row.pairs)
    # Heads dealt among two context ranks; the other two have the other half of the queries.
    load = workload.load(row, settings, Layout(8, tensor=2, context=4, ulysses=2))
    assert (load.queries, load.pairs) == (1268, row.pairs)


@pytest.mark.parametrize("options, words", [({"loss_share": 0.0}, "loss share of 0.0"), ({"crops": -1}, "-1 crops")])
def test_wrong_assumptions(options, words):
    with pytest.raises(ValueError, match=words):
        workload.assume(config(2536, 16), **options)
