"""Lengths of time as a person writes them."""

from __future__ import annotations

import re

_CLOCK = re.compile(r"(?:(\d+)-)?(\d+):([0-5]\d):([0-5]\d)")
_MINUTES = re.compile(r"\d+(?:\.\d+)?")


def seconds(text: str) -> float:
    """Seconds in `90` (minutes), `01:30:00` (HH:MM:SS) or `1-12:00:00` (with days). Raises ValueError otherwise."""
    if match := _CLOCK.fullmatch(text.strip()):
        days, hours, minutes, rest = (int(part or 0) for part in match.groups())
        return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)
    if _MINUTES.fullmatch(text.strip()):
        return float(text) * 60
    raise ValueError(f"{text!r} is no length of time; write minutes (90), HH:MM:SS (01:30:00) or days-HH:MM:SS.")
