"""Shards -> self-contained tars for other programs: `key.json` with its media `key.0.jpg`, `key.1.jpg` beside it.

A data set becomes a folder that three of them open as it is:

    out/captions/train-000000.tar        webdataset: webdataset.WebDataset("out/captions/train-{000000..000007}.tar")
    out/captions/train.json              wids: wids.ShardListDataset("out/captions/train.json")
    out/captions/train-000000.tar.idx    Megatron-Energon: get_train_dataset("out/captions", ...), whose samples are
    out/captions/.nv-meta/               crude (dictionaries of bytes); the split `validation` is called `val` there

A file that several samples show is written with each of them. bundle.py reads the tars back.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import yaml

from megatron_vlm.data.example import Example, to_json
from megatron_vlm.data.partial import partial
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tar import Member, add_member, end_tar, index_tar, sample_headers, write_offsets

#: Longest name of a member: the first field of a tar header, which is all that wids reads.
NAME_BYTES = 100
#: Energon's names of splits, where they are not ours.
ENERGON_SPLITS = {"validation": "val"}


def write(shards: Shards, dataset: str, out: Path, *, shard_bytes: int = 1 << 30) -> list[Path]:
    """Write all splits of a data set to the folder `out/DATASET`, which appears when it is whole; returns its tars.

    shard_bytes: a tar is closed when it has grown to this size. Raises ValueError where the folder exists.
    """
    folder = out / dataset
    if folder.exists():
        raise ValueError(f"{folder} exists already. Choose another directory.")
    extensions = {
        member.key: member.extension
        for name in shards.manifest["media"]["shards"]
        for member in index_tar(shards.directory / name)
    }
    with partial(folder) as unfinished:
        counts = {
            split: dict(_tars(shards, dataset, split, extensions, unfinished, shard_bytes))
            for split in shards.splits(dataset)
        }
        for split, tars in counts.items():
            _describe_to_wids(unfinished, dataset, split, tars)
        _describe_to_energon(unfinished, dataset, counts)
        os.rename(unfinished, folder)
    return [folder / name for tars in counts.values() for name in tars]


def _tars(
    shards: Shards, dataset: str, split: str, extensions: dict[str, str], folder: Path, shard_bytes: int
) -> Iterator[tuple[str, int]]:
    """Write the tars of a split and their `.idx`; (name, samples) of each."""
    samples = iter(range(shards.count(dataset, split)))
    index, number = next(samples, None), 0
    while index is not None:
        name, count = f"{split}-{number:06d}.tar", 0
        members: list[Member] = []
        with (folder / name).open("wb") as tar:
            while index is not None and tar.tell() < shard_bytes:
                example = shards.example(dataset, split, index)
                endings = [extensions[media.key] for media in example.media]
                stem = _stem(example, endings)
                members.append(add_member(tar, f"{stem}.json", to_json(example).encode()))
                for place, (media, ending) in enumerate(zip(example.media, endings, strict=True)):
                    members.append(add_member(tar, f"{stem}.{place}.{ending}", shards.media(media.key)))
                count += 1
                index = next(samples, None)
            end = end_tar(tar)
        write_offsets(folder / f"{name}.idx", sample_headers(members), end)
        yield name, count
        number += 1


def _stem(example: Example, endings: list[str]) -> str:
    """What the sample's members are called: its key, or the beginning and the hash of one that readers would not take.

    Names that begin with two underscores are skipped by webdataset and Energon. The key itself stands in the JSON.
    """
    longest = max([len(".json"), *(len(f".{place}.{ending}") for place, ending in enumerate(endings))])
    if len(example.key) + longest <= NAME_BYTES and not example.key.startswith("__"):
        return example.key
    return f"{example.key.lstrip('_/')[:40].rstrip('/')}-{hashlib.sha256(example.key.encode()).hexdigest()[:32]}"


def _describe_to_wids(folder: Path, dataset: str, split: str, tars: dict[str, int]) -> None:
    listed = [
        {"url": name, "nsamples": count, "filesize": (folder / name).stat().st_size} for name, count in tars.items()
    ]
    index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": f"{dataset}.{split}", "shardlist": listed}
    (folder / f"{split}.json").write_text(json.dumps(index, indent=1) + "\n")


def _describe_to_energon(folder: Path, dataset: str, counts: dict[str, dict[str, int]]) -> None:
    meta = folder / ".nv-meta"
    meta.mkdir()
    all_counts = {name: count for tars in counts.values() for name, count in tars.items()}
    (meta / ".info.json").write_text(json.dumps({"shard_counts": all_counts}, indent=1) + "\n")
    splits = {ENERGON_SPLITS.get(split, split): list(tars) for split, tars in counts.items()}
    (meta / "split.yaml").write_text(yaml.safe_dump({"split_parts": splits, "exclude": []}, sort_keys=False))
    definition = {
        "__module__": "megatron.energon",
        "__class__": "CrudeWebdataset",
        "subflavors": {"dataset": dataset},
    }
    (meta / "dataset.yaml").write_text(yaml.safe_dump(definition, sort_keys=False))
