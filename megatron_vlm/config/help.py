"""The text of `--help`: every setting with its default and what it means, taken from the docstrings of `schema.py`."""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

import docstring_parser
import yaml

from megatron_vlm.config.keys import field_types, words
from megatron_vlm.config.schema import Config

_WIDTH = 100
_INDENT = 6


def settings() -> str:
    """All settings by section, about 100 columns wide; ends without a newline."""
    return "\n\n".join(_section(Config(), ""))


def _section(section: Any, prefix: str) -> list[str]:
    """One block of text for the section's own settings and one for each section inside it, in order."""
    kind: type = type(section)
    docs = {param.arg_name: param.description for param in docstring_parser.parse_from_object(kind).params}
    own: list[str] = []
    inner: list[str] = []
    for name, wanted in field_types(kind).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(wanted):
            head = f"{prefix}{name}: {_flow(docs[name])}"
            blocks = _section(value, f"{prefix}{name}.")
            inner += [f"{head}\n{blocks[0]}", *blocks[1:]]
        else:
            own.append(f"  {prefix}{name}={default(value)}  ({words(wanted)})\n{_indent(docs[name])}")
    return ["\n".join(own), *inner] if own else inner


def default(value: Any) -> str:
    """A default as it would be typed on the command line: (0.9, 0.95) -> [0.9, 0.95], None -> null, '' -> ''."""
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _flow(text: str | None) -> str:
    return " ".join((text or "").split())


def _indent(text: str | None) -> str:
    margin = " " * _INDENT
    return textwrap.fill(_flow(text), width=_WIDTH, initial_indent=margin, subsequent_indent=margin)
