"""Check every byte of a directory of shards: the tars against the index, the samples against the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from megatron_vlm.data import video
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tar import index_tar, read_offsets
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
        headers = [member.header for member in members]
        if not np.array_equal(read_offsets(path.with_name(path.name + ".idx"))[:-1], np.asarray(headers, dtype="<u8")):
            yield f"{name}.idx: its offsets are not the tar's."
    if listed != shards.manifest["media"]["count"]:
        yield f"the tars hold {listed} files, the manifest says {shards.manifest['media']['count']}."


def _fault(shards: Shards, key: str, data: bytes) -> str:
    """What is wrong with a file of a tar; "" where it is sound."""
    if hashlib.sha256(data).hexdigest() != key:
        return "the content's sha256 is another one."
    try:
        if shards.media(key) != data:
            return "the index points elsewhere."
    except ValueError:
        return "the index does not lead to it."
    return _timeline_fault(shards, key, data)


def _timeline_fault(shards: Shards, key: str, data: bytes) -> str:
    """Why the index does not fit a video; "" where it does, and for an image."""
    if not shards.is_video(key):
        return ""
    try:
        found = video.scan(data, name=key).timeline
    except ValueError as error:
        return str(error)
    return "" if shards.timeline(key).pack() == found.pack() else "its frames are not shown when the index says."


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
                except ValueError as error:
                    yield f"{dataset}.{split}: {error}"
                    continue
                if example.key in seen:
                    yield f"{dataset}.{split}: key {example.key!r} stands twice."
                seen.add(example.key)
