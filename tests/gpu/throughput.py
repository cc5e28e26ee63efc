"""Steps of a recipe on made-up rows, by the trainer's own code: time, tokens per second and peak memory of each rank.

    torchrun --nproc-per-node 8 tests/gpu/throughput.py examples/recipes/molmo2_4b/stage1.yaml [section.key=value ...]

Rows are those that tools/plan.py assumes, weights are random, a step has two micro-batches on each rank. Prints one
line of JSON, measured beside planned. Runs on a CPU as well (for small recipes).
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

from megatron_vlm.batch import Batch  # noqa: E402
from megatron_vlm.config import load, presets, rules  # noqa: E402
from megatron_vlm.config.schema import Config  # noqa: E402
from megatron_vlm.parallel import process  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from megatron_vlm.parallel.split import even_counts  # noqa: E402
from megatron_vlm.plan import memory, workload  # noqa: E402

MICRO_BATCHES, WARM, TIMED = 2, 2, 5


def settings(recipe: str, overrides: Sequence[str], world: int) -> tuple[Config, Layout]:
    """The recipe with a global batch of MICRO_BATCHES on each rank (more where a pipeline needs them)."""
    config = load.load(recipe, overrides)
    layout = Layout.of(config, world)
    count = max(MICRO_BATCHES, layout.pipeline)
    train = dataclasses.replace(config.train, global_batch=count * layout.data * config.train.micro_batch)
    config = dataclasses.replace(config, train=dataclasses.replace(train, rampup_steps=0))
    rules.check(config, world)
    return config, layout


def batches(config: Config, layout: Layout, rank: int, row: workload.Row) -> list[Batch]:
    """This rank's micro-batches of a step, with random pixels."""
    from megatron_vlm.train import rehearsal

    arch, made = presets.architecture(config.model), []
    for number in range(config.train.global_batch // (layout.data * config.train.micro_batch)):
        batch = rehearsal.batch(arch, row, config.train.micro_batch, number, layout)
        own = 0
        if layout.coordinates(rank).pipeline == 0:
            own = even_counts(sum(batch.crop_counts), layout.crop_ranks)[layout.crop_rank(rank)]
        shape = (own, arch.vision.patches, arch.vision.patch_values)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
        made.append(dataclasses.replace(batch, crops=pixels))
    return made


def measure(config: Config, layout: Layout, backend: str) -> dict[str, Any]:
    """On every rank; what is told is the same on all."""
    import torch.distributed as dist

    from megatron_vlm.model import attention_kernels, kernels
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import cpu, groups
    from megatron_vlm.train import optim
    from megatron_vlm.train.step import Stepper

    groups.initialize(layout, backend=backend, seed=config.train.seed, timeout_s=process.TIMEOUT_S)
    rank, row = dist.get_rank(), workload.assume(config)
    models = optim.wrap(build(config, layout), config)
    stepper = Stepper(models, optim.build(models, config), config, ["data"])
    rows = batches(config, layout, rank, row)
    seconds: list[float] = []
    for step in range(1, WARM + TIMED + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        outcome = stepper.train(rows, step)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    spent = statistics.median(seconds[WARM:])
    stage = layout.coordinates(rank).pipeline
    planned = memory.of_stage(config, layout, stage, workload.load(row, config, layout, rank), cuda=not cpu.enabled())
    everywhere: list[int] = [0] * layout.world
    dist.all_gather_object(everywhere, planned.peak)
    tokens = config.train.global_batch * config.data.sequence_length
    return {
        "processes": layout.world,
        "step_s": spent,
        "first_step_s": seconds[0],
        "tokens_per_s_per_process": tokens / spent / layout.world,
        "loss": outcome.loss,
        "peak_gb": max(process.peak_memory()) / 1e9,
        "planned_peak_gb": max(everywhere) / 1e9,
        "kernels": [*kernels.choose(config).reasons, *attention_kernels.of(config).why],
    }


def main(words: Sequence[str]) -> int:
    """Run the command; the exit code."""

    def body() -> None:
        recipe, *overrides = words
        config, layout = settings(recipe, overrides, int(os.environ.get("WORLD_SIZE", 1)))
        backend = process.start(config.run)
        found = measure(config, layout, backend)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps({"recipe": recipe, "settings": overrides, **found}), flush=True)

    return process.tool(body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
