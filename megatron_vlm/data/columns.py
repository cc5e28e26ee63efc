"""Arrow files mapped into memory, checked when they are opened: a flipped byte, or a stranger's file, in which a value
lies outside of it would end the process when that value is read, without a word.

Of the contents only the ends of the texts are looked at (4 bytes a row): opening stays cheap.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa


def mapped(path: Path, schema: pa.Schema, optional: Iterable[pa.Field] = ()) -> pa.Table:
    """The table of a file, whose columns are those of the schema, without nulls, and maybe the optional ones.

    Raises ValueError for any other, and for a file that is damaged or compressed.
    """
    whole = _mapping(path)
    try:
        reader = pa.ipc.open_file(pa.BufferReader(whole))
        _check_columns(reader.schema, schema, tuple(optional))
        batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        for batch in batches:
            check(batch, whole)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a whole Arrow file of its kind ({error}). Build the shards anew.") from error
    table = pa.Table.from_batches(batches, reader.schema)
    for field in schema:
        if table.column(field.name).null_count:
            raise ValueError(f"{path}: column {field.name!r} lacks values. Build the shards anew.")
    return table


def check(batch: pa.RecordBatch, whole: pa.Buffer) -> None:
    """Raise ValueError where a value of the batch lies outside the file, or where its columns are not flat."""
    start, end = whole.address, whole.address + whole.size
    for field, column in zip(batch.schema, batch.columns, strict=True):
        if pa.types.is_nested(field.type) or pa.types.is_dictionary(field.type):
            raise ValueError(f"column {field.name!r} is {field.type}")
        for buffer in column.buffers():
            if (
                buffer is not None
                and buffer.size
                and not start <= buffer.address <= buffer.address + buffer.size <= end
            ):
                raise ValueError(f"column {field.name!r} is compressed, or lies outside the file")
        column.validate()
        if len(column) and (pa.types.is_string(field.type) or pa.types.is_binary(field.type)):
            ends = np.frombuffer(column.buffers()[1], dtype="<i4")[column.offset :][: len(column) + 1]
            if (np.diff(ends) < 0).any():
                raise ValueError(f"column {field.name!r} has a text that ends before it begins")


def _mapping(path: Path) -> pa.Buffer:
    try:
        with pa.memory_map(str(path)) as source:
            return source.read_buffer()
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be opened ({error}).") from error


def _check_columns(found: pa.Schema, needed: pa.Schema, optional: tuple[pa.Field, ...]) -> None:
    allowed = {field.name: field.type for field in (*needed, *optional)}
    names = found.names
    for field in found:
        if allowed.get(field.name) != field.type or names.count(field.name) > 1:
            raise ValueError(f"column {field.name!r} is {field.type}; known are {', '.join(allowed)}")
    if missing := [name for name in needed.names if name not in names]:
        raise ValueError(f"it has no column {', '.join(missing)}")
