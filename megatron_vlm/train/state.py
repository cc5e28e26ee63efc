"""All that a run must have again in order to go on, in one object: what a checkpoint is written from and fills."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data.loader import Loader, Share, Step
from megatron_vlm.model.build import build
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.train import directory, heldout, optim, resume, scoring
from megatron_vlm.train.guard import Guard
from megatron_vlm.train.step import Outcome

#: Counts over the whole run.
COUNTERS = ("skipped_steps", "drawn_samples", "skipped_samples", "spikes", "rollbacks")


@dataclass
class Progress:
    """How far a run is: plain values, beside weights, optimizer and the place in the data."""

    guard: Guard
    step: int = 0
    """Steps done."""
    counters: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTERS, 0))
    """By the names of COUNTERS."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What stands in every checkpoint of the run: `stages`, the checkpoints that it comes from, and `environment`."""

    def restore(self, start: resume.Start) -> None:
        """Go on from where the run starts."""
        self.step = start.step
        self.counters |= start.counters
        self.guard.restore(start.guard)
        # Of rank 0, which writes it.
        here = directory.environment() if dist.get_rank() == 0 else {}
        self.facts = {"stages": start.stages, "environment": here}

    def count(self, fetched: Step, outcome: Outcome) -> None:
        """A step is done."""
        self.step += 1
        self.counters["skipped_steps"] += not outcome.applied
        self.counters["spikes"] += outcome.event is not None
        self.counters["drawn_samples"] += fetched.samples
        self.counters["skipped_samples"] += len(fetched.skipped)


@dataclass
class State:
    """What a checkpoint holds."""

    models: list[DistributedDataParallel]
    """One per virtual pipeline stage."""
    optimizer: MegatronOptimizer
    loader: Loader
    progress: Progress

    def document(self) -> dict[str, Any]:
        """The part of it that is no tensor, as JSON can hold it."""
        progress = self.progress
        data = {"data": self.loader.state_dict(), "counters": progress.counters, "guard": progress.guard.state()}
        return data | progress.facts


def begin(config: Config, layout: Layout, progress: Progress) -> tuple[State, resume.Start]:
    """The state that the run starts with, new or from a checkpoint. Collective.

    Raises ValueError where checkpoint, data or tokenizer do not fit the settings, before anything large is built.
    """
    start = resume.find(config)
    mine = share(layout)
    # Every rank plans some of the windows for all; not those of an evaluation, which are few.
    planning = replace(mine, rank=dist.get_rank(), ranks=layout.world)
    loader = Loader(config, presets.architecture(config.model), planning, state=start.data)
    if config.eval.every:
        heldout.open_loader(config, mine).close()  # what it refuses is refused now
        scoring.open_tasks(config)
    accepted = "".join(f"\nAccepted: {name} {words}." for name, words in loader.accepted.items())
    start = replace(start, words=start.words + accepted)
    models = optim.wrap(build(config, layout), config)
    optimizer = optim.build(models, config)
    resume.restore(start, models, optimizer, config)
    progress.restore(start)
    return State(models, optimizer, loader, progress), start


def share(layout: Layout) -> Share:
    """Which rows and which crops this rank fetches."""
    rank = dist.get_rank()
    at = layout.coordinates(rank)
    return Share(
        data_rank=at.data,
        data_ranks=layout.data,
        crop_rank=layout.crop_rank(rank),
        crop_ranks=layout.crop_ranks,
        crops=at.pipeline == 0,  # only the first stage has a tower
    )
