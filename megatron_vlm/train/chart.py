"""A chart of numbers over steps as inline SVG: a few hundred points a line, labelled axes, no script, no library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Colours of the metrics in a chart, distinct also for the colour-blind (Okabe and Ito), on light and dark.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#7f7f7f")
WIDTH, HEIGHT = 640, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 10, 10, 26
#: Points of a drawn line; longer ones become means of neighbours.
_POINTS = 300
#: Share of the lowest and highest values that may lie outside, so that one spike does not flatten the rest.
_OUTLIERS = 0.005


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    points: Sequence[tuple[int, float]]
    """(step, value), by rising step."""
    color: str
    dashed: bool = False
    smooth: bool = False
    """Draw running means in front of the faint values."""


def chart(lines: Sequence[Line], log: bool = False) -> str:
    """The SVG. Values that a logarithmic scale cannot show (0 and less) are left out."""
    shown = [
        Line([(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not log)], *_looks(line))
        for line in lines
    ]
    values = sorted(y for line in shown for _, y in line.points)
    if not values:
        return "<svg></svg>"
    low, high = _range(values, log)
    steps = [x for line in shown for x, _ in line.points]
    first, last = min(steps), max(steps)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        y = min(max(y, low), high)
        up = math.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" fill="currentColor" role="img">']
    for tick in _log_ticks(low, high) if log else _ticks(low, high):
        _, y = place(first, tick)
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{WIDTH - _RIGHT}" stroke="currentColor" opacity=".15"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_label(tick)}</text>')
    for tick in _ticks(first, last) if last > first else [first]:
        if tick == int(tick):
            x, _ = place(tick, low)
            anchor = "end" if x > WIDTH - 40 else "middle"
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}">{int(tick):,}</text>')
    for line in shown:
        points = _thin(line.points)
        if line.smooth:
            parts.append(_path([place(*p) for p in points], line, faint=True))
            points = _running(points)
        parts.append(_path([place(*p) for p in points], line))
    return "".join(parts) + "</svg>"


def _looks(line: Line) -> tuple[str, bool, bool]:
    return line.color, line.dashed, line.smooth


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """What the axis spans: all values but a few outliers, a little wider, never empty."""
    aside = int(len(values) * _OUTLIERS)
    low, high = values[aside], values[-1 - aside]
    if log:
        return low / 1.1, high * 1.1
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low <= 0.3 * high else low - room), high + room


def _path(places: Sequence[tuple[float, float]], line: Line, faint: bool = False) -> str:
    if len(places) == 1:
        return f'<circle cx="{places[0][0]:.1f}" cy="{places[0][1]:.1f}" r="3" fill="{line.color}"/>'
    way = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    dashes = ' stroke-dasharray="5 3"' if line.dashed and not faint else ""
    width, opacity = (1, ' opacity=".25"') if faint else (1.8, "")
    return f'<path d="{way}" fill="none" stroke="{line.color}" stroke-width="{width}"{dashes}{opacity}/>'


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most _POINTS points: means of equal groups of neighbours."""
    size = -(-len(points) // _POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _running(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a twentieth of the line around each point."""
    reach = max(1, len(points) // 40)
    found = []
    for index, (x, _) in enumerate(points):
        near = points[max(0, index - reach) : index + reach + 1]
        found.append((x, sum(y for _, y in near) / len(near)))
    return found


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers in between."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    start = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(start, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, with 2 and 5 of them where there are few; in a narrow range round numbers as on any axis."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 5 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
    return ticks if len(ticks) > 2 else _ticks(low, high)


def _label(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        text = f"{value:.2g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
        return text
    return f"{value:,.6g}"
