"""What a packed row is assumed to hold, as no data is read: full rows, as many crops as the settings allow.

The assumption errs towards the most vision work that the limits permit; every number can be given instead.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_vlm.config import geometry, presets
from megatron_vlm.config.schema import Config
from megatron_vlm.cost import Work
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.split import even_counts, offsets
from megatron_vlm.plan.layers import Load

#: Share of a row's text tokens that carry a loss: answers among questions and prompts.
LOSS_SHARE = 0.5
#: Tokens around a video frame: start, end, and the time in digits.
FRAME_TOKENS = 8


@dataclass(frozen=True)
class Row:
    """One packed row.

    tokens: all of them. crops, windows: of its images; slots: patches in a window. image_tokens: placeholders and the
    marks around them. loss_tokens: tokens with a loss. examples: equal ones that share the row.
    """

    tokens: int
    crops: int
    windows: int
    slots: int
    image_tokens: int
    loss_tokens: int
    examples: int
    video: bool = False

    @property
    def pairs(self) -> int:
        """Query-key pairs that the mask allows: causal, and the image block in both directions."""
        total = 0
        for tokens, images in zip(
            even_counts(self.tokens, self.examples), even_counts(self.image_tokens, self.examples), strict=True
        ):
            total += tokens * (tokens + 1) // 2 + images * (images - 1) // 2
        return total

    @property
    def masked(self) -> int:
        """Numbers in the attention masks: of blocks of queries that are neither all image nor plainly causal."""
        if not self.image_tokens:
            return 0
        text = self.tokens - self.image_tokens
        mixed = self.tokens if self.examples == 1 and self.video else min(self.tokens, text + 256 * self.examples)
        return mixed * self.longest

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return -(-self.tokens // self.examples)


def assume(config: Config, *, video: bool = False, crops: int | None = None, loss_share: float = LOSS_SHARE) -> Row:
    """A full row under these settings.

    video: frames of one video instead of images. crops: so many instead of `data.max_crops` (fewer where the row is too
    short for them). Raises ValueError for a loss share outside (0, 1] and for negative crops.
    """
    if not 0 < loss_share <= 1:
        raise ValueError(f"a loss share of {loss_share} is not possible; needed: above 0 and at most 1.")
    if crops is not None and crops < 0:
        raise ValueError(f"{crops} crops in a row are not possible; needed: 0 or more.")
    arch = presets.architecture(config.model)
    tokens, limit = config.data.sequence_length, config.data.max_crops if crops is None else crops
    connector = arch.connector
    if video:
        side = -(-arch.vision.grid // connector.video_pool)
        windows = connector.queries or side * side
        unit_crops, unit_windows, unit_tokens = 1, windows, windows + FRAME_TOKENS
        slots = connector.video_pool**2
    else:
        layout = densest(config)
        unit_crops, unit_windows, unit_tokens = layout.crops, layout.placeholders, layout.tokens
        slots = connector.image_pool**2
    # A tenth of the row, at least, is text: an image without an answer trains nothing.
    units = min(limit / unit_crops, (tokens - tokens // 10) / unit_tokens)
    held = int(units * unit_crops)
    placeholders = held * unit_windows // unit_crops
    image_tokens = min(tokens - 1, int(held / unit_crops * unit_tokens))
    text = tokens - image_tokens
    if connector.queries:
        windows_made, slots = held, arch.vision.patches
    else:
        windows_made = placeholders
    examples = 1 if video else max(1, round(held / unit_crops))
    return Row(tokens, held, windows_made, slots, image_tokens, max(1, int(text * loss_share)), examples, video)


def densest(config: Config) -> geometry.ImageLayout:
    """The image whose crops take the fewest tokens each: a row of such images has the most crops."""
    arch = presets.architecture(config.model)
    shape = geometry.image_geometry(arch, config.data.image_crops)
    side = shape.window * shape.patch_size
    margin = 2 * shape.margin * shape.patch_size
    sizes = [
        (columns * side + margin, rows * side + margin)
        for rows in range(1, max(1, config.data.image_crops) + 1)
        for columns in range(1, max(1, config.data.image_crops) // rows + 1)
    ]
    layouts = [geometry.image_layout(width, height, shape) for width, height in sizes]
    return min(layouts, key=lambda layout: layout.tokens / layout.crops)


def load(row: Row, config: Config, layout: Layout, rank: int = 0) -> Load:
    """One micro-batch of such rows on `rank`; rank 0 has the most crops, tokens and loss tokens."""
    rows, at = config.train.micro_batch, layout.coordinates(rank).context
    crops = even_counts(rows * row.crops, layout.crop_ranks)
    windows = windows_of_ranks(row, rows, crops)
    place = layout.crop_rank(rank)
    return Load(
        rows=rows,
        length=row.tokens,
        part=even_counts(row.tokens, layout.context)[at],
        crops=crops[place],
        windows=windows[place],
        most_windows=max(windows),
        slots=row.slots,
        all_windows=rows * row.windows,
        loss_tokens=rows * even_counts(row.loss_tokens, layout.context)[at],
        longest=row.longest,
        pairs=rows * row.pairs // layout.key_ranks,
        queries=-(-row.tokens // layout.key_ranks),
        masked=rows * row.masked // layout.key_ranks,
    )


def windows_of_ranks(row: Row, rows: int, crops: tuple[int, ...]) -> list[int]:
    """Windows that each rank pools: those of its crops, which share the windows evenly."""
    each = even_counts(rows * row.windows, max(1, sum(crops)))
    return [sum(each[start : start + count]) for start, count in zip(offsets(crops), crops, strict=False)]


def work(row: Row, rows: int) -> Work:
    """What `rows` such rows ask of the model, as cost.py counts it."""
    return Work(
        rows * row.tokens,
        rows * row.pairs,
        rows * row.loss_tokens,
        rows * row.crops,
        rows * row.windows,
        rows * row.windows * row.slots,
    )
