"""The stream of training steps for one rank: plan, deal, decode ahead. Knows ranks as numbers, not as groups.

Rows form one endless stream, window after window, and a step takes the next of them: `train.global_batch`, or what
config/rampup.py says. So nothing is carried from window to window, nothing is dropped between them, and (window, row,
steps taken) is all the state there is.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.batch import Batch
from megatron_vlm.config import rampup
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.schema import Config
from megatron_vlm.data import identity, manifest
from megatron_vlm.data import mixture as mixtures
from megatron_vlm.data.balance import deal
from megatron_vlm.data.batches import arrange, parts
from megatron_vlm.data.collate import Collator, MicroBatch, silenced
from megatron_vlm.data.faults import Fault
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.mixture import Mixture
from megatron_vlm.data.order import MixtureOrder, OnePassOrder
from megatron_vlm.data.plan import Planner, Row, Sample, padding_row
from megatron_vlm.data.plan_cache import PlanCache
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.stored import StoredRow
from megatron_vlm.data.tokens import Tokenizer
from megatron_vlm.data.tree import TreeSettings
from megatron_vlm.data.workers import Made, Workers

#: A row of a planned window: in memory, or still in the file that ranks share.
Planned = Row | StoredRow
#: Steps that are made ahead of the one in use.
STEPS_AHEAD = 2


@dataclass(frozen=True)
class Share:
    """Which part of each step a rank takes."""

    data_rank: int = 0
    """Place among the data-parallel ranks: which rows."""
    data_ranks: int = 1
    crop_rank: int = 0
    """Which part of the micro-batch's crops: Layout.crop_rank."""
    crop_ranks: int = 1
    rank: int = 0
    """Place among all ranks of the run: which windows it plans for all."""
    ranks: int = 1
    crops: bool = True
    """This rank encodes crops (first pipeline stage). False = it never reads a pixel."""


@dataclass(frozen=True)
class Step:
    """What one rank needs for one optimizer step. Counts are of the whole global batch unless they say otherwise."""

    micro_batches: tuple[Batch, ...]
    """This rank's; () until they are made."""
    planned: tuple[MicroBatch, ...]
    """What they are made of."""
    window: int
    """Window and place in it of the step's first row."""
    offset: int
    next_window: int
    """The same of the following step: the state to resume from after this one."""
    next_offset: int
    rows: tuple[int, ...]
    """Numbers of the rows, in the run's order."""
    keys: tuple[str, ...]
    """`data set/key` of every sample, row by row: the same on every layout."""
    keys_hash: str
    """sha256 of the keys, one a line, and of the bounds of the rows."""
    weights: tuple[float, ...]
    """Sum of the loss weights of every sample as planned, in the order of `keys`."""
    tokens: int
    """Places in the rows, padding counted."""
    useful_tokens: int
    """Places that hold a sample."""
    image_tokens: int
    """Image placeholders."""
    crops: int
    samples: int
    cut_tokens: int
    """Tokens that rows have no place for, and what else of samples was left out (see TokenizedExample)."""
    dropped_branches: int
    dropped_images: int
    cut: tuple[str, ...]
    """`data set/key` of the samples that these belong to."""
    skipped: tuple[Fault, ...] = ()
    """Samples that could not be loaded and are passed over, as they stand in `keys`: all that could not be planned, and
    those whose media this rank failed to read. Ranks that share the step must exchange them (train/faults.py)."""

    @property
    def samples_here(self) -> list[Sample]:
        """Those of this rank's rows."""
        return [sample for micro_batch in self.planned for row in micro_batch.rows for sample in row.samples]

    @property
    def loss_weight(self) -> float:
        """Sum of the loss weights of this data rank's rows."""
        silent = {fault.sample for fault in self.skipped}
        return sum(one.facts.weight for one in self.samples_here if one.key not in silent)

    @property
    def global_loss_weight(self) -> float:
        """The same of all rows: equals what step.py counts in the batches, and divides the loss by."""
        silent = {fault.sample for fault in self.skipped}
        return sum(weight for key, weight in zip(self.keys, self.weights, strict=True) if key not in silent)

    def without(self, faults: Iterable[Fault]) -> Step:
        """The step with these samples silenced too. Nothing else changes: not a place, not a shape."""
        # The same fault on every layout, where several of a sample's files fail.
        known = {fault.sample: fault for fault in sorted({*faults, *self.skipped}, reverse=True)}
        if not known:
            return self
        batches = zip(self.micro_batches, self.planned, strict=True)
        return replace(
            self,
            micro_batches=tuple(silenced(batch, micro_batch, known) for batch, micro_batch in batches),
            skipped=tuple(known[key] for key in self.keys if key in known),
        )


