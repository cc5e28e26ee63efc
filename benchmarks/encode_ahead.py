"""Whether a frozen tower should be run ahead of the pipeline, by all stages, instead of by the first one as rows pass.

    python benchmarks/encode_ahead.py [--rounds 5]

Steps of the small model (8 decoder layers, tower and connector frozen) over 8 micro-batches. Measured: PP 2, two
processes with a core each over gloo, the trainer's own schedule; every split of the layers, and encoding ahead (each
stage encodes every second micro-batch, features go to the first stage). Computed, since two cores cannot show PP 4: the
same schedule replayed with the measured times of tower, layers and head. Gain: of encoding ahead with its best split
over the first stage encoding with its best split (tools/plan.py proposes such splits).
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record, samples, trainers  # noqa: E402
from megatron_vlm.batch import Batch  # noqa: E402
from megatron_vlm.config.schema import Config  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from megatron_vlm.parallel.pool import Pool  # noqa: E402

LAYERS, MICRO_BATCHES = 8, 8
ARCH = replace(trainers.SMALL, language=replace(trainers.SMALL.language, layers=LAYERS))
#: Crops of the image that a row begins with, and tokens of a row.
CROPS = (2, 5)
LENGTH = 320

Split = tuple[int, ...]
#: Those measured at PP 2.
MEASURED: tuple[Split, ...] = ((2, 6), (3, 5), (4, 4))


def settings(split: Split) -> Config:
    """Settings of a run of `split` layers per stage."""
    made = trainers.config(ARCH, ("vision", "connector", "base_embeddings"), "float32")
    parallel = replace(made.parallel, pipeline=len(split), pipeline_layers=split if len(split) > 1 else ())
    train, data = replace(made.train, global_batch=MICRO_BATCHES), replace(made.data, sequence_length=LENGTH)
    return replace(made, parallel=parallel, train=train, data=data)


def micro_batches(crops: int) -> list[Batch]:
    """Rows of one image each, the rest text, half of it answers."""
    maker = samples.Maker(ARCH)
    found = []
    for number in range(MICRO_BATCHES):
        block = maker.image(100 * ARCH.vision.image_size, 10, 1, 1, crops - 1)
        text = LENGTH - len(block.tokens)
        row = [maker.image(100 * ARCH.vision.image_size, 10, text, text // 2, crops - 1)]
        made = samples.packed(ARCH, [row], LENGTH)
        found.append(replace(made, rows=made.rows + number))
    return found


def on_rank(split: Split, crops: int, ahead: bool, rounds: int) -> float:
    """Median seconds of a step on a rank of PP len(split)."""
    import torch
    import torch.distributed as dist

    from megatron_vlm.model import build, features
    from megatron_vlm.model.connector import build_connector
    from megatron_vlm.model.vision import VisionTower
    from megatron_vlm.parallel import groups
    from megatron_vlm.train import optim
    from megatron_vlm.train.step import Stepper

    config, layout = settings(split), Layout(len(split), pipeline=len(split))
    groups.initialize(layout, timeout_s=60)
    models = build.build(config, layout)
    wrapped = optim.wrap(models, config)
    trainer = Stepper(wrapped, optim.build(wrapped, config), config, ("benchmark",))
    batches, rank, stages = micro_batches(crops), dist.get_rank(), len(split)
    common = {**build._common_settings(config), "perform_initialization": True}
    tower = VisionTower(ARCH.vision, ARCH.connector.taps, common, groups.encoder(layout))
    connector = build_connector(ARCH, common, groups.encoder(layout))
    images: dict[int, torch.Tensor] = {}

    def encode() -> None:
        with torch.no_grad():
            for number in range(rank, len(batches), stages):
                batch = batches[number]
                images[number] = features.encode(tower, connector, batch.crops, batch.windows, batch.crop_counts)
        for number, batch in enumerate(batches):
            source = number % stages
            if source and rank == 0:
                images[number] = torch.empty(len(batch.windows), ARCH.language.hidden)
                dist.recv(images[number], source)
            elif source and source == rank:
                dist.send(images[number], 0)

    if ahead and rank == 0:
        first: Any = models[0]
        first.encode = lambda batch: images[int(batch.rows[0])]
    seconds = []
    for _ in range(rounds + 1):
        dist.barrier()
        began = time.perf_counter()
        if ahead:
            encode()
        trainer.train(batches, 1)
        dist.barrier()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def parts(crops: int, rounds: int) -> dict[str, float]:
    """Median seconds of one micro-batch on one core: the frozen tower, a decoder layer's forward and backward, and what
    is not layers (embedding, head), forward and backward."""
    import torch

    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups

    groups.initialize(Layout(1), timeout_s=60)
    (batch, *_) = micro_batches(crops)
    models = {}
    for layers in (LAYERS, LAYERS // 2):
        trainers.presets.PRESETS["benchmark"] = replace(ARCH, language=replace(ARCH.language, layers=layers))
        config = trainers.config(trainers.presets.PRESETS["benchmark"], ("vision", "connector", "base_embeddings"),
                                 "float32")  # fmt: skip
        (models[layers],) = build(config, Layout(1))
    found: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for layers, model in models.items():
            began = time.perf_counter()
            with torch.no_grad():
                images = model.encode(batch)
            encoded = time.perf_counter()
            losses = model(batch, images=images)
            forward = time.perf_counter()
            losses.sum().backward()
            backward = time.perf_counter()
            for name, value in (("tower", encoded - began), (f"forward {layers}", forward - encoded),
                                (f"backward {layers}", backward - forward)):  # fmt: skip
                found.setdefault(name, []).append(value)
            model.zero_grad()
    median = {name: statistics.median(values[1:]) for name, values in found.items()}
    half = LAYERS // 2
    made = {"tower": median["tower"]}
    for way in ("forward", "backward"):
        layer = (median[f"{way} {LAYERS}"] - median[f"{way} {half}"]) / half
        made |= {way: layer, f"{way} of the ends": max(0.0, median[f"{way} {LAYERS}"] - LAYERS * layer)}
    return made


def replay(forward: Sequence[float], backward: Sequence[float], count: int = MICRO_BATCHES) -> float:
    """Seconds of one-forward-one-backward over `count` micro-batches, given those of each stage."""
    stages = len(forward)
    orders = []
    for stage in range(stages):
        warmup = min(stages - stage - 1, count)
        steady = [(way, n + warmup * (way == "f")) for n in range(count - warmup) for way in "fb"]
        orders.append([("f", n) for n in range(warmup)] + steady + [("b", n) for n in range(count - warmup, count)])
    done: dict[tuple[str, int, int], float] = {}
    clocks, places = [0.0] * stages, [0] * stages
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for stage, order in enumerate(orders):
            while places[stage] < len(order):
                way, number = order[places[stage]]
                before = stage - 1 if way == "f" else stage + 1
                ready = 0.0 if before in (-1, stages) else done.get((way, before, number))
                if ready is None:
                    break
                clocks[stage] = max(clocks[stage], ready) + (forward if way == "f" else backward)[stage]
                done[way, stage, number] = clocks[stage]
                places[stage] += 1
    return max(clocks)


def computed(times: dict[str, float], split: Split, ahead: bool) -> float:
    """Seconds of a step by `replay`."""
    forward = [layers * times["forward"] for layers in split]
    backward = [layers * times["backward"] for layers in split]
    forward[-1] += times["forward of the ends"]
    backward[-1] += times["backward of the ends"]
    before = 0.0
    if ahead:
        before = -(-MICRO_BATCHES // len(split)) * times["tower"]
    else:
        forward[0] += times["tower"]
    return before + replay(forward, backward)


def splits(stages: int) -> list[Split]:
    """All ways to deal the layers, one at least for each stage."""
    cuts = itertools.combinations(range(1, LAYERS), stages - 1)
    return [tuple(b - a for a, b in itertools.pairwise((0, *cut, LAYERS))) for cut in cuts]


def row(
    name: str, crops: int, tower: float, even: float, best: tuple[float, Split], ahead: tuple[float, Split]
) -> dict:
    """A line of the table. Seconds; tower: its share of the arithmetic."""
    return {
        "layout": name, "crops a row": crops, "tower share": f"{tower:.0%}", "first stage, even ms": 1000 * even,
        "first stage, best split ms": 1000 * best[0], "split": "-".join(map(str, best[1])),
        "ahead, best split ms": 1000 * ahead[0], "its split": "-".join(map(str, ahead[1])),
        "gain": f"{best[0] / ahead[0] - 1:+.1%}",
    }  # fmt: skip


def main() -> None:
    asked = record.options(__doc__, rounds=5, threads=False).parse_args()
    pools = {world: Pool(world) for world in (1, 2)}
    rows, all_parts, measured_rows = [], {}, {}
    try:
        for crops in CROPS:
            (times,) = pools[1].run(parts, crops, asked.rounds, timeout_s=170)
            all_parts[crops] = times
            layers = LAYERS * (times["forward"] + times["backward"])
            ends = times["forward of the ends"] + times["backward of the ends"]
            share = times["tower"] / (times["tower"] + layers + ends)
            measured = {
                (split, ahead): max(pools[2].run(on_rank, split, crops, ahead, asked.rounds, timeout_s=170))
                for split in MEASURED
                for ahead in (False, True)
            }
            measured_rows[crops] = [
                {
                    "split": split,
                    "ahead": ahead,
                    "ms": 1000 * seconds,
                    "computed ms": 1000 * computed(times, split, ahead),
                }
                for (split, ahead), seconds in measured.items()
            ]
            ways = [min((seconds, split) for (split, by), seconds in measured.items() if by == ahead)
                    for ahead in (False, True)]  # fmt: skip
            rows.append(row("PP 2, measured", crops, share, measured[(4, 4), False], *ways))
            for stages in (2, 4):
                ways = [min((computed(times, split, ahead), split) for split in splits(stages))
                        for ahead in (False, True)]  # fmt: skip
                even = computed(times, (LAYERS // stages,) * stages, False)
                rows.append(row(f"PP {stages}, computed", crops, share, even, *ways))
    finally:
        for pool in pools.values():
            pool.close()
    if asked.dry_run:
        print(record.table(rows))
        return
    key = {f"{each['layout']}, {each['crops a row']} crops": round(float(each["gain"][:-1]) / 100, 3) for each in rows}
    what = (__doc__ or "").split("\n\n")[-1].strip()
    gains = ", ".join(f"{each['gain']} where it does {each['tower share']} of the work" for each in rows
                      if "measured" in each["layout"])  # fmt: skip
    summary = [("A frozen tower run by both stages ahead of PP 2, against the first stage with the best split", gains)]
    data = {"steps": rows, "pp2": {str(k): v for k, v in measured_rows.items()}, "parts": all_parts}
    record.write("encode_ahead", what, data, rows, key, summary, 1)


if __name__ == "__main__":
    main()
