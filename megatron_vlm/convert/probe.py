"""A built-in batch that exercises what conversion can get wrong: several tilings, several images, branches, a packed
row, text alone; and what two models answer to it.

Our model sees all examples packed into one row; transformers' sees every branch of every example by itself.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vlm.batch import PAD, PREFIX_BRANCH, Batch
from megatron_vlm.checkpoint import load
from megatron_vlm.config import load as config_load
from megatron_vlm.config.architecture import VISION_TOKENS, Architecture
from megatron_vlm.config.geometry import ImageLayout, image_geometry, image_layout
from megatron_vlm.config.schema import ParallelConfig
from megatron_vlm.data import crops
from megatron_vlm.model.build import build
from megatron_vlm.parallel.layout import Layout

#: Height and width of the images of each example, in sides of a crop; and its branches' lengths.
EXAMPLES: tuple[tuple[tuple[tuple[float, float], ...], tuple[int, ...]], ...] = (
    (((0.7, 0.8), (0.6, 1.9)), (9, 6)),
    ((), (12,)),
    (((1.7, 0.9),), (7, 5, 8)),
)
MOST_CROPS = 4


@dataclass(frozen=True)
class Sample:
    """An example of the batch."""

    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    layouts: tuple[ImageLayout, ...]
    crops: np.ndarray
    """(c, p, d) uint8."""
    windows: np.ndarray
    """(n, w) int64 into the sample's own patches, PAD in empty slots."""


@dataclass(frozen=True)
class Answer:
    """What a model says at every token of every branch: (k, vocabulary) float32, in the samples' order."""

    logits: torch.Tensor

    def losses(self, samples: Sequence[Sample]) -> torch.Tensor:
        """(k,) cross-entropy of the following token of the branch; of its first token at the last."""
        following = [number for s in samples for branch in s.branches for number in (*branch[1:], branch[0])]
        return torch.nn.functional.cross_entropy(self.logits, torch.tensor(following), reduction="none")


def samples(arch: Architecture, *, images: bool = True, seed: int = 0) -> list[Sample]:
    """The examples for a model. images: False = only those without."""
    random = np.random.default_rng(seed)
    geometry = image_geometry(arch, MOST_CROPS)
    made = []
    for sizes, lengths in EXAMPLES:
        if sizes and not images:
            continue
        prefix, layouts = [_word(arch, random)], []
        cut: list[np.ndarray] = []
        windows: list[np.ndarray] = []
        for height, width in sizes:
            pixels = _picture(round(height * geometry.crop_pixels), round(width * geometry.crop_pixels), random)
            layout = image_layout(pixels.shape[1], pixels.shape[0], geometry)
            first = sum(len(each) for each in cut) * arch.vision.patches
            table = crops.windows(layout, geometry)
            windows.append(np.where(table == PAD, PAD, table + first))
            cut.append(crops.cut(pixels, layout, geometry))
            layouts.append(layout)
            prefix += [_word(arch, random), *_image_tokens(arch, layout)]
        shape = (arch.vision.patches, arch.vision.patch_values)
        made.append(
            Sample(
                tuple(prefix),
                tuple(tuple(_word(arch, random) for _ in range(length)) for length in lengths),
                tuple(layouts),
                np.concatenate(cut) if cut else np.empty((0, *shape), np.uint8),
                np.concatenate(windows) if windows else np.empty((0, 1), np.int64),
            )
        )
    return made


def _word(arch: Architecture, random: np.random.Generator) -> int:
    return int(random.integers(arch.language.vocab_size))


def _picture(height: int, width: int, random: np.random.Generator) -> np.ndarray:
    """Large blobs of colour, so that neighbouring patches are alike and far ones are not."""
    blobs = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return crops.resize(blobs, height, width)


def _image_tokens(arch: Architecture, layout: ImageLayout) -> list[int]:
    patch, end = arch.token_id("<im_patch>"), arch.token_id("<im_end>")
    tokens = [arch.token_id("<low_res_im_start>"), *[patch] * (layout.global_grid[0] * layout.global_grid[1]), end]
    rows, columns = layout.high_grid
    row = [*[patch] * columns, arch.token_id("<im_col>")]
    return [*tokens, arch.token_id("<im_start>"), *row * rows, end] if rows else tokens


