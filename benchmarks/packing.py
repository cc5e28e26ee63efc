"""Packing and balance on the lengths of Molmo2's fine-tuning mixture (lengths.py), at 16,384 tokens / 128 crops.

    python benchmarks/packing.py [--seeds 3] [--ranks 64]

Packing: windows of 4,096 samples, beside the reference's knapsack over 48 samples in the same run. `of bound` = rows
that any packing needs at least / rows. Times are of the processor, of packing alone.
Balance: cost of a rank's rows of a global batch, dearest rank / mean rank, of all operations of a row (molmo2_4b) and
of those in which rows differ (attention, vision tower, connector, head); p of a chi-square test of each batch's data
sets against the mixture, sets with fewer than 5 expected samples taken together by group.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import knapsack  # noqa: E402
from benchmarks.lengths import MAX_CROPS, MAX_TOKENS, WINDOW, Distribution, Drawn  # noqa: E402
from megatron_vlm.data.balance import deal, row_cost  # noqa: E402
from megatron_vlm.data.keyed import generator  # noqa: E402
from megatron_vlm.data.pack import lower_bound, pack  # noqa: E402

RESULTS = Path(__file__).with_name("results")
#: Global batches over which rows could be exchanged for balance.
SPAN = 8
LEAST_EXPECTED = 5
FAR_WINDOW = 1_000_000


def packed(samples: list[Drawn], method: Any) -> dict[str, Any]:
    """Rows and times of one way to pack; checks that every sample has one place and no budget is broken."""
    tokens, crops = [one.tokens for one in samples], [one.crops for one in samples]
    began = time.process_time()
    rows = method(tokens, crops, MAX_TOKENS, MAX_CROPS)
    seconds = time.process_time() - began
    assert sorted(one for row in rows for one in row) == list(range(len(samples)))
    assert all(sum(tokens[one] for one in row) <= MAX_TOKENS for row in rows)
    assert all(sum(crops[one] for one in row) <= MAX_CROPS for row in rows)
    bound = lower_bound(tokens, crops, MAX_TOKENS, MAX_CROPS)
    return {
        "rows": len(rows),
        "bound": bound,
        "of_bound": round(bound / len(rows), 4),
        "microseconds_a_sample": round(seconds / len(samples) * 1e6, 1),
        "samples_a_row": round(len(samples) / len(rows), 2),
    }


def far_window() -> dict[str, Any]:
    """Window 1,000,000 without any earlier one: draws, lengths, packing."""
    distribution = Distribution(0)
    began = time.process_time()
    samples = distribution.window(FAR_WINDOW)
    drawn = time.process_time()
    pack([one.tokens for one in samples], [one.crops for one in samples], MAX_TOKENS, MAX_CROPS)
    done = time.process_time()
    return {"samples": len(samples), "draw_s": round(drawn - began, 2), "pack_s": round(done - drawn, 2)}


class Bins:
    """Data sets as the chi-square test counts them."""

    def __init__(self, distribution: Distribution, samples: float) -> None:
        groups = [group.name for group in distribution.mixture.groups for _ in group.members]
        rates = np.asarray(distribution.rates)
        labels: dict[str, int] = {}
        enough = rates * samples >= LEAST_EXPECTED
        names = [name if many else group for name, many, group in zip(distribution.names, enough, groups, strict=True)]
        self._of = np.asarray([labels.setdefault(name, len(labels)) for name in names])
        self._share = np.bincount(self._of, rates)

    def p(self, sources: list[int]) -> float:
        """Probability of a batch at least as far from the mixture. Wilson and Hilferty's normal approximation."""
        found = np.bincount(self._of[sources], minlength=len(self._share))
        expected = self._share * len(sources)
        few = expected < LEAST_EXPECTED  # hard-coded answers: put to the largest
        largest = int(expected.argmax())
        found[largest] += found[few].sum()
        expected[largest] += expected[few].sum()
        square = (((found - expected) ** 2 / expected)[~few]).sum()
        freedom = int((~few).sum()) - 1
        scaled = ((square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
        return 0.5 * math.erfc(scaled / math.sqrt(2))


def balance(seed: int, ranks: int, rows_per_rank: int, windows: int = 4) -> list[dict[str, Any]]:
    """Imbalance of batches in the order of the stream, and were the rows of SPAN batches sorted by cost."""
    distribution = Distribution(seed)
    rows: list[list[Drawn]] = []
    for window in range(windows):
        samples = distribution.window(window)
        made = pack([one.tokens for one in samples], [one.crops for one in samples], MAX_TOKENS, MAX_CROPS)
        generator(seed, window, "rows").shuffle(made)
        rows += [[samples[one] for one in row] for row in made]
    cost = [row_cost(distribution.arch, MAX_TOKENS, [one.work for one in row]) for row in rows]
    padding = row_cost(distribution.arch, MAX_TOKENS, [])
    batch = ranks * rows_per_rank
    bins = Bins(distribution, batch * sum(map(len, rows)) / len(rows))
    results = []
    for order in ("stream", "sorted by cost"):
        whole, differing, p = [], [], []
        for start in range(0, len(rows) - SPAN * batch + 1, SPAN * batch):
            span = list(range(start, start + SPAN * batch))
            if order != "stream":
                span.sort(key=lambda row: -cost[row])
            for first in range(0, len(span), batch):
                mine = span[first : first + batch]
                dealt = deal([cost[row] for row in mine], ranks, rows_per_rank)
                loads = [sum(cost[mine[row]] for part in rank for row in part) for rank in dealt]
                mean = sum(loads) / ranks
                whole.append(max(loads) / mean)
                constant = padding * rows_per_rank
                differing.append((max(loads) - constant) / (mean - constant))
                p.append(bins.p([one.source for row in mine for one in rows[row]]))
        results.append(
            {
                "seed": seed,
                "rows_a_rank": rows_per_rank,
                "order": order,
                "batches": len(whole),
                "mean": round(statistics.mean(whole), 3),
                "worst": round(max(whole), 3),
                "mean_differing": round(statistics.mean(differing), 3),
                "worst_differing": round(max(differing), 3),
                "p_median": float(f"{statistics.median(p):.2g}"),
                "p_least": float(f"{min(p):.2g}"),
                "p_below_0.01": round(sum(one < 0.01 for one in p) / len(p), 3),
            }
        )
    return results


def table(lines: list[dict[str, Any]]) -> str:
    """As Markdown."""
    head = list(lines[0])
    body = [[str(line[name]) for name in head] for line in lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ranks", type=int, default=64)
    asked = parser.parse_args()
    packing, balancing = [], []
    for seed in range(asked.seeds):
        samples = Distribution(seed).window(0)
        for name, method in (("ours", pack), ("knapsack of 48", knapsack.pack)):
            packing.append({"seed": seed, "packing": name, "samples": len(samples), **packed(samples, method)})
            print(packing[-1], flush=True)
        for rows_per_rank in (1, 2):
            balancing += balance(seed, asked.ranks, rows_per_rank)
    far = far_window()
    cpu = platform.processor() or platform.machine()
    machine = {"cores": os.cpu_count(), "processor": cpu, "python": platform.python_version(), "numpy": np.__version__}
    found = {"machine": machine, "window": WINDOW, "packing": packing, "balance": balancing, "window_1000000": far}
    text = (
        f"`python benchmarks/packing.py`: {asked.ranks} ranks, windows of {WINDOW:,} samples, rows of {MAX_TOKENS:,} "
        f"tokens and {MAX_CROPS} crops. Processor time, {machine['cores']} cores, Python {machine['python']}.\n\n"
        f"{table(packing)}\n\nImbalance (dearest rank / mean), of all operations and of those in which rows differ:\n\n"
        f"{table(balancing)}\n\nWindow 1,000,000 alone: {far['draw_s']} s to draw {far['samples']} lengths, "
        f"{far['pack_s']} s to pack.\n"
    )
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "packing.json").write_text(json.dumps(found, indent=1) + "\n")
    (RESULTS / "packing.md").write_text(text)


if __name__ == "__main__":
    main()
