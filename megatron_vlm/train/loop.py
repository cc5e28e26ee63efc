"""The training loop: fetch, step, log, evaluate, save. A step stands in `step.py`, what is kept in `state.py`."""

from __future__ import annotations

import errno
import json
import time
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vlm.checkpoint.agree import together
from megatron_vlm.checkpoint.directory import room
from megatron_vlm.checkpoint.saver import Saver
from megatron_vlm.config.schema import Config
from megatron_vlm.data.faults import Fault
from megatron_vlm.data.loader import Step
from megatron_vlm.model import attention_kernels, kernels
from megatron_vlm.parallel import process
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.train import (
    directory,
    ending,
    faults,
    heldout,
    metrics,
    recovery,
    reporter,
    resume,
    scoring,
    shadow,
    stragglers,
)
from megatron_vlm.train import state as states
from megatron_vlm.train.ending import Ending, Watch
from megatron_vlm.train.guard import Guard
from megatron_vlm.train.lock import Lock
from megatron_vlm.train.pulse import Pulse
from megatron_vlm.train.reporter import Reporter
from megatron_vlm.train.state import Progress
from megatron_vlm.train.step import Outcome, Stepper
from megatron_vlm.train.trace import traced
from megatron_vlm.train.watchdog import Watchdog


def train(config: Config, layout: Layout) -> Ending:
    """Train to `train.steps`, or until something asks for an earlier end. Process groups exist; every rank calls it.

    Raises ValueError where a checkpoint, the data or the tokenizer do not fit the settings, or another process uses
    the run directory; FloatingPointError where loss or gradients are not finite. Leaves exit.json in the run directory.
    """
    reporter.check(config)
    folder, first = directory.path(config), dist.get_rank() == 0
    progress = Progress(Guard(config.guard))
    with ExitStack() as stack:
        watch = stack.enter_context(Watch(config.run, folder))
        with together("taking the run directory"):
            if first:
                stack.enter_context(Lock(folder))
                (folder / ending.FILE).unlink(missing_ok=True)
        try:
            with ExitStack() as watched:
                reason = _loop(Run(config, layout, progress, watch, watched))
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                error.add_note(room(folder, 0))
            if first and (folder / "config.yaml").exists():
                _tell(folder, error, progress.step)
            raise
        done = Ending("requeue" if reason else "finished", reason or "all steps done", progress.step)
        if first:
            (folder / ending.STOP_FILE).unlink(missing_ok=True)
            done.write(folder)
    return done


def _tell(folder: Path, failure: BaseException, step: int) -> None:
    """Leave exit.json of a run that failed."""
    words = " ".join([f"{type(failure).__name__}: {failure}", *getattr(failure, "__notes__", ())])
    try:
        Ending("failed", words, step).write(folder)
    except OSError as error:  # a full disk: there is still the error on stderr
        failure.add_note(f"{folder / ending.FILE} could not be written: {error}")


def _loop(run: Run) -> str:
    """The steps; gives why they ended early, or nothing."""
    config, progress, last = run.config, run.state.progress, run.config.train.steps
    while not (reason := run.agreed()) and progress.step < last:
        turn = run.fetch()
        outcome = run.step(turn)
        if outcome.event and run.goes_back(turn, outcome):
            continue
        progress.count(turn.fetched, outcome)
        step = progress.step
        scores, unread = run.evaluate() if _due(step, config.eval.every) else ({}, ())
        run.log(turn, outcome, scores, unread)
        if _due(step, config.log.norms_every) and outcome.norms:
            run.log_norms(outcome)
        if _due(step, config.fp8.shadow_every):
            run.log_shadow(turn)
        if _due(step, config.log.every):
            run.log_stragglers()
        if _due(step, config.checkpoint.every) or step == last:
            run.save(wait=step == last)
    return run.end(reason)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@dataclass
class Turn:
    """One time around the loop."""

    step: int
    began: float
    """On the clock of time.perf_counter; so the next two."""
    data: dict[str, Any]
    """The loader's state before its rows."""
    fetched: Step
    waited_s: float
    """For `fetched`."""
    took_s: float = 0.0
    """From `began` to the end of the step."""


