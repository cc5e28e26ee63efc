"""What a checkpoint consists of, and whether it is still that: a manifest of sizes and hashes.

The manifest finds damage, not malice (who can change a file can change the manifest); for that see `unpickle.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1
#: Bytes hashed at once. In a thread beside Python code, each call waits for its turn to go on.
CHUNK = 1 << 24


def digest(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file, read back from where it was written."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(min(CHUNK, max(1, path.stat().st_size))))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            found.update(buffer[:count])
    return {"bytes": path.stat().st_size, "sha256": found.hexdigest()}


def files(directory: Path) -> list[str]:
    """Names of all files in a checkpoint but the manifest."""
    return sorted(path.name for path in directory.iterdir() if path.name != MANIFEST)


def write_manifest(directory: Path, digests: dict[str, dict[str, Any]], step: int) -> None:
    """Write the manifest; `digests` by file name."""
    text = json.dumps({"format": FORMAT, "step": step, "files": dict(sorted(digests.items()))}, indent=1)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, its form checked. Raises ValueError where it is missing or not one."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        step, entries = manifest["step"], manifest["files"]
        well_formed = isinstance(step, int) and all(
            isinstance(entry["bytes"], int) and isinstance(entry["sha256"], str) for entry in entries.values()
        )
    except FileNotFoundError:
        raise ValueError(
            f"{directory} is not a checkpoint of this program: it has no {MANIFEST}. Weights in another format are "
            "brought in by tools/convert_hf.py import."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Use another checkpoint.") from None
    if not well_formed:
        raise ValueError(f"{path} is damaged: sizes, hashes or the step have wrong types. Use another checkpoint.")
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r}, this program reads {FORMAT}. Update the program."
        )
    for name in entries:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(
                f"{path} names {name!r}, which is not a file of the checkpoint. Do not use this checkpoint."
            )
    return manifest


def verify(directory: str | Path, *, part: int = 0, parts: int = 1) -> None:
    """Compare a checkpoint with its manifest. Raises ValueError that names the first file at fault.

    With `parts` > 1, only every parts-th file, from `part`, is hashed; sizes and names are compared in full.
    """
    directory = Path(directory)
    entries = read_manifest(directory)["files"]
    found = set(files(directory))
    _none(directory, sorted(set(entries) - found), "is missing")
    _none(directory, sorted(found - set(entries)), "does not belong there")
    for name, entry in entries.items():
        path = directory / name
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is not a regular file. Do not use this checkpoint.")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"checkpoint {directory} is damaged: {name} has {path.stat().st_size} bytes, {entry['bytes']} were "
                "written. Use another checkpoint."
            )
    for name in list(entries)[part::parts]:
        if digest(directory / name)["sha256"] != entries[name]["sha256"]:
            raise ValueError(
                f"checkpoint {directory} is damaged: the contents of {name} are not what was written (SHA-256 "
                "differs). Use another checkpoint."
            )


def _none(directory: Path, names: Iterable[str], fault: str) -> None:
    for name in names:
        raise ValueError(f"checkpoint {directory} is damaged: {name} {fault}. Use another checkpoint.")
