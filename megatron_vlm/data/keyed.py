"""Random choices as pure functions of what they are about: no generator, no history, the same on every machine."""

from __future__ import annotations

import hashlib
import random
import struct


def key(*parts: object) -> int:
    """A 64-bit number from the parts (compared by their `str`)."""
    text = "\x1f".join(map(str, parts))
    return struct.unpack("<Q", hashlib.blake2b(text.encode(), digest_size=8).digest())[0]


def generator(*parts: object) -> random.Random:
    """A random generator for one purpose: name the seed, the data set, the sample, the visit and the purpose."""
    return random.Random(key(*parts))


class Permutation:
    """A keyed permutation of range(size) that is computed place by place: no table, however large the set.

    Four Feistel rounds over the next even power of two, walked until the result falls inside.
    """

    def __init__(self, size: int, *parts: object) -> None:
        if size < 1:
            raise ValueError(f"a permutation of {size} things does not exist.")
        self.size = size
        self._half = max(1, (size - 1).bit_length() + 1 >> 1)
        self._mask = (1 << self._half) - 1
        self._keys = [key(*parts, round_) | 1 for round_ in range(4)]

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        if not 0 <= index < self.size:
            raise ValueError(f"place {index} is outside a permutation of {self.size}.")
        while True:
            index = self._rounds(index)
            if index < self.size:
                return index

    def _rounds(self, index: int) -> int:
        left, right = index >> self._half, index & self._mask
        for number in self._keys:
            mixed = (right + number) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 29) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ (mixed >> 32) & self._mask
        return left << self._half | right
