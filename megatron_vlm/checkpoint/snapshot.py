"""A copy in host memory of what training changes, from which a checkpoint is written while training goes on.

Copied are whole storages, not tensors: with float32 training the optimizer's weights are views of the model's, and
Megatron keeps a chunk's parameters in one buffer. Frozen parameters are not copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from megatron_vlm.checkpoint import sharded


class Snapshot:
    """One set of host copies. Their memory is kept for the next `take`: fresh memory costs as much as copying."""

    def __init__(self) -> None:
        self._copies: dict[tuple[torch.device, int, int], torch.Tensor] = {}
        self._state: dict[str, Any] = {}
        self._parts: list[Any] = []

    def take(self, models: Sequence[Any], optimizer: Any | None) -> None:
        """Copy what the models and the optimizer are now. `contents` then gives that state. Collective."""
        self._state = sharded.build_models(models)
        tensors = [entry.data for entry in _entries(self._state)]
        self._parts = _parts(optimizer) if optimizer is not None and sharded.trains(optimizer) else []
        if self._parts:
            sharded.begin_moments(optimizer)
            tensors += [tensor for part in self._parts for tensor in _tensors(part)]
            common = [
                part.state_dict() | {"param_state_sharding_type": "fully_reshardable", "param_state": {}}
                for part in self._parts
            ]
            self._state["optimizer"] = common[0] if len(common) == 1 else dict(enumerate(common))
        if optimizer is not None:
            sharded.share_common(self._state, "optimizer")
        self._copy([tensor for tensor in tensors if _changes(tensor)])

    def contents(self) -> dict[str, Any]:
        """The sharded state as it was at the last `take`, as `sharded.build` gives it; once for each `take`.

        Collective over groups that training does not use: the optimizer's parts of the data-parallel ranks come
        together over gloo.
        """
        taken, self._state = self._state, {}  # what is gathered here is not kept until the next save
        models = {name: state for name, state in taken.items() if name != "optimizer"}
        for index, part in enumerate(self._parts):
            optimizer = taken["optimizer"]
            common = optimizer if len(self._parts) == 1 else optimizer[index]
            # Megatron finds a parameter's place in the model by the live parameter, so the models' data stay until now.
            common["param_state"] = (
                self._still(part).sharded_param_state_fully_reshardable(models, False, sharded.metadata()) or {}
            )
        for entry in _entries(models):
            entry.data = self._of(entry.data)
        return taken

    def _copy(self, tensors: list[torch.Tensor]) -> None:
        copies: dict[tuple[torch.device, int, int], torch.Tensor] = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key = _key(tensor)
            if key in copies:
                continue
            target = self._copies.get(key)
            if target is None:
                target = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=tensor.is_cuda)
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            copies[key] = target.copy_(source, non_blocking=True)
        self._copies = copies
        torch.cuda.synchronize()

    def _of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor; the tensor itself where it does not change."""
        copied = self._copies.get(_key(tensor))
        if copied is None:
            return tensor
        like = torch.empty(0, dtype=tensor.dtype)
        return like.set_(copied.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())

    def _still(self, part: Any) -> Any:
        """Megatron's optimizer over the copies."""
        inner = part.optimizer
        groups, state = [], {}
        for group in inner.param_groups:
            copies = [self._of(parameter) for parameter in group["params"]]
            groups.append({"params": copies})
            for parameter, copied in zip(group["params"], copies, strict=True):
                state[copied] = {
                    name: self._of(value) if torch.is_tensor(value) else value
                    for name, value in inner.state[parameter].items()
                }
        still = copy.copy(part)
        still.optimizer = SimpleNamespace(param_groups=groups, state=state)
        return still


def _parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers: several where groups of parameters have other data-parallel ranks."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _entries(state: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.data is not None:
            yield value


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    """The parameters that an optimizer holds, and their moments."""
    for group in part.optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            yield from (value for value in part.optimizer.state[parameter].values() if torch.is_tensor(value))


def _changes(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad


def _key(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()
