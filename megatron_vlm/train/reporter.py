"""Writes what is reported of a run: metrics.jsonl and its kin, TensorBoard, Weights & Biases, lines for the reader.

Only rank 0 makes a Reporter; the numbers it gets are already those of the global batch.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from megatron_vlm.config import load
from megatron_vlm.config.schema import Config
from megatron_vlm.train import directory, stragglers

Record = dict[str, Any]


def check(config: Config) -> None:
    """Raises ValueError, on every rank, where what `log` asks for is not installed."""
    if config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"log.wandb={config.log.wandb!r}, but the package wandb is not installed. `pip install wandb`, or leave "
            "log.wandb empty: metrics.jsonl and TensorBoard hold the same numbers."
        )


class Reporter:
    """Writes into a run directory, and to `out` (default: standard output) for a person."""

    def __init__(self, folder: Path, config: Config, start: int, out: TextIO | None = None):
        """`start`: the step that the run goes on from; 0 = a new run."""
        self.config, self.out = config, out or sys.stdout
        self._folder, self._start, self._began = folder, start, time.monotonic()
        self._open(start)
        self._wandb = _wandb(folder, config) if config.log.wandb else None

    def _open(self, start: int) -> None:
        self._metrics = open(self._folder / "metrics.jsonl", "a", encoding="utf-8")
        self._ledger = open(self._folder / "ledger.jsonl", "a", encoding="utf-8")
        self._board: Any = None
        if self.config.log.tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import

            # purge_step: events after the checkpoint belong to the run that was cut off.
            self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start + 1, flush_secs=10)

    def _close(self) -> None:
        self._metrics.close()
        self._ledger.close()
        if self._board is not None:
            self._board.close()

    def back_to(self, step: int) -> None:
        """The run goes on from an earlier step: set the lines after it aside."""
        self._close()
        for name in directory.LOGS:
            directory.cut(self._folder / name, step)
        self._open(step)

    def step(self, record: Record, ledger: Record) -> None:
        """One training step: `record` for metrics.jsonl, with its step and `ledger` for ledger.jsonl."""
        step = record["step"]
        for file, line in ((self._metrics, record), (self._ledger, {"step": step} | ledger)):
            file.write(json.dumps(_finite(line)) + "\n")
            file.flush()
        if self._board is not None:
            self._board.file_writer.add_summary(_scalars(record), step)
        if self._wandb is not None:
            # Its own step counter never goes back; ours does, after a resume or a rollback.
            self._wandb.log(
                {_tag(name): value for name, value in _finite(record).items() if name != "step"} | {"step": step}
            )
        if step % self.config.log.every == 0 or step in (self._start + 1, self.config.train.steps):
            self.say(self._line(record))
        elif "eval_loss" in record:
            self.say(f"{_place(step, self.config)}  held-out loss {record['eval_loss']:.4f}")
        if words := "  ".join(f"{name[5:]} {value:.1%}" for name, value in _main_scores(record).items()):
            self.say(f"{_place(step, self.config)}  {words}")

    def stragglers(self, step: int, ranks: list[stragglers.Times]) -> None:
        """Where the time of each rank went since the last call: a line of stragglers.jsonl; said where one is slow."""
        self._append("stragglers.jsonl", {"step": step} | stragglers.summary(ranks))
        if words := stragglers.words(ranks):
            self.say(f"{_place(step, self.config)}  {words}")

    def norms(self, step: int, norms: dict[str, dict[str, float]]) -> None:
        """Gradient and weight norms of the modules: a line of norms.jsonl."""
        self._append("norms.jsonl", {"step": step} | {kind: _finite(values) for kind, values in norms.items()})

    def shadow(self, step: int, errors: dict[str, float]) -> None:
        """How far FP8 is from bf16 in each layer: a line of fp8.jsonl."""
        self._append("fp8.jsonl", {"step": step, "relative_error": _finite(errors)})

    def _append(self, name: str, line: Record) -> None:
        with open(self._folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def say(self, text: str) -> None:
        """A line for the reader."""
        print(text, file=self.out, flush=True)

    def close(self) -> None:
        """Finish the files."""
        self._close()
        if self._wandb is not None:
            self._wandb.finish()

    def _line(self, record: Record) -> str:
        step = record["step"]
        per_step_s = (time.monotonic() - self._began) / max(1, step - self._start)
        parts = [_place(step, self.config), f"loss {record['loss']:.4f}"]
        if "eval_loss" in record:
            parts.append(f"held-out {record['eval_loss']:.4f}")
        parts += [
            f"grad {record['grad_norm']:.2f}",
            f"lr {record['lr_language']:.1e}",
            f"{record['useful_tokens'] / record['step_time_s']:,.0f} tokens/s",
            f"{record['step_time_s'] * 1000:,.0f} ms",
            f"data {record['data_wait_s'] / record['step_time_s']:.0%}",
            f"{_duration(per_step_s * (self.config.train.steps - step))} left",
        ]
        return "  ".join(parts)


def _wandb(folder: Path, config: Config) -> Any:
    """A run of Weights & Biases; the same one when the run goes on. Raises ValueError where it does not start."""
    import wandb  # not a requirement

    known = folder / "wandb_id"
    try:
        run = wandb.init(
            project=config.log.wandb,
            name=folder.name,
            dir=str(folder),
            config=load.to_dict(config),
            id=known.read_text(encoding="utf-8").strip() if known.exists() else None,
            resume="allow",
        )
    except wandb.errors.Error as error:  # no key, no network
        raise ValueError(
            f"log.wandb={config.log.wandb!r}, but Weights & Biases does not start: {error} Log in; or set "
            "WANDB_MODE=offline, and send the run later with `wandb sync`; or leave log.wandb empty."
        ) from error
    known.write_text(f"{run.id}\n", encoding="utf-8")
    run.define_metric("*", step_metric="step")
    return run


def _place(step: int, config: Config) -> str:
    width = len(str(config.train.steps))
    return f"step {step:{width}d}/{config.train.steps}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}m{rest:02d}s"


def _main_scores(record: Record) -> Record:
    """The first score of each task."""
    tasks: dict[str, str] = {}
    for name in record:
        if name.startswith("task/"):
            tasks.setdefault(name.split("/")[1], name)
    return {name: record[name] for name in tasks.values()}


def _scalars(record: Record) -> Any:
    """All numbers of a step as one event: one each would take TensorBoard ten times as long."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    numbers = {
        name: value
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }
    return Summary(value=[Summary.Value(tag=_tag(name), simple_value=value) for name, value in numbers.items()])


def _tag(name: str) -> str:
    """TensorBoard groups by what stands before the slash."""
    if "/" in name:
        return name
    group = "lr" if name.startswith("lr_") else "loss" if "loss" in name else "train"
    return f"{group}/{name}"


def _finite(record: Record) -> Record:
    """JSON has no NaN: null instead."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in record.items()
    }
