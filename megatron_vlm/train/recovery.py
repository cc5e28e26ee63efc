"""What a run does when a guard has fired: keep the evidence; then go on, go back, or stop. Collective."""

from __future__ import annotations

import dataclasses
from typing import Any

from megatron_vlm.checkpoint import load as checkpoints
from megatron_vlm.checkpoint.agree import together
from megatron_vlm.config import load
from megatron_vlm.config.schema import Config
from megatron_vlm.data.loader import Step
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.train import directory, dump
from megatron_vlm.train.reporter import Reporter
from megatron_vlm.train.state import State
from megatron_vlm.train.step import Outcome, Stepper

_ADVICE = (
    "Run the step again (tools/replay.py) and look at its rows; lower the learning rates or lengthen the warm-up. The "
    "same command goes on from the last checkpoint, with guard.not_finite or guard.spike=skip past such steps."
)


def keep(
    config: Config,
    layout: Layout,
    stepper: Stepper,
    fetched: Step,
    outcome: Outcome,
    data: dict[str, Any],
    reporter: Reporter | None,
) -> None:
    """Keep what tools/replay.py needs of a step that a guard stopped at. Collective."""
    evidence, event = stepper.evidence(outcome), outcome.event
    assert event is not None
    facts = {
        "step": event.step,
        "loss": outcome.loss,
        "losses": outcome.losses,
        "norms": outcome.norms,
        "keys": list(fetched.keys),
        "keys_hash": fetched.keys_hash,
        "data": data,
        "layout": dataclasses.asdict(layout),
        "config": load.to_dict(config),
    }
    with together("dumping a step"):
        if reporter:
            path = dump.write(directory.path(config), event, facts, evidence, config.guard.dumps)
            where = f"dumped to {path}" if path else "not dumped: guard.dumps are there already"
            reporter.say(f"step {event.step}  guard: {event.words}; policy {event.policy}; {where}")


def goes_back(config: Config, outcome: Outcome, state: State, reporter: Reporter | None) -> bool:
    """What follows from a guard's event; whether the run is at another step now. Collective.

    Raises FloatingPointError where the policy is to stop, or nothing else is left.
    """
    event, progress, guard = outcome.event, state.progress, state.progress.guard
    assert event is not None
    stop = f"step {event.step} has no sane {event.name}: {event.words}. Nothing was updated. {_ADVICE}"
    if event.policy == "stop":
        raise FloatingPointError(stop)
    most = config.guard.most_in_a_row
    if event.policy == "skip" and guard.refused > most:
        raise FloatingPointError(f"{guard.refused} steps in a row were refused (guard.most_in_a_row={most}); {stop}")
    if event.policy != "rollback":
        return False
    guard.rollbacks += 1
    if guard.rollbacks > most:
        raise FloatingPointError(f"{most} rollbacks to one checkpoint did not help (guard.most_in_a_row); {stop}")
    if checkpoints.latest(directory.checkpoints(config)) is None:
        raise FloatingPointError(f"there is no checkpoint to roll back to yet; {stop}")
    done = progress.counters["rollbacks"] + 1
    record = checkpoints.read(directory.checkpoints(config))
    told = checkpoints.load(record.path, models=state.models, optimizer=state.optimizer, config=config)
    progress.step, progress.counters = record.step, told["counters"] | {"rollbacks": done}
    guard.restore(told.get("guard", {}))
    if reporter:
        reporter.back_to(progress.step)
        reporter.say(f"Rolled back to step {progress.step}; the rows since then are passed over.")
    return True
