"""From the size of an image to its crops, placeholders and tokens; the same of video frames. No pixels, no torch.

Units: pixels where a name says so, else patches. A crop is `grid` x `grid` patches. Neighbouring crops of an image
overlap by two margins; of the overlap, each patch of the canvas belongs to exactly one crop.
Every image has a global crop (the whole image squeezed into one crop), which comes first, and, unless `max_crops` is 0,
a canvas of rows x columns high-resolution crops. A frame of a video is an image with only its global crop.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_vlm.config.architecture import Architecture

#: Overlap that Molmo2 has on each side of a crop of 27 patches; other grids get the nearest proportional whole number.
MARGIN_OF_27 = 4


@dataclass(frozen=True)
class ImageGeometry:
    """What decides how an image is cut and how many placeholders it gets."""

    grid: int
    """Patches along a side of a crop."""
    patch_size: int
    """Pixels along a side of a patch."""
    pool: int
    """Side of the window of patches that becomes one placeholder. Not used where `queries` is set."""
    queries: int
    """Placeholders of a whole crop (resampler); 0 = windows are pooled."""
    max_crops: int
    """Most high-resolution crops; 0 = only the global crop."""
    video_pool: int = field(default=3, repr=False)
    """The same as `pool`, for frames of videos."""

    @property
    def frame(self) -> ImageGeometry:
        """The geometry of one video frame: only a global crop, pooled as videos are."""
        return dataclasses.replace(self, pool=self.video_pool, max_crops=0)

    @property
    def margin(self) -> int:
        """Patches on each side of a crop that the neighbour may own: 4 of 27, 1 of 8, 4 of 24."""
        return (2 * MARGIN_OF_27 * self.grid + 27) // 54

    @property
    def window(self) -> int:
        """Patches from one crop to the next."""
        return self.grid - 2 * self.margin

    @property
    def crop_pixels(self) -> int:
        """Side of a crop in pixels."""
        return self.grid * self.patch_size

    @property
    def patches(self) -> int:
        """Patches in a crop."""
        return self.grid**2


@dataclass(frozen=True)
class ImageLayout:
    """How one image becomes crops, windows and tokens."""

    tiling: tuple[int, int]
    """Rows and columns of high-resolution crops; (0, 0) = only the global crop."""
    canvas: tuple[int, int]
    """Patches, down and across, that the high-resolution crops show together."""
    global_grid: tuple[int, int]
    """Placeholders of the global crop, down and across (resampler: 1 x queries)."""
    high_grid: tuple[int, int]
    """Placeholders of the canvas, down and across (resampler: crops down, crops across x queries)."""

    @property
    def crops(self) -> int:
        """Crops, the global one counted."""
        return 1 + self.tiling[0] * self.tiling[1]

    @property
    def placeholders(self) -> int:
        """`<im_patch>` tokens = vectors that the connector gives."""
        return self.global_grid[0] * self.global_grid[1] + self.high_grid[0] * self.high_grid[1]

    @property
    def tokens(self) -> int:
        """Tokens of the image block: start, placeholders and end of the global crop, then start, rows each closed by
        `<im_col>`, and end of the canvas."""
        rows = self.high_grid[0]
        return self.placeholders + 2 + (rows + 2 if rows else 0)


@dataclass(frozen=True)
class VideoLayout:
    """The frames that are shown of one video; each is one crop."""

    times: tuple[float, ...]
    """Seconds of each frame from the clip's start, as they stand in the text."""
    start: float
    """Seconds from the video's first frame to the clip's start."""
    frame: ImageLayout
    """Of every frame."""
    subtitles: str = ""
    """Text after the frames."""
    rate: int = 0
    """Times a second at which tracks were annotated; 0 = the sample has none."""
    cut_subtitles: int = 0
    """Tokens of subtitles left out because a row has no room for them."""

    @property
    def crops(self) -> int:
        """One for each frame."""
        return len(self.times)

    @property
    def placeholders(self) -> int:
        """`<im_patch>` tokens of all frames."""
        return len(self.times) * self.frame.placeholders


#: What one image or one video becomes.
Layout = ImageLayout | VideoLayout


