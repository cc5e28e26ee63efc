"""Save what is sound in a damaged directory of shards into a new one; list what is not. Never writes to the old one.

A media file counts as sound where its bytes have the sha256 that names it, wherever it was found: by the index, by the
tar's headers. A sample is sound where its record has its checksum and all its media are sound.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from megatron_vlm.data.columns import check, mapped
from megatron_vlm.data.example import NAME, Media, from_json
from megatron_vlm.data.tar import split_name
from megatron_vlm.data.writer import MEDIA_SCHEMA, SAMPLE_SCHEMA, TIMELINE, ShardWriter, file_sha256

#: File in the new directory that lists what was left out.
QUARANTINE = "quarantine.jsonl"


class Repaired(NamedTuple):
    """What became of the samples."""

    kept: int
    left_out: list[dict[str, str]]
    """One for each fault: file or data set, key, reason; the record's text where a sample's is known."""


class _Place(NamedTuple):
    path: Path
    offset: int
    size: int


def repair(directory: Path, out: Path, *, shard_bytes: int = 1 << 30) -> Repaired:
    """Write the sound samples of `directory` to `out`. Raises ValueError where there is none."""
    if not any((directory / name).exists() for name in ("manifest.json", "samples")):
        raise ValueError(f"{directory} holds neither manifest.json nor a folder `samples`: no shards. Check the path.")
    if out.exists():
        raise ValueError(f"{out} exists already. Choose another --out.")
    faults: list[dict[str, str]] = []
    found = _media(directory, faults)
    kept = 0
    with ShardWriter(out, shard_bytes=shard_bytes) as writer:
        for name, dataset, split in _sample_files(directory):
            for row in _rows(directory / name, faults):
                reason = _add(row, dataset, split, found, writer)
                kept += not reason
                if reason:
                    faults.append({"file": name, "key": str(row.get("key")), "reason": reason,
                                   "record": str(row.get("record"))})  # fmt: skip
        for name in _other_files(directory, faults):
            writer.add_file(name, (directory / name).read_bytes())
        lines = "".join(json.dumps(fault, ensure_ascii=False) + "\n" for fault in faults)
        writer.add_file(QUARANTINE, lines.encode())
    return Repaired(kept, faults)


def _add(row: dict[str, Any], dataset: str, split: str, found: dict[str, _Place], writer: ShardWriter) -> str:
    """Add a sample; returns why it is not sound, "" where it was added."""
    try:
        if zlib.crc32(row["record"].encode()) != row["checksum"]:
            return "the record does not fit its checksum"
        example = from_json(row["record"])
        for media in example.media:
            if media.key not in found:
                return f"media {media.key} is lost"
            if _stored(found[media.key], media, writer) != media:
                return f"media {media.key} has another size than the record says"
        writer.add(example, dataset, split)
    except OSError:
        raise  # of the new directory
    except Exception as error:  # a stranger's record may be anything
        return f"{type(error).__name__}: {error}"
    return ""


def _stored(place: _Place, media: Media, writer: ShardWriter) -> Media:
    data = _read(place)
    return writer.add_video(data) if media.kind == "video" else writer.add_image(data)


def _media(directory: Path, faults: list[dict[str, str]]) -> dict[str, _Place]:
    """Every sound file by its sha256."""
    found: dict[str, _Place] = {}
    suspect: dict[str, _Place] = {}
    for key, place in [*_indexed(directory), *_members(directory)]:
        if key in found:
            continue
        data = _read(place)
        if len(data) == place.size and hashlib.sha256(data).hexdigest() == key:
            found[key] = place
        else:
            suspect[key] = place
    for key, place in suspect.items():
        if key not in found:
            faults.append({"file": f"media/{place.path.name}", "key": key,
                           "reason": f"damaged at offset {place.offset}"})  # fmt: skip
    return found


def _indexed(directory: Path) -> Iterator[tuple[str, _Place]]:
    """Files as media.arrow places them; none where it cannot be read."""
    try:
        shards = json.loads((directory / "manifest.json").read_text())["media"]["shards"]
        table = mapped(directory / "media.arrow", MEDIA_SCHEMA, [TIMELINE])
        rows = zip(*(table.column(name).to_pylist() for name in ("key", "shard", "offset", "size")), strict=True)
        for key, shard, offset, size in rows:
            # By the tar's number, not by the manifest's word for a path.
            path = directory / "media" / Path(shards[shard]).name
            if path.is_file() and not path.is_symlink() and offset >= 0 and 0 <= size <= path.stat().st_size:
                yield key.hex(), _Place(path, offset, size)
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return


def _members(directory: Path) -> Iterator[tuple[str, _Place]]:
    """Files as the tars' own headers place them, up to the first header that is broken."""
    for path in sorted((directory / "media").glob("*.tar")):
        if path.is_symlink():
            continue
        size = path.stat().st_size
        try:
            with tarfile.open(path, mode="r:") as tar:
                for info in tar:
                    if info.size < 0:
                        break  # the next header would be before this one
                    if info.isreg() and info.offset_data + info.size <= size:
                        yield split_name(info.name)[0], _Place(path, info.offset_data, info.size)
        except (tarfile.TarError, ValueError, EOFError, OSError):
            continue


def _read(place: _Place) -> bytes:
    with place.path.open("rb") as file:
        return os.pread(file.fileno(), place.size, place.offset)


def _sample_files(directory: Path) -> Iterator[tuple[str, str, str]]:
    """(file, data set, split) of every file of samples."""
    for path in sorted((directory / "samples").glob("*.arrow")):
        dataset, _, split = path.name.removesuffix(".arrow").rpartition(".")
        if NAME.fullmatch(dataset) and NAME.fullmatch(split) and not path.is_symlink():
            yield f"samples/{path.name}", dataset, split


def _rows(path: Path, faults: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
    """Rows of a file of samples; of one that was cut, those before the cut."""
    name = f"samples/{path.name}"
    try:
        batches = mapped(path, SAMPLE_SCHEMA).to_batches()
    except ValueError as error:
        faults.append({"file": name, "key": "", "reason": f"not whole ({error})"})
    else:
        for batch in batches:
            yield from _texts(batch)
        return
    try:
        # After 8 bytes an Arrow file is a stream; only its footer is lost.
        whole = pa.py_buffer(path.read_bytes()[8:])
        for batch in pa.ipc.open_stream(whole):
            check(batch, whole)
            yield from _texts(batch)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        faults.append({"file": name, "key": "", "reason": f"nothing more can be read ({error})"})


def _texts(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """Rows of a batch. Text is decoded row by row: a damaged one must not hide the others."""
    for name in ("key", "record"):
        column = batch.schema.get_field_index(name)
        batch = batch.set_column(column, name, batch.column(column).cast(pa.binary()))
    for row in batch.to_pylist():
        yield {name: value.decode(errors="replace") if isinstance(value, bytes) else value
               for name, value in row.items()}  # fmt: skip


def _other_files(directory: Path, faults: list[dict[str, str]]) -> Iterator[str]:
    """Further files beside the shards that have the manifest's checksum."""
    try:
        files = json.loads((directory / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        faults.append({"file": "manifest.json", "key": "", "reason": f"cannot be read ({error})"})
        return
    for name, entry in files.items():
        if "/" in name or name in ("media.arrow", QUARANTINE) or not NAME.fullmatch(name.replace(".", "-")):
            continue
        path = directory / name
        if path.is_file() and not path.is_symlink() and file_sha256(path) == entry["sha256"]:
            yield name
        else:
            faults.append({"file": name, "key": "", "reason": "missing, or its sha256 is not the manifest's"})
