"""transformers' Molmo2 image processor, made to run beside the CPU build of torch."""

from __future__ import annotations

from functools import cache

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


def processed(pixels: np.ndarray, **settings) -> dict[str, torch.Tensor]:
    """Crops (k, p, d), pooling index (n, 4), grids and crop counts of one image (h, w, 3) uint8."""
    return dict(processor()([Image.fromarray(pixels)], return_tensors="pt", **settings))
