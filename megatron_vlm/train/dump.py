"""The dump of a step that a guard stopped at: JSON and npz, read back without pickle. tools/replay.py runs it again.

guards/events.jsonl          one line for each time a guard fired
guards/step-0000123.json     settings, row keys, place in the data, loss and norms
guards/step-0000123.npz      rows (n,), losses (n, s), weights (n, s)
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vlm.train.guard import Event

if TYPE_CHECKING:  # evidence brings Megatron, which tools that read a dump must not import before process.start
    from megatron_vlm.train.evidence import Evidence

FOLDER = "guards"
EVENTS = "events.jsonl"
FORMAT = 1
#: What a dump must hold, and its type.
_FIELDS: dict[str, type] = {
    "step": int,
    "event": dict,
    "loss": (float, str),  # type: ignore[dict-item]
    "norms": dict,
    "modules": dict,
    "keys": list,
    "keys_hash": str,
    "data": dict,
    "config": dict,
}


@dataclass(frozen=True)
class Dump:
    """A dump read back."""

    facts: dict[str, Any]
    """The JSON file; see `write`."""
    rows: np.ndarray
    losses: np.ndarray
    weights: np.ndarray


def write(run: Path, event: Event, facts: dict[str, Any], evidence: Evidence, most: int) -> Path | None:
    """Note the event; dump it too unless the run has `most` dumps already (then None).

    facts: step, loss, losses, norms, keys, keys_hash, data (the loader's state before the step), config, layout.
    """
    folder = run / FOLDER
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{event.step:07d}.json"
    dumps = path.exists() or len(list(folder.glob("step-*.json"))) < most
    line = {"time": datetime.now().astimezone().isoformat(timespec="seconds"), **asdict(event), "words": event.words}
    with open(folder / EVENTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(_plain(line | {"dump": path.name if dumps else None})) + "\n")
    if dumps:
        np.savez(path.with_suffix(".npz"), rows=evidence.rows, losses=evidence.losses, weights=evidence.weights)
        content = {"format": FORMAT, "event": asdict(event), "modules": evidence.norms, **facts}
        path.write_text(json.dumps(_plain(content), indent=1) + "\n", encoding="utf-8")
    return path if dumps else None


def read(path: Path) -> Dump:
    """A dump, its form checked. Raises ValueError where the file is none or is damaged."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ValueError(f"it is not a dump of format {FORMAT}")
        wrong = [name for name, kind in _FIELDS.items() if not isinstance(facts.get(name), kind)]
        if wrong:
            raise ValueError(f"{', '.join(wrong)} is missing or of a wrong type")
        with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
            rows, losses, weights = (arrays[name] for name in ("rows", "losses", "weights"))
        if losses.ndim != 2 or losses.shape != weights.shape or rows.shape != losses.shape[:1]:
            raise ValueError(f"its arrays do not fit each other: {rows.shape}, {losses.shape}, {weights.shape}")
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read: {error}. Give the step-*.json of a guard, with its npz file beside it."
        ) from error
    return Dump(facts, rows, losses, weights)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
