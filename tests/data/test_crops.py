"""Crops and windows: equal to transformers' Molmo2 image processor, and sound for every geometry."""

import numpy as np
import pytest

from megatron_vlm.config.geometry import ImageGeometry, VideoLayout, frame_layout, image_layout
from megatron_vlm.data.crops import cut, row_windows, video_windows, windows
from tests.data.oracle import processed, video_processed

MOLMO2 = ImageGeometry(grid=27, patch_size=14, pool=2, queries=0, max_crops=8)
# (width, height): upright, wide, tiny, odd, at and beside the borders of a crop and of the margin.
SIZES = [
    (378, 378), (377, 379), (112, 112), (113, 113), (1, 1), (2, 90), (111, 30), (64, 64), (200, 300), (300, 200),
    (378, 644), (644, 378), (640, 480), (480, 640), (500, 500), (511, 513), (645, 643), (1000, 120), (120, 1000),
    (1024, 768), (768, 1024), (800, 600), (901, 401), (333, 1777), (1777, 333), (1280, 720), (720, 1280), (910, 910),
    (500, 2000), (2000, 500), (3000, 113), (113, 3000), (1176, 1176), (1920, 1080), (1080, 1920), (2500, 2500),
]  # fmt: skip


def picture(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * 10_007 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_equals_transformers(width, height):
    pixels = picture(width, height)
    layout = image_layout(width, height, MOLMO2)
    expected = processed(pixels)
    crops = cut(pixels, layout, MOLMO2)
    assert crops.tobytes() == expected["pixel_values"].numpy().astype(np.uint8).tobytes()
    assert crops.shape == tuple(expected["pixel_values"].shape)
    assert np.array_equal(windows(layout, MOLMO2), expected["image_token_pooling"].numpy())
    assert [*layout.global_grid, *layout.high_grid] == expected["image_grids"][0].tolist()
    assert layout.crops == expected["image_num_crops"].item()


@pytest.mark.parametrize(
    ("grid", "pool", "crops"), [(27, 3, 4), (8, 2, 4), (8, 1, 9), (24, 2, 24), (4, 3, 6), (2, 2, 4), (27, 1, 0)]
)
def test_each_canvas_patch_is_owned_once(grid, pool, crops):
    geometry = ImageGeometry(grid=grid, patch_size=2, pool=pool, queries=0, max_crops=crops)
    for size in ((3, 4), (150, 40), (33, 90), (200, 200)):
        layout = image_layout(*size, geometry)
        table = windows(layout, geometry)
        used = table[table >= 0]
        assert len(table) == layout.placeholders
        assert len(used) == len(set(used.tolist())) == geometry.patches + layout.canvas[0] * layout.canvas[1]
        assert used.max() < layout.crops * geometry.patches
        # The patch that a window names shows the canvas pixels of that place.
        if layout.tiling[0]:
            canvas = np.arange(layout.canvas[0] * layout.canvas[1] * 4 * 3, dtype=np.int64) % 251
            canvas = canvas.astype(np.uint8).reshape(layout.canvas[0] * 2, layout.canvas[1] * 2, 3)
            patches = cut(canvas, layout, geometry).reshape(-1, 12)
            shown = patches[np.sort(used[used >= geometry.patches])]
            blocks = (
                canvas.reshape(layout.canvas[0], 2, layout.canvas[1], 2, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 12)
            )
            assert sorted(map(bytes, shown)) == sorted(map(bytes, blocks))


@pytest.mark.parametrize(("width", "height"), [(640, 360), (378, 378), (50, 301), (1280, 720)])
def test_frames_equal_transformers(width, height):
    frames = np.stack([picture(width + number, height)[:, :width] for number in range(3)])
    expected = video_processed(frames)
    crops = np.concatenate([cut(frame, frame_layout(MOLMO2), MOLMO2.frame) for frame in frames])
    assert crops.tobytes() == expected["pixel_values_videos"].numpy().astype(np.uint8).tobytes()
    assert crops.shape == tuple(expected["pixel_values_videos"].shape)
    assert np.array_equal(video_windows(3, MOLMO2), expected["video_token_pooling"].numpy())
    assert expected["video_grids"].tolist() == [[3, *frame_layout(MOLMO2).global_grid]]


@pytest.mark.parametrize(("grid", "pool"), [(8, 3), (27, 2), (10, 4), (27, 7), (7, 1), (4, 5)])
def test_frames_of_grids_that_do_not_divide(grid, pool):
    """Windows at the edge have empty slots, half of them before."""
    geometry = ImageGeometry(grid, 14, 2, 0, 4, pool)
    side = -(-grid // pool)
    assert frame_layout(geometry).global_grid == (side, side) and frame_layout(geometry).crops == 1
    expected = video_processed(
        np.zeros((2, 20, 20, 3), dtype=np.uint8),
        size={"height": grid * 14, "width": grid * 14},
        pooling_size=[pool, pool],
    )
    assert np.array_equal(video_windows(2, geometry), expected["video_token_pooling"].numpy())
    assert frame_layout(geometry).placeholders * 2 == len(video_windows(2, geometry))


def test_images_and_videos_share_a_row():
    image = image_layout(640, 480, MOLMO2)
    video = VideoLayout((0.0, 0.5), 0.0, frame_layout(MOLMO2))
    table = row_windows([image, video, image], MOLMO2)
    assert table.shape == (2 * image.placeholders + 2 * 81, 9)
    n, first = image.placeholders, windows(image, MOLMO2)
    assert np.array_equal(table[:n, :4], first) and (table[:n, 4:] == -1).all()
    assert np.array_equal(table[n : n + 162], video_windows(2, MOLMO2) + image.crops * 729)
    assert np.array_equal(table[n + 162 :, :4], np.where(first < 0, -1, first + (image.crops + 2) * 729))
    assert row_windows([image], MOLMO2).shape == (n, 4) and row_windows([], MOLMO2).shape == (0, 1)


def test_a_resampler_reads_frames_whole():
    geometry = ImageGeometry(grid=8, patch_size=14, pool=2, queries=5, max_crops=4)
    video = VideoLayout((0.0, 0.5, 1.0), 0.0, frame_layout(geometry))
    assert video.placeholders == 15
    assert np.array_equal(row_windows([video], geometry), np.arange(3 * 64).reshape(3, 64))


def test_part_of_the_crops():
    pixels, layout = picture(640, 480), image_layout(640, 480, MOLMO2)
    whole = cut(pixels, layout, MOLMO2)
    for start in range(layout.crops + 1):
        for stop in range(start, layout.crops + 1):
            assert np.array_equal(cut(pixels, layout, MOLMO2, start, stop), whole[start:stop])


def test_resampler_windows_are_whole_crops():
    geometry = ImageGeometry(grid=8, patch_size=14, pool=2, queries=5, max_crops=4)
    layout = image_layout(300, 200, geometry)
    table = windows(layout, geometry)
    assert table.shape == (layout.crops, 64)
    assert np.array_equal(table.ravel(), np.arange(layout.crops * 64))
    assert layout.placeholders == 5 * layout.crops
