"""Load a trained model and score it: one process, from a checkpoint of any parallel layout."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.checkpoint import load as checkpoint
from megatron_vlm.config import load as config_load
from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config, ParallelConfig
from megatron_vlm.data import manifest as manifests
from megatron_vlm.data import points
from megatron_vlm.data.example import Example, Points
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tokens import Tokenizer
from megatron_vlm.data.tree import TreeSettings
from megatron_vlm.evaluate import tasks
from megatron_vlm.evaluate.decode import decode
from megatron_vlm.evaluate.score import Pointing, Share, matched, same_answer
from megatron_vlm.evaluate.tasks import Task
from megatron_vlm.model.build import build
from megatron_vlm.model.vlm import VlmModel
from megatron_vlm.parallel.layout import Layout

Report = dict[str, Any]


@dataclass(frozen=True)
class Trained:
    """A model with what belongs to it."""

    config: Config
    model: VlmModel
    tree: TreeSettings
    device: torch.device
    path: Path
    step: int

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the run that trained it."""
        return self.tree.tokenizer


def load(checkpoint_path: str | Path, *, trained: bool = True) -> Trained:
    """The model of a checkpoint, of a folder of checkpoints or of a run (the newest). Groups of one process exist.

    trained: False leaves the random weights that the run began with: what it could do before training.
    Raises ValueError where there is no checkpoint, or it does not hold the model that its settings describe.
    """
    record = checkpoint.read(checkpoint_path)
    config = config_load.from_dict(record.config, f"in the checkpoint {record.path}")
    config = dataclasses.replace(config, parallel=ParallelConfig())
    arch = presets.architecture(config.model)
    checkpoint.check_architecture(record, config)
    (model,) = build(config, Layout(1))
    if trained:
        checkpoint.load(record.path, models=[model], config=config)
    tree = TreeSettings.of(config.data, Tokenizer.load(config.data.tokenizer, arch.language), arch)
    device = torch.device(torch.cuda.current_device())
    return Trained(config, model, tree, device, record.path, record.step if trained else 0)


def manifest(config: Config) -> Shards:
    """The shards that the run was trained on."""
    return Shards(manifests.directory(config.data.manifest))


def answers(
    trained: Trained,
    shards: Shards,
    samples: Sequence[Example],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda finished: None,
) -> list[list[str]]:
    """The model's words for each sample and branch."""
    prompts = [tasks.prompt(one, shards, trained.tree) for one in samples]
    ids = decode(
        trained.model,
        prompts,
        trained.tokenizer,
        max_new_tokens=max_new_tokens,
        device=trained.device,
        progress=progress,
    )
    return [[trained.tokenizer.decode(answer) for answer in row] for row in ids]


def evaluate(
    trained: Trained,
    shards: Shards,
    task: Task,
    *,
    limit: int = 0,
    shuffled_limit: int = 0,
    progress: Callable[[int], None] = lambda finished: None,
) -> Report:
    """Score one task on at most `limit` samples (0 = all), and with the images exchanged between them.

    shuffled_limit: samples of the second pass; 0 = as many, negative = leave it out.
    """
    began = time.perf_counter()
    samples = tasks.examples(shards, task, limit)
    said = answers(trained, shards, samples, task.max_new_tokens, progress)
    questions = sum(len(one.branches) for one in samples)
    report: Report = {"task": task.name, "kind": task.kind, "images": len(samples), "questions": questions}
    report["score"] = judge(task, samples, said)
    if task.kind == "answer":
        report["blind"] = Share(*tasks.blind_accuracy(shards, task, samples)).as_dict()
    if shuffled_limit >= 0:
        fewer = tasks.examples(shards, task, shuffled_limit) if shuffled_limit else samples
        other = answers(trained, shards, tasks.with_other_images(fewer), task.max_new_tokens, progress)
        report["shuffled"] = judge(task, fewer, other)
    report["examples"] = [
        {"key": one.key, "question": one.branches[0].turns[0].prompt, "wanted": _shown(task, one), "said": words[0]}
        for one, words in list(zip(samples, said, strict=True))[:: max(1, len(samples) // 5)][:5]
    ]
    report["time_s"] = round(time.perf_counter() - began, 1)
    return report


def judge(task: Task, samples: Sequence[Example], said: Sequence[Sequence[str]]) -> Report:
    """The score of answers, as the task's kind counts."""
    if task.kind == "pointing":
        return _pointing(samples, said).as_dict()
    hits = total = 0
    for one, words in zip(samples, said, strict=True):
        for branch, answer in zip(one.branches, words, strict=True):
            wanted = branch.turns[0].answer
            if task.kind == "count":
                assert isinstance(wanted, Points), f"{one.key} has no points to count"
                hits += points.parse_count(answer) == len(wanted.points)
            else:
                assert isinstance(wanted, str), f"{one.key} is answered by points"
                hits += same_answer(answer, wanted)
            total += 1
    return Share(hits, total).as_dict()


def _pointing(samples: Sequence[Example], said: Sequence[Sequence[str]]) -> Pointing:
    hits = found = wanted = 0
    for one, words in zip(samples, said, strict=True):
        for branch, answer in zip(one.branches, words, strict=True):
            target = branch.turns[0].answer
            assert isinstance(target, Points), f"{one.key} is no pointing sample"
            places = [(place.x, place.y) for place in points.parse(answer)]
            centres = [(point.x, point.y) for point in target.points]
            hits += matched(places, centres, tasks.wanted_radii(one, target))
            found += len(places)
            wanted += len(centres)
    return Pointing(hits, found, wanted)


def _shown(task: Task, one: Example) -> str:
    branch = one.branches[0]
    answer = branch.turns[0].answer
    return points.write(answer, branch.style) if isinstance(answer, Points) else str(answer)


def markdown(reports: Sequence[Report]) -> str:
    """The reports as a table."""
    lines = [
        "| task | questions | score | 95 % interval | other images | without image |",
        "|---|---|---|---|---|---|",
    ]
    for report in reports:
        score = report["score"]
        interval = f"{score['low']:.1%} to {score['high']:.1%}" if "low" in score else ""
        cells = [
            f"{report['task']} ({'F1' if report['kind'] == 'pointing' else 'accuracy'})",
            f"{report['questions']:,}",
            _percent(score),
            interval,
            _percent(report.get("shuffled")),
            _percent(report.get("blind")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(score: Report | None) -> str:
    return "" if score is None else f"{score['value']:.1%}"
