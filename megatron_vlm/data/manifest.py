"""Where the shards lie that `data.manifest` names: bundled data are built on first use."""

from __future__ import annotations

from pathlib import Path


def directory(setting: str) -> Path:
    """The directory of `data.manifest`. Raises ValueError where bundled data cannot be built."""
    if setting == "sample":
        from megatron_vlm.data import sample

        return sample.build()
    if setting == "film":
        from megatron_vlm.data import film

        return film.build()
    return Path(setting)
