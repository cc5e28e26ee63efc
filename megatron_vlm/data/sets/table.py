"""All data sets by the name that mixtures use.

File names and columns were compared with what is published, set by set. What with, stands in an entry's `verified`:

    card      the data set's own page on the hub: its files, its columns
    reader    a copy of Molmo2's own readers in public repositories, as they open these files
    layout    paths of files in the repository that other public programs use
    program   files and columns as other public programs open them

An entry without it follows the releases as the design's reference describes them. No file was downloaded and read.
"""

from __future__ import annotations

import difflib

from megatron_vlm.data.sets.entry import Entry
from megatron_vlm.data.sets.evaluation import EVALUATION
from megatron_vlm.data.sets.images import IMAGES
from megatron_vlm.data.sets.tracking import TRACKING
from megatron_vlm.data.sets.videos import VIDEOS

TABLE: dict[str, Entry] = {**IMAGES, **VIDEOS, **TRACKING, **EVALUATION}


def find(name: str) -> Entry:
    """The entry of a data set. Raises ValueError, with the nearest names, where there is none."""
    if name not in TABLE:
        near = difflib.get_close_matches(name, TABLE, n=3)
        advice = f"; did you mean {', '.join(near)}?" if near else ". All names stand in megatron_vlm/data/sets/."
        raise ValueError(f"data set {name!r} is not in the table{advice}")
    return TABLE[name]
