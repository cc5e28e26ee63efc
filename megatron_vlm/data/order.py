"""The order of samples, as a pure function: which sample of which data set is draw k of a run.

Time runs from 0; window w covers [w x length, (w + 1) x length). Until time n data set d has been drawn
floor(n p_d + u_d) times, whatever happened before; its k-th draw is visit k // N_d, at a keyed permutation of
k mod N_d.
A window therefore has `length` draws but for rounding, and any window is known without the earlier ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from megatron_vlm.data.keyed import Permutation, generator, key

#: Shares are whole multiples of 2**-SHARE_BITS, so that counting is exact.
SHARE_BITS = 48


class Draw(NamedTuple):
    """One sample to read."""

    source: int
    """Index of the data set in the mixture."""
    place: int
    """Index of the sample in the data set's split."""
    visit: int
    """How often the sample was drawn before."""


class MixtureOrder:
    """Endless draws at fixed rates.

    names, sizes, rates: of the mixture's data sets. A rate of 0 leaves one out.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int], rates: Sequence[float], seed: int) -> None:
        self._names, self._sizes, self._seed = tuple(names), tuple(sizes), seed
        self._steps = [round(rate * 2**SHARE_BITS) for rate in rates]
        self._phases = [key(seed, name, "phase") >> (64 - SHARE_BITS) for name in names]
        self._permutation = lru_cache(maxsize=4096)(
            lambda source, visit: Permutation(self._sizes[source], seed, self._names[source], visit, "order")
        )

    def counts(self, time: int) -> list[int]:
        """How often each data set is drawn before `time`."""
        return [(time * step + phase) >> SHARE_BITS for step, phase in zip(self._steps, self._phases, strict=True)]

    def window(self, number: int, length: int) -> list[Draw] | None:
        """The draws of one window, in a random order."""
        before, after = self.counts(number * length), self.counts((number + 1) * length)
        draws = [
            self._draw(source, count)
            for source, (start, stop) in enumerate(zip(before, after, strict=True))
            for count in range(start, stop)
        ]
        generator(self._seed, number, "window").shuffle(draws)
        return draws

    def _draw(self, source: int, count: int) -> Draw:
        visit, place = divmod(count, self._sizes[source])
        return Draw(source, self._permutation(source, visit)(place), visit)


class OnePassOrder:
    """Every sample of every data set once, and no more. Starts at the mixture's rates, so that a beginning of it is a
    fair sample; sets that are used up drop out."""

    def __init__(self, names: Sequence[str], sizes: Sequence[int], rates: Sequence[float], seed: int) -> None:
        moments: list[tuple[float, int, int]] = []
        for source, (name, size, rate) in enumerate(zip(names, sizes, rates, strict=True)):
            if rate:
                permutation = Permutation(size, seed, name, 0, "one pass")
                moments.extend(((place + 0.5) / rate, source, permutation(place)) for place in range(size))
        self._draws = [Draw(source, index, 0) for _, source, index in sorted(moments)]

    def window(self, number: int, length: int) -> list[Draw] | None:
        """The draws of one window; None after the last one."""
        return self._draws[number * length : (number + 1) * length] or None
