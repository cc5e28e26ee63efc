"""The training loop: fetch, step, log, evaluate, save. What a step is stands in `step.py`."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import datetime
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm import cost
from megatron_vlm.batch import Batch
from megatron_vlm.checkpoint.agree import together
from megatron_vlm.checkpoint.saver import Saver
from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data.faults import Fault
from megatron_vlm.data.loader import Loader, Share
from megatron_vlm.data.loader import Step as Fetched
from megatron_vlm.model.build import build
from megatron_vlm.parallel import process
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.train import directory, ending, faults, metrics, optim, recovery, resume, stragglers
from megatron_vlm.train.ending import Ending, Watch
from megatron_vlm.train.guard import Guard
from megatron_vlm.train.lock import Lock
from megatron_vlm.train.metrics import Reporter
from megatron_vlm.train.pulse import Pulse
from megatron_vlm.train.recovery import Progress
from megatron_vlm.train.step import Outcome, Stepper
from megatron_vlm.train.trace import traced
from megatron_vlm.train.watchdog import Watchdog


def train(config: Config, layout: Layout) -> Ending:
    """Train to `train.steps`, or until something asks for an earlier end. Process groups exist; every rank calls it.

    Raises ValueError where a checkpoint, the data or the tokenizer do not fit the settings, or another process uses
    the run directory; FloatingPointError where loss or gradients are not finite. Leaves exit.json in the run directory.
    """
    metrics.check(config)
    folder, first = directory.path(config), dist.get_rank() == 0
    counters = {"skipped_steps": 0, "drawn_samples": 0, "skipped_samples": 0, "spikes": 0, "rollbacks": 0}
    progress = Progress(0, counters, Guard(config.guard))
    with ExitStack() as stack:
        watch = stack.enter_context(Watch(config.run, folder))
        with together("taking the run directory"):
            if first:
                stack.enter_context(Lock(folder))
                (folder / ending.FILE).unlink(missing_ok=True)
        try:
            with ExitStack() as watched:
                reason = _train(config, layout, progress, watch, watched)
        except BaseException as error:
            if first and (folder / "config.yaml").exists():
                words = " ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])
                Ending("failed", words, progress.step).write(folder)
            raise
        done = Ending("requeue" if reason else "finished", reason or "all steps done", progress.step)
        if first:
            (folder / ending.STOP_FILE).unlink(missing_ok=True)
            done.write(folder)
    return done


def _train(config: Config, layout: Layout, progress: Progress, watch: Watch, watched: ExitStack) -> str:
    """The loop; gives why it ended early, or nothing. `watched`: takes up the watchdog."""
    start = resume.find(config)
    share = _share(layout)
    loader = Loader(config, presets.architecture(config.model), share, state=start.data)
    if config.eval.every:
        _held_out(config, share).close()  # what it refuses is refused now
    models = optim.wrap(build(config, layout), config)
    optimizer = optim.build(models, config)
    resume.restore(start, models, optimizer, config)
    pulse = Pulse()
    stepper = Stepper(models, optimizer, config, loader.sources, pulse)
    reporter = _reporter(config, layout, start)
    saver = Saver(directory.checkpoints(config), config)
    _watchdog(config, pulse, loader, watched)
    batches = iter(loader)
    progress.step, saved, save_wait_s = start.step, start.step, 0.0
    progress.counters |= start.counters
    progress.guard.restore(start.guard)
    # Of rank 0, which writes it.
    progress.facts = {"stages": start.stages, "environment": directory.environment() if dist.get_rank() == 0 else {}}

    while not (reason := _agreed(watch, saver, pulse)) and progress.step < config.train.steps:
        began = time.perf_counter()
        before = loader.state_dict()
        step = pulse.step = progress.step + 1
        with pulse.during("data"):
            fetched = next(batches)
        waited_s = time.perf_counter() - began
        fetched = faults.settle(fetched, config.data.bad_samples)
        faults.check(config, progress.counters, fetched)
        with traced(directory.path(config), step, config.log.profile):
            outcome = stepper.train(fetched.micro_batches, step, progress.guard.judge)
        if outcome.event:
            recovery.keep(config, layout, stepper, fetched, outcome, before, reporter)
            saver.finish()
            if recovery.goes_back(config, outcome, progress, models, optimizer, reporter):
                saved = progress.step
                continue
        progress.step, counters = step, progress.counters
        counters["skipped_steps"] += not outcome.applied
        counters["spikes"] += outcome.event is not None
        counters["drawn_samples"] += fetched.samples
        counters["skipped_samples"] += len(fetched.skipped)
        record = _record(config, step, fetched, outcome) | counters
        record |= _speed(config, outcome, time.perf_counter() - began, waited_s) | {"save_wait_s": save_wait_s}
        ledger, skipped = _ledger(fetched), fetched.skipped
        if _due(step, config.eval.every):
            scores, unread = _evaluate(config, stepper, share)
            record |= scores
            skipped += unread
            ledger |= {"eval_skipped": [faults.entry(fault) for fault in unread]} if unread else {}
        if reporter:
            for fault in skipped:
                reporter.say(f"step {step}  skipped {fault}")
            reporter.step(record, ledger)
        if _due(step, config.log.norms_every) and outcome.norms:
            norms = stepper.module_norms(outcome)
            if reporter:
                reporter.norms(step, norms)
        if _due(step, config.log.every):
            ranks = stragglers.gather(pulse)
            if reporter:
                reporter.stragglers(step, ranks)
        save_wait_s = 0.0
        if _due(step, config.checkpoint.every) or step == config.train.steps:
            with pulse.during("save"):
                save_wait_s = _save(saver, models, optimizer, loader, progress, watch, wait=step == config.train.steps)
            saved = step
    pulse.enter("save")
    saver.finish()
    if reason and progress.step > saved:
        _save(saver, models, optimizer, loader, progress, watch, wait=True)
    pulse.enter("other")
    early = reason if progress.step < config.train.steps else ""
    peaks = process.peak_memory()
    if reporter:
        peaks_gb = ", ".join(f"{peak / 1e9:.2f}" for peak in peaks)
        reporter.say(f"Peak memory by rank: {peaks_gb} GB.")
        ended = (
            f"Stopped after step {progress.step} ({reason}); the same command goes on from there."
            if early
            else (f"Finished at step {progress.step}.")
        )
        reporter.say(f"{ended} Checkpoint, metrics and logs: {directory.path(config)}")
        reporter.close()
    loader.close()
    return early


def _watchdog(config: Config, pulse: Pulse, loader: Loader, watched: ExitStack) -> None:
    """From here on a rank that hangs ends the run."""
    folder = directory.path(config)
    with together("clearing old heartbeats"):
        if dist.get_rank() == 0:
            Watchdog.clear(folder)
    pulse.keys = lambda: loader.keys
    pulse.enter("other")
    watched.enter_context(Watchdog(folder, config.guard.hang_s, pulse))


def _agreed(watch: Watch, saver: Saver, pulse: Pulse) -> str:
    with pulse.during("collective"):
        return watch.agreed(saver.failed)


def _save(
    saver: Saver, models: list[Any], optimizer: Any, loader: Loader, progress: Progress, watch: Watch, *, wait: bool
) -> float:
    """Save, in the background unless `wait`; the seconds that training was held up."""
    began = time.monotonic()
    state = {
        "data": loader.state_dict(),
        "counters": progress.counters,
        "guard": progress.guard.state(),
    } | progress.facts
    saver.save(models=models, optimizer=optimizer, step=progress.step, state=state, wait=wait)
    watch.saved(saver.took_s)
    progress.guard.rollbacks = 0
    return time.monotonic() - began


def _reporter(config: Config, layout: Layout, start: resume.Start) -> Reporter | None:
    """On rank 0: the run directory made ready, its first line said."""
    if dist.get_rank():
        return None
    cuda = torch.cuda.is_available() and config.run.device != "cpu"
    facts = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "start_step": start.step,
        "layout": {name: getattr(layout, name) for name in ("world", "tensor", "context", "pipeline", "data")},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }
    reporter = Reporter(directory.prepare(config, start.step, facts), config, start.step)
    reporter.say(start.words)
    reporter.say(f"{layout.world} process(es) on {facts['device']}: {json.dumps(facts['layout'])}")
    return reporter


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _share(layout: Layout) -> Share:
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


def _evaluate(config: Config, stepper: Stepper, share: Share) -> tuple[dict[str, float], tuple[Fault, ...]]:
    """Loss on the first `eval.rows` held-out rows, always the same ones, and what of them could not be loaded."""
    began = time.perf_counter()
    loader = _held_out(config, share)
    if loader.sources != stepper.sources:
        raise ValueError(
            f"data.mixture={config.data.mixture!r} was changed while the run went on: its data sets were "
            f"{', '.join(stepper.sources)}, now {', '.join(loader.sources)}. Put it back, and start the run again: it "
            "goes on from its latest checkpoint."
        )
    count = max(1, config.eval.rows // config.train.global_batch)
    unread: list[Fault] = []
    steps = (faults.settle(step, config.data.bad_samples) for step in itertools.islice(iter(loader), count))
    outcome = stepper.evaluate(_micro_batches(steps, unread))
    loader.close()
    losses = {f"eval_loss/{name}": loss for name, loss in outcome.losses.items()}
    record = {"eval_loss": outcome.loss, **losses, "eval_time_s": time.perf_counter() - began}
    return record | ({"eval_skipped_samples": len(unread)} if unread else {}), tuple(unread)


def _held_out(config: Config, share: Share) -> Loader:
    try:
        return Loader(config, presets.architecture(config.model), share, split=config.eval.split, one_pass=True)
    except ValueError as error:
        raise ValueError(
            f"there are no rows for the held-out loss: {error} Build the shards with held-out samples, set eval.split "
            f"to a split that has some, or switch it off with eval.every=0 (now {config.eval.every})."
        ) from error


def _micro_batches(steps: Iterator[Fetched], unread: list[Fault]) -> Iterator[tuple[Batch, ...]]:
    """Those of each step; what the steps lack is added to `unread`."""
    for step in steps:
        unread += step.skipped
        yield step.micro_batches


def _record(config: Config, step: int, fetched: Fetched, outcome: Outcome) -> dict[str, Any]:
    """What metrics.jsonl says about the step, speed not included."""
    return {
        "step": step,
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        **{f"grad_norm_{name}": norm for name, norm in outcome.norms.items()},
        **{f"lr_{name}": rate for name, rate in outcome.rates.items()},
        "tokens": fetched.tokens,
        "useful_tokens": fetched.useful_tokens,
        "image_tokens": fetched.image_tokens,
        "crops": fetched.crops,
        "samples": fetched.samples,
        "cut_tokens": fetched.cut_tokens,
        "dropped_branches": fetched.dropped_branches,
        "dropped_images": fetched.dropped_images,
        "fill": fetched.useful_tokens / fetched.tokens,
        "loss_weight": outcome.weight,
        **{f"loss/{name}": loss for name, loss in outcome.losses.items()},
    }


def _speed(config: Config, outcome: Outcome, step_time_s: float, waited_s: float) -> dict[str, Any]:
    """Times, model FLOP/s of all ranks together, and the share of the devices' peak (null where it is not known)."""
    flops = cost.training(presets.architecture(config.model), outcome.work, config.model.freeze)
    cuda = torch.cuda.is_available() and config.run.device != "cpu"
    peak = cost.peak_flops(torch.cuda.get_device_name()) if cuda else None
    per_second = flops / step_time_s
    return {
        "step_time_s": step_time_s,
        "data_wait_s": waited_s,
        "model_flops_per_s": per_second,
        "mfu": per_second / (peak * dist.get_world_size()) if peak else None,
    }


def _ledger(fetched: Fetched) -> dict[str, Any]:
    return {
        "window": fetched.window,
        "offset": fetched.offset,
        "keys_hash": fetched.keys_hash,
        "skipped": [faults.entry(fault) for fault in fetched.skipped],
        "cut": list(fetched.cut),
    }
