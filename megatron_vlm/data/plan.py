"""A window of draws -> packed rows, without a pixel. The same on every rank, for any number of ranks and workers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.data.balance import row_cost, sample_work
from megatron_vlm.data.faults import Fault, reason
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.order import Draw, MixtureOrder, OnePassOrder
from megatron_vlm.data.pack import pack
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tree import TokenizedExample, TreeSettings, Written, nothing, with_ids, write

#: A row's number in the run's order is window * ROWS_PER_WINDOW + its place in the window.
ROWS_PER_WINDOW = 1 << 24
#: Samples whose texts are encoded at once: enough for all cores, few enough for the memory that the library takes.
TOGETHER = 256


@dataclass(frozen=True)
class Facts:
    """What every rank has to know of a sample, whoever trains on it."""

    key: str
    """data set/key, as the ledger writes it."""
    source: int
    """Index of the data set in the mixture."""
    tokens: int
    crops: int
    placeholders: int
    weight: float
    """Sum of its loss weights."""
    cut_tokens: int
    """This and the next two: see TokenizedExample."""
    dropped_branches: int
    dropped_images: int
    fault: Fault | None
    """Why it could not be planned."""


@dataclass(frozen=True)
class Sample:
    """A sample that has its place in a row."""

    key: str
    """data set/key, as the ledger writes it."""
    source: int
    """Index of the data set in the mixture."""
    media: tuple[str, ...]
    """Keys of its images or its video."""
    content: TokenizedExample
    fault: Fault | None = None
    """Why it could not be planned. It has no tokens then: a hole that counts as a sample of its row."""

    @property
    def facts(self) -> Facts:
        content = self.content
        placeholders = sum(layout.placeholders for layout in content.layouts)
        lost = content.cut_tokens, content.dropped_branches, content.dropped_images
        weight = float(content.loss_weights.sum())
        return Facts(self.key, self.source, len(content.tokens), content.crops, placeholders, weight, *lost, self.fault)


@dataclass(frozen=True)
class Row:
    """One packed row."""

    number: int
    """Its number in the run's order."""
    samples: tuple[Sample, ...]
    """() = a row of padding, at the end of a single pass."""
    cost: int
    """Operations of its forward pass."""

    @property
    def facts(self) -> tuple[Facts, ...]:
        return tuple(sample.facts for sample in self.samples)

    def unpack(self) -> Row:
        """Itself: see stored.StoredRow."""
        return self

    @property
    def tokens(self) -> int:
        return sum(len(sample.content.tokens) for sample in self.samples)

    @property
    def crops(self) -> int:
        return sum(sample.content.crops for sample in self.samples)


@dataclass(frozen=True)
class Planner:
    """Expands windows. `sources` are the mixture's data sets, `flat_weights` their flat loss weights or None,
    `high_resolution` their shares of visits with more crops (() = none)."""

    shards: Shards
    split: str
    sources: tuple[str, ...]
    flat_weights: tuple[float | None, ...]
    order: MixtureOrder | OnePassOrder
    settings: TreeSettings
    arch: Architecture
    length: int
    """Draws of a window."""
    high_resolution: tuple[float, ...] = ()
    skips: bool = False
    """Whether a sample that cannot be planned leaves a hole."""

    def plan(self, window: int) -> list[Row] | None:
        """The rows of a window in a random order; None after the last window of a single pass.

        Raises ValueError, naming the sample, for one that cannot be planned, without `skips`.
        """
        draws = self.order.window(window, self.length)
        if draws is None:
            return None
        groups = [draws[start : start + TOGETHER] for start in range(0, len(draws), TOGETHER)]
        samples = [sample for group in groups for sample in self._samples(group)]
        sizes = [len(sample.content.tokens) for sample in samples], [sample.content.crops for sample in samples]
        rows = pack(*sizes, self.settings.max_tokens, self.settings.max_crops)
        if len(rows) > ROWS_PER_WINDOW:
            raise ValueError(f"window {window} has {len(rows)} rows, at most {ROWS_PER_WINDOW} can be numbered: "
                             "lower data.window.")  # fmt: skip
        generator(self.settings.seed, window, "rows").shuffle(rows)
        return [
            self._row(window * ROWS_PER_WINDOW + place, tuple(samples[i] for i in row))
            for place, row in enumerate(rows)
        ]

    def _samples(self, draws: Sequence[Draw]) -> list[Sample]:
        """Some samples, their texts encoded together."""
        try:
            written = [self._written(draw) for draw in draws]
            ids = iter(self.settings.tokenizer.encode_all([text for one in written for text in one.texts]))
            return [self._complete(draw, one, ids) for draw, one in zip(draws, written, strict=True)]
        except Exception:  # a stranger's record may be anything; alone, each sample says what is wrong with it
            return [self._sample(draw) for draw in draws]

    def _sample(self, draw: Draw) -> Sample:
        try:
            written = self._written(draw)
            return self._complete(draw, written, map(self.settings.tokenizer.encode, written.texts))
        except Exception as error:
            source = self.sources[draw.source]
            key = f"{source}/{self.shards.key(source, self.split, draw.place)}"
            fault = Fault(key, f"samples/{source}.{self.split}.arrow", f"sample {draw.place}", reason(error))
            if self.skips:
                return Sample(key, draw.source, (), nothing(), fault)
            raise fault.error from error

    def _written(self, draw: Draw) -> Written:
        source = self.sources[draw.source]
        example = self.shards.example(source, self.split, draw.place)
        fine = self.high_resolution[draw.source] if self.high_resolution else 0.0
        return write(example, source, draw.visit, self.settings, fine)

    def _complete(self, draw: Draw, written: Written, ids: Iterable[list[int]]) -> Sample:
        content = with_ids(written, ids, self.settings, self.flat_weights[draw.source])
        return Sample(written.name, draw.source, written.media, content)

    def _row(self, number: int, samples: tuple[Sample, ...]) -> Row:
        work = [sample_work(sample.content, self.settings.geometry) for sample in samples]
        return Row(number, samples, row_cost(self.arch, self.settings.max_tokens, work))


def padding_row(number: int) -> Row:
    """A row without a sample."""
    return Row(number, (), 0)
