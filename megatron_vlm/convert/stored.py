"""A checkpoint of the trainer as whole tensors, one at a time, whatever layout saved it. Needs no process group."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_vlm.checkpoint import load, sharded, unpickle, verify
from megatron_vlm.config.architecture import (
    Architecture,
    ConnectorArchitecture,
    LanguageArchitecture,
    VisionArchitecture,
)
from megatron_vlm.convert.entries import Shape


class _Reader(torch_checkpoint.FileSystemReader):
    """torch's reader, with metadata that has passed the allow-list."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self._checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._checked


class Checkpoint:
    """The weights of a checkpoint, of the newest in a folder or of a run's newest. Optimizer state is left out.

    Files are verified by hash first. Raises ValueError for damage, and where there is none.
    """

    def __init__(self, directory: str | Path) -> None:
        self.record = load.read(directory)
        self.path = self.record.path
        verify.verify(self.path)
        metadata = unpickle.read_metadata(self.path, verify.files(self.path))
        self.arch = architecture(self.record.architecture)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, entry in metadata.state_dict_metadata.items():
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(sharded.OPTIMIZER):
                self.shapes[key], self.dtypes[key] = tuple(entry.size), entry.properties.dtype
        self._reader = _Reader(self.path, metadata)

    def read(self, key: str) -> torch.Tensor:
        """One whole tensor."""
        tensor = torch.empty(self.shapes[key], dtype=self.dtypes[key])
        with unpickle.only_weights(), warnings.catch_warnings():
            # That there is no process group, which is what was asked for.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            torch_checkpoint.load({key: tensor}, storage_reader=self._reader, no_dist=True)
        return tensor


def architecture(fields: dict[str, Any]) -> Architecture:
    """The architecture that a checkpoint records as JSON. ValueError where a field is missing or unknown."""
    try:
        parts = {
            "vision": _part(VisionArchitecture, fields["vision"]),
            "connector": _part(ConnectorArchitecture, fields["connector"]),
            "language": _part(LanguageArchitecture, fields["language"]),
        }
        return Architecture(**{**fields, **parts})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the checkpoint's architecture.json is of another version of this program: {error}."
        ) from None


def _part(kind: Any, fields: dict[str, Any]) -> Any:
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = set(fields) - known
    if unknown:
        raise TypeError(f"unknown {', '.join(sorted(unknown))}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})
