"""Places as text and back: Molmo2's grammar exactly, and forgiveness towards what models write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.data.example import Point, Points, Tracks
from megatron_vlm.data.points import NO_TRACKS, NONE, Place, parse, parse_count, until, write


def answer(*points: tuple[float, float, float], label: str = "cups") -> Points:
    return Points(label, tuple(Point(*point) for point in points))


TWO = answer((1, 0.388, 0.512), (1, 0.103, 0.54))


@pytest.mark.parametrize(
    ("points", "style", "options", "text"),
    [
        (TWO, "pointing", {}, '<points coords="1 1 103 540 2 388 512">cups</points>'),
        (TWO, "point_count", {},
         'Counting the <points coords="1 1 103 540 2 388 512">cups</points> shows a total of 2.'),
        (TWO, "count_then_point", {}, 'There are 2 <points coords="1 1 103 540 2 388 512">cups</points>.'),
        (TWO, "count", {}, "2"),
        (answer(), "count", {}, "0"),
        (answer(), "pointing", {}, NONE),
        (answer(), "point_count", {}, NONE),
        (answer((3, 0.41, 0.12), (1, 0.2, 0.3)), "pointing", {},
         '<points coords="1 1 200 300;3 2 410 120">cups</points>'),
        (answer((3, 0.41, 0.12), (1, 0.2, 0.3)), "pointing", {"separator": "\t"},
         '<points coords="1 1 200 300\t3 2 410 120">cups</points>'),
        (answer((7, 0.5, 0.5), (2.54, 0.12, 0.455)), "pointing", {"seconds": True},
         '<points coords="2.5 1 120 455;7.0 2 500 500">cups</points>'),
        (answer((1, 0.0, 1.0)), "pointing", {}, '<points coords="1 1 000 1000">cups</points>'),
        (answer((1, 0.1237, 0.1232)), "pointing", {}, '<points coords="1 1 124 123">cups</points>'),
        # Sorted by the rounded numbers: 0.10049 and 0.1001 are both 100.
        (answer((1, 0.10049, 0.1), (1, 0.1001, 0.9)), "pointing", {},
         '<points coords="1 1 100 100 2 100 900">cups</points>'),
    ],
)  # fmt: skip
def test_written_as_molmo2_does(points, style, options, text):
    assert write(points, style, **options) == text


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1000), st.integers(0, 1000)), max_size=30))
@settings(deadline=None)
def test_what_is_written_is_read(places):
    points = answer(*((at, x / 1000, y / 1000) for at, x, y in places))
    for separator in ("\t", ";"):
        text = write(points, "point_count", separator=separator)
        assert [(p.at, p.x, p.y) for p in parse(text)] == sorted(points.points)
        assert [p.id for p in parse(text)] == list(range(1, len(places) + 1))
        assert parse_count(text) == len(places)


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ('<points coords="1 1 103 540 2 388 512', [(1, 1, 0.103, 0.54), (1, 2, 0.388, 0.512)]),
        ('<points coords="1 1 103 540 2 388', [(1, 1, 0.103, 0.54)]),
        ('<points alt="a b" coords="1 1 103 540">x</points>', [(1, 1, 0.103, 0.54)]),
        ('<tracks coords="0.0 1 105 220;0.5 1 110 222">p</tracks>', [(0.0, 1, 0.105, 0.22), (0.5, 1, 0.11, 0.222)]),
        ('<points coords="1 1 103 540 1 200 200">x</points>', [(1, 1, 0.103, 0.54)]),
        ('<points coords="1 1 103 1540">x</points>', []),
        ('<points coords="1 1 103 540">x</points> and <points coords="2 1 200 300">y</points>',
         [(1, 1, 0.103, 0.54), (2, 1, 0.2, 0.3)]),
        ('<point x="10.5" y="20.0" alt="cat">cat</point>', [(1, 1, 0.105, 0.2)]),
        ('<points x1="10" y1="20" x2="30.5" y2="40" alt="c">c</points>', [(1, 1, 0.1, 0.2), (1, 2, 0.305, 0.4)]),
        ('<point x="10" y="200">cat</point>', []),
        ('<point x="1.2.3" y="20">cat</point>', []),
        ("<point 0.25, 0.75, 0>", [(1, 1, 0.25, 0.75)]),
        ("<point 2.5, 0.25, 0.75, 3>", [(2.5, 4, 0.25, 0.75)]),
        ("<point 0.25, 1.75, 0>", []),
        ("no places 1 2 3", []), ("", []), ("<points", []), ('<points coords="">', []), ('<points coords=";;">', []),
    ],
)  # fmt: skip
def test_reading_forgives(text, places):
    assert parse(text) == [Place(*place) for place in places]


@given(st.text(alphabet='<points track x1="y2 coords;,.\t0123456789>/', max_size=200))
@settings(max_examples=300, deadline=None)
def test_reading_never_fails(text):
    assert all(0 <= place.x <= 1 and 0 <= place.y <= 1 for place in parse('<points coords="' + text))
    parse(text), parse_count(text)


@pytest.mark.parametrize(
    ("text", "count"),
    [("7", 7), (" 7.", 7), ("There are 12 cups.", 12), (NONE, 0), ("shows a total of 3.", 3), ("many", None)],
)
def test_counts(text, count):
    assert parse_count(text) == count


def tracks(*objects: list[tuple[float, float, float]], label: str = "player") -> Tracks:
    return Tracks(label, tuple(tuple(Point(*point) for point in places) for places in objects))


# The second object is first seen to the right of the third; the first one comes later and is hidden at 1.0.
GAME = tracks(
    [(0.5, 0.9, 0.9), (1.5, 0.91, 0.9)],
    [(0.0, 0.7, 0.41), (0.5, 0.71, 0.41), (1.0, 0.72, 0.41)],
    [(0.0, 0.105, 0.22), (0.5, 0.11, 0.222), (1.0, 0.12, 0.23)],
)


@pytest.mark.parametrize(
    ("answer", "style", "text"),
    [
        (tracks([(0, 0.7, 0.41)], [(0, 0.105, 0.22), (0.5, 0.11, 0.222)]), "video_point_track_per_frame",
         '<tracks coords="0.0 1 105 220 2 700 410;0.5 1 110 222">player</tracks>'),
        (GAME, "video_point_track_per_frame",
         '<tracks coords="0.0 1 105 220 2 700 410;0.5 1 110 222 2 710 410 3 900 900;1.0 1 120 230 2 720 410;'
         '1.5 3 910 900">player</tracks>'),
        (GAME, "video_point_track_start_end",
         '<tracks coords="0.0 1 105 220 2 700 410;0.5 3 900 900;1.0 1 120 230 2 720 410;1.5 3 910 900">'
         'player</tracks>'),
        (tracks([(2.04, 0.5, 0.5)]), "video_single_point_track_start_end",
         '<tracks coords="2.0 1 500 500">player</tracks>'),
        (tracks(), "video_point_track_per_frame", NO_TRACKS),
        # Two places of one object within a tenth of a second: the first.
        (tracks([(1.01, 0.5, 0.5), (1.04, 0.6, 0.5)]), "video_point_track_per_frame",
         '<tracks coords="1.0 1 500 500">player</tracks>'),
    ],
)  # fmt: skip
def test_tracks_are_written_as_molmo2_does(answer, style, text):
    assert write(answer, style) == text
    assert write(answer, style, separator="\t") == text.replace(";", "\t")


def test_tracks_are_read():
    found = sorted(parse(write(GAME, "video_point_track_per_frame")))
    assert {place.id for place in found} == {1, 2, 3}
    assert [(place.at, place.x, place.y) for place in found if place.id == 3] == list(map(tuple, GAME.objects[0]))
    assert [place.at for place in found if place.id == 1] == [0.0, 0.5, 1.0]
    assert parse(NO_TRACKS) == []


def test_tracks_end_with_the_last_frame_shown():
    assert until(GAME, 1.0) == tracks(list(GAME.objects[0][:1]), list(GAME.objects[1]), list(GAME.objects[2]))
    assert until(GAME, 0.0).objects == (GAME.objects[1][:1], GAME.objects[2][:1])
    assert until(GAME, 9.0) == GAME


def test_times_in_one_tenth_of_a_second_are_one_group():
    points = answer((1.04, 0.9, 0.1), (1.01, 0.95, 0.2), (2.26, 0.5, 0.5))
    assert write(points, "video_point", seconds=True) == (
        '<points coords="1.0 1 900 100 2 950 200;2.3 3 500 500">cups</points>'
    )
    assert write(points, "video_point_count", seconds=True).endswith(" shows a total of 3.")
    assert write(points, "video_count", seconds=True) == "3"
    assert write(points, "video_count_point", seconds=True).startswith("There are 3 <points")


def test_coordinates_outside_are_clamped_and_nan_refused():
    assert write(answer((1, -0.2, 1.7)), "pointing") == '<points coords="1 1 000 1000">cups</points>'
    with pytest.raises(ValueError, match="nan"):
        write(answer((1, float("nan"), 0)), "pointing")
