"""Greedy answers to questions about images: each round predicts one more token of every open answer.

The plain way: images are encoded once, the decoder has no cache and reads everything again each round. decode.py, which
the tools use, is held against it token for token, and shares its prompts and rows.

Questions about one image share it: they are branches of one example, so one forward serves them all, and several
examples are packed into a row. Finished answers leave the row, waiting examples take their place. One process only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_vlm.batch import PAD, PREFIX_BRANCH, Batch
from megatron_vlm.data.tokens import Tokenizer


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


def generate(
    model: torch.nn.Module,
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    max_new_tokens: int,
    row_tokens: int = 4096,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda finished: None,
) -> list[list[list[int]]]:
    """Answers by prompt and question, as ids without the end of sequence.

    model:      a whole VlmModel (no pipeline, no context parallelism).
    row_tokens: most tokens in a forward pass; an example longer than that gets a pass of its own.
    progress:   told the number of prompts just finished.
    """
    answers: list[list[list[int]]] = [[[] for _ in prompt.questions] for prompt in prompts]
    waiting = [Running(prompt, said, list(range(len(said)))) for prompt, said in zip(prompts, answers, strict=True)][
        ::-1
    ]
    running: list[Running] = []
    model.eval()
    with torch.no_grad():
        while waiting or running:
            used = sum(item.tokens() for item in running)
            fresh: list[Running] = []
            while waiting and (not running and not fresh or used + waiting[-1].tokens() <= row_tokens):
                fresh.append(waiting.pop())
                used += fresh[-1].tokens()
            encode(model, fresh, tokenizer, device)
            running += fresh
            batch, ends = row(running, tokenizer)
            images = torch.cat([item.features for item in running if item.features is not None])
            logits = model(batch.to(device), logits_at=torch.tensor(ends, device=device), images=images)
            following = iter(logits.argmax(dim=-1).tolist())
            for item in running:
                for question in list(item.open):
                    token = next(following)
                    if token != tokenizer.eos:
                        item.answers[question].append(token)
                    if token == tokenizer.eos or len(item.answers[question]) >= max_new_tokens:
                        item.open.remove(question)
            done = [item for item in running if not item.open]
            running = [item for item in running if item.open]
            progress(len(done))
    return answers


def encode(model: torch.nn.Module, items: Sequence[Running], tokenizer: Tokenizer, device: torch.device | str) -> None:
    """Give each item its features; all items of a round go through the tower together."""
    if not items:
        return
    batch, _ = row(items, tokenizer, pixels=True)
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
    windows, first_patch = [], 0
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
        table = item.prompt.windows if pixels else item.prompt.windows[:0]
        windows.append(np.where(table == PAD, PAD, table + first_patch))
        first_patch += item.prompt.crops.shape[0] * item.prompt.crops.shape[1]
    ids = torch.tensor(tokens)[None]
    crops = np.concatenate([item.prompt.crops if pixels else item.prompt.crops[:0] for item in items])
    batch = Batch(
        tokens=ids,
        targets=torch.zeros_like(ids),
        loss_weights=torch.zeros(ids.shape),
        positions=torch.tensor(positions)[None],
        examples=torch.tensor(examples, dtype=torch.int32)[None],
        branches=torch.tensor(branches, dtype=torch.int32)[None],
        is_vision=torch.isin(ids, torch.tensor(sorted(tokenizer.vision_ids))),
        sources=torch.zeros(ids.shape, dtype=torch.int32),
        crops=torch.from_numpy(crops),
        crop_counts=(len(crops),),
        windows=torch.from_numpy(_stacked(windows)),
        rows=torch.zeros(1, dtype=torch.int64),
    )
    return batch, ends


def _stacked(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Window tables below each other, padded to the widest."""
    width = max(table.shape[1] for table in tables)
    return np.concatenate(
        [np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=PAD) for table in tables]
    ).astype(np.int64)
