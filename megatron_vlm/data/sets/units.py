"""The parts of a build that processes do side by side: dealing rows into buckets, making the shards of one unit.

Each part appears under its final name only when it is whole; one that is there is not made again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from megatron_vlm.data.example import Media
from megatron_vlm.data.image import decode
from megatron_vlm.data.partial import partial
from megatron_vlm.data.sets import source
from megatron_vlm.data.sets.draft import Draft, Reference, from_line, to_line
from megatron_vlm.data.sets.group import trees
from megatron_vlm.data.sets.resolve import Finder, Missing, resolve
from megatron_vlm.data.sets.row import LeftOut
from megatron_vlm.data.sets.source import ForEvaluation, Piece
from megatron_vlm.data.sets.table import find
from megatron_vlm.data.writer import ShardWriter

#: Rows for which there is one bucket: the work of a process between two marks.
BUCKET_ROWS = 4096
#: Most buckets: so many files are open at a time.
MAX_BUCKETS = 512
#: File beside the shards that lists every row and sample that was left out, and why.
LEFT_OUT = "left_out.jsonl"
#: Why something is left out, by the error; `unsound` for any other.
REASONS: dict[type[ValueError], str] = {Missing: "missing", ForEvaluation: "evaluation", LeftOut: "recipe"}


@dataclass(frozen=True)
class Unit:
    """Samples that one process makes: those of `pieces`, or of one bucket of the spread pieces."""

    dataset: str
    split: str
    number: int
    pieces: tuple[Piece, ...]
    bucket: int = -1
    """-1 = the pieces were not spread."""
    buckets: int = 1


@dataclass(frozen=True)
class Places:
    """Directories of a build."""

    source: Path
    work: Path

    def spread(self, unit: Unit, piece: int) -> Path:
        return self.work / "spread" / f"{unit.dataset}.{unit.split}" / f"{piece:06d}"

    def unit(self, unit: Unit) -> Path:
        return self.work / "units" / f"{unit.dataset}.{unit.split}.{unit.number:06d}"


def units(name: str, folder: Path) -> Iterator[Unit]:
    """The parts of a data set, from the sizes of its annotation files alone."""
    entry = find(name)
    for ours, found in source.splits(entry, name, folder).items():
        pieces = tuple(found)
        if not entry.one_tree:
            yield from (Unit(name, ours, number, (piece,)) for number, piece in enumerate(pieces))
            continue
        buckets = min(max(1, sum(piece.rows for piece in pieces) // BUCKET_ROWS), MAX_BUCKETS)
        if buckets == 1:
            yield Unit(name, ours, 0, pieces)
        else:
            yield from (Unit(name, ours, number, pieces, number, buckets) for number in range(buckets))


def spread(places: Places, unit: Unit, number: int) -> None:
    """Deal the drafts of one piece into the buckets' files."""
    target = places.spread(unit, number)
    if target.is_dir():
        return
    entry = find(unit.dataset)
    context = source.context(entry, unit.dataset, places.source, find)
    with partial(target) as unfinished, ExitStack() as stack:
        streams = [stack.enter_context((unfinished / f"{n:06d}.jsonl").open("wb")) for n in range(unit.buckets)]
        for place, draft in source.drafts(entry, unit.pieces[number], context):
            bucket = 0
            try:
                if isinstance(draft, ValueError):
                    raise draft
                line = to_line(draft).encode()
                digest = hashlib.sha256(draft.identity.encode()).digest()
                bucket = int.from_bytes(digest[:8], "big") % unit.buckets
            except ValueError as error:  # of the row, or of a draft that no file can hold
                line = json.dumps({"place": place, "error": str(error), "reason": _reason(error)}).encode()
            streams[bucket].write(line + b"\n")
        stack.close()
        _settle(unfinished, target)


def _drafts(places: Places, unit: Unit) -> Iterator[tuple[str, Draft | ValueError]]:
    """The drafts of a unit, in the order of the rows."""
    entry = find(unit.dataset)
    if unit.bucket < 0:
        context = source.context(entry, unit.dataset, places.source, find)
        for piece in unit.pieces:
            yield from source.drafts(entry, piece, context)
        return
    for number in range(len(unit.pieces)):
        with (places.spread(unit, number) / f"{unit.bucket:06d}.jsonl").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("{"):
                    fault = json.loads(line)
                    kinds = {reason: kind for kind, reason in REASONS.items()}
                    yield fault["place"], kinds.get(fault["reason"], ValueError)(fault["error"])
                else:
                    yield "", from_line(line)


def build_unit(places: Places, unit: Unit) -> None:
    """Make the small directory of shards of a unit."""
    target = places.unit(unit)
    if target.is_dir():
        return
    entry = find(unit.dataset)
    finder = Finder(places.source, entry.media_folder(unit.dataset))
    left_out: list[dict[str, str]] = []

    def leave_out(where: str, error: ValueError) -> None:
        left_out.append({"dataset": unit.dataset, "split": unit.split, "where": where, "reason": _reason(error),
                         "error": str(error)})  # fmt: skip

    sound: list[Draft] = []
    for place, draft in _drafts(places, unit):
        if isinstance(draft, ValueError):
            leave_out(place, draft)
        else:
            sound.append(draft)
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    try:
        with ShardWriter(target) as writer:

            def add(reference: Reference) -> Media:
                data = finder.read(reference)
                if reference.kind == "video":
                    return writer.add_video(data)
                decode(data, name=reference.url or reference.path or reference.identity[:12])
                return writer.add_image(data)

            for key, draft in trees(sound, chat_share=entry.chat_share):
                try:
                    writer.add(
                        resolve(key, draft, add, finder.beside),
                        unit.dataset,
                        "test" if entry.evaluation_only else unit.split,
                    )
                    count += 1
                except ValueError as error:
                    leave_out(key, error)
            writer.add_file(LEFT_OUT, lines(left_out))
            if not count:
                raise _Empty
    except _Empty:
        with partial(target) as unfinished:
            (unfinished / LEFT_OUT).write_bytes(lines(left_out))
            _settle(unfinished, target)


def _settle(unfinished: Path, target: Path) -> None:
    try:
        unfinished.rename(target)
    except OSError:  # another process made the same part first
        if not target.is_dir():
            raise


def _reason(error: ValueError) -> str:
    return REASONS.get(type(error), "unsound")


class _Empty(Exception):
    """A unit without a sound sample."""


def lines(records: list[dict[str, str]]) -> bytes:
    """Records as JSON, one a line. Half of a surrogate pair is written as an escape."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return text.encode(errors="backslashreplace")
