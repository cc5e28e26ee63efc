"""Score a trained model on tasks of its data's test split; prints a table, writes JSON, Markdown and a page.

    python tools/evaluate.py runs/tiny-stage3
    python tools/evaluate.py runs/tiny-stage3 --tasks easy_vqa pointing --limit 200 --out scores/
    torchrun --nproc-per-node 8 tools/evaluate.py runs/mine --tasks doc_qa chart_qa_weighted --manifest shards/
    torchrun --nproc-per-node 8 tools/evaluate.py runs/large --tensor 2 --pipeline 2     # two copies of four processes

Each task is scored with its images, and with the images exchanged between the questions (what the model answers from
the words alone). `without image` is what the training split's most frequent answers would get; `untrained` the model
before training. Every copy of the model answers its share. Finished answers are kept beside the report: the same
command goes on where one was stopped. An answer in which nothing can be made out earns nothing; where media, judge or
truth fail, the question is not scored and leaves the count; the report says how many, and why.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.parallel import process

DEFAULT = ("easy_vqa", "pointing", "counting")
#: How long the first process waits for the answers of the others.
PATIENCE = timedelta(days=7)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a run directory, a folder of checkpoints, or one checkpoint")
    parser.add_argument("--tasks", nargs="+", default=list(DEFAULT), help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--list", action="store_true", help="print the tasks that the data can be scored on, and stop")
    parser.add_argument("--limit", type=int, default=0, help="most samples of a task; 0 (default) = its whole split")
    parser.add_argument(
        "--shuffled-limit",
        type=int,
        default=200,
        help="samples of the pass with exchanged images; 0 = as many as in the first pass, -1 = none (default 200)",
    )
    parser.add_argument(
        "--untrained-limit",
        type=int,
        default=-1,
        help="samples of the pass with the weights before training; 0 = as many as in the first, -1 = none (default)",
    )
    parser.add_argument("--manifest", default="", help="directory of shards; default: the one that the run trained on")
    parser.add_argument("--out", type=Path, help="folder for evaluation.json, .md and .html; default: the run's")
    parser.add_argument(
        "--judge",
        metavar="URL",
        default="",
        help="OpenAI-compatible endpoint that judges captions, https://host/v1; its key from OPENAI_API_KEY. Default: "
        "overlap of words, no model",
    )
    parser.add_argument("--judge-model", default="gpt-4.1-2025-04-14", help="default: %(default)s")
    parser.add_argument("--judge-threads", type=int, default=8, help="captions judged at a time (default 8)")
    parser.add_argument(
        "--masks",
        default="",
        help="J and F of tracks where the data have masks: sam2 (points become masks through SAM 2, if installed) or "
        "discs (around the points, no model)",
    )
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel processes of each copy (default 1)")
    parser.add_argument("--pipeline", type=int, default=1, help="pipeline stages of each copy (default 1)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    asked = parser.parse_args(argv)
    for name, least in (("limit", 0), ("shuffled_limit", -1), ("untrained_limit", -1), ("judge_threads", 1)):
        if (value := getattr(asked, name)) < least:
            parser.error(f"--{name.replace('_', '-')} {value}: needed {least} or more")
    return asked


def main(argv: Sequence[str]) -> int:
    """Run the command; the exit code."""
    asked = arguments(argv)
    return process.tool(lambda: _evaluate(asked))


def _evaluate(asked: argparse.Namespace) -> None:
    from megatron_vlm.evaluate import tasks

    wanted = [tasks.find(name) for name in asked.tasks]
    backend = process.start(RunConfig(device=asked.device))
    import torch.distributed as dist

    from megatron_vlm.data.shards import Shards
    from megatron_vlm.evaluate import run
    from megatron_vlm.parallel import groups
    from megatron_vlm.parallel.layout import Layout

    layout = Layout(dist.get_world_size(), asked.tensor, pipeline=asked.pipeline)
    groups.initialize(layout, backend=backend)
    parts = {"tensor": asked.tensor, "pipeline": asked.pipeline}
    trained = run.load(asked.checkpoint, **parts)
    shards = Shards(asked.manifest) if asked.manifest else run.manifest(trained.config)
    if asked.list:
        if dist.get_rank() == 0:
            print("\n".join(name for name, task in tasks.TASKS.items() if task.data in shards.datasets))
        return
    folder = asked.out or (trained.path.parents[1] if trained.path.parent.name == "checkpoints" else trained.path)
    passes = _passes(asked, wanted, shards)
    kept = folder / "evaluation"
    copy = layout.coordinates(dist.get_rank()).data
    for name, task, samples in passes:
        model = trained if name != "untrained" else run.load(asked.checkpoint, trained=False, **parts)
        shown = tasks.with_other_images(samples) if name == "shuffled" else samples
        answered = _kept(kept, model, shards, task, name, len(samples), copy)
        _answer(model, shards, task, shown[copy :: layout.data], answered)
    if _all_done(dist.get_rank(), dist.get_world_size()):
        _report(asked, trained, shards, passes, kept, folder)


def _passes(asked: argparse.Namespace, wanted: Sequence[Any], shards: Any) -> list[tuple[str, Any, list[Any]]]:
    """(name, task, samples) of everything the model is asked. Raises ValueError before anything is asked."""
    from megatron_vlm.evaluate import tasks

    found = []
    for task in wanted:
        samples = tasks.examples(shards, task, asked.limit)
        found.append(("scored", task, samples))
        for name, limit in (("shuffled", asked.shuffled_limit), ("untrained", asked.untrained_limit)):
            if limit >= 0:
                fewer = tasks.examples(shards, task, min(limit, len(samples))) if limit else samples
                found.append((name, task, fewer))
    return sorted(found, key=lambda one: one[0] == "untrained")  # the other weights are loaded once, at the end


def _kept(kept: Path, trained: Any, shards: Any, task: Any, name: str, count: int, rank: int) -> Any:
    """Where the answers of a pass lie: under another name for every checkpoint, data and way of asking."""
    from megatron_vlm.checkpoint import verify
    from megatron_vlm.evaluate.asking import Kept

    weights = verify.digest(trained.path / verify.MANIFEST)["sha256"]
    facts = [
        weights,
        0 if name == "untrained" else trained.step,
        shards.hash,
        task.data,
        task.split,
        task.max_new_tokens,
    ]
    facts += [count] if name == "shuffled" else []  # who gets whose image depends on how many there are
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    return Kept(kept, f"{task.name}.{name}.{digest}", rank)


def _answer(trained: Any, shards: Any, task: Any, share: Sequence[Any], kept: Any) -> None:
    """The share of this copy of the model, but for what was answered before. One of its ranks reads and writes."""
    import torch.distributed as dist
    from tqdm import tqdm

    from megatron_vlm.evaluate.asking import ask
    from megatron_vlm.parallel import groups

    copy = groups.model()
    known: list[Any] = [kept.read() if copy.rank() == 0 else None]
    if copy.size() > 1:
        dist.broadcast_object_list(known, group=copy, group_src=0)
    missing = [one for one in share if one.key not in known[0] or known[0][one.key].fault]
    silent = dist.get_rank() > 0 or None
    with tqdm(desc=task.name, unit=" samples", total=len(missing), mininterval=2, disable=silent) as bar:
        answers = ask(trained.model, missing, shards, trained.tree, task.max_new_tokens, trained.device, bar.update)
        if copy.rank() == 0:
            kept.add(answers)
        else:
            for _ in answers:
                pass


def _all_done(rank: int, world: int) -> bool:
    """On the first process: True, when all others have written their answers. Others have nothing more to do."""
    import torch.distributed as dist

    if world == 1:
        return True
    store = dist.distributed_c10d._get_default_store()
    store.set(f"evaluated/{rank}", "done")
    # The store lives in the first process or its launcher: nobody leaves before it has looked.
    store.wait([f"evaluated/{number}" for number in range(world)], PATIENCE)
    return rank == 0


def _report(
    asked: argparse.Namespace, trained: Any, shards: Any, passes: Sequence[Any], kept: Path, folder: Path
) -> None:
    from megatron_vlm.checkpoint import verify
    from megatron_vlm.evaluate import baseline, page, report
    from megatron_vlm.evaluate.asking import Answer
    from megatron_vlm.evaluate.segments import Segmenter

    judge = _judge(asked, kept)
    masks = Segmenter(shards, asked.masks) if asked.masks else None
    threads = asked.judge_threads if asked.judge else 1
    reports: dict[str, Any] = {}
    shown = {}
    for name, task, samples in passes:
        found = reports.setdefault(task.name, {"task": task.name, "kind": task.kind, "images": len(samples)})
        answers = _kept(kept, trained, shards, task, name, len(samples), 0).read()
        judged = report.judge(task, samples, answers, judge, masks if task.kind == "tracking" else None, threads)
        found["scores" if name == "scored" else name] = report.scores(judged)
        if name == "scored":
            best, worst = report.extremes(judged)
            shown[task.name] = {"Best": best, "Worst": worst}
            if (words := baseline.guesses(shards, task, samples)) is not None:
                blind = {s.key: Answer(s.key, tuple(row)) for s, row in zip(samples, words, strict=True)}
                found["blind"] = report.scores(report.judge(task, samples, blind, judge))
    result = {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "checkpoint_sha256": verify.digest(trained.path / verify.MANIFEST)["sha256"],
        "manifest": shards.hash,
        "judge": judge.name,
        "masks": asked.masks,
        "settings": {name: getattr(asked, name) for name in ("limit", "shuffled_limit", "untrained_limit")},
        "decoding": "greedy",
        "versions": report.versions(),
    }
    title = f"Step {trained.step} of {trained.path}"
    table = report.markdown(list(reports.values()))
    folder.mkdir(parents=True, exist_ok=True)
    full = result | {"tasks": list(reports.values())}
    for file, text in (
        ("evaluation.json", json.dumps(full, indent=2) + "\n"),
        ("evaluation.md", f"{title}\n\n{table}\n"),
        ("evaluation.html", page.page(title, list(reports.values()), shown, shards, json.dumps(result, indent=1))),
    ):
        (folder / file).write_text(text, encoding="utf-8")
    print(f"{title}\n\n{table}\n\nWritten: {folder}/evaluation.json, evaluation.md and evaluation.html")


def _judge(asked: argparse.Namespace, kept: Path) -> Any:
    from megatron_vlm.evaluate.statements import Overlap

    if not asked.judge:
        return Overlap()
    from megatron_vlm.evaluate.endpoint import Endpoint

    key = os.environ.get("OPENAI_API_KEY", "")
    return Endpoint(asked.judge, asked.judge_model, key=key, kept=kept / "judge.jsonl")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
