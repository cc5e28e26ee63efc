"""Host memory that a checkpoint takes on a data-parallel rank: its own part of the optimizer, or a replica's together.

A decoder of Megatron's with its distributed optimizer, float32, on data-parallel ranks. `own part` is the trainer's
sharded state; `together` is Megatron's fully_reshardable with its memory-efficient option, which puts the same tensors
into a checkpoint, but gathers them on the first rank to save and gives each rank all of them to load. Figures are of
the rank that needs most: resident memory at its highest beyond what was there before, and seconds of its processor.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from megatron_vlm.parallel.pool import Pool  # noqa: E402
from tests.checkpoint import toy  # noqa: E402

#: Live state of a parameter in float32: itself and two moments.
BYTES_PER_PARAMETER = 12


def resident(field: str) -> float:
    """MB of VmRSS (now) or VmHWM (at most since `forget`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024 / 1e6


def forget() -> None:
    """The most resident memory so far is what there is now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(folder: Path, width: int, rounds: int) -> dict[str, Any]:
    """On each rank: figures by way and by save and load."""
    import torch.distributed as dist
    from megatron.core import dist_checkpointing

    from megatron_vlm.checkpoint import load, save, sharded

    layout = Layout(dist.get_world_size())
    models, optimizer = toy.build(layout, width=width)
    toy.step(models, optimizer, 1, layout)
    together = sharded.metadata() | {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
    }

    def state(way: str, is_loading: bool) -> dict[str, Any]:
        if way == "own part":
            return sharded.build(models, optimizer, is_loading=is_loading)
        made = sharded.build_models(models)
        found = optimizer.sharded_state_dict(dict(made), is_loading=is_loading, metadata=together)
        found["param_state"] = found["param_state"] or {}
        return made | {"optimizer": found}

    settings = toy.config()
    figures: dict[str, list[float]] = {}

    def watched(name: str, run: Any) -> None:
        dist.barrier()
        forget()
        before, began = resident("VmRSS"), time.process_time()
        run()
        figures.setdefault(f"{name} s", []).append(time.process_time() - began)
        figures.setdefault(f"{name} MB", []).append(resident("VmHWM") - before)

    for number in range(rounds):
        for way in ("own part", "together"):
            directory = folder / f"{way} {number}".replace(" ", "_")

            def write(way: str = way, directory: Path = directory) -> None:
                documents = save.record.documents(settings, {})
                save.write(directory, state(way, False), documents, 1, settings.checkpoint)

            def read(way: str = way, directory: Path = directory) -> None:
                with load.unpickle.only_weights():
                    dist_checkpointing.load(state(way, True), str(directory / "iter_0000001"))

            watched(f"{way}: save", write)
            watched(f"{way}: load", read)
    replica = BYTES_PER_PARAMETER * sum(each.numel() for each in models[0].parameters()) / 1e6
    return {name: median(values) for name, values in figures.items()} | {"replica MB": replica}


def main() -> None:
    parser = record.options(__doc__, rounds=2, threads=False)
    parser.add_argument("--ranks", type=int, default=4, help="data-parallel ranks (default: %(default)s)")
    parser.add_argument("--width", type=int, default=2048, help="of the decoder (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (a temporary one)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        pool = Pool(asked.ranks)
        try:
            ranks = pool.run(measure, Path(work), asked.width, asked.rounds, timeout_s=600)
        finally:
            pool.close()
    most = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
    rows = [
        {"": f"{way}: {act}", "MB": most[f"{way}: {act} MB"], "processor s": most[f"{way}: {act} s"]}
        for act in ("save", "load")
        for way in ("own part", "together")
    ]
    print(record.table(rows))
    if not asked.dry_run:
        key = {act: round(most[f"own part: {act} MB"] / most[f"together: {act} MB"], 3) for act in ("save", "load")}
        figures = [
            f"{key[act]:.2f} ({most[f'own part: {act} MB']:.0f} of {most[f'together: {act} MB']:.0f} MB)" for act in key
        ]
        compared = "host memory of a checkpoint, each data-parallel rank its part over a replica's together: save; load"
        summary = [(compared, "; ".join(figures))]
        what = (
            f"{(__doc__ or '').strip()}\n\n{asked.ranks} ranks, {most['replica MB']:.0f} MB of weights and optimizer "
            f"in a replica. Medians of {asked.rounds} runs."
        )
        record.write("checkpoint_memory", what, {"rows": rows, "ranks": ranks}, rows, key, summary)


if __name__ == "__main__":
    main()
