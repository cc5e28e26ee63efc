"""What is asked of a model, from the test split of a manifest: questions about images with their true answers."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_vlm.data import crops, prompts
from megatron_vlm.data.example import Branch, Example
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.media import Store, read_crops
from megatron_vlm.data.prefix import prefix_tokens
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tree import TreeSettings, media_layouts
from megatron_vlm.evaluate.prompt import Prompt

#: Ends of the styles of answers without a natural length: the usual length hint is right for them. All others are short
#: or made of places.
LONG_STYLES = ("caption", "transcript", "text_sft")


@dataclass(frozen=True)
class Task:
    """One data set of a manifest and how its answers are judged."""

    name: str
    """Of the report, and, unless `dataset` says otherwise, of the data set."""
    kind: str
    """Key of kinds.KINDS."""
    max_new_tokens: int
    """Longest answer."""
    split: str = "test"
    dataset: str = ""
    """Of the manifest. "" = as the task."""
    radius: float = 0.0
    """How far from a place without a mask a hit may lie, as a share of the longer side. 0 = the data set must say."""
    usual: str = ""
    """Data set whose training split has the usual answers, those of `baseline`. "" = its own."""

    @property
    def data(self) -> str:
        """The data set's name."""
        return self.dataset or self.name


def _tasks(kind: str, max_new_tokens: int, *names: str, **more: Any) -> dict[str, Task]:
    return {name: Task(name, kind, max_new_tokens, **more) for name in names}


#: Every task by its name. First those of the bundled sample data; then published sets, as build_shards names them, with
#: the longest answers that Molmo2's evaluation allows.
TASKS: dict[str, Task] = {
    **_tasks("answer", 8, "easy_vqa"),
    **_tasks("pointing", 96, "pointing", "pointing_new", usual="pointing"),
    **_tasks("count", 128, "counting"),
    **_tasks("answer", 24, "vqa", "video_vqa"),
    **_tasks("caption", 256, "captions", "video_caption"),
    **_tasks("video pointing", 96, "video_points"),
    **_tasks("tracking", 384, "video_tracks"),
    # The recipes' data, held out.
    **_tasks("vqa", 12, "coco_2014_vqa_multi", "text_vqa", "okvqa", "a_okvqa_da", split="validation"),
    **_tasks("relaxed", 12, "chart_qa_weighted", split="validation"),
    **_tasks("anls", 32, "doc_qa", "info_qa", split="validation"),
    **_tasks("choice", 32, "a_okvqa_mc", "science_qa_img", split="validation"),
    **_tasks("caption", 1024, "pixmo_cap", "vixmo3_top_level_captions_min_3", split="validation"),
    # PixMo-Count and the academic video points give clicks, no masks: within a twentieth of the longer side.
    "pixmo_count": Task("pixmo_count", "count", 2048, "test", "pixmo_count_train"),
    "pixmo_count_points": Task("pixmo_count_points", "pointing", 2048, "test", "pixmo_count_train", 0.05),
    **_tasks("answer", 32, "pixmo_clocks"),
    # Sets for evaluation only.
    **_tasks("pointing", 2048, "pixmo_points_eval"),
    **_tasks("in mask", 2048, "point_bench"),
    **_tasks("number", 32, "math_vista"),
    **_tasks("video pointing", 2048, "molmo2_video_point_eval"),
    **_tasks("count", 2048, "molmo2_video_count_eval", "countbench_qa"),
    **_tasks("tracking", 4096, "molmo2_video_track_eval", "mevis_eval", "ref_yt_vos_eval", "ref_davis17_eval",
             "reasonvos_eval"),
    **_tasks("caption", 2048, "molmo2_cap_eval"),
    **_tasks("vqa", 12, "coco_2014_vqa_test"),
    **_tasks("choice or words", 64, "mmmu"),
    **_tasks("choice", 32, "ai2d_test", "muir_bench", "mmiu", "blink", "mvbench", "tomato", "motionbench",
             "temp_compass", "perception_test_val", "ego_schema", "nextqa_mc_test", "video_mme", "video_mme_subtitles",
             "long_video_bench", "long_video_bench_subtitles", "lvbench", "mlvu_mc", "video_eval_pro_mc"),
    **_tasks("choice or words", 32, "real_world_qa"),
}  # fmt: skip


def find(name: str) -> Task:
    """A task by its name. Raises ValueError, with the nearest names, where there is none."""
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, n=3)
        words = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TASKS)}."
        raise ValueError(f"there is no task {name!r}; {words}")
    return TASKS[name]


def examples(shards: Shards, task: Task, limit: int = 0) -> list[Example]:
    """The task's samples, at most `limit` of them (0 = all): evenly spread, the same ones every time."""
    count = shards.count(task.data, task.split)
    if not count:
        raise ValueError(
            f"{shards.directory} has no samples of {task.data!r} in the split {task.split!r}; it has "
            f"{', '.join(f'{name} ({chr(32).join(shards.splits(name))})' for name in shards.datasets)}."
        )
    wanted = min(limit, count) if limit else count
    return [shards.example(task.data, task.split, index * count // wanted) for index in range(wanted)]


def with_other_images(samples: Sequence[Example]) -> list[Example]:
    """The same questions about other images: each sample gets the media (and clip) of one half a round away, in a fixed
    order."""
    order = list(range(len(samples)))
    generator("other images").shuffle(order)
    half = len(order) // 2
    other = {order[place]: order[(place + half) % len(order)] for place in range(len(order))}
    givers = [samples[other[place]] for place in range(len(samples))]
    return [
        dataclasses.replace(s, media=giver.media, clip=giver.clip) for s, giver in zip(samples, givers, strict=True)
    ]


def prompt(sample: Example, shards: Store, settings: TreeSettings) -> Prompt:
    """The sample's images, or its video, with the first question of each of its branches."""
    return asked(sample, shards, [question(sample, branch, settings) for branch in sample.branches], settings)


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


def question(sample: Example, branch: Branch, settings: TreeSettings) -> str:
    """The first question of a branch as the run's prompt format puts it.

    The length hint of pre-training says nothing of the true answer: the usual one for long answers, that of an empty
    answer (with training's noise) for short ones.
    """
    known = None if branch.style.endswith(LONG_STYLES) else ""
    rng = generator(settings.seed, sample.key, branch.style, branch.turns[0].prompt, "evaluation")
    rate = sample.clip.rate if sample.clip else 0
    return prompts.user_text(settings.prompts, branch.style, branch.turns[0], known, first=True, rng=rng, rate=rate)
