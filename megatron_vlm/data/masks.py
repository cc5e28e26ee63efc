"""Masks as COCO's run lengths: how annotations are kept in a sample, (height, width, run lengths)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np

#: Most pixels of a mask, which takes a byte each when it is unpacked.
MAX_PIXELS = 100_000_000


def packed(value: Any) -> tuple[int, int, str]:
    """A mask of an annotation: run lengths {size, counts}, or rows of truth values. ValueError for anything else."""
    try:
        return _packed(value)
    except (TypeError, OverflowError, KeyError) as error:
        raise ValueError(f"a mask is no COCO run lengths {{size, counts}} ({error}).") from error


def _packed(value: Any) -> tuple[int, int, str]:
    from pycocotools import mask as coco

    if isinstance(value, Mapping) and "counts" in value and len(value.get("size", ())) == 2:
        height, width = map(int, value["size"])
        if not (height > 0 and width > 0 and height * width <= MAX_PIXELS):
            raise ValueError(f"a mask of {width}x{height} pixels; needed 1 to {MAX_PIXELS}.")
        counts = value["counts"]
        if isinstance(counts, list):  # run lengths as plain numbers
            counts = coco.frPyObjects({"size": [height, width], "counts": counts}, height, width)["counts"]
        counts = counts.decode() if isinstance(counts, bytes) else str(counts)
        coco.decode({"size": [height, width], "counts": counts.encode()})  # ValueError where they do not fill the size
        return height, width, counts
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
