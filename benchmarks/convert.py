"""Conversion at a real size: Qwen3-0.6B and SigLIP2 so400m (random weights, bf16), in and out again.

    python benchmarks/convert.py [--work DIR] [--json FILE]

Every step runs in a process of its own, whose peak resident memory (mapped file pages included) and wall time are
measured, start of Python and imports included; beside it, the time to copy the same files through safetensors.
Bounds: memory under 1.3 x the largest source shard + 1 GB, time under 2 x the copy.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
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
#: What every command does before it works: start Python, import torch and Megatron.
START = (
    "from megatron_vlm.parallel import cpu; cpu.enable('cpu'); from megatron_vlm.convert import exporting, importing"
)


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


def measure(work: Path, name: str, shard_bytes: int) -> list[dict[str, Any]]:
    """Import and export of sources cut into files of at most `shard_bytes`."""
    language, vision = work / "language", work / "vision"
    for folder, form in ((language, "qwen"), (vision, "siglip")):
        # In a process of its own: the peak of a process counts from that of the one that starts it.
        run([sys.executable, __file__, "--make", str(folder), form, str(shard_bytes)])
    tool = [sys.executable, str(ROOT / "tools" / "convert_hf.py")]
    rows: list[dict[str, Any]] = []

    def row(step: str, command: list[str], sources: list[Path], shard: int) -> None:
        copies = work / "copies"
        times = []
        for _ in range(2):
            shutil.rmtree(copies, ignore_errors=True)
            copies.mkdir()
            times.append(run([sys.executable, "-c", COPY, *map(str, sources), str(copies)])[:2])
        shutil.rmtree(copies)
        copy_seconds, copy_cpu = min(times)
        start_seconds, start_cpu, _ = run([sys.executable, "-c", START])
        seconds, cpu, peak = run(command)
        bound = 1.3 * shard + 1e9
        rows.append(
            {
                "source": name,
                "step": step,
                "files": sum(len(list(folder.glob("*.safetensors"))) for folder in sources),
                "gigabytes": round(sum(map(size, sources)) / 1e9, 2),
                "seconds": round(seconds, 1),
                "load": round(os.getloadavg()[0], 1),
                "copy_seconds": round(copy_seconds, 1),
                "times_copy": round(seconds / copy_seconds, 2),
                "start_seconds": round(start_seconds, 1),
                "cpu_seconds": round(cpu, 1),
                "start_cpu_seconds": round(start_cpu, 1),
                "copy_cpu_seconds": round(copy_cpu, 1),
                "peak_gigabytes": round(peak / 1e9, 2),
                "bound_gigabytes": round(bound / 1e9, 2),
                "memory_within": peak < bound,
                "time_within": seconds < 2 * copy_seconds,
            }
        )
        print(rows[-1], flush=True)

    checkpoint, out = work / "checkpoint", work / "out"
    command = ["import", "--language", str(language), "--vision", str(vision), "--out", str(checkpoint)]
    row("import", tool + command, [language, vision], largest(language, vision))
    command = ["export", "--format", "parts", "--checkpoint", str(checkpoint), "--out", str(out)]
    command += ["--shard-gb", str(shard_bytes / 1e9)]
    # The checkpoint is the source of an export; its bound is the tighter one of the folders that it came from.
    row("export", tool + command, [language, vision], largest(language, vision))
    left = subprocess.run(
        [*tool, "verify", str(language), str(out / "language")],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(left.stdout.strip(), left.stderr.strip() if left.returncode else "")
    if left.returncode:
        raise RuntimeError("the language model did not come back as it was")
    for folder in (language, vision, checkpoint, out):
        shutil.rmtree(folder)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="where the models are written, about 8 GB (a temporary directory)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--make", nargs=3, metavar=("DIR", "FORM", "BYTES"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.make:
        source(Path(asked.make[0]), asked.make[1], int(asked.make[2]))
        return
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        rows = [
            row
            for name, shard in (("one file each", 10**10), ("files of 0.35 GB", 350_000_000))
            for row in measure(Path(work), name, shard)
        ]
    if asked.json:
        cpu = platform.processor() or platform.machine()
        machine = {"cores": os.cpu_count(), "processor": cpu, "python": platform.python_version()}
        asked.json.write_text(json.dumps({"machine": machine, "steps": rows}, indent=1) + "\n")
    missed = [f"{row['step']} ({row['source']})" for row in rows if not row["memory_within"]]
    if missed:
        sys.exit(f"memory is not within its bound: {', '.join(missed)}")
    late = [f"{row['step']} ({row['source']})" for row in rows if not row["time_within"]]
    if late:
        print(f"Time is not within its bound: {', '.join(late)}. It means something on an idle machine only.")


if __name__ == "__main__":
    main()
