"""Charts as SVG: where the points stand, what the axes say."""

import re

import pytest

from megatron_vlm.train.chart import HEIGHT, WIDTH, Line, _log_ticks, _ticks, chart


def _places(svg):
    return [tuple(map(float, place.split())) for place in re.findall(r'd="M([\d. L-]+)" fill', svg)[0].split("L")]


def test_points_rise_to_the_right_and_stay_inside():
    places = _places(chart([Line([(1, 1.0), (2, 2.0), (3, 4.0)], "#000")]))
    xs, ys = zip(*places, strict=True)
    assert list(xs) == sorted(xs) and list(ys) == sorted(ys, reverse=True)
    assert 0 < xs[0] and xs[-1] < WIDTH and 0 < ys[-1] and ys[0] < HEIGHT
    assert ys[1] - ys[2] == pytest.approx(2 * (ys[0] - ys[1]), abs=0.3)


def test_a_logarithmic_axis_makes_equal_ratios_equally_high_and_leaves_zero_out():
    places = _places(chart([Line([(1, 1.0), (2, 2.0), (3, 4.0), (4, 0.0)], "#000")], log=True))
    assert len(places) == 3
    assert places[0][1] - places[1][1] == pytest.approx(places[1][1] - places[2][1], abs=0.3)


def test_one_spike_does_not_flatten_the_rest():
    line = Line([(step, 1e6 if step == 500 else 1.0 + step / 1000) for step in range(1000)], "#000")
    heights = [y for _, y in _places(chart([line]))]
    assert heights[0] - heights[-1] > HEIGHT / 2


def test_long_lines_are_thinned_to_means():
    places = _places(chart([Line([(step, float(step)) for step in range(100_000)], "#000")]))
    assert 100 < len(places) <= 300


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3, 7), (1e-9, 3e-9), (0.95, 1.001), (1, 100_000)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = _ticks(low, high)
    assert 2 <= len(ticks) <= 7 and all(low - 1e-12 <= tick <= high * (1 + 1e-9) + 1e-12 for tick in ticks)


def test_logarithmic_ticks():
    assert _log_ticks(0.9, 11) == [1, 2, 5, 10]
    assert _log_ticks(1e-6, 1e3)[0] == pytest.approx(1e-6)
    assert _log_ticks(5.6, 8.5) == [6, 7, 8]  # neither 2, 5 nor 10 is in between


def test_nothing_to_draw_is_an_empty_picture():
    assert chart([Line([(1, float("nan"))], "#000")]) == "<svg></svg>"