class Run:
    """What the loop does to the state of a run. Every method is collective."""

    def __init__(self, config: Config, layout: Layout, progress: Progress, watch: Watch, watched: ExitStack) -> None:
        """`watched`: takes up the watchdog."""
        self.config, self.layout, self._watch = config, layout, watch
        self.state, start = states.begin(config, layout, progress)
        self._share, self._folder = states.share(layout), directory.path(config)
        loader, self._pulse = self.state.loader, Pulse()
        self._stepper = Stepper(self.state.models, self.state.optimizer, config, loader.sources, self._pulse)
        with together("preparing the run directory"):
            self._reporter = None if dist.get_rank() else _reporter(config, layout, start)
        self._saver = Saver(directory.checkpoints(config), config)
        self._saved, self._save_wait_s = start.step, 0.0
        self._watchdog(watched)
        watched.push(self._fail)
        self._batches = iter(loader)

    def _watchdog(self, watched: ExitStack) -> None:
        """From here on a rank that hangs ends the run."""
        with together("clearing old heartbeats"):
            if dist.get_rank() == 0:
                Watchdog.clear(self._folder)
        self._pulse.keys = lambda: self.state.loader.keys
        self._pulse.enter("other")
        watched.enter_context(Watchdog(self._folder, self.config.guard.hang_s, self._pulse))

    def _fail(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        """Leave no half-written checkpoint behind."""
        if error is not None:
            self._pulse.enter("save")
            self._saver.abandon(error)

    def agreed(self) -> str:
        """The reason to end now, the same on every rank; empty = go on."""
        with self._pulse.during("collective"):
            return self._watch.agreed(self._saver.failed)

    def fetch(self) -> Turn:
        """The rows of the next step, as every rank trains on them."""
        began, before = time.perf_counter(), self.state.loader.state_dict()
        step = self._pulse.step = self.state.progress.step + 1
        with self._pulse.during("data"):
            fetched = next(self._batches)
        waited_s = time.perf_counter() - began
        fetched = faults.settle(fetched, self.config.data.bad_samples)
        faults.check(self.config, self.state.progress.counters, fetched)
        return Turn(step, began, before, fetched, waited_s)

    def step(self, turn: Turn) -> Outcome:
        """Forward, backward and update, if no guard is against it."""
        with traced(self._folder, turn.step, self.config.log.profile):
            outcome = self._stepper.train(turn.fetched.micro_batches, turn.step, self.state.progress.guard.judge)
        turn.took_s = time.perf_counter() - turn.began
        return outcome

    def goes_back(self, turn: Turn, outcome: Outcome) -> bool:
        """A guard has fired: keep the evidence; whether the run has gone back to an earlier step."""
        recovery.keep(self.config, self.layout, self._stepper, turn.fetched, outcome, turn.data, self._reporter)
        self._saver.finish()
        back = recovery.goes_back(self.config, outcome, self.state, self._reporter)
        if back:
            self._saved = self.state.progress.step
        return back

    def evaluate(self) -> tuple[dict[str, float], tuple[Fault, ...]]:
        """Loss on held-out rows and scores of tasks, and what of the rows could not be loaded."""
        scores, unread = heldout.evaluate(self.config, self._stepper, self._share)
        if self.config.eval.tasks:
            scores |= scoring.evaluate(self.config, self.state.models, self._share, self._pulse)
        return scores, unread

    def log(self, turn: Turn, outcome: Outcome, scores: dict[str, float], unread: tuple[Fault, ...]) -> None:
        """The step's lines."""
        record = metrics.record(turn.step, turn.fetched, outcome) | self.state.progress.counters
        record |= metrics.speed(self.config, outcome, turn.took_s, turn.waited_s)
        record |= {"save_wait_s": self._save_wait_s} | scores
        ledger = metrics.ledger(turn.fetched)
        ledger |= {"eval_skipped": [faults.entry(fault) for fault in unread]} if unread else {}
        self._save_wait_s = 0.0
        if self._reporter:
            for fault in (*turn.fetched.skipped, *unread):
                self._reporter.say(f"step {turn.step}  skipped {fault}")
            self._reporter.step(record, ledger)

    def log_norms(self, outcome: Outcome) -> None:
        """Gradient and weight norm of each module."""
        norms = self._stepper.module_norms(outcome)
        if self._reporter:
            self._reporter.norms(self.state.progress.step, norms)

    def log_shadow(self, turn: Turn) -> None:
        """How far each decoder layer in FP8 is from bf16."""
        errors = shadow.errors(self._stepper, turn.fetched.micro_batches)
        if self._reporter:
            self._reporter.shadow(self.state.progress.step, errors)

    def log_stragglers(self) -> None:
        """Where the time went on each rank since the last call."""
        ranks = stragglers.gather(self._pulse)
        if self._reporter:
            self._reporter.stragglers(self.state.progress.step, ranks)

    def save(self, *, wait: bool) -> None:
        """A checkpoint of the state, in the background unless `wait`."""
        began, state = time.monotonic(), self.state
        with self._pulse.during("save"):
            self._saver.save(
                models=state.models,
                optimizer=state.optimizer,
                step=state.progress.step,
                state=state.document(),
                wait=wait,
            )
        self._watch.saved(self._saver.took_s)
        state.progress.guard.rollbacks = 0
        self._saved, self._save_wait_s = state.progress.step, time.monotonic() - began

    def end(self, reason: str) -> str:
        """Save what is not saved yet, and say how it ended; gives the reason where that is before the last step."""
        step = self.state.progress.step
        self._pulse.enter("save")
        self._saver.finish()
        if reason and step > self._saved:
            self.save(wait=True)
        self._pulse.enter("other")
        early = reason if step < self.config.train.steps else ""
        peaks = process.peak_memory()
        if self._reporter:
            self._reporter.say(f"Peak memory by rank: {', '.join(f'{peak / 1e9:.2f}' for peak in peaks)} GB.")
            stopped = f"Stopped after step {step} ({reason}); the same command goes on from there."
            ended = stopped if early else f"Finished at step {step}."
            self._reporter.say(f"{ended} Checkpoint, metrics and logs: {self._folder}")
            self._reporter.close()
        self.state.loader.close()
        return early


def _reporter(config: Config, layout: Layout, start: resume.Start) -> Reporter:
    """The run directory made ready, its first line said. For rank 0."""
    facts = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "start_step": start.step,
        "layout": {name: getattr(layout, name) for name in ("world", "tensor", "context", "pipeline", "data")},
        "device": process.device_name(),
    }
    made = Reporter(directory.prepare(config, start.step, facts), config, start.step)
    made.say(start.words)
    for line in (*kernels.choose(config).reasons, *attention_kernels.of(config).why):
        made.say(line)
    made.say(f"{layout.world} process(es) on {facts['device']}: {json.dumps(facts['layout'])}")
    return made
