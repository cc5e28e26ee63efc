"""A sample -> tokens, targets, loss weights, positions and branches. Needs the sizes of its images, not their pixels.

    BOS, image blocks | branch 0 | branch 1 | ...

Every branch sees the prefix and itself; its positions go on where the prefix ends. Each branch predicts EOS after its
last answer, though no branch holds that EOS as an input. With one branch this is the plain sequence.
s tokens of the sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.config.geometry import ImageGeometry, ImageLayout, image_layout
from megatron_vlm.data import points, prompts
from megatron_vlm.data.example import Branch, Example, Points
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.tokens import Tokenizer

WEIGHTINGS = ("uniform", "root_subsegments", "root_tokens")


@dataclass(frozen=True)
class TokenizedExample:
    """A sample without its pixels. Arrays are (s,); fields as in Batch, PAD does not occur."""

    tokens: np.ndarray
    """int64."""
    targets: np.ndarray
    """int64; 0 where the weight is 0."""
    loss_weights: np.ndarray
    """float32."""
    positions: np.ndarray
    """int64."""
    branches: np.ndarray
    """int32."""
    is_vision: np.ndarray
    """bool."""
    layouts: tuple[ImageLayout, ...]
    """One for each image."""
    dropped_branches: int
    """Branches left out because their first answer would begin beyond the longest row."""
    cut_tokens: int
    """Tokens cut at the longest row."""

    @property
    def crops(self) -> int:
        return sum(layout.crops for layout in self.layouts)


@dataclass(frozen=True)
class TreeSettings:
    """How samples become tokens: the same for all samples of a run."""

    tokenizer: Tokenizer
    geometry: ImageGeometry
    prompts: str
    """One of prompts.FORMATS."""
    loss_weighting: str
    """One of WEIGHTINGS."""
    max_tokens: int
    """Longest sample; text beyond it is cut."""
    max_crops: int
    """Most crops of a sample."""
    seed: int

    def __post_init__(self) -> None:
        for name, value, known in (
            ("prompts", self.prompts, prompts.FORMATS),
            ("loss_weighting", self.loss_weighting, WEIGHTINGS),
        ):
            if value not in known:
                raise ValueError(f"data.{name}={value!r} does not exist; choose one of {', '.join(known)}.")


def tokenize(
    example: Example, dataset: str, visit: int, settings: TreeSettings, flat_weight: float | None = None
) -> TokenizedExample:
    """The sample as its `visit`-th visit makes it: random choices are keyed by seed, data set, sample and visit.

    flat_weight: weight of each loss token, instead of the settings' weighting.
    Raises ValueError, naming the sample, where its images or the beginning of its first answer do not fit.
    """
    identity = (settings.seed, dataset, example.key, visit)
    layouts = tuple(image_layout(media.width, media.height, settings.geometry) for media in example.media)
    prefix = prefix_tokens(layouts, settings.tokenizer)[0]
    order = list(range(len(example.branches)))
    if len(order) > 1:
        generator(*identity, "branches").shuffle(order)
    parts: list[tuple[list[int], list[bool]]] = []
    length, dropped = len(prefix), 0
    for place in order:
        tokens, is_answer = branch_tokens(example, example.branches[place], identity + (place,), settings)
        first_loss = is_answer.index(True) - 1
        if parts and length + first_loss >= settings.max_tokens:
            dropped += 1
            continue
        if not parts:
            _check_fit(
                f"{dataset}/{example.key}", length, first_loss, sum(layout.crops for layout in layouts), settings
            )
        parts.append((tokens, is_answer))
        length += len(tokens)
    return _assemble(parts, layouts, dropped, settings, flat_weight)


@lru_cache(maxsize=4096)
def prefix_tokens(layouts: tuple[ImageLayout, ...], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """BOS and the blocks of the images; several images are announced by `Image 1`, `Image 2`, ...

    Ids (int64), and which of them belong to a bidirectional image block (bool). Shared: not to be written to.
    """
    tokens = [tokenizer.bos]
    for number, layout in enumerate(layouts, start=1):
        if len(layouts) > 1:
            tokens.extend(tokenizer.encode_fixed(f"Image {number}"))
        tokens.extend(image_tokens(layout, tokenizer))
    return np.asarray(tokens, dtype=np.int64), np.isin(tokens, list(tokenizer.vision_ids))


def image_tokens(layout: ImageLayout, tokenizer: Tokenizer) -> list[int]:
    """The block of one image: global crop, then the rows of the canvas, each closed by `<im_col>`."""
    patch, end = tokenizer.im_patch, tokenizer.new_token("<im_end>")
    down, across = layout.global_grid
    tokens = [tokenizer.new_token("<low_res_im_start>"), *[patch] * (down * across), end]
    rows, columns = layout.high_grid
    if rows:
        tokens.append(tokenizer.new_token("<im_start>"))
        tokens.extend(([patch] * columns + [tokenizer.new_token("<im_col>")]) * rows)
        tokens.append(end)
    return tokens


def branch_tokens(
    example: Example, branch: Branch, identity: tuple[object, ...], settings: TreeSettings
) -> tuple[list[int], list[bool]]:
    """Ids of one conversation and, for each, whether it belongs to an answer. The last EOS is not among them."""
    tokenizer, rng = settings.tokenizer, generator(*identity, "prompt")
    seconds = any(media.kind == "video" for media in example.media)
    tokens: list[int] = []
    is_answer: list[bool] = []
    for number, turn in enumerate(branch.turns):
        answer = turn.answer
        if isinstance(answer, Points):
            separator = points.SEPARATORS[settings.prompts]
            answer = points.write(answer, branch.style, separator=separator, seconds=seconds)
        text = prompts.user_text(settings.prompts, branch.style, turn, answer, first=number == 0, rng=rng)
        asked = tokenizer.user_turn(text, first=number == 0)
        said = tokenizer.encode(answer)
        if number + 1 < len(branch.turns):
            said = [*said, tokenizer.eos]
        tokens += asked + said
        is_answer += [False] * len(asked) + [True] * len(said)
    return tokens, is_answer


def prompt_tokens(example: Example, branch: Branch, settings: TreeSettings) -> TokenizedExample:
    """What generation starts from: the images and the first turn of `branch`, up to where the answer begins.

    All loss weights are 0. Random choices (paraphrases) are keyed by seed and sample. The crops and windows belong to
    `layouts`, as in training.
    """
    layouts = tuple(image_layout(media.width, media.height, settings.geometry) for media in example.media)
    prefix = prefix_tokens(layouts, settings.tokenizer)[0]
    rng = generator(settings.seed, example.key, "generation")
    text = prompts.user_text(settings.prompts, branch.style, branch.turns[0], None, first=True, rng=rng)
    tokens = settings.tokenizer.user_turn(text, first=True)
    _check_fit(example.key, len(prefix), len(tokens), sum(layout.crops for layout in layouts), settings)
    return _assemble([(tokens, [False] * len(tokens))], layouts, 0, settings, 0.0)


def _check_fit(name: str, prefix: int, first_loss: int, crops: int, settings: TreeSettings) -> None:
    if prefix + first_loss >= settings.max_tokens:
        raise ValueError(
            f"sample {name}: its images take {prefix} tokens and its question {first_loss}, so no answer fits into "
            f"rows of {settings.max_tokens}. Raise data.sequence_length or lower data.image_crops."
        )
    if crops > settings.max_crops:
        raise ValueError(
            f"sample {name} has {crops} crops; a row holds {settings.max_crops}. Raise data.max_crops or lower "
            "data.image_crops."
        )


def _assemble(
    parts: list[tuple[list[int], list[bool]]],
    layouts: tuple[ImageLayout, ...],
    dropped: int,
    settings: TreeSettings,
    flat_weight: float | None,
) -> TokenizedExample:
    prefix, prefix_vision = prefix_tokens(layouts, settings.tokenizer)
    length = len(prefix) + sum(len(tokens) for tokens, _ in parts)
    tokens = np.empty(length, dtype=np.int64)
    targets = np.zeros(length, dtype=np.int64)
    weights = np.zeros(length, dtype=np.float32)
    positions = np.empty(length, dtype=np.int64)
    branches = np.full(length, PREFIX_BRANCH, dtype=np.int32)
    tokens[: len(prefix)] = prefix
    positions[: len(prefix)] = np.arange(len(prefix))
    start = len(prefix)
    for number, (ids, is_answer) in enumerate(parts):
        stop = start + len(ids)
        tokens[start:stop] = ids
        positions[start:stop] = np.arange(len(prefix), len(prefix) + len(ids))
        branches[start:stop] = number
        # A place predicts the next token of its branch, the last one EOS.
        predicts_answer = np.asarray([*is_answer[1:], is_answer[-1]])
        following = np.asarray([*ids[1:], settings.tokenizer.eos], dtype=np.int64)
        targets[start:stop] = np.where(predicts_answer, following, 0)
        weights[start:stop] = predicts_answer * _token_weight(
            int(predicts_answer.sum()), len(parts), settings, flat_weight
        )
        start = stop
    kept = min(length, settings.max_tokens)
    # Text after the prefix is plain text, so it holds no token of an image block.
    vision = np.zeros(length, dtype=bool)
    vision[: len(prefix)] = prefix_vision
    return TokenizedExample(
        tokens=tokens[:kept],
        targets=targets[:kept],
        loss_weights=weights[:kept],
        positions=positions[:kept],
        branches=branches[:kept],
        is_vision=vision[:kept],
        layouts=layouts,
        dropped_branches=dropped,
        cut_tokens=length - kept,
    )


def _token_weight(predictions: int, branches: int, settings: TreeSettings, flat: float | None) -> float:
    """Weight of one loss token of a branch with so many of them, in a sample with so many branches."""
    if flat is not None:
        return flat
    if settings.loss_weighting == "uniform":
        return 1.0
    weight = 1 / math.sqrt(branches)
    if settings.loss_weighting == "root_tokens":
        # Molmo2 does not count the last EOS where there are several branches; it inherits the weight before it.
        counted = predictions - (branches > 1)
        weight *= 2 / math.sqrt(max(1, counted))
    return weight
