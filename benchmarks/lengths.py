"""How long the samples of Molmo2's released fine-tuning mixture are, written down: lengths.csv, and what draws from it.

One line of the table is one data set of examples/recipes/mixtures/molmo2_sft.yaml:

    samples        as the mixture counts them (an image or video with its whole tree); known = yes: a published number
                   or a cap that the released recipe sets, no: our estimate from the size of the published set
    shown          photo: one image, `size` = median of its longer side in pixels. tall: the same, 1 : 3. photos: 2 to 5
                   of them. video: `size` = median seconds. clip: the same, never more than 63 s. subtitles: a video
                   with three words of subtitles a second. track: `size` = median seconds at 6 frames a second,
                   annotated once a second. text: nothing is shown
    spread         of `size`: standard deviation of its logarithm
    branches       mean number of conversations about one image or video; at least 1, Poisson beyond
    ask, answer    median tokens of a question and of an answer; text_spread: standard deviation of their logarithm

What the released recipe fixes is computed, not drawn: rates, square roots and caps by the mixture file; crops and
tokens of an image from its size (8 crops); frames of a video by 2 a second and the last one, at most 128; 83 tokens a
frame and one for each character of its time (Qwen splits digits). Durations, sizes and texts are log-normal, with
medians that we took from the published descriptions of the sets, and estimated where there is none: nobody outside has
the true histogram. One published number checks the whole: about 3.8 samples in a row of 16,384 tokens; this table gives
3.6 (the videos that Molmo2 collected itself were set to come near it).
"""

from __future__ import annotations

import csv
import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from megatron_vlm.config.geometry import ImageGeometry, frame_layout, image_geometry, image_layout
from megatron_vlm.config.presets import PRESETS
from megatron_vlm.cost import Work
from megatron_vlm.data import mixture
from megatron_vlm.data.balance import attention_pairs
from megatron_vlm.data.frames import frame_times, track_times
from megatron_vlm.data.keyed import generator
from megatron_vlm.data.order import MixtureOrder

TABLE = Path(__file__).with_name("lengths.csv")
MAX_TOKENS, MAX_CROPS, WINDOW = 16_384, 128, 4096
#: Tokens of a user turn beside its text: <|im_start|>user ... <|im_end|> <|im_start|>assistant and line ends.
TURN = 8
#: Width over height of photographs, each as likely.
SHAPES = (4 / 3, 4 / 3, 3 / 2, 3 / 4, 2 / 3, 1.0, 16 / 9)
LONGEST_CLIP = 63.0
#: Question and answer of the longest text that the recipe lets in.
LONGEST_TEXT = 4096


@dataclass(frozen=True)
class Lengths:
    """Of one data set: a line of the table."""

    dataset: str
    samples: int
    shown: str
    size: float
    spread: float
    branches: float
    ask: float
    answer: float
    text_spread: float


@dataclass(frozen=True)
class Drawn:
    """One sample of the distribution."""

    source: int
    """Index of its data set in the mixture."""
    tokens: int
    crops: int
    work: Work


