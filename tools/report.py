"""One page about a run, or about two side by side: RUN/report.html, which needs no network and no other file.

    python tools/report.py runs/tiny-stage1
    python tools/report.py runs/a runs/b --out compared.html

Losses (overall, held out, per data set), learning rates, gradient norms, throughput, data waits, what was skipped, what
guards saw, checkpoints, settings and environment. Also for a run that is still going on, or was cut off.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.train.chart import COLORS, Line, chart

#: Charts: title, unit, names of the metrics (a name that ends in * stands for all that begin so), logarithmic.
CHARTS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("Loss", "nats", ("loss", "eval_loss"), True),
    ("Loss per data set", "nats", ("loss/*",), True),
    ("Held-out loss per data set", "nats", ("eval_loss/*",), True),
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
#: But not these: they have no noise, and their corners matter.
_EXACT = ("lr_", "skipped_", "spikes", "rollbacks", "eval_")
STYLE = """
:root{color-scheme:light dark;--line:#8884;--dim:#777}
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:1.5rem auto;padding:0 1rem}
h1{font-size:1.4rem;margin:0 0 .3rem}h2{font-size:1.1rem;margin:2rem 0 .5rem}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(34rem,100%),1fr));gap:1.2rem 1.5rem}
figure{margin:0;min-width:0}figcaption{font-weight:600}figcaption small{color:var(--dim);font-weight:400}
svg{width:100%;height:auto;display:block}
.legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.85rem}
.legend i{display:inline-block;width:1.2em;border-top:3px solid;margin-right:.35em;vertical-align:middle}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.2rem .9rem .2rem 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right}.wide{overflow-x:auto}.warn{color:#c0392b}.dim{color:var(--dim)}
summary{cursor:pointer;margin:.6rem 0}pre{overflow-x:auto;font-size:.8rem;border:1px solid var(--line);padding:.6rem}
"""


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


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="one run directory, or two")
    parser.add_argument("--out", type=Path, help="the page (default: report.html in the first run)")
    asked = parser.parse_args(argv)
    if len(asked.runs) > 2:
        parser.error("name one run or two")
    try:
        runs = [read(path) for path in asked.runs]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    out = asked.out or asked.runs[0] / "report.html"
    out.write_text(page(runs), encoding="utf-8")
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
    """The whole page."""
    title = " and ".join(run.name for run in runs)
    parts = [
        f"<title>{_text(title)}</title><style>{STYLE}</style><h1>{_text(title)}</h1>",
        "".join(f"<p>{_state(run)}</p>" for run in runs),
        _summary(runs),
        '<h2>Curves</h2><div class="charts">',
        *(_figure(runs, *each) for each in CHARTS),
        "</div>",
        _guards(runs),
        _stragglers(runs),
        _checkpoints(runs),
        _settings(runs),
        "<h2>Environment</h2>",
        _table(runs, [_flat(run.environment) for run in runs], only_changes=False),
    ]
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    return head + "\n".join(parts) + "</html>\n"


def _text(value: Any) -> str:
    return html.escape(str(value))


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else _text(value)
    if isinstance(value, int) or (abs(value) >= 1000 and abs(value) < 1e12):
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _state(run: Run) -> str:
    steps = run.config.get("train", {}).get("steps") if isinstance(run.config.get("train"), dict) else None
    words = f"<b>{_text(run.name)}</b>: step {run.steps[-1]['step']:,}" + (f" of {steps:,}" if steps else "")
    outcome = run.ending.get("outcome")
    kind = ' class="warn"' if outcome == "failed" else ""
    words += f", <span{kind}>{_text(outcome)}: {_text(run.ending.get('reason'))}</span>" if outcome else ", not ended"
    started = run.environment.get("started")
    words += f" <span class=dim>started {_text(started)}</span>" if started else ""
    if run.cut:
        words += f' <span class="warn">{run.cut} line(s) of metrics.jsonl are cut off and left out</span>'
    return words


def _summary(runs: Sequence[Run]) -> str:
    """Figures over the whole of each run."""
    rows: list[tuple[str, list[Any]]] = []

    def row(name: str, value: Any) -> None:
        rows.append((name, [value(run.steps) for run in runs]))

    row("loss, mean of the last 20 steps", lambda steps: _mean(_values(steps[-20:], "loss")))
    row("held-out loss, last", lambda steps: (_values(steps, "eval_loss") or [None])[-1])
    row("held-out loss, best", lambda steps: min(_values(steps, "eval_loss"), default=None))
    row("useful tokens", lambda steps: sum(_values(steps, "useful_tokens")))
    row("samples", lambda steps: sum(_values(steps, "samples")))
    row("useful tokens per second", lambda steps: _rate(steps, "useful_tokens"))
    row("time in steps, minutes", lambda steps: sum(_values(steps, "step_time_s")) / 60)
    row("share of it waiting for data, %", lambda steps: _percent(_rate(steps, "data_wait_s")))
    row("fill of the rows, %", lambda steps: _percent(_mean(_values(steps, "fill"))))
    rows.append(("most memory of a rank, GB", [_last_memory(run) for run in runs]))
    row("MFU, %", lambda steps: _percent(_mean(_values(steps, "mfu"))))
    for name in ("skipped_steps", "skipped_samples", "spikes", "rollbacks"):
        row(name.replace("_", " "), lambda steps, name=name: (_values(steps, name) or [None])[-1])
    head = "".join(f"<th class=n>{_text(run.name)}</th>" for run in runs)
    body = "".join(
        f"<tr><td>{_text(name)}</td>" + "".join(f"<td class=n>{_number(value)}</td>" for value in values) + "</tr>"
        for name, values in rows
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


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


def _figure(runs: Sequence[Run], title: str, unit: str, wanted: tuple[str, ...], log: bool) -> str:
    """One chart with its legend; nothing where no run has such numbers. Colour = metric, dashes = the second run."""
    known = dict.fromkeys(name for run in runs for step in (run.steps[0], run.steps[-1]) for name in step)
    known |= dict.fromkeys(name for run in runs for step in run.steps for name in step if name.startswith("eval_"))
    found = [
        name for pattern in wanted for name in known if name == pattern or pattern[-1] == "*" and _fits(name, pattern)
    ]
    lines, legend = [], []
    for index, name in enumerate(found):
        color = COLORS[index % len(COLORS)]
        shown, noisy = False, not name.startswith(_EXACT)
        for dashed, run in enumerate(runs):
            points = [(step["step"], step[name]) for step in run.steps if _values([step], name)]
            if not points or title.startswith("Skipped") and not any(value for _, value in points):
                continue
            shown = True
            lines.append(Line(points, color, bool(dashed), noisy and len(points) >= _SMOOTH_FROM))
        if shown:
            label = name.split("/", 1)[-1] if "/" in name else name.replace("eval_", "held-out ").replace("_", " ")
            legend.append(f'<span><i style="border-color:{color}"></i>{_text(label)}</span>')
    if not lines:
        return ""
    if len(runs) > 1:
        legend.append(f"<span class=dim>solid {_text(runs[0].name)}, dashed {_text(runs[1].name)}</span>")
    caption = f"{_text(title)} <small>{_text(', '.join(filter(None, (unit, 'logarithmic' if log else ''))))}</small>"
    return (
        f"<figure><figcaption>{caption}</figcaption>{chart(lines, log)}"
        f'<div class="legend">{"".join(legend)}</div></figure>'
    )


def _fits(name: str, pattern: str) -> bool:
    return name.startswith(pattern[:-1])


def _guards(runs: Sequence[Run]) -> str:
    rows = [
        f"<tr><td>{_text(run.name)}</td><td class=n>{_number(event.get('step'))}</td>"
        f"<td>{_text(event.get('words'))}</td><td>{_text(event.get('policy'))}</td>"
        f"<td>{_text(event.get('dump') or '–')}</td><td class=dim>{_text(event.get('time'))}</td></tr>"
        for run in runs
        for event in run.events
    ]
    if not rows:
        return "<h2>Guards</h2><p>No guard has fired.</p>"
    head = "<tr><th>run</th><th class=n>step</th><th>what</th><th>policy</th><th>dump</th><th>time</th></tr>"
    return f'<h2>Guards</h2><div class="wide"><table>{head}{"".join(rows)}</table></div>'


def _stragglers(runs: Sequence[Run]) -> str:
    """Seconds of each phase in the last interval: the median rank, and the ranks with most work of their own."""
    rows, phases = [], []
    for run in runs:
        last = run.stragglers[-1] if run.stragglers else {}
        median, slowest = last.get("median_s"), last.get("slowest")
        if not isinstance(median, dict) or not isinstance(slowest, list):
            continue
        phases = phases or list(median)
        named = [(f"rank {each.get('rank')}", each) for each in slowest if isinstance(each, dict)]
        for name, times in [(f"median of {last.get('ranks')} rank(s)", median), *named]:
            cells = "".join(f"<td class=n>{_number(times.get(phase))}</td>" for phase in phases)
            rows.append(f"<tr><td>{_text(run.name)}</td><td>{_text(name)}</td>{cells}</tr>")
    if not rows:
        return ""
    head = "<tr><th>run</th><th>rank</th>" + "".join(f"<th class=n>{_text(phase)}</th>" for phase in phases) + "</tr>"
    return (
        "<h2>Slowest ranks</h2><p class=dim>Seconds in each phase since the progress line before the last; who is fast "
        f'waits in the others.</p><div class="wide"><table>{head}{"".join(rows)}</table></div>'
    )


def _checkpoints(runs: Sequence[Run]) -> str:
    rows = [
        f"<tr><td>{_text(run.name)}</td><td>{_text(name)}</td><td class=n>{size / 1e6:,.1f}</td></tr>"
        for run in runs
        for name, size in run.checkpoints
    ]
    if not rows:
        return "<h2>Checkpoints</h2><p>None yet.</p>"
    head = "<tr><th>run</th><th>checkpoint</th><th class=n>MB</th></tr>"
    return f"<h2>Checkpoints</h2><table>{head}{''.join(rows)}</table>"


def _settings(runs: Sequence[Run]) -> str:
    flat = [_flat(run.config) for run in runs]
    every = "".join(
        f"<details><summary>All settings of {_text(run.name)}</summary>"
        f"<pre>{_text(yaml.safe_dump(run.config, sort_keys=False))}</pre></details>"
        for run in runs
    )
    if len(runs) == 1:
        return f"<h2>Settings</h2>{every}"
    return f"<h2>Settings that differ</h2>{_table(runs, flat, only_changes=True)}{every}"


def _table(runs: Sequence[Run], columns: Sequence[dict[str, Any]], *, only_changes: bool) -> str:
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [(key, [column.get(key) for column in columns]) for key in keys]
    if only_changes:
        rows = [(key, values) for key, values in rows if values[0] != values[-1]]
    if not rows:
        return "<p>None.</p>"
    head = "".join(f"<th>{_text(run.name)}</th>" for run in runs) if len(runs) > 1 else "<th></th>"
    body = "".join(
        f"<tr><td>{_text(key)}</td>{''.join(f'<td>{_cell(value)}</td>' for value in values)}</tr>"
        for key, values in rows
    )
    return f'<div class="wide"><table><tr><th></th>{head}</tr>{body}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return _text(" ".join(map(str, value)))
    return "–" if value is None else _text(value)


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
