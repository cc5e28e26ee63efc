"""What a directory of shards holds, in numbers: from the columns beside the samples, without opening a tar."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_vlm.data.columns import mapped
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.writer import SAMPLE_SCHEMA

#: Samples of a split whose records are read for their styles, evenly spread.
READ_SAMPLES = 2000


@dataclass(frozen=True)
class Stats:
    """One data set's split."""

    dataset: str
    split: str
    samples: int
    branches: int
    media: int
    """Uses of images and videos by samples; a file that two samples use counts twice."""
    mean_characters: float
    """Of the records: text and what stands around it."""
    max_characters: int
    styles: dict[str, int]
    """Style -> branches, in the samples that were read (READ_SAMPLES)."""
    videos: int
    """Samples with a video among those that were read."""
    read: int


def stats(shards: Shards) -> list[Stats]:
    """Numbers of every data set and split, sorted by name."""
    return [_split_stats(shards, dataset, split) for dataset in shards.datasets for split in shards.splits(dataset)]


def _split_stats(shards: Shards, dataset: str, split: str) -> Stats:
    path = shards.directory / f"samples/{dataset}.{split}.arrow"
    table = mapped(path, SAMPLE_SCHEMA)
    counts = {name: table.column(name).to_numpy() for name in ("branches", "media", "characters")}
    samples = shards.count(dataset, split)
    chosen = np.unique(np.linspace(0, samples - 1, min(samples, READ_SAMPLES)).astype(int))
    examples = [shards.example(dataset, split, int(index)) for index in chosen]
    styles = Counter(branch.style for example in examples for branch in example.branches)
    return Stats(
        dataset,
        split,
        samples,
        int(counts["branches"].sum()),
        int(counts["media"].sum()),
        float(counts["characters"].mean()),
        int(counts["characters"].max()),
        dict(styles.most_common()),
        sum(example.video is not None for example in examples),
        len(examples),
    )
