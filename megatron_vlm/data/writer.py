"""Write a directory of shards: media tars, their index, one Arrow file of samples per data set and split, a manifest.

Everything goes to a directory of another name first, which is renamed when it is whole: a build that stops leaves
nothing that looks finished. Equal input in equal order gives equal bytes.

    with ShardWriter("my_shards") as writer:
        photo = writer.add_image(open("cat.jpg", "rb").read())
        writer.add(Example("cat", (Branch("long_caption", (Turn("", "A cat ..."),)),), (photo,)), "captions", "train")
        writer.add_file("tokenizer.json", data)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
import zlib
from array import array
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from megatron_vlm.data import video
from megatron_vlm.data.digests import Digests
from megatron_vlm.data.example import NAME, Example, Media, to_json
from megatron_vlm.data.image import EXTENSIONS, probe
from megatron_vlm.data.partial import partial
from megatron_vlm.data.tar import add_member, end_tar, write_offsets

#: Version of the directory's form; a reader refuses another one.
FORMAT = 1
MEDIA_SCHEMA = pa.schema(
    [
        ("key", pa.binary(32)),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ]
)
#: Further column of an index that holds videos: Timeline.pack, null for an image.
TIMELINE = pa.field("timeline", pa.binary())
SAMPLE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("record", pa.string()),
        ("checksum", pa.uint32()),
        ("media", pa.int32()),
        ("branches", pa.int32()),
        ("characters", pa.int32()),
    ]
)
#: Errors of a disk that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: Samples buffered before they go to disk as one Arrow record batch.
BATCH_SAMPLES = 8192


class ShardWriter:
    """Collects media and samples; the directory appears when the `with` block ends without an error.

    shard_bytes: a media tar is closed when it has grown to this size.
    overwrite:   replace a directory that stands in the way (only one that holds a manifest.json).
    """

    def __init__(self, directory: str | Path, *, shard_bytes: int = 1 << 30, overwrite: bool = False) -> None:
        self.directory = Path(directory)
        self._shard_bytes = shard_bytes
        self._overwrite = overwrite
        self._partial = Path()
        """Where it is written, while the `with` block lasts."""
        self._given_up = ExitStack()
        if self.directory.exists() and not (overwrite and (self.directory / "manifest.json").is_file()):
            other = "it holds no shards, and only shards are replaced" if overwrite else "--overwrite replaces shards"
            raise ValueError(f"{self.directory} exists already. Choose another --out; {other}.")
        self._media = _Stored()
        self._samples: dict[tuple[str, str], _SampleFile] = {}
        self._tar: BinaryIO | None = None
        self._headers = array("Q")
        """Of the open tar's members, each of which is a sample of its own."""
        self._shards: list[str] = []
        self._files: list[str] = []

    def __enter__(self) -> ShardWriter:
        with ExitStack() as stack:
            self._partial = stack.enter_context(partial(self.directory))
            for folder in ("media", "samples"):
                (self._partial / folder).mkdir()
            self._given_up = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failure = error
        try:
            if error is None:
                self._finish()
        except OSError as failed:
            failure = failed
            if failed.errno not in FULL:
                raise
        finally:
            self._give_up()
        if isinstance(failure, OSError) and failure.errno in FULL:
            raise OSError(
                failure.errno,
                f"{os.strerror(failure.errno or 0)}: {self.directory} could not be written, and nothing of it is left. "
                "Make room, or choose another directory",
            ) from failure

    def _give_up(self) -> None:
        """Let go of all that is not under its final name."""
        closings = [samples.abandon for samples in self._samples.values()]
        for close in (*closings, *([self._tar.close] if self._tar else [])):
            with suppress(OSError):  # a full disk does not take the rest either
                close()
        self._given_up.close()

    def add_image(self, data: bytes) -> Media:
        """Store an image file as it is, once however often it is added.

        Raises ValueError where the header is not that of an allowed image.
        """
        key = hashlib.sha256(data).hexdigest()
        if known := self._media.get(key):
            return known
        header = probe(data, name=key)
        return self._store(Media(key, header.width, header.height), EXTENSIONS[header.format], data)

    def add_video(self, data: bytes) -> Media:
        """Store a video file as it is, once however often it is added, and when each of its frames is shown.

        Raises ValueError where it is not a whole video of an allowed kind.
        """
        key = hashlib.sha256(data).hexdigest()
        if known := self._media.get(key):
            return known
        found = video.scan(data, name=key)
        timeline = found.timeline
        media = Media(
            key, found.width, found.height, "video", timeline.seconds, round(timeline.fps, 6), len(timeline.pts)
        )
        return self._store(media, found.extension, data, timeline.pack())

    def add_checked(self, media: Media, extension: str, data: bytes, timeline: bytes | None) -> None:
        """Store a file that another writer has checked and described: its bytes are believed to fit `media`.

        timeline: Timeline.pack of a video, None of an image.
        """
        if not self._media.get(media.key):
            self._store(media, extension, data, timeline)

    def _store(self, media: Media, extension: str, data: bytes, timeline: bytes | None = None) -> Media:
        tar = self._tar or self._open_tar()
        member = add_member(tar, f"{media.key}.{extension}", data)
        self._headers.append(member.header)
        self._media.add(media, len(self._shards) - 1, member.offset, member.size, timeline)
        if tar.tell() >= self._shard_bytes:
            self._close_tar()
        return media

    def add(self, example: Example, dataset: str, split: str) -> None:
        """Append a sample to a data set's split.

        Raises ValueError, naming the sample, for one that cannot be trained on, whose key the split holds already, or
        whose media were not added.
        """
        for name in (dataset, split):
            if not NAME.fullmatch(name):
                raise ValueError(f"{name!r} cannot name a data set or split: use letters, digits, `_` and `-`.")
        example.check()
        for media in example.media:
            if self._media.get(media.key) != media:
                raise ValueError(
                    f"sample {example.key!r} names media {media}, which neither add_image nor add_video returned."
                )
        if (dataset, split) not in self._samples:
            self._samples[dataset, split] = _SampleFile(self._partial / "samples" / f"{dataset}.{split}.arrow")
        self._samples[dataset, split].add(example)

    def add_file(self, name: str, data: bytes) -> None:
        """Put a further file (a tokenizer, a licence) beside the shards, under the manifest's checksums."""
        if not NAME.fullmatch(name.replace(".", "-")) or name.startswith(".") or name == "manifest.json":
            raise ValueError(f"{name!r} cannot name a file beside the shards.")
        (self._partial / name).write_bytes(data)
        self._files.append(name)

    def _open_tar(self) -> BinaryIO:
        name = f"media/{len(self._shards):06d}.tar"
        self._tar = (self._partial / name).open("wb")
        self._shards.append(name)
        self._headers = array("Q")
        return self._tar

    def _close_tar(self) -> None:
        if self._tar is None:
            return
        end = end_tar(self._tar)
        self._tar.close()
        self._tar = None
        write_offsets(self._partial / f"{self._shards[-1]}.idx", self._headers, end)

    def _finish(self) -> None:
        self._close_tar()
        self._media.write(self._partial / "media.arrow")
        datasets: dict[str, dict[str, dict[str, int]]] = {}
        for (dataset, split), samples in sorted(self._samples.items()):
            datasets.setdefault(dataset, {})[split] = samples.close()
        if not datasets:
            raise ValueError(f"no sample was added to {self.directory}: nothing is written. Is the input empty?")
        files = {
            path.relative_to(self._partial).as_posix(): {"size": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(self._partial.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "format": FORMAT,
            "datasets": datasets,
            "media": {"count": len(self._media), "shards": self._shards},
            "files": files,
        }
        (self._partial / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        self._move()

    def _move(self) -> None:
        if self._overwrite and self.directory.exists():
            retired = self.directory.with_name(f"{self.directory.name}.old-{uuid.uuid4().hex[:12]}")
            os.rename(self.directory, retired)
            os.rename(self._partial, self.directory)
            shutil.rmtree(retired)
            return
        try:
            os.rename(self._partial, self.directory)
        except OSError:
            # Another process finished the same build first: equal bytes are as good as ours.
            theirs = self.directory / "manifest.json"
            if not theirs.is_file() or theirs.read_bytes() != (self._partial / "manifest.json").read_bytes():
                raise


class _Stored:
    """The index of media while it grows: columns, some 80 bytes a file; what only videos have apart."""

    def __init__(self) -> None:
        self._keys = Digests(32)
        self._columns = [array(kind) for kind in "iqqii"]  # shard, offset, size, width, height
        self._videos: dict[int, tuple[Media, bytes | None]] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, key: str) -> Media | None:
        """What is stored under a key."""
        if len(key) != 64:
            return None
        row = self._keys.find(bytes.fromhex(key))
        if row < 0:
            return None
        width, height = (column[row] for column in self._columns[3:])
        return self._videos[row][0] if row in self._videos else Media(key, width, height)

    def add(self, media: Media, shard: int, offset: int, size: int, timeline: bytes | None) -> None:
        row = self._keys.add(bytes.fromhex(media.key))
        for column, value in zip(self._columns, (shard, offset, size, media.width, media.height), strict=True):
            column.append(value)
        if media.kind == "video":
            self._videos[row] = media, timeline

    def write(self, path: Path) -> None:
        """As an Arrow file, in the order of the keys."""
        count = len(self)
        keys = np.frombuffer(self._keys.data(), dtype="V32", count=count)
        order = np.argsort(keys.view("S32"), kind="stable")
        arrays = [pa.Array.from_buffers(pa.binary(32), count, [None, pa.py_buffer(keys[order])])]
        arrays += [
            pa.array(np.frombuffer(column, dtype=column.typecode, count=count)[order], type=field.type)
            for column, field in zip(self._columns, list(MEDIA_SCHEMA)[1:], strict=True)
        ]
        schema = MEDIA_SCHEMA
        if any(timeline is not None for _, timeline in self._videos.values()):
            schema = schema.append(TIMELINE)
            timelines = [self._videos[row][1] if row in self._videos else None for row in order.tolist()]
            arrays.append(pa.array(timelines, type=TIMELINE.type))
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))


class _SampleFile:
    """One Arrow IPC file of samples, written in record batches."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, SAMPLE_SCHEMA)
        self._rows: list[tuple[str, str, int, int, int, int]] = []
        self._keys = Digests(16)
        self._branches = 0

    def add(self, example: Example) -> None:
        digest = hashlib.blake2b(example.key.encode(), digest_size=16).digest()
        if self._keys.find(digest) >= 0:
            raise ValueError(f"sample key {example.key!r} is used twice in one data set and split.")
        self._keys.add(digest)
        record = to_json(example)
        branches = len(example.branches)
        self._branches += branches
        checksum = zlib.crc32(record.encode())
        self._rows.append((example.key, record, checksum, len(example.media), branches, len(record)))
        if len(self._rows) == BATCH_SAMPLES:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [pa.array(column, type=field.type) for column, field in zip(columns, SAMPLE_SCHEMA, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=SAMPLE_SCHEMA))
            self._rows = []

    def close(self) -> dict[str, int]:
        """Finish the file; returns its counts for the manifest."""
        self._flush()
        self._writer.close()
        self.abandon()
        return {"samples": len(self._keys), "branches": self._branches}

    def abandon(self) -> None:
        """Let go of the file, whole or not."""
        self._sink.close()


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
