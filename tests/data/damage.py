"""Damage to a directory of shards that changes no size, so that it opens as before; and builds that are wrong."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa

from megatron_vlm.data.shards import Shards


def write(path: Path, offset: int, data: bytes) -> None:
    """Overwrite bytes in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def flip(path: Path, offset: int) -> None:
    """Flip the lowest bit of one byte."""
    data = path.read_bytes()
    write(path, offset, bytes([data[offset] ^ 1]))


def place(folder: Path, key: str) -> tuple[Path, int, int]:
    """Tar, offset and size of a stored file."""
    shards = Shards(folder)
    name, where = shards.place(key)
    size, offset = (int(word) for word in where.split() if word.isdigit())
    return folder / name, offset, size


def blank_media(folder: Path, key: str) -> str:
    """Zeros where a stored file was; returns the tar's name."""
    tar, offset, size = place(folder, key)
    write(tar, offset, bytes(size))
    return tar.relative_to(folder).as_posix()


def spoil_record(folder: Path, dataset: str, split: str, key: str) -> str:
    """One letter of a sample's record changed; returns the file's name."""
    path = folder / f"samples/{dataset}.{split}.arrow"
    found = path.read_bytes().index(f'{{"key":"{key}"'.encode())
    flip(path, found + 3)
    return path.relative_to(folder).as_posix()


def rewrite(folder: Path, name: str, change: Callable[[pa.Table], pa.Table], *, compression: str | None = None) -> None:
    """Change an Arrow file, and the manifest's word for its size and checksum with it: a wrong build, not a damage."""
    path = folder / name
    table = change(pa.ipc.open_file(path.read_bytes()).read_all())
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
