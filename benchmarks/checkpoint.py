"""How long a save holds up training, waited for and in the background, at 1 GB of state per rank.

    python benchmarks/checkpoint.py [--ranks 1] [--gigabytes 1.0] [--rounds 3]

A decoder of Megatron's with its distributed optimizer (tensor parallel over the ranks, float32) trains on the CPU. In
turns, one save is waited for and one is written in the background while steps go on; both through the trainer's code.
Figures are medians over the rounds, without the first one: of the seconds that the loop stood still in `save`, and of
what the steps during the write took longer than others. At the end the last background checkpoint is loaded and
compared with a copy of what was saved, bit for bit. Bound: held up under 10 % of the save that is waited for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_vlm.config.schema import CheckpointConfig, Config  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from megatron_vlm.parallel.pool import Pool  # noqa: E402
from tests.checkpoint import toy  # noqa: E402

OUT = ROOT / "benchmarks" / "results" / "checkpoint"
#: Largest share of a waited-for save that a background save may hold up training.
BOUND = 0.10
#: Live state of a parameter in float32: itself and two moments.
BYTES_PER_PARAMETER = 12


def measure(folder: Path, width: int, rounds: int) -> dict[str, Any]:
    """On each rank: the figures of this rank."""
    import warnings

    import torch
    import torch.distributed as dist

    from megatron_vlm.checkpoint import load
    from megatron_vlm.checkpoint.saver import Saver

    warnings.simplefilter("ignore")  # of Megatron and torch about each other
    layout = Layout(dist.get_world_size(), tensor=dist.get_world_size())
    models, optimizer = toy.build(layout, width=width)
    parameters = list(models[0].parameters())
    waiting, beside = (
        Saver(folder / name, Config(checkpoint=CheckpointConfig(keep=1, asynchronous=name == "beside")))
        for name in ("waited", "beside")
    )
    number = 0

    def step() -> float:
        nonlocal number
        number += 1
        began = time.perf_counter()
        toy.step(models, optimizer, number, layout)
        return time.perf_counter() - began

    def held_up(saver: Saver) -> float:
        dist.barrier()
        began = time.perf_counter()
        saver.save(models=models, optimizer=optimizer, step=number, state={})
        return time.perf_counter() - began

    def writing(saver: Saver) -> bool:
        """On any rank: all make the same number of steps."""
        alive = torch.tensor(float(saver._thread is not None and saver._thread.is_alive()))
        dist.all_reduce(alive, op=dist.ReduceOp.MAX)
        return bool(alive)

    step()
    held_up(beside)  # the first of a process is waited for, and checks the sharding
    found: list[dict[str, float]] = []
    for _ in range(rounds + 1):
        usual = median(step() for _ in range(3))
        waited_s = held_up(waiting)
        step()
        copies = [parameter.detach().clone() for parameter in parameters]
        saved = number
        held_s, slower_s, steps = held_up(beside), 0.0, 0
        while writing(beside):
            slower_s += step() - usual
            steps += 1
        beside.finish()
        print(f"round {len(found)}: waited {waited_s:.2f} s, held up {held_s:.3f} s", file=sys.stderr, flush=True)
        found.append(
            {
                "waited_s": waited_s,
                "held_up_s": held_s,
                "written_after_s": beside.took_s,
                "steps_meanwhile": steps,
                "slower_steps_s": slower_s,
                "usual_step_s": usual,
            }
        )
    load.load(folder / "beside" / f"iter_{saved:07d}", models=models)
    equal = all(torch.equal(one, other) for one, other in zip(copies, parameters, strict=True))
    figures = {name: median(one[name] for one in found[1:]) for name in found[0]}
    state = BYTES_PER_PARAMETER * sum(parameter.numel() for parameter in parameters)
    return figures | {"state_bytes": state, "equal": equal}


def main() -> int:
    """Measure; write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel ranks (default 1)")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="state per rank (default 1)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--work", type=Path, help="folder for the checkpoints (default: a temporary one)")
    asked = parser.parse_args()
    # Two layers of 4 w^2 (attention) + 6 w^2 (MLP of twice the width, gated).
    width = round((asked.gigabytes * 1e9 * asked.ranks / BYTES_PER_PARAMETER / 20) ** 0.5 / 32) * 32
    folder = Path(tempfile.mkdtemp(prefix="saves-", dir=asked.work))
    pool = Pool(asked.ranks)
    try:
        ranks = pool.run(measure, folder, width, asked.rounds, timeout_s=900)
    finally:
        pool.close()
        shutil.rmtree(folder)
    slowest = {name: max(rank[name] for rank in ranks) for name in ranks[0] if name != "equal"}
    share = slowest["held_up_s"] / slowest["waited_s"]
    result = {
        "machine": f"{len(os.sched_getaffinity(0))} CPU cores, torch {version('torch')}, megatron-core "
        f"{version('megatron-core')}, Python {platform.python_version()}",
        "ranks": asked.ranks,
        "rounds": asked.rounds,
        **slowest,
        "held_up_share": share,
        "weights_equal": all(rank["equal"] for rank in ranks),
    }
    OUT.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = (
        f"# How long a save holds up training\n\n`python benchmarks/checkpoint.py --ranks {asked.ranks}`: "
        f"{slowest['state_bytes'] / 1e9:.2f} GB of state per rank, {asked.ranks} rank(s), {result['machine']}; medians "
        f"of {asked.rounds} rounds, slowest rank.\n\n"
        f"| | seconds |\n|---|---|\n| a save that is waited for | {slowest['waited_s']:.2f} |\n"
        f"| the loop stands still for one in the background | {slowest['held_up_s']:.3f} ({share:.1%}) |\n"
        f"| until that one is complete | {slowest['written_after_s']:.2f} |\n"
        f"| what the {slowest['steps_meanwhile']:.0f} steps meanwhile took longer, in all | "
        f"{slowest['slower_steps_s']:.2f} |\n\n"
        f"Weights in the checkpoint equal those of the saved step, bit for bit: {result['weights_equal']}.\n"
    )
    OUT.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if share < BOUND and result["weights_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
