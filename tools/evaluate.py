"""Score a trained model on the tasks of its data's test split; prints a table, writes JSON and Markdown.

    python tools/evaluate.py runs/tiny-stage3
    python tools/evaluate.py runs/tiny-stage3 --tasks easy_vqa pointing --limit 200 --out scores/

Each task is scored twice: with its images, and with the images exchanged between the questions (what the model answers
from the words alone). `without image` is the best that the question's words allow: its most frequent training answer.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.parallel import process


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run directory, a folder of checkpoints, or one checkpoint")
    parser.add_argument(
        "--tasks", nargs="+", default=["easy_vqa", "pointing", "counting"], help="default: easy_vqa pointing counting"
    )
    parser.add_argument(
        "--limit", type=int, default=0, help="most images of a task; 0 (default) = its whole test split"
    )
    parser.add_argument(
        "--shuffled-limit",
        type=int,
        default=200,
        help="images of the pass with exchanged images; 0 = as many as in the first pass, -1 = none (default 200)",
    )
    parser.add_argument("--manifest", default="", help="directory of shards; default: the one that the run trained on")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json and evaluation.md; default: the run's")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    asked = arguments(argv)
    return process.tool(lambda: _evaluate(asked))


def _evaluate(asked: argparse.Namespace) -> None:
    backend = process.start(RunConfig(device=asked.device))
    from tqdm import tqdm

    from megatron_vlm.data.shards import Shards
    from megatron_vlm.evaluate import run, tasks
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout

    unknown = [name for name in asked.tasks if name not in tasks.TASKS]
    if unknown:
        raise ValueError(f"--tasks {' '.join(unknown)}: there is no such task; choose from {', '.join(tasks.TASKS)}.")
    groups.initialize(Layout(1), backend=backend)
    trained = run.load(asked.checkpoint)
    shards = Shards(asked.manifest) if asked.manifest else run.manifest(trained.config)
    reports = []
    for name in asked.tasks:
        with tqdm(desc=name, unit=" images", mininterval=2) as bar:
            reports.append(
                run.evaluate(
                    trained,
                    shards,
                    tasks.TASKS[name],
                    limit=asked.limit,
                    shuffled_limit=asked.shuffled_limit,
                    progress=bar.update,
                )
            )
    table = run.markdown(reports)
    folder = asked.out or (trained.path.parents[1] if trained.path.parent.name == "checkpoints" else trained.path)
    folder.mkdir(parents=True, exist_ok=True)
    result = {"checkpoint": str(trained.path), "step": trained.step, "manifest": shards.hash, "tasks": reports}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    title = f"Step {trained.step} of {trained.path}"
    (folder / "evaluation.md").write_text(f"{title}\n\n{table}\n", encoding="utf-8")
    print(f"{title}\n\n{table}\n\nWritten: {folder / 'evaluation.json'}, {folder / 'evaluation.md'}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
