"""Cases with the values that independent implementations gave, committed with their origin: reference_cases.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def cases(name: str) -> list[Any]:
    """hota, jf, anls or vqa."""
    return json.loads(Path(__file__).with_name("reference_cases.json").read_text(encoding="utf-8"))[name]["cases"]
