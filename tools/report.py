"""One page about a run, or about two side by side: RUN/report.html, which needs no network and no other file.

    python tools/report.py runs/tiny-stage1
    python tools/report.py runs/a runs/b --out compared.html

Losses (overall, held out, per data set), learning rates, gradient norms, throughput, data waits, what was skipped, what
guards saw, checkpoints, settings and environment. Also for a run that is still going on, or was cut off.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jinja2
import yaml

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.config import errors
from megatron_vlm.train.chart import COLORS, Line, chart

#: Charts: title, unit, names of the metrics (a name that ends in * stands for all that begin so), logarithmic.
CHARTS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("Loss", "nats", ("loss", "eval_loss"), True),
    ("Loss per data set", "nats", ("loss/*",), True),
    ("Held-out loss per data set", "nats", ("eval_loss/*",), True),
    ("Scores of tasks", "", ("task/*",), False),
    ("Learning rates", "", ("lr_*",), False),
    ("Gradient norms before clipping", "", ("grad_norm*",), True),
    ("Tokens", "per second", ("useful_tokens_per_s", "image_tokens_per_s"), False),
    ("Time of a step", "seconds", ("step_time_s", "data_wait_s", "save_wait_s"), False),
    ("Model FLOP/s", "", ("model_flops_per_s",), False),
    ("Fill of the rows", "share", ("fill",), False),
    ("Skipped, spikes, rollbacks", "count", ("skipped_steps", "skipped_samples", "spikes", "rollbacks"), False),
)
#: A metric with more steps is drawn as running means too.
_SMOOTH_FROM = 200
#: Beginnings of metrics that not every step has.
_SOMETIMES = ("eval_", "task/")
#: But not these: they have no noise, and their corners matter.
_EXACT = ("lr_", "skipped_", "spikes", "rollbacks", *_SOMETIMES)
TEMPLATE = Path(__file__).with_suffix(".html.j2")


@dataclass(frozen=True)
class Run:
    """What a run directory holds; parts that are missing are empty."""

    name: str
    steps: list[dict[str, Any]]
    cut: int
    """Lines of metrics.jsonl that are no JSON: the last one of a run that was cut off."""
    environment: dict[str, Any]
    config: dict[str, Any]
    ending: dict[str, Any]
    events: list[dict[str, Any]]
    checkpoints: list[tuple[str, int]]
    """Name and bytes."""
    stragglers: list[dict[str, Any]]
    """Where the time of the ranks went, by logging interval."""

    @property
    def planned(self) -> Any:
        """Steps of the whole run, where its settings say so."""
        train = self.config.get("train")
        return train.get("steps") if isinstance(train, dict) else None


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="one run directory, or two")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first run)")
    asked = parser.parse_args(argv)
    if len(asked.runs) > 2:
        parser.error("name one run or two")
    out = asked.out or asked.runs[0] / "report.html"
    try:
        out.write_text(page([read(path) for path in asked.runs]), encoding="utf-8")
    except (ValueError, OSError) as error:
        print(f"error: {errors.words(error)}", file=sys.stderr)
        return 1
    print(f"{out}: open it in a browser")
    return 0


def read(folder: Path) -> Run:
    """Raises ValueError where there is no metrics.jsonl, or no step in it."""
    log = folder / "metrics.jsonl"
    if not log.is_file():
        raise ValueError(f"{log} is not there. Is {folder} the directory of a run that has done a step?")
    lines, cut = _json_lines(log)
    steps = [line for line in lines if isinstance(line.get("step"), int)]
    if not steps:
        raise ValueError(f"{log} holds no steps yet.")
    for step in steps:
        took = step.get("step_time_s")
        for kind in ("useful_tokens", "image_tokens"):
            if isinstance(step.get(kind), int | float) and took:
                step[f"{kind}_per_s"] = step[kind] / took
    sizes = [
        (path.name, sum(file.stat().st_size for file in path.iterdir() if file.is_file()))
        for path in names.complete(folder / "checkpoints")
    ]
    events, _ = _json_lines(folder / "guards" / "events.jsonl")
    return Run(
        folder.resolve().name,
        steps,
        cut + len(lines) - len(steps),
        _document(folder / "environment.json", json.loads),
        _document(folder / "config.yaml", yaml.safe_load),
        _document(folder / "exit.json", json.loads),
        events,
        sizes,
        _json_lines(folder / "stragglers.jsonl")[0],
    )


def _json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The objects in a file of JSON lines, and how many lines are none."""
    if not path.is_file():
        return [], 0
    found, bad = [], 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            bad += 1
    return found, bad


def _document(path: Path, parse: Any) -> dict[str, Any]:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return value if isinstance(value, dict) else {}


