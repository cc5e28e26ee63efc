"""Conversion at a real size: Qwen3-0.6B and SigLIP2 so400m (random weights, bf16), in and out again.

    python benchmarks/convert.py [--work DIR] [--rounds 3]

Every step runs in a process of its own, whose peak resident memory (mapped file pages included) and wall time are
measured, start of Python and imports included; in turn with it, the time to copy the same files through safetensors.
Bounds: memory under 1.3 x the largest source shard + 1 GB, time under 2 x the copy.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPY = """
import sys
from pathlib import Path
from typing import Any
from safetensors.torch import load_file, save_file
*sources, out = map(Path, sys.argv[1:])
for source in sources:
    for file in sorted(source.glob("*.safetensors")):
        save_file(load_file(file), out / f"{source.name}-{file.name}")
"""


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


def run(command: list[str]) -> tuple[float, float, float]:
    """(seconds, seconds of processor time, peak resident bytes) of a process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    error = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed:\n{error.decode()}")
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def largest(*folders: Path) -> int:
    return max(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def copy(sources: list[Path], out: Path) -> tuple[float, float, float]:
    """What the times are compared with."""
    out.mkdir()
    return run([sys.executable, "-c", COPY, *map(str, sources), str(out)])


def measure(work: Path, name: str, shard_bytes: int, rounds: int) -> list[dict[str, Any]]:
    """Import and export of sources cut into files of at most `shard_bytes`, each in turn with a copy."""
    language, vision = sources = [work / name / "language", work / name / "vision"]
    for folder, form in ((language, "qwen"), (vision, "siglip")):
        # In a process of its own: the peak of a process counts from that of the one that starts it.
        if not folder.exists():
            run([sys.executable, __file__, "--make", str(folder), form, str(shard_bytes)])
    tool = [sys.executable, str(ROOT / "tools" / "convert_hf.py")]
    checkpoint, out, copies = (work / name / each for each in ("checkpoint", "out", "copies"))
    # The checkpoint is the source of an export; its bound is the tighter one of the folders that it came from.
    steps = {
        "import": ["--language", str(language), "--vision", str(vision), "--out", str(checkpoint)],
        "export": ["--format", "parts", "--checkpoint", str(checkpoint), "--out", str(out), "--shard-gb",
                   str(shard_bytes / 1e9)],
    }  # fmt: skip
    found: dict[str, list[tuple[float, float, float]]] = {"import": [], "export": [], "copy": []}
    for _ in range(rounds):
        for step, options in steps.items():
            for folder in (copies, out, *([checkpoint] if step == "import" else [])):
                shutil.rmtree(folder, ignore_errors=True)
            found["copy"].append(copy(sources, copies))
            found[step].append(run([*tool, step, *options]))
    left = subprocess.run(
        [*tool, "verify", str(language), str(out / "language")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if left.returncode:
        raise RuntimeError(f"the language model did not come back as it was: {left.stdout} {left.stderr}")
    for folder in (copies, out, checkpoint):
        shutil.rmtree(folder)
    bound = 1.3 * largest(*sources) + 1e9
    copied, copied_cpu, _ = (statistics.median(column) for column in zip(*found["copy"], strict=True))
    rows = []
    for step in steps:
        seconds, cpu, _ = (statistics.median(column) for column in zip(*found[step], strict=True))
        peak = max(peak for *_, peak in found[step])
        rows.append(
            {
                "source": name,
                "step": step,
                "files": sum(len(list(folder.glob("*.safetensors"))) for folder in sources),
                "gigabytes": round(sum(map(size, sources)) / 1e9, 2),
                "seconds": round(seconds, 2),
                "copy_seconds": round(copied, 2),
                "times_copy": round(seconds / copied, 2),
                "cpu_seconds": round(cpu, 2),
                "copy_cpu_seconds": round(copied_cpu, 2),
                "peak_gigabytes": round(peak / 1e9, 2),
                "bound_gigabytes": round(bound / 1e9, 2),
                "memory_within": peak < bound,
                "time_within": seconds < 2 * copied,
            }
        )
        print(rows[-1], flush=True)
    return rows


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "# Conversion at a real size",
        "",
        "Qwen3-0.6B and SigLIP2 so400m, random bf16 weights; `python benchmarks/convert.py`. Medians of "
        f"{machine['rounds']} runs each, in turn with copies of the same files through safetensors. Bounds: 2 x the "
        "copy; 1.3 x the largest file + 1 GB.",
        "",
        f"Machine: {machine['cores']} cores ({machine['processor']}), Python {machine['python']}, torch "
        f"{machine['torch']}.",
        "",
        "| source | step | seconds | copy, seconds | times the copy | memory, GB | bound, GB |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['files']} files, {row['gigabytes']} GB | {row['step']} | {row['seconds']} | "
            f"{row['copy_seconds']} | {row['times_copy']} | {row['peak_gigabytes']} | {row['bound_gigabytes']} |"
            for row in rows
        ),
    ]
    return "\n".join(lines) + "\n"


def processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, help="where the models are written, about 12 GB; sources stay (a temporary directory)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    parser.add_argument("--make", nargs=3, metavar=("DIR", "FORM", "BYTES"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        source(Path(asked.make[0]), asked.make[1], int(asked.make[2]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        rows = [
            row
            for name, shard in (("one file each", 10**10), ("files of 0.35 GB", 350_000_000))
            for row in measure(asked.work or Path(temporary), name, shard, asked.rounds)
        ]
    machine = {
        "cores": os.cpu_count(), "processor": processor(), "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"), "safetensors": importlib.metadata.version("safetensors"),
        "rounds": asked.rounds,
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine, "steps": rows}, indent=1) + "\n"
    (asked.out / "convert.json").write_text(text, encoding="utf-8")
    (asked.out / "convert.md").write_text(table(rows, machine), encoding="utf-8")
    for what in ("memory", "time"):
        missed = [f"{row['step']} ({row['source']})" for row in rows if not row[f"{what}_within"]]
        if missed:
            print(f"{what} is not within its bound: {', '.join(missed)}.")


if __name__ == "__main__":
    main()
