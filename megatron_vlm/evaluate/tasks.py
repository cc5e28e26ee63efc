"""What is asked of a model, from the test split of a manifest: questions about images with their true answers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data import crops, prompts
from megatron_vlm.data.example import Branch, Example, Points
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.media import Store, read_crops
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tree import TreeSettings, media_layouts, prefix_tokens
from megatron_vlm.evaluate.generate import Prompt
from megatron_vlm.evaluate.score import same_answer

#: Answers without a natural length: the usual length hint is right for them. All others are short or made of places.
LONG_STYLES = ("long_caption", "short_caption", "transcript", "text_sft")


@dataclass(frozen=True)
class Task:
    """One data set of a manifest and how its answers are judged."""

    name: str
    """Of the report, and of the data set."""
    kind: str
    """answer: the words must be the same; pointing: places must match; count: the number must be right."""
    max_new_tokens: int
    """Longest answer."""
    split: str = "test"


#: The tasks that the bundled sample data can score.
TASKS = {
    task.name: task
    for task in (
        Task("easy_vqa", "answer", 8),
        Task("pointing", "pointing", 96),
        Task("pointing_new", "pointing", 96),
        Task("counting", "count", 128),
        Task("vqa", "answer", 24),
    )
}


def examples(shards: Shards, task: Task, limit: int = 0) -> list[Example]:
    """The task's samples, at most `limit` of them (0 = all): evenly spread, the same ones every time."""
    count = shards.count(task.name, task.split)
    if not count:
        raise ValueError(
            f"{shards.directory} has no samples of {task.name!r} in the split {task.split!r}; it has "
            f"{', '.join(f'{name} ({chr(32).join(shards.splits(name))})' for name in shards.datasets)}."
        )
    wanted = min(limit, count) if limit else count
    return [shards.example(task.name, task.split, index * count // wanted) for index in range(wanted)]


def with_other_images(samples: Sequence[Example]) -> list[Example]:
    """The same questions about other images: each sample gets the media of one half a round away, in a fixed order."""
    order = list(range(len(samples)))
    generator("other images").shuffle(order)
    half = len(order) // 2
    other = {order[place]: order[(place + half) % len(order)] for place in range(len(order))}
    return [dataclasses.replace(sample, media=samples[other[i]].media) for i, sample in enumerate(samples)]


def prompt(sample: Example, shards: Store, settings: TreeSettings) -> Prompt:
    """The sample's images, or its video, with the first question of each of its branches."""
    return asked(sample, shards, [question(sample.key, branch, settings) for branch in sample.branches], settings)


def asked(sample: Example, shards: Store, questions: Sequence[str], settings: TreeSettings) -> Prompt:
    """The sample's images, or its video, with questions in the model's words; its branches do not count."""
    layouts = media_layouts(sample, settings)
    parts = [
        read_crops(shards, media.key, layout, settings.geometry, name=f"{media.key} of sample {sample.key}")
        for media, layout in zip(sample.media, layouts, strict=False)  # images beyond the most allowed have no layout
    ]
    values = 3 * settings.geometry.patch_size**2
    return Prompt(
        prefix=prefix_tokens(layouts, settings.tokenizer)[0].tolist(),
        questions=[settings.tokenizer.user_turn(text, first=True) for text in questions],
        crops=np.concatenate(parts) if parts else np.zeros((0, settings.geometry.patches, values), np.uint8),
        windows=crops.row_windows(layouts, settings.geometry),
    )


def question(key: str, branch: Branch, settings: TreeSettings) -> str:
    """The first question of a branch as the run's prompt format puts it.

    The length hint of pre-training says nothing of the true answer: the usual one for long answers, that of an empty
    answer (with training's noise) for short ones.
    """
    known = None if branch.style in LONG_STYLES else ""
    rng = generator(settings.seed, key, branch.style, branch.turns[0].prompt, "evaluation")
    return prompts.user_text(settings.prompts, branch.style, branch.turns[0], known, first=True, rng=rng)


def wanted_radii(sample: Example, points: Points) -> list[float]:
    """How far from each point a hit may lie, as a fraction of the image's side: the radius of the object there.

    Raises ValueError where the sample names no object at a point.
    """
    objects = sample.info.get("objects", [])
    radii = []
    for point in points.points:
        near = [row for row in objects if abs(row[2] - point.x) < 1e-6 and abs(row[3] - point.y) < 1e-6]
        if not near:
            raise ValueError(f"sample {sample.key}: info.objects names no object at {point.x, point.y}.")
        radii.append(near[0][4])
    return radii


def blind_accuracy(shards: Shards, task: Task, samples: Sequence[Example]) -> tuple[int, int]:
    """Right answers and questions, if each question gets its most frequent answer in the train split, unseen image."""
    answers: dict[str, Counter[str]] = {}
    for index in range(shards.count(task.name, "train")):
        for branch in shards.example(task.name, "train", index).branches:
            answers.setdefault(branch.turns[0].prompt, Counter())[str(branch.turns[0].answer)] += 1
    overall = sum(answers.values(), Counter())
    hits = total = 0
    for sample in samples:
        for branch in sample.branches:
            turn = branch.turns[0]
            guess = answers.get(turn.prompt, overall).most_common(1)[0][0]
            hits += same_answer(guess, str(turn.answer))
            total += 1
    return hits, total
