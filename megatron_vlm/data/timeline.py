"""When each frame of a video is shown, by the file's packets alone: what random access needs, kept in the media index.

n frames, k key frames. Times in files are whole ticks; a tick lasts `unit` seconds.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

#: Moments are moved this many seconds onwards, so that rounding never shows the frame before the one meant.
ROUNDING = 1e-6
#: Most frames of a video.
MAX_FRAMES = 1_000_000
_HEADER = struct.Struct("<qqqqq??")


@dataclass(frozen=True)
class Timeline:
    """The frames of one video in the order in which they are shown."""

    pts: np.ndarray
    """(n,) int64 ascending. Tick at which each frame appears."""
    keys: np.ndarray
    """(k,) int64 ascending. Ticks of the key frames, from which decoding can start."""
    unit: Fraction
    """Seconds of a tick."""
    end: int
    """Tick at which the last frame disappears."""
    seekable: bool
    """False where the decoder gives other frames than the packets promise: such a file is decoded from its beginning,
    so that each frame is the same whichever others are asked for."""
    timed: bool = True
    """False where the packets do not tell when their frames are shown: the i-th frame is the one shown at pts[i]."""

    @property
    def seconds(self) -> float:
        """From the first frame's appearance to the last one's disappearance."""
        return float((self.end - int(self.pts[0])) * self.unit)

    @property
    def fps(self) -> float:
        """Frames per second on the mean."""
        return len(self.pts) / self.seconds

    def shown(self, moments: Sequence[float]) -> np.ndarray:
        """Index of the frame on the screen at each moment, in seconds from the first frame's appearance.

        Before the first frame the first one, after the last the last.
        """
        appear = (self.pts - self.pts[0]) * self.unit.numerator / self.unit.denominator
        found = np.searchsorted(appear, np.asarray(moments, dtype=np.float64) + ROUNDING, side="right") - 1
        return np.clip(found, 0, len(self.pts) - 1)

    def key_before(self, pts: int) -> int:
        """Tick of the last key frame that is shown no later than `pts`; the first frame's where there is none."""
        place = int(np.searchsorted(self.keys, pts, side="right")) - 1
        return int(self.keys[place]) if place >= 0 else int(self.pts[0])

    def pack(self) -> bytes:
        """A few bytes for a steady video: `unpack` gives it back."""
        header = _HEADER.pack(
            self.unit.numerator,
            self.unit.denominator,
            len(self.pts),
            len(self.keys),
            self.end,
            self.seekable,
            self.timed,
        )
        # Differences of steady times are equal numbers, which deflate to almost nothing.
        ticks = np.concatenate([np.diff(self.pts, prepend=0), np.diff(self.keys, prepend=0)])
        return header + zlib.compress(ticks.astype("<i8").tobytes(), 6)

    @classmethod
    def unpack(cls, data: bytes) -> Timeline:
        """From `pack`'s bytes. Raises ValueError for others, whatever number of frames they claim."""
        try:
            numerator, denominator, frames, keys, end, seekable, timed = _HEADER.unpack_from(data)
            if not (1 <= frames <= MAX_FRAMES and 0 <= keys <= MAX_FRAMES and numerator > 0 and denominator > 0):
                raise struct.error(f"{frames} frames, {keys} key frames, ticks of {numerator}/{denominator} s")
            size = 8 * (frames + keys)
            stream = zlib.decompressobj()
            raw = stream.decompress(data[_HEADER.size :], size + 1)
        except (struct.error, zlib.error) as error:
            raise ValueError(f"the media index holds a damaged timeline ({error}). Build the shards anew.") from error
        if len(raw) != size or not stream.eof:
            raise ValueError("the media index holds a damaged timeline. Build the shards anew.")
        ticks = np.frombuffer(raw, dtype="<i8").astype(np.int64)
        pts, key_pts = np.cumsum(ticks[:frames]), np.cumsum(ticks[frames:])
        if (np.diff(pts) <= 0).any() or end <= pts[-1]:
            raise ValueError("the media index holds a timeline that goes backwards. Build the shards anew.")
        return cls(pts, key_pts, Fraction(numerator, denominator), end, seekable, timed)
