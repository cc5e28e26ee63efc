"""Writing shards and their index: seconds and resident memory a sample, up to a million samples.

    python benchmarks/index.py [--most 1000000] [--workers 2]

Every sample is a caption about an image of its own.
One process: the files' bytes are made up (64 a file, 16,384 files a shard), so what is measured is all that the writer
does around them: tar headers, checksums, the index of media, the Arrow files, the manifest. Then the shards are opened
and samples read at random.
Several: what tools/build_shards.py does with a downloaded data set (data.sets.build) whose Parquet file holds the
images, 28 x 28 pixels: rows read and dealt out, images decoded and checked, the parts merged.
Each size runs in a process of its own; memory is what the process holds at most beyond what it held after 20,000 other
samples were written. Several processes: what the first one holds and what the others hold together, each at its most,
as if that were at one time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record  # noqa: E402
from megatron_vlm.data.example import Branch, Example, Media, Turn  # noqa: E402
from megatron_vlm.data.sets.build import build  # noqa: E402
from megatron_vlm.data.sets.table import find  # noqa: E402
from megatron_vlm.data.shards import Shards  # noqa: E402
from megatron_vlm.data.writer import ShardWriter  # noqa: E402

#: Of the largest size.
PARTS = (0.1, 0.3, 1.0)
READS = 20_000
#: In one tar: with its header each file takes 1,024 bytes.
FILES, WARM_UP = 16_384, 20_000
#: A data set of captions, and rows in a row group of its file.
DATASET, GROUP = "pixmo_cap", 16_384
#: Seconds between two looks at the memory of other processes.
LOOK_S = 0.05


def resident() -> int:
    """Most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write(folder: Path, samples: int) -> None:
    """A directory of shards."""
    with ShardWriter(folder, shard_bytes=FILES * 1024) as writer:
        for number in range(samples):
            data = hashlib.sha256(str(number).encode()).hexdigest().encode()
            media = Media(hashlib.sha256(data).hexdigest(), 640, 480)
            writer.add_checked(media, "jpg", data, None)
            caption = Branch("long_caption", (Turn("", f"Picture {number} shows a red cup on a table."),))
            writer.add(Example(f"{number:08d}", (caption,), (media,)), "captions", "train")


def picture(number: int) -> bytes:
    """A PNG file of 28 x 28 pixels of one colour, another one for each number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    lines = (b"\0" + number.to_bytes(3, "big") * 28) * 28
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 28, 28, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines, 1)) + chunk(b"IEND", b"")


def download(folder: Path, samples: int) -> None:
    """The download directory of a data set with so many rows."""
    entry = find(DATASET)
    path = folder / entry.folder(DATASET) / entry.patterns("train")[0].replace("*", "0")
    path.parent.mkdir(parents=True)
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, samples, GROUP):
            numbers = range(first, min(samples, first + GROUP))
            captions = [f"Picture {number} shows a red cup on a table." for number in numbers]
            writer.write_table(pa.table([list(map(picture, numbers)), captions], schema))


def build_from(folder: Path, samples: int, workers: int) -> dict[str, Any]:
    """Build shards of so many rows with so many processes beside the first one."""

    def spent() -> float:
        return sum(os.times()[:4])

    most: list[int] = []
    for name, count in (("warm up", WARM_UP), ("shards", samples)):
        download(folder / f"{name} rows", count)
        before, began, clock = resident(), spent(), time.perf_counter()
        with Others() as others:
            made = build([DATASET], folder / f"{name} rows", folder / name, workers=workers)
        assert made.samples[DATASET] == count and not made.left_out
        most.append(others.most)
    first, rest = resident() - before, max(0, most[1] - most[0])
    return {
        "samples": samples,
        "processes": 1 + workers,
        "microseconds a sample": round((spent() - began) / samples * 1e6, 1),
        "bytes of memory a sample": round((first + rest) / samples),
        "of them the others'": round(rest / samples),
        "seconds": round(time.perf_counter() - clock, 1),
    }


class Others:
    """What the processes that this one started hold together at most, while a block runs."""

    def __init__(self) -> None:
        self.most = 0
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look)

    def __enter__(self) -> Others:
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._watch.join()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            held = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    held += process.memory_info().rss
            self.most = max(self.most, held)


def fill(folder: Path, samples: int) -> dict[str, Any]:
    """Write so many samples, open them and read some."""
    write(folder / "warm up", WARM_UP)
    before, began = resident(), time.process_time()
    write(folder / "shards", samples)
    written, held = time.process_time(), resident() - before
    shards = Shards(folder / "shards")
    opened = time.process_time()
    places = random.Random(0).choices(range(samples), k=READS)
    for place in places:
        shards.media(shards.example("captions", "train", place).media[0].key)
    return {
        "samples": samples,
        "microseconds a sample": round((written - began) / samples * 1e6, 1),
        "bytes of memory a sample": round(held / samples),
        "seconds to open": round(opened - written, 2),
        "microseconds a random read": round((time.process_time() - opened) / READS * 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=1_000_000, help="samples (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that build (default: %(default)s; 0: none)")
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the results as they are")
    asked = parser.parse_args()
    if asked.only:
        with tempfile.TemporaryDirectory() as folder:
            made = (
                build_from(Path(folder), asked.only, asked.workers) if asked.workers else fill(Path(folder), asked.only)
            )
            print(json.dumps(made))
        return
    rows, key = {}, {}
    summary = []
    for workers in sorted({0, asked.workers}):
        found = rows[workers] = []
        for part in PARTS:
            command = [sys.executable, __file__, "--only", str(int(part * asked.most)), "--workers", str(workers)]
            found.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout))
            print(found[-1], flush=True)
        linear = found[-1]["microseconds a sample"] / found[0]["microseconds a sample"]
        memory = found[-1]["bytes of memory a sample"]
        sign, named = (f"_{1 + workers}", f", {1 + workers} processes together") if workers else ("", ", one process")
        key |= {f"linear{sign}": round(linear, 2), f"bytes_a_sample{sign}": memory}
        summary += [
            (f"memory of building shards of {asked.most:,} samples{named}", f"{memory} bytes each (asked for: 300)"),
            (f"time a sample, {asked.most:,} over a tenth of them (1 = linear){named}", f"{linear:.2f}"),
        ]
    what = "`python benchmarks/index.py`: times are of the processor, of all processes."
    if asked.workers:
        what += f"\n\nSeveral processes:\n\n{record.table(rows[asked.workers])}\n\nOne process:"
    if not asked.dry_run:
        record.write("index", what, {"rows": rows[0], "parallel": rows.get(asked.workers)}, rows[0], key, summary)


if __name__ == "__main__":
    main()
