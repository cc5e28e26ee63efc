"""Tasks scored during training: the same on every layout that can, logged, and training does not notice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_vlm.config.schema import CheckpointConfig, Config, EvalConfig, ParallelConfig, RunConfig
from megatron_vlm.train import scoring
from tests.evaluate import world
from tests.train.kills import CLOCKS


def settings(folder: Path, run: str, *tasks: str, every: int = 2, steps: int = 4) -> Config:
    config = world.config(folder, steps=steps, global_batch=2)
    return dataclasses.replace(
        config,
        run=RunConfig(dir=str(folder / run), device="cpu"),
        train=dataclasses.replace(config.train, residual_dropout=0.1),
        eval=EvalConfig(every=every, rows=2, tasks=tasks, task_samples=5),
        checkpoint=CheckpointConfig(every=2, asynchronous=False),
    )


def metrics(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name not in CLOCKS} for line in lines]


def untouched(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if not name.startswith("task")}


def train(config: Config) -> None:
    """On a rank of a pool."""
    import torch.distributed as dist

    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import loop

    layout = Layout.of(config, dist.get_world_size())
    groups.initialize(layout, seed=config.train.seed, timeout_s=30)
    loop.train(config, layout)


@pytest.mark.slow
def test_training_does_not_notice_and_a_resumed_run_has_the_same_scores(tmp_path, pool, capfd):
    world.shards(tmp_path)
    without, tasks = settings(tmp_path, "without"), settings(tmp_path, "with", "vqa")
    for config in (without, tasks):
        pool(1).run(train, config)
    plain, scored = metrics(without), metrics(tasks)
    assert [untouched(line) for line in scored] == plain
    assert [line["step"] for line in scored if "task/vqa/accuracy" in line] == [2, 4]
    assert all(0 <= line["task_not_scored/vqa"] <= 10 for line in scored[1::2])
    # The last checkpoint is damaged: the run goes on from step 2, and comes to the same.
    damaged = next((tmp_path / "with" / "checkpoints" / "iter_0000004").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    pool(1).run(train, tasks)
    # The lines after step 2 were put aside. (What a process of the pool prints goes where it went at its start.)
    assert (tmp_path / "with" / "metrics.jsonl.cut").exists() and metrics(tasks) == scored
    capfd.readouterr()


@pytest.mark.slow
def test_data_tensor_and_pipeline_ranks_have_the_scores_of_one(tmp_path, pool, capfd):
    world.shards(tmp_path)
    found = {}
    for name, ranks, parallel in (
        ("one", 1, {}),
        ("dp2", 2, {}),
        ("tp2", 2, {"tensor": 2}),
        ("pp2", 2, {"pipeline": 2}),
    ):
        config = settings(tmp_path, name, "vqa", "pointing", steps=2)
        pool(ranks).run(train, dataclasses.replace(config, parallel=ParallelConfig(**parallel)))
        line = metrics(config)[-1]
        found[name] = {key: value for key, value in line.items() if key.startswith("task") and value is not None}
    assert len(found["one"]) > 4
    for name, scores in found.items():
        assert scores == pytest.approx(found["one"]), name
    capfd.readouterr()


def test_tasks_that_cannot_be_scored_are_refused_at_the_start(tmp_path):
    world.shards(tmp_path)
    with pytest.raises(ValueError, match="there is no task 'vqaa'; did you mean vqa"):
        scoring.open_tasks(settings(tmp_path, "run", "vqaa"))
    with pytest.raises(ValueError, match="eval.tasks: counting cannot be scored during training. .* no data set"):
        scoring.open_tasks(settings(tmp_path, "run", "counting"))
    _, found = scoring.open_tasks(settings(tmp_path, "run", "vqa"))
    ((task, samples),) = found
    assert (task.split, len(samples)) == ("validation", 5) and samples[0].key.startswith("validation-")
