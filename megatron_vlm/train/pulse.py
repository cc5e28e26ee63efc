"""What this rank is doing at the moment, and how long it did what: phases of a step. Costs a clock reading a phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

#: In the order of a step. `start` is everything before the first one; `collective` sums up or agrees over the ranks.
PHASES = ("start", "data", "collective", "forward", "backward", "optimizer", "save", "other")


class Pulse:
    """Set by the training thread, read by the watchdog's."""

    def __init__(self) -> None:
        self.phase, self.since, self.step = "start", time.monotonic(), 0
        self.keys: Callable[[], tuple[str, ...]] = tuple
        """Gives `data set/key` of the samples that this rank reads or trains on."""
        self._spent = dict.fromkeys(PHASES, 0.0)

    def enter(self, phase: str) -> None:
        """From now on this rank is in `phase`."""
        now = time.monotonic()
        self._spent[self.phase] += now - self.since
        self.phase, self.since = phase, now

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """`phase` for a block; the one before afterwards."""
        before = self.phase
        self.enter(phase)
        yield
        self.enter(before)

    def spent(self) -> dict[str, float]:
        """Seconds in each phase since the last call."""
        self.enter(self.phase)
        spent, self._spent = self._spent, dict.fromkeys(PHASES, 0.0)
        return spent
