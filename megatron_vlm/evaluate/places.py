"""Answers made of places: pointing in images and in videos, and counts. Numbers in, scores out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_vlm.data.points import Place
from megatron_vlm.evaluate.regions import Region, paired
from megatron_vlm.evaluate.score import Scores

#: Upper ends of the bins of true counts, as Molmo2 reports them.
BINS = (5, 10, 15, 20, 25)
#: Share of the true count that a close answer may be off, beside 1.
CLOSE_SHARE = 0.05
#: Seconds within which a time in a video counts as right.
NEAR_S = 0.5
#: Most places of an answer that are matched: a loop in the model's words is not a reason to match for ever.
MOST_PLACES = 1000


def pointing(found: Sequence[Place], wanted: Sequence[Region], sizes: Sequence[tuple[int, int]]) -> Scores:
    """F1, precision and recall of places in one or several images; see `_scores`.

    sizes: (width, height) of each image. A place hits the region it is paired with, or none. Where masks are known,
    pairs have the least distance in pixels whether they hit or not (Molmo2's rule); within radii as many pairs hit as
    can.
    """
    kept = [place for place in found[:MOST_PLACES] if place.at in range(1, len(sizes) + 1)]
    hits = np.array(
        [[region.hit(p.at, p.x, p.y, sizes[int(p.at) - 1]) for region in wanted] for p in kept], dtype=bool
    ).reshape(len(kept), len(wanted))
    # Images lie side by side, so far apart that a pair across two is the last choice.
    span = 10 * max((max(size) for size in sizes), default=1)

    def pixels(at: float, x: float, y: float) -> tuple[float, float, float]:
        width, height = sizes[int(at) - 1]
        return x * width, y * height, at * span

    masked = any(spot.mask for region in wanted for spot in region.spots)
    pairs = paired(
        [pixels(p.at, p.x, p.y) for p in kept],
        [pixels(r.at, r.x, r.y) for r in wanted],
        None if masked else hits,
    )
    return _scores(sum(bool(hits[pair]) for pair in pairs), len(found), len(wanted))


def video_pointing(found: Sequence[Place], wanted: Sequence[Region], size: tuple[int, int], seconds: float) -> Scores:
    """The same in a video. Places are paired by the least distance in (t, x, y), each scaled to 0 .. 100 and rounded to
    a tenth; a pair hits where the object is at the given place at the given time (Molmo2's rule).

    `time` is the share of the wanted objects whose place is at most NEAR_S from the true time.
    """
    kept = found[:MOST_PLACES]
    scale = 100 / seconds if seconds > 0 else 0.0

    def scaled(at: float, x: float, y: float) -> tuple[float, float, float]:
        return round(at * scale, 1), round(100 * x, 1), round(100 * y, 1)

    pairs = paired([scaled(p.at, p.x, p.y) for p in kept], [scaled(r.at, r.x, r.y) for r in wanted])
    hits = sum(wanted[j].hit(kept[i].at, kept[i].x, kept[i].y, size) for i, j in pairs)
    near = sum(abs(kept[i].at - wanted[j].at) <= NEAR_S + 1e-9 for i, j in pairs)
    return {**_scores(hits, len(found), len(wanted)), "time": (near, len(wanted))}


def _scores(hits: int, found: int, wanted: int) -> Scores:
    """F1 over all places of all questions together, its parts, and its mean over questions: 1 where nothing was wanted
    and nothing said, as Molmo2 counts."""
    total = found + wanted
    return {
        "F1": (2 * hits, total),
        "precision": (hits, found),
        "recall": (hits, wanted),
        "F1 by question": (2 * hits / total if total else 1.0, 1),
    }


def counting(said: int | None, wanted: int) -> Scores:
    """Exact, close (at most 1 and a twentieth off), and exact by bin of the true count. None = no number: all wrong."""
    exact = float(said == wanted)
    close = said is not None and abs(said - wanted) <= 1 + int(CLOSE_SHARE * wanted)
    return {"accuracy": (exact, 1), "close": (float(close), 1), f"count {_bin(wanted)}": (exact, 1)}


def _bin(count: int) -> str:
    lower = 0
    for upper in BINS:
        if count <= upper:
            return f"{lower} to {upper}"
        lower = upper + 1
    return f"{lower} or more"
