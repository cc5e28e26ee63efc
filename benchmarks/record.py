"""What all benchmarks share: alternating runs, and a place for their results.

Results of benchmark NAME: `results/NAME.json` (everything), `results/NAME.md` (a table), and one line in
`results/history.jsonl` (date, commit, key ratios), which is only ever added to.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "megatron-core", "transformers")


def options(description: str | None, rounds: int = 3, threads: bool = True) -> argparse.ArgumentParser:
    """The command line that all share; a benchmark adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if threads:
        parser.add_argument("--threads", type=int, default=1, help="of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=rounds, help="measured runs of each (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the results as they are")
    return parser


def alternate(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each run, which take turns: what disturbs the machine meets all of them. Warm-up is left out.

    `clock`: time.process_time counts the processor's time alone, for a machine that others use.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(warmup + rounds):
        for name, run in runs.items():
            gc.collect()
            began = clock()
            run()
            if number >= warmup:
                seconds[name].append(clock() - began)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Of each run."""
    return {name: statistics.median(each) for name, each in seconds.items()}


def machine(threads: int | None = None) -> dict[str, Any]:
    """What the numbers depend on, without names of hosts or people."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        features = next((line.split() for line in lines if line.startswith("flags")), [])
    except (OSError, StopIteration):
        return platform.machine()
    units = [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if unit in features]
    return f"{name} ({', '.join(units)})"


def commit() -> str:
    """Of the working tree; a plus sign where files of the package or the benchmarks differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--", "megatron_vlm", "tools", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + "+" * bool(changed)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([_cell(row[name]) for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def span(values: Sequence[float]) -> str:
    """Smallest to largest."""
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


def write(
    name: str,
    what: str,
    data: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    key: Mapping[str, float],
    summary: Sequence[tuple[str, str]],
    threads: int | None = None,
) -> None:
    """Write the results of benchmark `name`.

    data: everything. rows: the table. key: ratios for the history. summary: for the README's table, what is compared
    and what was measured.
    """
    RESULTS.mkdir(exist_ok=True)
    about = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": machine(threads)}
    content = {**about, "key": dict(key), "summary": list(summary), **data}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    described = ", ".join(f"{label} {value}" for label, value in about["machine"].items() if value is not None)
    text = f"# {name}\n\n{what}\n\n{table(rows)}\n\nCommit {about['commit']}, {about['date']}. {described}.\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    remember(name, key)
    print(text)


def remember(name: str, key: Mapping[str, float]) -> None:
    """A line of the history."""
    line = {"date": datetime.now(UTC).date().isoformat(), "commit": commit(), "benchmark": name, **key}
    with (RESULTS / "history.jsonl").open("a", encoding="utf-8") as history:
        history.write(json.dumps(line) + "\n")