class Loader:
    """Iterates over Steps from `state` on (None = from the start); endless but for `one_pass`.

    one_pass: every sample of the split once, beginning at the mixture's rates; the last step is filled up with rows of
              padding. For evaluation.
    sources:  names of the mixture's data sets; Batch.sources indexes them.
    Raises ValueError where data, tokenizer, mixture or settings do not fit, or are not those of `state`.
    """

    def __init__(
        self,
        config: Config,
        arch: Architecture,
        share: Share,
        *,
        split: str | None = None,
        state: dict[str, Any] | None = None,
        one_pass: bool = False,
    ) -> None:
        data, split = config.data, split or config.data.split
        self._config, self._share, self._one_pass = config, share, one_pass
        _check_shares(config, share)
        shards = Shards(manifest.directory(data.manifest))
        mixture = mixtures.load(data.mixture)
        tokenizer = Tokenizer.load(data.tokenizer, arch.language)
        self.sources = tuple(member.name for member in mixture.members)
        sizes = [shards.count(name, split) for name in self.sources]
        try:
            rates = mixture.rates(dict(zip(self.sources, sizes, strict=True)).__getitem__)
        except ValueError as error:
            raise ValueError(f"{shards.directory}, split {split!r}: {error}") from error
        if not one_pass:
            _check_sources(self.sources, sizes, split, shards)
        order = (OnePassOrder if one_pass else MixtureOrder)(self.sources, sizes, rates, data.seed)
        settings = TreeSettings.of(data, tokenizer, arch)
        skips = data.bad_samples == "skip"
        self._planner = Planner(
            shards,
            split,
            self.sources,
            flat_weights=tuple(member.weight for member in mixture.members),
            order=order,
            settings=settings,
            arch=arch,
            length=data.window,
            high_resolution=tuple(member.high_resolution for member in mixture.members),
            skips=skips,
        )
        self._rates, self._groups = rates, mixture.group_numbers
        _check_high_resolution(config, mixture)
        self._identity = identity.of(config, shards, mixture, tokenizer, settings.geometry, split, one_pass)
        self._balances = "balance" in self._identity
        self._position, self._steps = (0, 0), 0
        self.accepted: dict[str, str] = {}
        """What differs from `state` and is accepted (run.accept): `was X and is now Y` by name."""
        if state is not None:
            self.accepted = identity.check(state.get("of", {}), self._identity, config.run.accept)
            # Rows of another order are not those that the offset counts.
            self._position = (state["window"] + 1, 0) if self.accepted else (state["window"], state["offset"])
            self._steps = state.get("steps", 0)
        self._workers = Workers(Collator(shards, settings.geometry, data.sequence_length, skips), data.workers)
        self._plans = ThreadPoolExecutor(1, thread_name_prefix="plan")
        self._cache: PlanCache | None = None
        if data.plan_cache and share.ranks > 1 and not one_pass:
            own = data.plan_cache == "run"
            folder = config.run.path / "plans" if own else Path(data.plan_cache)
            plan_of = {**self._identity, "arch": repr(arch), "skips": skips}
            self._cache = PlanCache(self._planner, folder, plan_of, rank=share.rank, ranks=share.ranks, own=own)
        self.keys: tuple[str, ...] = ()
        """`data set/key` of this rank's samples in the step handed out last, or waited for."""

    def __iter__(self) -> Iterator[Step]:
        """Steps from the loader's position on; the position moves with each step that is handed out."""
        ahead: deque[tuple[Step, list[Future[Made]]]] = deque()
        for step in self._planned_steps(*self._position):
            ahead.append((step, self._begun(step)))
            if len(ahead) > STEPS_AHEAD:
                yield self._finished(*ahead.popleft())
        while ahead:
            yield self._finished(*ahead.popleft())

    def row(self, window: int, place: int) -> Step:
        """One row as a step of its own, by its window and its place in it as the ledger counts: in the order in which
        steps take them. Beyond the window's end those of the next one follow. For micro-batches of one row.

        Where rows are balanced between steps, that order follows from the number of rows in all windows before: they
        are planned too.
        """
        for number, rows in self._windows(0 if self._balances else window, 1, 0):
            if number >= window:
                if place < len(rows):
                    step = self._step([rows[place]], (number, place), (number, place + 1))
                    return self._finished(step, self._begun(step))
                place -= len(rows)
        raise ValueError(f"the stream ends before window {window}, row {place}.")

    def state_dict(self) -> dict[str, Any]:
        """Where the stream goes on after the last step handed out, and what it is a stream of. JSON values."""
        return {
            "window": self._position[0],
            "offset": self._position[1],
            "steps": self._steps,
            "of": dict(self._identity),
        }

    def close(self) -> None:
        """End worker processes and threads."""
        self._workers.close()
        if self._cache:
            self._cache.close()
        self._plans.shutdown(wait=False, cancel_futures=True)

    def _begun(self, step: Step) -> list[Future[Made]]:
        return [self._workers.submit(micro_batch) for micro_batch in step.planned]

    def _finished(self, step: Step, futures: list[Future[Made]]) -> Step:
        self.keys = tuple(sample.key for sample in step.samples_here)
        made = [_result(planned, future) for planned, future in zip(step.planned, futures, strict=True)]
        step = replace(step, micro_batches=tuple(batch for batch, _ in made))
        self._position = (step.next_window, step.next_offset)
        self._steps += 1
        return step.without(fault for _, faults in made for fault in faults)

    def _planned_steps(self, window: int, offset: int) -> Iterator[Step]:
        """Each step as it is known without pixels."""
        rows: list[Planned] = []
        start, step = (window, offset), self._steps + 1
        for number, planned in self._windows(window, *self._entry(offset, step)):
            skip = offset if number == window else 0
            for place in range(skip, len(planned)):
                rows.append(planned[place])
                if len(rows) == self._rows_of(step):
                    following = (number, place + 1)
                    yield self._step(rows, start, following)
                    rows, start, step = [], following, step + 1
        if rows:
            last = rows[-1].number
            padding = [padding_row(last + 1 + extra) for extra in range(self._config.train.global_batch - len(rows))]
            yield self._step([*rows, *padding], start, (number + 1, 0))

    def _rows_of(self, step: int) -> int:
        return self._config.train.global_batch if self._one_pass else rampup.rows(self._config.train, max(1, step))

    def _entry(self, offset: int, step: int) -> tuple[int, int]:
        """Which step has a window's first row, and how many rows earlier windows gave it, if `step` begins at row
        `offset` of the window."""
        while offset > 0:
            step -= 1
            offset -= self._rows_of(step)
        return step, -offset

    def _windows(self, window: int, step: int, before: int) -> Iterator[tuple[int, list[Planned]]]:
        """Windows from `window` on, in the order in which steps take their rows; the next one is made while one is in
        use. The first row belongs to `step`, which has `before` rows of earlier windows."""
        future = self._plans.submit(self._window, window, step, before)
        while (made := future.result()) is not None:
            rows, step, before = made
            future = self._plans.submit(self._window, window + 1, step, before)
            yield window, rows
            window += 1

    def _window(self, window: int, step: int, before: int) -> tuple[list[Planned], int, int] | None:
        """A window's rows, and to which step the next window's first row belongs, with how many rows before it."""
        plan = self._cache.window if self._cache else self._planner.plan
        planned = plan(window)
        if planned is None:
            return None
        rows = list(planned)
        sizes = parts(len(rows), step, before, self._rows_of)
        if self._balances:
            samples = np.zeros((len(rows), len(self.sources)), dtype=np.int64)
            for place, row in enumerate(rows):
                np.add.at(samples[place], [one.source for one in row.facts], 1)
            rng = generator(self._config.data.seed, window, "batches")
            span, costs = self._config.data.balance_batches, [row.cost for row in rows]
            rows = [rows[i] for i in arrange(costs, samples, self._rates, self._groups, sizes, span, rng)]
        last, held = step + len(sizes) - 1, sizes[-1] + (before if len(sizes) == 1 else 0)
        return (rows, last + 1, 0) if held == self._rows_of(last) else (rows, last, held)

    def _step(self, rows: Sequence[Planned], start: tuple[int, int], following: tuple[int, int]) -> Step:
        """The step of these rows, its micro-batches not made yet.

        start, following: (window, place) of its first row, and of the next step's.
        """
        share, per_batch = self._share, self._config.train.micro_batch
        per_rank = len(rows) // (share.data_ranks * per_batch)
        dealt = deal([row.cost for row in rows], share.data_ranks, per_rank)[share.data_rank]
        by_row = [row.facts for row in rows]
        samples = [one for facts in by_row for one in facts]
        lines = ["\n".join(one.key for one in facts) for facts in by_row]
        return Step(
            micro_batches=(),
            planned=tuple(
                MicroBatch(tuple(rows[i].unpack() for i in batch), share.crop_rank, share.crop_ranks, share.crops)
                for batch in dealt
            ),
            window=start[0],
            offset=start[1],
            next_window=following[0],
            next_offset=following[1],
            rows=tuple(row.number for row in rows),
            keys=tuple(one.key for one in samples),
            keys_hash=hashlib.sha256("\n\n".join(lines).encode()).hexdigest(),
            weights=tuple(one.weight for one in samples),
            tokens=len(rows) * self._config.data.sequence_length,
            useful_tokens=sum(one.tokens for one in samples),
            image_tokens=sum(one.placeholders for one in samples),
            crops=sum(one.crops for one in samples),
            samples=len(samples),
            cut_tokens=sum(one.cut_tokens for one in samples),
            dropped_branches=sum(one.dropped_branches for one in samples),
            dropped_images=sum(one.dropped_images for one in samples),
            cut=tuple(one.key for one in samples if one.cut_tokens or one.dropped_branches or one.dropped_images),
            skipped=tuple(one.fault for one in samples if one.fault),
        )


