"""What a frozen vision tower saves: time of a step and peak memory, against the same step with a tower that trains.

    python benchmarks/frozen.py [--sizes small "0.6B widths"] [--rounds 5]

The trainer's own steps in float32 on pictures, each variant in a process of its own (so that each has its own peak of
memory), in turns. `small`: 14 million parameters, 4 layers of tower and 6 of decoder. `0.6B widths`: the widths of
Qwen3-0.6B and SigLIP2 so400m, two layers of each. Beside the measured time: what the trainer counts (`cost`), where a
frozen tower has no backward pass. Whole models have 25 and 28 layers: the last column is what is counted there.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, samples, trainers  # noqa: E402
from megatron_vlm import cost  # noqa: E402
from megatron_vlm.config import presets  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from megatron_vlm.parallel.pool import Pool  # noqa: E402

#: Pictures of a batch; their pixels and high-resolution crops.
PICTURES = {"small": (4, (200, 190, 4)), "0.6B widths": (2, (378, 300, 1))}
#: Text after a picture, and the answer in it.
WORDS = (48, 24)
VARIANTS: dict[str, tuple[str, ...]] = {"trains": (), "frozen": ("vision",)}


def run(size: str, variant: str, steps: int) -> tuple[list[float], int, int, tuple[int, ...]]:
    """On a rank: seconds of each step after the first, peak memory so far, the tower's parameters, a step's work."""
    from megatron_vlm.parallel import groups, process
    from megatron_vlm.train.work import work_of

    groups.initialize(Layout(1), timeout_s=60)
    arch = trainers.ARCHITECTURES[size]
    maker = samples.Maker(arch)
    count, (width, height, crops) = PICTURES[size]
    batch = samples.packed(arch, [[maker.image(width, height, *WORDS, crops) for _ in range(count)]])
    tower = 0

    def count_tower(model: Any) -> None:
        nonlocal tower
        tower = sum(parameter.numel() for parameter in model.vision.parameters())

    freeze = ("base_embeddings", *VARIANTS[variant])
    step = trainers.ours(trainers.config(arch, freeze, "float32"), count_tower)([batch])
    seconds = []
    for _ in range(1 + steps):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return seconds[1:], process.peak_memory()[0], tower, dataclasses.astuple(work_of(batch))


def measure(size: str, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    pools = {variant: Pool(1) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    peaks: dict[str, float] = {}
    try:
        for _ in range(rounds):
            for variant, pool in pools.items():
                ((seconds, most, tower, counts),) = pool.run(run, size, variant, 3, timeout_s=170)
                times[variant] += seconds
                peaks[variant] = peaks.get(variant, most / 1e9)  # of the first call: later ones build a model beside it
    finally:
        for pool in pools.values():
            pool.close()
    work, found = cost.Work(*counts), record.medians(times)
    whole = presets.PRESETS["qwen3_0.6b"]

    def counted(arch: Any) -> float:
        with_tower, without = (
            cost.training(arch, work, ("base_embeddings", *freeze))
            for freeze in (VARIANTS["trains"], VARIANTS["frozen"])
        )
        return without / with_tower

    return {
        "size": size, "crops": work.crops, "tokens": work.tokens, "tower, million parameters": tower / 1e6,
        "trains ms": 1000 * found["trains"], "frozen ms": 1000 * found["frozen"],
        "time": found["frozen"] / found["trains"], "counted": counted(trainers.ARCHITECTURES[size]),
        "trains GB": peaks["trains"], "frozen GB": peaks["frozen"], "memory": peaks["frozen"] / peaks["trains"],
        "counted, whole 0.6B": counted(whole),
    }  # fmt: skip


def main() -> None:
    parser = record.options(__doc__, rounds=3, threads=False)
    parser.add_argument("--sizes", nargs="+", default=list(PICTURES), choices=PICTURES)
    asked = parser.parse_args()
    rows = []
    for size in asked.sizes:
        rows.append(measure(size, asked.rounds))
        print(rows[-1], flush=True)
    if not asked.dry_run:
        what = (__doc__ or "").split("\n\n")[-1].strip()
        key = {f"{row['size']} {name}": round(row[name], 3) for row in rows for name in ("time", "memory")}
        said = [f"{row['size']} {row['time']:.2f} of the time, {row['memory']:.2f} of the memory" for row in rows]
        summary = [("a frozen vision tower over one that trains, on pictures", "; ".join(said))]
        record.write("frozen", what, {"steps": rows}, rows, key, summary, 1)


if __name__ == "__main__":
    main()
