"""Pixels -> crops as patches, and the windows of patches that become placeholders.

h, w: pixels of an image. k crops, p patches in a crop, d = patch side squared x 3. n windows, m patches in a window.
A frame of a video is one crop. Bytes equal those of transformers' Molmo2 image and video processors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import numpy as np

from megatron_vlm.batch import PAD
from megatron_vlm.config.geometry import ImageGeometry, ImageLayout, Layout, VideoLayout, frame_layout
from megatron_vlm.data.resize import cut_rows, strips


def cut(
    pixels: np.ndarray, layout: ImageLayout, geometry: ImageGeometry, start: int = 0, stop: int | None = None
) -> np.ndarray:
    """Crops `start` to `stop` of an image (all by default): (k, p, d) uint8, the global crop first.

    pixels: (h, w, 3) uint8. Patches in raster order, values of a patch by (row, column, channel).
    """
    stop = layout.crops if stop is None else stop
    grid, patch = geometry.grid, geometry.patch_size
    crops = np.empty((stop - start, grid, grid, 3 * patch**2), dtype=np.uint8)
    side = geometry.crop_pixels
    if start < stop and (start == 0 or layout.tiling == (1, 1)):
        for row, patches in enumerate(_patch_rows(pixels, side, side, patch, range(grid))):
            crops[0, row] = patches
    if layout.tiling == (1, 1):
        # The canvas is one crop: the same pixels as the global one.
        crops[1:] = crops[:1]
    elif stop > max(start, 1):
        _tile(pixels, layout, geometry, max(start, 1), crops[max(start, 1) - start :])
    return crops.reshape(len(crops), geometry.patches, 3 * patch**2)


def _tile(pixels: np.ndarray, layout: ImageLayout, geometry: ImageGeometry, first: int, crops: np.ndarray) -> None:
    """Fill crops (k, grid, grid, d) with the high-resolution ones from `first` on, canvas row by canvas row."""
    grid, window, columns = geometry.grid, geometry.window, layout.tiling[1]
    places = [divmod(first - 1 + number, columns) for number in range(len(crops))]
    rows = range(places[0][0] * window, places[-1][0] * window + grid)
    height, width = (patches * geometry.patch_size for patches in layout.canvas)
    for row, patches in zip(rows, _patch_rows(pixels, height, width, geometry.patch_size, rows), strict=True):
        for crop, (down, across) in zip(crops, places, strict=True):
            if 0 <= row - down * window < grid:
                crop[row - down * window] = patches[across * window : across * window + grid]


def _patch_rows(pixels: np.ndarray, height: int, width: int, patch: int, rows: range) -> Iterator[np.ndarray]:
    """Rows of patches, each (width / patch, d) uint8, of the image resized to height x width pixels."""
    wanted = cut_rows(range(rows.start * patch, rows.stop * patch), width, patch)
    for strip in strips(pixels, height, width, wanted):
        # (rows of patches, rows of pixels, columns of patches, values) -> patches with their pixels together
        blocks = strip.reshape(-1, patch, width // patch, 3 * patch).transpose(0, 2, 1, 3)
        yield from blocks.reshape(len(blocks), -1, 3 * patch**2)


@lru_cache(maxsize=512)
def windows(layout: ImageLayout, geometry: ImageGeometry) -> np.ndarray:
    """(n, m) int64: the patches of each window as crop * p + patch, crops counted from the image's first; PAD in empty
    slots. In the order of the image's placeholders. Resampler: one window per crop, all its patches. Read-only."""
    patches = geometry.patches
    if geometry.queries:
        table = np.arange(layout.crops * patches, dtype=np.int64).reshape(layout.crops, patches)
    else:
        grid = np.arange(patches, dtype=np.int64).reshape(geometry.grid, geometry.grid)
        table = _pool(grid, geometry.pool)
        if layout.tiling[0]:
            table = np.concatenate([table, _pool(_canvas_patches(layout, geometry), geometry.pool)])
    table.setflags(write=False)
    return table


@lru_cache(maxsize=64)
def video_windows(frames: int, geometry: ImageGeometry) -> np.ndarray:
    """(n, m) int64: `windows` of so many frames of a video, crops counted from its first frame. Read-only."""
    frame = windows(frame_layout(geometry), geometry.frame)
    first = np.arange(frames, dtype=np.int64)[:, None, None] * geometry.patches
    table = np.where(frame == PAD, PAD, frame + first).reshape(frames * len(frame), -1)
    table.setflags(write=False)
    return table


def row_windows(layouts: Iterable[Layout], geometry: ImageGeometry) -> np.ndarray:
    """(n, m) int64: the windows of several images and videos, crops counted over all of them, narrower windows filled
    up with PAD. (0, 1) where there are none."""
    tables, patches = [], []
    for layout in layouts:
        is_video = isinstance(layout, VideoLayout)
        tables.append(video_windows(layout.crops, geometry) if is_video else windows(layout, geometry))
        patches.append(layout.crops * geometry.patches)
    return stacked(tables, patches)


def stacked(tables: Sequence[np.ndarray], patches: Sequence[int]) -> np.ndarray:
    """(n, m) int64: tables of windows one below the other, narrower windows filled up with PAD. (0, 1) where there are
    none.

    patches: how many there are behind each table, whose indices count them from its own first.
    """
    if not tables:
        return np.empty((0, 1), dtype=np.int64)
    widest, first, found = max(table.shape[1] for table in tables), 0, []
    for table, count in zip(tables, patches, strict=True):
        moved = np.where(table == PAD, PAD, table + first)
        found.append(np.pad(moved, ((0, 0), (0, widest - table.shape[1])), constant_values=PAD))
        first += count
    return np.concatenate(found)


def _canvas_patches(layout: ImageLayout, geometry: ImageGeometry) -> np.ndarray:
    """The canvas as (rows, columns) patch indices: each place is shown by the one crop that owns it."""
    down, down_patch = _owners(layout.tiling[0], geometry)
    across, across_patch = _owners(layout.tiling[1], geometry)
    crop = 1 + down[:, None] * layout.tiling[1] + across[None, :]
    return crop * geometry.patches + down_patch[:, None] * geometry.grid + across_patch[None, :]


def _owners(tiles: int, geometry: ImageGeometry) -> tuple[np.ndarray, np.ndarray]:
    """Along one side of the canvas: which tile owns each patch, and the patch's place in that tile."""
    place = np.arange(tiles * geometry.window + 2 * geometry.margin, dtype=np.int64)
    tile = np.clip((place - geometry.margin) // geometry.window, 0, tiles - 1)
    return tile, place - tile * geometry.window


def _pool(grid: np.ndarray, pool: int) -> np.ndarray:
    """Group a grid of patch indices into windows, (n, pool * pool); the missing patches of an odd grid are PAD, split
    to both sides with the larger part after."""
    padding = [((-size) % pool // 2, ((-size) % pool + 1) // 2) for size in grid.shape]
    grid = np.pad(grid, padding, constant_values=PAD)
    rows, columns = grid.shape[0] // pool, grid.shape[1] // pool
    return grid.reshape(rows, pool, columns, pool).transpose(0, 2, 1, 3).reshape(rows * columns, pool * pool)
