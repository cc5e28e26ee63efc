"""Folders of safetensors files, as Hugging Face lays them out: read tensor by tensor, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vlm.convert.entries import Shape

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
#: Formats that are pickles: loading one can run code.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
#: Longest header of a file; the format's own limit.
MOST_HEADER = 100_000_000
#: Bytes in a file by default.
SHARD_BYTES = 5_000_000_000
#: Threads that make and write tensors, with one tensor each in memory.
WORKERS = 2
#: Bytes that are sent to the disk together, beside the writing; bytes that are read back and compared at once.
SYNC_BYTES, CHECK_BYTES = 256_000_000, 1 << 20


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: str
    dtype: str
    shape: Shape
    start: int
    """Its first byte in the file."""
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start


class Weights:
    """The tensors of a folder (one file, or several with an index), checked before any is read.

    Raises ValueError, which names file and tensor, for pickles, links out of the folder, headers that do not describe
    the file exactly, and an index that disagrees with its files.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise ValueError(f"{self.directory} is not a directory with a model. Check the path.")
        self.files = self._files()
        self.tensors: dict[str, Stored] = {}
        for name in self.files:
            for key, stored in header(self.directory / name).items():
                if key in self.tensors:
                    raise ValueError(
                        f"{self.directory}: tensor {key} is in {self.tensors[key].file} and again in {name}. "
                        "Fetch the model again."
                    )
                self.tensors[key] = stored
        self._check_index()

    def _files(self) -> list[str]:
        if (self.directory / INDEX).is_file():
            files = sorted(set(self._weight_map().values()))
            for name in files:
                if Path(name).name != name or name in (".", ".."):
                    raise ValueError(f"{self.directory / INDEX} names {name!r}, which is not a file of the folder.")
            return files
        found = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if not found:
            pickles = sorted(path.name for path in self.directory.iterdir() if path.suffix in PICKLES)
            reason = (
                f"only {pickles[0]}; loading a pickle could run code of whoever made it. Fetch or make the safetensors "
                "version."
                if pickles
                else "nothing. Check the path, or that the download finished."
            )
            raise ValueError(f"{self.directory} has no *.safetensors file: {reason}")
        if len(found) > 1:
            raise ValueError(
                f"{self.directory} has {len(found)} safetensors files but no {INDEX}, so which of them belong to the "
                "model is unknown. Fetch the index too."
            )
        return found

    def _weight_map(self) -> dict[str, str]:
        weight_map = read_json(self.directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{self.directory / INDEX} has no weight_map from tensors to files. Fetch it again.")
        return weight_map

    def _check_index(self) -> None:
        if not (self.directory / INDEX).is_file():
            return
        weight_map = self._weight_map()
        for key, name in weight_map.items():
            if key not in self.tensors or self.tensors[key].file != name:
                where = f"it is in {self.tensors[key].file}" if key in self.tensors else "no file has it"
                raise ValueError(f"{self.directory / INDEX} says that {key} is in {name}, but {where}.")
        for key, stored in self.tensors.items():
            if key not in weight_map:
                raise ValueError(f"{self.directory / stored.file} holds {key}, which {INDEX} does not name.")

    def read(self, key: str) -> torch.Tensor:
        """One tensor, in memory of its own."""
        stored = self.tensors[key]
        path = self.directory / stored.file
        tensor = torch.empty(stored.shape, dtype=DTYPES[stored.dtype])
        if tensor.numel():
            with path.open("rb") as stream:
                stream.seek(stored.start)
                read = stream.readinto(bytes_of(tensor))
            if read != stored.bytes:
                raise ValueError(f"{path}: tensor {key} has {stored.bytes} bytes, but only {read} could be read.")
        return tensor


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def header(path: Path) -> dict[str, Stored]:
    """What a safetensors file says that it holds, checked against its size. ValueError names file and tensor."""
    if not path.is_file():
        raise ValueError(f"{path} is missing. Fetch the model again.")
    size = path.stat().st_size
    with path.open("rb") as stream:
        begin = stream.read(8)
        length = int.from_bytes(begin, "little")
        if len(begin) < 8 or length > min(MOST_HEADER, size - 8):
            raise ValueError(f"{path} is not a safetensors file or is cut: it says that its header has {length} bytes, "
                             f"the file has {size}. Fetch it again.")  # fmt: skip
        text = stream.read(length)
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: its header is damaged: {error}. Fetch it again.") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: its header is a {type(fields).__name__}. Fetch it again.")
    fields.pop("__metadata__", None)
    found = {key: _stored(path, key, field, 8 + length) for key, field in fields.items()}
    at = 8 + length
    for key, stored in sorted(found.items(), key=lambda item: (item[1].start, item[1].stop)):
        if stored.start != at:
            raise ValueError(
                f"{path}: tensor {key} begins at byte {stored.start}, but the one before it ends at {at}. "
                "Do not use this file."
            )
        at = stored.stop
    if at != size:
        raise ValueError(
            f"{path} is cut or has something behind its tensors: they end at byte {at}, the file has {size}. "
            "Fetch it again."
        )
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands in it twice")
    return fields


