"""The worked examples of Molmo2's image preprocessing, and what must hold for every geometry."""

import dataclasses

import pytest

from megatron_vlm.config.geometry import ImageGeometry, image_geometry, image_layout, most_tokens, select_tiling
from megatron_vlm.config.presets import PRESETS, architecture
from megatron_vlm.config.schema import ModelConfig

MOLMO2 = ImageGeometry(grid=27, patch_size=14, pool=2, queries=0, max_crops=8)


@pytest.mark.parametrize(
    ("width", "height", "tiling"),
    [
        (378, 378, (1, 1)),
        (640, 480, (2, 2)),
        (1024, 768, (2, 3)),
        (1920, 1080, (2, 4)),
        (500, 2000, (5, 1)),
        (200, 300, (1, 1)),
        (1000, 60, (1, 4)),
        (1, 1, (1, 1)),
    ],
)
def test_tilings_of_known_sizes(width, height, tiling):
    assert image_layout(width, height, MOLMO2).tiling == tiling


@pytest.mark.parametrize(
    ("size", "tiling", "grid", "tokens", "crops"),
    [
        ((378, 378), (1, 1), (14, 14), 410, 2),
        ((640, 300), (1, 2), (14, 23), 536, 3),
        ((300, 640), (2, 1), (23, 14), 545, 3),
        ((640, 480), (2, 2), (23, 23), 752, 5),
        ((1024, 768), (2, 3), (23, 33), 982, 7),
        ((1920, 1080), (2, 4), (23, 42), 1189, 9),
        ((1080, 1920), (4, 2), (42, 23), 1208, 9),
        ((4000, 300), (1, 8), (14, 80), 1334, 9),
        ((300, 4000), (8, 1), (80, 14), 1400, 9),
    ],
)
def test_tokens_of_known_tilings(size, tiling, grid, tokens, crops):
    layout = image_layout(*size, MOLMO2)
    assert (layout.tiling, layout.high_grid, layout.tokens, layout.crops) == (tiling, grid, tokens, crops)
    assert layout.placeholders == 196 + grid[0] * grid[1]


def test_most_tokens():
    assert most_tokens(MOLMO2) == 1400
    assert most_tokens(dataclasses.replace(MOLMO2, max_crops=24)) == 3680
    assert most_tokens(dataclasses.replace(MOLMO2, max_crops=0)) == 198


def test_margins_are_proportional():
    assert [dataclasses.replace(MOLMO2, grid=grid).margin for grid in (27, 24, 16, 8, 4, 2, 1)] == [4, 4, 2, 1, 1, 0, 0]
    assert all(dataclasses.replace(MOLMO2, grid=grid).window >= 1 for grid in range(1, 65))


def test_single_view():
    layout = image_layout(1920, 1080, dataclasses.replace(MOLMO2, max_crops=0, pool=1))
    assert (layout.crops, layout.placeholders, layout.tokens) == (1, 729, 731)


def test_resampler_gives_queries_per_crop():
    arch = architecture(ModelConfig(preset="qwen3_0.6b", connector="resampler"))
    layout = image_layout(640, 480, image_geometry(arch, 8))
    assert layout.crops == 5
    assert layout.placeholders == 5 * arch.connector.queries
    assert layout.tokens == 5 * arch.connector.queries + 2 + 2 + 2


def test_tiny_preset():
    geometry = image_geometry(PRESETS["tiny"], 4)
    assert (geometry.crop_pixels, geometry.margin, geometry.window) == (64, 1, 6)
    assert image_layout(64, 64, geometry).tokens == 16 + 2 + 16 + 4 + 2


def test_more_crops_never_shrink_more():
    for size in ((300, 4000), (999, 1001), (5000, 5000), (640, 480)):
        scales = []
        for crops in (1, 4, 9, 16, 24):
            rows, columns = select_tiling(*size, 266, crops)
            assert rows * columns <= crops
            scales.append(min(1.0, rows * 266 / size[0], columns * 266 / size[1]))
        assert scales == sorted(scales)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="0x5 pixels"):
        image_layout(0, 5, MOLMO2)
    with pytest.raises(ValueError, match="image_crops=-1"):
        image_geometry(PRESETS["tiny"], -1)
