"""What can be said without looking: the most frequent answers of the training split, as words, judged like a model's.

A text: the answer most often given to the same question, else to any of the same style. Places: as many as answers
have most often, each at the median of those at its rank from the left; tracks: at the median of each moment.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import cached_property
from statistics import median
from typing import Any

from megatron_vlm.data import points
from megatron_vlm.data.example import Branch, Example, Point, Points, Tracks
from megatron_vlm.data.shards import Shards
from megatron_vlm.evaluate.tasks import Task

#: Most samples of the training split that are read, evenly spread.
MOST_READ = 20_000


def guesses(shards: Shards, task: Task, samples: Sequence[Example]) -> list[list[str]] | None:
    """The words for each sample and branch; None where there is no training split of the kind."""
    data = task.usual if task.usual in shards.datasets else task.data
    count = shards.count(data, "train")
    if not count:
        return None
    read = min(count, MOST_READ)
    usual = Usual([b for i in range(read) for b in shards.example(data, "train", i * count // read).branches])
    return [[usual.answer(branch, film=bool(sample.video)) for branch in sample.branches] for sample in samples]


class Usual:
    """The usual answers of branches."""

    def __init__(self, seen: Sequence[Branch]) -> None:
        self._by_prompt: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        self._by_style: dict[str, Counter[str]] = defaultdict(Counter)
        self._points: list[Points] = []
        self._tracks: list[Tracks] = []
        for branch in seen:
            turn = branch.turns[0]
            if isinstance(turn.answer, Points):
                self._points.append(turn.answer)
            elif isinstance(turn.answer, Tracks):
                self._tracks.append(turn.answer)
            else:
                self._by_prompt[branch.style, turn.prompt][turn.answer] += 1
                self._by_style[branch.style][turn.answer] += 1

    def answer(self, branch: Branch, *, film: bool) -> str:
        """To the first question of a branch. film: times are written, not numbers of images."""
        turn = branch.turns[0]
        if isinstance(turn.answer, Points):
            return points.write(Points(turn.answer.label, self.places), branch.style, seconds=film)
        if isinstance(turn.answer, Tracks):
            return points.write(Tracks(turn.answer.label, self.tracks), branch.style)
        seen = self._by_prompt.get((branch.style, turn.prompt)) or self._by_style.get(branch.style)
        return seen.most_common(1)[0][0] if seen else ""

    @cached_property
    def places(self) -> tuple[Point, ...]:
        """Of the most frequent number of places."""
        count = _most_common(len(answer.points) for answer in self._points)
        alike = [
            sorted(answer.points, key=lambda p: (p.x, p.y)) for answer in self._points if len(answer.points) == count
        ]
        times = [_most_common(answer[rank].at for answer in alike) for rank in range(count)]
        return tuple(
            Point(times[rank], median(answer[rank].x for answer in alike), median(answer[rank].y for answer in alike))
            for rank in range(count)
        )

    @cached_property
    def tracks(self) -> tuple[tuple[Point, ...], ...]:
        """Of the most frequent number of objects, at the moments at which at least half of them are seen."""
        count = _most_common(len(answer.objects) for answer in self._tracks)
        alike = [
            sorted(answer.objects, key=lambda o: o[0][1:]) for answer in self._tracks if len(answer.objects) == count
        ]
        found = []
        for rank in range(count):
            by_time: dict[float, list[Point]] = defaultdict(list)
            for answer in alike:
                for point in answer[rank]:
                    by_time[round(point.at, 1)].append(point)
            found.append(
                tuple(
                    Point(at, median(p.x for p in seen), median(p.y for p in seen))
                    for at, seen in sorted(by_time.items())
                    if 2 * len(seen) >= len(alike)
                )
            )
        return tuple(track for track in found if track)


def _most_common(values: Iterable[float]) -> Any:
    return Counter(values).most_common(1)[0][0] if (values := list(values)) else 0
