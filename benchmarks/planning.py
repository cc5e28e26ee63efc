"""Planning a window of 4,096 samples, tokenization included, on lengths of Molmo2's fine-tuning mixture (lengths.py).

    python benchmarks/planning.py

Shards of made-up samples: sizes of images and lengths of videos as in lengths.csv, texts of words that a small
tokenizer makes about as many tokens of as the table says. No media are stored; planning never reads one.
`plan`: draws, samples read, tokens, rows, of window 1,000,000 without an earlier one. `write`, `read`, `unpack`: what
ranks do that share it (data.plan_cache): the file written, its outline read, one of 64 ranks' rows unpacked.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import lengths, record  # noqa: E402
from megatron_vlm.config.presets import PRESETS  # noqa: E402
from megatron_vlm.config.schema import DataConfig  # noqa: E402
from megatron_vlm.data import stored, tokens  # noqa: E402
from megatron_vlm.data.example import Branch, Example, Media, Turn  # noqa: E402
from megatron_vlm.data.keyed import generator  # noqa: E402
from megatron_vlm.data.order import MixtureOrder  # noqa: E402
from megatron_vlm.data.plan import Planner  # noqa: E402
from megatron_vlm.data.shards import Shards  # noqa: E402
from megatron_vlm.data.tokens import Tokenizer  # noqa: E402
from megatron_vlm.data.tree import TreeSettings  # noqa: E402
from megatron_vlm.data.writer import ShardWriter  # noqa: E402

FAR, RANKS = 1_000_000, 64
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
            media.append(Media(name, 640, 360, "video", seconds, 30.0, int(seconds * 30)))
        writer.add_checked(media[-1], "jpg", b"", None)
    count = 1 + lengths._poisson(row.branches - 1, rng)
    branches = tuple(
        Branch("user_qa", (Turn(text(row.ask, row.text_spread, rng), text(row.answer, row.text_spread, rng)),))
        for _ in range(count)
    )
    return Example(f"{number}", branches, tuple(media))


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


def main() -> None:
    asked = record.options(__doc__, rounds=3, threads=False).parse_args()
    with tempfile.TemporaryDirectory() as name:
        plan, file = planner(Path(name)), Path(name) / "window.plan"
        seconds: dict[str, list[float]] = {"plan": [], "write": [], "read": [], "unpack": []}

        def timed(what: str, began: float) -> None:
            seconds[what].append(time.process_time() - began)

        for number in range(asked.rounds):
            began = time.process_time()
            rows = plan.plan(FAR + number)
            timed("plan", began)
            assert rows is not None
            began = time.process_time()
            stored.write(file, rows)
            timed("write", began)
            began = time.process_time()
            found = stored.read(file)
            timed("read", began)
            began = time.process_time()
            for row in found[::RANKS]:
                row.unpack()
            timed("unpack", began)
        size, held = file.stat().st_size, sum(row.tokens for row in rows)
        table = [{"what": what, "seconds": statistics.median(each)} for what, each in seconds.items()]
        middle = {line["what"]: line["seconds"] for line in table}
        gain = middle["plan"] / (middle["read"] + middle["unpack"])
        what = (
            f"`python benchmarks/planning.py`: windows of {lengths.WINDOW:,} samples, {len(rows):,} rows, {held:,} "
            f"tokens; a file of {size / 1e6:.1f} MB. Medians of {asked.rounds}, seconds of the processor."
        )
        summary = [
            ("window 1,000,000 planned alone, text made into tokens", f"{middle['plan']:.2f} s (asked for: 2)"),
            ("a planned window from the file that ranks share, over planning it", f"{gain:.0f} times faster"),
        ]
        print(what, record.table(table), sep="\n")
        if not asked.dry_run:
            record.write("planning", what, {"seconds": seconds, "bytes": size}, table, {"plan_s": middle["plan"],
                         "shared": round(gain, 1)}, summary)  # fmt: skip


if __name__ == "__main__":
    main()
