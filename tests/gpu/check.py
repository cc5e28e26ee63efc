"""What tools/gpu_check.sh runs: parts in processes of their own, then one report. `--help` says more."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
NO_GPU = 3
TINY = "examples/recipes/tiny/stage1.yaml"
#: Name -> (settings, largest mean difference from the CPU's float32 losses over the last half of the steps). No GPU has
#: confirmed these bounds: they are what the run must show, not what was measured.
CURVES = {
    "float32": (("run.device=cuda",), 0.005),
    "bf16": (("run.device=cuda", "train.precision=bf16"), 0.05),
    "fp8": (("run.device=cuda", "train.precision=fp8", "kernels.spec=transformer_engine"), 0.10),
}
CURVE_STEPS = 100
#: Processes -> layouts that are compared with one GPU.
LAYOUTS = {
    1: ("recompute_full",),
    2: ("dp2", "tp2_sp", "pp2", "cp2", "cp2_ring", "tp2_vision_tensor"),
    4: ("tp2_sp_pp2", "tp2_sp_cp2", "cp4_gather", "pp2_vpp2_dp2"),
    8: ("tp2_sp_pp2_cp2", "tp4_sp_cp2", "cp8", "tp2_sp_cp2_dp2"),
}
#: (recipe, settings, fewest GPUs): layouts of examples/slurm/README.md.
SPEED = (
    ("qwen3_0.6b/stage1", (), 1),
    ("qwen3_0.6b/stage3", (), 2),
    ("molmo2_4b/stage1", ("train.micro_batch=1",), 4),
    ("molmo2_4b/stage1", ("train.micro_batch=1", "kernels.attention=blocks"), 4),
    ("molmo2_4b/stage2", (), 8),
    ("molmo2_4b/stage3", (), 8),
    ("molmo2_8b/stage1", (), 8),
    ("molmo2_8b/stage3", (), 8),
)


@dataclass(frozen=True)
class Part:
    """One command of the check."""

    group: str
    name: str
    command: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    timeout_s: float = 1800.0
    skipped: str = ""
    """Why this machine cannot run it; empty = it can."""


@dataclass
class Result:
    """How a part went."""

    group: str
    name: str
    command: str
    outcome: str
    """passed, "skipped: " with the reason, or what went wrong in a line."""
    seconds: float
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.outcome != "passed" and not self.outcome.startswith("skipped: ")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bash tools/gpu_check.sh", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="folder of the report")
    groups = ("kernels", "curves", "layouts", "speed")
    parser.add_argument("--only", nargs="+", choices=groups, default=groups, metavar="PART", help=", ".join(groups))
    parser.add_argument("--dry-run", action="store_true", help="list the commands and run nothing")
    parser.add_argument("--gpus", type=int, default=None, help="use so many (default: all)")
    return parser.parse_args(argv)


def missing(words: Sequence[str]) -> str:
    """What these settings of the tiny recipe need and this machine lacks: FP8 on an A100; empty = nothing."""
    from megatron_vlm.config import load
    from megatron_vlm.model import kernels

    try:
        kernels.choose(load.load(ROOT / TINY, words))
    except ValueError as error:
        return str(error)
    return ""


def parts(gpus: int, out: Path, only: Sequence[str], here: bool = False) -> list[Part]:
    """What is run on `gpus` GPUs. here: on this machine, so what it lacks is skipped."""
    python = sys.executable
    found = [
        Part("kernels", "attention", (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"),
             {"VLM_GPU_REPORT": str(out)}),
    ]  # fmt: skip
    steps = (f"train.steps={CURVE_STEPS}", "checkpoint.every=0", "eval.every=0", "run.resume=never")
    curves = {"reference": ("run.device=cpu",)} | {name: words for name, (words, _) in CURVES.items()}
    for name, words in curves.items():
        folder = f"run.dir={out / 'curves' / name}"
        command = (python, "-m", "megatron_vlm.train", TINY, *steps, *words, folder)
        found.append(Part("curves", name, command, skipped=missing(words) if here else ""))
    for world, names in LAYOUTS.items():
        if world <= gpus:
            words = ("--device", "cuda", "--tolerance", "1e-3", "--weight-tolerance", "1e-1", "--layouts", *names)
            report = ("--json", str(out / f"layouts-{world}.json"))
            found.append(Part("layouts", f"{world} GPU(s)", (python, "tools/parity.py", TINY, *words, *report)))
    for recipe, settings, least in SPEED:
        if least <= gpus:
            torchrun = (python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus))
            script = ("tests/gpu/throughput.py", f"examples/recipes/{recipe}.yaml", *settings)
            found.append(Part("speed", " ".join((recipe, *settings)), (*torchrun, *script)))
    return [part for part in found if part.group in only]


def run(part: Part, out: Path) -> Result:
    """Run a part; its whole output goes into a log beside the report."""
    if part.skipped:
        return Result(part.group, part.name, shlex.join(part.command), f"skipped: {part.skipped}", 0.0)
    log = out / "logs" / f"{part.group}-{part.name}.log".replace("/", "_").replace(" ", "_")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | part.environment
    began = time.monotonic()
    with log.open("wb") as stream:
        try:
            code = subprocess.run(
                part.command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=part.timeout_s
            ).returncode
            outcome = "passed" if code == 0 else f"exit code {code}: {last_error(log.read_text(errors='replace'))}"
        except subprocess.TimeoutExpired:
            outcome = f"not done after {part.timeout_s:.0f} s"
    return Result(part.group, part.name, shlex.join(part.command), outcome, time.monotonic() - began)


def last_error(text: str) -> str:
    """The last line of a log that speaks of an error, else the last one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["(no output)"])[-1][:300]


