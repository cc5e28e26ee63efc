"""Writing a checkpoint of tensors that are made when their turn comes, and dropped after: one in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.strategies import torch as torch_format
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from megatron_vlm.checkpoint import save


class Lazy(save.Synchronous):
    """A save in which `make` gives the whole value of a tensor by its checkpoint name."""

    def __init__(self, make: Callable[[str], torch.Tensor], dtype: torch.dtype, progress: Callable[[int], None]):
        """dtype: of all tensors written. progress: told the bytes just written."""
        super().__init__()
        self._make, self._dtype, self._progress = make, dtype, progress

    def planner(self) -> torch_format.MCoreSavePlanner:
        """See _Planner."""
        return _Planner(self._make, self._dtype, self._progress)

    def writer(self, checkpoint_dir: str | Path) -> torch_checkpoint.FileSystemWriter:
        """See _Writer."""
        return _Writer(checkpoint_dir)


class _Writer(torch_checkpoint.FileSystemWriter):
    """torch's format in one file. torch's own writer keeps every tensor that it has written until the last one."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items one after the other."""
        name = f"{plan.storage_data.prefix}0.distcp"
        results = []
        # The whole file gets a hash afterwards.
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            with (Path(self.path) / name).open("wb") as stream:
                for item in plan.items:
                    start = stream.tell()
                    value = planner.resolve_data(item)
                    if isinstance(value, torch.Tensor):
                        torch.save(value, stream)
                    else:
                        stream.write(value.getbuffer())
                    size = stream.tell() - start
                    results.append(WriteResult(item.index, size, _StorageInfo(name, start, size)))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            torch.serialization.set_crc32_options(checksums)
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done


class _Planner(torch_format.MCoreSavePlanner):
    def __init__(self, make: Callable[[str], torch.Tensor], dtype: torch.dtype, progress: Callable[[int], None]):
        super().__init__(flatten_state_dict=False)
        self._make, self._dtype, self._progress = make, dtype, progress
        self._last: tuple[str, torch.Tensor] | None = None

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The values of one piece of a tensor (halves of a gated layer are written one by one)."""
        if write_item.type == WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        name, chunk = write_item.index.fqn, write_item.tensor_data.chunk
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._make(name)
        piece = self._last[1]
        for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            piece = piece.narrow(dim, start, size)
        self._progress(piece.numel() * self._dtype.itemsize)
        piece = piece.to(self._dtype)
        # A view would be saved with everything that it is a view of.
        return piece if piece.untyped_storage().nbytes() == piece.nbytes else piece.clone()
