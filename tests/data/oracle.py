"""transformers' Molmo2 image processor, made to run beside the CPU build of torch."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from tests.torchvision import declare_operators


@cache
def processor():
    """The image processor with Molmo2's released settings (patch 14, 378 pixels, margins 4, pooling 2x2)."""
    declare_operators()
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

    # Neither rescaled nor normalised: the bytes themselves.
    return Molmo2ImageProcessor(do_rescale=False, do_normalize=False)


@cache
def video_processor():
    """The video processor with Molmo2's released settings (378 pixels, patch 14, pooling 3x3)."""
    declare_operators()
    from transformers.models.molmo2.video_processing_molmo2 import Molmo2VideoProcessor

    return Molmo2VideoProcessor(do_rescale=False, do_normalize=False, do_sample_frames=False)


def video_processed(frames: np.ndarray, **settings) -> dict[str, torch.Tensor]:
    """Crops (t, p, d), pooling index (n, 9) and grid of the frames of one video (t, h, w, 3) uint8."""
    video = torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2)))
    return dict(video_processor()([video], return_tensors="pt", **settings))


def video_text(grid: torch.Tensor, times: list[float]) -> str:
    """How transformers' processor writes a video of frames shown at these seconds; grid: (frames, rows, columns)."""
    declare_operators()
    from transformers.models.molmo2.processing_molmo2 import Molmo2Processor

    settings = SimpleNamespace(use_frame_special_tokens=True, video_use_col_tokens=False)
    return Molmo2Processor.get_video_string(settings, grid, times)


def processed(pixels: np.ndarray, **settings) -> dict[str, torch.Tensor]:
    """Crops (k, p, d), pooling index (n, 4), grids and crop counts of one image (h, w, 3) uint8."""
    return dict(processor()([Image.fromarray(pixels)], return_tensors="pt", **settings))
