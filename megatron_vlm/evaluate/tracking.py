"""Answers that follow objects: F1 by frame, and HOTA with its parts, over similarities of 0 or 1.

HOTA (Luiten et al. 2021) as Molmo2 uses it: a point in an object's mask (or circle) is a match at every threshold, so
the value is that at 0.5. T = frames.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from megatron_vlm.data.points import Place
from megatron_vlm.evaluate.places import MOST_PLACES
from megatron_vlm.evaluate.regions import Spot, inside, paired
from megatron_vlm.evaluate.score import Scores

#: At one frame: ids of the true objects, ids of the said ones, whether said one j is on true one i (true, said) bool.
Frame = tuple[list[int], list[int], np.ndarray]


def tracking(
    found: Sequence[Place], wanted: Mapping[int, Sequence[Spot]], size: tuple[int, int], rate: float
) -> Scores:
    """HOTA, DetA, AssA of one video, and F1, precision and recall, each the mean over the frames that either names.

    found:  places said, `at` in seconds, each with its object.
    wanted: object -> where it is at the annotated moments, `rate` times a second.
    """
    said = _by_frame([(p.at, p.id, p) for p in found[:MOST_PLACES]], rate)
    true = _by_frame([(s.at, number, s) for number, spots in wanted.items() for s in spots], rate)
    frames = sorted({*said, *true})
    width, height = size
    table: list[Frame] = []
    by_frame = []
    for frame in frames:
        objects, answers = true.get(frame, {}), said.get(frame, {})
        on = np.array(
            [[inside(spot, p.x, p.y, size) for p in answers.values()] for spot in objects.values()], dtype=bool
        ).reshape(len(objects), len(answers))
        table.append((list(objects), list(answers), on))
        pairs = paired(
            [(p.x * width, p.y * height) for p in answers.values()],
            [(s.x * width, s.y * height) for s in objects.values()],
            None if any(spot.mask for spot in objects.values()) else on.T,
        )
        by_frame.append((sum(bool(on[j, i]) for i, j in pairs), len(answers), len(objects)))
    hota_, deta, assa = hota(table)
    count = len(frames)
    f1 = sum(2 * hits / (given + there) for hits, given, there in by_frame)
    return {
        "HOTA": (hota_, 1),
        "DetA": (deta, 1),
        "AssA": (assa, 1),
        "F1 by frame": (f1 / count if count else 1.0, 1),
        "precision by frame": (sum(h / g if g else 0.0 for h, g, _ in by_frame) / count if count else 1.0, 1),
        "recall by frame": (sum(h / t if t else 0.0 for h, _, t in by_frame) / count if count else 1.0, 1),
    }


def _by_frame(places: Sequence[tuple[float, int, Any]], rate: float) -> dict[int, dict[int, Any]]:
    """Frame -> object -> its place there; the first where an object is named twice."""
    frames: dict[int, dict[int, Any]] = {}
    for at, number, place in places:
        frames.setdefault(round(at * rate), {}).setdefault(number, place)
    return frames


def hota(frames: Sequence[Frame]) -> tuple[float, float, float]:
    """(HOTA, DetA, AssA). Nothing wanted and nothing said is perfect; one without the other is 0."""
    truths = {number: place for place, number in enumerate(sorted({n for objects, _, _ in frames for n in objects}))}
    claims = {number: place for place, number in enumerate(sorted({n for _, said, _ in frames for n in said}))}
    if not truths or not claims:
        perfect = float(not truths and not claims)
        return perfect, perfect, perfect
    # 1. How often each pair could be the same object, against how often either is there: the better alignment overall
    #    wins where a frame leaves a choice.
    together = np.zeros((len(truths), len(claims)))
    true_count, said_count = np.zeros(len(truths)), np.zeros(len(claims))
    placed = []
    for objects, said, on in frames:
        rows, columns = [truths[n] for n in objects], [claims[n] for n in said]
        placed.append((rows, columns))
        true_count[rows] += 1
        said_count[columns] += 1
        similarity = on.astype(float)
        both = similarity.sum(axis=0)[None] + similarity.sum(axis=1)[:, None] - similarity
        together[np.ix_(rows, columns)] += np.divide(similarity, both, out=np.zeros_like(similarity), where=both > 0)
    alignment = together / (true_count[:, None] + said_count[None] - together)
    # 2. One matching a frame.
    matched = np.zeros_like(together)
    for (rows, columns), (_, _, on) in zip(placed, frames, strict=True):
        if on.size:
            chosen = linear_sum_assignment(-(alignment[np.ix_(rows, columns)] * on))
            for i, j in zip(*chosen, strict=True):
                matched[rows[i], columns[j]] += on[i, j]
    # 3. Detection: matches against everything there or said. Association: of each match, how long its pair stays one.
    hits = matched.sum()
    detection = hits / (true_count.sum() + said_count.sum() - hits)
    pairs = matched / np.maximum(1, true_count[:, None] + said_count[None] - matched)
    association = float((matched * pairs).sum() / max(1.0, hits))
    return float(np.sqrt(detection * association)), float(detection), association
