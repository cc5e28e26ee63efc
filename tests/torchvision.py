"""torchvision beside a CPU build of torch, so that transformers' vision models and processors can be imported."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path

import torch


@cache
def declare_operators() -> torch.library.Library:
    """Call before the first import of transformers.

    torchvision describes operators that only its compiled part declares, and that part is not loaded beside a CPU torch
    of another build: declare them without an implementation, so that its import passes. The declarations live as long
    as the returned object, which the cache keeps.
    """
    folder = Path(importlib.util.find_spec("torchvision").submodule_search_locations[0])
    text = (folder / "_meta_registrations.py").read_text()
    names = set(re.findall(r"torchvision::(\w+)", text)) | set(re.findall(r"register_meta\(\"(\w+)\"\)", text))
    library = torch.library.Library("torchvision", "DEF")
    for name in sorted(names):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor a) -> Tensor")
    return library
