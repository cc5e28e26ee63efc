"""Run a step again that a guard stopped at: exactly its rows, on one process, and nothing is updated.

    python tools/replay.py runs/x/guards/step-0000123.json
    python tools/replay.py runs/x/guards/step-0000123.json --advance

Weights are those of the run's newest checkpoint before the step: older than the step's own weights by the steps
in between: `--advance` trains these again first, on this one process, so that loss and norms come out as they were.
Prints both side by side: loss per data set, gradient norm per module, and the rows with the largest losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.config import load, presets
from megatron_vlm.config.schema import Config, ParallelConfig
from megatron_vlm.parallel import process
from megatron_vlm.train import dump
from megatron_vlm.train.guard import Event, Guard

#: Modules and rows shown.
_SHOWN = 12


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path, metavar="DUMP", help="step-*.json in the folder guards of a run")
    parser.add_argument("--checkpoint", type=Path, help="weights to start from (default: the run's, before the step)")
    parser.add_argument("--advance", action="store_true", help="first train the steps from the checkpoint to this one")
    asked = parser.parse_args(argv)
    return process.tool(lambda: _answer(asked.dump, asked.checkpoint, asked.advance))


def _answer(path: Path, weights: Path | None, advance: bool) -> None:
    kept = dump.read(path)
    checkpoint = weights or _before(path.parent.parent / "checkpoints", kept.facts["step"])
    config = _alone(load.from_dict(kept.facts["config"], f"in {path}"))
    process.start(config.run)
    print(_replay(kept, config, checkpoint, advance))


def _before(folder: Path, step: int) -> Path:
    found = [path for path in names.complete(folder) if names.step(path) < step]
    if not found:
        raise ValueError(f"{folder} holds no checkpoint from before step {step}. Name one with --checkpoint.")
    return found[-1]


def _alone(config: Config) -> Config:
    """The same step on one process."""
    alone = ParallelConfig(vision=config.parallel.vision)
    return dataclasses.replace(config, parallel=alone, data=dataclasses.replace(config.data, workers=0))


def _replay(kept: dump.Dump, config: Config, path: Path, advance: bool) -> str:
    from megatron_vlm.checkpoint import load as checkpoints
    from megatron_vlm.data.loader import Loader, Share
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import optim
    from megatron_vlm.train.step import Stepper

    step = kept.facts["step"]
    record = checkpoints.read(path)
    groups.initialize(Layout(1), seed=config.train.seed)
    state = record.state["data"] if advance else kept.facts["data"]
    loader = Loader(config, presets.architecture(config.model), Share(), state=state)
    models = optim.wrap(build(config, Layout(1)), config)
    optimizer = optim.build(models, config)
    checkpoints.load(record.path, models=models, optimizer=optimizer, config=config)
    stepper = Stepper(models, optimizer, config, loader.sources)
    batches = iter(loader)
    guard = Guard(config.guard, record.state.get("guard", {}))
    for between in range(record.step + 1, step) if advance else ():
        stepper.train(next(batches).micro_batches, between, guard.judge)
    fetched = next(batches)
    if fetched.keys_hash != kept.facts["keys_hash"]:
        raise ValueError(
            f"the rows are not those of the dump (keys hash {fetched.keys_hash[:12]}, in the dump "
            f"{kept.facts['keys_hash'][:12]}). "
            + ("The run was rolled back in between: leave --advance out." if advance else "Have the data changed?")
        )
    outcome = stepper.train(fetched.micro_batches, step, _refuse)
    evidence = stepper.evidence(outcome)
    loader.close()
    weights = "the weights of step" if record.step == step - 1 or advance else "OLDER weights, those of step"
    lines = [f"Step {step} again, with {weights} {step - 1 if advance else record.step} ({path})."]
    lines += ["", f"{'':50s} {'dump':>12s} {'replay':>12s}"]
    lines += [_pair("loss", kept.facts["loss"], outcome.loss)]
    lines += [_pair(f"loss {name}", kept.facts["losses"].get(name), loss) for name, loss in outcome.losses.items()]
    then: dict[str, Any] = kept.facts["modules"]
    largest = sorted(evidence.norms, key=lambda name: -_rank(evidence.norms[name]))[:_SHOWN]
    lines += [_pair(f"norm {name}", then.get(name), evidence.norms[name]) for name in largest]
    lines += ["", "Rows with the largest mean loss, and their worst token:"]
    return "\n".join(lines + _rows(kept))


def _refuse(step: int, values: Mapping[str, float]) -> Event:
    return Event(step, "replay", "skip", "loss", values["loss"])


def _rank(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _pair(name: str, before: Any, now: float) -> str:
    shown = "-" if before is None else before if isinstance(before, str) else f"{before:.6g}"
    return f"{name[:50]:50s} {shown:>12s} {now:12.6g}"


def _rows(kept: dump.Dump) -> list[str]:
    """Rows of the dump: number, mean loss, place and loss of the worst token."""
    counted = kept.weights != 0
    losses = np.where(counted, kept.losses, 0.0)
    means = losses.sum(axis=1) / np.maximum(counted.sum(axis=1), 1)
    means[np.isnan(kept.weights).any(axis=1)] = np.nan
    order = np.argsort(-np.nan_to_num(means, nan=np.inf), kind="stable")[:_SHOWN]
    worst = np.nan_to_num(losses, nan=np.inf).argmax(axis=1)
    return [
        f"  row {kept.rows[i]:8d}  mean {means[i]:10.4f}  token {worst[i]:6d}: {losses[i, worst[i]]:10.4f}"
        for i in order
    ]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
