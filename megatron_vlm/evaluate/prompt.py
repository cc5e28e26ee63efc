"""Prompts, and the rows that they make: what decode.py asks a model.

Questions about one image share it: they are branches of one example, and several examples are packed into a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_vlm.batch import PREFIX_BRANCH, Batch
from megatron_vlm.data.crops import stacked
from megatron_vlm.data.tokens import Tokenizer
from megatron_vlm.parallel.split import even_counts, offsets


@dataclass(frozen=True)
class Prompt:
    """What several questions share, and the questions."""

    prefix: Sequence[int]
    """BOS and the image's block."""
    questions: Sequence[Sequence[int]]
    """Ids of each question, up to where its answer begins."""
    crops: np.ndarray
    """(c, p, d) uint8."""
    windows: np.ndarray
    """(n, w) int64 into the prompt's own crops, PAD in empty slots."""


@dataclass
class Running:
    """A prompt whose answers are being written. `open`: questions without an end yet."""

    prompt: Prompt
    answers: list[list[int]]
    open: list[int]
    features: torch.Tensor | None = None
    """(placeholders, hidden), once the prompt is running."""

    def ids(self, question: int) -> list[int]:
        """Prefix, question and answer so far."""
        return [*self.prompt.prefix, *self.prompt.questions[question], *self.answers[question]]

    def position(self, question: int) -> int:
        """Of the answer's last token."""
        return len(self.prompt.prefix) + len(self.prompt.questions[question]) + len(self.answers[question]) - 1

    def tokens(self) -> int:
        """That a row needs."""
        return len(self.prompt.prefix) + sum(len(self.prompt.questions[q]) + len(self.answers[q]) for q in self.open)


def encode(model: Any, items: Sequence[Running], tokenizer: Tokenizer, device: torch.device | str) -> None:
    """Give each item its features; all items of a round go through the tower together, dealt to the crop ranks.

    model: a VlmModel with the first stage.
    """
    if not items:
        return
    batch, _ = row(items, tokenizer, pixels=True)
    ranks, rank = model.crop_group.size(), model.crop_group.rank()
    counts = even_counts(len(batch.crops), ranks)
    first = offsets(counts)[rank]
    batch = dataclasses.replace(batch, crops=batch.crops[first : first + counts[rank]], crop_counts=tuple(counts))
    placeholders = [list(item.prompt.prefix).count(tokenizer.im_patch) for item in items]
    for item, features in zip(items, model.encode(batch.to(device)).split(placeholders), strict=True):
        item.features = features


def row(items: Sequence[Running], tokenizer: Tokenizer, *, pixels: bool = False) -> tuple[Batch, list[int]]:
    """One row of all items, with or without their crops, and the places of the last token of every open answer."""
    tokens: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    examples: list[int] = []
    ends: list[int] = []
    for number, item in enumerate(items):
        prefix = list(item.prompt.prefix)
        tokens += prefix
        positions += range(len(prefix))
        branches += [PREFIX_BRANCH] * len(prefix)
        for question in item.open:
            said = [*item.prompt.questions[question], *item.answers[question]]
            tokens += said
            positions += range(len(prefix), len(prefix) + len(said))
            branches += [question] * len(said)
            ends.append(len(tokens) - 1)
        examples += [number] * (len(tokens) - len(examples))
    ids = torch.tensor(tokens)[None]
    crops = [item.prompt.crops if pixels else item.prompt.crops[:0] for item in items]
    tables = [item.prompt.windows if pixels else item.prompt.windows[:0] for item in items]
    windows = stacked(tables, [len(each) * each.shape[1] for each in crops])
    batch = Batch(
        tokens=ids,
        targets=torch.zeros_like(ids),
        loss_weights=torch.zeros(ids.shape),
        positions=torch.tensor(positions)[None],
        examples=torch.tensor(examples, dtype=torch.int32)[None],
        branches=torch.tensor(branches, dtype=torch.int32)[None],
        is_vision=torch.isin(ids, torch.tensor(sorted(tokenizer.vision_ids))),
        sources=torch.zeros(ids.shape, dtype=torch.int32),
        crops=torch.from_numpy(np.concatenate(crops)),
        crop_counts=(sum(map(len, crops)),),
        windows=torch.from_numpy(windows),
        rows=torch.zeros(1, dtype=torch.int64),
    )
    return batch, ends
