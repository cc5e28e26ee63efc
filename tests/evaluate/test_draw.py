"""Drawn places: marks lie where they should, films play, and nothing stays marked that was not said."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from megatron_vlm.data import video
from megatron_vlm.data.example import Point, Points, Tracks
from megatron_vlm.data.points import Place, parse
from megatron_vlm.evaluate import draw
from tests.data.clips import clip, steady

SAID = '<tracks coords="0.5 1 250 500;1.0 1 500 500 2 900 100;1.5 1 750 500">ball</tracks>'


def near(image: np.ndarray, color: str, by: int = 60) -> np.ndarray:
    """(n, 2) fractions (x, y) of the pixels of about this colour; by: allowed difference, more after a codec."""
    wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    rows, columns = np.nonzero(np.abs(image.astype(int) - wanted).sum(2) < by)
    return np.stack([columns / image.shape[1], rows / image.shape[0]], 1)


def test_marks_lie_where_their_fractions_say():
    pixels = np.full((100, 200, 3), 90, np.uint8)
    image = draw.marked(pixels, [draw.Mark(0.25, 0.5, "#ff2d55"), draw.Mark(0.75, 0.25, "#00c7be", "ring")])
    assert image.size == (200, 100)
    shown = np.asarray(image)
    assert near(shown, "#ff2d55").mean(0) == pytest.approx([0.25, 0.5], abs=0.02)
    assert near(shown, "#00c7be").mean(0) == pytest.approx([0.75, 0.25], abs=0.02)
    small = draw.marked(np.zeros((64, 64, 3), np.uint8), [], "a title")
    assert small.size == (320, 320 + draw.TITLE), "small pictures are enlarged, a title has a line of its own"


def test_words_stay_on_the_picture_and_large_pictures_are_reduced():
    ground = np.full((64, 64, 3), 90, np.uint8)
    alone, numbered = (np.asarray(draw.marked(ground, [draw.Mark(0.99, 0.01, "#00c7be", text=t)])) for t in ("", "7"))
    added = np.nonzero((alone != numbered).any(2))
    assert len(added[0]) > 20 and added[0].min() > 0 and added[1].max() < 0.99 * 320, "left of a mark at the right edge"
    long = np.asarray(draw.marked(ground, [], "How many of them are there? " * 9))[: draw.TITLE]
    assert (long[:, -4:] == 255).all() and (long < 128).any(), "a title too long is shortened, not cut"
    assert draw.marked(np.zeros((300, 600, 3), np.uint8), [], side=130).size == (130, 65)
    assert draw.marked(ground, [], side=130).size == (128, 128)


def test_each_image_gets_its_own_places():
    said = parse('<points coords="1 1 100 100;2 2 900 900 3 500 500">cats</points>')
    assert [[mark.text for mark in draw.crosses(said, number)] for number in (1, 2, 3)] == [["1"], ["2", "3"], []]


@pytest.mark.parametrize(
    ("at", "shown"),
    [
        (0.4, {}),
        (0.5, {"1": 0.25}),
        (0.9, {"1": 0.25}),  # held, not made up
        (1.2, {"1": 0.5, "2": 0.9}),
        (1.7, {"1": 0.75}),  # object 2 was last seen too long ago
        (2.2, {}),
    ],
)
def test_a_film_shows_each_object_where_it_was_last_said_to_be(at, shown):
    marks = draw.on_film(parse(SAID), at)
    assert {mark.text: mark.x for mark in marks if mark.shape == "cross"} == shown
    assert sum(mark.shape == "dot" for mark in marks) == {1.2: 1, 1.7: 2}.get(at, 0)


def test_true_places_are_rings():
    tracks = Tracks("ball", ((Point(0.5, 0.25, 0.5),), (Point(0.5, 0.75, 0.5),)))
    places = draw.true_places(tracks)
    assert places == [Place(0.5, 1, 0.25, 0.5), Place(0.5, 2, 0.75, 0.5)]
    assert [(mark.shape, mark.x) for mark in draw.on_film(places, 0.5, true=True)] == [("ring", 0.25), ("ring", 0.75)]
    assert draw.true_places(Points("a", (Point(1.0, 0.5, 0.5),))) == [Place(1.0, 1, 0.5, 0.5)]
    assert draw.true_places("text") == draw.true_places(None) == []


def test_a_film_has_the_marks_in_its_frames(tmp_path):
    data = clip(steady(30))
    found = video.scan(data, name="v")
    frames = draw.Film(data, found.timeline, SAID, 0.5, 2.0, "the ball").write(tmp_path / "out.mp4")
    with av.open(io.BytesIO((tmp_path / "out.mp4").read_bytes())) as film:
        pictures = [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]
    moments = draw.film_moments(found.timeline, 2.0)
    assert len(pictures) == frames == len(moments) and 20 <= frames <= 21
    assert [*tmp_path.iterdir()] == [tmp_path / "out.mp4"]
    red = [len(near(one, draw.COLORS[0], 150)) for one in pictures]
    assert [count > 20 for count in red] == [at >= 0.5 for at in moments.tolist()], red
    top = draw.TITLE / pictures[7].shape[0]
    assert near(pictures[7], draw.COLORS[0], 150)[:, 0].mean() == pytest.approx(0.25, abs=0.05)
    assert near(pictures[7], draw.COLORS[0], 150)[:, 1].mean() == pytest.approx(top + 0.5 * (1 - top), abs=0.05)


def test_a_sheet_has_the_frames_with_places_first():
    data = clip(steady(30))
    timeline = video.scan(data, name="v").timeline
    sheet = np.asarray(draw.Film(data, timeline, SAID, 0.0, 3.0).sheet())
    assert sheet.shape[1] == 4 * 320 + 3 * 6
    assert len(near(sheet, draw.COLORS[0])) > 100
    moments = draw.key_moments([0.5, 1.0, 1.5], 3.0, 12)
    assert len(moments) == 12 or {0.5, 1.0, 1.5} <= set(moments)
    assert moments == sorted(moments) and {0.5, 1.0, 1.5} <= set(moments) and 0.0 in moments
    many = [n / 10 for n in range(100)]
    assert draw.key_moments(many, 10.0, 5) == [0.0, 2.5, 5.0, 7.4, 9.9]
