"""transformers' Molmo2 image processor, made to run beside the CPU build of torch."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

_LIBRARY: list[torch.library.Library] = []


def _declare_operators() -> None:
    """torchvision describes operators that only its compiled part declares, and that part is not loaded beside a CPU
    torch of another build: declare them without an implementation, so that its import passes."""
    if _LIBRARY:
        return
    folder = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0])
    text = (folder / "_meta_registrations.py").read_text()
    names = set(re.findall(r"torchvision::(\w+)", text)) | set(re.findall(r"register_meta\(\"(\w+)\"\)", text))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor a) -> Tensor")
    _LIBRARY.append(library)


@cache
def processor():
    """The image processor with Molmo2's released settings (patch 14, 378 pixels, margins 4, pooling 2x2)."""
    _declare_operators()
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

    # Neither rescaled nor normalised: the bytes themselves.
    return Molmo2ImageProcessor(do_rescale=False, do_normalize=False)


def processed(pixels: np.ndarray, **settings) -> dict[str, torch.Tensor]:
    """Crops (k, p, d), pooling index (n, 4), grids and crop counts of one image (h, w, 3) uint8."""
    return dict(processor()([Image.fromarray(pixels)], return_tensors="pt", **settings))
