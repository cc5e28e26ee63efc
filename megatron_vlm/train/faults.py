"""Samples that cannot be loaded, under data.bad_samples=skip: every rank learns of all of them before the step."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.config.schema import Config
from megatron_vlm.data.faults import Fault
from megatron_vlm.data.loader import Step
from megatron_vlm.train import directory

#: Fewer samples say nothing about a share.
FEWEST_DRAWN = 1000
#: Places named in the error of a run that stops.
SHOWN = 5


def settle(step: Step, policy: str) -> Step:
    """The step as every rank trains on it: without the samples that failed on any of them. Collective.

    policy: data.bad_samples. With `stop` a sample that fails never gets here.
    Raises ValueError, on every rank, where the ranks planned different rows.
    """
    if policy == "stop":
        return step
    planned = f"{step.window} {step.offset} {step.keys_hash} {step.useful_tokens} {step.weights}"
    failed, differ = most(len(step.skipped), int(hashlib.sha256(planned.encode()).hexdigest()[:12], 16))
    if differ:
        raise ValueError(
            f"ranks planned different rows at window {step.window}, row {step.offset}: a record is damaged on some "
            "machines only. Compare their copies of the shards (tools/build_shards.py verify)."
        )
    if not failed:
        return step
    everywhere: list[tuple[Fault, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everywhere, step.skipped)
    return step.without(fault for faults in everywhere for fault in faults)


def most(failed: int, planned: int) -> tuple[int, bool]:
    """Most failed samples of any rank, and whether `planned` is another number on some rank. Collective: three
    integers, all that a step without failures costs."""
    numbers = torch.tensor([failed, planned, -planned], device=torch.cuda.current_device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    failed, largest, smallest = numbers.tolist()
    return failed, largest != -smallest


def check(config: Config, counters: Mapping[str, int], step: Step) -> None:
    """Stop above the ceiling. Collective where it stops.

    counters: of the run before this step. Raises ValueError, the same on every rank, that names the worst places.
    """
    skipped, drawn = counters["skipped_samples"] + len(step.skipped), counters["drawn_samples"] + step.samples
    ceiling = config.data.bad_ceiling
    if not step.skipped or skipped <= ceiling * max(drawn, FEWEST_DRAWN):
        return
    run = directory.path(config)
    words = [""]
    if dist.get_rank() == 0:
        words[0] = _worst([*_ledger(run / "ledger.jsonl"), *map(entry, step.skipped)])
    dist.broadcast_object_list(words, src=0)
    raise ValueError(
        f"{skipped} of {drawn} samples drawn so far could not be loaded; data.bad_ceiling={ceiling} allows "
        f"{int(ceiling * max(drawn, FEWEST_DRAWN))}. Most of them come from:\n{words[0]}\n"
        f"{run / 'ledger.jsonl'} names the others. Check the shards (tools/build_shards.py verify, repair), take a "
        "broken data set out of the mixture, or raise the ceiling; the same command goes on from the last checkpoint."
    )


def entry(fault: Fault) -> dict[str, str]:
    """A fault as a line of the ledger lists it."""
    return {"key": fault.sample, "file": fault.file, "place": fault.place, "reason": fault.reason}


def _ledger(path: Path) -> list[dict[str, str]]:
    """What the steps so far skipped."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [one for line in lines for one in line["skipped"]]


def _worst(entries: list[dict[str, str]]) -> str:
    """The data sets and files with the most of them, each with an example."""
    counts = Counter((one["key"].partition("/")[0], one["file"]) for one in entries)
    examples = {(one["key"].partition("/")[0], one["file"]): one for one in reversed(entries)}
    lines = []
    for place, count in counts.most_common(SHOWN):
        first = examples[place]
        lines.append(f"  - {place[0]}, {place[1]}: {count}; {first['key']}, {first['place']}: {first['reason']}")
    return "\n".join(lines)
