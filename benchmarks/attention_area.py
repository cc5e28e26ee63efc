"""Whether attention takes time for what the mask lets through, and not for the square of the row.

    python benchmarks/attention_area.py [--tokens 8192] [--rounds 5] [--out benchmarks/results/attention_area.json]

Rows of equal length: one text sample; eight packed text samples; one and eight samples that begin with an image block
of four fifths. CPU time of forward and backward of the decoder's attention (4 query, 2 key-value heads of 16, as in the
tiny model) on one core, rows in turn, medians. For each: pairs that the mask allows, seconds, both relative to the long
text.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from megatron_vlm.batch import PREFIX_BRANCH
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.split import even_counts

HEADS, KV_HEADS, SIZE = 4, 2, 16
#: Share of a sample that is its image block.
IMAGE = 0.8


def marks(tokens: int, samples: int, images: bool) -> torch.Tensor:
    """(5, tokens) int64 as model/mask.py has them: example, branch, vision, row, response."""
    row = torch.zeros(5, tokens, dtype=torch.int64)
    start = 0
    for number, count in enumerate(even_counts(tokens, samples)):
        row[0, start : start + count] = number
        block = int(IMAGE * count) if images else 0
        row[1, start : start + block + 1] = PREFIX_BRANCH
        row[2, start + 1 : start + block + 1] = 1
        start += count
    return row


def pairs(tokens: int, samples: int, images: bool) -> int:
    """Query-key pairs that the mask allows."""
    total = 0
    for count in even_counts(tokens, samples):
        block = int(IMAGE * count) if images else 0
        total += count * (count + 1) // 2 + block * max(0, block - 1) // 2
    return total


def measure(tokens: int, rounds: int) -> list[dict[str, object]]:
    """Seconds of each kind of row."""
    cpu.enable("cpu")
    from megatron_vlm.model.attention import attend
    from megatron_vlm.model.plan import Plan

    torch.manual_seed(0)
    inputs = [torch.randn(tokens, 1, heads, SIZE, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    upstream = torch.randn(tokens, 1, HEADS, SIZE)
    kinds = [(samples, images) for images in (False, True) for samples in (1, 8)]
    plans = {kind: Plan(marks(tokens, *kind)) for kind in kinds}
    seconds: dict[tuple[int, bool], list[float]] = {kind: [] for kind in kinds}
    for _ in range(rounds + 1):
        for kind in kinds:
            began = time.process_time()
            torch.autograd.grad(attend(*inputs, [plans[kind]]), inputs, upstream)
            seconds[kind].append(time.process_time() - began)
    # The first round warms up.
    found = {kind: statistics.median(times[1:]) for kind, times in seconds.items()}
    one = kinds[0]
    return [
        {
            "row": f"{kind[0]} x {'image and text' if kind[1] else 'text'}",
            "pairs": pairs(tokens, *kind),
            "seconds": round(found[kind], 4),
            "pairs_relative": round(pairs(tokens, *kind) / pairs(tokens, *one), 3),
            "seconds_relative": round(found[kind] / found[one], 3),
        }
        for kind in kinds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8_192, help="in a row (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention_area.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(asked.tokens, asked.rounds)
    machine = {
        "cores_used": 1,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    result = {"tokens": asked.tokens, "rounds": asked.rounds, "machine": machine, "rows": rows}
    asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['row']:<20} pairs {row['pairs_relative']:6.3f}   seconds {row['seconds']:7.3f}   "
              f"{row['seconds_relative']:6.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
