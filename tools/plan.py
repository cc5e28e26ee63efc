"""Whether a recipe fits a cluster, and how fast it goes, before anyone queues. Needs no GPU and no torch.

    python tools/plan.py examples/recipes/molmo2_4b/stage2.yaml --gpu h100 --nodes 4 --gpus-per-node 8
    python tools/plan.py RECIPE.yaml --gpu a100-40 --nodes 2 --gpus-per-node 4 parallel.tensor=2 train.recompute=full
    python tools/plan.py RECIPE.yaml --gpu h100 --nodes 8 --sweep

Weights, gradients and optimizer state are exact. Activations follow the model's operators one by one. Times are a
roofline: every operator takes as long as its arithmetic or its memory traffic, whichever is longer, at the share of the
data sheet's figures that `--reach` states; treat them as good for comparing layouts, less for a calendar.
As no data is read, rows are taken as full, with as many crops as data.max_crops and the row's length allow.
Exit code 1: it does not fit (the cheapest change that would is named), or the settings are wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_vlm.config import errors, load
from megatron_vlm.plan import hardware, report, sweep, workload


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", metavar="RECIPE.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that win over the recipe"
    )
    parser.add_argument("--gpu", required=True, help=f"one of {', '.join(hardware.GPUS)}")
    parser.add_argument("--nodes", type=int, default=1, help="servers (default 1)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs in each (default 8)")
    parser.add_argument("--network", type=float, metavar="GB/S", help="bytes to other nodes, per GPU, in GB a second")
    parser.add_argument("--video", action="store_true", help="rows of one video each instead of images")
    parser.add_argument("--crops", type=int, help="crops (frames) in a row, instead of as many as the limits allow")
    parser.add_argument(
        "--loss-share", type=float, default=workload.LOSS_SHARE,
        help=f"share of text tokens with a loss (default {workload.LOSS_SHARE})",
    )  # fmt: skip
    parser.add_argument(
        "--reach", type=float, nargs=3, metavar=("MATMUL", "MEMORY", "LINK"),
        help="shares of the data sheet's figures that are reached, "
        f"default {' '.join(str(share) for share in dataclasses.astuple(hardware.Reach()))}",
    )  # fmt: skip
    parser.add_argument("--sweep", action="store_true", help="rank all layouts, micro-batches and recompute settings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything as JSON (- = standard output)")
    return parser.parse_intermixed_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    asked = arguments(argv)
    try:
        found = _plan(asked)
        if asked.json and asked.json != Path("-"):
            asked.json.touch()  # a wrong place is an error now
        changes = sweep.ranked(found) if asked.sweep else []
    except (ValueError, OSError) as error:
        print(f"error: {errors.words(error)}", file=sys.stderr)
        return 1
    change = None if found.fits or asked.sweep else sweep.remedy(found)
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 150)
    if asked.json != Path("-"):
        report.page(found, out, change)
        if asked.sweep:
            report.ranking(changes, out)
    if asked.json:
        content = report.data(found) | {"remedy": change.settings if change else None}
        text = json.dumps(content | ({"sweep": report.ranking_data(changes)} if asked.sweep else {}), indent=1)
        if asked.json == Path("-"):
            print(text)
        else:
            asked.json.write_text(text + "\n", encoding="utf-8")
    return 0 if found.fits else 1


def _plan(asked: argparse.Namespace) -> sweep.Plan:
    if asked.nodes < 1 or asked.gpus_per_node < 1:
        raise ValueError(
            f"{asked.nodes} nodes of {asked.gpus_per_node} GPUs are no cluster; needed: 1 or more of each."
        )
    gpu = hardware.find(asked.gpu)
    if asked.network is not None:
        if asked.network <= 0:
            raise ValueError(f"--network {asked.network:g}: needed above 0 GB a second.")
        gpu = dataclasses.replace(gpu, network=int(asked.network * 10**9))
    reach = hardware.Reach(*asked.reach) if asked.reach else hardware.Reach()
    if not all(0 < share <= 1 for share in dataclasses.astuple(reach)):
        raise ValueError(f"--reach {' '.join(map(str, asked.reach))}: needed three shares above 0 and at most 1.")
    config = load.load(asked.recipe, asked.overrides)
    row = workload.assume(config, video=asked.video, crops=asked.crops, loss_share=asked.loss_share)
    return sweep.plan(config, hardware.Cluster(gpu, asked.nodes, asked.gpus_per_node, reach), row)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
