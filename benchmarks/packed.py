"""A stream of real samples: packed rows in this trainer against padded sequences in `transformers`, same weights.

    python benchmarks/packed.py [--steps 3] [--sequences 8] [--threads 1] [--rounds 3]

Optimizer steps of the recipe examples/recipes/tiny/stage2.yaml over the bundled sample data, in the order of the
stream. Ours takes its micro-batches of packed rows. Theirs gets the same samples of every step: transformers has no
branches, so that each question about a picture is a sequence of its own with the picture in front; sequences are padded
to the longest of a batch, their gradients accumulated, one fused AdamW step at the end. Useful tokens are those of the
samples, a shared picture counted once, for both sides alike. Decoding and packing are not timed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, samples, trainers  # noqa: E402
from megatron_vlm.batch import PREFIX_BRANCH, Batch  # noqa: E402

RECIPE = record.ROOT / "examples" / "recipes" / "tiny" / "stage2.yaml"


def sequences(batch: Batch, patches: int, placeholder: int) -> Iterator[samples.Sample]:
    """Every branch of every example with its prefix, as a sample of its own."""
    window = 0
    for row in range(len(batch.tokens)):
        examples = batch.examples[row]
        for number in range(int(examples.max()) + 1):
            here = (examples == number).nonzero()[:, 0]
            tokens, branches = batch.tokens[row, here], batch.branches[row, here]
            count = int((tokens == placeholder).sum())
            table = batch.windows[window : window + count].numpy()
            window += count
            crops = batch.crops[:0]
            if count:
                used = table[table >= 0] // patches
                first, last = int(used.min()), int(used.max()) + 1
                crops, table = batch.crops[first:last], np.where(table < 0, table, table - first * patches)
            for branch in sorted(set(branches.tolist()) - {PREFIX_BRANCH}) or [PREFIX_BRANCH]:
                keep = (branches == PREFIX_BRANCH) | (branches == branch)
                counted = int((batch.loss_weights[row, here][keep] > 0).sum())
                if counted:
                    chosen = tokens[keep].numpy()
                    yield samples.Sample(chosen, batch.is_vision[row, here][keep].numpy(), counted, crops, table)


def measure(steps: int, count: int, rounds: int, precision: str, clock: Any) -> dict[str, Any]:
    """One line of the table."""
    from megatron_vlm.config import load
    from megatron_vlm.data.loader import Loader, Share

    config = load.load(str(RECIPE), [])
    arch = trainers.TINY
    loader = Loader(config, arch, Share())
    try:
        stream = [step for step, _ in zip(loader, range(steps), strict=False)]
    finally:
        loader.close()
    plain = trainers.molmo2(arch, ())
    own = trainers.ours(trainers.config(arch, (), precision), trainers.load_into(plain))
    # The benchmark's trainer reports one loss, not one for each data set.
    packed = [own([replace(batch, sources=batch.sources.clamp(max=0)) for batch in step.micro_batches])
              for step in stream]  # fmt: skip
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    alone = [
        [one for batch in step.micro_batches
         for one in sequences(batch, arch.vision.patches, arch.token_id("<im_patch>"))]
        for step in stream
    ]  # fmt: skip
    batches = [[samples.padded(arch, each[at : at + count], dtype) for at in range(0, len(each), count)]
               for each in alone]  # fmt: skip
    accumulate = trainers.accumulated(plain.to(dtype))
    runs = {"ours": lambda: [run() for run in packed], "theirs": lambda: [accumulate(each) for each in batches]}
    found = record.medians(record.alternate(runs, rounds, clock=clock))
    useful = sum(step.useful_tokens for step in stream)
    places = sum(inputs["input_ids"].numel() for each in batches for inputs in each)
    real = sum(len(one.tokens) for each in alone for one in each)
    return {
        "precision": precision,
        "samples": sum(step.samples for step in stream),
        "useful tokens": useful,
        "ours tokens/s": useful / found["ours"],
        "transformers tokens/s": useful / found["theirs"],
        "times faster": found["theirs"] / found["ours"],
        "rows' fill": useful / sum(step.tokens for step in stream),
        "their sequences": sum(map(len, alone)),
        "their tokens": real,
        "padding added to them": places / real - 1,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = record.options(__doc__)
    parser.add_argument("--steps", type=int, default=3, help="optimizer steps of 16 rows")
    parser.add_argument("--sequences", type=int, default=8, help="sequences in a padded batch")
    parser.add_argument("--precisions", nargs="+", default=["float32", "bf16"])
    parser.add_argument("--processor-time", action="store_true", help="on a busy machine; implies --dry-run")
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    clock = time.process_time if asked.processor_time else time.perf_counter
    with trainers.alone():
        found = [measure(asked.steps, asked.sequences, asked.rounds, each, clock) for each in asked.precisions]
    for row in found:
        print(row)
    if not (asked.dry_run or asked.processor_time):
        key = {row["precision"]: round(row["times faster"], 2) for row in found}
        what = (__doc__ or "").split("\n\n")[-1].strip()
        summary = [(f"useful tokens a second over those of transformers with padding, sample data, {row['precision']}",
                    f"{row['times faster']:.1f} times") for row in found]  # fmt: skip
        record.write("packed", what, {"streams": found}, found, key, summary, asked.threads)


if __name__ == "__main__":
    main()
