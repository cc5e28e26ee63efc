"""Ask a model the questions of samples, a few samples at a time; keep every answer as soon as it is there.

A sample whose media cannot be read, or whose prompt is longer than the model's context, has a fault in the place of
answers; nothing else stops for it. Answers lie in JSON lines: a process that is killed loses those it was working on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.data import faults
from megatron_vlm.data.example import Example
from megatron_vlm.data.media import Store
from megatron_vlm.data.tree import TreeSettings
from megatron_vlm.evaluate import tasks
from megatron_vlm.evaluate.decode import decode
from megatron_vlm.evaluate.prompt import Prompt
from megatron_vlm.parallel import groups

#: Samples whose pixels are in memory, and whose answers are lost at once.
AT_ONCE = 32


@dataclass(frozen=True)
class Answer:
    """What a model said about a sample."""

    key: str
    said: tuple[str, ...] = ()
    """One for each branch; none where there was a fault."""
    fault: str = ""
    """Why it was not asked."""


def ask(
    model: Any,
    samples: Sequence[Example],
    store: Store,
    tree: TreeSettings,
    max_new_tokens: int,
    device: torch.device,
    done: Callable[[int], None] = lambda count: None,
) -> Iterator[Answer]:
    """The answers to all samples, greedy, in their order. done: told the number of samples just answered.

    model: a VlmModel, or this rank's part of it: all ranks that hold it ask the same. Left in evaluation mode.
    """
    for first in range(0, len(samples), AT_ONCE):
        group = samples[first : first + AT_ONCE]
        prompts: dict[str, Prompt] = {}
        found: dict[str, Answer] = {}
        for sample in group:
            try:
                prompts[sample.key] = _prompt(sample, store, tree, max_new_tokens, model.arch.language.max_positions)
            except Exception as error:  # whatever a decoder raises on a stranger's file is this file's fault
                found[sample.key] = Answer(sample.key, fault=faults.reason(error))
        for key, answer in _told(found).items():  # what one rank cannot read, none may wait for
            found[key] = answer
            prompts.pop(key, None)
        answers = decode(model, list(prompts.values()), tree.tokenizer, max_new_tokens=max_new_tokens, device=device)
        for key, row in zip(prompts, answers, strict=True):
            found[key] = Answer(key, tuple(tree.tokenizer.decode(ids) for ids in row))
        done(len(group))
        yield from (found[sample.key] for sample in group)


def _told(faults: dict[str, Answer]) -> dict[str, Answer]:
    """The faults of all ranks that hold the model; of one sample, the first rank's."""
    if groups.model().size() == 1:
        return faults
    parts: list[Any] = [None] * groups.model().size()
    dist.all_gather_object(parts, faults, group=groups.model())
    return {key: answer for part in reversed(parts) for key, answer in part.items()}


def _prompt(sample: Example, store: Store, tree: TreeSettings, max_new_tokens: int, most: int) -> Prompt:
    prompt = tasks.prompt(sample, store, tree)
    longest = len(prompt.prefix) + max(map(len, prompt.questions), default=0)
    if longest + max_new_tokens > most:
        raise ValueError(f"prompt and answer need more positions than the model's {most}")
    return prompt


class Kept:
    """Answers of one pass, kept in files of JSON lines: `<name>.<rank>.jsonl`, one for each process that writes.

    All processes may read all files; each writes its own.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0) -> None:
        self._folder, self._name = folder, name
        self._path = folder / f"{name}.{rank:04d}.jsonl"

    def read(self) -> dict[str, Answer]:
        """Finished answers and faults by key; an answer wins over a fault. A line that was cut off is none."""
        found: dict[str, Answer] = {}
        for path in sorted(self._folder.glob(f"{self._name}.[0-9][0-9][0-9][0-9].jsonl")):
            for line in path.read_bytes().splitlines():
                answer = _parsed(line)
                if answer is not None and (answer.key not in found or found[answer.key].fault):
                    found[answer.key] = answer
        return found

    def add(self, answers: Iterator[Answer]) -> None:
        """Write answers as they come."""
        self._folder.mkdir(parents=True, exist_ok=True)
        _mend(self._path)
        with self._path.open("a", encoding="utf-8") as file:
            for answer in answers:
                record = {"key": answer.key, **({"fault": answer.fault} if answer.fault else {"said": answer.said})}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()


def _parsed(line: bytes) -> Answer | None:
    try:
        record: Mapping[str, Any] = json.loads(line)
        return Answer(str(record["key"]), tuple(map(str, record.get("said", ()))), str(record.get("fault", "")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _mend(path: Path) -> None:
    """Cut off a last line without its end: the process that wrote it was killed."""
    if path.exists() and (data := path.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(path, data.rfind(b"\n") + 1)
