"""Which ranks were slow since the last progress line, and in what: seconds per phase of every rank, gathered once."""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.train.pulse import PHASES, Pulse

#: Work of a rank's own. Who is fast spends the rest of the interval in the others, waiting.
BUSY = ("data", "forward", "backward", "optimizer", "save", "other")
#: Ranks named in a line of stragglers.jsonl.
MOST_RANKS = 8
#: A rank whose own work took so much longer than the median rank's, and so much in all, is worth a line for the reader.
FACTOR, LEAST_S = 1.25, 0.1

Times = dict[str, float]


def gather(pulse: Pulse) -> list[Times]:
    """Seconds by phase of each rank since the last call. Collective."""
    mine = torch.tensor(list(pulse.spent().values()), dtype=torch.float64, device=torch.cuda.current_device())
    everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, mine)
    return [dict(zip(PHASES, times.tolist(), strict=True)) for times in everywhere]


def busy(times: Times) -> float:
    """Seconds of a rank's own work."""
    return sum(times[phase] for phase in BUSY)


def summary(ranks: list[Times]) -> dict[str, Any]:
    """The median of each phase, and the ranks with most work of their own, the slowest first."""
    slowest = sorted(range(len(ranks)), key=lambda rank: -busy(ranks[rank]))[:MOST_RANKS]
    return {
        "ranks": len(ranks),
        "median_s": {phase: median(times[phase] for times in ranks) for phase in PHASES},
        "slowest": [{"rank": rank, **ranks[rank]} for rank in slowest],
    }


def words(ranks: list[Times]) -> str:
    """The straggler, for the reader; empty where no rank stands out."""
    usual = median(busy(times) for times in ranks)
    worst = max(range(len(ranks)), key=lambda rank: busy(ranks[rank]))
    if busy(ranks[worst]) < FACTOR * usual + LEAST_S:
        return ""
    middle = summary(ranks)["median_s"]
    phase = max(BUSY, key=lambda phase: ranks[worst][phase] - middle[phase])
    return f"slowest: rank {worst}, {phase} {ranks[worst][phase]:.1f} s (median {middle[phase]:.1f} s)"
