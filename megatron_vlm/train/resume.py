"""Where a run starts: anew, from another run's weights, or from its own latest checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_vlm.checkpoint import load
from megatron_vlm.config.schema import Config
from megatron_vlm.train import directory


@dataclass(frozen=True)
class Start:
    """Where a run starts."""

    checkpoint: Path | None
    """The run's own checkpoint that it goes on from."""
    weights: Path | None
    """The checkpoint whose weights a new run starts with."""
    step: int
    """Steps done."""
    words: str
    """The same for the reader."""
    data: dict[str, Any] | None = None
    """The loader's state; None = from the first row."""
    counters: dict[str, int] = field(default_factory=dict)
    """Counts over the whole run so far."""
    guard: dict[str, Any] = field(default_factory=dict)
    """What the guard knows of the last steps."""
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Where the weights come from, the oldest first: run, checkpoint and step of each stage before."""


def find(config: Config) -> Start:
    """Look into the run directory and decide, as `run.resume` says. Checkpoints that are damaged are passed over.

    Collective: the ranks share the reading of the files.

    Raises ValueError where the directory's state does not fit `run.resume`, or the checkpoint's settings differ.
    """
    folder, run = directory.checkpoints(config), directory.path(config)
    latest, faults = load.newest_sound(folder)
    resume = config.run.resume
    if latest is None:
        if resume == "must":
            raise ValueError(
                f"run.resume=must, but {folder} holds no checkpoint. Set run.dir to the run that should go on, or "
                "run.resume=auto to start a new one."
            )
        if not config.init.checkpoint:
            return Start(None, None, 0, f"New run in {run}, from random weights.")
        try:
            origin = load.read(config.init.checkpoint)
        except ValueError as error:
            raise ValueError(
                f"init.checkpoint={config.init.checkpoint}: {error} Weights of Hugging Face models become one with "
                "tools/convert_hf.py import; `init.checkpoint=`, empty, starts from random weights."
            ) from error
        words = f"New run in {run}, from the weights of {origin.path}."
        return Start(None, origin.path, 0, words, stages=_stages(origin))
    if resume == "never":
        raise ValueError(
            f"run.resume=never, but {folder} holds checkpoints (the latest is {latest.name}). Set run.dir to another "
            "directory, move this one away, or set run.resume=auto to go on with it."
        )
    saved = load.read(latest)
    changed = directory.differences(saved.config, config)
    accepted = {name: changed.pop(name) for name in config.run.accept if name in changed}
    if changed:
        listed = "".join(f"\n  - {name}: {words}" for name, words in changed.items())
        raise ValueError(
            f"{latest} cannot be resumed: these settings have changed since it was saved:{listed}\n"
            "Set them back, or start a new run: set run.dir to another directory (with "
            f"init.checkpoint={latest} it starts from these weights). To go on all the same: "
            f"run.accept=[{','.join([*accepted, *changed])}]."
        )
    words = "".join(f"Passed over: {fault}\n" for fault in faults)
    words += f"Resuming {run} from step {saved.step} ({latest})."
    words += "".join(f"\nAccepted: {name} {was}." for name, was in accepted.items())
    state = saved.state
    return Start(
        latest,
        None,
        saved.step,
        words,
        state["data"],
        state["counters"],
        state.get("guard", {}),
        state.get("stages", []),
    )


def _stages(origin: load.Record) -> list[dict[str, Any]]:
    """The stages before a run that starts with the weights of `origin`."""
    brought = origin.state.get("lineage", {}).get("sources", [])
    stage = {
        "run": origin.config.get("run", {}).get("name", ""),
        "checkpoint": str(origin.path),
        "step": origin.step,
        "sources": [f"{source['directory']} ({source['format']} format)" for source in brought],
    }
    return [*origin.state.get("stages", []), stage]


def restore(
    start: Start, models: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, config: Config
) -> None:
    """Load what `start` names into the models (and, where a run goes on, into the optimizer).

    Raises ValueError where the checkpoint is of another model.
    """
    if start.checkpoint is not None:
        load.load(start.checkpoint, models=models, optimizer=optimizer, config=config, verified=True)
    elif start.weights is not None:
        load.load(start.weights, models=models, config=config)
        # The optimizer's float32 copies were made of the random weights.
        optimizer.reload_model_params()
