"""Writing shards and their index: seconds and resident memory a sample, up to a million samples.

    python benchmarks/index.py [--most 1000000]

Every sample is a caption about an image of its own. The files' bytes are made up (64 a file, 16,384 files a shard), so
what is measured is all that the writer does around them: tar headers, checksums, the index of media, the Arrow files,
the manifest. Then the shards are opened and samples read at random. Each size runs in a process of its own; memory is
what the process holds at most beyond what it held after 20,000 other samples were written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record  # noqa: E402
from megatron_vlm.data.example import Branch, Example, Media, Turn  # noqa: E402
from megatron_vlm.data.shards import Shards  # noqa: E402
from megatron_vlm.data.writer import ShardWriter  # noqa: E402

#: Of the largest size.
PARTS = (0.1, 0.3, 1.0)
READS = 20_000
#: In one tar: with its header each file takes 1,024 bytes.
FILES, WARM_UP = 16_384, 20_000


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
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print, and leave the results as they are")
    asked = parser.parse_args()
    if asked.only:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(fill(Path(folder), asked.only)))
        return
    rows = []
    for part in PARTS:
        command = [sys.executable, __file__, "--only", str(int(part * asked.most))]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(rows[-1], flush=True)
    linear = rows[-1]["microseconds a sample"] / rows[0]["microseconds a sample"]
    memory = rows[-1]["bytes of memory a sample"]
    key = {"linear": round(linear, 2), "bytes_a_sample": memory}
    summary = [
        (f"memory of building shards of {asked.most:,} samples", f"{memory} bytes a sample (asked for: 300)"),
        (f"time a sample, {asked.most:,} samples over a tenth of them (1 = linear)", f"{linear:.2f}"),
    ]
    what = "`python benchmarks/index.py`: one process; times are of the processor."
    if not asked.dry_run:
        record.write("index", what, {"rows": rows}, rows, key, summary)


if __name__ == "__main__":
    main()
