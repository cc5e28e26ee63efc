"""What a checkpoint's description costs in large runs: bytes that rank 0 gathers and every rank reads, and planning.

Molmo2-8B at real shapes on layouts that nobody here can start. Every rank's share of the optimizer (boxes of
parameters) and of the weights is described by the trainer's own code for tensors without memory; torch's planners and
Megatron's check get the descriptions of all ranks in this process. Nothing is sent: on a network the bytes come on top.
Seconds are of the processor.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks import record  # noqa: E402
from megatron_vlm.config import load  # noqa: E402
from megatron_vlm.parallel import cpu  # noqa: E402
from megatron_vlm.parallel.layout import Coordinates, Layout  # noqa: E402
from megatron_vlm.plan import params  # noqa: E402

#: Decoder weights that tensor-parallel ranks share by their inputs; all other matrices by their outputs.
ROWS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
#: float32 numbers and moments.
KINDS = ("param", "exp_avg", "exp_avg_sq")


def weights(parameter: params.Parameter, layout: Layout, at: Coordinates, first_layer: int) -> list[Any]:
    """A parameter as the model's sharded state has it: two tensors where gate and up share one."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    key = parameter.name
    if ".layers." in key and key.startswith("language."):
        head, _, tail = key.partition(".layers.")
        number, _, rest = tail.partition(".")
        key = f"{head}.layers.{int(number) + first_layer}.{rest}"
    data = torch.empty(parameter.shape, dtype=torch.bfloat16, device="meta")
    shared = key.startswith("language.") and len(parameter.shape) == 2 and "new_rows" not in key
    if key == "connector.projector.linear_fc1.weight":
        return [
            ShardedTensor.from_rank_offsets(key, part, (0, index, 2), replica_id=(0, at.tensor, at.data))
            for index, part in enumerate(data.chunk(2))
        ]
    if not shared:
        return [ShardedTensor.from_rank_offsets(key, data, replica_id=(0, at.tensor, at.data))]
    axis, replica = int(key.endswith(ROWS)), (0, 0, at.data)
    if not key.endswith("linear_fc1.weight"):
        place = (axis, at.tensor, layout.tensor)
        return [ShardedTensor.from_rank_offsets(key, data, place, replica_id=replica)]
    return [
        ShardedTensor.from_rank_offsets(
            key, part, (0, at.tensor + index * layout.tensor, 2 * layout.tensor), replica_id=replica
        )
        for index, part in enumerate(data.chunk(2))
    ]


