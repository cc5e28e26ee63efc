"""Read a directory of shards at random: samples from memory-mapped Arrow, media by offset from tars.

    shards = Shards("my_shards")
    shards.count("captions", "train")               # how many samples
    example = shards.example("captions", "train", 7)
    data = shards.media(example.media[0].key)       # the stored file's bytes

Opening checks the manifest against the files' names and sizes; `verify.verify` checks every byte.
Safe in forked and spawned workers: a pickled `Shards` opens the directory anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megatron_vlm.data.columns import mapped
from megatron_vlm.data.example import NAME, Example, from_json
from megatron_vlm.data.timeline import Timeline
from megatron_vlm.data.writer import FORMAT, MEDIA_SCHEMA, SAMPLE_SCHEMA, TIMELINE

BUILD = "Build it with tools/build_shards.py, or set data.manifest=sample."


class Shards:
    """One opened directory of shards.

    hash:  sha256 of manifest.json, which holds the sha256 of every other file.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / "manifest.json"
        if not path.is_file():
            raise ValueError(f"{self.directory} holds no manifest.json, so it is no directory of shards. {BUILD}")
        data = path.read_bytes()
        self.hash = hashlib.sha256(data).hexdigest()
        try:
            self.manifest: dict[str, Any] = json.loads(data)
            found = self.manifest["format"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not a manifest ({error!r}). {BUILD}") from error
        if found != FORMAT:
            raise ValueError(f"{path} has format {found}, this version reads {FORMAT}. Build the shards anew.")
        self._samples: dict[tuple[str, str], _Samples] = {}
        self._descriptors: dict[int, int] = {}
        try:
            self._check_files()
            self._open_media()
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} is not of the form of a manifest ({error!r}). {BUILD}") from error

    @property
    def datasets(self) -> tuple[str, ...]:
        """Names of the data sets, sorted."""
        return tuple(sorted(self.manifest["datasets"]))

    def splits(self, dataset: str) -> tuple[str, ...]:
        """Splits of a data set, sorted."""
        self._known(dataset)
        return tuple(sorted(self.manifest["datasets"][dataset]))

    def count(self, dataset: str, split: str) -> int:
        """Samples of a data set in a split; 0 where it has no such split. ValueError for an unknown data set."""
        self._known(dataset)
        return int(self.manifest["datasets"][dataset].get(split, {}).get("samples", 0))

    def example(self, dataset: str, split: str, index: int) -> Example:
        """Sample `index` of a split. Raises ValueError, naming it, where its record is damaged."""
        return self._table(dataset, split).example(index)

    def keys(self, dataset: str, split: str) -> list[str]:
        """Keys of a split's samples in order."""
        return self._table(dataset, split).keys()

    def key(self, dataset: str, split: str, index: int) -> str:
        """Key of sample `index` of a split; readable where its record is damaged."""
        return self._table(dataset, split).key(index)

    def media(self, key: str) -> bytes:
        """Bytes of a stored file by its sha256. Raises ValueError where it is missing or lies outside its shard."""
        row, (shards, offsets, sizes) = self._media_row(key), self._media_place
        shard, offset, size = shards[row], offsets[row], sizes[row]
        data = os.pread(self._descriptors.get(shard) or self._descriptor(shard), size, offset)
        if len(data) != size:
            raise ValueError(
                f"media {key}: shard {self.manifest['media']['shards'][shard]} gives {len(data)} of {size} bytes at "
                f"offset {offset}: it was cut or changed after opening."
            )
        return data

    def unsorted(self) -> str:
        """The first key of the media index that does not come after the one before it, so that files are not found;
        "" where there is none."""
        wrong = np.flatnonzero(self._media_keys[1:] <= self._media_keys[:-1])
        return self._media_keys[int(wrong[0]) + 1].ljust(32, b"\0").hex() if len(wrong) else ""

    def place(self, key: str) -> tuple[str, str]:
        """Where a stored file lies, for a message: the shard, and `1234 bytes at offset 512`."""
        try:
            row = self._media_row(key)
        except ValueError:
            return "media.arrow", f"no entry {key}"
        shard = self.manifest["media"]["shards"][int(self._media_shard[row])]
        return shard, f"{self._media_size[row]} bytes at offset {self._media_offset[row]}"

    def size(self, key: str) -> tuple[int, int]:
        """Width and height of a stored file in pixels as displayed, by the index."""
        row = self._media_row(key)
        return self._media_table.column("width")[row].as_py(), self._media_table.column("height")[row].as_py()

    @property
    def has_videos(self) -> bool:
        """Some stored file is a video."""
        return self._timelines is not None

    def is_video(self, key: str) -> bool:
        """A stored file is a video."""
        return self._timelines is not None and self._timelines[self._media_row(key)].is_valid

    def timeline(self, key: str) -> Timeline:
        """When the frames of a stored video are shown. Raises ValueError where the file is no video."""
        if self._timelines is None or not self.is_video(key):
            raise ValueError(f"media {key} is not a video, but a sample says so. Build the shards anew.")
        return Timeline.unpack(self._timelines[self._media_row(key)].as_py())

    def file(self, name: str) -> Path:
        """A further file beside the shards (the tokenizer). Raises ValueError where the manifest lists none such."""
        if name not in self.manifest["files"]:
            raise ValueError(f"{self.directory} holds no {name!r}; it holds {', '.join(self.manifest['files'])}.")
        return self.directory / name

    def _known(self, dataset: str) -> None:
        if dataset not in self.manifest["datasets"]:
            raise ValueError(
                f"{self.directory} has no data set {dataset!r}; it has {', '.join(self.datasets)}. "
                "Correct the name (in the mixture, or in what you asked for), or build shards that hold it."
            )

    def _check_files(self) -> None:
        for name, entry in self.manifest["files"].items():
            entry["sha256"].encode()  # verify reads it
            parts = name.split("/")
            if not all(NAME.fullmatch(part.replace(".", "-")) and not part.startswith(".") for part in parts):
                raise ValueError(f"{self.directory}/manifest.json names a file {name!r}, which is refused.")
            path = self.directory / name
            try:
                status = path.lstat()
            except FileNotFoundError:
                raise ValueError(f"{path} is missing; the manifest lists it. Copy it again or build anew.") from None
            if not stat.S_ISREG(status.st_mode):
                raise ValueError(f"{path} is not a regular file; links and devices are refused.")
            if status.st_size != entry["size"]:
                raise ValueError(
                    f"{path} has {status.st_size} bytes, the manifest says {entry['size']}: it was cut or changed. "
                    "Copy it again or build anew."
                )
        needed = [f"samples/{name}.{split}.arrow" for name, all in self.manifest["datasets"].items() for split in all]
        if any(int(one["samples"]) < 0 for all in self.manifest["datasets"].values() for one in all.values()):
            raise ValueError(f"{self.directory}/manifest.json says that a split has fewer samples than none.")
        for name in ("media.arrow", *self.manifest["media"]["shards"], *needed):
            if name not in self.manifest["files"]:
                raise ValueError(f"{self.directory}/manifest.json needs {name!r} but does not list it among its files.")

    def _open_media(self) -> None:
        table = mapped(self.directory / "media.arrow", MEDIA_SCHEMA, [TIMELINE])
        count = self.manifest["media"]["count"]
        if table.num_rows != count:
            raise ValueError(f"{self.directory}/media.arrow lists {table.num_rows} files, the manifest {count}.")
        self._media_table = table
        keys = table.column("key").combine_chunks()
        data = keys.chunk(0).buffers()[1] if isinstance(keys, pa.ChunkedArray) else keys.buffers()[1]
        # S32 compares as 32 raw bytes: all keys have the full length.
        self._media_keys = np.frombuffer(data, dtype="S32", count=count) if count else np.empty(0, dtype="S32")
        self._media_shard, self._media_offset, self._media_size = (
            table.column(name).to_numpy() for name in ("shard", "offset", "size")
        )
        self._timelines = table.column(TIMELINE.name) if TIMELINE.name in table.column_names else None
        shards = self.manifest["media"]["shards"]
        sizes = np.asarray([self.manifest["files"][name]["size"] for name in shards], dtype=np.int64)
        if count:
            known = (self._media_shard >= 0) & (self._media_shard < len(shards))
            ends = sizes[np.where(known, self._media_shard, 0)] if len(shards) else np.zeros(count, dtype=np.int64)
            fits = known & (self._media_offset >= 0) & (self._media_size >= 0)
            fits &= self._media_size <= ends - np.minimum(self._media_offset, ends)  # their sum may be too large
            if not fits.all():
                bad = int(np.flatnonzero(~fits)[0])
                raise ValueError(
                    f"{self.directory}/media.arrow: file {self._media_keys[bad].hex()} at offset "
                    f"{self._media_offset[bad]} + {self._media_size[bad]} bytes lies outside shard "
                    f"{self._media_shard[bad]}. Build the shards anew."
                )
        # Elements of a memoryview are Python's integers, in a third of the time that numpy's take.
        self._media_place = [memoryview(column) for column in (self._media_shard, self._media_offset, self._media_size)]
        self._media_bytes = memoryview(data if count else b"").cast("B")

    def _media_row(self, key: str) -> int:
        digest = bytes.fromhex(key)
        row = int(self._media_keys.searchsorted(digest))
        if self._media_bytes[32 * row : 32 * row + 32] != digest:
            raise ValueError(f"media {key} is not in {self.directory}: the samples do not fit the media index.")
        return row

    def _descriptor(self, shard: int) -> int:
        if shard not in self._descriptors:
            path = self.directory / self.manifest["media"]["shards"][shard]
            self._descriptors[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        return self._descriptors[shard]

    def _table(self, dataset: str, split: str) -> _Samples:
        if (dataset, split) not in self._samples:
            count = self.count(dataset, split)
            if not count:
                raise ValueError(
                    f"data set {dataset!r} has no split {split!r}; it has {', '.join(self.splits(dataset))}."
                )
            self._samples[dataset, split] = _Samples(self.directory / f"samples/{dataset}.{split}.arrow", count)
        return self._samples[dataset, split]

    def __getstate__(self) -> str:
        return str(self.directory)

    def __setstate__(self, directory: str) -> None:
        Shards.__init__(self, directory)

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            os.close(descriptor)


class _Samples:
    """The samples of one data set and split, in a memory-mapped Arrow file."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        table = mapped(path, SAMPLE_SCHEMA)
        if table.num_rows != count:
            raise ValueError(f"{path} holds {table.num_rows} samples, the manifest says {count}. Build anew.")
        self._keys = table.column("key")
        self._records = table.column("record")
        self._checksums = table.column("checksum").to_numpy()

    def example(self, index: int) -> Example:
        record = self._records[index].as_py()
        if zlib.crc32(record.encode()) != self._checksums[index]:
            raise ValueError(f"{self._path}, sample {index}: the record does not fit its checksum. Build anew.")
        try:
            return from_json(record)
        except Exception as error:  # a stranger's record may be anything
            raise ValueError(
                f"{self._path}, sample {index}: the record is no sample ({type(error).__name__}: {error}). Build anew."
            ) from error

    def keys(self) -> list[str]:
        return self._keys.to_pylist()

    def key(self, index: int) -> str:
        try:
            return self._keys[index].as_py()
        except UnicodeDecodeError:
            return f"sample_{index}"
