"""Samples made for benchmarks, as the trainer packs them into a row and as `transformers` pads them into a batch.

Random tokens and pixels; the real tilings, windows and vision tokens. Letters: b samples, s tokens of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megatron_vlm.batch import PAD, PREFIX_BRANCH, Batch
from megatron_vlm.config.architecture import VISION_TOKENS, Architecture
from megatron_vlm.config.geometry import ImageLayout, frame_layout, image_geometry, image_layout
from megatron_vlm.data.crops import video_windows, windows


@dataclass(frozen=True)
class Sample:
    """One prompt, perhaps with pictures, and its answer, which alone carries a loss."""

    tokens: np.ndarray
    """(s,) int64."""
    is_vision: np.ndarray
    """(s,) bool."""
    answer: int
    """Tokens at the end that are to be predicted."""
    crops: torch.Tensor
    """(c, p, d) uint8."""
    windows: np.ndarray
    """(n, w) int64, patches counted from the sample's first crop."""


class Maker:
    """Makes samples for an architecture, the same ones for a seed."""

    def __init__(self, arch: Architecture, seed: int = 0):
        self.arch, self.draw = arch, np.random.default_rng(seed)

    def text(self, length: int, answer: int) -> Sample:
        """A sample without pictures."""
        return self._sample([], 0, np.empty((0, 1), dtype=np.int64), length, answer)

    def image(self, width: int, height: int, text: int, answer: int, max_crops: int) -> Sample:
        """A picture of so many pixels, then `text` tokens, the last `answer` of which are the answer."""
        geometry = image_geometry(self.arch, max_crops)
        layout = image_layout(width, height, geometry)
        return self._sample(self._block(layout), layout.crops, windows(layout, geometry), text, answer)

    def video(self, frames: int, text: int, answer: int) -> Sample:
        """So many frames, each with a time of three tokens before it, then text."""
        geometry = image_geometry(self.arch, 0)
        block = []
        for _ in range(frames):
            block += [*self._words(3), *self._block(frame_layout(geometry))]
        return self._sample(block, frames, video_windows(frames, geometry), text, answer)

    def _words(self, count: int) -> list[int]:
        return self.draw.integers(0, self.arch.language.vocab_size, count).tolist()

    def _block(self, layout: ImageLayout) -> list[int]:
        ids = {name: self.arch.token_id(name) for name in VISION_TOKENS}
        rows, columns = layout.high_grid
        whole = [ids["<im_patch>"]] * (layout.global_grid[0] * layout.global_grid[1])
        block = [ids["<low_res_im_start>"], *whole, ids["<im_end>"]]
        if rows:
            high = ([ids["<im_patch>"]] * columns + [ids["<im_col>"]]) * rows
            block += [ids["<im_start>"], *high, ids["<im_end>"]]
        return block

    def _sample(self, block: list[int], crops: int, table: np.ndarray, text: int, answer: int) -> Sample:
        tokens = np.array([*self._words(1), *block, *self._words(text - 1)], dtype=np.int64)
        vision = self.arch.vision
        pixels = self.draw.integers(0, 256, (crops, vision.patches, vision.patch_values), dtype=np.uint8)
        special = [self.arch.token_id(name) for name in VISION_TOKENS]
        return Sample(tokens, np.isin(tokens, special), answer, torch.from_numpy(pixels), table)


def packed(arch: Architecture, rows: list[list[Sample]], length: int = 0) -> Batch:
    """Rows of samples, padded to `length` (default: to the longest row)."""
    length = length or max(sum(len(sample.tokens) for sample in row) for row in rows)

    def whole(values: Any, fill: float, dtype: torch.dtype) -> torch.Tensor:
        out = torch.full((len(rows), length), fill, dtype=dtype)
        for place, row in enumerate(rows):
            start = 0
            for number, sample in enumerate(row):
                stop = start + len(sample.tokens)
                out[place, start:stop] = torch.as_tensor(values(number, sample)).to(dtype)
                start = stop
        return out

    tables, crops = [np.empty((0, 1), dtype=np.int64)], 0
    flat = [sample for row in rows for sample in row]
    for sample in flat:
        if len(sample.crops):
            tables.append(np.where(sample.windows == PAD, PAD, sample.windows + crops * arch.vision.patches))
            crops += len(sample.crops)
    examples = whole(lambda number, sample: [number] * len(sample.tokens), PAD, torch.int32)
    return Batch(
        tokens=whole(lambda _, sample: sample.tokens, 0, torch.int64),
        targets=whole(lambda _, sample: np.roll(sample.tokens, -1) * (weights(sample) > 0), 0, torch.int64),
        loss_weights=whole(lambda _, sample: weights(sample), 0, torch.float32),
        positions=whole(lambda _, sample: np.arange(len(sample.tokens)), PAD, torch.int64),
        examples=examples,
        branches=whole(lambda _, sample: [PREFIX_BRANCH] * len(sample.tokens), PAD, torch.int32),
        is_vision=whole(lambda _, sample: sample.is_vision, False, torch.bool),
        sources=examples.clamp(max=0),
        crops=torch.cat([sample.crops for sample in flat]),
        crop_counts=(crops,),
        windows=torch.from_numpy(np.concatenate(tables[1:] or tables)),
        rows=torch.arange(len(rows)),
    )  # fmt: skip


def weights(sample: Sample) -> np.ndarray:
    """(s,) float32: 1 where the next token is one of the answer's."""
    found = np.zeros(len(sample.tokens), dtype=np.float32)
    found[-sample.answer - 1 : -1] = 1
    return found


def padded(arch: Architecture, samples: list[Sample], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Inputs and labels of transformers' Molmo2: one sample a row, padded at the end to the longest.

    Pixels are given as the processor gives them: normalised already.
    """
    made = packed(arch, [[sample] for sample in samples])
    labels = made.tokens.masked_fill(made.examples == PAD, -100)
    for line, sample in zip(labels, samples, strict=True):
        line[: len(sample.tokens) - sample.answer] = -100
    inputs = {
        "input_ids": made.tokens,
        "attention_mask": (made.examples != PAD).long(),
        "mm_token_type_ids": made.is_vision.long(),
        "labels": labels,
    }
    if len(made.crops):
        mean, std = (torch.tensor(x).repeat(arch.vision.patch_size**2) for x in (arch.vision.mean, arch.vision.std))
        inputs |= {
            "pixel_values": ((made.crops.float() / 255 - mean) / std).to(dtype),
            "image_token_pooling": made.windows,
            "image_grids": torch.tensor([[1, len(made.windows), 0, 0]]),
        }
    return inputs


def plain_text(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a text model takes of `padded`."""
    return {name: inputs[name] for name in ("input_ids", "attention_mask", "labels")}
