"""When frames are shown, and the form in which that is kept."""

import struct
import zlib
from fractions import Fraction

import numpy as np
import pytest

from megatron_vlm.data.timeline import Timeline

VARIABLE = Timeline(np.array([500, 540, 700, 710, 2000]), np.array([500, 700]), Fraction(1, 1000), 2100, True)


def test_the_frame_on_the_screen():
    assert VARIABLE.seconds == 1.6 and VARIABLE.fps == pytest.approx(5 / 1.6)
    moments = [-1, 0.0, 0.039, 0.04, 0.1, 0.2, 0.2099, 0.21, 1.4, 1.5, 1.6, 99.0]
    assert VARIABLE.shown(moments).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4]


@pytest.mark.parametrize("fps", [10, 24, 25, 29.97, 30, 59.94])
def test_rounding_never_shows_the_frame_before(fps):
    unit = Fraction(1, 90_000)
    timeline = Timeline(np.round(np.arange(3000) * 90_000 / fps).astype(np.int64), np.array([0]), unit, 10**9, True)
    exact = [float(int(at) * unit) for at in timeline.pts]
    assert timeline.shown(exact).tolist() == list(range(3000))
    # Sums of a clip's start and a moment inside it may fall short by a rounding.
    assert timeline.shown([0.1 + (at - 0.1) for at in exact]).tolist() == list(range(3000))


def test_the_key_frame_to_start_from():
    assert [VARIABLE.key_before(pts) for pts in (400, 500, 699, 700, 5000)] == [500, 500, 500, 700, 700]


def test_packed_and_back():
    steady = Timeline(
        np.arange(30_000) * 512, np.arange(0, 30_000, 250) * 512, Fraction(1, 12_800), 30_000 * 512, False, False
    )
    for timeline in (VARIABLE, steady):
        found = Timeline.unpack(timeline.pack())
        assert found.pts.tolist() == timeline.pts.tolist() and found.keys.tolist() == timeline.keys.tolist()
        for name in ("unit", "end", "seekable", "timed"):
            assert getattr(found, name) == getattr(timeline, name)
    assert len(steady.pack()) < 600


@pytest.mark.parametrize("cut", [0, 10, 45, -1])
def test_a_damaged_one_is_an_error(cut):
    with pytest.raises(ValueError, match="damaged timeline"):
        Timeline.unpack(VARIABLE.pack()[:cut])


@pytest.mark.parametrize(
    "claim",
    [
        (1, 1, 2**40, 0, 5),
        (1, 1, 2**62, 2**62, 5),
        (1, 1, -1, 1, 5),
        (1, 1, 1, -1, 5),
        (0, 1, 1, 0, 5),
        (1, 0, 1, 0, 5),
    ],
)
def test_claims_of_a_stranger_cost_nothing(claim):
    """A gigabyte of zeros packs into a megabyte: no more is unpacked than the frames of a video take."""
    with pytest.raises(ValueError, match="damaged timeline"):
        Timeline.unpack(struct.pack("<qqqqq??", *claim, True, True) + zlib.compress(bytes(10_000)))


def test_times_that_go_backwards_are_refused():
    for pts, end in (([0, 10, 5], 20), ([0, 10, 10], 20), ([0, 10, 20], 20)):
        packed = Timeline(np.array(pts), np.array([0]), Fraction(1, 25), end, True).pack()
        with pytest.raises(ValueError, match="goes backwards"):
            Timeline.unpack(packed)
