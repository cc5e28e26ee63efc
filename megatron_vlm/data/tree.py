"""A sample -> tokens, targets, loss weights, positions and branches. Needs the sizes of its media, not their pixels.

    BOS, image or frame blocks | branch 0 | branch 1 | ...

Every branch sees the prefix and itself; its positions go on where the prefix ends. Each branch predicts EOS after its
last answer, though no branch holds that EOS as an input. With one branch this is the plain sequence.
s tokens of the sample.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.geometry import (
    ImageGeometry,
    Layout,
    VideoLayout,
    image_geometry,
    image_layout,
)
from megatron_vlm.config.rules import CHOICES
from megatron_vlm.config.schema import DataConfig
from megatron_vlm.data import points, prompts
from megatron_vlm.data.example import Branch, Example, Points, Tracks
from megatron_vlm.data.frames import video_layout
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.prefix import prefix_tokens, with_room
from megatron_vlm.data.tokens import USER, Tokenizer


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
    layouts: tuple[Layout, ...]
    """One for each image or video."""
    dropped_branches: int
    """Branches left out because their first answer would begin beyond the longest row."""
    cut_tokens: int
    """Tokens cut at the longest row, and those of subtitles for which it has no room."""
    dropped_images: int = 0
    """Images left out because the sample has more than `data.max_images`."""

    @property
    def crops(self) -> int:
        return sum(layout.crops for layout in self.layouts)


@dataclass(frozen=True)
class TreeSettings:
    """How samples become tokens: the same for all samples of a run."""

    tokenizer: Tokenizer
    geometry: ImageGeometry
    prompts: str
    """See prompts.py."""
    loss_weighting: str
    """As data.loss_weighting."""
    max_tokens: int
    """Longest sample; text beyond it is cut."""
    max_crops: int
    """Most crops of a sample."""
    seed: int
    max_images: int = 0
    """Most images of a sample, further ones are left out; 0 = no limit."""
    multi_image_crops: int = 0
    """Most high-resolution crops of each of several images; 0 = as of one."""
    max_frames: int = 0
    """Most frames of a video; 0 = max_crops."""
    frames_per_second: float = 2.0
    """Frames taken of a second of video, if they are not too many."""
    high_resolution_crops: int = 0
    """Most high-resolution crops of a single image in visits of high resolution."""

    @classmethod
    def of(cls, data: DataConfig, tokenizer: Tokenizer, arch: Architecture) -> TreeSettings:
        """As a run has them."""
        return cls(
            tokenizer=tokenizer,
            geometry=image_geometry(arch, data.image_crops),
            prompts=data.prompts,
            loss_weighting=data.loss_weighting,
            max_tokens=data.sequence_length,
            max_crops=data.max_crops,
            seed=data.seed,
            max_images=data.max_images,
            multi_image_crops=data.multi_image_crops,
            max_frames=data.max_frames,
            frames_per_second=data.frames_per_second,
            high_resolution_crops=data.high_resolution_crops,
        )

    def __post_init__(self) -> None:
        for name, value in (("data.prompts", self.prompts), ("data.loss_weighting", self.loss_weighting)):
            if value not in CHOICES[name]:
                raise ValueError(f"{name}={value!r} does not exist; choose one of {', '.join(CHOICES[name])}.")


@dataclass(frozen=True)
class Written:
    """A sample as text: everything is drawn, only ids are missing, so that those of many samples are made at once."""

    name: str
    """data set/key."""
    media: tuple[str, ...]
    """Keys of the images that are shown, or of the video."""
    layouts: tuple[Layout, ...]
    conversations: tuple[tuple[str, ...], ...]
    """Of each branch, in the order drawn: what the user says, the answer, what the user says, ..."""
    branch_weights: tuple[float, ...]
    dropped_images: int

    @property
    def texts(self) -> list[str]:
        """What is to be encoded, in the order in which `with_ids` takes it."""
        return [text for conversation in self.conversations for text in conversation]


def tokenize(
    example: Example,
    dataset: str,
    visit: int,
    settings: TreeSettings,
    flat_weight: float | None = None,
    high_resolution: float = 0.0,
) -> TokenizedExample:
    """The sample as its `visit`-th visit makes it: `write`, its texts encoded, `with_ids`."""
    written = write(example, dataset, visit, settings, high_resolution)
    return with_ids(written, map(settings.tokenizer.encode, written.texts), settings, flat_weight)


def write(example: Example, dataset: str, visit: int, settings: TreeSettings, high_resolution: float = 0.0) -> Written:
    """The sample as text. Random choices are keyed by seed, data set, sample and visit.

    high_resolution: share of visits that see a single image in up to `settings.high_resolution_crops` crops.
    Raises ValueError, naming the sample, where its media cannot be shown.
    """
    identity = (settings.seed, dataset, example.key, visit)
    fine = high_resolution > 0 and generator(*identity, "resolution").random() < high_resolution
    layouts = media_layouts(example, settings, high_resolution=fine)
    if not example.branches:
        raise ValueError(f"sample {dataset}/{example.key} has no conversation to learn from. Leave it out.")
    order = list(range(len(example.branches)))
    if len(order) > 1:
        generator(*identity, "branches").shuffle(order)
    return Written(
        name=f"{dataset}/{example.key}",
        media=tuple(media.key for media in example.media[: len(layouts)]),
        layouts=layouts,
        conversations=tuple(_said(example.branches[place], (*identity, place), layouts, settings) for place in order),
        branch_weights=tuple(example.branches[place].weight for place in order),
        dropped_images=len(example.media) - len(layouts),
    )


def with_ids(
    written: Written, ids: Iterable[list[int]], settings: TreeSettings, flat_weight: float | None = None
) -> TokenizedExample:
    """The sample of which these are the ids of `written.texts`; takes no more of them than it has texts.

    flat_weight: weight of each loss token, instead of the settings' weighting.
    Raises ValueError, naming the sample, where its images or the beginning of its first answer do not fit.
    """
    layouts, encoded = written.layouts, iter(ids)
    prefix = prefix_tokens(layouts, settings.tokenizer)
    parts: list[_Part] = []
    length, dropped = len(prefix[0]), 0
    for texts, weight in zip(written.conversations, written.branch_weights, strict=True):
        tokens, lengths = _conversation(encoded, len(texts), settings.tokenizer)
        first_loss = _first_answer(written.name, lengths) - 1
        if parts and length + first_loss >= settings.max_tokens:
            dropped += 1
            continue
        if not parts:
            _check_fit(written.name, length, first_loss, layouts, settings)
        parts.append((tokens, lengths, weight))
        length += len(tokens)
    return _assemble(prefix, parts, layouts, settings, flat_weight, dropped, written.dropped_images)


def nothing() -> TokenizedExample:
    """A sample without tokens."""
    ids = np.empty(0, dtype=np.int64)
    return TokenizedExample(
        tokens=ids,
        targets=ids,
        loss_weights=ids.astype(np.float32),
        positions=ids,
        branches=ids.astype(np.int32),
        is_vision=ids.astype(bool),
        layouts=(),
        dropped_branches=0,
        cut_tokens=0,
    )


def media_layouts(example: Example, settings: TreeSettings, *, high_resolution: bool = False) -> tuple[Layout, ...]:
    """How the sample's images, or its video, are shown; at most `settings.max_images` images.

    high_resolution: a single image in up to `settings.high_resolution_crops` crops.
    """
    if example.video is not None:
        most = settings.max_frames or settings.max_crops
        layout = video_layout(example, settings.geometry, settings.frames_per_second, most)
        return (with_room(layout, settings.max_tokens, settings.tokenizer) if layout.subtitles else layout,)
    media = example.media[: settings.max_images or None]
    _check_points(example, len(media))
    geometry = settings.geometry
    if len(media) > 1 and settings.multi_image_crops:
        geometry = dataclasses.replace(geometry, max_crops=settings.multi_image_crops)
    if len(media) == 1 and high_resolution:
        geometry = dataclasses.replace(geometry, max_crops=settings.high_resolution_crops)
    return tuple(image_layout(one.width, one.height, geometry) for one in media)


def _check_points(example: Example, images: int) -> None:
    """Images may be left out, but not those that an answer points at."""
    if images == len(example.media):
        return
    for branch in example.branches:
        for turn in branch.turns:
            if isinstance(turn.answer, Points) and any(point.at > images for point in turn.answer.points):
                raise ValueError(
                    f"sample {example.key!r} points at image {max(int(point.at) for point in turn.answer.points)} of "
                    f"{len(example.media)}, and only {images} are shown. Raise data.max_images, or build the data set "
                    "without such samples."
                )


def _said(
    branch: Branch, identity: tuple[object, ...], layouts: tuple[Layout, ...], settings: TreeSettings
) -> tuple[str, ...]:
    """One conversation: what the user says, the answer, what the user says, ..."""
    rng = generator(*identity, "prompt")
    video = next((layout for layout in layouts if isinstance(layout, VideoLayout)), None)
    texts: list[str] = []
    for number, turn in enumerate(branch.turns):
        answer = turn.answer
        if isinstance(answer, Tracks) and video is not None:
            answer = points.until(answer, video.times[-1])
        if isinstance(answer, Points | Tracks):
            separator = points.SEPARATORS[settings.prompts]
            answer = points.write(answer, branch.style, separator=separator, seconds=video is not None)
        text = prompts.user_text(
            settings.prompts, branch.style, turn, answer, first=number == 0, rng=rng, rate=video.rate if video else 0
        )
        texts += USER + text, answer
    return tuple(texts)


def _conversation(encoded: Iterator[list[int]], texts: int, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of one conversation without the last EOS, and how many of them are the user's turn, the answer, ..."""
    tokens: list[int] = []
    lengths: list[int] = []
    for number in range(0, texts, 2):
        asked, said = tokenizer.turn(next(encoded), first=number == 0), next(encoded)
        tokens += asked
        tokens += said
        lengths += len(asked), len(said)
        if number + 2 < texts:
            tokens.append(tokenizer.eos)
            lengths[-1] += 1
    return tokens, lengths


