"""The sharded state of model chunks and optimizer: what saving writes and loading fills, for any parallel layout.

Tensors carry their place in the whole model, so a checkpoint knows no layout. The optimizer's moments and float32
copies have the shape of the parameters, and every rank writes and reads its own part of them alone: the distributed
optimizer's run of a flattened parameter is a few boxes of it. (Megatron's `fully_reshardable` puts the same tensors
into a checkpoint, but gathers a replica's on one rank to save and gives all of them to every rank to load; its
`dp_reshardable` gathers nothing, but only the same tensor and pipeline degrees, and the same buckets, can load it.)
"""

from __future__ import annotations

import heapq
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vlm.checkpoint.record import OPTIMIZER as OPTIMIZER
from megatron_vlm.model import scaling
from megatron_vlm.parallel import groups

#: By model (`model0`, ...) the entries by name; SCALES; `optimizer`.
State = dict[str, Any]
#: Of the run and not of the model, so beside the optimizer's: an export, or another run's start, passes them over.
SCALES, SCALES_KEYS = "scales", f"{OPTIMIZER}fp8."


@contextmanager
def plain_errors(what: str, advice: str, kind: type[Exception]) -> Iterator[None]:
    """Around Megatron's save or load: what it raises becomes `kind` with the first rank's reason in a sentence.

    torch wraps the errors of all ranks in an exception that `except Exception` does not catch.
    """
    try:
        with warnings.catch_warnings():
            # Megatron 0.16.1 calls functions that torch will rename; nobody who trains can act on that.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    except torch.distributed.checkpoint.CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise kind(f"{what} failed on rank {rank}: {_reason(reason)} {advice}") from error
    except pickle.UnpicklingError as error:
        raise kind(f"{what} failed: {_reason(error)} {advice}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it holds an object that is more than tensors and plain values, and loading that could run code."
    return f"{type(error).__name__}: {error}."


def unwrap(model: Any) -> torch.nn.Module:
    """The model inside data-parallel wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model


def build(models: Sequence[Any], optimizer: Any | None, *, is_loading: bool) -> dict[str, Any]:
    """Sharded state of this rank: what `build_models` gives, and `optimizer` unless it is None.

    Collective unless `is_loading`. Data are the parameters themselves and views of the optimizer's tensors, so loading
    fills them in place. A rank whose stage trains nothing carries the optimizer's common settings of one that does.
    """
    state = build_models(models)
    if not is_loading:
        for trains_itself in (True, False):  # frozen weights are not written every time
            spread(
                [each for each in _entries(state) if each.data.requires_grad == trains_itself],
                groups.data_and_context().size(),
            )
    if optimizer is None:
        return state
    if trains(optimizer):
        begin_moments(optimizer)
        state["optimizer"] = _build_optimizer(optimizer, state)
    if not is_loading:
        share_common(state, OPTIMIZER.rstrip("."))
    return state


def spread(entries: Iterable[Any], ranks: int) -> None:
    """Let every data-parallel rank (context-parallel ones among them) write some of the weights, which all of `ranks`
    hold. Otherwise the first one writes all of them, and of 256 ranks 255 wait for it.

    entries: of one rank. The largest goes first, to the rank that has least: all ranks come to the same.
    """
    held = [(0, rank) for rank in range(ranks)]
    for entry in sorted(entries, key=lambda entry: (-entry.data.nbytes, entry.key)):
        *others, place = entry.replica_id
        if any(others):
            continue  # that is for other tensor-parallel ranks, or another stage, to write
        size, owner = heapq.heappop(held)
        heapq.heappush(held, (size + entry.data.nbytes, owner))
        entry.replica_id = (*others, (place - owner) % ranks)


def build_models(models: Sequence[Any]) -> dict[str, Any]:
    """Sharded state of the models alone, under `SCALES` what delayed FP8 has seen. No collectives."""
    state = {
        f"model{index}": unwrap(model).sharded_state_dict(metadata=metadata()) for index, model in enumerate(models)
    }
    # Every rank of a stage has the same; the first one writes.
    replica = (groups.tensor().rank(), 0, groups.data_and_context().rank())
    scales = {
        name: ShardedTensor.from_rank_offsets(SCALES_KEYS + name, tensor, replica_id=replica)
        for name, tensor in scaling.delayed(models)
    }
    return {**state, SCALES: scales} if scales else state


def metadata() -> dict[str, Any]:
    """How Megatron is to make a sharded state."""
    return {"singleton_local_shards": False, "dp_cp_group": groups.data_and_context()}


def _build_optimizer(optimizer: Any, models: State) -> dict[Any, Any]:
    """The sharded state of an optimizer that has moments; `models`: of what it trains.

    What is not sharded is as Megatron has it, for one optimizer or by number for several.
    """
    entries = {entry.data: entry for entry in _entries(models)}
    made = [
        part.state_dict()
        | {
            "param_state": dict(
                enumerate(
                    block
                    for parameter, start, values in _owned(part)
                    for block in _blocks(entries[parameter], parameter, start, values)
                )
            )
        }
        for part in parts(optimizer)
    ]
    return made[0] if len(made) == 1 else dict(enumerate(made))


def _entries(models: State) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    """The tensors of the models' sharded state, as it was made."""
    for value in models.values():
        yield from (entry for entry in value.values() if isinstance(entry, ShardedTensor | ShardedTensorFactory))


def _owned(part: Any) -> Iterator[tuple[torch.nn.Parameter, int, dict[str, torch.Tensor]]]:
    """The parameters of which this rank has a run of numbers to optimize: where it starts in the flattened parameter,
    and its float32 numbers and moments by name, each flat."""
    for buffers in part.gbuf_ranges:
        for buckets in buffers.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    group, place = part.model_param_group_index_map[parameter]
                    main = part.optimizer.param_groups[group]["params"][place]
                    moments = {name: value for name, value in part.optimizer.state[main].items() if name != "step"}
                    yield parameter, ranges["param"].start, {"param": main.detach(), **moments}


def _blocks(
    entry: ShardedTensor | ShardedTensorFactory,
    parameter: torch.nn.Parameter,
    start: int,
    values: dict[str, torch.Tensor],
) -> Iterator[ShardedTensor]:
    """A run of numbers from `start` of a flattened parameter as boxes of the whole model's tensor."""
    end = start + len(values["param"])
    for shard in tensors([entry]):
        assert shard.data is not None and shard.data.is_contiguous()
        shape = (*[1] * shard.prepend_axis_num, *shard.data.shape)
        first = shard.data.storage_offset() - parameter.storage_offset()  # a factory makes several of a parameter
        low, high = max(start, first), min(end, first + shard.data.numel())
        at = low - start
        for offsets, sizes in boxes(shape, low - first, high - first):
            count = math.prod(sizes)
            for name, flat in values.items():
                yield ShardedTensor(
                    key=f"{OPTIMIZER}state.{name}.{shard.key}",
                    data=flat[at : at + count].view(sizes),
                    dtype=flat.dtype,
                    local_shape=sizes,
                    global_shape=shard.global_shape,
                    global_offset=tuple(map(sum, zip(shard.global_offset, offsets, strict=True))),
                    axis_fragmentations=None,
                    # Data-parallel ranks hold different numbers; other copies of the parameter are copies here too.
                    replica_id=(*shard.replica_id[:-1], 0),
                )
            at += count


def boxes(shape: tuple[int, ...], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of boxes that are, one after the other, the numbers `start` to `end` of a flattened array."""
    inside = math.prod(shape[1:])
    while start < end:
        row, column = divmod(start, inside)
        rows = (end - start) // inside
        if column == 0 and rows:
            yield (row, *[0] * (len(shape) - 1)), (rows, *shape[1:])
            start += rows * inside
            continue
        stop = min(end, (row + 1) * inside)
        for offsets, sizes in boxes(shape[1:], column, stop - row * inside):
            yield (row, *offsets), (1, *sizes)
        start = stop


def parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers: several where groups of parameters have other data-parallel ranks."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def trains(optimizer: Any) -> bool:
    """Whether any parameter of this rank's stage trains, the same on all its data-parallel ranks."""
    if getattr(optimizer, "is_stub_optimizer", False):
        return False
    # Groups exist, empty, also on a stage that trains nothing; gradient buffers do not.
    return any(each.buffers for each in parts(optimizer))


def tensors(state: Any) -> Iterator[ShardedTensor]:
    """All sharded tensors in a sharded state, those that factories make included."""
    for value in nested_values(state):
        if isinstance(value, ShardedTensorFactory):
            yield from tensors(value.build())
        elif isinstance(value, ShardedTensor):
            yield value


def divide(contents: State, inside: Callable[[Any], bool]) -> tuple[State, State]:
    """A sharded state as (entries of the models for which `inside` is true, all else, the optimizer included)."""
    parts: tuple[State, State] = {}, {}
    for name, value in contents.items():
        if name == OPTIMIZER.rstrip("."):
            parts[1][name] = value
            continue
        for key, entry in value.items():
            parts[0 if inside(entry) else 1].setdefault(name, {})[key] = entry
    return parts


def fill_optimizer(optimizer: Any, loaded: dict[Any, Any], own: list[torch.Tensor]) -> None:
    """Put a loaded optimizer state into `optimizer`. own: the tensors of its sharded state before that was loaded."""
    chained = parts(optimizer)
    states = [loaded] if len(chained) == 1 else [loaded[index] for index in range(len(chained))]
    found = [value for state in states for value in state.pop("param_state").values()]
    for mine, value in zip(own, found, strict=True):
        if mine.data_ptr() != value.data_ptr():
            mine.copy_(value)
    for each, state in zip(chained, states, strict=True):
        each.load_state_dict(state)
        # torch's Adam keeps the step beside each parameter's moments; Megatron 0.16.1 gives all of them one tensor,
        # which the next step would advance once per parameter.
        for moments in each.optimizer.state.values():
            if "step" in moments:
                moments["step"] = moments["step"].clone()


def begin_moments(optimizer: Any) -> None:
    """Give an optimizer that has not stepped the moments it would start with: Megatron can neither save nor load it
    without."""
    for each in parts(optimizer):
        if not trains(each) or each.optimizer.state:
            continue
        each.init_state_fn(each.optimizer, each.config)
        if isinstance(each.optimizer, torch.optim.Adam | torch.optim.AdamW):
            for moments in each.optimizer.state.values():
                moments.setdefault("step", torch.zeros(()))


def share_common(state: dict[str, Any], key: str) -> None:
    """What is not sharded is the same everywhere: a stage that trains nothing takes it from a rank that trains."""
    flags: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(flags, key in state)
    if all(flags) or not any(flags):
        return
    source = flags.index(True)
    mine = [_unsharded(state[key]) if key in state else None]
    dist.broadcast_object_list(mine, src=source)
    if key not in state:
        state[key] = mine[0]


def _unsharded(state: Any) -> Any:
    """The part of an optimizer's state that is the same on all ranks."""
    if isinstance(state, dict):
        return {name: _unsharded(value) for name, value in state.items() if name != "param_state"}
    return state
