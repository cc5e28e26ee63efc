"""Small videos made by the tests. The picture says which frame it is: see `number`."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT = 64, 48


def picture(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """(h, w, 3) uint8: ten bits of `number`, each a block of black or white in a row of blocks; a grey rest."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    side = width // 10
    for bit in range(10):
        pixels[: height // 2, bit * side : (bit + 1) * side] = 255 * (number >> bit & 1)
    return pixels


def number(pixels: np.ndarray) -> int:
    """The number in a picture that went through a codec."""
    side = pixels.shape[1] // 10
    blocks = [pixels[2 : pixels.shape[0] // 2 - 2, bit * side + 1 : (bit + 1) * side - 1] for bit in range(10)]
    return sum(int(block.mean() > 128) << bit for bit, block in enumerate(blocks))


def clip(
    times: Sequence[int],
    *,
    unit: Fraction = Fraction(1, 1000),
    container: str = "mp4",
    codec: str = "libx264",
    gop: int = 12,
    b_frames: int = 0,
    size: tuple[int, int] = (WIDTH, HEIGHT),
    options: dict[str, str] | None = None,
    **container_options: str,
) -> bytes:
    """A video whose frame i shows `picture(i)` at times[i] ticks of `unit` seconds.

    gop: frames from one key frame to the next.
    """
    stream = tempfile.NamedTemporaryFile(suffix=".clip")  # moving the index to the front needs a file with a name
    with av.open(stream.name, "w", format=container, options=container_options) as out:
        video = out.add_stream(codec, rate=Fraction(25), options=options or {})
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.gop_size, video.codec_context.max_b_frames = gop, b_frames
        video.codec_context.thread_count = 1
        video.time_base = video.codec_context.time_base = unit
        if codec == "libx264":
            video.options = {
                "preset": "ultrafast",
                "qp": "10",
                "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0:bframes={b_frames}:b-adapt=0",
            }
        for index, at in enumerate(times):
            frame = av.VideoFrame.from_ndarray(picture(index, *size), format="rgb24")
            frame.pts, frame.time_base = at, unit
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    with stream:
        return Path(stream.name).read_bytes()


def steady(frames: int, fps: int = 10) -> list[int]:
    """Ticks of 1/1000 s."""
    return [round(index * 1000 / fps) for index in range(frames)]
