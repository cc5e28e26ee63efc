"""Image files -> uint8 pixels -> crops. The file's own claims are checked before anything is decoded.

h, w: pixels of an image as displayed. c crops, p patches in a crop, d = patch side squared x 3 channels.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

#: Formats that are read, by PIL's name, with the extension they get in a tar. Nothing else is handed to a decoder.
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
#: Most pixels of an image; a larger one is refused before it is decoded.
MAX_PIXELS = 100_000_000
#: From this value on a channel of a mask is bright.
BRIGHT = 128
#: EXIF tag of the orientation, and the values that swap width and height.
ORIENTATION = 0x0112
TRANSPOSED = (5, 6, 7, 8)


class Header(NamedTuple):
    """What an image file says about itself."""

    format: str
    """PIL's name: JPEG, PNG, ..."""
    width: int
    """Pixels as displayed, after the EXIF orientation."""
    height: int
    orientation: int
    """EXIF orientation, 1 to 8; 1 = as stored."""


def probe(data: bytes, *, name: str) -> Header:
    """Read the header only. `name` is what an error calls the image.

    Raises ValueError for a format outside EXTENSIONS, a broken header, or more than MAX_PIXELS pixels.
    """
    with _opened(data, name) as image:
        return _header(image, name)


def decode(data: bytes, *, name: str) -> np.ndarray:
    """(h, w, 3) uint8 RGB, turned as displayed. JPEG through simplejpeg: PIL's pixels, faster, without the GIL.

    Raises ValueError, naming the image, where it does not decode.
    """
    with _opened(data, name) as image:
        header = _header(image, name)
        try:
            pixels = _jpeg(data) if header.format == "JPEG" and image.mode in ("RGB", "L") else None
            if pixels is None:
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # decoders raise whatever they like on broken files
            raise ValueError(f"image {name} does not decode ({type(error).__name__}: {error}).") from error
    pixels = _turned(pixels, header.orientation)
    if pixels.shape != (header.height, header.width, 3):
        raise ValueError(f"image {name} decodes to {pixels.shape[1]}x{pixels.shape[0]} pixels, its header says "
                         f"{header.width}x{header.height}.")  # fmt: skip
    return pixels


def mask(data: bytes, value: int, *, name: str) -> np.ndarray:
    """(h, w) bool: where a picture that marks objects has the `value` (number of a palette, or grey), or, for 0, is
    bright in any channel.

    Raises ValueError, naming the picture, where it does not decode.
    """
    with _opened(data, name) as image:
        _header(image, name)
        try:
            pixels = np.asarray(image if value else image.convert("RGB"))
        except Exception as error:  # as in decode
            raise ValueError(f"mask {name} does not decode ({type(error).__name__}: {error}).") from error
    if value and pixels.ndim != 2:
        raise ValueError(f"mask {name} has colours; needed numbers of objects (a palette, or grey).")
    return np.asarray(pixels == value if value else (pixels >= BRIGHT).any(axis=-1))


def _jpeg(data: bytes) -> np.ndarray | None:
    """(h, w, 3) uint8 as stored; None for a file with bytes between its segments, which PIL passes over."""
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False)
    except ValueError as error:
        if "extraneous bytes" not in str(error):
            raise
        return None


def _opened(data: bytes, name: str) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS))
    except Exception as error:
        # UnidentifiedImageError names the object in memory that holds the bytes, and nothing else.
        reason = "" if isinstance(error, UnidentifiedImageError) else f" ({type(error).__name__}: {error})"
        raise ValueError(
            f"image {name} has no readable header{reason}. Formats read: {', '.join(EXTENSIONS)}."
        ) from error


def _header(image: Image.Image, name: str) -> Header:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(f"image {name} has {width}x{height} pixels; at most {MAX_PIXELS} are decoded.")
    try:
        # Most JPEG files say nothing about it; asking PIL takes longer than opening the file.
        told = image.format not in ("JPEG", "MPO") or not {"exif", "xmp"}.isdisjoint(image.info)
        orientation = image.getexif().get(ORIENTATION, 1) if told else 1
    except Exception:  # a broken EXIF block does not make the picture unreadable
        orientation = 1
    if orientation not in range(1, 9):
        orientation = 1
    if orientation in TRANSPOSED:
        width, height = height, width
    # MPO is a JPEG file with further pictures after the first, as telephones write it.
    format = "JPEG" if image.format == "MPO" else image.format or ""
    return Header(format, width, height, orientation)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply an EXIF orientation to (h, w, 3)."""
    if orientation in TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
