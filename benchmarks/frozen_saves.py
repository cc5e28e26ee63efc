"""What it saves to write frozen weights once: alignment at real widths, where only the connector trains.

SigLIP2 so400m and Qwen3-0.6B frozen, the attention pooling connector trains, bf16 weights with float32 copies and
moments; one process, random weights, no training step between. `first` is a run's first save, which writes the frozen
weights; `later` are those after it; `whole` are saves of which each writes everything, as without the sharing.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, trainers  # noqa: E402
from megatron_vlm.config.schema import CheckpointConfig, Config, ModelConfig, TrainConfig  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402

FREEZE = ("vision", "language", "base_embeddings")


def size(folder: Path) -> int:
    """Bytes of the files in it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(preset: str, rounds: int, work: Path) -> dict[str, Any]:
    """Seconds and bytes of saves."""
    import time

    from megatron_vlm.checkpoint import frozen, save
    from megatron_vlm.model.build import build
    from megatron_vlm.train import optim

    config = Config(
        model=ModelConfig(preset=preset, freeze=FREEZE),
        train=TrainConfig(precision="bf16"),
        checkpoint=CheckpointConfig(keep=1),
    )
    models = optim.wrap(build(config, Layout(1)), config)
    optimizer = optim.build(models, config)
    trained = sum(each.numel() for model in models for each in model.parameters() if each.requires_grad)
    total = sum(each.numel() for model in models for each in model.parameters())

    def seconds(directory: Path, step: int) -> float:
        began = time.perf_counter()
        save.save(directory, models=models, optimizer=optimizer, step=step, config=config, state={})
        return time.perf_counter() - began

    once, whole = work / "once", work / "whole"
    first, later, everything = [], [], []
    split = frozen.split
    for number in range(1, rounds + 1):
        shutil.rmtree(once, ignore_errors=True)
        first.append(seconds(once, 2 * number))
        later.append(seconds(once, 2 * number + 1))
        frozen.split = lambda contents: ({}, contents)
        everything.append(seconds(whole, number))
        frozen.split = split
    return {
        "parameters": total, "trained": trained,
        "whole s": median(everything), "first s": median(first), "later s": median(later),
        "whole GB": size(whole) / 1e9, "frozen part GB": size(once / "frozen") / 1e9,
        "checkpoint GB": size(next(once.glob("iter_*"))) / 1e9,
    }  # fmt: skip


def main() -> None:
    parser = record.options(__doc__)
    parser.add_argument("--preset", default="qwen3_0.6b")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints, 6 GB (a temporary one)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.work) as work, trainers.alone():
        row = measure(asked.preset, asked.rounds, Path(work))
    print(record.table([row]))
    if not asked.dry_run:
        key = {
            "bytes": round(row["checkpoint GB"] / row["whole GB"], 3),
            "time": round(row["later s"] / row["whole s"], 3),
        }
        summary = [("checkpoint whose frozen weights are stored once over a whole one, connector trains: bytes; time",
                    f"{key['bytes']:.2f} ({row['checkpoint GB']:.2f} of {row['whole GB']:.2f} GB); {key['time']:.2f} "
                    f"({row['later s']:.1f} of {row['whole s']:.1f} s)")]  # fmt: skip
        what = f"{(__doc__ or '').strip()}\n\nMedians of {asked.rounds} runs."
        record.write("frozen_saves", what, {"rows": [row]}, [row], key, summary)


if __name__ == "__main__":
    main()
