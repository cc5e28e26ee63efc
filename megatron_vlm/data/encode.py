"""Write a video file: frames -> MP4 with H.264, through PyAV. h, w: pixels of a frame."""

from __future__ import annotations

import io
from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np


def mp4(frames: Iterable[np.ndarray], fps: int | float | Fraction, *, crf: int = 18, key_every: int = 12) -> bytes:
    """The frames, (h, w, 3) uint8 RGB, all of one size, at a steady rate; h and w are made even by leaving out the last
    row or column.

    crf: x264's quality, lower is better. key_every: frames from one key frame to the next.
    Equal frames give equal bytes on every processor (same build of x264). Raises ValueError where there is no frame.
    """
    stream, data = None, io.BytesIO()
    with av.open(data, "w", format="mp4") as out:
        for pixels in frames:
            height, width = pixels.shape[0] // 2 * 2, pixels.shape[1] // 2 * 2
            if stream is None:
                rate = Fraction(fps).limit_denominator(1000)
                stream = out.add_stream("libx264", rate=rate)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.thread_count = 1
                # mbtree gave other bytes in 1 of 12 runs (one thread, equal frames): it reads what was never written.
                same = "mbtree=0:cpu-independent=1"
                stream.options = {"crf": str(crf), "preset": "veryfast", "g": str(key_every), "x264-params": same}
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels[:height, :width]), format="rgb24")
            out.mux(stream.encode(frame))
        if stream is None:
            raise ValueError("a video needs at least one frame.")
        out.mux(stream.encode(None))
    return data.getvalue()
