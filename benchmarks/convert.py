"""Conversion at a real size: Qwen3-0.6B and SigLIP2 so400m (random weights, bf16), in and out again.

Every step runs in a process of its own, whose peak resident memory (mapped file pages included) and wall time are
measured, start of Python and imports included. In turn with it the same files are copied through safetensors, and the
copies sent to the disk too, as conversion does; `unsynced` is the same copy without. What a run wrote before is removed
right before it, so that each finds as much memory for its files as the others.
Bounds: memory under 1.3 x the largest source shard + 1 GB, time under 2 x the copy.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402

COPY = """
import os, sys
from pathlib import Path
from typing import Any
from safetensors.torch import load_file, save_file
sync, *sources, out = sys.argv[1:]
for source in map(Path, sources):
    for file in sorted(source.glob("*.safetensors")):
        copy = Path(out) / f"{source.name}-{file.name}"
        save_file(load_file(file), copy)
        if sync == "sync":
            with copy.open("rb") as stream:
                os.fsync(stream.fileno())
"""
#: (seconds, seconds of processor time, peak resident bytes) of a process.
Cost = tuple[float, float, float]


def source(folder: Path, form: str, shard_bytes: int) -> None:
    """A language model (`qwen`) or vision tower (`siglip`) with random bf16 weights of the real shapes."""
    import dataclasses

    import torch

    from megatron_vlm.config.presets import PRESETS
    from megatron_vlm.convert import describe, hf
    from megatron_vlm.convert.entries import entries

    arch = PRESETS["qwen3_0.6b"]
    if form == "siglip":
        # All 27 layers and the last norm, as the source has them.
        arch = dataclasses.replace(arch, connector=dataclasses.replace(arch.connector, taps=()))
    shapes = {
        key: shape
        for entry in entries(arch)
        if form in entry.cells and not entry.copy
        for key, shape in entry.stored(form).items()
    }
    generator = torch.Generator().manual_seed(0)
    prefix = "vision_model." if form == "siglip" else ""
    planned = [
        hf.Planned(
            prefix + key, torch.bfloat16, shape,
            lambda shape=shape: (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16),
        )
        for key, shape in shapes.items()
    ]  # fmt: skip
    config = describe.qwen(arch.language, "bfloat16") if form == "qwen" else describe.tower(arch, "bfloat16")
    hf.write(folder, planned, {"config.json": json.dumps(config)}, shard_bytes=shard_bytes)


def run(*command: object) -> Cost:
    """The cost of a Python process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{error.decode()}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def largest(*folders: Path) -> int:
    return max(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def measure(work: Path, name: str, shard_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """Import and export of sources cut into files of at most `shard_bytes`, each in turn with a copy."""
    language, vision = sources = [work / name / "language", work / name / "vision"]
    for folder, form in ((language, "qwen"), (vision, "siglip")):
        # In a process of its own: the peak of a process counts from that of the one that starts it.
        if not folder.exists():
            run(__file__, "--make", folder, form, shard_bytes)
    tool = ROOT / "tools" / "convert_hf.py"
    checkpoint, out = work / name / "checkpoint", work / name / "out"

    def fresh(folder: Path, command: Callable[[], Cost], *, made: bool = False) -> Cost:
        shutil.rmtree(folder, ignore_errors=True)
        if made:
            folder.mkdir()
        os.sync()  # what is left of the run before is not this one's to write
        return command()

    def copy(sync: str) -> Cost:
        copies = work / name / "copies"
        return fresh(copies, lambda: run("-c", COPY, sync, *sources, copies), made=True)

    # The checkpoint is the source of an export; its bound is the tighter one of the folders that it came from.
    steps: dict[str, Callable[[], Cost]] = {
        "unsynced": lambda: copy("no"),
        "copy": lambda: copy("sync"),
        "import": lambda: fresh(
            checkpoint, lambda: run(tool, "import", "--language", language, "--vision", vision, "--out", checkpoint)
        ),
        "export": lambda: fresh(
            out,
            lambda: run(
                tool, "export", "--format", "parts", "--checkpoint", checkpoint, "--out", out,
                "--shard-gb", shard_bytes / 1e9,
            ),
        ),
    }  # fmt: skip
    found: dict[str, list[Cost]] = {step: [] for step in steps}
    for number in range(rounds + 1):
        for step, command in steps.items():
            cost = command()
            if number:  # the first fills caches
                found[step].append(cost)
    run(tool, "verify", language, out / "language")
    for folder in (work / name / "copies", out, checkpoint):
        shutil.rmtree(folder)
    middle = {step: [statistics.median(column) for column in zip(*costs, strict=True)] for step, costs in found.items()}
    bound = 1.3 * largest(*sources) + 1e9
    rows = []
    for step in ("import", "export"):
        peak = max(peak for *_, peak in found[step])
        rows.append(
            {
                "files": sum(len(list(folder.glob("*.safetensors"))) for folder in sources),
                "GB": sum(map(size, sources)) / 1e9,
                "step": step,
                "s": middle[step][0],
                "copy s": middle["copy"][0],
                "times copy": middle[step][0] / middle["copy"][0],
                "unsynced copy s": middle["unsynced"][0],
                "CPU s": middle[step][1],
                "copy CPU s": middle["copy"][1],
                "memory GB": peak / 1e9,
                "bound GB": bound / 1e9,
            }
        )
    return rows


def main() -> int:
    """Measure; 1 where a bound is not kept."""
    parser = record.options(__doc__, threads=False)
    parser.add_argument(
        "--work", type=Path, help="where the models are written, about 10 GB; sources stay (a temporary directory)"
    )
    parser.add_argument("--make", nargs=3, metavar=("DIR", "FORM", "BYTES"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        source(Path(asked.make[0]), asked.make[1], int(asked.make[2]))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        rows = [
            row
            for name, shard in (("one file each", 10**10), ("files of 0.35 GB", 350_000_000))
            for row in measure(asked.work or Path(temporary), name, shard, asked.rounds)
        ]
    print(record.table(rows))
    missed = [
        f"{row['step']} of {row['files']} files"
        for row in rows
        if row["times copy"] >= 2 or row["memory GB"] >= row["bound GB"]
    ]
    if missed:
        print(f"not within its bounds: {', '.join(missed)}")
    if not asked.dry_run:
        key, summary = {}, []
        for step in ("import", "export"):
            times = [row["times copy"] for row in rows if row["step"] == step]
            key |= {
                f"{step} of {row['files']} files": round(row["times copy"], 2) for row in rows if row["step"] == step
            }
            what = f"{step} of Qwen3-0.6B and SigLIP2 so400m over copying the files through safetensors"
            summary.append((what, f"{record.span(times)} (asked for: 2)"))
        peaks = [row["memory GB"] for row in rows]
        summary.append(("peak memory of both, GB", f"{record.span(peaks)} (asked for: {rows[-1]['bound GB']:.2f})"))
        what = f"{(__doc__ or '').strip()}\n\nMedians of {asked.rounds} runs."
        record.write("convert", what, {"rows": rows}, rows, key, summary)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
