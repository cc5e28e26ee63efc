"""Planned rows -> Batch: the only place that reads media. b rows of s tokens, as in Batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_vlm.batch import PAD, Batch
from megatron_vlm.config.geometry import ImageGeometry, Layout
from megatron_vlm.data.crops import row_windows
from megatron_vlm.data.faults import Fault, reason
from megatron_vlm.data.media import read_crops
from megatron_vlm.data.plan import Row
from megatron_vlm.data.shards import Shards
from megatron_vlm.parallel.split import even_counts

#: Like `map`, to run the decoding of several images and videos side by side.
Map = Callable[[Callable[["_Piece"], "np.ndarray | Fault"], Iterable["_Piece"]], Iterator["np.ndarray | Fault"]]


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch to be made: its rows, and which of its crops this rank encodes."""

    rows: tuple[Row, ...]
    crop_rank: int
    crop_ranks: int
    read_crops: bool
    """False on pipeline stages without the vision tower: no pixel is read, crops are (0, p, d)."""


@dataclass(frozen=True)
class _Piece:
    """Some consecutive crops of one image, or frames of one video."""

    media: str
    sample: str
    layout: Layout
    start: int
    stop: int


@dataclass(frozen=True)
class Collator:
    """Makes batches. Sent whole to worker processes."""

    shards: Shards
    geometry: ImageGeometry
    sequence_length: int
    skips: bool = False
    """Whether `attempt` goes on where an image or video cannot be read."""

    def __call__(self, micro_batch: MicroBatch, map_: Map = map) -> Batch:
        """The batch of these rows.

        Raises ValueError, naming sample, file and offset, for an image or video that cannot be read or is not as the
        sample says.
        """
        assert not self.skips, "attempt tells of what was passed over"
        return self.attempt(micro_batch, map_)[0]

    def attempt(self, micro_batch: MicroBatch, map_: Map = map) -> tuple[Batch, tuple[Fault, ...]]:
        """The batch, and what of this rank's share of it could not be read: crops are black there, nothing else is
        changed yet. Without `skips` the first such image or video raises."""
        rows = micro_batch.rows
        counts = even_counts(sum(row.crops for row in rows), micro_batch.crop_ranks)
        crops, faults = self._crops(micro_batch, counts, map_)
        batch = Batch(
            **self._text(rows),
            crops=torch.from_numpy(crops),
            crop_counts=counts,
            windows=torch.from_numpy(row_windows(_layouts(rows), self.geometry)),
            rows=torch.tensor([row.number for row in rows], dtype=torch.int64),
        )
        return batch, faults

    def _text(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        shape = (len(rows), self.sequence_length)
        found: dict[str, np.ndarray] = {
            "tokens": np.zeros(shape, dtype=np.int64),
            "targets": np.zeros(shape, dtype=np.int64),
            "loss_weights": np.zeros(shape, dtype=np.float32),
            "positions": np.full(shape, PAD, dtype=np.int64),
            "examples": np.full(shape, PAD, dtype=np.int32),
            "branches": np.full(shape, PAD, dtype=np.int32),
            "is_vision": np.zeros(shape, dtype=bool),
            "sources": np.full(shape, PAD, dtype=np.int32),
        }
        for place, row in enumerate(rows):
            start = 0
            for number, sample in enumerate(row.samples):
                stop = start + len(sample.content.tokens)
                for name in ("tokens", "targets", "loss_weights", "positions", "branches", "is_vision"):
                    found[name][place, start:stop] = getattr(sample.content, name)
                found["examples"][place, start:stop] = number
                found["sources"][place, start:stop] = sample.source
                start = stop
        return {name: torch.from_numpy(array) for name, array in found.items()}

    def _crops(
        self, micro_batch: MicroBatch, counts: tuple[int, ...], map_: Map
    ) -> tuple[np.ndarray, tuple[Fault, ...]]:
        shape = (self.geometry.patches, 3 * self.geometry.patch_size**2)
        if not micro_batch.read_crops or not counts[micro_batch.crop_rank]:
            return np.empty((0, *shape), dtype=np.uint8), ()
        start = sum(counts[: micro_batch.crop_rank])
        pieces = list(_pieces(micro_batch.rows, start, start + counts[micro_batch.crop_rank]))
        parts, faults = [], []
        for piece, read in zip(pieces, map_(self._read, pieces), strict=True):
            if isinstance(read, Fault):
                faults.append(read)
                read = np.zeros((piece.stop - piece.start, *shape), dtype=np.uint8)
            parts.append(read)
        return parts[0] if len(parts) == 1 else np.concatenate(parts), tuple(faults)

    def _read(self, piece: _Piece) -> np.ndarray | Fault:
        name = f"{piece.media} of sample {piece.sample}"
        try:
            return read_crops(self.shards, piece.media, piece.layout, self.geometry, piece.start, piece.stop, name=name)
        except Exception as error:  # whatever a decoder raises on a stranger's file is this file's fault
            fault = Fault(piece.sample, *self.shards.place(piece.media), reason(error))
            if self.skips:
                return fault
            raise fault.error from error


def silenced(batch: Batch, micro_batch: MicroBatch, samples: Collection[str]) -> Batch:
    """The batch of `micro_batch` with these samples (data set/key) without loss and their crops black.

    They keep their places, so that no other sample moves and no shape changes.
    """
    targets, weights, crops = (tensor.clone() for tensor in (batch.targets, batch.loss_weights, batch.crops))
    first = -sum(batch.crop_counts[: micro_batch.crop_rank])  # of a sample's crops, counted from this rank's first
    for place, row in enumerate(micro_batch.rows):
        for number, sample in enumerate(row.samples):
            after = first + sample.content.crops
            if sample.key in samples:
                mine = batch.examples[place] == number
                targets[place, mine], weights[place, mine] = 0, 0.0
                crops[max(first, 0) : max(after, 0)] = 0
            first = after
    return dataclasses.replace(batch, targets=targets, loss_weights=weights, crops=crops)


def _layouts(rows: Sequence[Row]) -> Iterator[Layout]:
    for row in rows:
        for sample in row.samples:
            yield from sample.content.layouts


def _pieces(rows: Sequence[Row], start: int, stop: int) -> Iterator[_Piece]:
    """The images and videos, or parts of them, that hold crops `start` to `stop` of the micro-batch."""
    first = 0
    for row in rows:
        for sample in row.samples:
            for media, layout in zip(sample.media, sample.content.layouts, strict=True):
                begin, end = max(start - first, 0), min(stop - first, layout.crops)
                if begin < end:
                    yield _Piece(media, sample.key, layout, begin, end)
                first += layout.crops
