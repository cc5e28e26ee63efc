"""Planning a window of 4,096 samples, tokenization included, on lengths of Molmo2's fine-tuning mixture (lengths.py).

    python benchmarks/planning.py

Shards of made-up samples: sizes of images and lengths of videos as in lengths.csv, texts of words that a small
tokenizer makes about as many tokens of as the table says, three words of subtitles a second. No media are stored;
planning never reads one.
`plan`: draws, samples read, tokens, rows, of window 1,000,000 without an earlier one. Of it, `text into ids` (what the
tokenizers library does, on all cores) and `packing`. `balance`: its rows arranged to global batches of 128, 8 at a
time. `write`, `read`, `unpack`: what ranks do that share it (data.plan_cache): the file written, its outline read, one
of 64 ranks' rows unpacked.
"""

from __future__ import annotations

import hashlib
import math
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import lengths, record  # noqa: E402
from megatron_vlm.config.presets import PRESETS  # noqa: E402
from megatron_vlm.config.schema import DataConfig  # noqa: E402
from megatron_vlm.data import plan, stored, tokens  # noqa: E402
from megatron_vlm.data.batches import arrange, parts  # noqa: E402
from megatron_vlm.data.example import Branch, Clip, Example, Media, Subtitle, Turn  # noqa: E402
from megatron_vlm.data.keyed import generator  # noqa: E402
from megatron_vlm.data.order import MixtureOrder  # noqa: E402
from megatron_vlm.data.plan import Planner, Row  # noqa: E402
from megatron_vlm.data.shards import Shards  # noqa: E402
from megatron_vlm.data.tokens import Tokenizer  # noqa: E402
from megatron_vlm.data.tree import TreeSettings  # noqa: E402
from megatron_vlm.data.writer import ShardWriter  # noqa: E402

FAR, RANKS = 1_000_000, 64
#: Rows of a global batch, and batches between which rows are exchanged.
BATCH, SPAN = 128, 8
#: Seconds of a line of subtitles.
LINE_S = 4
#: Samples of a data set, at most: a window draws from all of them.
SAMPLES = 60
WORDS = "what is the number of red cups on a table near two people who look at it in this picture".split()


def text(tokens: float, spread: float, rng: random.Random) -> str:
    """About so many tokens."""
    count = min(lengths.LONGEST_TEXT, max(1, round(tokens * math.exp(rng.gauss(0, spread)))))
    return " ".join(rng.choice(WORDS) for _ in range(count))


def example(row: lengths.Lengths, number: int, writer: ShardWriter) -> Example:
    """A sample of a data set."""
    rng = generator("planning", row.dataset, number)
    media: list[Media] = []
    size = row.size * math.exp(rng.gauss(0, row.spread))
    for place in range(rng.randint(2, 5) if row.shown == "photos" else 0 if row.shown == "text" else 1):
        name = hashlib.sha256(f"{row.dataset} {number} {place}".encode()).hexdigest()
        if row.shown in ("photo", "photos", "tall"):
            shape = 1 / 3 if row.shown == "tall" else rng.choice(lengths.SHAPES)
            width, height = (size, size / shape) if shape >= 1 else (size * shape, size)
            media.append(Media(name, max(28, int(width)), max(28, int(height))))
        else:
            seconds = max(0.5, min(size, lengths.LONGEST_CLIP if row.shown == "clip" else 3600.0))
            fps = 6.0 if row.shown == "track" else 30.0
            media.append(Media(name, 640, 360, "video", seconds, fps, int(seconds * fps)))
        writer.add_checked(media[-1], "jpg", b"", None)
    count = 1 + lengths._poisson(row.branches - 1, rng)
    branches = tuple(
        Branch("user_qa", (Turn(text(row.ask, row.text_spread, rng), text(row.answer, row.text_spread, rng)),))
        for _ in range(count)
    )
    return Example(f"{number}", branches, tuple(media), clip=clip(row.shown, media[-1:], rng))


def clip(shown: str, media: list[Media], rng: random.Random) -> Clip | None:
    """Subtitles, or the rate of tracks."""
    if shown == "track":
        return Clip(rate=1)
    if shown != "subtitles":
        return None
    starts = range(0, int(media[0].seconds), LINE_S)
    return Clip(subtitles=tuple(
        Subtitle(start, start + LINE_S, " ".join(rng.choices(WORDS, k=3 * LINE_S))) for start in starts
    ))  # fmt: skip


