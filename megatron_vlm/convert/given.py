"""The user's own batch for `verify --logits`: a JSON file that names images, videos and texts.

    [{"images": ["cat.jpg", "dog.png"], "texts": ["What is it? A cat.", "How many are there? Two."]},
     {"video": "clip.mp4", "texts": ["What happens? It rains."]},
     {"texts": ["Once upon a time"]}]

Each element is one example; files are found from the JSON file's folder. The texts of an example are branches: each
follows the images or the video, and sees no other. Images get at most MOST_CROPS crops beside the global one, videos
two frames a second, at most MOST_FRAMES.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.geometry import (
    ImageGeometry,
    Layout,
    VideoLayout,
    frame_layout,
    image_geometry,
    image_layout,
)
from megatron_vlm.convert.probe import MOST_CROPS, Sample
from megatron_vlm.data import crops, image, video
from megatron_vlm.data.frames import frame_times
from megatron_vlm.data.prefix import prefix_tokens
from megatron_vlm.data.tokens import Tokenizer

MOST_FRAMES, FRAMES_PER_SECOND = 8, 2.0


def read(path: str | Path, arch: Architecture, tokenizer: Tokenizer) -> list[Sample]:
    """The examples of a batch file. ValueError, naming the element, for what is not as described above."""
    path = Path(path)
    try:
        elements = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"the batch {path} cannot be read as JSON: {error}.") from error
    if not isinstance(elements, list) or not elements:
        raise ValueError(f"the batch {path} is not a list of examples; `verify --help` shows one.")
    geometry = image_geometry(arch, MOST_CROPS)
    return [
        _sample(f"{path}, element {number}", path.parent, element, geometry, tokenizer)
        for number, element in enumerate(elements)
    ]


def _sample(where: str, folder: Path, element: Any, geometry: ImageGeometry, tokenizer: Tokenizer) -> Sample:
    if not isinstance(element, dict) or not element.keys() <= {"images", "video", "texts"}:
        raise ValueError(f"{where} is {element!r}; it may have images, or a video, and texts.")
    images, film, texts = element.get("images", []), element.get("video"), element.get("texts")
    if images and film:
        raise ValueError(f"{where} has images and a video; an example has one or the other.")
    branches = tuple(tuple(tokenizer.encode(text)) for text in _texts(where, "texts", texts))
    if not all(branches):
        raise ValueError(f"{where} has an empty text; there is nothing to compare in it.")
    files = _texts(where, "images", images) if images else []
    seen = [_photo(folder / name, geometry) for name in files]
    if film is not None:
        seen = [_film(folder / _texts(where, "video", [film])[0], geometry)]
    layouts = tuple(layout for layout, _ in seen)
    empty = np.empty((0, geometry.patches, 3 * geometry.patch_size**2), np.uint8)
    return Sample(
        tuple(prefix_tokens(layouts, tokenizer)[0].tolist()),
        branches,
        layouts,
        np.concatenate([empty, *(pixels for _, pixels in seen)]),
        crops.row_windows(layouts, geometry),
    )


def _texts(where: str, name: str, value: Any) -> list[str]:
    if not isinstance(value, list) or not value or not all(isinstance(each, str) for each in value):
        raise ValueError(f"{where}: {name} is {value!r}; it must be a list of strings, and not empty.")
    return value


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"the batch names {path}, which cannot be read: {error.strerror}.") from error


def _photo(path: Path, geometry: ImageGeometry) -> tuple[Layout, np.ndarray]:
    pixels = image.decode(_bytes(path), name=str(path))
    layout = image_layout(pixels.shape[1], pixels.shape[0], geometry)
    return layout, crops.cut(pixels, layout, geometry)


def _film(path: Path, geometry: ImageGeometry) -> tuple[Layout, np.ndarray]:
    data = _bytes(path)
    timeline = video.scan(data, name=str(path)).timeline
    layout = VideoLayout(frame_times(timeline.seconds, FRAMES_PER_SECOND, MOST_FRAMES), 0.0, frame_layout(geometry))
    frames = video.read(data, timeline, layout.times, name=str(path))
    return layout, np.concatenate([crops.cut(frame, layout.frame, geometry.frame) for frame in frames])