def page(runs: Sequence[Run]) -> str:
    """The whole page. Whatever stands in a run's files is text there: the template escapes it."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "shown": _number,
        "cell": _cell,
        "yaml": lambda value: yaml.safe_dump(value, sort_keys=False),
    }
    every = [_flat(run.config) for run in runs]
    slowest, phases = _slowest(runs)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=" and ".join(run.name for run in runs),
        names=[run.name for run in runs],
        numbers=range(1, 1 + len(runs)),
        runs=runs,
        summary=_summary(runs),
        figures=[figure for number, each in enumerate(CHARTS) if (figure := _figure(runs, *each, f"chart{number}"))],
        guards=[
            [run.name, *(event.get(name) for name in ("step", "words", "policy", "dump", "time"))]
            for run in runs
            for event in run.events
        ],
        slowest=slowest,
        phases=phases,
        checkpoints=[[run.name, name, size / 1e6] for run in runs for name, size in run.checkpoints],
        changed=[row for row in _rows(every) if row[1] != row[-1]],
        environment=_rows([_flat(run.environment) for run in runs]),
    )


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _cell(value)
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e12):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "–" if value is None else str(value)


def _summary(runs: Sequence[Run]) -> list[list[Any]]:
    """Figures over the whole of each run: name, then a value for each."""
    rows: list[list[Any]] = []

    def row(name: str, value: Any) -> None:
        rows.append([name, *(value(run.steps) for run in runs)])

    row("loss, mean of the last 20 steps", lambda steps: _mean(_values(steps[-20:], "loss")))
    row("held-out loss, last", lambda steps: (_values(steps, "eval_loss") or [None])[-1])
    row("held-out loss, best", lambda steps: min(_values(steps, "eval_loss"), default=None))
    row("useful tokens", lambda steps: sum(_values(steps, "useful_tokens")))
    row("samples", lambda steps: sum(_values(steps, "samples")))
    row("useful tokens per second", lambda steps: _rate(steps, "useful_tokens"))
    row("time in steps, minutes", lambda steps: sum(_values(steps, "step_time_s")) / 60)
    row("share of it waiting for data, %", lambda steps: _percent(_rate(steps, "data_wait_s")))
    row("fill of the rows, %", lambda steps: _percent(_mean(_values(steps, "fill"))))
    rows.append(["most memory of a rank, GB", *(_last_memory(run) for run in runs)])
    row("MFU, %", lambda steps: _percent(_mean(_values(steps, "mfu"))))
    for name in ("skipped_steps", "skipped_samples", "spikes", "rollbacks"):
        row(name.replace("_", " "), lambda steps, name=name: (_values(steps, name) or [None])[-1])
    return rows


def _last_memory(run: Run) -> Any:
    return run.stragglers[-1].get("most_memory_gb") if run.stragglers else None


def _values(steps: Sequence[dict[str, Any]], name: str) -> list[Any]:
    values = [step.get(name) for step in steps]
    return [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _rate(steps: Sequence[dict[str, Any]], name: str) -> float | None:
    time_s = sum(_values(steps, "step_time_s"))
    return sum(_values(steps, name)) / time_s if time_s else None


def _figure(
    runs: Sequence[Run], title: str, unit: str, wanted: tuple[str, ...], log: bool, name: str
) -> dict[str, Any] | None:
    """One chart with its legend; None where no run has such numbers. Colour = metric, dashes = the second run."""
    lines: list[Line] = []
    legend = []
    for index, metric in enumerate(_found(runs, wanted)):
        color = COLORS[index % len(COLORS)]
        drawn, noisy = len(lines), not metric.startswith(_EXACT)
        for dashed, run in enumerate(runs):
            points = [(step["step"], step[metric]) for step in run.steps if _values([step], metric)]
            if not points or title.startswith("Skipped") and not any(value for _, value in points):
                continue
            lines.append(Line(points, color, bool(dashed), noisy and len(points) >= _SMOOTH_FROM))
        if len(lines) > drawn:
            short = metric.split("/", 1)[-1] if "/" in metric else metric.replace("eval_", "held-out ")
            legend.append((color, short if "/" in metric else short.replace("_", " ")))
    svg = chart(lines, log, name)
    unit = ", ".join(filter(None, (unit, "logarithmic" if log else "")))
    return {"title": title, "unit": unit, "svg": svg, "legend": legend} if svg else None


def _found(runs: Sequence[Run], wanted: tuple[str, ...]) -> list[str]:
    """The metrics that `wanted` means, of those that the runs have."""
    known = dict.fromkeys(name for run in runs for step in (run.steps[0], run.steps[-1]) for name in step)
    known |= dict.fromkeys(name for run in runs for step in run.steps for name in step if name.startswith(_SOMETIMES))
    found = [name for pattern in wanted for name in known if fnmatchcase(name, pattern)]
    return [name for name in found if not name.endswith("/not_scored")]


def _slowest(runs: Sequence[Run]) -> tuple[list[list[Any]], list[str]]:
    """Seconds of each phase in the last interval: the median rank, and the ranks with most work of their own."""
    rows: list[list[Any]] = []
    phases: list[str] = []
    for run in runs:
        last = run.stragglers[-1] if run.stragglers else {}
        median, slowest = last.get("median_s"), last.get("slowest")
        if not isinstance(median, dict) or not isinstance(slowest, list):
            continue
        phases = phases or list(median)
        named = [(f"rank {each.get('rank')}", each) for each in slowest if isinstance(each, dict)]
        for name, times in [(f"median of {last.get('ranks')} rank(s)", median), *named]:
            rows.append([run.name, name, *(times.get(phase) for phase in phases)])
    return rows, phases


def _rows(columns: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Dictionaries side by side: key, then a value of each."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [[key, *(column.get(key) for column in columns)] for key in keys]


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
