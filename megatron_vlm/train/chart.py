"""Numbers over steps -> a chart as inline SVG, drawn by pygal: what is left out, what is averaged, where axes end."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np
import pygal
from pygal.style import Style

# pygal brings a finder for its plug-ins (none here) that has no find_spec; other look-ups, pytest's for one, need that.
sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, pygal.PluginImportFixer)]

#: Colours of the metrics in a chart, distinct also for the colour-blind (Okabe and Ito), on light and dark.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a6d3b", "#7f7f7f")
WIDTH, HEIGHT = 640, 260
#: Points of a drawn line; longer ones become means of neighbours.
_POINTS = 300
#: Share of the lowest and highest values that may lie outside, so that one spike does not flatten the rest.
_OUTLIERS = 0.005
#: Alpha of single values behind their running means.
_FAINT = "40"
_STYLE = {
    "background": "transparent", "plot_background": "transparent", "foreground": "currentColor",
    "foreground_strong": "currentColor", "foreground_subtle": "#8886", "guide_stroke_color": "#8886",
    "major_guide_stroke_color": "#8886", "guide_stroke_dasharray": "0", "major_guide_stroke_dasharray": "0",
    "font_family": "inherit", "label_font_size": 12, "major_label_font_size": 12, "opacity": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    points: Sequence[tuple[int, float]]
    """(step, value), by rising step."""
    color: str
    dashed: bool = False
    smooth: bool = False
    """Draw running means in front of the faint values."""


def chart(lines: Sequence[Line], log: bool = False, name: str = "chart") -> str:
    """The SVG. Values that a logarithmic scale cannot show (0 and less) are left out.

    name: an id that no other chart of the page has.
    """
    drawn: list[tuple[str, bool, list[tuple[float, float]]]] = []
    values: list[float] = []
    for line in lines:
        points = [(x, y) for x, y in line.points if math.isfinite(y) and (y > 0 or not log)]
        values += [y for _, y in points]
        thinned = _thin(points)
        if line.smooth:
            drawn.append((line.color + _FAINT, False, thinned))
            thinned = _running(thinned)
        drawn.append((line.color, line.dashed, thinned))
    if not values:
        return ""
    low, high = _range(sorted(values), log)
    # pygal's logarithmic XY charts have two logarithmic axes: the logarithms are drawn here, and labelled as what they
    # are of.
    place = math.log10 if log else float
    plot = pygal.XY(
        style=Style(**_STYLE, colors=tuple(color for color, _, _ in drawn)),
        width=WIDTH, height=HEIGHT, margin=6, js=[], show_legend=False, show_dots=False,
        range=(place(low), place(high)), zero=place(low) if log else 0,
        x_value_formatter=_step, value_formatter=_power if log else _label, show_x_guides=False,
    )  # fmt: skip
    plot.uuid = name
    if log and len(ticks := _log_ticks(low, high)) > 3:
        plot.y_labels = [{"value": place(tick), "label": _label(tick)} for tick in ticks]
    for color, dashed, places in drawn:
        stroke = {"width": 1 if color.endswith(_FAINT) else 1.8} | ({"dasharray": "5, 3"} if dashed else {})
        inside = [(x, place(min(max(y, low), high))) for x, y in places]
        plot.add(None, inside, stroke_style=stroke, show_dots=len(inside) == 1)
    return _plain(plot.render_tree())


def _plain(svg: ElementTree.Element) -> str:
    """Without what a page needs no copy of: comments, the namespace, and a script that nothing here calls."""
    for parent in list(svg.iter()):
        for child in list(parent):
            if not isinstance(child.tag, str) or child.tag == "script":
                parent.remove(child)
    svg.attrib.pop("xmlns", None)
    return ElementTree.tostring(svg, encoding="unicode")


def _range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """What the axis spans: all values but a few outliers, a little wider, never empty."""
    aside = int(len(values) * _OUTLIERS)
    low, high = values[aside], values[-1 - aside]
    if log:
        return low / 1.1, high * 1.1
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (0.0 if 0 <= low <= 0.3 * high else low - room), high + room


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most _POINTS points: means of equal groups of neighbours."""
    groups = np.array_split(np.array(points, dtype=np.float64).reshape(-1, 2), max(1, min(_POINTS, len(points))))
    return [(float(group[:, 0].mean()), float(group[:, 1].mean())) for group in groups if len(group)]


def _running(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a twentieth of the line around each point."""
    reach = max(1, len(points) // 40)
    values = [y for _, y in points]
    return [(x, float(np.mean(values[max(0, i - reach) : i + reach + 1]))) for i, (x, _) in enumerate(points)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in between; with more and more of what lies between them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) >= 4:
            break
    return found


def _step(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else ""


def _power(value: float) -> str:
    return f"{10**value:.3g}"


def _label(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.2g}".replace("e+0", "e").replace("e+", "e").replace("e-0", "e-")
    return f"{value:,.6g}"
