"""What all branches of a sample see first: BOS and the blocks of its images, or of its video, as ids."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np

from megatron_vlm.config.geometry import ImageLayout, Layout, VideoLayout
from megatron_vlm.data.tokens import Tokenizer

#: Subtitles are cut where they would let the prefix take more than this share of a row.
LARGEST_PREFIX = 7 / 8


def prefix_tokens(layouts: tuple[Layout, ...], tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """BOS and the blocks of the images or of the video; several images are announced by `Image 1`, `Image 2`, ...

    Ids (int64), and which of them belong to a bidirectional image block (bool).
    """
    pieces = [np.asarray([tokenizer.bos])]
    for number, layout in enumerate(layouts, start=1):
        if isinstance(layout, VideoLayout):
            pieces += _video(layout, tokenizer)
            continue
        if len(layouts) > 1:
            pieces.append(_text(f"Image {number}", tokenizer))
        pieces.append(_image(layout, tokenizer))
    ids = np.concatenate(pieces)
    # Of the ids beyond the base vocabulary only those of blocks occur here, and text has none of them.
    return ids, ids >= tokenizer.vocab_size


def with_room(layout: VideoLayout, max_tokens: int, tokenizer: Tokenizer) -> VideoLayout:
    """With as many lines of subtitles as leave room in a row of `max_tokens` for a question and its answer."""
    frames = sum(len(piece) for piece in _video(dataclasses.replace(layout, subtitles=""), tokenizer))
    room = int(max_tokens * LARGEST_PREFIX) - 1 - frames  # 1 = BOS
    title, *lines = layout.subtitles.splitlines(keepends=True)
    sizes = np.cumsum(list(map(len, tokenizer.encode_all(lines))))
    kept = int(np.searchsorted(sizes, room - len(tokenizer.encode(title)), side="right"))
    if kept == len(lines):
        return layout
    subtitles = title + "".join(lines[:kept]) if kept else ""
    return dataclasses.replace(
        layout, subtitles=subtitles, cut_subtitles=int(sizes[-1] - (sizes[kept - 1] if kept else 0))
    )


def _video(layout: VideoLayout, tokenizer: Tokenizer) -> list[np.ndarray]:
    """For each frame its time in seconds and its block; then the subtitles."""
    times = [f" {moment:.1f} " for moment in layout.times]
    times[0] = times[0].lstrip()
    pieces = [_frame(layout.frame, tokenizer)] * (2 * len(times))
    pieces[::2] = [_text(time, tokenizer) for time in times]
    if layout.subtitles:
        pieces.append(np.asarray(tokenizer.encode(layout.subtitles), dtype=np.int64))
    return pieces


# Kept arrays are shared between samples. Times have a decimal, so a film of an hour has 36,000 of them.
@lru_cache(maxsize=65536)
def _text(text: str, tokenizer: Tokenizer) -> np.ndarray:
    return _kept(tokenizer.encode(text))


@lru_cache(maxsize=64)
def _frame(layout: ImageLayout, tokenizer: Tokenizer) -> np.ndarray:
    """The placeholders of a frame between `<frame_start>` and `<frame_end>`."""
    start, end = tokenizer.new_token("<frame_start>"), tokenizer.new_token("<frame_end>")
    return _kept([start, *[tokenizer.im_patch] * layout.placeholders, end])


@lru_cache(maxsize=4096)
def _image(layout: ImageLayout, tokenizer: Tokenizer) -> np.ndarray:
    """The block of one image: global crop, then the rows of the canvas, each closed by `<im_col>`."""
    patch, end = tokenizer.im_patch, tokenizer.new_token("<im_end>")
    down, across = layout.global_grid
    tokens = [tokenizer.new_token("<low_res_im_start>"), *[patch] * (down * across), end]
    rows, columns = layout.high_grid
    if rows:
        tokens.append(tokenizer.new_token("<im_start>"))
        tokens.extend(([patch] * columns + [tokenizer.new_token("<im_col>")]) * rows)
        tokens.append(end)
    return _kept(tokens)


def _kept(tokens: list[int]) -> np.ndarray:
    ids = np.asarray(tokens, dtype=np.int64)
    ids.setflags(write=False)
    return ids
