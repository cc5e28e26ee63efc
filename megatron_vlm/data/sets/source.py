"""Rows of a downloaded data set: from Parquet, Arrow, JSON, JSON lines, CSV or plain lines, a piece at a time.

A piece is what one process reads: a group of rows of a Parquet file, else a whole file. Pieces come in the order of the
files' names, rows in the files' order.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vlm.data.sets.draft import Draft
from megatron_vlm.data.sets.entry import MEDIA, Entry
from megatron_vlm.data.sets.row import LeftOut, Row

_CHARADES = re.compile(r"(?P<video>\S+) (?P<start>[0-9.]+) (?P<end>[0-9.]+)##(?P<caption>.+)")
#: A row of JSON or CSV, about.
_ROW_BYTES = 500
#: Hosts that show a video but do not give its file.
_PLAYERS = ("youtube.com", "youtu.be")


@dataclass(frozen=True)
class Piece:
    """Part of a data set's annotations."""

    path: str
    group: int
    """Row group of a Parquet file; -1 = the whole file."""
    rows: int
    """How many; an estimate but for Parquet."""


def splits(entry: Entry, name: str, folder: Path) -> dict[str, list[Piece]]:
    """Our split -> its pieces, in a download directory. Splits without a file are not there.

    Raises ValueError, naming where it looked, where no split has one.
    """
    found = {ours: pieces for ours, theirs in entry.splits.items() if (pieces := _pieces(entry, name, theirs, folder))}
    if not found:
        base, looked = (
            folder / entry.folder(name),
            [p for split in entry.splits.values() for p in entry.patterns(split)],
        )
        by_hand = f" By hand: {entry.by_hand}" if entry.by_hand else ""
        raise ValueError(
            f"no annotations of {name} in {base} (looked for {', '.join(looked)}). Get them with "
            f"tools/download_data.py --datasets {name}.{by_hand}"
        )
    return found


