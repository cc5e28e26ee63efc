"""Charts as SVG: where the points stand, what the axes say."""

import re

import pytest

from megatron_vlm.train.chart import HEIGHT, WIDTH, Line, _log_ticks, chart


def _places(svg):
    """Of the points of the first line, in the chart's plot."""
    (line,) = re.findall(r'<path d="M([-\d. L]+)" class="line', svg)
    numbers = [float(number) for number in line.replace("L", " ").split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _labels(svg):
    return [(float(y), text) for y, text in re.findall(r'<text x="-5" y="([\d.]+)"[^>]*>([^<]+)</text>', svg)]


def test_points_rise_to_the_right_and_stay_inside():
    places = _places(chart([Line([(1, 1.0), (2, 2.0), (3, 4.0)], "#000")]))
    xs, ys = zip(*places, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)
    assert 0 <= xs[0] and xs[-1] < WIDTH and 0 < ys[-1] and ys[0] < HEIGHT
    assert ys[1] - ys[2] == pytest.approx(2 * (ys[0] - ys[1]), abs=0.3)


def test_a_logarithmic_axis_makes_equal_ratios_equally_high_and_leaves_zero_out():
    svg = chart([Line([(1, 1.0), (2, 2.0), (3, 4.0), (4, 0.0)], "#000")], log=True)
    places = _places(svg)
    assert len(places) == 3
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2)  # the steps are not logarithmic
    heights = {float(text): y for y, text in _labels(svg)}  # a label stands 4 below its line
    assert {1.0, 2.0, 4.0} <= set(heights)
    assert [heights[value] - 4 for value in (1.0, 2.0, 4.0)] == pytest.approx([y for _, y in places], abs=0.3)
    assert places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.3)


def test_one_spike_does_not_flatten_the_rest():
    line = Line([(step, 1e6 if step == 500 else 1.0 + step / 1000) for step in range(1000)], "#000")
    heights = [y for _, y in _places(chart([line]))]
    assert heights[0] - heights[-1] > HEIGHT / 2


def test_long_lines_are_thinned_to_means():
    places = _places(chart([Line([(step, float(step)) for step in range(100_000)], "#000")]))
    assert 100 < len(places) <= 300


def test_logarithmic_ticks():
    assert _log_ticks(0.9, 11) == [1, 2, 5, 10]
    assert _log_ticks(1e-6, 1e3)[0] == pytest.approx(1e-6)
    assert _log_ticks(0.75, 4.3) == pytest.approx([0.8, 1, 1.5, 2, 3, 4])


def test_a_narrow_logarithmic_axis_says_values_and_not_their_logarithms():
    labels = _labels(chart([Line([(1, 5.6), (2, 8.4)], "#000")], log=True))
    assert len(labels) > 2 and all(5 < float(text) < 9.3 for _, text in labels)


def test_nothing_to_draw_is_no_picture_and_one_point_is_a_dot():
    assert chart([Line([(1, float("nan"))], "#000")]) == ""
    assert chart([Line([(1, 2.0)], "#000")]).count("<circle") == 1
    svg = chart([Line([(1, 2.0), (2, 3.0)], "#123456", dashed=True)], name="x")
    assert "<circle" not in svg and "stroke-dasharray:5,3" in svg and "#123456" in svg and "#chart-x " in svg
