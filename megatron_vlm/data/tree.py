"""A sample -> tokens, targets, loss weights, positions and branches. Needs the sizes of its media, not their pixels.

    BOS, image or frame blocks | branch 0 | branch 1 | ...

Every branch sees the prefix and itself; its positions go on where the prefix ends. Each branch predicts EOS after its
last answer, though no branch holds that EOS as an input. With one branch this is the plain sequence.
s tokens of the sample.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.geometry import (
    ImageGeometry,
    ImageLayout,
    Layout,
    VideoLayout,
    image_geometry,
    image_layout,
)
from megatron_vlm.config.schema import DataConfig
from megatron_vlm.data import points, prompts
from megatron_vlm.data.example import Branch, Example, Points, Tracks
from megatron_vlm.data.frames import video_layout
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.tokens import Tokenizer

#: Subtitles are cut where they would let the prefix take more than this share of a row.
LARGEST_PREFIX = 7 / 8
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
    """One of prompts.FORMATS."""
    loss_weighting: str
    """One of WEIGHTINGS."""
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
        for name, value, known in (
            ("prompts", self.prompts, prompts.FORMATS),
            ("loss_weighting", self.loss_weighting, WEIGHTINGS),
        ):
            if value not in known:
                raise ValueError(f"data.{name}={value!r} does not exist; choose one of {', '.join(known)}.")


def tokenize(
    example: Example,
    dataset: str,
    visit: int,
    settings: TreeSettings,
    flat_weight: float | None = None,
    high_resolution: float = 0.0,
) -> TokenizedExample:
    """The sample as its `visit`-th visit makes it: random choices are keyed by seed, data set, sample and visit.

    flat_weight: weight of each loss token, instead of the settings' weighting.
    high_resolution: share of visits that see a single image in up to `settings.high_resolution_crops` crops.
    Raises ValueError, naming the sample, where its images or the beginning of its first answer do not fit.
    """
    identity = (settings.seed, dataset, example.key, visit)
    fine = high_resolution > 0 and generator(*identity, "resolution").random() < high_resolution
    layouts = media_layouts(example, settings, high_resolution=fine)
    prefix = prefix_tokens(layouts, settings.tokenizer)[0]
    order = list(range(len(example.branches)))
    if len(order) > 1:
        generator(*identity, "branches").shuffle(order)
    parts: list[tuple[list[int], list[bool], float]] = []
    length, dropped = len(prefix), 0
    for place in order:
        tokens, is_answer = branch_tokens(example.branches[place], identity + (place,), layouts, settings)
        first_loss = is_answer.index(True) - 1
        if parts and length + first_loss >= settings.max_tokens:
            dropped += 1
            continue
        if not parts:
            _check_fit(f"{dataset}/{example.key}", length, first_loss, layouts, settings)
        parts.append((tokens, is_answer, example.branches[place].weight))
        length += len(tokens)
    left_out = len(example.media) - len(layouts)
    return _assemble(parts, layouts, dropped, settings, flat_weight, left_out)


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
        return (_with_room(layout, settings) if layout.subtitles else layout,)
    media = example.media[: settings.max_images or None]
    _check_points(example, len(media))
    geometry = settings.geometry
    if len(media) > 1 and settings.multi_image_crops:
        geometry = dataclasses.replace(geometry, max_crops=settings.multi_image_crops)
    if len(media) == 1 and high_resolution:
        geometry = dataclasses.replace(geometry, max_crops=settings.high_resolution_crops)
    return tuple(image_layout(one.width, one.height, geometry) for one in media)


def _with_room(layout: VideoLayout, settings: TreeSettings) -> VideoLayout:
    """With as many lines of subtitles as leave room in a row for a question and its answer."""
    encode = settings.tokenizer.encode
    frames = len(video_tokens(dataclasses.replace(layout, subtitles=""), settings.tokenizer))
    room = int(settings.max_tokens * LARGEST_PREFIX) - frames
    title, *lines = layout.subtitles.splitlines(keepends=True)
    sizes = np.cumsum([len(encode(line)) for line in lines])
    kept = int(np.searchsorted(sizes, room - len(encode(title)), side="right"))
    if kept == len(lines):
        return layout
    subtitles = title + "".join(lines[:kept]) if kept else ""
    return dataclasses.replace(
        layout, subtitles=subtitles, cut_subtitles=int(sizes[-1] - (sizes[kept - 1] if kept else 0))
    )


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


def prefix_tokens(layouts: tuple[Layout, ...], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """BOS and the blocks of the images or of the video; several images are announced by `Image 1`, `Image 2`, ...

    Ids (int64), and which of them belong to a bidirectional image block (bool). Shared: not to be written to.
    """
    if len(layouts) == 1 and isinstance(layouts[0], VideoLayout):
        # Not remembered: long, and hardly ever the same.
        return _with_vision([tokenizer.bos, *video_tokens(layouts[0], tokenizer)], tokenizer)
    return _image_prefix(layouts, tokenizer)


@lru_cache(maxsize=4096)
def _image_prefix(layouts: tuple[ImageLayout, ...], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    tokens = [tokenizer.bos]
    for number, layout in enumerate(layouts, start=1):
        if len(layouts) > 1:
            tokens.extend(tokenizer.encode_fixed(f"Image {number}"))
        tokens.extend(image_tokens(layout, tokenizer))
    return _with_vision(tokens, tokenizer)


def _with_vision(tokens: list[int], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
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


def video_tokens(layout: VideoLayout, tokenizer: Tokenizer) -> list[int]:
    """The block of a video: for each frame its time in seconds and its placeholders between `<frame_start>` and
    `<frame_end>`; then the subtitles."""
    start, end = tokenizer.new_token("<frame_start>"), tokenizer.new_token("<frame_end>")
    frame = [start, *[tokenizer.im_patch] * layout.frame.placeholders, end]
    tokens: list[int] = []
    for number, moment in enumerate(layout.times):
        tokens.extend(tokenizer.encode_fixed(f"{' ' if number else ''}{moment:.1f} "))
        tokens.extend(frame)
    if layout.subtitles:
        tokens.extend(tokenizer.encode(layout.subtitles))
    return tokens


def branch_tokens(
    branch: Branch, identity: tuple[object, ...], layouts: tuple[Layout, ...], settings: TreeSettings
) -> tuple[list[int], list[bool]]:
    """Ids of one conversation and, for each, whether it belongs to an answer. The last EOS is not among them."""
    tokenizer, rng = settings.tokenizer, generator(*identity, "prompt")
    video = next((layout for layout in layouts if isinstance(layout, VideoLayout)), None)
    tokens: list[int] = []
    is_answer: list[bool] = []
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
    layouts = media_layouts(example, settings)
    prefix = prefix_tokens(layouts, settings.tokenizer)[0]
    rng = generator(settings.seed, example.key, "generation")
    rate = example.clip.rate if example.clip else 0
    text = prompts.user_text(settings.prompts, branch.style, branch.turns[0], None, first=True, rng=rng, rate=rate)
    tokens = settings.tokenizer.user_turn(text, first=True)
    _check_fit(example.key, len(prefix), len(tokens), layouts, settings)
    return _assemble([(tokens, [False] * len(tokens), 1.0)], layouts, 0, settings, 0.0)


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


def _assemble(
    parts: list[tuple[list[int], list[bool], float]],
    layouts: tuple[Layout, ...],
    dropped: int,
    settings: TreeSettings,
    flat_weight: float | None,
    dropped_images: int = 0,
) -> TokenizedExample:
    prefix, prefix_vision = prefix_tokens(layouts, settings.tokenizer)
    length = len(prefix) + sum(len(tokens) for tokens, *_ in parts)
    tokens = np.empty(length, dtype=np.int64)
    targets = np.zeros(length, dtype=np.int64)
    weights = np.zeros(length, dtype=np.float32)
    positions = np.empty(length, dtype=np.int64)
    branches = np.full(length, PREFIX_BRANCH, dtype=np.int32)
    tokens[: len(prefix)] = prefix
    positions[: len(prefix)] = np.arange(len(prefix))
    start = len(prefix)
    for number, (ids, is_answer, own_weight) in enumerate(parts):
        stop = start + len(ids)
        tokens[start:stop] = ids
        positions[start:stop] = np.arange(len(prefix), len(prefix) + len(ids))
        branches[start:stop] = number
        # A place predicts the next token of its branch, the last one EOS.
        predicts_answer = np.asarray([*is_answer[1:], is_answer[-1]])
        following = np.asarray([*ids[1:], settings.tokenizer.eos], dtype=np.int64)
        targets[start:stop] = np.where(predicts_answer, following, 0)
        weights[start:stop] = predicts_answer * _token_weight(
            int(predicts_answer.sum()), len(parts), settings, flat_weight, own_weight
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
        cut_tokens=length - kept + sum(one.cut_subtitles for one in layouts if isinstance(one, VideoLayout)),
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