def _pieces(entry: Entry, name: str, split: str, folder: Path) -> list[Piece]:
    base = folder / entry.folder(name)
    found = sorted({path for pattern in entry.patterns(split) for path in base.glob(pattern) if path.is_file()})
    result = []
    for path in found:
        if path.suffix != ".parquet":
            result.append(Piece(str(path), -1, path.stat().st_size // _ROW_BYTES))
            continue
        try:
            about = pq.ParquetFile(path).metadata
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is not a whole Parquet file ({error}). Download {name} again.") from error
        result += [Piece(str(path), group, about.row_group(group).num_rows) for group in range(about.num_row_groups)]
    return result


class ForEvaluation(LeftOut):
    """A row about media that a data set for evaluation holds."""


@dataclass(frozen=True)
class Context:
    """What drafts need beside the rows of their own data set."""

    addresses: Mapping[str, str] = field(default_factory=dict)
    """Media id -> address."""
    barred: frozenset[str] = frozenset()
    """Addresses of media that are kept for evaluation."""


def drafts(entry: Entry, piece: Piece, context: Context) -> Iterator[tuple[str, Draft | ValueError]]:
    """(place of the row, draft) for each draft of a piece, (place, error) for a row that cannot be used: LeftOut where
    the recipe does not want it."""
    for number, values in enumerate(rows(piece, entry)):
        place = f"{Path(piece.path).name}:{max(piece.group, 0)}:{number}"
        for draft in read_row(entry, values, context):
            yield place, draft


def read_row(entry: Entry, values: Mapping[str, Any] | ValueError, context: Context) -> Iterator[Draft | ValueError]:
    """The drafts of one row of `rows`, and its error where it cannot be used."""
    try:
        if isinstance(values, ValueError):
            raise values
        for draft in entry.family(Row(values, entry.columns), **entry.options):
            draft = _addressed(draft, context.addresses)
            barred = [medium.url for medium in draft.media if medium.url in context.barred]
            yield ForEvaluation(f"{barred[0]} is kept for evaluation.") if barred else draft
    except ValueError as error:
        yield error
    except Exception as error:  # a nested value of another shape than the schema's: the row is at fault
        yield ValueError(f"{type(error).__name__}: {error}")


def rows(piece: Piece, entry: Entry) -> Iterator[Mapping[str, Any] | ValueError]:
    """The rows of a piece that the entry selects; an error for one that has no such form.

    Raises ValueError where the file is not what its name says.
    """
    table, shared, column = _joined(entry, piece)
    for row in _file_rows(piece, entry):
        if not isinstance(row, Mapping):
            yield ValueError(f"a row is {str(row)[:60]!r}; needed an object.")
            continue
        if any(row.get(name) not in (value if isinstance(value, tuple) else (value,))
               for name, value in entry.where.items()):  # fmt: skip
            continue
        if table:
            known = row.get(shared)
            row = {**row, column: table.get(known) if isinstance(known, (str, int)) else None}
        if entry.explode not in row:  # a set that has both forms, or a row of another schema: the family says which
            yield row
            continue
        members = row[entry.explode]
        if not isinstance(members, list) or not all(isinstance(member, Mapping) for member in members):
            yield Row(row).bad(entry.explode, members, "a list of objects")
            continue
        for member in members:
            yield {**{name: value for name, value in row.items() if name != entry.explode}, **member}


def context(entry: Entry, name: str, folder: Path, find: Callable[[str], Entry]) -> Context:
    """What the drafts of a data set need, from a download directory. find: entries by name.

    Raises ValueError where a table of addresses is none, or the data set for evaluation is not there.
    """
    barred: set[str] = set()
    if entry.without:
        other = find(entry.without)
        for pieces in splits(other, entry.without, folder).values():
            for piece in pieces:
                found = (draft for _, draft in drafts(other, piece, Context()))
                barred.update(medium.url for draft in found if isinstance(draft, Draft) for medium in draft.media)
    return Context(_addresses(entry, name, folder), frozenset(barred - {""}))


def _addresses(entry: Entry, name: str, folder: Path) -> dict[str, str]:
    """Address of each media id. {} where there is no table of them: then the files are got by hand."""
    path = folder / entry.folder(name) / entry.addresses
    if not entry.addresses or not path.is_file():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        return {key: address for key, value in table.items() if (address := _download_address(value))}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
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


def _joined(entry: Entry, piece: Piece) -> tuple[dict[Any, Any], str, str]:
    """What the other file of `entry.joined` says for each value of the shared column; {} without one."""
    if entry.joined is None:
        return {}, "", ""
    name, shared, column = entry.joined
    path = Path(piece.path).with_name(name)
    if not path.is_file():
        raise ValueError(f"{path} is not there: it holds the column {column!r} of {Path(piece.path).name}.")
    try:
        return {row[shared]: row.get(column) for row in _json_lines(path)}, shared, column
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has rows without {shared!r} ({type(error).__name__}: {error}).") from error


def _file_rows(piece: Piece, entry: Entry) -> Iterator[Any]:
    """What stands in the file row by row: objects, if it is sound."""
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
            yield from _json_rows(path, entry.within)
        elif path.suffix in (".csv", ".tsv"):
            yield from _table_rows(path, entry.header)
        elif path.suffix == ".txt":
            yield from _text_rows(path)
        else:
            raise ValueError("files read: .parquet, .arrow, .json, .jsonl, .csv, .tsv, .txt")
    except (pa.ArrowException, OSError, ValueError, TypeError, csv.Error, RecursionError) as error:
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
        if not isinstance(content, Mapping) or step not in content:
            raise ValueError(f"it has no {within!r}, where the rows should be.")
        content = content[step]
    if isinstance(content, Mapping):
        content = [{"key": key, **(value if isinstance(value, Mapping) else {"value": value})}
                   for key, value in content.items()]  # fmt: skip
    if not isinstance(content, list):
        raise ValueError(f"it holds a {type(content).__name__}; needed a list or an object of rows.")
    yield from content


def _table_rows(path: Path, header: tuple[str, ...]) -> Iterator[Mapping[str, Any]]:
    with path.open(encoding="utf-8", newline="") as lines:
        head = lines.readline()
        lines.seek(0)
        yield from csv.DictReader(lines, header or None, delimiter="\t" if "\t" in head else ",")


def _text_rows(path: Path) -> Iterator[Mapping[str, Any]]:
    """Charades-STA's lines: `VIDEO START END##SENTENCE`."""
    with path.open(encoding="utf-8") as lines:
        for line in filter(str.strip, lines):
            match = _CHARADES.fullmatch(line.strip())
            if match is None:
                raise ValueError(f"line {line[:60]!r} is not `VIDEO START END##SENTENCE`.")
            yield match.groupdict()
