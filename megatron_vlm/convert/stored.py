"""A checkpoint of the trainer as whole tensors, one at a time, whatever layout saved it. Needs no process group."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_vlm.checkpoint import record, unpickle, verify
from megatron_vlm.config.architecture import (
    Architecture,
    ConnectorArchitecture,
    LanguageArchitecture,
    VisionArchitecture,
)
from megatron_vlm.convert.entries import Shape


class Checkpoint:
    """The weights of a checkpoint, of the newest in a folder or of a run's newest. Optimizer state is left out.

    Raises ValueError for damage, and where there is none.
    verify_first: compare all files with the manifest by hash, which takes as long as reading them twice. False = the
    caller does so before anybody relies on what was read; reading runs no code either way.
    """

    def __init__(self, directory: str | Path, *, verify_first: bool = True) -> None:
        self.record = record.read(directory)
        self.path = self.record.path
        if verify_first:
            verify.verify(self.path)
        self.arch = architecture(self.record.architecture)
        self.shapes: dict[str, Shape] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[Path, Metadata]] = {}
        for path, metadata in unpickle.read_folders(self.path):
            for key, entry in metadata.state_dict_metadata.items():
                if isinstance(entry, TensorStorageMetadata) and not key.startswith(record.OPTIMIZER):
                    self.shapes[key], self.dtypes[key] = tuple(entry.size), entry.properties.dtype
                    self._places[key] = path, metadata

    def read(self, key: str) -> torch.Tensor:
        """One whole tensor, put together from the pieces that the ranks wrote."""
        whole: torch.Tensor | None = None
        _, metadata = self._places[key]
        chunks = metadata.state_dict_metadata[key].chunks
        if sum(chunk.sizes.numel() for chunk in chunks) != torch.Size(self.shapes[key]).numel():
            raise ValueError(f"{self.path}: the pieces of {key} do not make up {list(self.shapes[key])}.")
        for chunk in chunks:
            piece = self._piece(key, chunk.offsets)
            if piece.shape != chunk.sizes or piece.dtype != self.dtypes[key]:
                raise ValueError(
                    f"{self.path}: {key} at {tuple(chunk.offsets)} is {piece.dtype} {list(piece.shape)}, the metadata "
                    f"says {self.dtypes[key]} {list(chunk.sizes)}. Do not use this checkpoint."
                )
            if tuple(chunk.sizes) == self.shapes[key]:
                return piece
            if whole is None:
                whole = torch.empty(self.shapes[key], dtype=self.dtypes[key])
            place = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = piece
        assert whole is not None, f"{key} has no pieces"
        return whole

    def _piece(self, key: str, offset: torch.Size) -> torch.Tensor:
        path, metadata = self._places[key]
        info = metadata.storage_data[MetadataIndex(key, offset)]
        with (path / info.relative_path).open("rb") as stream:
            return torch.load(_create_file_view(stream, info.offset, info.length), "cpu", weights_only=True)


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
