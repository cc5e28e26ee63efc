"""Downloaded data sets -> one directory of shards, by several processes, gone on with after a stop.

1. Spread: rows of a large data set whose samples are made of several rows are dealt into buckets by their media.
2. Units: each bucket (or piece of a file) becomes a small directory of shards of its own: read, decoded, checked.
3. Merge: one process copies the units' files into the final shards, each file once, in the order of the units.

What 1 and 2 have finished lies in OUT.work/, each step under its final name only when it is whole; a build that is
started again goes on from there. Equal input gives equal bytes, whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_vlm.data.digests import Digests
from megatron_vlm.data.example import Example, Media
from megatron_vlm.data.parent import end_with_parent
from megatron_vlm.data.sets.table import find
from megatron_vlm.data.sets.units import LEFT_OUT, Places, Unit, build_unit, lines, spread, units
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tar import index_tar
from megatron_vlm.data.writer import ShardWriter

#: File beside the shards that says what they were made of.
RECIPE = "build.json"
#: Reasons that tell nothing against a data set: they do not count towards the share that may be left out.
EXPECTED = ("duplicate", "evaluation", "recipe")
_DIGEST = 16


@dataclass
class Result:
    """What a build made."""

    samples: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, Counter[str]] = field(default_factory=dict)
    """Data set -> reason (missing, unsound, evaluation, recipe, duplicate) -> rows or samples."""
    is_new: bool = True
    """False where the shards were there already."""


def build(
    names: Iterable[str],
    folder: Path,
    out: Path,
    *,
    workers: int = 1,
    shard_bytes: int = 1 << 30,
    max_left_out: float = 0.2,
    held_out: Callable[[str], bool] = lambda _: False,
    held_out_share: float = 0.0,
    overwrite: bool = False,
    files: dict[str, bytes] | None = None,
) -> Result:
    """Make shards of data sets of the table from a download directory.

    max_left_out: largest share of a data set that may be left out; above it nothing is written.
    held_out:     whether a key of `train` goes to `validation`. held_out_share: what it means, for the recipe.
    files:        further files to put beside the shards.
    Raises ValueError for unknown data sets, missing annotations, too much left out, or work of another build.
    """
    names = list(names)
    parts = [unit for name in names for unit in units(name, folder)]
    recipe = _recipe(names, parts, shard_bytes, held_out_share, times=False)
    if (out / RECIPE).is_file() and (out / RECIPE).read_bytes() == recipe and not overwrite:
        return Result(Counter({n: sum(Shards(out).count(n, s) for s in Shards(out).splits(n)) for n in names}),
                      is_new=False)  # fmt: skip
    if out.exists() and not overwrite:
        raise ValueError(f"{out} exists already and was made of something else. Choose another --out, or --overwrite.")
    places = Places(folder, out.with_name(f"{out.name}.work"))
    _claim(places.work, _recipe(names, parts, shard_bytes, held_out_share, times=True))
    _run([(places, unit, number) for unit in parts if unit.bucket == 0 for number in range(len(unit.pieces))],
         spread, workers, "rows")  # fmt: skip
    _run([(places, unit) for unit in parts], build_unit, workers, "samples")
    try:
        result = _merge(parts, places, out, recipe, shard_bytes, max_left_out, held_out, overwrite, files or {})
    except ValueError:
        _forget_missing(parts, places)
        raise
    shutil.rmtree(places.work)
    return result


def _recipe(names: list[str], parts: list[Unit], shard_bytes: int, held_out: float, *, times: bool) -> bytes:
    """What the shards are made of, as JSON: equal for equal input. times: tell files apart by their times too."""
    sets: dict[str, Any] = {}
    for name in names:
        entry = find(name)
        files = sorted({piece.path for unit in parts if unit.dataset == name for piece in unit.pieces})
        sets[name] = {
            "family": entry.family.__name__,
            "columns": dict(entry.columns),
            "options": repr(dict(entry.options)),
            "files": [[Path(p).name, (s := Path(p).stat()).st_size, s.st_mtime_ns if times else 0] for p in files],
        }
    content: dict[str, Any] = {"datasets": sets, "shard_bytes": shard_bytes, "held_out": held_out}
    if times:
        content["paths"] = sorted({piece.path for unit in parts for piece in unit.pieces})
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _claim(work: Path, recipe: bytes) -> None:
    """Make the directory of work, or go on with one of the same build."""
    mark = work / RECIPE
    if mark.is_file() and mark.read_bytes() != recipe:
        raise ValueError(
            f"{work} holds the work of another build: other data sets, settings or annotation files. Remove it, or "
            "choose another --out."
        )
    work.mkdir(parents=True, exist_ok=True)
    partial = work / f"{RECIPE}.partial"
    partial.write_bytes(recipe)
    partial.replace(mark)


def _run(tasks: list[tuple[Any, ...]], function: Callable[..., None], workers: int, unit: str) -> None:
    """Do all tasks; in this process where there is one worker."""
    bar = tqdm(total=len(tasks), desc=unit, unit=" parts", disable=None)
    with bar:
        if workers == 1 or len(tasks) < 2:
            for task in tasks:
                function(*task)
                bar.update()
            return
        # Not forked: Arrow and the decoders have threads of their own.
        context = multiprocessing.get_context("spawn")
        # Nobody may work on the parts of a build that was killed: the next one makes them.
        with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=end_with_parent) as pool:
            futures = [pool.submit(function, *task) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BrokenProcessPool as error:
                raise ValueError(
                    f"a process ended while it made {unit}: killed for its memory, or by a decoder. What was finished "
                    "is kept. Try again with fewer --workers."
                ) from error
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _merge(
    parts: list[Unit],
    places: Places,
    out: Path,
    recipe: bytes,
    shard_bytes: int,
    max_left_out: float,
    held_out: Callable[[str], bool],
    overwrite: bool,
    files: dict[str, bytes],
) -> Result:
    result, left_out = Result(), []
    for unit in parts:
        for line in (places.unit(unit) / LEFT_OUT).read_text(encoding="utf-8").splitlines():
            left_out.append(json.loads(line))
    used: dict[tuple[str, str], _Used] = {}
    with ShardWriter(out, shard_bytes=shard_bytes, overwrite=overwrite) as writer:
        for unit in tqdm(parts, desc="merge", unit=" parts", disable=None):
            if not (places.unit(unit) / "manifest.json").is_file():
                continue
            shards = Shards(places.unit(unit))
            taken: list[tuple[Example, str]] = []
            for split in shards.splits(unit.dataset):
                keys = used.setdefault((unit.dataset, split), _Used())
                for index in range(shards.count(unit.dataset, split)):
                    example = _renamed(shards.example(unit.dataset, split, index), keys)
                    if example is None:
                        key = shards.keys(unit.dataset, split)[index]
                        left_out.append({"dataset": unit.dataset, "split": split, "where": key, "reason": "duplicate",
                                         "error": "it stands in the data set twice, word for word."})  # fmt: skip
                        continue
                    taken.append((example, "validation" if split == "train" and held_out(example.key) else split))
            _copy_media(shards, {media.key: media for example, _ in taken for media in example.media}, writer)
            for example, split in taken:
                writer.add(example, unit.dataset, split)
                result.samples[unit.dataset] += 1
        for entry in left_out:
            result.left_out.setdefault(entry["dataset"], Counter())[entry["reason"]] += 1
        _check_left_out(result, left_out, max_left_out)
        writer.add_file(LEFT_OUT, lines(left_out))
        writer.add_file(RECIPE, recipe)
        for name, data in files.items():
            writer.add_file(name, data)
    return result


class _Used:
    """The keys of a split and what their samples hold, as digests: a dict takes 8 times the memory."""

    def __init__(self) -> None:
        self._keys = Digests(_DIGEST)
        self._contents = bytearray()

    def content(self, key: str) -> bytes | None:
        """What the sample of a key holds; None where the key is free."""
        row = self._keys.find(_digest(key))
        return None if row < 0 else bytes(self._contents[row * _DIGEST : (row + 1) * _DIGEST])

    def add(self, key: str, content: bytes) -> None:
        self._keys.add(_digest(key))
        self._contents += content


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST).digest()


def _renamed(example: Example, used: _Used) -> Example | None:
    """The sample, under another key where its own is used; None where it was there before. Keeps account in `used`."""
    content = _digest(repr((example.branches, example.media, example.clip)))
    key, number = example.key, 1
    while (known := used.content(key)) is not None:
        if known == content:
            return None
        number += 1
        key = f"{example.key}_{number}"
    used.add(key, content)
    return replace(example, key=key)


def _copy_media(shards: Shards, wanted: dict[str, Media], writer: ShardWriter) -> None:
    """The wanted files of a unit, in the order of its tars."""
    for name in shards.manifest["media"]["shards"]:
        with (shards.directory / name).open("rb") as tar:
            for member in index_tar(shards.directory / name):
                if member.key in wanted:
                    media = wanted[member.key]
                    tar.seek(member.offset)
                    timeline = shards.timeline(media.key).pack() if media.kind == "video" else None
                    writer.add_checked(media, member.extension, tar.read(member.size), timeline)


def _forget_missing(parts: list[Unit], places: Places) -> None:
    """Drop the units that missed files, so that the next try looks for the files again."""
    for unit in parts:
        if b'"reason": "missing"' in (places.unit(unit) / LEFT_OUT).read_bytes():
            shutil.rmtree(places.unit(unit))


def _check_left_out(result: Result, left_out: list[dict[str, str]], allowed: float) -> None:
    for dataset, reasons in result.left_out.items():
        bad = sum(count for reason, count in reasons.items() if reason not in EXPECTED)
        share = bad / (bad + result.samples[dataset])
        if share > allowed:
            shown = [f"{one['where']}: {one['error']}" for one in left_out if one["dataset"] == dataset][:3]
            raise ValueError(
                f"{dataset}: {bad} of {bad + result.samples[dataset]} rows or samples ({share:.0%}) cannot be used; "
                f"--max-left-out allows {allowed:.0%}. The first of them:\n" + "\n".join(shown)
            )