def image_geometry(arch: Architecture, max_crops: int) -> ImageGeometry:
    """The geometry of a model with at most `max_crops` high-resolution crops an image.

    Raises ValueError for fewer than 0 crops or a window under 1 patch.
    """
    connector = arch.connector
    queries = connector.queries if connector.kind == "resampler" else 0
    geometry = ImageGeometry(
        arch.vision.grid, arch.vision.patch_size, connector.image_pool, queries, max_crops, connector.video_pool
    )
    if max_crops < 0:
        raise ValueError(f"data.image_crops={max_crops}: needed 0 (only the whole image) or more.")
    if not queries and min(geometry.pool, geometry.video_pool) < 1:
        pools = f"{geometry.pool} (images) and {geometry.video_pool} (videos)"
        raise ValueError(f"the connector pools windows of side {pools}; needed 1 or more.")
    return geometry


def most_tokens(geometry: ImageGeometry) -> int:
    """Tokens of the longest image block that any size of image gives."""
    return max(_layout(tiling, geometry).tokens for tiling in _all_tilings(geometry.max_crops))


def image_layout(width: int, height: int, geometry: ImageGeometry) -> ImageLayout:
    """Crops and tokens of an image of `width` x `height` pixels. ValueError for a side below one pixel."""
    if width < 1 or height < 1:
        raise ValueError(f"an image of {width}x{height} pixels has no crops.")
    return _image_layout(width, height, geometry)


@lru_cache(maxsize=64)
def frame_layout(geometry: ImageGeometry) -> ImageLayout:
    """Of one video frame, whatever its size in pixels: 9 x 9 placeholders from 27 x 27 patches pooled 3 x 3."""
    return _layout((0, 0), geometry.frame)


@lru_cache(maxsize=65536)
def _image_layout(width: int, height: int, geometry: ImageGeometry) -> ImageLayout:
    if not geometry.max_crops:
        return _layout((0, 0), geometry)
    margin = 2 * geometry.margin * geometry.patch_size
    # Molmo2 counts at least one pixel beside the margin; transformers' port does not, and so tiles an image with one
    # side under the margin (112 pixels) and the other over a crop differently. We follow the training code.
    tiling = select_tiling(
        max(height - margin, 1), max(width - margin, 1), geometry.window * geometry.patch_size, geometry.max_crops
    )
    return _layout(tiling, geometry)


def _layout(tiling: tuple[int, int], geometry: ImageGeometry) -> ImageLayout:
    rows, columns = tiling
    canvas = (0, 0)
    if rows:
        canvas = (rows * geometry.window + 2 * geometry.margin, columns * geometry.window + 2 * geometry.margin)
    if geometry.queries:
        return ImageLayout(tiling, canvas, (1, geometry.queries), (rows, columns * geometry.queries))
    side = _pooled(geometry.grid, geometry.pool)
    return ImageLayout(
        tiling, canvas, (side, side), (_pooled(canvas[0], geometry.pool), _pooled(canvas[1], geometry.pool))
    )


def _pooled(patches: int, pool: int) -> int:
    return -(-patches // pool)


def select_tiling(height: int, width: int, window: int, max_crops: int) -> tuple[int, int]:
    """Rows and columns of crops, at most `max_crops` together, for an image of height x width pixels.

    window: pixels that a crop adds. The tiling is the one that enlarges the image least; if every tiling shrinks it,
    the one that shrinks it least; the one with fewer crops, then fewer rows, where two are alike.
    """
    best, best_scale = (1, 1), None
    for rows, columns in _tilings(max_crops):
        scale = min(_float32(rows * window / height), _float32(columns * window / width))
        if best_scale is None or _better(scale, best_scale):
            best, best_scale = (rows, columns), scale
    return best


def _better(scale: float, than: float) -> bool:
    if than < 1:
        return scale > than
    return 1 <= scale < than


@lru_cache(maxsize=64)
def _tilings(max_crops: int) -> tuple[tuple[int, int], ...]:
    tilings = [(r, c) for r in range(1, max_crops + 1) for c in range(1, max_crops + 1) if r * c <= max_crops]
    return tuple(sorted(tilings, key=lambda tiling: (tiling[0] * tiling[1], tiling[0])))


def _all_tilings(max_crops: int) -> tuple[tuple[int, int], ...]:
    return _tilings(max_crops) or ((0, 0),)


def _float32(value: float) -> float:
    """Rounded to single precision, in which Molmo2 compares scales: ties there are ties here."""
    return struct.unpack("f", struct.pack("f", value))[0]
