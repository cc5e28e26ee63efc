"""What tools/evaluate.py reports: scores of all passes over a task, its best and worst answers; JSON and Markdown."""

from __future__ import annotations

import importlib.metadata
import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import megatron_vlm
from megatron_vlm.data import points
from megatron_vlm.data.example import Example, Points, Tracks
from megatron_vlm.evaluate import kinds
from megatron_vlm.evaluate.asking import Answer
from megatron_vlm.evaluate.score import Verdict, summary, unknown
from megatron_vlm.evaluate.segments import Segmenter
from megatron_vlm.evaluate.statements import Judge
from megatron_vlm.evaluate.tasks import Task

Report = dict[str, Any]
#: Passes over a task beside the one that is scored, by the heading of their column.
OTHERS = {"shuffled": "other images", "blind": "without image", "untrained": "untrained"}
#: Answers shown from either end.
SHOWN = 6
#: Packages whose versions a score may depend on.
PACKAGES = ("torch", "megatron-core", "numpy", "scipy", "pillow", "av", "tokenizers", "pycocotools")


@dataclass(frozen=True)
class Judged:
    """One question with the answer and what is said of it."""

    sample: Example
    branch: int
    said: str
    verdict: Verdict

    @property
    def prompt(self) -> str:
        """What was asked, or the style where that says it all."""
        branch = self.sample.branches[self.branch]
        return branch.turns[0].prompt or branch.style.replace("_", " ")

    @property
    def wanted(self) -> str:
        """The true answer in words."""
        branch = self.sample.branches[self.branch]
        answer = branch.turns[0].answer
        if isinstance(answer, Points | Tracks):
            return points.write(answer, branch.style, seconds=bool(self.sample.video))
        return answer


def judge(
    task: Task,
    samples: Sequence[Example],
    answers: Mapping[str, Answer],
    judge: Judge | None = None,
    masks: Segmenter | None = None,
    threads: int = 1,
) -> list[list[Judged]]:
    """What is said of every question, by sample. A sample without an answer is not scored.

    masks:   adds J and F to answers that follow objects.
    threads: samples judged at a time, for a judge that waits for a network.
    """

    def of_sample(sample: Example) -> list[Judged]:
        answer = answers.get(sample.key, Answer(sample.key, fault="it was not asked"))
        return [_judged(task, sample, number, answer, judge, masks) for number in range(len(sample.branches))]

    if threads == 1:
        return [of_sample(sample) for sample in samples]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(of_sample, samples))


def _judged(
    task: Task, sample: Example, number: int, answer: Answer, judge: Judge | None, masks: Segmenter | None
) -> Judged:
    if answer.fault or number >= len(answer.said):
        return Judged(sample, number, "", unknown(f"media or prompt: {answer.fault}"))
    question = kinds.of(sample, sample.branches[number], radius=task.radius, judge=judge)
    said = answer.said[number]
    verdict = kinds.verdict(kinds.KINDS[task.kind], question, said)
    if masks and verdict.scores:
        verdict = replace(verdict, scores={**verdict.scores, **masks(sample, question, said)})
    return Judged(sample, number, said, verdict)


def scores(judged: Sequence[Sequence[Judged]]) -> Report:
    """Of one pass; see score.summary. The main score's name stands in `main`."""
    found = summary([[one.verdict for one in row] for row in judged])
    return {**found, "main": next(iter(found["scores"]), "")}


def extremes(judged: Sequence[Sequence[Judged]], count: int = SHOWN) -> tuple[list[Judged], list[Judged]]:
    """The best and the worst answers, each of another sample, evenly spread over those that are as good."""
    known = [max(row, key=lambda one: _value(one)) for row in judged if row]
    ranked = sorted(known, key=_value, reverse=True)
    worst = sorted((min(row, key=_value) for row in judged if row), key=_value)
    return _spread(ranked, count), _spread(worst, count)


def _value(one: Judged) -> float:
    """NaN, of which nothing is known, is neither good nor bad."""
    value = one.verdict.value
    return 0.5 if math.isnan(value) else value


def _spread(ranked: list[Judged], count: int) -> list[Judged]:
    if not ranked:
        return []
    last = _value(ranked[min(count, len(ranked)) - 1])
    alike = [one for one in ranked if _value(one) == last]
    before = [one for one in ranked if (_value(one) - last) * (_value(ranked[0]) - last) > 0]
    wanted = min(count - len(before), len(alike))
    return [*before, *(alike[i * len(alike) // wanted] for i in range(wanted))][:count]


def versions() -> dict[str, str]:
    """Of the program and of the packages that a score may depend on."""
    found = {"python": sys.version.split()[0], "megatron_vlm": megatron_vlm.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def markdown(reports: Sequence[Report]) -> str:
    """The reports as a table, and under it why answers were not scored."""
    others = [name for name in OTHERS if any(name in report for report in reports)]
    heads = ["task", "questions", "score", "95 % interval", "not scored", *(OTHERS[name] for name in others)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for report in reports:
        found = report["scores"]
        main = _main(found)
        cells = [f"{report['task']} ({found['main']})", f"{found['questions']:,}", percent(main), interval(main),
                 f"{sum(found['not_scored'].values()):,}",
                 *(_with_interval(_main(report[name])) if name in report else "" for name in others)]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    reasons = [f"- {report['task']}: {count} not scored: {reason}" for report in reports
               for reason, count in report["scores"]["not_scored"].items()]  # fmt: skip
    return "\n".join([*lines, *([""] if reasons else []), *reasons])


def _main(found: Report) -> Report:
    return found["scores"].get(found["main"], {"value": math.nan, "low": math.nan, "high": math.nan})


def percent(score: Report) -> str:
    """Its value; "" for NaN."""
    return "" if math.isnan(score["value"]) else f"{score['value']:.1%}"


def interval(score: Report) -> str:
    """Its ends; "" where there is none."""
    return "" if math.isnan(score["low"]) else f"{score['low']:.1%} to {score['high']:.1%}"


def _with_interval(score: Report) -> str:
    found = interval(score)
    return f"{percent(score)} ({found})" if found else percent(score)