def _stored(path: Path, key: str, field: Any, base: int) -> Stored:
    try:
        dtype, shape, (start, stop) = field["dtype"], tuple(field["shape"]), field["data_offsets"]
        numbers = [*shape, start, stop]
        assert isinstance(dtype, str) and all(type(number) is int and number >= 0 for number in numbers)
    except (KeyError, TypeError, ValueError, AssertionError):
        raise ValueError(f"{path}: the header's entry of {key} is damaged. Fetch the file again.") from None
    stored = Stored(path.name, dtype, shape, base + start, base + stop)
    if dtype in DTYPES:
        needed = DTYPES[dtype].itemsize
        for number in shape:
            needed *= number
        if stored.bytes != needed:
            raise ValueError(
                f"{path}: tensor {key} is {dtype} {list(shape)}, which takes {needed} bytes, but has {stored.bytes}. "
                "Do not use this file."
            )
    return stored


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. ValueError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: the folder is not a whole model. Fetch it again.") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}. Fetch it again.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object.")
    return value


@dataclass(frozen=True)
class Planned:
    """A tensor to be written. `make` is called in a thread when its turn comes; what it gives is dropped after."""

    key: str
    dtype: torch.dtype
    shape: Shape
    make: Callable[[], torch.Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def made(self, path: Path) -> torch.Tensor:
        """The tensor, contiguous, for the file `path`. RuntimeError where it is not what was planned."""
        tensor = self.make()
        if tensor.dtype != self.dtype or tuple(tensor.shape) != self.shape:
            raise RuntimeError(
                f"{path}: tensor {self.key} became {tensor.dtype} {list(tensor.shape)}; planned {self.dtype} "
                f"{list(self.shape)}."
            )
        return tensor.contiguous()


def write(
    directory: str | Path,
    tensors: Iterable[Planned],
    documents: Mapping[str, str],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] = lambda bytes: None,
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Write a folder: `tensors` in files of at most `shard_bytes`, and `documents` by file name.

    Under another name first; every byte is read back and compared, then, after `ready` has returned, the folder gets
    its name. Raises ValueError where the folder exists, RuntimeError where writing fails; nothing is left.
    """
    directory = Path(directory)
    if directory.exists():
        raise ValueError(f"{directory} exists. Give a directory that does not, or remove this one.")
    directory.parent.mkdir(parents=True, exist_ok=True)
    writing = directory.with_name(f".writing-{directory.name}-{uuid.uuid4().hex[:8]}")
    writing.mkdir()
    try:
        _write_tensors(writing, list(tensors), shard_bytes, progress)
        for name, text in documents.items():
            _write_text(writing / name, text)
        ready()
        os.rename(writing, directory)
    except OSError as error:
        raise RuntimeError(f"writing {directory} failed: {error}. Is the disk full?") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _write_text(path: Path, text: str) -> None:
    data = text.encode("utf-8")
    path.write_bytes(data)
    if path.read_bytes() != data:
        raise _unsound(path)


def _write_tensors(writing: Path, tensors: list[Planned], shard_bytes: int, progress: Callable[[int], None]) -> None:
    shards: list[list[Planned]] = [[]]
    for planned in tensors:
        if shards[-1] and sum(each.bytes for each in shards[-1]) + planned.bytes > shard_bytes:
            shards.append([])
        shards[-1].append(planned)
    count = len(shards)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    names = names if count > 1 else [SINGLE]
    for name, shard in zip(names, shards, strict=True):
        _write_file(writing / name, shard, progress)
    if count > 1:
        weight_map = {each.key: name for name, shard in zip(names, shards, strict=True) for each in shard}
        index = {"metadata": {"total_size": sum(each.bytes for each in tensors)}, "weight_map": weight_map}
        _write_text(writing / INDEX, json.dumps(index, indent=2) + "\n")


def _write_file(path: Path, tensors: list[Planned], progress: Callable[[int], None]) -> None:
    """Write one file, whose header says where each tensor will lie: two at a time are made, written and checked."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for each in tensors:
        at, end = ends[-1], ends[-1] + each.bytes
        fields[each.key] = {"dtype": _NAMES[each.dtype], "shape": list(each.shape), "data_offsets": [at, end]}
        ends.append(end)
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = struct.pack("<Q", len(text)) + text
    unsynced = 0
    with path.open("wb", buffering=0) as stream, ThreadPoolExecutor(WORKERS) as workers:

        def write(each: Planned, at: int) -> None:
            tensor = each.made(path)
            if tensor.numel():
                _write_at(stream.fileno(), len(begin) + at, bytes_of(tensor), path)

        _write_at(stream.fileno(), 0, memoryview(begin), path)
        for each, _ in zip(tensors, workers.map(write, tensors, ends), strict=False):
            progress(each.bytes)
            unsynced += each.bytes
            if unsynced >= SYNC_BYTES:  # this thread has nothing else to do than to wait for the disk
                os.fsync(stream.fileno())
                unsynced = 0
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Wait until what has been written to a file is on the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _write_at(file: int, at: int, data: memoryview, path: Path) -> None:
    """Write to byte `at` of a file, and read back. A call writes 2 GiB at most."""
    done = 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)
    _check(path, at, data)


def _check(path: Path, at: int, data: memoryview) -> None:
    """Read back what was just written to a file at byte `at`. RuntimeError where it is something else than `data`."""
    buffer = memoryview(bytearray(min(CHECK_BYTES, len(data))))
    with path.open("rb", buffering=0) as stream:
        stream.seek(at)
        while len(data):
            found = buffer[: stream.readinto(buffer[: len(data)])]
            expected, data = data[: len(found)], data[len(found) :]
            if not len(found) or not np.array_equal(np.frombuffer(found, "u1"), np.frombuffer(expected, "u1")):
                raise _unsound(path)


def _unsound(path: Path) -> RuntimeError:
    return RuntimeError(f"{path} does not hold what was written to it. Is the disk sound?")
