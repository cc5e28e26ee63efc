"""Whether a recipe gives the same losses and gradients on every parallel layout: runs it on each, for some steps.

    python tools/parity.py examples/recipes/tiny/stage1.yaml --layouts tp2_sp pp2_vpp2 cp2 dp2 --steps 3
    python tools/parity.py examples/recipes/tiny/stage1.yaml --layouts tp2_pp2_cp2 recompute_full --json parity.json
    python tools/parity.py examples/recipes/tiny/stage1.yaml --resume tp2:2:pp2 --resume dp2:2:one --steps 4
    python tools/parity.py RECIPE.yaml --layouts unpacked train.response_dropout=0 train.global_batch=4

Each layout runs in processes of its own, on this machine's CPU or (`--device cuda`) each on a GPU of its own over NCCL,
one layout after the other, and is compared with the reference: the same recipe on one process. `--resume A:K:B` stops
layout A after step K and goes on on layout B from its checkpoint. Exits with 1 where anything is out of tolerance, and
names the first tensor that diverges.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vlm.config import errors, load
from megatron_vlm.config.schema import Config
from megatron_vlm.data import manifest
from megatron_vlm.data.shards import Shards
from megatron_vlm.parallel.pool import Pool
from megatron_vlm.train import parity, trial, variant
from megatron_vlm.train.parity import Report
from megatron_vlm.train.variant import Variant

_LAYOUTS = ("tp2_sp", "pp2", "cp2", "dp2")


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python tools/parity.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"names of layouts, parts joined by _ (tp2_sp_pp2_vpp2_cp2_dp2):\n{variant.GRAMMAR}",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", metavar="RECIPE.yaml", help="the settings")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that win over the recipe"
    )
    parser.add_argument("--layouts", nargs="+", default=None, metavar="NAME", help=f"default: {' '.join(_LAYOUTS)}")
    parser.add_argument(
        "--resume", nargs="+", action="extend", default=[], metavar="A:K:B", help="stop A after step K, go on on B"
    )
    parser.add_argument("--reference", default="one", metavar="NAME", help="what is compared with (default: one)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps (default 3)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="of losses and gradients, relative (default 1e-5)"
    )
    parser.add_argument(
        "--weight-tolerance",
        type=float,
        default=1e-3,
        help="of weights after updates, relative (default 1e-3): Adam divides gradients that are only rounding by "
        "their own size, so weights that nothing depends on move as far as others, in any direction",
    )
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="for each layout (default 600 s)")
    parser.add_argument("--modules", action="store_true", help="print every module's gradient, not only components")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything that was found, step by step")
    asked = parser.parse_args(_settings_first(argv))
    if asked.layouts is None:
        asked.layouts = [] if asked.resume else list(_LAYOUTS)
    if asked.steps < 1:
        parser.error("--steps must be at least 1")
    return asked


def _settings_first(argv: Sequence[str]) -> list[str]:
    """The recipe and its overrides before the options: after `--layouts` they would be read as names."""
    settings = [word for word in argv if word[:1] != "-" and ("=" in word or word.endswith((".yaml", ".yml")))]
    settings.sort(key=lambda word: "=" in word)
    return [*settings, *(word for word in argv if word not in settings)]


@dataclasses.dataclass(frozen=True)
class Resume:
    """Stop on one layout, go on on another."""

    first: Variant
    step: int
    second: Variant

    @property
    def name(self) -> str:
        return f"{self.first.name}:{self.step}:{self.second.name}"


def resume(text: str, steps: int) -> Resume:
    """`A:K:B`. Raises ValueError where it is not that, or step K is not one of the steps but the last."""
    first, *rest = text.split(":")
    if len(rest) != 2 or not rest[0].isdigit():
        raise ValueError(f"--resume {text}: needed is A:K:B, for instance tp2:2:pp2 (layout, step, layout).")
    step = int(rest[0])
    if not 1 <= step < steps:
        raise ValueError(
            f"--resume {text}: with --steps {steps}, the step to stop after is 1 to {steps - 1}, not {step}."
        )
    return Resume(variant.parse(first), step, variant.parse(rest[1]))


class Runner:
    """Runs layouts, in processes that are kept from one to the next."""

    def __init__(self, config: Config, asked: argparse.Namespace, folder: Path) -> None:
        self.config, self.asked, self.folder = config, asked, folder
        self._pools: dict[int, Pool] = {}
        self._saved: dict[tuple[str, int], Path] = {}

    def run(self, way: Variant, **plan: Any) -> parity.Told:
        """What `trial.run` tells. Raises RuntimeError or TimeoutError where a rank fails or hangs."""
        # An error of one rank ends the others after this time, if nothing else does.
        given = {"last": self.asked.steps, "timeout_s": self.asked.timeout, "packed": way.packed} | plan
        planned = trial.Plan(folder=self.folder, **given)
        pool = self._pools.setdefault(way.world, Pool(way.world, self.asked.device))
        settings = way.settings(self.config, self.asked.device)
        return pool.run(trial.run, settings, planned, timeout_s=self.asked.timeout)[0]

    def resume(self, case: Resume) -> parity.Told:
        """Run both halves; the first once for all that go on from it."""
        key = (case.first.name, case.step)
        if key not in self._saved:
            folder = self.folder / f"{case.first.name}_{case.step}"
            self.run(case.first, last=case.step, compares=False, save=folder)
            self._saved[key] = folder
        return self.run(case.second, resume=self._saved[key], weights=(self.asked.steps,))

    def close(self) -> None:
        """End the processes."""
        for pool in self._pools.values():
            pool.close()


def check(config: Config, asked: argparse.Namespace, say: Any = print) -> tuple[parity.Told, list[Report]]:
    """Run everything that was asked for; what the reference told, and a report on each.

    Raises ValueError for names, layouts and settings that do not fit, before anything runs; RuntimeError or
    TimeoutError where the reference itself fails.
    """
    reference_way = variant.parse(asked.reference)
    cases: list[Variant | Resume] = [variant.parse(name) for name in asked.layouts]
    cases += [resume(text, asked.steps) for text in asked.resume]
    ways = [reference_way, *_ways(cases)]
    for way in ways:
        way.settings(config, asked.device)
    if asked.device == "cuda":
        import torch  # seconds, which other mistakes need not wait for

        most, there = max(way.world for way in ways), torch.cuda.device_count()
        if there < most:
            raise ValueError(
                f"--device cuda: torch finds {there} GPUs here, and {most} processes need one each. Leave it out to "
                "run on the CPU, or name smaller layouts."
            )
    Shards(manifest.directory(config.data.manifest))  # bundled data are not built on a layout's time
    folder = Path(tempfile.mkdtemp(prefix="parity-"))
    runner = Runner(config, asked, folder)
    try:
        stops = {case.step for case in cases if isinstance(case, Resume)}
        reference = runner.run(reference_way, writes=True, weights=(0, *sorted(stops), asked.steps))
        first, last = reference["steps"][0], reference["steps"][-1]
        say(
            f"{reference_way.name}: loss {first['loss']:.6f} to {last['loss']:.6f}, gradient norm "
            f"{first['grad_norm']:.4g} to {last['grad_norm']:.4g}, steps 1 to {asked.steps}; the others relative to it:"
        )
        say(_row("layout", "processes", "loss", "grad norm", *parity.COMPONENTS, "weights", "data", "seconds", ""))
        reports = []
        for case in cases:
            began = time.monotonic()
            report = _report(runner, case, reference, asked)
            reports.append(report)
            say(_line(report, time.monotonic() - began))
            for module, error in report.modules.items() if asked.modules else ():
                say(f"    {error:7.1e}  {module}")
            for fault in report.faults[:1]:
                say(f"    {fault}" + (f" (and {len(report.faults) - 1} more)" if len(report.faults) > 1 else ""))
        return reference, reports
    finally:
        runner.close()
        shutil.rmtree(folder, ignore_errors=True)


def _ways(cases: Sequence[Variant | Resume]) -> list[Variant]:
    return [way for case in cases for way in ((case.first, case.second) if isinstance(case, Resume) else (case,))]


def _report(runner: Runner, case: Variant | Resume, reference: parity.Told, asked: argparse.Namespace) -> Report:
    world = case.second.world if isinstance(case, Resume) else case.world
    try:
        told = runner.resume(case) if isinstance(case, Resume) else runner.run(case, weights=(0, asked.steps))
    except (RuntimeError, TimeoutError) as error:
        return parity.failed(case.name, world, str(error))
    return parity.compare(case.name, world, told, reference, asked.tolerance, asked.weight_tolerance)


def _line(report: Report, seconds: float) -> str:
    numbers = [report.loss, report.grad_norm, *report.components.values(), report.weights]
    return _row(
        report.name,
        str(report.world),
        *(f"{number:.1e}" for number in numbers),
        "same" if report.data else "OTHER",
        f"{seconds:.1f}",
        "DIVERGES" if report.faults else "ok",
    )


def _row(name: str, *cells: str) -> str:
    return f"{name:<22}" + "".join(f"{cell:>11}" for cell in cells)


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    asked = arguments(argv)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes share the cores
    try:
        if asked.json:
            asked.json.touch()  # a wrong place is an error now, not after the layouts
        reference, reports = check(load.load(asked.recipe, asked.overrides), asked)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {errors.words(error)}", file=sys.stderr)
        return 1
    if asked.json:
        found = {"reference": reference, "layouts": [dataclasses.asdict(report) for report in reports]}
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    bad = [report for report in reports if report.faults]
    for report in bad:
        print(f"{report.name} diverges: {report.faults[0]}", file=sys.stderr)
    if not bad:
        print(f"All {len(reports)} agree within {asked.tolerance:.0e} (weights {asked.weight_tolerance:.0e}).")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
