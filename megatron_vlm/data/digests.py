"""A set of digests with row numbers, at about 10 bytes a row beyond the digests: a dict takes 10 times as much."""

from __future__ import annotations

from array import array


class Digests:
    """Digests of `width` bytes (at least 8), each with the number of its row. An open hash table, probed in line."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._rows = bytearray()
        self._slots = array("i", [-1]) * 16

    def __len__(self) -> int:
        return len(self._rows) // self._width

    def __getitem__(self, row: int) -> bytes:
        return bytes(self._rows[row * self._width : (row + 1) * self._width])

    def find(self, digest: bytes) -> int:
        """Its row; -1 where it is not there."""
        return self._slots[self._slot(digest)]

    def add(self, digest: bytes) -> int:
        """The row of a digest that is not there yet: the next one."""
        row = len(self)
        if 3 * row >= 2 * len(self._slots):
            self._grow()
        self._slots[self._slot(digest)] = row
        self._rows += digest
        return row

    def data(self) -> memoryview:
        """All digests, row by row. None can be added while it is held."""
        return memoryview(self._rows)

    def _slot(self, digest: bytes) -> int:
        """The slot that holds the digest, or the free one for it."""
        slots, rows, width, mask = self._slots, self._rows, self._width, len(self._slots) - 1
        slot = int.from_bytes(digest[:8], "little") & mask
        while (row := slots[slot]) >= 0 and rows[row * width : (row + 1) * width] != digest:
            slot = (slot + 1) & mask
        return slot

    def _grow(self) -> None:
        rows, width = self._rows, self._width
        self._slots = array("i", [-1]) * (2 * len(self._slots))
        slots, mask = self._slots, len(self._slots) - 1
        for row in range(len(self)):
            slot = int.from_bytes(rows[row * width : row * width + 8], "little") & mask
            while slots[slot] >= 0:
                slot = (slot + 1) & mask
            slots[slot] = row
