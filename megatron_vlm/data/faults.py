"""What is told of a sample that cannot be loaded. How it is silenced stands in collate.py, how ranks agree in train."""

from __future__ import annotations

import re
from dataclasses import dataclass

#: Where an object of a library's message lies in memory.
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
ADVICE = (
    "Check the shards (tools/build_shards.py verify), or go on without samples that cannot be loaded: "
    "data.bad_samples=skip."
)


@dataclass(frozen=True, order=True)
class Fault:
    """One sample that cannot be loaded."""

    sample: str
    """data set/key."""
    file: str
    """File of the shards that it comes from: `media/000003.tar`, `samples/captions.train.arrow`."""
    place: str
    """Where in the file: `1234 bytes at offset 512`, `sample 17`."""
    reason: str
    """What went wrong."""

    def __str__(self) -> str:
        return f"{self.sample} ({self.file}, {self.place}): {self.reason}"

    @property
    def error(self) -> ValueError:
        """The error of a run that stops here."""
        return ValueError(f"sample {self} {ADVICE}")


def reason(error: Exception) -> str:
    """What an error says, the same in every process; its kind too, unless it was made for a reader."""
    words = _ADDRESS.sub("", str(error))
    return words if type(error) is ValueError else f"{type(error).__name__}: {words}"
