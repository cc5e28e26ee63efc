"""What the table says about one data set, and how to add another.

A data set is a few lines: the family that reads its rows (captions.py, questions.py, conversations.py, places.py,
tracks.py), where its annotations are published, and its names for the columns that the family asks for. For example

    "bird_qa": Entry(
        questions,                                          # one question about an image, with or without options
        hub="someone/bird-qa", config="large",              # annotations: large/train-*.parquet of that repository
        columns={"answer": "labels", "image_url": "url"},   # the family's name -> the column; others keep their names
        options={"style": "bird_qa"},                       # the family's further arguments
    ),

in images.py, videos.py or tracking.py; `bird_qa` can stand in a mixture from then on. `python tools/download_data.py
--datasets bird_qa` gets annotations and images, `python tools/build_shards.py dataset bird_qa ...` makes shards. A test
reads three rows of every entry: give it yours in tests/data/sets/published.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from megatron_vlm.data.sets.draft import Draft

#: Folders below the download directory: annotations by repository, media by the hash of their address, and by hand.
ANNOTATIONS, MEDIA, FILES = "annotations", "media", "files"


@dataclass(frozen=True)
class Entry:
    """One data set: how its rows are read and where they are from."""

    family: Callable[..., Iterator[Draft]]
    """Makes drafts of one row."""
    hub: str = ""
    """Repository of data sets on the hub, `owner/name`. "" = the annotations are got by hand."""
    config: str = ""
    """Its configuration: the folder of its Parquet files."""
    files: tuple[str, ...] = ()
    """Patterns of the annotation files, `{split}` for the split. () = the usual places of a configuration's files."""
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train"})
    """Our split -> theirs."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """The family's name of a column -> theirs, or a path into nested values (`video.name`). `-` hides one of theirs."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the family."""
    within: str = ""
    """Where the rows lie in a JSON file: `data`, `database`. An object: a row for each member, its name in `key`."""
    explode: str = ""
    """Column that holds lists of objects: each becomes a row, beside the columns of the row that held it."""
    where: Mapping[str, Any] = field(default_factory=dict)
    """Only rows whose columns (their names) have these values, or one of them where a tuple is given."""
    header: tuple[str, ...] = ()
    """Names of the columns of a CSV file that has no line of names."""
    joined: tuple[str, str, str] | None = None
    """Further column from another file beside the annotations: (JSON lines file, column that both have, column)."""
    one_tree: bool = True
    """Rows about the same media (and clip) are one sample. False where every row has media of its own: cheaper."""
    chat_share: float = 0.0
    """Share of the samples with several branches that become one conversation instead."""
    media: str = ""
    """Folder of the files that rows name by path. "" = the data set's name."""
    addresses: str = ""
    """JSON file beside the annotations that gives the address of each media id."""
    by_hand: str = ""
    """What a person has to get, and where: files that need a licence, or are published in archives."""
    verified: str = ""
    """What file names and columns were compared with, besides the design's reference: see VERIFIED in table.py."""
    unverified: str = ""
    """What was not checked against the published files when this entry was written."""
    without: str = ""
    """Data set for evaluation whose media are left out here."""
    evaluation_only: bool = False
    """Never trained on; build_shards puts it into the split `test`."""

    def patterns(self, split: str) -> tuple[str, ...]:
        """Patterns of the files of their `split`, relative to the repository."""
        if self.files:
            return tuple(pattern.format(split=split) for pattern in self.files)
        folder = f"{self.config}/" if self.config else ""
        places = [f"{folder}{split}-*.parquet", f"{folder}{split}/*.parquet"]
        if not self.config:
            places.append(f"data/{split}-*.parquet")
        return tuple(places)

    def folder(self, name: str) -> PurePosixPath:
        """Of the annotations, below the download directory. name: the data set's."""
        return PurePosixPath(ANNOTATIONS, self.hub.replace("/", "--") or name)

    def media_folder(self, name: str) -> PurePosixPath:
        """Of media that rows name by path, below the download directory."""
        return PurePosixPath(FILES, self.media or name)