def planner(folder: Path) -> Planner:
    """Of the released recipe's fine-tuning stage."""
    distribution = lengths.Distribution(0)
    with ShardWriter(folder / "shards") as writer:
        for name in distribution.names:
            row = distribution.table[name]
            for number in range(min(row.samples, SAMPLES)):
                writer.add(example(row, number, writer), name, "train")
    shards, arch = Shards(folder / "shards"), PRESETS["molmo2_4b"]
    sizes = [shards.count(name, "train") for name in distribution.names]
    order = MixtureOrder(distribution.names, sizes, distribution.rates, 0)
    data = DataConfig(
        sequence_length=lengths.MAX_TOKENS, max_crops=lengths.MAX_CROPS, prompts="style", loss_weighting="root_tokens"
    )
    known = [" ".join(WORDS), "user\nassistant\n", *(f"{number}.{number % 10} " for number in range(0, 1000, 7))]
    tokenizer = Tokenizer(tokens.train(known, 400), PRESETS["tiny"].language)
    settings = TreeSettings.of(data, tokenizer, arch)
    weights = tuple(member.weight for member in distribution.mixture.members)
    return Planner(shards, "train", distribution.names, weights, order, settings, arch, lengths.WINDOW)


class Clocks:
    """What takes how long: seconds of the processor (of all threads) and of the clock, of each round."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, np.ndarray]] = []

    def next_round(self) -> None:
        self.rounds.append(defaultdict(lambda: np.zeros(2)))

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        began = np.asarray([time.process_time(), time.perf_counter()])
        yield
        self.rounds[-1][what] += np.asarray([time.process_time(), time.perf_counter()]) - began

    def around(self, what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*values: Any, **named: Any) -> Any:
            with self.running(what):
                return call(*values, **named)

        return timed

    def medians(self) -> list[dict[str, Any]]:
        found = {what: np.median([one[what] for one in self.rounds], axis=0).tolist() for what in self.rounds[-1]}
        return [{"what": what, "processor, s": cpu, "clock, s": clock} for what, (cpu, clock) in found.items()]


def balance(planner: Planner, rows: list[Row], rates: tuple[float, ...], groups: tuple[int, ...]) -> list[int]:
    """As the loader does."""
    samples = np.zeros((len(rows), len(planner.sources)), dtype=np.int64)
    for place, row in enumerate(rows):
        np.add.at(samples[place], [one.source for one in row.facts], 1)
    sizes, rng = parts(len(rows), 0, 0, lambda _: BATCH), generator("planning", "batches")
    return arrange([row.cost for row in rows], samples, rates, groups, sizes, SPAN, rng)


def main() -> None:
    asked = record.options(__doc__, rounds=3, threads=False).parse_args()
    distribution, clocks = lengths.Distribution(0), Clocks()
    with tempfile.TemporaryDirectory() as name:
        planned, file = planner(Path(name)), Path(name) / "window.plan"
        text = "of it, text into ids"
        patches = (
            mock.patch.object(Tokenizer, "encode", clocks.around(text, Tokenizer.encode)),
            mock.patch.object(Tokenizer, "encode_all", clocks.around(text, Tokenizer.encode_all)),
            mock.patch.object(plan, "pack", clocks.around("of it, packing", plan.pack)),
        )
        for number in range(asked.rounds):
            clocks.next_round()
            with clocks.running("plan"), patches[0], patches[1], patches[2]:
                rows = planned.plan(FAR + number)
            assert rows is not None
            with clocks.running("balance"):
                balance(planned, rows, distribution.rates, distribution.mixture.group_numbers)
            with clocks.running("write"):
                stored.write(file, rows)
            with clocks.running("read"):
                found = stored.read(file)
            with clocks.running("unpack"):
                for row in found[::RANKS]:
                    row.unpack()
        size, held = file.stat().st_size, sum(row.tokens for row in rows)
    table = clocks.medians()
    cpu = {line["what"]: line["processor, s"] for line in table}
    clock = {line["what"]: line["clock, s"] for line in table}
    gain = cpu["plan"] / (cpu["read"] + cpu["unpack"])
    what = (
        f"`python benchmarks/planning.py`: windows of {lengths.WINDOW:,} samples, {len(rows):,} rows, {held:,} "
        f"tokens; a file of {size / 1e6:.1f} MB. Medians of {asked.rounds}."
    )
    summary = [
        ("window 1,000,000 planned alone, text made into tokens",
         f"{clock['plan']:.2f} s, {cpu['plan']:.2f} s of the processor (asked for: 2)"),
        ("a planned window from the file that ranks share, over planning it", f"{gain:.0f} times faster"),
    ]  # fmt: skip
    print(what, record.table(table), sep="\n")
    if not asked.dry_run:
        seconds = [{name: pair.tolist() for name, pair in one.items()} for one in clocks.rounds]
        key = {"plan_s": round(clock["plan"], 3), "plan_cpu_s": round(cpu["plan"], 3), "shared": round(gain, 1)}
        record.write("planning", what, {"seconds": seconds, "bytes": size}, table, key, summary)


if __name__ == "__main__":
    main()
