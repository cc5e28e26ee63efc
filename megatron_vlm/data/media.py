"""Stored images and videos -> the crops of a layout. The only way from a media key to pixels.

k crops, p patches in a crop, d numbers in a patch.
"""

from __future__ import annotations

import numpy as np

from megatron_vlm.config.geometry import ImageGeometry, Layout, VideoLayout
from megatron_vlm.data import image, video
from megatron_vlm.data.crops import cut
from megatron_vlm.data.shards import Shards


def read_crops(
    shards: Shards,
    key: str,
    layout: Layout,
    geometry: ImageGeometry,
    start: int = 0,
    stop: int | None = None,
    *,
    name: str,
) -> np.ndarray:
    """Crops `start` to `stop` (all by default) of a stored image or video: (k, p, d) uint8. Of a video only the frames
    asked for are decoded, and what lies between a key frame and them.

    Raises ValueError, naming the file by `name`, where it does not decode.
    """
    stop = layout.crops if stop is None else stop
    data = shards.media(key)
    if isinstance(layout, VideoLayout):
        return _frames(data, shards, key, layout, geometry, start, stop, name)
    pixels = image.decode(data, name=name)
    try:
        return cut(pixels, layout, geometry, start, stop)
    except Exception as error:
        error.add_note(f"image {name}, {pixels.shape[1]}x{pixels.shape[0]} pixels")
        raise


def _frames(
    data: bytes,
    shards: Shards,
    key: str,
    layout: VideoLayout,
    geometry: ImageGeometry,
    start: int,
    stop: int,
    name: str,
) -> np.ndarray:
    moments = [layout.start + moment for moment in layout.times[start:stop]]
    crops = np.empty((stop - start, geometry.patches, 3 * geometry.patch_size**2), dtype=np.uint8)
    last: np.ndarray | None = None
    for place, pixels in enumerate(video.read(data, shards.timeline(key), moments, name=name)):
        if pixels is last:  # two moments of a slow video show the same frame
            crops[place] = crops[place - 1]
        else:
            crops[place] = cut(pixels, layout.frame, geometry.frame)[0]
        last = pixels
    return crops
