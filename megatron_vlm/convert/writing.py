"""A checkpoint of whole tensors, written in one process without Megatron and its seconds of start-up.

It is what Megatron's torch_dist strategy writes: torch's distributed checkpoint, `common.pt` for what is no tensor
(nothing here) and `metadata.json`. Tests compare it with one that Megatron wrote, and load it at several layouts.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.checkpoint import verify
from megatron_vlm.config.schema import CheckpointConfig
from megatron_vlm.convert.hf import WORKERS, Planned, sync

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

#: What Megatron's CheckpointingConfig says of the format.
BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
#: Bytes in a data file, but for a larger tensor: several are written at once.
FILE_BYTES = 256_000_000
STEP = 0
#: File, first byte, bytes.
Place = tuple[str, int, int]


def write(
    directory: str | Path,
    tensors: Sequence[Planned],
    documents: Mapping[str, str],
    *,
    progress: Callable[[int], None] = lambda bytes: None,
) -> Path:
    """Write `directory`/iter_0000000 with `documents` by file name, make it the latest, give its path.

    Under another name first; every byte is read back and hashed, then the checkpoint gets its name. Raises RuntimeError
    where writing fails; nothing of it is left.
    """
    directory = Path(directory)
    try:
        writing = names.begin(directory, STEP)
        places, digests = _write_files(writing, list(_files(tensors)), progress)
        small = {name: text.encode("utf-8") for name, text in documents.items()} | {
            "metadata.json": json.dumps(BACKEND).encode(),
            ".metadata": pickle.dumps(_metadata(tensors, places)),
        }
        for name, data in small.items():
            (writing / name).write_bytes(data)
        torch.save({}, writing / "common.pt")
        for name in ("common.pt", *small):
            sync(writing / name)
            digests[name] = verify.digest(writing / name)
        verify.write_manifest(writing, digests, STEP)
        sync(writing / verify.MANIFEST)
        return names.publish(directory, STEP, CheckpointConfig(keep=0))
    except OSError as error:
        raise RuntimeError(f"writing checkpoint {directory} failed: {error}. Is the disk full?") from error
    finally:
        shutil.rmtree(names.writing_path(directory, STEP), ignore_errors=True)


def _write_files(
    writing: Path, files: Sequence[list[Planned]], progress: Callable[[int], None]
) -> tuple[list[Place], dict[str, dict[str, Any]]]:
    """Write the data files, two at a time, each read back; where every tensor lies, and the digests by file name."""
    paths = [writing / f"__0_{number}.distcp" for number in range(len(files))]
    places: list[Place] = []
    digests: dict[str, dict[str, Any]] = {}
    # Every file gets a hash. torch keeps this setting for each thread.
    with ThreadPoolExecutor(WORKERS, initializer=torch.serialization.set_crc32_options, initargs=(False,)) as workers:
        # It imports half of torch, which takes as long as writing a gigabyte: beside the writing.
        imported = workers.submit(import_module, "torch.distributed.checkpoint.filesystem")
        written = workers.map(_write_file, paths, files)
        for path, tensors, (found, digest) in zip(paths, files, written, strict=True):
            sync(path)  # this thread has nothing else to do than to wait for the disk
            progress(sum(each.bytes for each in tensors))
            places += found
            digests[path.name] = digest
        imported.result()
    return places, digests


def _metadata(tensors: Sequence[Planned], places: Sequence[Place]) -> Metadata:
    """What torch keeps in `.metadata`. Every tensor is one piece."""
    from torch.distributed.checkpoint import filesystem, metadata

    described: dict[str, metadata.STORAGE_TYPES] = {}
    storage: dict[metadata.MetadataIndex, filesystem._StorageInfo] = {}
    for each, (name, start, length) in zip(tensors, places, strict=True):
        origin, size = torch.Size([0] * len(each.shape)), torch.Size(each.shape)
        pieces = [metadata.ChunkStorageMetadata(origin, size)]
        described[each.key] = metadata.TensorStorageMetadata(metadata.TensorProperties(each.dtype), size, pieces)
        storage[metadata.MetadataIndex(each.key, origin)] = filesystem._StorageInfo(name, start, length)
    return metadata.Metadata(
        described,
        storage_data=storage,
        storage_meta=metadata.StorageMeta(),
        version=filesystem.CURRENT_DCP_VERSION,
    )


def _files(tensors: Sequence[Planned]) -> Iterator[list[Planned]]:
    group: list[Planned] = []
    for each in tensors:
        if group and sum(other.bytes for other in group) + each.bytes > FILE_BYTES:
            yield group
            group = []
        group.append(each)
    yield group


def _write_file(path: Path, tensors: Sequence[Planned]) -> tuple[list[Place], dict[str, Any]]:
    """Write one data file, and read it back; where each tensor lies, and the file's digest."""
    places = []
    with path.open("wb") as stream:
        for each in tensors:
            start = stream.tell()
            value = each.made(path)
            # A view would be saved with everything that it is a view of.
            torch.save(value if value.untyped_storage().nbytes() == value.nbytes else value.clone(), stream)
            places.append((path.name, start, stream.tell() - start))
    return places, verify.digest(path)
