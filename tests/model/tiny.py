"""A model and packed rows small enough for tests, with every feature of a row: several images, branches, padding."""

from __future__ import annotations

import dataclasses
import random

import torch

from megatron_vlm.batch import PAD, PREFIX_BRANCH, Batch
from megatron_vlm.config import presets
from megatron_vlm.config.architecture import (
    Architecture,
    ConnectorArchitecture,
    LanguageArchitecture,
    VisionArchitecture,
)
from megatron_vlm.config.schema import Config, ModelConfig, ParallelConfig, TrainConfig
from megatron_vlm.parallel.split import even_counts, offsets

VISION = VisionArchitecture(
    image_size=56, patch_size=14, width=32, heads=2, mlp=48, layers=3, activation="gelu_tanh", norm_eps=1e-6,
    class_token=False, pre_norm=False, post_norm=True, patch_bias=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
)  # fmt: skip
CONNECTOR = ConnectorArchitecture(
    kind="attention_pooling", taps=(2, 0), image_pool=2, video_pool=3, width=32, heads=2, mlp=48, queries=0, layers=0,
)  # fmt: skip
LANGUAGE = LanguageArchitecture(
    hidden=48, layers=4, heads=4, kv_heads=2, head_dim=16, mlp=80, vocab_size=160, new_rows=16, tied_head=False,
    rope_theta=1e4, norm_eps=1e-6, qk_norm=True, qkv_bias=False, max_positions=512,
)  # fmt: skip
ARCH = Architecture(VISION, CONNECTOR, LANGUAGE)
TIED = dataclasses.replace(ARCH, language=dataclasses.replace(LANGUAGE, tied_head=True))
QWEN2_5 = dataclasses.replace(ARCH, language=dataclasses.replace(LANGUAGE, qk_norm=False, qkv_bias=True))


def connector(kind: str, queries: int = 3, layers: int = 1) -> Architecture:
    """ARCH with another connector; queries and layers: of a resampler."""
    resampler = kind == "resampler"
    changed = dataclasses.replace(CONNECTOR, kind=kind, queries=queries * resampler, layers=layers * resampler)
    return dataclasses.replace(ARCH, connector=changed)


def config(
    arch: Architecture,
    *,
    freeze: tuple[str, ...] = (),
    parallel: dict | None = None,
    sections: dict | None = None,
    **train,
) -> Config:
    """Settings for a model of `arch`, which becomes the preset `test`. `sections`: whole sections of settings."""
    presets.PRESETS["test"] = arch
    return Config(
        model=ModelConfig(preset="test", freeze=freeze),
        parallel=ParallelConfig(**(parallel or {})),
        train=TrainConfig(**{"logit_chunk": 7, "seed": 1, **train}),
        **(sections or {}),
    )


@dataclasses.dataclass
class Row:
    """One packed row as lists, and its images: the crops, and windows of patches counted inside the row."""

    tokens: list[int]
    targets: list[int]
    loss_weights: list[float]
    positions: list[int]
    examples: list[int]
    branches: list[int]
    is_vision: list[bool]
    crops: list[torch.Tensor]
    windows: list[list[int]]


def row(arch: Architecture, number: int, length: int = 96) -> Row:
    """Row `number`, the same wherever it is made: examples with 2, 0 and 1 images, branches, then padding."""
    made = Row([], [], [], [], [], [], [], [], [])
    choose = random.Random(number)
    for example, (images, branches) in enumerate([(2, 3), (0, 1), (1, 2), (0, 3)]):
        room = length - choose.randint(1, 6) - len(made.tokens)
        start, crops = len(made.tokens), len(made.crops)
        _prefix(arch, made, choose, images)
        prefix = len(made.tokens) - start
        for branch in range(branches):
            for step in range(choose.randint(2, 7)):
                made.tokens.append(choose.randrange(arch.language.vocab_size))
                made.is_vision.append(False)
                made.positions.append(prefix + step)
                made.branches.append(branch)
                made.loss_weights.append(choose.choice([0.0, 0.5, 1.0]))
        if len(made.tokens) - start > room:
            _cut(made, start, crops)
            break
        made.examples += [example] * (len(made.tokens) - start)
    for name, value in {"tokens": 0, "loss_weights": 0.0, "positions": PAD, "examples": PAD, "branches": PAD}.items():
        made.__dict__[name] += [value] * (length - len(made.__dict__[name]))
    made.is_vision += [False] * (length - len(made.is_vision))
    made.targets = [choose.randrange(arch.language.vocab_size) if w else 0 for w in made.loss_weights]
    return made


