"""Crops dealt over two ranks against one rank that encodes them all: tower and connector, forward and backward.

    python benchmarks/vision.py [--crops 8] [--rounds 5]

Two processes with a core each, over gloo, tensor parallelism of 2: each encodes half of the crops, patches of windows
that lie across two crops travel, features are gathered. One process, one core, has all crops. Twice as fast is the most
that two can be; the counts of crops that each rank gets are those of the trainer.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, samples, trainers  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from megatron_vlm.parallel.pool import Pool  # noqa: E402
from megatron_vlm.parallel.split import even_counts, offsets  # noqa: E402

#: Those whose key-value heads two ranks can share.
SIZES = ("tiny", "0.6B widths")


def on_rank(world: int, size: str, crops: int, rounds: int) -> float:
    """Median seconds of a pass on this rank; ranks begin together."""
    import torch.distributed as dist

    from megatron_vlm.model import features
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups

    layout = Layout(world, tensor=world)
    groups.initialize(layout, timeout_s=60)
    arch = trainers.ARCHITECTURES[size]
    settings = trainers.config(arch, ("language", "base_embeddings"), "float32")
    settings = replace(settings, parallel=replace(settings.parallel, tensor=world))
    (model,) = build(settings, layout)
    maker = samples.Maker(arch)
    # One wide picture: a row of crops, windows lie across two of them.
    row = [maker.image(100 * arch.vision.image_size, 10, 8, 4, crops - 1)]
    batch = samples.packed(arch, [row])
    counts = even_counts(len(batch.crops), world)
    start = offsets(counts)[dist.get_rank()]
    own = batch.crops[start : start + counts[dist.get_rank()]]
    group = groups.tensor_and_context()
    seconds = []
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        found = features.encode(model.vision, model.connector, own, batch.windows, counts, group)
        found.float().square().mean().backward()
        dist.barrier()
        seconds.append(time.perf_counter() - began)
        model.zero_grad()
    return statistics.median(seconds[1:])


def main() -> None:
    parser = record.options(__doc__, rounds=5, threads=False)
    parser.add_argument("--crops", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", default=SIZES, choices=SIZES)
    asked = parser.parse_args()
    pools = {world: Pool(world) for world in (1, 2)}
    found: list[dict[str, Any]] = []
    try:
        for size in asked.sizes:
            times = {world: max(pool.run(on_rank, world, size, asked.crops, asked.rounds, timeout_s=170))
                     for world, pool in pools.items()}  # fmt: skip
            found.append({"size": size, "crops": asked.crops, "one rank ms": 1000 * times[1],
                          "two ranks ms": 1000 * times[2], "times faster": times[1] / times[2]})  # fmt: skip
            print(found[-1], flush=True)
    finally:
        for pool in pools.values():
            pool.close()
    if not asked.dry_run:
        key = {row["size"]: round(row["times faster"], 2) for row in found}
        what = (__doc__ or "").split("\n\n")[-1].strip()
        summary = [(f"{row['crops']} crops on two ranks against one, {row['size']}",
                    f"{row['times faster']:.2f} times faster (2 would be all)") for row in found]  # fmt: skip
        record.write("vision", what, {"passes": found}, found, key, summary, 1)


if __name__ == "__main__":
    main()
