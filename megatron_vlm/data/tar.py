"""Media tars: written so that plain `webdataset` opens them, indexed by offset, never extracted by name.

An index lists where each member's bytes lie. It is rebuilt from the tar itself, which refuses whatever could harm:
links and devices, absolute or `..` names, a name twice, sizes beyond the end of the file.
"""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np

from megatron_vlm.data.example import KEY


class Member(NamedTuple):
    """One file in a tar."""

    key: str
    """Name up to the first dot of its last part, as webdataset reads it."""
    extension: str
    """The rest of the name, without the dot: `jpg`, `0.jpg`, `json`."""
    header: int
    """Byte offset of the tar header."""
    offset: int
    """Byte offset of the content."""
    size: int
    """Bytes of content."""


def add_member(stream: BinaryIO, name: str, data: bytes) -> Member:
    """Append one regular file to an open tar stream (ustar, no times or owners: equal input gives equal bytes)."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    header = stream.tell()
    stream.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = stream.tell()
    stream.write(data)
    stream.write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
    key, extension = split_name(name)
    return Member(key, extension, header, offset, len(data))


def end_tar(stream: BinaryIO) -> int:
    """Write the end marks; returns the offset where they begin."""
    end = stream.tell()
    stream.write(b"\0" * (2 * tarfile.BLOCKSIZE))
    return end


def split_name(name: str) -> tuple[str, str]:
    """`a/b.0.jpg` -> (`a/b`, `0.jpg`). Raises ValueError for a name that no key of ours can have."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    key = folder + slash + stem
    if not dot or not extension or not KEY.fullmatch(key):
        raise ValueError(
            f"member name {name!r} is refused: needed `key.extension`, the key of letters, digits, `_`, `-` and single "
            "`/`; no absolute path, no `..`."
        )
    return key, extension


def index_tar(path: Path) -> list[Member]:
    """Every member of a tar in file order.

    Raises ValueError, naming tar and member, for anything but regular files with good names that end inside the file.
    """
    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path} is not a regular file.")
    size = path.stat().st_size
    members, seen = [], set()
    try:
        with tarfile.open(path, mode="r:") as tar:
            for info in tar:
                member = _checked(info, size)
                name = (member.key, member.extension)
                if name in seen:
                    raise ValueError(f"member {info.name!r} stands in it twice.")
                seen.add(name)
                members.append(member)
            end = members[-1].offset + members[-1].size if members else 0
            check_end(cast(BinaryIO, tar.fileobj), end + -end % tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, OSError) as error:  # OSError: a size that leads before the file's beginning
        raise ValueError(f"{path} is not a whole tar ({error}). Copy it again or build the shards anew.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return members


def check_end(stream: BinaryIO, end: int) -> None:
    """Raise ValueError where a tar does not end at byte `end` as tars do: with two blocks of zeros or more, and nothing
    else. tarfile takes half a header, and a broken one, for the end, and passes over what comes later."""
    stream.seek(end)
    left = 0
    while data := stream.read(1 << 20):  # to its end, so that a compressed one checks its own checksum
        if data.strip(b"\0"):
            raise ValueError(
                f"it goes on behind the end of its last member at byte {end}: several tars in one file, or a header "
                "that is cut or broken. Copy it again, or split it."
            )
        left += len(data)
    if left < 2 * tarfile.BLOCKSIZE:
        raise ValueError(f"it stops at byte {end + left} without an end mark: the shard is cut. Copy it again.")


def _checked(info: tarfile.TarInfo, file_size: int) -> Member:
    if info.size < 0:
        raise ValueError(f"member {info.name!r} has {info.size} bytes: its header is broken.")
    if not info.isreg() or info.issparse():
        raise ValueError(f"member {info.name!r} is not a regular file (tar type {info.type!r}).")
    if info.offset_data + info.size > file_size:
        raise ValueError(
            f"member {info.name!r} ends at byte {info.offset_data + info.size}, the file at {file_size}: "
            "the shard is cut. Copy it again or build the shards anew."
        )
    key, extension = split_name(info.name)
    return Member(key, extension, info.offset, info.offset_data, info.size)


def write_offsets(path: Path, headers: Iterable[int], end: int) -> None:
    """The `.tar.idx` beside a tar: little-endian uint64 header offset of each sample (members with one key), then the
    offset of the end. The form that Megatron-Energon reads too."""
    np.fromiter(itertools.chain(headers, [end]), dtype="<u8").tofile(path)


def sample_headers(members: Iterable[Member]) -> Iterator[int]:
    """Header offset of the first member of each sample."""
    last = None
    for member in members:
        if member.key != last:
            yield member.header
        last = member.key
