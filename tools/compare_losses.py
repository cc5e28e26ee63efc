"""Losses of two or more runs side by side, step by step.

    python tools/compare_losses.py RUN RUN [RUN ...] [--tolerance 1e-5]

The first run is the reference. Exits with 1 where a loss differs from it by more than the tolerance (relative) or a
step is missing: layouts of one recipe, and a run that was stopped and resumed, must agree.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.config import errors

#: Steps shown of long runs; all are compared.
_SHOWN = 12


def losses(run: Path) -> dict[int, float]:
    """Step -> loss of a run directory; the last entry counts where a step was done twice.

    Raises ValueError where there is no metrics.jsonl, or it holds no steps.
    """
    log = run / "metrics.jsonl"
    try:
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"{log} cannot be read: {errors.words(error)} Is {run} the directory of a run?") from error
    found = {record["step"]: float("nan") if record["loss"] is None else record["loss"] for record in records}
    if not found:
        raise ValueError(f"{log} holds no steps yet.")
    return found


def table(runs: Sequence[Path]) -> tuple[str, float]:
    """The comparison as text, and the largest relative difference to the first run; nan where a step is missing."""
    columns = [losses(run) for run in runs]
    names = [run.name for run in runs]
    width = max(14, *map(len, names))
    lines = ["  step  " + "  ".join(f"{name:>{width}}" for name in names) + "  largest difference"]
    steps = sorted(set().union(*columns))
    shown = set(steps if len(steps) <= _SHOWN else [steps[i * (len(steps) - 1) // (_SHOWN - 1)] for i in range(_SHOWN)])
    worst = 0.0
    for step in steps:
        values = [column.get(step, float("nan")) for column in columns]
        difference = max(abs(value - values[0]) / max(abs(values[0]), 1e-30) for value in values[1:])
        if any(value != value for value in values):
            difference = float("nan")
        worst = difference if not difference <= worst else worst
        if step in shown:
            lines.append(f"  {step:4d}  " + "  ".join(f"{v:{width}.10f}" for v in values) + f"  {difference:.1e}")
    return "\n".join(lines), worst


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python tools/compare_losses.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories; the first is the reference")
    parser.add_argument("--tolerance", type=float, default=1e-5, help="largest relative difference (default 1e-5)")
    asked = parser.parse_args(argv)
    if len(asked.runs) < 2:
        parser.error("name at least two runs")
    try:
        text, worst = table(asked.runs)
    except ValueError as error:
        print(f"error: {errors.words(error)}", file=sys.stderr)
        return 1
    print(text)
    if worst != worst:
        print("The runs differ: a step is missing in one of them, or a loss is not a number.", file=sys.stderr)
        return 1
    print(f"Largest relative difference: {worst:.1e}; allowed: {asked.tolerance:.1e}.")
    return 0 if worst <= asked.tolerance else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