def _prefix(arch: Architecture, made: Row, choose: random.Random, images: int) -> None:
    """A first token, then images of one to three crops; the second window of an image spans two of its crops."""
    tokens: list[tuple[int, bool]] = [(choose.randrange(arch.language.vocab_size), False)]
    for _ in range(images):
        tokens.append((arch.token_id("<im_start>"), True))
        first, crops = len(made.crops) * arch.vision.patches, choose.randint(1, 3)
        for _ in range(crops):
            seed = choose.randrange(1 << 30)
            shape = (arch.vision.patches, arch.vision.patch_values)
            crop = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
            made.crops.append(crop)
        for place in range((arch.connector.queries or 3) * crops):
            tokens.append((arch.token_id("<im_patch>"), True))
            if place % 4 == 3:
                tokens.append((arch.token_id("<im_col>"), True))
        made.windows += _windows(arch, first, crops)
        tokens.append((arch.token_id("<im_end>"), True))
        tokens.append((choose.randrange(arch.language.vocab_size), False))
    for position, (token, vision) in enumerate(tokens):
        made.tokens.append(token)
        made.is_vision.append(vision)
        made.positions.append(position)
        made.branches.append(PREFIX_BRANCH)
        made.loss_weights.append(0.0)


def _windows(arch: Architecture, first: int, crops: int) -> list[list[int]]:
    """Patches of the windows of an image whose first patch is `first`."""
    patches = arch.vision.patches
    if arch.connector.kind == "resampler":  # a window is a crop
        return [list(range(first + patches * crop, first + patches * (crop + 1))) for crop in range(crops)]
    places = [first + 4 * window for window in range(3 * crops)]
    made = [[at, at + 1, at + 4 if window % 3 == 1 else PAD, at + 5] for window, at in enumerate(places)]
    if crops > 1:
        made[1] = [first + 3, first + patches, PAD, PAD]
    return made


def _cut(made: Row, tokens: int, crops: int) -> None:
    """Take back an example that does not fit."""
    for name in ("tokens", "is_vision", "positions", "branches", "loss_weights"):
        del made.__dict__[name][tokens:]
    patches = made.crops[0].shape[0] if made.crops else 1
    del made.crops[crops:]
    made.windows = [window for window in made.windows if max(window) < crops * patches]


def batch(arch: Architecture, numbers: list[int], crop_rank: int = 0, crop_ranks: int = 1, length: int = 96) -> Batch:
    """A micro-batch of the rows `numbers`, with the crops of one rank of the TP x CP group."""
    return join(arch, [row(arch, number, length) for number in numbers], numbers, crop_rank, crop_ranks)


def join(arch: Architecture, rows: list[Row], numbers: list[int], crop_rank: int = 0, crop_ranks: int = 1) -> Batch:
    """Rows of one length as a micro-batch."""
    crops: list[torch.Tensor] = []
    windows: list[list[int]] = []
    for each in rows:
        shift = len(crops) * arch.vision.patches
        windows += [[index if index == PAD else index + shift for index in window] for window in each.windows]
        crops += each.crops
    counts = even_counts(len(crops), crop_ranks)
    start = offsets(counts)[crop_rank]
    own = crops[start : start + counts[crop_rank]]
    empty = torch.empty(0, arch.vision.patches, arch.vision.patch_values, dtype=torch.uint8)

    def whole(name: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([getattr(each, name) for each in rows], dtype=dtype)

    return Batch(
        tokens=whole("tokens", torch.int64),
        targets=whole("targets", torch.int64),
        loss_weights=whole("loss_weights", torch.float32),
        positions=whole("positions", torch.int64),
        examples=whole("examples", torch.int32),
        branches=whole("branches", torch.int32),
        is_vision=whole("is_vision", torch.bool),
        sources=whole("examples", torch.int32).clamp(max=0),
        crops=torch.stack(own) if own else empty,
        crop_counts=counts,
        windows=torch.tensor(windows, dtype=torch.int64).reshape(-1, len(windows[0]) if windows else 4),
        rows=torch.tensor(numbers),
    )
