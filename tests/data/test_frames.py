"""Which moments of a video are shown: the worked examples, and the rule for tracks."""

import math

import pytest

from megatron_vlm.config.geometry import image_geometry
from megatron_vlm.config.presets import PRESETS
from megatron_vlm.data.example import Branch, Clip, Example, Media, Subtitle, Turn
from megatron_vlm.data.frames import frame_times, track_times, video_layout


def test_two_a_second_and_the_last():
    found = frame_times(10.0, 2.0, 128)
    assert found == tuple(index / 2 for index in range(21))
    assert frame_times(10.2, 2.0, 128) == (*found, 10.2)
    assert frame_times(0.3, 2.0, 128) == (0.0, 0.3)


def test_the_longest_at_the_full_rate():
    # (128 - 1) / 2 = 63.5 s is not less than the length: 127 moments and the end.
    found = frame_times(63.5, 2.0, 128)
    assert len(found) == 128 and found[:-1] == tuple(index / 2 for index in range(127)) and found[-1] == 63.5


def test_longer_ones_are_spread_evenly():
    found = frame_times(63.6, 2.0, 128)
    assert len(found) == 128 and found[0] == 0 and found[-1] == 63.6
    assert found == pytest.approx([63.6 * index / 127 for index in range(128)])
    assert frame_times(7200.0, 2.0, 8) == pytest.approx([7200 * index / 7 for index in range(8)])
    assert frame_times(9.0, 2.0, 1) == (0.0,)


@pytest.mark.parametrize(
    ("seconds", "fps", "rate", "most", "chosen"),
    [
        (4.0, 30.0, 1, 128, 10),  # 1, 2, 3, 5, 6, 10 divide 30
        (20.0, 30.0, 1, 128, 6),  # 10 a second would take 200 frames
        (20.0, 29.97, 1, 128, 6),  # counted as 30
        (12.8, 30.0, 1, 128, 10),  # exactly to the end
        (4.0, 24.0, 2, 128, 8),
        (4.0, 25.0, 2, 128, 2),  # nothing divides: as annotated
        (200.0, 30.0, 2, 128, 2),  # not even 2 a second reaches the end
        (50.0, 30.0, 1, 128, 2),
        (4.0, 30.0, 15, 128, 15),
    ],
)
def test_tracks_are_shown_as_fast_as_they_fit(seconds, fps, rate, most, chosen):
    found = track_times(seconds, fps, rate, most)
    count = min(most, math.ceil(seconds * chosen))
    assert found == tuple(index / chosen for index in range(count))
    assert found[-1] < seconds


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_no_length_is_refused(seconds):
    with pytest.raises(ValueError, match="has no frames"):
        frame_times(seconds, 2.0, 128)
    with pytest.raises(ValueError, match="has no frames"):
        track_times(seconds, 30.0, 1, 128)
    with pytest.raises(ValueError, match="raise data.max_frames"):
        frame_times(1.0, 2.0, 0)


def example(clip: Clip | None = None) -> Example:
    media = Media("0" * 64, 640, 360, "video", 100.0, 30.0, 3000)
    return Example("a", (Branch("video_long_caption", (Turn("", "A cat."),)),), (media,), clip=clip)


def test_layout_of_a_clip():
    geometry = image_geometry(PRESETS["molmo2_4b"], 8)
    whole = video_layout(example(), geometry, 2.0, 384)
    assert whole.crops == 201 and whole.start == 0 and whole.placeholders == 201 * 81
    part = video_layout(example(Clip(10.0, 14.0)), geometry, 2.0, 384)
    assert part.times == tuple(index / 2 for index in range(9)) and part.start == 10.0
    to_the_end = video_layout(example(Clip(98.0, 130.0)), geometry, 2.0, 384)
    assert to_the_end.times == (0.0, 0.5, 1.0, 1.5, 2.0)
    tracked = video_layout(example(Clip(98.0, None, rate=2)), geometry, 2.0, 384)
    assert tracked.times == tuple(index / 10 for index in range(20))
    said = video_layout(example(Clip(0.0, 2.0, subtitles=(Subtitle(0.5, 1.0, "Hello."),))), geometry, 2.0, 384)
    assert said.subtitles == "subtitle\n0.5 - 1.0 Hello.\n"


@pytest.mark.parametrize("clip", [Clip(100.0), Clip(5.0, 5.0), Clip(5.0, 4.0), Clip(-1.0, 4.0), Clip(0.0, math.nan),
                                  Clip(math.inf), Clip(rate=-1)])  # fmt: skip
def test_clips_outside_the_video_are_refused(clip):
    with pytest.raises(ValueError, match="sample 'a'"):
        example(clip).check()
