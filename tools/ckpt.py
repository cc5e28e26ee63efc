"""Look into checkpoints: what one holds, whether it is sound, how two differ.

    python tools/ckpt.py info runs/tiny-stage1              the newest of a run, or any checkpoint
    python tools/ckpt.py verify runs/tiny-stage1            all checkpoints of a run; exit code 1 if one is damaged
    python tools/ckpt.py diff A B [--tolerance 1e-6]        settings, model and weights; exit code 1 if weights differ
    python tools/ckpt.py whole CKPT --out DIR               a copy that needs no frozen weights beside it

Works without a GPU and without the model; checkpoints of any layout. Files are verified before anything is read, and no
pickle is trusted.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.checkpoint import record as records
from megatron_vlm.checkpoint import unpickle, verify, whole
from megatron_vlm.config import errors

#: Tensors that `diff` names.
_SHOWN = 20


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="what a checkpoint holds").add_argument("checkpoint", type=Path)
    commands.add_parser("verify", help="whether checkpoints are sound").add_argument("checkpoint", type=Path, nargs="+")
    diff = commands.add_parser("diff", help="how two checkpoints differ")
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    diff.add_argument(
        "--tolerance", type=float, default=0.0, help="largest relative difference of a tensor (default 0)"
    )
    copy = commands.add_parser("whole", help="copy a checkpoint with the frozen weights that it refers to")
    copy.add_argument("checkpoint", type=Path)
    copy.add_argument("--out", type=Path, metavar="DIR", required=True, help="directory for the copy, iter_*")
    asked = parser.parse_args(argv)
    try:
        if asked.command == "info":
            print(info(asked.checkpoint))
            return 0
        if asked.command == "verify":
            return check(asked.checkpoint)
        if asked.command == "whole":
            print(f"Written: {whole.whole(names.find(asked.checkpoint), asked.out)}")
            return 0
        text, worst = compare(asked.first, asked.second)
        print(text)
        return 0 if worst <= asked.tolerance else 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {errors.words(error)}", file=sys.stderr)
        return 1


def info(path: Path) -> str:
    """A checkpoint in words. Raises ValueError where there is none or its small files are damaged."""
    record = records.read(path)
    numbers: dict[str, int] = defaultdict(int)
    sizes = []
    for folder, metadata in unpickle.read_folders(record.path):
        entries = verify.read_manifest(folder)["files"]
        sizes.append(f"{sum(entry['bytes'] for entry in entries.values()):,} bytes in {len(entries)} files")
        for name, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata):
                part = "optimizer" if name.startswith(records.OPTIMIZER) else ".".join(name.split(".")[:2])
                numbers[part] += math.prod(entry.size)
    model, run = record.config.get("model", {}), record.config.get("run", {})
    state = record.state
    lines = [
        f"{record.path}: after step {record.step}",
        f"run        {run.get('name')}, preset {model.get('preset')}, layout when saved "
        f"{_degrees(record.config.get('parallel', {}))}",
        f"size       {sizes[0]}",
        *(f"frozen     {size}, in {folder} for all checkpoints there" for size in sizes[1:]),
    ]
    data = state.get("data")
    if isinstance(data, dict):
        lines.append(f"data       goes on at window {data.get('window')}, row {data.get('offset')} of it")
        lines += [f"           {name} {value}" for name, value in data.get("of", {}).items()]
    counters = state.get("counters")
    if isinstance(counters, dict):
        lines.append("counters   " + (", ".join(f"{name} {value}" for name, value in counters.items()) or "none"))
    made = state.get("environment", {})
    if made:
        packages = made.get("packages", {})
        lines.append(
            f"code       megatron_vlm {made.get('megatron_vlm')}, commit {made.get('commit')}, torch "
            f"{packages.get('torch')}, megatron-core {packages.get('megatron-core')}"
        )
    for stage in reversed(state.get("stages", [])):
        sources = f", from {', '.join(stage['sources'])}" if stage["sources"] else ""
        lines.append(f"weights    of run {stage['run']}, step {stage['step']} ({stage['checkpoint']}){sources}")
    lines.append("numbers    by part:")
    lines += [f"  {count:>15,}  {part}" for part, count in sorted(numbers.items())]
    return "\n".join(lines)


def _degrees(parallel: dict[str, Any]) -> str:
    degrees = ("tensor", "pipeline", "context")
    return " x ".join(f"{name} {parallel.get(name, 1)}" for name in degrees)


def check(paths: Sequence[Path]) -> int:
    """Verify every checkpoint that `paths` mean (a run: all of its), one line each; the exit code."""
    worst = 0
    known: set[Path] = set()
    for path in paths:
        found = names.complete(path) or names.complete(path / "checkpoints") or [names.find(path)]
        for checkpoint in found:
            try:
                verify.verify(checkpoint, known=known)
                record = records.read(checkpoint)
                unpickle.read_folders(checkpoint)
                print(f"sound    {checkpoint} (step {record.step})")
            except ValueError as error:
                worst = 1
                print(f"DAMAGED  {error}")
    return worst


def compare(first: Path, second: Path) -> tuple[str, float]:
    """The differences as text, and the largest relative difference of a tensor; infinite where shapes differ."""
    from megatron_vlm.convert.stored import Checkpoint

    one, other = Checkpoint(first), Checkpoint(second)
    lines = [f"first   {one.path} (step {one.record.step})", f"second  {other.path} (step {other.record.step})"]
    for what in ("config", "architecture", "state"):
        was, now = _flat(getattr(one.record, what)), _flat(getattr(other.record, what))
        changed = [name for name in dict.fromkeys([*was, *now]) if was.get(name) != now.get(name)]
        if what == "state":
            changed = [name for name in changed if not name.startswith("guard.")]
        lines += [f"{what}.{name}: {was.get(name, '-')} | {now.get(name, '-')}" for name in changed]
    worst, found = 0.0, []
    for name in sorted({*one.shapes, *other.shapes}):
        if one.shapes.get(name) != other.shapes.get(name):
            found.append((math.inf, f"{name}: {one.shapes.get(name, 'missing')} | {other.shapes.get(name, 'missing')}"))
            continue
        a, b = one.read(name).double(), other.read(name).double()
        if not torch.equal(a, b):
            distance = ((a - b).norm() / max(a.norm().item(), 1e-30)).item()
            distance = math.inf if math.isnan(distance) else distance
            found.append((distance, f"{name}: relative difference {distance:.2e}, largest {(a - b).abs().max():.2e}"))
    found.sort(key=lambda item: -item[0])
    worst = found[0][0] if found else 0.0
    lines += [text for _, text in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"... and {len(found) - _SHOWN} more")
    total = len({*one.shapes, *other.shapes})
    lines.append(f"{total - len(found)} of {total} tensors are equal bit for bit; largest difference {worst:.2e}.")
    return "\n".join(lines), worst


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
