"""Check every byte of a directory of shards: the tars against the index, the samples against the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np

from megatron_vlm.data import image, video
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tar import Member, index_tar
from megatron_vlm.data.writer import file_sha256


def verify(directory: str | Path) -> list[str]:
    """Every fault found, one line each, naming file, key and offset; [] = sound.

    Raises ValueError where the directory cannot be opened at all.
    """
    shards = Shards(directory)
    return [*_files(shards), *_index(shards), *_media(shards), *_samples(shards)]


def _files(shards: Shards) -> Iterator[str]:
    for name, entry in shards.manifest["files"].items():
        if file_sha256(shards.directory / name) != entry["sha256"]:
            yield f"{name}: its sha256 is not the manifest's."


def _index(shards: Shards) -> Iterator[str]:
    if key := shards.unsorted():
        yield f"media.arrow: {key} does not come after the key before it: the index is unsorted, or has a key twice."


def _media(shards: Shards) -> Iterator[str]:
    listed = 0
    for name in shards.manifest["media"]["shards"]:
        path = shards.directory / name
        try:
            members = index_tar(path)
        except ValueError as error:
            yield str(error)
            continue
        listed += len(members)
        with path.open("rb") as file:
            for member in members:
                file.seek(member.offset)
                if fault := _fault(shards, member.key, file.read(member.size)):
                    yield f"{name}: {member.key} at offset {member.offset}: {fault}"
        if fault := _offsets_fault(path, members):
            yield f"{name}.idx: {fault}"
    if listed != shards.manifest["media"]["count"]:
        yield f"the tars hold {listed} files, the manifest says {shards.manifest['media']['count']}."


def _offsets_fault(path: Path, members: list[Member]) -> str:
    """Why the offsets beside a tar are not its own; "" where they are."""
    end = members[-1].offset + members[-1].size if members else 0
    wanted = [*(member.header for member in members), end + -end % BLOCKSIZE]
    try:
        found = path.with_name(path.name + ".idx").read_bytes()
    except OSError as error:
        return f"cannot be read ({error.strerror})."
    return "" if found == np.asarray(wanted, dtype="<u8").tobytes() else "its offsets are not the tar's."


def _fault(shards: Shards, key: str, data: bytes) -> str:
    """What is wrong with a file of a tar; "" where it is sound."""
    if hashlib.sha256(data).hexdigest() != key:
        return "the content's sha256 is another one."
    try:
        if shards.media(key) != data:
            return "the index points elsewhere."
    except ValueError:
        return "the index does not lead to it."
    try:
        return _header_fault(shards, key, data)
    except ValueError as error:
        return str(error)


def _header_fault(shards: Shards, key: str, data: bytes) -> str:
    """Why the index does not fit an image or a video; "" where it does. Raises ValueError where it is none."""
    found: image.Header | video.Scan
    if shards.is_video(key):
        found = video.scan(data, name=key)
        if shards.timeline(key).pack() != found.timeline.pack():
            return "its frames are not shown when the index says."
    else:
        found = image.probe(data, name=key)
    size = shards.size(key)
    return "" if (found.width, found.height) == size else f"it has {found.width}x{found.height} pixels, not {size}."


def _samples(shards: Shards) -> Iterator[str]:
    for dataset in shards.datasets:
        for split in shards.splits(dataset):
            seen = set()
            for index in range(shards.count(dataset, split)):
                try:
                    example = shards.example(dataset, split, index)
                    example.check()
                    for media in example.media:
                        shards.media(media.key)
                        if (media.width, media.height) != shards.size(media.key):
                            raise ValueError(f"sample {example.key!r}: {media.key} has another size than it says.")
                except ValueError as error:
                    yield f"{dataset}.{split}: {error}"
                    continue
                if example.key in seen:
                    yield f"{dataset}.{split}: key {example.key!r} stands twice."
                seen.add(example.key)
