"""Scores of tasks on held-out samples, always the same ones. Collective.

Every data rank answers its share, greedily, its tensor and pipeline ranks together.

Nothing is drawn and nothing that trains is touched: a run with tasks has the weights of the run without.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data import manifest
from megatron_vlm.data.example import Example
from megatron_vlm.data.loader import Share
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tokens import Tokenizer
from megatron_vlm.data.tree import TreeSettings
from megatron_vlm.evaluate import report, tasks
from megatron_vlm.evaluate.asking import ask
from megatron_vlm.evaluate.report import Judged
from megatron_vlm.evaluate.tasks import Task
from megatron_vlm.parallel import groups
from megatron_vlm.train.pulse import Pulse


def open_tasks(config: Config) -> tuple[Shards, list[tuple[Task, list[Example]]]]:
    """The shards, and the samples of each of `eval.tasks`: of the split `eval.split`, at most `eval.task_samples`.

    Raises ValueError where there is no such task, or the data have no samples for it.
    """
    shards = Shards(manifest.directory(config.data.manifest))
    found = []
    for name in config.eval.tasks:
        task = dataclasses.replace(tasks.find(name), split=config.eval.split)
        try:
            found.append((task, tasks.examples(shards, task, config.eval.task_samples)))
        except ValueError as error:
            raise ValueError(f"eval.tasks: {name} cannot be scored during training. {error}") from error
    return shards, found


def evaluate(config: Config, models: Sequence[Any], share: Share, pulse: Pulse) -> dict[str, float]:
    """`task/<name>/<score>` of every task, and `task_not_scored/<name>`, how many answers were not."""
    began = time.perf_counter()
    shards, wanted = open_tasks(config)
    arch = presets.architecture(config.model)
    tree = TreeSettings.of(config.data, Tokenizer.load(config.data.tokenizer, arch.language), arch)
    (wrapped,) = models
    wrapped.eval()  # the next step puts it back
    device = torch.device(torch.cuda.current_device())
    found: dict[str, float] = {}
    for task, samples in wanted:
        mine = samples[share.data_rank :: share.data_ranks]
        pulse.enter("forward")
        answers = {}
        for answer in ask(wrapped.module, mine, shards, tree, task.max_new_tokens, device):
            answers[answer.key] = answer
            pulse.enter("forward")  # a sign of life
        pulse.enter("collective")
        scores = report.scores(_gathered(report.judge(task, mine, answers), share))
        found |= {f"task/{task.name}/{name}": score["value"] for name, score in scores["scores"].items()}
        found[f"task_not_scored/{task.name}"] = sum(scores["not_scored"].values())
    pulse.enter("other")
    return found | {"tasks_time_s": time.perf_counter() - began}


def _gathered(judged: list[list[Judged]], share: Share) -> list[list[Judged]]:
    """What all data ranks judged, in the order of the samples."""
    parts: list[Any] = [None] * share.data_ranks
    dist.all_gather_object(parts, judged, group=groups.data())
    rows = max(map(len, parts))
    return [part[row] for row in range(rows) for part in parts if row < len(part)]
