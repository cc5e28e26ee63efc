"""The sizes in examples/slurm/README.md are what the planner says: `python -m tests.plan.test_sizes` writes them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megatron_vlm.config import load
from megatron_vlm.plan import hardware, sweep, workload
from megatron_vlm.plan.hardware import GIB

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "slurm" / "README.md"
MARK = "<!-- made by python -m tests.plan.test_sizes -->\n"
#: What stands in the table, planner's name, nodes, GPUs of a node.
CLUSTERS = (
    ("2 x A100 40 GB", "a100-40", 1, 2),
    ("4 x A100 40 GB", "a100-40", 1, 4),
    ("2 x A100 80 GB", "a100-80", 1, 2),
    ("4 x A100 80 GB", "a100-80", 1, 4),
    ("8 x H100", "h100", 1, 8),
    ("32 x H100", "h100", 4, 8),
    ("256 x H100", "h100", 32, 8),
)
RECIPES = ("qwen3_0.6b", "molmo2_4b", "molmo2_8b")


def cell(recipe: str, stage: str, gpu: str, nodes: int, gpus: int) -> str:
    """The fastest layout that fits, as settings, and its peak."""
    path = ROOT / "examples" / "recipes" / recipe / f"{stage}.yaml"
    cluster = hardware.Cluster(hardware.find(gpu), nodes, gpus)
    found = start(path, cluster)
    best = next((change.plan for change in sweep.ranked(found) if change.plan.fits), None)
    if best is None:
        return "-"
    p, train = best.config.parallel, best.config.train
    degrees = (("TP", p.tensor), ("CP", p.context), ("PP", p.pipeline), ("micro-batch", train.micro_batch))
    words = [f"{name} {number}" for name, number in degrees if number > 1]
    words += [f"{train.recompute} recompute"] * (train.recompute != "none")
    return f"{', '.join(words)}; " * bool(words) + f"{best.peak / GIB:.0f} GiB"


def start(path: Path, cluster: hardware.Cluster) -> sweep.Plan:
    """Any layout that keeps the rules, for the sweep to begin with: a step must have a row for every replica."""
    for context in (1, 2, 4, 8):
        words = ("parallel.tensor=1", "parallel.sequence=false", f"parallel.context={context}", "train.micro_batch=1")
        config = load.load(path, words)
        try:
            return sweep.plan(config, cluster, workload.assume(config))
        except ValueError:
            continue
    raise AssertionError(path)


def table() -> str:
    """In Markdown."""
    lines = ["| GPUs | recipe | stage 1 | stage 3 (36,864 tokens) |", "|---|---|---|---|"]
    for name, *cluster in CLUSTERS:
        for recipe in RECIPES:
            cells = (cell(recipe, stage, *cluster) for stage in ("stage1", "stage3"))
            lines.append(f"| {name} | {recipe} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_sizes_are_those_of_the_planner():
    text = FILE.read_text(encoding="utf-8")
    assert MARK + table() in text, "run: python -m tests.plan.test_sizes"


if __name__ == "__main__":
    before = FILE.read_text(encoding="utf-8")
    pattern = rf"(?:{re.escape(MARK)})?\| GPUs \|.*?\n\n"
    FILE.write_text(re.sub(pattern, lambda _: f"{MARK}{table()}\n", before, flags=re.DOTALL), encoding="utf-8")
    sys.exit(0)
