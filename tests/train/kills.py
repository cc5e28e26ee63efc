"""Runs that are killed with SIGKILL again and again, beside one that never was.

Ranks are processes of a pool, so that a start costs two seconds, not ten; what runs in them is `loop.train`.
"""

from __future__ import annotations

import dataclasses
import json
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_vlm.config.schema import CheckpointConfig, Config, LogConfig, ParallelConfig, RunConfig
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.pool import Pool
from tests.train import world

#: Keys of metrics.jsonl that differ between two equal runs.
CLOCKS = ("step_time_s", "data_wait_s", "model_flops_per_s", "mfu", "eval_time_s", "tasks_time_s", "save_wait_s")
#: Layouts by name, with their number of ranks.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "pp2": (2, {"pipeline": 2}),
    "dp3": (3, {}),
    "tp2_sp_dp2": (4, {"tensor": 2, "sequence": True}),
}


@dataclasses.dataclass(frozen=True)
class Kill:
    """One SIGKILL."""

    layout: str
    victims: str
    """all, or the number of the one rank that was killed; the others then fail by themselves."""
    aimed: str
    """moment: a random time after a random step; save: while a checkpoint is being written."""
    step: int
    """Last line of metrics.jsonl at that moment."""
    saving: bool
    """A half-written checkpoint was left."""
    checkpoint: int
    """Step that the next start goes on from; 0 = from the beginning."""


def settings(data: Path, run: Path, layout: str, *, steps: int, every: int) -> Config:
    """A run with dropout in float32 whose steps take a fraction of a second."""
    config = world.config(data, **LAYOUTS[layout][1])
    return dataclasses.replace(
        config,
        run=RunConfig(dir=str(run), device="cpu"),
        train=dataclasses.replace(
            config.train, steps=steps, global_batch=6, micro_batch=1, residual_dropout=0.1, response_dropout=0.1
        ),
        checkpoint=CheckpointConfig(every=every, keep=2),
        log=LogConfig(every=1, tensorboard=False),
    )


def train(config: Config) -> None:
    """`loop.train` on a rank of a pool."""
    from megatron_vlm.parallel import groups
    from megatron_vlm.train import loop

    layout = Layout.of(config, dist.get_world_size())
    groups.initialize(layout, seed=config.train.seed, timeout_s=60)
    loop.train(config, layout)


def on(config: Config, layout: str) -> Config:
    """The same run on another layout."""
    return dataclasses.replace(config, parallel=ParallelConfig(**LAYOUTS[layout][1]))


def kill(pool: Pool, config: Config, layout: str, chance: random.Random, aimed: str) -> Kill | None:
    """Start the run and kill it at a random moment. None = it had finished before."""
    folder = Path(config.run.dir)
    pool._start()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            pool.run(train, config, timeout_s=120)
        except (RuntimeError, TimeoutError) as error:
            failures.append(error)

    processes = list(pool._processes)
    running = threading.Thread(target=run)
    done = steps(folder, "metrics")
    before = checkpoint(folder)
    running.start()
    if aimed == "save":
        wait(running, lambda: checkpoint(folder) > before and chance.random() < 0.3)
        wait(running, lambda: bool(half_written(folder)))
        time.sleep(chance.uniform(0, 0.05))
    else:
        further = chance.randrange(8)
        wait(running, lambda: steps(folder, "metrics")[-1:] >= [(done or [0])[-1] + further])
        time.sleep(chance.uniform(0, 1.0))
    alone = chance.random() < 0.4
    victims = [chance.randrange(len(processes))] if alone else range(len(processes))
    for rank in victims:
        processes[rank].kill()
    running.join(timeout=60)
    if running.is_alive():
        raise AssertionError(f"rank(s) {list(victims)} killed, and the others still run a minute later")
    pool.close()
    if not failures:
        return None
    return Kill(
        layout,
        str(victims[0]) if alone else "all",
        aimed,
        (steps(folder, "metrics") or [0])[-1],
        bool(half_written(folder)),
        checkpoint(folder),
    )


def wait(running: threading.Thread, until: Callable[[], bool]) -> None:
    """Until something is so, or the run has ended."""
    while running.is_alive() and not until():
        time.sleep(0.002)


def half_written(folder: Path) -> list[Path]:
    return list((folder / "checkpoints").glob(".writing-*"))


def checkpoint(folder: Path) -> int:
    """Step of the newest complete checkpoint; 0 = none."""
    return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("iter_*")), default=0)


def steps(folder: Path, log: str) -> list[int]:
    """Steps in a log, in the order of its lines; an unfinished line at its end does not count."""
    try:
        lines = (folder / f"{log}.jsonl").read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    return [json.loads(line)["step"] for line in lines if line.endswith(b"\n")]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """All lines, without the clocks."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in CLOCKS} for line in lines]


def differences(folder: Path, whole: Path, last: int) -> list[str]:
    """What of a run differs from one that was never killed: metrics, ledger, or a file of the last checkpoint."""
    found = []
    if metrics(folder) != metrics(whole):
        found.append("metrics.jsonl")
    if (folder / "ledger.jsonl").read_bytes() != (whole / "ledger.jsonl").read_bytes():
        found.append("ledger.jsonl")
    name = f"checkpoints/iter_{last:07d}"
    files = sorted(path.name for path in (whole / name).iterdir())
    if files != sorted(path.name for path in (folder / name).iterdir()):
        return [*found, f"files of {name}"]
    # config.json and manifest.json name the run's directory, or hold the hash of what does.
    same = [file for file in files if file.endswith(".distcp") or file in ("state.json", "common.pt")]
    assert any(file.endswith(".distcp") for file in same)
    different = [file for file in same if (folder / name / file).read_bytes() != (whole / name / file).read_bytes()]
    return found + [f"{name}/{file}" for file in different]
