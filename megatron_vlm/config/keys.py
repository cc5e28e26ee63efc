"""The settings as a flat table: dotted name, type, default; read from the dataclasses of `schema.py`."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from megatron_vlm.config.schema import Config


@dataclass(frozen=True)
class Key:
    """One setting."""

    name: str
    """Dotted name, as on the command line."""
    type: Any
    """Its type, resolved: float, tuple[int, ...], tuple[int, ...] | None, ..."""
    default: Any
    """Value where no recipe sets it."""
    section: type
    """The dataclass that holds it."""


@cache
def field_types(section: type) -> dict[str, Any]:
    """Name -> resolved type of a section's fields, in order. A field whose type is a dataclass is a section itself."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section)}


@cache
def keys() -> dict[str, Key]:
    """Every setting by dotted name, in the order of `schema.py`."""
    return {key.name: key for key in _walk(Config(), "")}


def _walk(section: Any, prefix: str) -> Iterator[Key]:
    kind: type = type(section)
    for name, wanted in field_types(kind).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(wanted):
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", wanted, value, kind)


_WORDS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("text", "texts"),
}


def words(wanted: Any) -> str:
    """A type in plain words: `float` -> a number, `tuple[int, ...]` -> a list of whole numbers."""
    if wanted in _WORDS:
        return _WORDS[wanted][0]
    parts = typing.get_args(wanted)
    if isinstance(wanted, types.UnionType) or typing.get_origin(wanted) is typing.Union:
        return " or ".join("null" if part is type(None) else words(part) for part in parts)
    if typing.get_origin(wanted) is tuple:
        count = "" if parts[-1] is Ellipsis else f"{len(parts)} "
        return f"a list of {count}{_WORDS[parts[0]][1]}"
    return str(wanted)
