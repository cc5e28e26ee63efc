"""The planner's roofline against measured steps, on the only device at hand: this processor.

    python benchmarks/planner.py [--sizes small "0.6B widths"] [--threads 1] [--rounds 3]

The processor becomes a device whose arithmetic and memory bandwidth are measured first (a large matrix product; a copy
of 256 MB, read and written); the planner then predicts the step of the batch that benchmarks/step.py runs, with all of
both reached. Its operators are those of a GPU run. A share of 0.8 means that the step took 1.25 times the prediction.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, samples, step, trainers  # noqa: E402
from megatron_vlm.batch import Batch  # noqa: E402
from megatron_vlm.model.products import product  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from megatron_vlm.plan import hardware, time, workload  # noqa: E402

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def device(rounds: int) -> hardware.Gpu:
    """This processor as the planner sees a device."""
    speeds = {}
    for name, dtype in DTYPES.items():
        one, other = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        spent = record.medians(record.alternate({"product": lambda one=one, other=other: product(one, other)}, rounds))
        speeds[name] = int(2 * 1024 * 2048 * 2048 / spent["product"])
    large = torch.zeros(64_000_000)
    target = torch.empty_like(large)
    copied = record.medians(record.alternate({"copy": lambda: target.copy_(large)}, rounds))["copy"]
    return hardware.Gpu("processor", 2**40, speeds["bf16"], 0, speeds["float32"], int(2 * large.nbytes / copied), 1, 1)


def row_of(batch: Batch) -> workload.Row:
    """The batch's one row, as the planner describes rows."""
    windows, slots = batch.windows.shape
    return workload.Row(
        batch.tokens.numel(), len(batch.crops), windows, slots, int(batch.is_vision.sum()),
        int((batch.loss_weights > 0).sum()), int(batch.examples.max()) + 1,
    )  # fmt: skip


def measure(size: str, kind: str, precision: str, gpu: hardware.Gpu, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    arch, freeze = trainers.ARCHITECTURES[size], trainers.FREEZE[size]
    batch = samples.packed(arch, [step.rows(size, kind, arch)])
    config = trainers.config(arch, freeze, precision)
    config = replace(config, data=replace(config.data, sequence_length=batch.tokens.numel()))
    cluster = hardware.Cluster(gpu, 1, 1, hardware.Reach(1.0, 1.0, 1.0))
    planned = time.step(config, Layout(1), cluster, row_of(batch))
    run = trainers.ours(config, lambda model: None)([batch])
    measured = record.medians(record.alternate({"ours": run}, rounds))["ours"]
    shares = {f"planned {name} ms": 1000 * planned.shares[name] for name in ("arithmetic", "memory", "optimizer")}
    return {"size": size, "rows": kind, "precision": precision, "measured ms": 1000 * measured,
            "planned ms": 1000 * planned.total, "share": planned.total / measured, **shares}  # fmt: skip


def main() -> None:
    parser = record.options(__doc__)
    parser.add_argument("--sizes", nargs="+", default=["small", "0.6B widths"], choices=trainers.ARCHITECTURES)
    parser.add_argument("--rows", nargs="+", default=["text", "image"], choices=["text", "image", "video"])
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with trainers.alone():
        gpu = device(5)
        found = [measure(size, kind, precision, gpu, asked.rounds) for size in asked.sizes for kind in asked.rows
                 for precision in DTYPES]  # fmt: skip
    for row in found:
        print(row)
    if not asked.dry_run:
        key = {f"{row['size']} {row['rows']} {row['precision']}": round(row["share"], 3) for row in found}
        speeds = {"float32 GFLOP/s": gpu.float32_flops / 1e9, "bf16 GFLOP/s": gpu.flops / 1e9,
                  "copy GB/s": gpu.bandwidth / 1e9}  # fmt: skip
        what = (__doc__ or "").split("\n\n")[-1].strip() + f"\n\n{record.table([speeds])}"
        summary = [
            (f"planned time of a step over the measured one, on a processor, {precision}",
             record.span([row["share"] for row in found if row["precision"] == precision]))
            for precision in DTYPES
        ]  # fmt: skip
        record.write("planner", what, {"device": speeds, "steps": found}, found, key, summary, asked.threads)


if __name__ == "__main__":
    main()
