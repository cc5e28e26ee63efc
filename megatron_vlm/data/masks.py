"""Masks as COCO's run lengths: how annotations are kept in a sample, (height, width, run lengths)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np


def packed(value: Any) -> tuple[int, int, str]:
    """A mask of an annotation: run lengths {size, counts}, or rows of truth values. ValueError for anything else."""
    from pycocotools import mask as coco

    if isinstance(value, Mapping) and "counts" in value and len(value.get("size", ())) == 2:
        height, width = map(int, value["size"])
        counts = value["counts"]
        if isinstance(counts, list):  # run lengths as plain numbers
            counts = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
        return height, width, counts.decode() if isinstance(counts, bytes) else str(counts)
    rows = np.asarray(value)
    if rows.ndim != 2 or rows.dtype not in (np.dtype(bool), np.dtype(np.uint8), np.dtype(np.int64)):
        raise ValueError("a mask must be COCO run lengths {size, counts}, or rows of truth values.")
    found = coco.encode(np.asfortranarray(rows.astype(np.uint8)))
    return rows.shape[0], rows.shape[1], found["counts"].decode()


@lru_cache(maxsize=256)
def unpacked(height: int, width: int, counts: str) -> np.ndarray:
    """(h, w) bool."""
    from pycocotools import mask as coco

    return np.asarray(coco.decode({"size": [height, width], "counts": counts.encode()})).astype(bool)
