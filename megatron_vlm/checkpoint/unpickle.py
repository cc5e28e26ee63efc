"""Pickles in a checkpoint from a stranger: an allow-list, and weights_only for everything that torch loads.

A torch_dist checkpoint holds pickles in three places: `.metadata`, which torch reads with plain pickle; `common.pt`;
and objects inside the data files, which torch loads with weights_only=False. The first passes the allow-list below
before torch sees it; for the other two `only_weights` forces weights_only=True whatever the caller asked for.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torch.distributed.checkpoint.metadata import Metadata

from megatron_vlm.checkpoint.verify import files, folders

_FORCE, _FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
_METADATA = "torch.distributed.checkpoint.metadata"
#: Everything that the metadata of a checkpoint is made of: data classes and enumerations without behaviour.
ALLOWED = frozenset(
    [
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ("torch.distributed.checkpoint.planner", "SavePlan"),
        ("torch.distributed.checkpoint.planner", "TensorWriteData"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.distributed.checkpoint.planner", "WriteItemType"),
        (_METADATA, "BytesStorageMetadata"),
        (_METADATA, "ChunkStorageMetadata"),
        (_METADATA, "Metadata"),
        (_METADATA, "MetadataIndex"),
        (_METADATA, "StorageMeta"),
        (_METADATA, "TensorProperties"),
        (_METADATA, "TensorStorageMetadata"),
        (_METADATA, "_MEM_FORMAT_ENCODING"),
        *(("torch", name) for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")),
        *(("torch", name) for name in ("int64", "int32", "int16", "int8", "uint8", "bool")),
    ]
)


class _AllowList(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise ValueError(
                f"{self._path} asks for {module}.{name}, which the metadata of a checkpoint never needs; loading it "
                "could run code of whoever made the file. Do not use this checkpoint."
            )
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise ValueError(f"{self._path} refers to objects outside the file. Do not use this checkpoint.")


def read_metadata(directory: Path, inside: Collection[str]) -> Metadata:
    """The metadata of a checkpoint, read by allow-list, its storage in the files `inside` (names in the directory).

    Raises ValueError for anything else.
    """
    path = directory / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _AllowList(stream, path).load()
    except FileNotFoundError:
        raise ValueError(
            f"{directory} is not a complete checkpoint: it has no .metadata. Use another checkpoint."
        ) from None
    except ValueError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise ValueError(f"{path} is damaged: {error!r}. Use another checkpoint.") from error
    if not isinstance(metadata, Metadata):
        raise ValueError(f"{path} holds a {type(metadata).__name__}, not the metadata of a checkpoint.")
    for place in (metadata.storage_data or {}).values():
        if place.relative_path not in inside:
            raise ValueError(
                f"{path} points to {place.relative_path!r}, which is not a file of the checkpoint. Do not use this "
                "checkpoint."
            )
    return metadata


def read_folders(directory: Path) -> list[tuple[Path, Metadata]]:
    """The folders with the tensors of a checkpoint (itself; the part with its frozen weights) and their metadata.

    Raises ValueError as `read_metadata`, and where a folder is missing or a tensor stands in both.
    """
    found = [(path, read_metadata(path, files(path))) for path in folders(directory)]
    for _, one in found[1:]:
        for name in one.state_dict_metadata:
            if name in found[0][1].state_dict_metadata:
                raise ValueError(f"{directory} holds {name}, and so does its frozen part. Do not use this checkpoint.")
    return found


@contextmanager
def only_weights() -> Iterator[None]:
    """Inside, every torch.load of this process refuses pickles that are more than tensors and plain values."""
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_FORCE)
        os.environ.update({name: value for name, value in before.items() if value is not None})