def _first_answer(name: str, lengths: list[int]) -> int:
    """Place in a conversation of its first token of an answer."""
    for number in range(1, len(lengths), 2):
        if lengths[number]:
            return sum(lengths[:number])
    raise ValueError(f"sample {name} has an empty answer: there is nothing to learn. Leave it out.")


def _check_fit(name: str, prefix: int, first_loss: int, layouts: tuple[Layout, ...], settings: TreeSettings) -> None:
    video = any(isinstance(layout, VideoLayout) for layout in layouts)
    fewer = "lower data.max_frames" if video else "lower data.image_crops"
    if prefix + first_loss >= settings.max_tokens:
        raise ValueError(
            f"sample {name}: its {'video takes' if video else 'images take'} {prefix} tokens and its question "
            f"{first_loss}, so no answer fits into rows of {settings.max_tokens}. Raise data.sequence_length or "
            f"{fewer}."
        )
    crops = sum(layout.crops for layout in layouts)
    if crops > settings.max_crops:
        raise ValueError(
            f"sample {name} has {crops} crops; a row holds {settings.max_crops}. Raise data.max_crops or {fewer}."
        )


#: A branch: its ids, how many of them are the user's turn, the answer, the user's turn, ...; its own weight.
_Part = tuple[list[int], list[int], float]


