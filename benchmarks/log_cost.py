"""What a step pays for being watched and reported, against the time of the step.

    python benchmarks/log_cost.py [--steps 60]

Real runs of the loop on the sample data, one process: the tiny recipe, and the widths of Qwen3-0.6B with SigLIP2 so400m
at two layers of each. A clock stands around everything that a run without logs, counters and watchdog would not do:
the step's record and its lines (metrics.jsonl, ledger.jsonl, TensorBoard, progress every 10 steps), what the model has
to compute (for MFU), stragglers every 10 steps, norms of the modules every 100; phases for the watchdog are counted and
priced by a loop over one. Threads beside training (TensorBoard's writer, the watchdog) count with all of their
processor time, as on a machine without a free core. Bound: 1 % of the step, medians over steps where it is once a step.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, trainers  # noqa: E402
from megatron_vlm.config import load  # noqa: E402
from megatron_vlm.config.schema import Config  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402

BOUND = 0.01
RECIPE = record.ROOT / "examples" / "recipes" / "tiny" / "stage1.yaml"
#: How often these are called in a run of the recipes, in steps.
STRAGGLERS_EVERY, NORMS_EVERY = 10, 100
#: Steps at the beginning that are left out: the first ones of a process allocate.
WARM_UP = 5


@contextmanager
def timed(owner: Any, name: str, times: dict[str, list[float]]) -> Iterator[None]:
    """Seconds of each call of `owner.name`, under its name."""
    original = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            times[name].append(time.perf_counter() - began)

    setattr(owner, name, called)
    try:
        yield
    finally:
        setattr(owner, name, original)


def threads_s() -> float:
    """Processor time so far of the threads that report: TensorBoard's writer and the watchdog."""
    beside = [each for each in threading.enumerate() if "Writer" in type(each).__name__ or each.name == "watchdog"]
    spent = [Path(f"/proc/self/task/{each.native_id}/schedstat").read_text(encoding="ascii") for each in beside]
    return sum(int(text.split()[0]) for text in spent) / 1e9


def phase_s(calls: int = 20_000) -> float:
    """What entering a phase takes."""
    from megatron_vlm.train.pulse import Pulse

    pulse, began = Pulse(), time.perf_counter()
    for _ in range(calls):
        pulse.enter("forward")
    return (time.perf_counter() - began) / calls


def measure(config: Config) -> dict[str, Any]:
    """Milliseconds a step of each part."""
    from megatron_vlm.train import loop, step
    from megatron_vlm.train.pulse import Pulse

    times: dict[str, list[float]] = defaultdict(list)
    entered, beside = 0, 0.0
    enter: Callable[..., None] = Pulse.enter
    end = loop.Run.end

    def counted(pulse: Any, phase: str) -> None:
        nonlocal entered
        entered += 1
        enter(pulse, phase)

    def ended(run: Any, reason: str) -> str:
        nonlocal beside
        beside = threads_s()
        return end(run, reason)

    with ExitStack() as stack:
        for owner, name in ((loop.Run, "log"), (loop.Run, "log_stragglers"), (loop.Run, "log_norms")):
            stack.enter_context(timed(owner, name, times))
        for owner, name in ((step, "work_of"), (loop.Run, "step"), (loop.Run, "fetch")):
            stack.enter_context(timed(owner, name, times))
        Pulse.enter, loop.Run.end = counted, ended  # type: ignore[method-assign]
        try:
            loop.train(config, Layout(1))
        finally:
            Pulse.enter, loop.Run.end = enter, end  # type: ignore[method-assign]
    steps = config.train.steps
    per_step = len(times["work_of"]) / steps
    parts = {
        "record, lines, TensorBoard": median(times["log"][WARM_UP:]),
        "what is computed": median(times["work_of"][WARM_UP:]) * per_step,
        "phases": phase_s() * entered / steps,
        "stragglers": mean(times["log_stragglers"]) / STRAGGLERS_EVERY,
        "norms of modules": mean(times["log_norms"]) / NORMS_EVERY,
        "threads beside": beside / steps,
    }
    step_s = median([a + b for a, b in zip(times["step"], times["fetch"], strict=True)][WARM_UP:])
    return {"step": step_s, **parts, "all": sum(parts.values())}


def settings(size: str, steps: int, folder: Path) -> Config:
    """A run of the tiny recipe, at this size."""
    changes = [f"run.dir={folder}", "run.device=cpu", "eval.every=0", "checkpoint.every=0", "log.norms_every=10"]
    config = load.load(RECIPE, [*changes, f"train.steps={steps}"])
    if size == "tiny":
        return config
    wide = trainers.config(trainers.ARCHITECTURES[size], trainers.FREEZE[size], "float32")
    train = dataclasses.replace(config.train, global_batch=2, micro_batch=1, steps=max(2 * WARM_UP, steps // 5))
    return dataclasses.replace(
        config, model=wide.model, train=train, data=dataclasses.replace(config.data, max_crops=2)
    )


def main() -> int:
    parser = record.options(__doc__, rounds=1, threads=False)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--sizes", nargs="+", default=["tiny", "0.6B widths"], choices=["tiny", "0.6B widths"])
    asked = parser.parse_args()
    rows = []
    folder = Path(tempfile.mkdtemp(prefix="log-"))
    try:
        with trainers.alone():
            for size in asked.sizes:
                found = measure(settings(size, asked.steps, folder / size))
                share = found["all"] / found["step"]
                rows.append({"size": size, **{f"{name}, ms": 1000 * each for name, each in found.items()},
                             "share, %": 100 * share})  # fmt: skip
                print(rows[-1], flush=True)
    finally:
        shutil.rmtree(folder)
    key = {row["size"]: round(row["share, %"] / 100, 5) for row in rows}
    if not asked.dry_run:
        what = (__doc__ or "").split("\n\n")[-1].strip()
        table = [{"part": name, **{row["size"]: row[name] for row in rows}} for name in rows[0] if name != "size"]
        shares = ", ".join(f"{row['size']} {row['share, %']:.2g} %" for row in rows)
        summary = [("logs, counters and watchdog over the time of a step", f"{shares} (asked for: 1)")]
        record.write("log_cost", what, {"runs": rows}, table, key, summary, 1)
    return int(max(key.values()) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
