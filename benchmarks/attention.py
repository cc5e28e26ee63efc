"""Attention of the decoder on packed rows against one dense-mask scaled-dot-product call; memory by row length.

    python benchmarks/attention.py [--length 8192] [--threads 1] [--rounds 3]

Forward and backward of one layer, 4 query heads over 2 key-value heads of 64 numbers, float32. The dense call gets the
finished mask (S x S booleans) and ours the finished plan of the row; what either takes to make is a column of its own,
and is paid once for all layers. Rows of text: every sample causal. Rows of images: a quarter of every sample is an
image block that sees itself both ways. Memory: most bytes that operators held at once beyond query, key and value.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, trainers  # noqa: E402
from megatron_vlm.batch import PREFIX_BRANCH  # noqa: E402

HEADS, KV_HEADS, SIZE = 4, 2, 64
COUNTS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (2048, 4096, 8192, 16384)


def marks(length: int, count: int, images: bool) -> torch.Tensor:
    """(5, length) marks of a row of `count` samples of nearly equal length."""
    place = torch.arange(length)
    example = place * count // length
    start = torch.searchsorted(example, example)
    size = torch.bincount(example)[example]
    inside = place - start
    vision = images & (inside > 0) & (inside <= size // 4)
    branch = torch.full_like(place, PREFIX_BRANCH)
    return torch.stack([example, branch, vision.long(), torch.full_like(place, count), torch.ones_like(place)])


def tensors(length: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value (s, 1, heads, d), and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(length, 1, heads, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    return [each.requires_grad_() for each in made], torch.randn(length, 1, HEADS, SIZE, generator=generator)


def ours(length: int, plan: Any) -> Any:
    """Forward and backward through the blocks of the row's plan."""
    from megatron_vlm.model.attention import attend

    inputs, upstream = tensors(length)
    return lambda: torch.autograd.grad(attend(*inputs, [plan]), inputs, upstream)


def dense(length: int, mask: torch.Tensor) -> Any:
    """Forward and backward of torch's own attention with a mask of all pairs."""
    inputs, upstream = tensors(length)

    def run() -> Any:
        query, key, value = (each.permute(1, 2, 0, 3) for each in inputs)
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return torch.autograd.grad(out, inputs, upstream.permute(1, 2, 0, 3))

    return run


def seconds(function: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    made = function()
    return time.perf_counter() - began, made


def compare(length: int, count: int, images: bool, rounds: int) -> dict[str, Any]:
    """One line of the table."""
    from megatron_vlm.model.mask import places, visible
    from megatron_vlm.model.plan import Plan

    row = marks(length, count, images)
    planned_s, plan = seconds(lambda: Plan(row))
    here = places(row)
    pairs = [type(here)(*(each[shape] for each in here)) for shape in ((slice(None), None), (None, slice(None)))]
    masked_s, mask = seconds(lambda: visible(*pairs))
    runs = {"ours": ours(length, plan), "dense": dense(length, mask)}
    worst = max((a - b).abs().max().item() for a, b in zip(*(run() for run in runs.values()), strict=True))
    found = record.medians(record.alternate(runs, rounds, warmup=0))
    return {
        "rows of": "images" if images else "text", "samples": count, "ours ms": 1000 * found["ours"],
        "dense ms": 1000 * found["dense"], "times faster": found["dense"] / found["ours"],
        "plan ms": 1000 * planned_s, "mask ms": 1000 * masked_s, "largest difference of gradients": worst,
    }  # fmt: skip


def memory(length: int, images: bool) -> dict[str, Any]:
    """Most bytes that forward and backward hold, the plan of the row included."""
    from megatron_vlm.model.plan import Plan
    from megatron_vlm.train.pretend import Meter

    meter = Meter()
    with meter:
        run = ours(length, Plan(marks(length, 8, images)))
        before = meter.live
        run()
    inputs = (HEADS + 2 * KV_HEADS + HEADS) * length * SIZE * 4
    peak = meter.peak - min(inputs, before)
    return {"rows of": "images" if images else "text", "tokens": length, "peak MB": peak / 1e6,
            "bytes a token": peak / length}  # fmt: skip


def main() -> None:
    parser = record.options(__doc__)
    parser.add_argument("--length", type=int, default=8192, help="tokens in the row")
    parser.add_argument("--samples", type=int, nargs="+", default=COUNTS, help="samples in the row")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with trainers.alone():
        used = [memory(length, images) for images in (False, True) for length in LENGTHS]
        found = [compare(asked.length, count, images, asked.rounds) for images in (False, True)
                 for count in asked.samples]  # fmt: skip
    for row in [*used, *found]:
        print(row)
    if not asked.dry_run:
        of = {(row["rows of"], row["samples"]): round(row["times faster"], 2) for row in found}
        key = {f"{kind}, {count} samples": value for (kind, count), value in of.items() if count in (1, 8, 64)}
        for kind in ("text", "images"):
            first, *_, last = [row["bytes a token"] for row in used if row["rows of"] == kind]
            key[f"{kind}, bytes a token at {LENGTHS[-1]} over {LENGTHS[0]}"] = round(last / first, 3)
        what = (__doc__ or "").split("\n\n")[-1].strip() + f"\n\nMemory of rows of 8 samples:\n\n{record.table(used)}"
        summary = []
        for kind in ("text", "images"):
            times = ", ".join(f"{count}: {of[kind, count]:.1f}" for count in asked.samples)
            what = f"attention on a row of {asked.length:,} tokens against a dense mask, by samples in the row ({kind})"
            summary.append((what, f"{times} times faster"))
        growth = record.span([value for name, value in key.items() if "bytes" in name])
        summary.append(
            (f"its bytes a token at {LENGTHS[-1]:,} tokens over those at {LENGTHS[0]:,} (1 = linear)", growth)
        )
        record.write("attention", what, {"speed": found, "memory": used}, found, key, summary, asked.threads)


if __name__ == "__main__":
    main()
