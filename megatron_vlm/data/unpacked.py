"""The same steps with each sample in a row of its own: to check that packing does not change the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_vlm.data.loader import Loader, Planned, Step
from megatron_vlm.data.plan import Row, padding_row


class UnpackedLoader(Loader):
    """A Loader whose steps hold the samples of the packed ones, each in a row of its own; hashes are the packed ones'.

    A step's rows are made up with rows of padding to a multiple of `multiple` micro-batches on each rank.
    """

    multiple = 1

    def _step(self, rows: Sequence[Planned], start: tuple[int, int], following: tuple[int, int]) -> Step:
        packed = super()._step(rows, start, following)
        single = [Row(row.number, (sample,), row.cost) for row in rows for sample in row.unpack().samples]
        parts = self._share.data_ranks * self._config.train.micro_batch * self.multiple
        single += [padding_row(rows[-1].number) for _ in range(-len(single) % parts)]
        unpacked = super()._step(single, start, following)
        return replace(packed, planned=unpacked.planned, tokens=unpacked.tokens)
