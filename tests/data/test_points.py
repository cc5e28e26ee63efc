"""Places as text and back: Molmo2's grammar exactly, and forgiveness towards what models write."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.data.example import Point, Points
from megatron_vlm.data.points import NONE, Place, parse, parse_count, write


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


def test_coordinates_outside_are_clamped_and_nan_refused():
    assert write(answer((1, -0.2, 1.7)), "pointing") == '<points coords="1 1 000 1000">cups</points>'
    with pytest.raises(ValueError, match="nan"):
        write(answer((1, float("nan"), 0)), "pointing")
