"""Planned windows in files, so that ranks share them: written under a temporary name and renamed, checked when read.

    magic, length and crc32 of all that follows | length of the outline | outline (JSON) | rows, each compressed

The outline holds what every rank has to know of every sample. A row's arrays are unpacked where a rank takes the row.
The file is read as a whole, not mapped: it is small, and a mapped file that is cut or removed elsewhere kills a
process (SIGBUS) where a damaged one is only planned again. No pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_vlm.config.geometry import ImageLayout, Layout, VideoLayout
from megatron_vlm.data.faults import Fault
from megatron_vlm.data.plan import Facts, Row, Sample
from megatron_vlm.data.tree import TokenizedExample

MAGIC = b"vlmplan1"
_HEAD = struct.Struct("<8sQI")
_LENGTH = struct.Struct("<Q")
#: Arrays of a sample as they are stored; read back in TokenizedExample's types.
_ARRAYS = {"tokens": "<i4", "targets": "<i4", "positions": "<i4", "loss_weights": "<f4", "branches": "<i4",
           "is_vision": "?"}  # fmt: skip
_TYPES = {"tokens": np.int64, "targets": np.int64, "positions": np.int64, "loss_weights": np.float32,
          "branches": np.int32, "is_vision": np.bool_}  # fmt: skip
_CODEC = "lz4"


@dataclass(frozen=True)
class StoredRow:
    """A Row of which the samples' arrays are still packed."""

    number: int
    cost: int
    facts: tuple[Facts, ...]
    unpack: Callable[[], Row]
    """The whole row."""


def write(path: Path, rows: list[Row]) -> None:
    """Put a window into a file, whole or not at all."""
    outline: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for row in rows:
        arrays = [
            np.concatenate([getattr(sample.content, name) for sample in row.samples]).astype(kind).tobytes()
            for name, kind in _ARRAYS.items()
        ]
        plain = b"".join(arrays)
        blobs.append(pa.compress(plain, codec=_CODEC, asbytes=True))
        outline.append(
            {
                "number": row.number,
                "cost": row.cost,
                "plain": len(plain),
                "packed": len(blobs[-1]),
                "samples": [_described(sample) for sample in row.samples],
            }
        )
    words = json.dumps(outline, separators=(",", ":")).encode()
    body = b"".join([_LENGTH.pack(len(words)), words, *blobs])
    partial_path = path.with_name(f"{path.name}.partial-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        partial_path.write_bytes(_HEAD.pack(MAGIC, len(body), zlib.crc32(body)) + body)
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)


def read(path: Path) -> list[StoredRow]:
    """A window from `write`'s file. Raises ValueError where it is damaged, FileNotFoundError where there is none."""
    data = path.read_bytes()
    body = memoryview(data)[_HEAD.size :]
    if len(data) < _HEAD.size + _LENGTH.size or _HEAD.unpack_from(data) != (MAGIC, len(body), zlib.crc32(body)):
        raise ValueError(f"{path} is cut or damaged.")
    (length,) = _LENGTH.unpack_from(body)
    rows, at = [], _LENGTH.size + length
    for row in json.loads(bytes(body[_LENGTH.size : at])):
        facts = tuple(_facts(sample) for sample in row["samples"])
        packed = body[at : at + row["packed"]]
        rows.append(StoredRow(row["number"], row["cost"], facts, partial(_row, row, packed)))
        at += row["packed"]
    return rows


def _described(sample: Sample) -> dict[str, Any]:
    return {
        **dataclasses.asdict(sample.facts),
        "media": sample.media,
        "layouts": [dataclasses.asdict(layout) for layout in sample.content.layouts],
    }


def _facts(sample: dict[str, Any]) -> Facts:
    known = {field.name: sample[field.name] for field in dataclasses.fields(Facts)}
    return Facts(**known | {"fault": Fault(**known["fault"]) if known["fault"] else None})


def _row(row: dict[str, Any], packed: memoryview) -> Row:
    plain = pa.decompress(packed, decompressed_size=row["plain"], codec=_CODEC, asbytes=True)
    bounds = np.cumsum([sample["tokens"] for sample in row["samples"]])
    arrays: dict[str, list[np.ndarray]] = {}
    at = 0
    for name, kind in _ARRAYS.items():
        whole: np.ndarray = np.frombuffer(plain, dtype=kind, count=bounds[-1], offset=at).astype(_TYPES[name])
        arrays[name] = np.split(whole, bounds[:-1])
        at += np.dtype(kind).itemsize * int(bounds[-1])
    samples = [_sample(one, {name: each[place] for name, each in arrays.items()})
               for place, one in enumerate(row["samples"])]  # fmt: skip
    return Row(row["number"], tuple(samples), row["cost"])


def _sample(one: dict[str, Any], arrays: dict[str, np.ndarray]) -> Sample:
    content = TokenizedExample(
        layouts=tuple(_layout(layout) for layout in one["layouts"]),
        dropped_branches=one["dropped_branches"],
        cut_tokens=one["cut_tokens"],
        dropped_images=one["dropped_images"],
        **arrays,
    )
    return Sample(one["key"], one["source"], tuple(one["media"]), content, _facts(one).fault)


def _layout(found: dict[str, Any]) -> Layout:
    if "times" in found:
        return VideoLayout(**found | {"times": tuple(found["times"]), "frame": _layout(found["frame"])})
    return ImageLayout(**{name: tuple(pair) for name, pair in found.items()})