def packed(arch: Architecture, chosen: Sequence[Sample]) -> tuple[Batch, torch.Tensor]:
    """All samples as one row, and the places of the tokens of their branches."""
    tokens: list[int] = []
    positions: list[int] = []
    branches: list[int] = []
    examples: list[int] = []
    windows, patches = [], 0
    width = max(sample.windows.shape[1] for sample in chosen)
    for number, sample in enumerate(chosen):
        start = len(sample.prefix)
        for branch, ids in [(PREFIX_BRANCH, sample.prefix), *enumerate(sample.branches)]:
            tokens += ids
            positions += range(start, start + len(ids)) if branch != PREFIX_BRANCH else range(len(ids))
            branches += [branch] * len(ids)
        examples += [number] * (len(tokens) - len(examples))
        table = np.where(sample.windows == PAD, PAD, sample.windows + patches)
        windows.append(np.pad(table, ((0, 0), (0, width - table.shape[1])), constant_values=PAD))
        patches += sample.crops.shape[0] * sample.crops.shape[1]
    ids, branch = torch.tensor(tokens)[None], torch.tensor(branches, dtype=torch.int32)[None]
    pixels = np.concatenate([sample.crops for sample in chosen])
    batch = Batch(
        tokens=ids,
        targets=torch.zeros_like(ids),
        loss_weights=torch.zeros(ids.shape),
        positions=torch.tensor(positions)[None],
        examples=torch.tensor(examples, dtype=torch.int32)[None],
        branches=branch,
        is_vision=torch.isin(ids, torch.tensor([arch.token_id(name) for name in VISION_TOKENS])),
        sources=torch.zeros(ids.shape, dtype=torch.int32),
        crops=torch.from_numpy(pixels),
        crop_counts=(len(pixels),),
        windows=torch.from_numpy(np.concatenate(windows).astype(np.int64)),
        rows=torch.zeros(1, dtype=torch.int64),
    )
    return batch, (branch[0] != PREFIX_BRANCH).nonzero()[:, 0]


def ours(checkpoint: str | Path, chosen: Sequence[Sample]) -> Answer:
    """What the model of a checkpoint answers, in float32. Groups of one process exist (see importing.alone)."""
    record = load.read(checkpoint)
    config = config_load.from_dict(record.config, f"in the checkpoint {record.path}")
    train = dataclasses.replace(config.train, precision="float32", recompute="none")
    config = dataclasses.replace(config, parallel=ParallelConfig(), train=train)
    (model,) = build(config, Layout(1))
    load.load(record.path, models=[model], config=config)
    batch, places = packed(model.arch, chosen)
    with torch.no_grad():
        return Answer(model.eval()(batch, logits_at=places))


def theirs(folder: str | Path, arch: Architecture, chosen: Sequence[Sample]) -> Answer:
    """What transformers' model of a folder answers, in float32. ValueError where transformers is not installed."""
    transformers = _transformers()
    kind = transformers.AutoModelForImageTextToText if any(s.layouts for s in chosen) else None
    if kind is None:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        molmo2 = config.model_type == "molmo2"
        kind = transformers.AutoModelForImageTextToText if molmo2 else transformers.AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        return Answer(torch.cat([_alone(model, arch, sample, ids) for sample in chosen for ids in sample.branches]))


def _transformers() -> Any:
    """transformers, without the torchvision that only its image processors want: beside a torch of another build,
    importing that fails."""
    hidden = "transformers" not in sys.modules and "torchvision" not in sys.modules
    if hidden:
        sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        import transformers
    except ImportError:
        raise ValueError(
            "--logits runs Hugging Face folders by transformers: pip install 'transformers>=5.23'."
        ) from None
    finally:
        if hidden:
            del sys.modules["torchvision"]
    return transformers


def _alone(model: Any, arch: Architecture, sample: Sample, branch: tuple[int, ...]) -> torch.Tensor:
    """Logits (tokens of the branch, vocabulary) of one branch after its prefix."""
    ids = torch.tensor([*sample.prefix, *branch])[None]
    inputs: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if sample.layouts:
        vision = torch.tensor([arch.token_id(name) for name in VISION_TOKENS])
        mean, std = (
            torch.tensor(value).repeat(arch.vision.patch_values // 3) for value in (arch.vision.mean, arch.vision.std)
        )
        inputs |= {
            "mm_token_type_ids": torch.isin(ids, vision).long(),
            "pixel_values": (torch.from_numpy(sample.crops).float() / 255 - mean) / std,
            "image_token_pooling": torch.from_numpy(sample.windows),
            "image_grids": torch.tensor([[*layout.global_grid, *layout.high_grid] for layout in sample.layouts]),
            "image_num_crops": torch.tensor([layout.crops for layout in sample.layouts]),
        }
    return model(**inputs).logits[0, len(sample.prefix) :].float()
