"""A built-in batch that exercises what conversion can get wrong: several tilings, several images, a video, branches, a
packed row, text alone. Random numbers by seed: the same for every model of an architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_vlm.batch import PREFIX_BRANCH, Batch
from megatron_vlm.config.architecture import VISION_TOKENS, Architecture
from megatron_vlm.config.geometry import (
    ImageGeometry,
    ImageLayout,
    Layout,
    VideoLayout,
    frame_layout,
    image_geometry,
    image_layout,
)
from megatron_vlm.data import crops, resize


@dataclass(frozen=True)
class Recipe:
    """What an example of the built-in batch has."""

    branches: tuple[int, ...]
    """Their lengths."""
    images: tuple[tuple[float, float], ...] = ()
    """Height and width of each, in sides of a crop."""
    times: tuple[float, ...] = ()
    """Of a video's frames, in seconds."""


EXAMPLES = (
    Recipe((9, 6), images=((0.7, 0.8), (0.6, 1.9))),
    Recipe((12,)),
    Recipe((8, 7), times=(0.0, 0.5, 1.0)),
    Recipe((7, 5, 8), images=((1.7, 0.9),)),
)
#: High-resolution crops of an image.
MOST_CROPS = 4


@dataclass(frozen=True)
class Sample:
    """An example of the batch."""

    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    layouts: tuple[Layout, ...]
    """Of its images, or of its video."""
    crops: np.ndarray
    """(c, p, d) uint8."""
    windows: np.ndarray
    """(n, w) int64 into the sample's own patches, PAD in empty slots."""


def samples(arch: Architecture, *, images: bool = True, seed: int = 0) -> list[Sample]:
    """The examples for a model. images: False = only those without."""
    random = np.random.default_rng(seed)
    geometry = image_geometry(arch, MOST_CROPS)
    return [
        _sample(arch, recipe, geometry, random) for recipe in EXAMPLES if images or not (recipe.images or recipe.times)
    ]


def _sample(arch: Architecture, recipe: Recipe, geometry: ImageGeometry, random: np.random.Generator) -> Sample:
    prefix = [_word(arch, random)]
    layouts: list[Layout] = []
    pixels = np.empty((0, arch.vision.patches, arch.vision.patch_values), np.uint8)
    for height, width in recipe.images:
        picture = _picture(round(height * geometry.crop_pixels), round(width * geometry.crop_pixels), random)
        layout = image_layout(picture.shape[1], picture.shape[0], geometry)
        pixels = np.concatenate([pixels, crops.cut(picture, layout, geometry)])
        layouts.append(layout)
        prefix += [_word(arch, random), *_image_tokens(arch, layout)]
    if recipe.times:
        film = VideoLayout(recipe.times, 0.0, frame_layout(geometry))
        frames = [_picture(geometry.crop_pixels, geometry.crop_pixels, random) for _ in recipe.times]
        pixels = np.concatenate([pixels, *(crops.cut(frame, film.frame, geometry.frame) for frame in frames)])
        layouts.append(film)
        for _ in recipe.times:
            prefix += [_word(arch, random), *_frame_tokens(arch, film)]
    branches = tuple(tuple(_word(arch, random) for _ in range(length)) for length in recipe.branches)
    return Sample(tuple(prefix), branches, tuple(layouts), pixels, crops.row_windows(layouts, geometry))


def _word(arch: Architecture, random: np.random.Generator) -> int:
    return int(random.integers(arch.language.vocab_size))


def _picture(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Large blobs of colour, so that neighbouring patches are alike and far ones are not."""
    blobs = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return resize.resize(blobs, height, width)


def _image_tokens(arch: Architecture, layout: ImageLayout) -> list[int]:
    patch, end = arch.token_id("<im_patch>"), arch.token_id("<im_end>")
    tokens = [arch.token_id("<low_res_im_start>"), *[patch] * (layout.global_grid[0] * layout.global_grid[1]), end]
    rows, columns = layout.high_grid
    row = [*[patch] * columns, arch.token_id("<im_col>")]
    return [*tokens, arch.token_id("<im_start>"), *row * rows, end] if rows else tokens


def _frame_tokens(arch: Architecture, layout: VideoLayout) -> list[int]:
    start, patch, end = (arch.token_id(name) for name in ("<frame_start>", "<im_patch>", "<frame_end>"))
    return [start, *[patch] * layout.frame.placeholders, end]


def packed(arch: Architecture, chosen: Sequence[Sample]) -> tuple[Batch, torch.Tensor]:
    """All samples as one row, and the places of the tokens of their branches."""
    tokens: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    examples: list[int] = []
    for number, sample in enumerate(chosen):
        start = len(sample.prefix)
        for branch, ids in [(PREFIX_BRANCH, sample.prefix), *enumerate(sample.branches)]:
            tokens += ids
            positions += range(start, start + len(ids)) if branch != PREFIX_BRANCH else range(len(ids))
            branches += [branch] * len(ids)
        examples += [number] * (len(tokens) - len(examples))
    ids, branch = torch.tensor(tokens)[None], torch.tensor(branches, dtype=torch.int32)[None]
    pixels = np.concatenate([sample.crops for sample in chosen])
    windows = crops.stacked([one.windows for one in chosen], [len(one.crops) * one.crops.shape[1] for one in chosen])
    batch = Batch(
        tokens=ids,
        targets=torch.zeros_like(ids),
        loss_weights=torch.zeros(ids.shape),
        positions=torch.tensor(positions)[None],
        examples=torch.tensor(examples, dtype=torch.int32)[None],
        branches=branch,
        is_vision=torch.isin(ids, torch.tensor([arch.token_id(name) for name in VISION_TOKENS])),
        sources=torch.zeros(ids.shape, dtype=torch.int32),
        crops=torch.from_numpy(pixels),
        crop_counts=(len(pixels),),
        windows=torch.from_numpy(windows),
        rows=torch.zeros(1, dtype=torch.int64),
    )
    return batch, (branch[0] != PREFIX_BRANCH).nonzero()[:, 0]