def judge(results: list[Result], out: Path) -> None:
    """Read what the parts have written, and compare the curves."""
    reference = losses(out / "curves" / "reference")
    for each in results:
        if each.group == "curves" and each.name in CURVES and each.outcome == "passed":
            difference = mean_difference(losses(out / "curves" / each.name), reference)
            limit = CURVES[each.name][1]
            each.found = {"mean_difference": difference, "limit": limit}
            if not difference <= limit:  # also where it is no number
                each.outcome = f"losses differ by {difference:.4f} on average, more than {limit}"
        if each.group == "speed" and each.outcome == "passed":
            log = out / "logs" / f"{each.group}-{each.name}.log".replace("/", "_").replace(" ", "_")
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith('{"recipe"')]
            each.found = json.loads(lines[-1]) if lines else {}
            each.outcome = each.outcome if lines else "no result line"
        if each.group == "kernels" and (out / "kernels.jsonl").exists():
            each.found = {"cases": [json.loads(line) for line in (out / "kernels.jsonl").read_text().splitlines()]}
        if each.group == "kernels" and each.outcome == "passed" and not each.found:
            each.outcome = "no kernel was compared"


def losses(folder: Path) -> list[float]:
    """Of every step of a run; empty if there is none."""
    file = folder / "metrics.jsonl"
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()] if file.exists() else []


def mean_difference(found: Sequence[float], reference: Sequence[float]) -> float:
    """Mean distance of two curves over the last half of their steps; NaN where they are not of one length."""
    if len(found) != len(reference) or not found:
        return float("nan")
    half = len(found) // 2
    return sum(abs(a - b) for a, b in zip(found[half:], reference[half:], strict=True)) / (len(found) - half)


def machine() -> dict[str, Any]:
    """GPUs, driver and versions."""
    import importlib.metadata

    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    names = ("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "triton")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    gpus = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
    facts = {"gpus": gpus, "python": platform.python_version(), "cuda": torch.version.cuda, **versions}
    return {**facts, "nccl": str(torch.cuda.nccl.version()), "commit": commit.stdout.strip()}


def write(results: Sequence[Result], facts: dict[str, Any], out: Path) -> None:
    """report.json and report.md."""
    whole = {"machine": facts, "results": [asdict(each) for each in results]}
    (out / "report.json").write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(results, facts), encoding="utf-8")


def markdown(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """The report for people."""
    failed = [f"{x.group} {x.name}" for x in results if x.failed]
    lines = ["# GPU check", "", f"Failed: {', '.join(failed) or 'nothing'}", ""]
    lines += [*(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| part | | seconds | outcome |", "|---|---|---|---|"]
    lines += [f"| {x.group} | {x.name} | {x.seconds:.0f} | {x.outcome.replace('|', '/')} |" for x in results]
    cases = [case for each in results for case in each.found.get("cases", ())]
    if cases:
        lines += ["", "Attention, largest difference from the mask rule:", ""]
        lines += ["| case | out | query | key | value | tolerance |", "|---|---|---|---|---|---|"]
        cells = ("out", "query", "key", "value", "tolerance")
        lines += [
            f"| {case['case']} | " + " | ".join(f"{case[x]:.1e}" if x in case else "" for x in cells) + " |"
            for case in cases
        ]
    curves = [each for each in results if "mean_difference" in each.found]
    if curves:
        lines += ["", "Losses against float32 on the CPU, mean difference over the last half:", ""]
        lines += [f"- {x.name}: {x.found['mean_difference']:.4f} (limit {x.found['limit']})" for x in curves]
    speed = [each.found | {"name": each.name} for each in results if each.group == "speed" and each.found]
    if speed:
        lines += ["", "| recipe | GPUs | step s | tokens/s/GPU | peak GB | planned GB |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {x['name']} | {x['processes']} | {x['step_s']:.3f} | {x['tokens_per_s_per_process']:.0f} | "
            f"{x['peak_gb']:.1f} | {x['planned_peak_gb']:.1f} |"
            for x in speed
        ]
    return "\n".join(lines) + "\n"


def count_gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def main(argv: Sequence[str], count: Callable[[], int] = count_gpus) -> int:
    """Run the command; the exit code."""
    asked = arguments(argv)
    here = count()
    gpus = here if asked.gpus is None else asked.gpus
    out = asked.out.absolute()
    if asked.dry_run:
        found = parts(max(1, gpus), out, asked.only)
        print(f"{here} GPU(s) here; on {max(1, gpus)} these {len(found)} commands would run:")
        for part in found:
            print(f"  [{part.group}] {part.name}: {shlex.join(part.command)}")
        return 0
    if not here:
        print("No GPU here (torch.cuda.is_available() is False): nothing was run. --dry-run lists what would be.",
              file=sys.stderr)  # fmt: skip
        return NO_GPU
    out.mkdir(parents=True, exist_ok=True)
    (out / "kernels.jsonl").unlink(missing_ok=True)
    results: list[Result] = []
    facts = machine()
    for part in parts(min(gpus, here), out, asked.only, here=True):
        print(f"[{part.group}] {part.name} ...", flush=True)
        results.append(run(part, out))
        print(f"    {results[-1].outcome} ({results[-1].seconds:.0f} s)", flush=True)
        write(results, facts, out)  # whatever happens later, this much is there
    judge(results, out)
    write(results, facts, out)
    failed = [each for each in results if each.failed]
    for each in failed:
        print(f"Failed: [{each.group}] {each.name}: {each.outcome}")
    passed = sum(each.outcome == "passed" for each in results)
    skipped = len(results) - passed - len(failed)
    print(f"{passed} of {len(results)} passed, {skipped} skipped. Report: {out / 'report.md'}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