def _assemble(
    prefix: tuple[np.ndarray, np.ndarray],
    parts: list[_Part],
    layouts: tuple[Layout, ...],
    settings: TreeSettings,
    flat_weight: float | None,
    dropped: int,
    dropped_images: int,
) -> TokenizedExample:
    sizes = np.asarray([len(tokens) for tokens, *_ in parts])  # (branches,)
    ids = np.fromiter(itertools.chain.from_iterable(tokens for tokens, *_ in parts), np.int64, count=sizes.sum())
    ends = np.cumsum(sizes)
    said = [(length, place % 2 == 1) for _, lengths, _ in parts for place, length in enumerate(lengths)]
    is_answer = np.repeat([answer for _, answer in said], [length for length, _ in said])
    # A place predicts the next token of its branch, the last one EOS.
    following, predicts = np.roll(ids, -1), np.roll(is_answer, -1)
    following[ends - 1], predicts[ends - 1] = settings.tokenizer.eos, is_answer[ends - 1]
    predictions = np.add.reduceat(predicts, ends - sizes, dtype=np.int64).tolist()
    weights = [
        _token_weight(count, len(parts), settings, flat_weight, own)
        for count, (*_, own) in zip(predictions, parts, strict=True)
    ]
    first, length = len(prefix[0]), len(prefix[0]) + len(ids)
    targets, loss_weights = np.zeros(length, dtype=np.int64), np.zeros(length, dtype=np.float32)
    np.copyto(targets[first:], following, where=predicts)
    loss_weights[first:] = predicts * np.repeat(weights, sizes)
    positions = np.arange(length)
    positions[first:] -= np.repeat(ends - sizes, sizes)
    branches = np.full(length, PREFIX_BRANCH, dtype=np.int32)
    branches[first:] = np.repeat(np.arange(len(parts)), sizes)
    # Text after the prefix is plain text, so it holds no token of an image block.
    is_vision = np.zeros(length, dtype=bool)
    is_vision[:first] = prefix[1]
    kept = settings.max_tokens
    return TokenizedExample(
        tokens=np.concatenate([prefix[0], ids])[:kept],
        targets=targets[:kept],
        loss_weights=loss_weights[:kept],
        positions=positions[:kept],
        branches=branches[:kept],
        is_vision=is_vision[:kept],
        layouts=layouts,
        dropped_branches=dropped,
        cut_tokens=max(0, length - kept) + sum(one.cut_subtitles for one in layouts if isinstance(one, VideoLayout)),
        dropped_images=dropped_images,
    )


def _token_weight(predictions: int, branches: int, settings: TreeSettings, flat: float | None, own: float) -> float:
    """Weight of one loss token of a branch with so many of them, in a sample with so many branches.

    own: weight of the branch.
    """
    if flat is not None:
        return flat
    if settings.loss_weighting == "uniform":
        return own
    weight = own / math.sqrt(branches)
    if settings.loss_weighting == "root_tokens":
        # Molmo2 does not count the last EOS where there are several branches; it inherits the weight before it.
        counted = predictions - (branches > 1)
        weight *= 2 / math.sqrt(max(1, counted))
    return weight