class Distribution:
    """The samples of a run, window after window, as the planner draws them."""

    def __init__(self, seed: int, preset: str = "molmo2_4b") -> None:
        self.table = {row.dataset: row for row in read()}
        self.mixture = mixture.load("molmo2_sft")
        self.names = tuple(member.name for member in self.mixture.members)
        sizes = [self.table[name].samples for name in self.names]
        self.rates = self.mixture.rates(dict(zip(self.names, sizes, strict=True)).__getitem__)
        self.arch = PRESETS[preset]
        self._order = MixtureOrder(self.names, sizes, self.rates, seed)
        self._seed = seed

    @cached_property
    def geometry(self) -> ImageGeometry:
        return image_geometry(self.arch, 8)

    def window(self, number: int, length: int = WINDOW) -> list[Drawn]:
        """The samples of one window."""
        draws = self._order.window(number, length)
        assert draws is not None
        return [self._sample(draw.source, draw.place) for draw in draws]

    def _sample(self, source: int, place: int) -> Drawn:
        row = self.table[self.names[source]]
        rng = generator(self._seed, row.dataset, place)
        fine = rng.random() < self.mixture.members[source].high_resolution
        prefix, vision, crops, windows, slots = self._shown(row, rng, 24 if fine else 8)
        count = 1 + _poisson(row.branches - 1, rng)
        branches, loss = [], 0
        for _ in range(count):
            ask, answer = (_size(median, row.text_spread, rng, LONGEST_TEXT) for median in (row.ask, row.answer))
            room = MAX_TOKENS - prefix - sum(branches)
            if branches and room <= TURN + ask:
                break
            answer = min(answer, room - TURN - ask)
            branches.append(TURN + ask + answer)
            loss += answer + 1
        tokens = prefix + sum(branches)
        pairs = attention_pairs(prefix, vision, branches)
        return Drawn(source, tokens, crops, Work(0, pairs, loss, crops, windows, slots))

    def _shown(self, row: Lengths, rng: random.Random, image_crops: int) -> tuple[int, int, int, int, int]:
        """(tokens of the prefix, those of them in vision blocks, crops, windows, slots)."""
        if row.shown == "text":
            return 1, 0, 0, 0, 0
        if row.shown in ("photo", "tall", "photos"):
            number = rng.randint(2, 5) if row.shown == "photos" else 1
            layouts = []
            geometry = dataclasses.replace(self.geometry, max_crops=image_crops)
            for _ in range(number):
                side = _size(row.size, row.spread, rng, 10_000)
                shape = 1 / 3 if row.shown == "tall" else rng.choice(SHAPES)
                width, height = (side, side / shape) if shape >= 1 else (side * shape, side)
                layouts.append(image_layout(max(28, int(width)), max(28, int(height)), geometry))
            vision = sum(layout.tokens for layout in layouts)
            windows = sum(layout.placeholders for layout in layouts)
            titles = 3 * number if number > 1 else 0  # "Image 1"
            return 1 + titles + vision, vision, sum(layout.crops for layout in layouts), windows, 4 * windows
        seconds = min(row.size * math.exp(rng.gauss(0, row.spread)), LONGEST_CLIP if row.shown == "clip" else 3600.0)
        seconds = max(seconds, 0.5)
        times = track_times(seconds, 6, 1, MAX_CROPS) if row.shown == "track" else frame_times(seconds, 2.0, MAX_CROPS)
        per_frame = frame_layout(self.geometry).placeholders
        vision = len(times) * (per_frame + 2)
        text = sum(len(f"{' ' if number else ''}{moment:.1f} ") for number, moment in enumerate(times))
        if row.shown == "subtitles":
            text += min(int(seconds * 3 * 1.3), MAX_TOKENS * 7 // 8 - vision - text)
        return 1 + vision + text, vision, len(times), len(times) * per_frame, 9 * len(times) * per_frame


@lru_cache(maxsize=1)
def read() -> tuple[Lengths, ...]:
    """The table."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return tuple(_rows(csv.DictReader(file)))


def _rows(lines: csv.DictReader[str]) -> Iterator[Lengths]:
    for line in lines:
        numbers = [float(line[name]) for name in ("size", "spread", "branches", "ask", "answer", "text_spread")]
        yield Lengths(line["dataset"], int(line["samples"]), line["shown"], *numbers)


def _size(median: float, spread: float, rng: random.Random, most: int) -> int:
    return min(most, max(1, round(median * math.exp(rng.gauss(0, spread)))))


def _poisson(mean: float, rng: random.Random) -> int:
    """Knuth's: multiply uniform numbers until they fall below exp(-mean)."""
    limit, count, product = math.exp(-mean), 0, rng.random()
    while product > limit:
        count += 1
        product *= rng.random()
    return count
