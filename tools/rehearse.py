"""One training step of one rank of a large run, at real sizes, on this machine: before a cluster is involved.

    python tools/rehearse.py examples/recipes/molmo2_4b/stage2.yaml --world 64 --rank 17
    python tools/rehearse.py RECIPE.yaml --world 16 parallel.tensor=4 parallel.pipeline=2 --micro-batches 4

Builds the real model at the real layout with the trainer's own code and runs a step of the rank: shapes, process
groups, schedules and settings that do not fit fail here as they would on the cluster. Weights and activations have
sizes but no numbers, and the other ranks answer at once. Prints the collectives and the peak of memory beside those
that tools/plan.py expects, and exits with 1 where the collectives differ. Kernels are the CPU's, so activations of
attention differ from a GPU's; data is not read (rows are those of tools/plan.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_vlm.config import errors, load, rules
from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan import memory, workload
from megatron_vlm.plan.hardware import GIB

#: Kind, ranks and bytes of a collective.
Key = tuple[str, int, int]


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that win over the recipe"
    )
    parser.add_argument("--world", type=int, required=True, help="processes of the run")
    parser.add_argument("--rank", type=int, default=0, help="the one that rehearses (default 0)")
    parser.add_argument(
        "--micro-batches", type=int, help="fewer micro-batches than the recipe's global batch gives, to be quicker"
    )
    parser.add_argument("--video", action="store_true", help="rows of one video each instead of images")
    parser.add_argument("--crops", type=int, help="crops (frames) in a row, instead of as many as the limits allow")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the collectives and peaks as JSON")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    asked = arguments(argv)
    try:
        config, layout = _settings(asked)
        if asked.json:
            asked.json.touch()  # a wrong place is an error now, not after the step
        row = workload.assume(config, video=asked.video, crops=asked.crops)
        return _rehearse(asked, config, layout, row)
    except (ValueError, OSError) as error:
        print(f"error: {errors.words(error)}", file=sys.stderr)
        return 1


def _settings(asked: argparse.Namespace) -> tuple[Config, Layout]:
    config = load.load(asked.recipe, asked.overrides)
    rules.check(config, asked.world)
    layout = Layout.of(config, asked.world)
    layout.coordinates(asked.rank)  # ValueError where there is no such rank
    if asked.micro_batches is not None:
        if asked.micro_batches < 1:
            raise ValueError(f"--micro-batches {asked.micro_batches}: needed 1 or more.")
        batch = asked.micro_batches * layout.data * config.train.micro_batch
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, global_batch=batch))
        rules.check(config, asked.world)
    return config, layout


def _rehearse(asked: argparse.Namespace, config: Config, layout: Layout, row: workload.Row) -> int:
    from megatron_vlm.parallel import cpu  # torch takes seconds; the checks above need none of it

    cpu.enable("cpu")
    from megatron_vlm.train import rehearsal

    out = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    at = layout.coordinates(asked.rank)
    out.print(
        f"rank {asked.rank} of {asked.world}: tensor {at.tensor} of {layout.tensor}, context {at.context} of "
        f"{layout.context}, data {at.data} of {layout.data}, pipeline {at.pipeline} of {layout.pipeline}"
    )
    began = time.monotonic()
    done = rehearsal.rehearse(
        config, layout, asked.rank, row, say=lambda text: print(f"{text} ...", file=sys.stderr, flush=True)
    )
    found, expected = rehearsal.compare(done, config, layout, asked.rank, row)
    planned = rehearsal.planned(config, layout, asked.rank, row)
    names = {(each.kind, each.size): f"{each.what} ({each.group})" for each in planned}
    load_of_rank = workload.load(row, config, layout, asked.rank)
    out.print(_table(found, expected, names))
    expects = memory.of_stage(config, layout, at.pipeline, load_of_rank, cuda=False)
    static = memory.static(config, layout, asked.rank, cuda=False)
    out.print(
        f"Weights, gradients and optimizer: {done.static / GIB:.3f} GiB (planned {static.total / GIB:.3f}). "
        f"Peak: {done.peak / GIB:.3f} GiB (planned {expects.peak / GIB:.3f}, with buffers). "
        f"Took {time.monotonic() - began:.0f} s."
    )
    same = found == expected
    out.print("The collectives are those that the plan expects." if same else "The collectives DIFFER from the plan's.")
    if asked.json:
        calls = [[*each, count] for each, count in sorted(found.items())]
        content = {"calls": calls, "planned_calls": [[*each, count] for each, count in sorted(expected.items())],
                   "static_bytes": done.static, "planned_static_bytes": static.total, "peak_bytes": done.peak,
                   "planned_peak_bytes": expects.peak}  # fmt: skip
        asked.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if same else 1


def _table(found: Counter[Key], expected: Counter[Key], names: dict[tuple[str, int], str]) -> Table:
    table = Table(title="Collectives of the step", title_justify="left", box=None, pad_edge=False)
    for name in ("kind", "ranks", "bytes", "calls", "planned", "what"):
        table.add_column(name, justify="left" if name in ("kind", "what") else "right")
    for each in sorted({*found, *expected}, key=lambda item: -item[2] * max(found[item], expected[item])):
        kind, ranks, size = each
        mark = "" if found[each] == expected[each] else "  <- differs"
        what = names.get((kind, size), "not in the plan") + mark
        table.add_row(kind, str(ranks), f"{size:,}", f"{found[each]:,}", f"{expected[each]:,}", what)
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