def rank_state(
    stage: tuple[params.Parameter, ...], frozen: tuple[str, ...], layout: Layout, at: Coordinates, first_layer: int,
    bucket: int | None, spread: bool = True,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    """(weights, boxes of the optimizer) of a rank."""
    from megatron_vlm.checkpoint import sharded

    entries = {each.name: weights(each, layout, at, first_layer) for each in stage}
    trained = [each for each in reversed(stage) if each.component not in frozen]
    boxes: list[Any] = []
    order = iter(trained)
    for start, end, places in params._buckets(stage, frozen, layout.data, bucket):
        size = (end - start) // layout.data
        low, high = start + at.data * size, start + (at.data + 1) * size
        for begin, stop in places:
            parameter = next(order)
            first, last = max(begin, low), min(stop, high)
            if first >= last:
                continue
            flat = torch.empty(last - first, device="meta")
            entry: Any = entries[parameter.name]
            data = entry[0].data
            base = data if data._base is None else data._base
            boxes += sharded._blocks(entry, base, first - begin, dict.fromkeys(KINDS, flat))
    whole = [tensor for each in entries.values() for tensor in each]
    if spread:
        sharded.spread(whole, layout.data)
    return whole, boxes


def ranks(layout: Layout, recipe: str) -> Iterator[tuple[list[Any], list[Any]]]:
    """`rank_state` of every rank, in order."""
    config = load.load(recipe)
    from megatron_vlm.config import presets

    arch = presets.architecture(config.model)
    stages = [chunks[0] for chunks in params.stages(arch, layout)]
    starts = [sum(stage.layers for stage in stages[:index]) for index in range(len(stages))]
    for rank in range(layout.world):
        at = layout.coordinates(rank)
        stage = params.of_stage(arch, stages[at.pipeline], layout.tensor)
        bucket = params.bucket_numbers(config.parallel, layout.data, layout.data, cuda=True)
        # Megatron makes one bucket of each later stage.
        yield rank_state(stage, config.model.freeze, layout, at, starts[at.pipeline], None if at.pipeline else bucket)


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """A result and seconds of the processor."""
    began = time.process_time()
    return run(), time.process_time() - began


def written(item: Any) -> int:
    """Bytes of an item of a plan."""
    return item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize


def measure(layout: Layout, recipe: str) -> dict[str, Any]:
    """Figures of a layout."""
    from megatron.core.dist_checkpointing import validation
    from megatron.core.dist_checkpointing.strategies import torch as torch_format
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.world)

    def converted(tensors: list[Any], saving: bool) -> dict[str, Any]:
        state = dict(enumerate(tensors))
        flat, _, _ = torch_format._replace_state_dict_keys_with_sharded_keys(state, saving)
        return torch_format.mcore_to_pyt_state_dict(flat, False)

    def plan(tensors: list[Any]) -> bytes:
        planner = torch_format.MCoreSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(converted(tensors, True), None, False)
        return pickle.dumps(planner.create_local_plan())

    plans, local_s, boxes, described, most_boxes, alone = [], [], 0, [], 0, 0
    first: list[Any] = []
    for number, (whole, parts) in enumerate(ranks(layout, recipe)):
        made, seconds = timed(lambda whole=whole, parts=parts: plan([*whole, *parts]))
        plans.append(made)
        local_s.append(seconds)
        boxes, most_boxes = boxes + len(parts), max(most_boxes, len(parts))
        described.append(pickle.dumps([tensor.without_data() for tensor in (*whole, *parts)]))
        if not number:
            first = [*whole, *parts]
        # What the first data-parallel rank would write without the others.
        weights_of = sum(each.data.nbytes for each in whole if not any(each.replica_id[:-1]))
        alone = max(alone, weights_of + sum(each.data.nbytes for each in parts if not any(each.replica_id)))
    received, unpack_s = timed(lambda: [pickle.loads(each) for each in plans])
    planner = torch_format.MCoreSavePlanner(flatten_state_dict=False)
    planner.set_up_planner({}, None, True)
    (answers, metadata), global_s = timed(lambda: planner.create_global_plan(received))
    metadata.storage_data = {
        item.index: _StorageInfo(f"__{rank}_0.distcp", place, 1)
        for rank, answer in enumerate(answers)
        for place, item in enumerate(answer.items)
    }
    text, dump_s = timed(lambda: pickle.dumps(metadata))
    again, read_s = timed(lambda: pickle.loads(text))
    everyone, check_unpack_s = timed(lambda: [pickle.loads(each) for each in described])
    _, check_s = timed(lambda: validation.validate_sharding_integrity(everyone))

    def load_plan() -> bytes:
        loader = torch_format.MCoreLoadPlanner(shapes_validation_sharded_tensors=first)
        loader.set_up_planner(converted(first, False), again, True)
        return pickle.dumps(loader.create_local_plan())

    loads, load_s = timed(load_plan)
    dist.destroy_process_group()
    return {
        "ranks": layout.world,
        "layout": f"TP {layout.tensor}, PP {layout.pipeline}, DP {layout.data}",
        "boxes": boxes,
        "boxes of a rank": most_boxes,
        "written items": sum(len(answer.items) for answer in answers),
        "most written by a rank MB": max(sum(map(written, answer.items)) for answer in answers) / 1e6,
        "if one rank wrote the weights MB": alone / 1e6,
        "metadata MB": len(text) / 1e6,
        "read metadata s": read_s,
        "plans MB": layout.world * max(map(len, plans)) / 1e6,
        "plan of a rank s": max(local_s),
        "plan of all s": unpack_s + global_s + dump_s,
        "first save's check MB": layout.world * max(map(len, described)) / 1e6,
        "first save's check s": check_unpack_s + check_s,
        "load plans MB": layout.world * len(loads) / 1e6,
        "load plan of a rank s": load_s,
    }


def main() -> None:
    parser = record.options(__doc__, rounds=1, threads=False)
    parser.add_argument("--recipe", default="examples/recipes/molmo2_8b/stage2.yaml")
    parser.add_argument("--worlds", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--layouts", nargs="+", default=["8x4", "4x1"], help="tensor x pipeline (default: %(default)s)")
    asked = parser.parse_args()
    cpu.enable("cpu")
    rows = []
    for each in asked.layouts:
        tensor, pipeline = map(int, each.split("x"))
        for world in asked.worlds:
            rows.append(measure(Layout(world, tensor=tensor, pipeline=pipeline), asked.recipe))
            print(rows[-1], flush=True)
    print(record.table(rows))
    if not asked.dry_run:
        most = max(rows, key=lambda row: row["metadata MB"])
        key = {name: round(most[name], 2) for name in ("metadata MB", "plan of all s", "load plan of a rank s")}
        figure = (
            f"{most['metadata MB']:.0f} MB, {most['read metadata s']:.1f} s to read; {most['plan of all s']:.1f} s; "
            f"{most['load plan of a rank s']:.1f} s"
        )
        what = f"{(__doc__ or '').strip()}\n\n{asked.recipe}, gradient buckets as on GPUs."
        compared = (
            f"checkpoint of Molmo2-8B on {most['ranks']} ranks ({most['layout']}): description; planning a save on "
            "rank 0; planning a load on a rank"
        )
        record.write("checkpoint_scale", what, {"rows": rows}, rows, key, [(compared, figure)])


if __name__ == "__main__":
    main()
