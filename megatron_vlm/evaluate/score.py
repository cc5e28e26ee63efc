"""What is said of each answer, and what many answers come to: shares with their uncertainty. Numbers in, numbers out.

Every answer is right, wrong or not scored. Not scored has two kinds. An answer in which nothing can be made out is the
model's fault: it earns nothing and stays in the count. Where the judge, the media or the truth fail, nothing is known
of the answer: it leaves the count. Both are reported by name.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

#: Quantile of the normal distribution for a two-sided interval of 95 %.
Z_95 = 1.959963984540054
#: Resamplings of an interval by bootstrap.
RESAMPLES = 1000
#: Drawn at a time, for the memory of many images.
_AT_ONCE = 50
RIGHT, WRONG, NOT_SCORED = "right", "wrong", "not scored"
#: Share of the first score from which on an answer is called right.
ENOUGH = 0.5
#: Score name -> (part, whole). Over many answers a score is the sum of the parts over the sum of the wholes.
Scores = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Verdict:
    """What is said of one answer."""

    outcome: str
    """RIGHT, WRONG or NOT_SCORED."""
    scores: Scores = field(default_factory=dict)
    """The first is the task's main one. Empty where nothing is known of the answer."""
    reason: str = ""
    """Why it was not scored."""

    @property
    def value(self) -> float:
        """Of the first score; NaN without one."""
        part, whole = next(iter(self.scores.values()), (0.0, 0.0))
        return part / whole if whole else math.nan


def judged(scores: Scores) -> Verdict:
    """Right where the first score is at least ENOUGH, or nothing was wanted and nothing given."""
    part, whole = next(iter(scores.values()))
    return Verdict(RIGHT if not whole or part / whole >= ENOUGH else WRONG, scores)


def unreadable(scores: Scores, reason: str) -> Verdict:
    """Nothing can be made out in the model's words. scores: what it earns, parts of 0."""
    return Verdict(NOT_SCORED, scores, reason)


def unknown(reason: str) -> Verdict:
    """Nothing can be said of the answer, through no fault of the model's."""
    return Verdict(NOT_SCORED, {}, reason)


def summary(by_image: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    """Scores with 95 % intervals and counts of the outcomes. by_image: the verdicts of the questions of each image.

    {"scores": {name: {"value", "low", "high", "interval", "parts", "wholes"}}, "right": n, "wrong": n,
    "not_scored": {reason: n}, "questions": n}. Names in the order in which they first appear.
    """
    verdicts = [verdict for image in by_image for verdict in image]
    names = list(dict.fromkeys(name for verdict in verdicts for name in verdict.scores))
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    return {
        "questions": len(verdicts),
        "right": outcomes[RIGHT],
        "wrong": outcomes[WRONG],
        "not_scored": dict(Counter(verdict.reason for verdict in verdicts if verdict.outcome == NOT_SCORED)),
        "scores": {name: _score(name, by_image) for name in names},
    }


def _score(name: str, by_image: Sequence[Sequence[Verdict]]) -> dict[str, Any]:
    sums = np.array([np.sum([v.scores.get(name, (0.0, 0.0)) for v in image], axis=0) for image in by_image if image])
    parts, wholes = (float(total) for total in sums.sum(axis=0))
    value = parts / wholes if wholes else math.nan
    pairs = [verdict.scores[name] for image in by_image for verdict in image if name in verdict.scores]
    alone = all(sum(name in verdict.scores for verdict in image) <= 1 for image in by_image)
    binary = all(pair in ((0, 1), (1, 1)) for pair in pairs)
    if wholes and (binary and alone or parts in (0, wholes)):
        # Resampling answers that are all alike would claim certainty; of several questions about an image one counts.
        total = wholes if binary and alone else sum(bool(image) for image in by_image)
        low, high = Share(round(value * total), round(total)).interval
        method = "Wilson" if binary and alone else "Wilson, an image counted once"
    else:
        low, high = bootstrap(sums)
        method = "bootstrap over images"
    return {"value": value, "low": low, "high": high, "interval": method, "parts": parts, "wholes": wholes}


def bootstrap(sums: np.ndarray, seed: int = 6198) -> tuple[float, float]:
    """95 % of the resampled shares. sums: (images, 2), part and whole of each image."""
    count = len(sums)
    if count == 0 or not sums[:, 1].any():
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    rounds = RESAMPLES // _AT_ONCE
    resampled = [sums[rng.integers(0, count, (_AT_ONCE, count))].sum(axis=1) for _ in range(rounds)]
    parts, wholes = np.concatenate(resampled).T
    shares = parts[wholes > 0] / wholes[wholes > 0]
    low, high = np.quantile(shares, [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True)
class Share:
    """`hits` of `total`, with Wilson's interval of 95 %."""

    hits: int
    total: int

    @property
    def value(self) -> float:
        """NaN of nothing."""
        return self.hits / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Lower and upper end."""
        if not self.total:
            return math.nan, math.nan
        n, p, square = self.total, self.value, Z_95**2
        middle = (p + square / (2 * n)) / (1 + square / n)
        half = Z_95 * math.sqrt(p * (1 - p) / n + square / (4 * n * n)) / (1 + square / n)
        return max(0.0, middle - half), min(1.0, middle + half)
