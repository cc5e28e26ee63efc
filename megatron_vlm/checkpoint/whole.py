"""A checkpoint that needs nothing beside it, made of one that refers to frozen weights. Needs no Megatron."""

from __future__ import annotations

import dataclasses
import pickle
import shutil
from pathlib import Path
from typing import Any

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.checkpoint import unpickle, verify
from megatron_vlm.config.schema import CheckpointConfig

_METADATA = ".metadata"


def whole(source: Path, out: Path) -> Path:
    """Copy a checkpoint and its frozen weights into one in the directory `out`; its path.

    Both are verified first; what was written is read back before it gets its name. Raises ValueError where the source
    is not whole or `out` holds that step already, RuntimeError where writing fails; nothing of it is left.
    """
    verify.verify(source)
    step = verify.read_manifest(source)["step"]
    if (out / names.name(step)).exists():
        raise ValueError(f"{out / names.name(step)} exists. Give another --out.")
    try:
        writing = names.begin(out, step)
        digests: dict[str, dict[str, Any]] = {}
        (own, merged), *parts = unpickle.read_folders(source)
        copies = [(own, {name: name for name in verify.read_manifest(own)["files"] if name != _METADATA})]
        for folder, metadata in parts:
            # Only what holds tensors: a part has no other state.
            moved = {name: f"frozen-{name}" for name in {each.relative_path for each in metadata.storage_data.values()}}
            copies.append((folder, moved))
            merged.state_dict_metadata.update(metadata.state_dict_metadata)
            for index, place in metadata.storage_data.items():
                merged.storage_data[index] = dataclasses.replace(place, relative_path=moved[place.relative_path])
        for folder, moved in copies:
            for name, new in moved.items():
                shutil.copyfile(folder / name, writing / new)
                digests[new] = verify.digest(writing / new)
                if digests[new] != verify.read_manifest(folder)["files"][name]:
                    raise RuntimeError(f"{writing / new} does not hold what was written to it. Is the disk sound?")
        (writing / _METADATA).write_bytes(pickle.dumps(merged))
        digests[_METADATA] = verify.digest(writing / _METADATA)
        verify.write_manifest(writing, digests, step)
        return names.publish(out, step, CheckpointConfig(keep=0))
    except OSError as error:
        raise RuntimeError(f"writing {out} failed: {error}. Is the disk full?") from error
    finally:
        shutil.rmtree(names.writing_path(out, step), ignore_errors=True)
