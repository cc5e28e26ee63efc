"""Which moments of a video are shown, and the layout that they give. Pure functions: no video is opened.

Seconds everywhere. A frame is what is on the screen at a moment, so moments need not be those of stored frames.
"""

from __future__ import annotations

import numpy as np

from megatron_vlm.config.geometry import ImageGeometry, VideoLayout, frame_layout
from megatron_vlm.data import subtitles
from megatron_vlm.data.example import Example

#: Tracked videos are never shown at more frames a second.
MAX_TRACK_FPS = 10


def frame_times(seconds: float, frames_per_second: float, max_frames: int) -> tuple[float, ...]:
    """Moments at a fixed rate from 0 on, and the end; `max_frames` evenly spread ones where those were too many.

    The end is always among them, unless there may be one frame only. Raises ValueError for a length that is not finite
    and above 0.
    """
    _check(seconds, max_frames)
    if (max_frames - 1) / frames_per_second < seconds:
        return tuple(np.linspace(0.0, seconds, max_frames).tolist())
    return (*np.arange(0.0, seconds, 1 / frames_per_second).tolist(), float(seconds))


def track_times(seconds: float, video_fps: float, rate: int, max_frames: int) -> tuple[float, ...]:
    """Moments for tracks that were annotated `rate` times a second; the end is not added.

    Shown as fast as possible: at the highest multiple of `rate` up to MAX_TRACK_FPS that divides the video's frames per
    second (rounded) and whose `max_frames` frames reach to the end. Where not even `rate` does, the video's beginning
    is shown at `rate`.
    """
    _check(seconds, max_frames)
    whole = round(video_fps)
    chosen = rate
    for candidate in range(rate, MAX_TRACK_FPS + 1, rate):
        if whole % candidate:
            continue
        if max_frames / candidate < seconds:
            break
        chosen = candidate
    moments = np.arange(max_frames) / chosen
    return tuple(moments[moments < seconds].tolist())


def video_layout(example: Example, geometry: ImageGeometry, frames_per_second: float, max_frames: int) -> VideoLayout:
    """How the video of `example` is shown. Raises ValueError, naming the sample, where its clip has no length."""
    media, clip = example.video, example.clip
    assert media is not None
    try:
        if clip is not None and clip.rate:
            times = track_times(example.seconds, media.fps, clip.rate, max_frames)
        else:
            times = frame_times(example.seconds, frames_per_second, max_frames)
    except ValueError as error:
        raise ValueError(f"sample {example.key!r}: {error}") from error
    return VideoLayout(
        times=times,
        start=clip.start if clip else 0.0,
        frame=frame_layout(geometry),
        subtitles=subtitles.text(clip.subtitles, times) if clip else "",
        rate=clip.rate if clip else 0,
    )


def _check(seconds: float, max_frames: int) -> None:
    if not (np.isfinite(seconds) and seconds > 0):
        raise ValueError(f"a video of {seconds} s has no frames.")
    if max_frames < 1:
        raise ValueError(
            f"at most {max_frames} frames of a video may be shown; raise data.max_frames or data.max_crops."
        )
