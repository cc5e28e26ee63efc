"""A copy in host memory of what training changes, from which a checkpoint is written while training goes on.

Copied are whole storages, not tensors: with float32 training the optimizer's weights are views of the model's, and
Megatron keeps a chunk's parameters in one buffer. Frozen parameters are not copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    def take(self, models: Sequence[Any], optimizer: Any | None) -> None:
        """Copy what the models and the optimizer are now. `contents` then gives that state. Collective."""
        self._state = sharded.build(models, optimizer, is_loading=False)
        self._copy([entry.data for entry in _entries(self._state) if _changes(entry.data)])

    def contents(self) -> dict[str, Any]:
        """The sharded state as it was at the last `take`, as `sharded.build` gives it; once for each `take`."""
        taken, self._state = self._state, {}
        for entry in _entries(taken):
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


def _entries(state: Any) -> Iterator[ShardedTensor | ShardedTensorFactory]:
    for value in nested_values(state):
        if isinstance(value, ShardedTensor | ShardedTensorFactory) and value.data is not None:
            yield value


def _changes(tensor: torch.Tensor) -> bool:
    return not isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad


def _key(tensor: torch.Tensor) -> tuple[torch.device, int, int]:
    storage = tensor.untyped_storage()
    return tensor.device, storage.data_ptr(), storage.nbytes()
