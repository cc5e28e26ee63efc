"""Is this step's loss sane? Values that are not finite, and spikes over what the last steps had.

Numbers in, verdict out: what follows from a verdict is the loop's business. Every rank judges the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from megatron_vlm.config.schema import GuardConfig

#: Steps that must have been seen before a spike can be told.
LEAST_HISTORY = 20
#: Standard deviation of a normal distribution over its median absolute deviation.
_NORMAL = 1.4826
#: The spread counts as at least this share of the median: a value that hardly moves would spike at a breath.
_LEAST_SPREAD = 0.02


@dataclass(frozen=True)
class Event:
    """Why a guard fired."""

    step: int
    kind: str
    """not_finite or spike."""
    policy: str
    """What the settings ask for: note, skip, rollback or stop."""
    name: str
    """Of the first value at fault: loss, or a component's gradient norm."""
    value: float
    median: float | None = None
    """Of the last steps; None where the value is not finite."""
    spread: float | None = None
    """Robust standard deviation of the last steps, likewise."""

    @property
    def words(self) -> str:
        """For the reader."""
        if self.median is None or self.spread is None:
            return f"{self.name} is {self.value}"
        above = (self.value - self.median) / self.spread
        return f"{self.name} {self.value:.4g} is {above:.0f} deviations above its median of {self.median:.4g}"


class Guard:
    """Judges steps by those before. Its state goes into checkpoints."""

    def __init__(self, config: GuardConfig, state: Mapping[str, Any] | None = None) -> None:
        self.config = config
        self.restore(state or {})
        self.rollbacks = 0
        """Since the last new checkpoint."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._history = {name: list(values) for name, values in state.get("history", {}).items()}
        self.refused = int(state.get("refused", 0))
        """Steps in a row that were not applied."""

    def state(self) -> dict[str, Any]:
        """JSON values."""
        return {"history": {name: list(values) for name, values in self._history.items()}, "refused": self.refused}

    def judge(self, step: int, values: Mapping[str, float]) -> Event | None:
        """None = apply the step, and remember its values; so too with policy `note`. Otherwise it is refused.

        values: `loss` and gradient norms by component, 0 = nothing to guard.
        """
        event = self._event(step, values)
        if event is None or event.policy == "note":
            if event is None or event.kind == "spike":
                self._remember(values)
            self.refused = 0
        else:
            self.refused += 1
        return event

    def _event(self, step: int, values: Mapping[str, float]) -> Event | None:
        for name, value in values.items():
            if not math.isfinite(value):
                return Event(step, "not_finite", self.config.not_finite, name, value)
        if self.config.spike == "off":
            return None
        for name, value in values.items():
            past = self._history.get(name, ())
            if len(past) < LEAST_HISTORY:
                continue
            middle, spread = robust(past)
            deviations = self.config.loss_deviations if name == "loss" else self.config.norm_deviations
            if value > middle + deviations * spread:
                return Event(step, "spike", self.config.spike, name, value, middle, spread)
        return None

    def _remember(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if value:
                past = self._history.setdefault(name, [])
                past.append(value)
                del past[: -self.config.history]


def robust(values: list[float] | tuple[float, ...]) -> tuple[float, float]:
    """Median, and the standard deviation estimated from the median absolute deviation: outliers do not move them."""
    middle = median(values)
    spread = _NORMAL * median(abs(value - middle) for value in values)
    return middle, max(spread, _LEAST_SPREAD * abs(middle), 1e-12)