def _result(planned: MicroBatch, future: Future[Made]) -> Made:
    try:
        return future.result()
    except BrokenProcessPool as error:
        rows = ", ".join(str(row.number) for row in planned.rows)
        raise ValueError(
            f"a decoding process ended while it made rows {rows} or the next ones. It was killed (out of memory, or by "
            "a fault of a decoder), or it could not start: then its own error stands above. Lower data.workers; "
            "data.workers=0 decodes in this process."
        ) from error


def _check_shares(config: Config, share: Share) -> None:
    rows, per_batch = config.train.global_batch, config.train.micro_batch
    if rows % (share.data_ranks * per_batch):
        raise ValueError(
            f"train.global_batch={rows} does not divide by {share.data_ranks} data-parallel ranks x "
            f"train.micro_batch={per_batch}."
        )


def _check_high_resolution(config: Config, mixture: Mixture) -> None:
    data = config.data
    if any(member.high_resolution for member in mixture.members) and data.max_crops < 1 + data.high_resolution_crops:
        raise ValueError(
            f"data.max_crops={data.max_crops} is less than an image of data.high_resolution_crops="
            f"{data.high_resolution_crops} can have, and data.mixture={data.mixture} draws such images."
        )


def _check_sources(sources: tuple[str, ...], sizes: list[int], split: str, shards: Shards) -> None:
    empty = [name for name, size in zip(sources, sizes, strict=True) if not size]
    if empty:
        raise ValueError(
            f"{shards.directory} has no sample of {', '.join(empty)} in split {split!r}, but the mixture draws from "
            "it. Correct data.mixture or data.split."
        )
