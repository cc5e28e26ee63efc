"""Which ranks were slow since the last progress line, and in what: seconds per phase of every rank, and its memory."""

from __future__ import annotations

from statistics import median
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_vlm.parallel import cpu
from megatron_vlm.train.pulse import PHASES, Pulse

#: Work of a rank's own. Who is fast spends the rest of the interval in the others, waiting.
BUSY = ("data", "forward", "backward", "optimizer", "save", "other")
#: Ranks named in a line of stragglers.jsonl.
MOST_RANKS = 8
#: A rank whose own work took so much longer than the median rank's, and so much in all, is worth a line for the reader.
FACTOR, LEAST_S = 1.25, 0.1

#: Key beside the phases.
MEMORY = "memory_gb"

Times = dict[str, float]


def gather(pulse: Pulse) -> list[Times]:
    """Seconds by phase of each rank since the last call, and its memory in GB. Collective."""
    device = torch.cuda.current_device()
    mine = torch.tensor([*pulse.spent().values(), _memory_bytes() / 1e9], dtype=torch.float64, device=device)
    everywhere = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, mine)
    return [dict(zip((*PHASES, MEMORY), times.tolist(), strict=True)) for times in everywhere]


def _memory_bytes() -> int:
    """The most that tensors took on the GPU so far; on a CPU, what the process takes now."""
    return psutil.Process().memory_info().rss if cpu.enabled() else torch.cuda.max_memory_allocated()


def busy(times: Times) -> float:
    """Seconds of a rank's own work."""
    return sum(times[phase] for phase in BUSY)


def summary(ranks: list[Times]) -> dict[str, Any]:
    """The median of each phase, and the ranks with most work of their own, the slowest first."""
    slowest = sorted(range(len(ranks)), key=lambda rank: -busy(ranks[rank]))[:MOST_RANKS]
    return {
        "ranks": len(ranks),
        "most_memory_gb": max(times[MEMORY] for times in ranks),
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
