"""Stored images and videos -> the crops of a layout. The only way from a media key to pixels.

k crops, p patches in a crop, d numbers in a patch.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np

from megatron_vlm.config.geometry import ImageGeometry, Layout, VideoLayout
from megatron_vlm.data import image, video
from megatron_vlm.data.crops import cut
from megatron_vlm.data.example import Media
from megatron_vlm.data.timeline import Timeline


class Store(Protocol):
    """Where media lie: Shards, or Files."""

    def media(self, key: str) -> bytes:
        """The file."""

    def timeline(self, key: str) -> Timeline:
        """Of a video."""


class Files:
    """Images and videos by their bytes, read as if they lay in shards."""

    def __init__(self) -> None:
        self._files: dict[str, bytes] = {}
        self._timelines: dict[str, Timeline] = {}

    def add_image(self, data: bytes, *, name: str) -> Media:
        """Raises ValueError, naming it, where it is no image of an allowed kind, or does not decode."""
        height, width, _ = image.decode(data, name=name).shape
        return Media(self._add(data), width, height)

    def add_video(self, data: bytes, *, name: str) -> Media:
        """Raises ValueError, naming it, where it is not a whole video of an allowed kind."""
        found = video.scan(data, name=name)
        key, timeline = self._add(data), found.timeline
        self._timelines[key] = timeline
        return Media(key, found.width, found.height, "video", timeline.seconds, timeline.fps, len(timeline.pts))

    def _add(self, data: bytes) -> str:
        key = hashlib.sha256(data).hexdigest()
        self._files[key] = data
        return key

    def media(self, key: str) -> bytes:
        return self._files[key]

    def timeline(self, key: str) -> Timeline:
        return self._timelines[key]


def read_crops(
    shards: Store,
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
    shards: Store,
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
