"""A training step of this project against a plain one around `transformers`: same weights, same samples, one process.

    python benchmarks/step.py [--sizes tiny small "0.6B widths"] [--rows text image video] [--threads 1] [--rounds 5]

Ours is the trainer's own step: a row that the samples share, forward, backward, clipping, optimizer. Theirs is Molmo2
(for text: Qwen3) on the samples side by side, `loss.backward()`, clipping, torch's fused AdamW. All samples of a batch
are of one length, so that nobody pads. bf16 is measured twice: against a model whose weights and moments are bf16
(cheaper than ours, which keeps float32 copies and sums gradients in float32), and against autocast over float32
weights, which is what `transformers.Trainer(bf16=True)` does. A ratio below 1 means that ours is faster.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, samples, trainers  # noqa: E402
from megatron_vlm.config.architecture import Architecture  # noqa: E402

#: (samples, tokens, tokens of the answer) of text; pixels, crops and text of a picture; frames of a video.
TEXT = {"tiny": (4, 256, 192), "small": (4, 256, 192), "0.6B widths": (2, 256, 192)}
IMAGES = {"tiny": (8, (64, 64, 0)), "small": (2, (200, 190, 4)), "0.6B widths": (1, (378, 300, 1))}
FRAMES = {"tiny": (2, 8), "small": (1, 8), "0.6B widths": (1, 2)}
#: Text after a picture, and the answer in it.
WORDS = (48, 24)
BASELINES = {"float32": ("float32",), "bf16": ("bf16", "autocast")}


def rows(size: str, kind: str, arch: Architecture) -> list[samples.Sample]:
    """The samples of a batch."""
    maker = samples.Maker(arch)
    if kind == "text":
        count, length, answer = TEXT[size]
        return [maker.text(length, answer) for _ in range(count)]
    if kind == "image":
        count, (width, height, crops) = IMAGES[size]
        return [maker.image(width, height, *WORDS, crops) for _ in range(count)]
    count, frames = FRAMES[size]
    return [maker.video(frames, *WORDS) for _ in range(count)]


def measure(size: str, kind: str, precision: str, rounds: int, clock: Callable[[], float]) -> Iterator[dict[str, Any]]:
    """One line for each baseline of this precision."""
    arch, freeze = trainers.ARCHITECTURES[size], trainers.FREEZE[size]
    if kind == "text":
        freeze += ("vision", "connector")  # Qwen3 has neither
    chosen = rows(size, kind, arch)
    batch = samples.packed(arch, [chosen])
    plain = (trainers.qwen3 if kind == "text" else trainers.molmo2)(arch, freeze)
    own = trainers.ours(trainers.config(arch, freeze, precision), trainers.load_into(plain))([batch])
    runs = {"ours": own}
    for baseline in BASELINES[precision]:
        model = plain
        if len(BASELINES[precision]) > 1 and baseline != BASELINES[precision][-1]:
            model = (trainers.qwen3 if kind == "text" else trainers.molmo2)(arch, freeze)
        dtype = torch.bfloat16 if baseline == "bf16" else torch.float32
        inputs = samples.padded(arch, chosen, dtype)
        inputs = samples.plain_text(inputs) if kind == "text" else inputs
        runs[baseline] = trainers.theirs(model.to(dtype), autocast=baseline == "autocast")(inputs)
    # The first step of each: the losses are those of the same weights.
    losses = {name: run() for name, run in runs.items()}
    found = record.medians(record.alternate(runs, rounds, clock=clock))
    for baseline in BASELINES[precision]:
        yield {
            "size": size,
            "rows": kind,
            "precision": precision,
            "transformers in": baseline,
            "tokens": batch.tokens.numel(),
            "crops": len(batch.crops),
            "loss tokens": int((batch.loss_weights > 0).sum()),
            "ours ms": 1000 * found["ours"],
            "transformers ms": 1000 * found[baseline],
            "ratio": found["ours"] / found[baseline],
            "loss": losses["ours"],
            "their loss": losses[baseline],
        }


def earlier(sizes: Sequence[str], kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of the last results that are not measured anew: all sizes in one run take minutes."""
    file = record.RESULTS / "step.json"
    steps = json.loads(file.read_text(encoding="utf-8"))["steps"] if file.exists() else []
    return [row for row in steps if row["size"] not in sizes or row["rows"] not in kinds]


def summary(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """For the README: the ratios of each size and precision, by kind of row."""
    lines = []
    for size in dict.fromkeys(row["size"] for row in found):
        for baseline in dict.fromkeys(row["transformers in"] for row in found):
            of = [row for row in found if (row["size"], row["transformers in"]) == (size, baseline)]
            what = f"time of a training step over that of transformers, {size}, {baseline}"
            lines.append((what, ", ".join(f"{row['rows']} {row['ratio']:.2f}" for row in of)))
    return lines


def main() -> None:
    parser = record.options(__doc__, rounds=5)
    parser.add_argument("--sizes", nargs="+", default=list(trainers.ARCHITECTURES), choices=trainers.ARCHITECTURES)
    parser.add_argument("--rows", nargs="+", default=["text", "image", "video"], choices=["text", "image", "video"])
    parser.add_argument("--precisions", nargs="+", default=list(BASELINES), choices=BASELINES)
    parser.add_argument("--processor-time", action="store_true", help="on a busy machine; implies --dry-run")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.processor_time else time.perf_counter
    found = []
    with trainers.alone():
        for size in asked.sizes:
            for kind in asked.rows:
                for precision in asked.precisions:
                    for row in measure(size, kind, precision, asked.rounds, clock):
                        found.append(row)
                        print(
                            " ".join(
                                f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()
                            ),
                            flush=True,
                        )
    worst = max(found, key=lambda row: row["ratio"])
    print(f"Largest ratio: {worst['ratio']:.3f} ({worst['size']}, {worst['rows']}, {worst['transformers in']}).")
    if not (asked.dry_run or asked.processor_time):
        what = (__doc__ or "").split("\n\n")[-1].strip()
        found = [*earlier(asked.sizes, asked.rows), *({**row, "commit": record.commit()} for row in found)]
        found.sort(key=lambda row: list(trainers.ARCHITECTURES).index(row["size"]))
        key = {f"{row['size']} {row['rows']} {row['transformers in']}": round(row["ratio"], 3) for row in found}
        record.write("step", what, {"steps": found}, found, key, summary(found), asked.threads)


if __name__ == "__main__":
    main()
