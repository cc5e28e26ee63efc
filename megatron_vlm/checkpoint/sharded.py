"""The sharded state of model chunks and optimizer: what saving writes and loading fills, for any parallel layout.

Tensors carry their place in the whole model, so a checkpoint knows no layout. The optimizer's moments and float32
copies are stored in the shape of the parameters (Megatron's `fully_reshardable`).
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vlm.checkpoint.record import OPTIMIZER as OPTIMIZER
from megatron_vlm.parallel import groups

#: By model (`model0`, ...) the entries by name; `optimizer`.
State = dict[str, Any]


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
    """Sharded state of this rank: `model0`, `model1`, ... by virtual stage, and `optimizer` unless it is None.

    Collective over the data-parallel ranks. Data of the model's tensors are the parameters themselves, so loading fills
    them in place. A rank whose stage trains nothing carries the optimizer's common settings of one that does.
    """
    state = build_models(models)
    if optimizer is None:
        return state
    if trains(optimizer):
        begin_moments(optimizer)
        model_state = {name: state[name] for name in state}
        made = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata())
        for part in [made] if "param_state" in made else made.values():
            part["param_state"] = (
                part["param_state"] or {}
            )  # None on ranks that write none of it: a difference for nothing
        state["optimizer"] = made
    if not is_loading:
        share_common(state, OPTIMIZER.rstrip("."))
    return state


def build_models(models: Sequence[Any]) -> dict[str, Any]:
    """Sharded state of the models alone. No collectives."""
    return {
        f"model{index}": unwrap(model).sharded_state_dict(metadata=metadata()) for index, model in enumerate(models)
    }


def metadata() -> dict[str, Any]:
    """How Megatron is to make a sharded state."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        # The states pass over gloo through the first data-parallel rank; gathered on all they would fill the devices.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": groups.data_and_context(),
    }


def trains(optimizer: Any) -> bool:
    """Whether any parameter of this rank's stage trains, the same on all its data-parallel ranks."""
    if getattr(optimizer, "is_stub_optimizer", False):
        return False
    # Groups exist, empty, also on a stage that trains nothing; gradient buffers do not.
    return any(each.buffers for each in getattr(optimizer, "chained_optimizers", [optimizer]))


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


def fill_optimizer(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Put a loaded optimizer state into `optimizer`."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    parts = [loaded] if len(chained) == 1 else [loaded[index] for index in range(len(chained))]
    for each, part in zip(chained, parts, strict=True):
        parameters = part.pop("param_state")
        each.load_state_dict(part)
        # torch's Adam keeps the step beside each parameter's moments. Megatron 0.16.1 gives all of them one tensor,
        # which the next step would advance once per parameter, and its loader of moments does not expect it there.
        steps = [moments.pop("step", None) for moments in each.optimizer.state.values()]
        each.load_parameter_state_from_fully_reshardable(parameters)
        for moments, step in zip(each.optimizer.state.values(), steps, strict=True):
            if step is not None:
                moments["step"] = step.clone()


def begin_moments(optimizer: Any) -> None:
    """Give an optimizer that has not stepped the moments it would start with: Megatron can neither save nor load it
    without."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
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
