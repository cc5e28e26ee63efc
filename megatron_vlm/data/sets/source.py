"""Rows of a downloaded data set: from Parquet, Arrow, JSON, JSON lines, CSV or plain lines, a piece at a time.

A piece is what one process reads: a group of rows of a Parquet file, else a whole file. Pieces come in the order of the
files' names, rows in the files' order.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vlm.data.sets.draft import Draft
from megatron_vlm.data.sets.entry import MEDIA, Entry
from megatron_vlm.data.sets.row import Row

_CHARADES = re.compile(r"(?P<video>\S+) (?P<start>[0-9.]+) (?P<end>[0-9.]+)##(?P<caption>.+)")
#: Hosts that show a video but do not give its file.
_PLAYERS = ("youtube.com", "youtu.be")


@dataclass(frozen=True)
class Piece:
    """Part of a data set's annotations."""

    path: str
    group: int
    """Row group of a Parquet file; -1 = the whole file."""


def pieces(entry: Entry, name: str, split: str, folder: Path) -> list[Piece]:
    """All pieces of a data set's split (theirs), in a download directory.

    Raises ValueError, naming where it looked, where there is no file.
    """
    base = folder / entry.folder(name)
    found = sorted({path for pattern in entry.patterns(split) for path in base.glob(pattern) if path.is_file()})
    if not found:
        by_hand = f" By hand: {entry.by_hand}" if entry.by_hand else ""
        raise ValueError(
            f"no annotations of {name} in {base} (looked for {', '.join(entry.patterns(split))}). Get them with "
            f"tools/download_data.py --datasets {name}.{by_hand}"
        )
    result = []
    for path in found:
        groups = range(pq.ParquetFile(path).num_row_groups) if path.suffix == ".parquet" else [-1]
        result += [Piece(str(path), group) for group in groups]
    return result


def drafts(entry: Entry, piece: Piece, addresses: Mapping[str, str]) -> Iterator[tuple[str, Draft | ValueError]]:
    """(place of the row, draft) for each draft of a piece, (place, error) for a row that cannot be read."""
    for number, values in enumerate(rows(piece, entry)):
        place = f"{Path(piece.path).name}:{max(piece.group, 0)}:{number}"
        try:
            for draft in entry.family(Row(values, entry.columns), **entry.options):
                yield place, _addressed(draft, addresses)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            # KeyError and its kind: a nested value of another shape than the schema's. The row is at fault.
            yield place, error if isinstance(error, ValueError) else ValueError(f"{type(error).__name__}: {error}")


def rows(piece: Piece, entry: Entry) -> Iterator[Mapping[str, Any]]:
    """The rows of a piece. Raises ValueError where the file is not what its name says."""
    for row in _file_rows(piece, entry.within):
        if any(row.get(column) != value for column, value in entry.where.items()):
            continue
        if not entry.explode:
            yield row
            continue
        members = row.get(entry.explode) or []
        for member in members:
            yield {**{name: value for name, value in row.items() if name != entry.explode}, **member}


def addresses(entry: Entry, name: str, folder: Path) -> dict[str, str]:
    """Address of each media id. {} where the entry has no table of them."""
    if not entry.addresses:
        return {}
    path = folder / entry.folder(name) / entry.addresses
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {key: address for key, value in table.items() if (address := _download_address(value))}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no table of addresses ({error}). Download {name} again.") from error


def stored_name(url: str) -> PurePosixPath:
    """Where tools/download_data.py puts the file of an address, below the download directory."""
    digest = hashlib.sha256(url.encode()).hexdigest()
    return PurePosixPath(MEDIA, digest[:2], digest)


def _addressed(draft: Draft, table: Mapping[str, str]) -> Draft:
    if not table or all(medium.url or medium.id not in table for medium in draft.media):
        return draft
    media = tuple(replace(m, url=table[m.id]) if not m.url and m.id in table else m for m in draft.media)
    return replace(draft, media=media)


def _download_address(value: Any) -> str:
    """The first address in a value that gives a file rather than a page."""
    if isinstance(value, str):
        web = value.startswith(("http://", "https://")) and not any(host in value for host in _PLAYERS)
        return value if web else ""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return next((found for one in inner if (found := _download_address(one))), "")


def _file_rows(piece: Piece, within: str) -> Iterator[Mapping[str, Any]]:
    path = Path(piece.path)
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            for batch in file.iter_batches(batch_size=64, row_groups=[piece.group]):
                yield from batch.to_pylist()
        elif path.suffix == ".arrow":
            yield from _arrow_rows(path)
        elif path.suffix == ".jsonl":
            yield from _json_lines(path)
        elif path.suffix == ".json":
            yield from _json_rows(path, within)
        elif path.suffix in (".csv", ".tsv"):
            yield from _table_rows(path)
        elif path.suffix == ".txt":
            yield from _text_rows(path)
        else:
            raise ValueError("files read: .parquet, .arrow, .json, .jsonl, .csv, .tsv, .txt")
    except (pa.ArrowException, ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as rows ({error}).") from error


def _arrow_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with pa.memory_map(str(path)) as source:
        try:
            reader = pa.ipc.open_file(source)
            batches: Any = (reader.get_batch(number) for number in range(reader.num_record_batches))
        except pa.ArrowInvalid:
            batches = pa.ipc.open_stream(source)  # what the `datasets` library keeps in its cache
        for batch in batches:
            yield from batch.to_pylist()


def _json_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    """Objects, one a line; or lists, of which the first names the columns."""
    header: list[str] | None = None
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.strip():
                continue
            value = json.loads(line)
            if isinstance(value, list) and header is None:
                header = value
            elif isinstance(value, list) and header is not None:
                yield dict(zip(header, value, strict=True))
            else:
                yield value


def _json_rows(path: Path, within: str) -> Iterator[Mapping[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        yield from _json_lines(path)  # several sets call their lines .json
        return
    for step in filter(None, within.split(".")):
        content = content[step]
    if isinstance(content, Mapping):
        content = [{"key": key, **(value if isinstance(value, Mapping) else {"value": value})}
                   for key, value in content.items()]  # fmt: skip
    yield from content


def _table_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8", newline="") as lines:
        head = lines.readline()
        lines.seek(0)
        yield from csv.DictReader(lines, delimiter="\t" if "\t" in head else ",")


def _text_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Charades-STA's lines: `VIDEO START END##SENTENCE`."""
    with path.open(encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            match = _CHARADES.fullmatch(line.strip())
            if match is None:
                raise ValueError(f"line {line[:60]!r} is not `VIDEO START END##SENTENCE`.")
            yield match.groupdict()
