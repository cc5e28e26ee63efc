"""What a checkpoint consists of, and whether it is still that: a manifest of sizes and hashes.

The manifest finds damage, not malice (who can change a file can change the manifest); for that see `unpickle.py`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
#: 2 = it refers to weights beside it, which programs that know only 1 would miss.
FORMATS = (1, 2)
#: Folder beside checkpoints with the weights that they share, each part under the first letters of its reference.
FROZEN, _LETTERS = "frozen", 16
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


def write_manifest(directory: Path, digests: dict[str, dict[str, Any]], step: int, frozen: str = "") -> None:
    """Write the manifest; `digests` by file name. frozen: reference to the part with its other weights."""
    content = {"format": FORMATS[bool(frozen)], "step": step, "files": dict(sorted(digests.items()))}
    text = json.dumps(content | ({"frozen": frozen} if frozen else {}), indent=1)
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
        well_formed &= "frozen" not in manifest or re.fullmatch("[0-9a-f]{64}", manifest["frozen"]) is not None
    except FileNotFoundError:
        raise ValueError(
            f"{directory} is not a checkpoint of this program: it has no {MANIFEST}. Weights in another format are "
            "brought in by tools/convert_hf.py import."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Use another checkpoint.") from None
    if not well_formed:
        raise ValueError(f"{path} is damaged: sizes, hashes or the step have wrong types. Use another checkpoint.")
    if manifest.get("format") not in FORMATS:
        raise ValueError(
            f"{path} has format {manifest.get('format')!r}, this program reads {FORMATS}. Update the program."
        )
    for name in entries:
        if Path(name).name != name or name in ("", ".", ".."):
            raise ValueError(
                f"{path} names {name!r}, which is not a file of the checkpoint. Do not use this checkpoint."
            )
    return manifest


def reference(directory: Path) -> str:
    """What a checkpoint says to refer to a part with frozen weights: the SHA-256 of the part's manifest."""
    return hashlib.sha256((directory / MANIFEST).read_bytes()).hexdigest()


def frozen_path(directory: Path, reference: str) -> Path:
    """Where a part lies, in a directory of checkpoints."""
    return directory / FROZEN / reference[:_LETTERS]


def is_frozen(directory: Path, name: str) -> bool:
    """Whether the part that `name` refers to is there."""
    path = frozen_path(directory, name)
    return bool(name) and (path / MANIFEST).is_file() and reference(path) == name


def folders(directory: Path) -> list[Path]:
    """Where the tensors of a checkpoint lie: itself, and the part with its frozen weights if it has one.

    Raises ValueError where that is missing or another one.
    """
    name = read_manifest(directory).get("frozen", "")
    if not name:
        return [directory]
    path = frozen_path(directory.parent, name)
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"checkpoint {directory} is without its frozen weights, which lie beside it: {path} is missing. Copy "
            f"{FROZEN}/{path.name} there from beside the original, or make the original whole before copying it: "
            "python tools/ckpt.py whole CHECKPOINT --out DIR."
        )
    if reference(path) != name:
        raise ValueError(f"{path} is damaged: its manifest is not the one that {directory} refers to. Use another "
                         "checkpoint, or copy that folder again.")  # fmt: skip
    return [directory, path]


def verify(directory: str | Path, *, part: int = 0, parts: int = 1, known: set[Path] | None = None) -> None:
    """Compare a checkpoint, its frozen weights included, with the manifests. ValueError names the first file at fault.

    With `parts` > 1, only every parts-th file, from `part`, is looked at; names are compared in full. (If each of some
    hundred ranks asked for the size of each rank's file, the file system would have much to answer.)
    known: folders that are not read again; those that were found whole are added.
    """
    known = set() if known is None else known
    for folder in folders(Path(directory)):
        if folder not in known:
            _verify(folder, part, parts)
            known.add(folder)


def _verify(directory: Path, part: int, parts: int) -> None:
    entries = read_manifest(directory)["files"]
    found = set(files(directory))
    _none(directory, sorted(set(entries) - found), "is missing")
    _none(directory, sorted(found - set(entries)), "does not belong there")
    mine = list(entries)[part::parts]
    for name in mine:
        path, entry = directory / name, entries[name]
        if path.is_symlink() or not path.is_file():
            raise ValueError(f"{path} is not a regular file. Do not use this checkpoint.")
        if path.stat().st_size != entry["bytes"]:
            raise ValueError(
                f"checkpoint {directory} is damaged: {name} has {path.stat().st_size} bytes, {entry['bytes']} were "
                "written. Use another checkpoint."
            )
    for name in mine:
        if digest(directory / name)["sha256"] != entries[name]["sha256"]:
            raise ValueError(
                f"checkpoint {directory} is damaged: the contents of {name} are not what was written (SHA-256 "
                "differs). Use another checkpoint."
            )


def _none(directory: Path, names: Iterable[str], fault: str) -> None:
    for name in names:
        raise ValueError(f"checkpoint {directory} is damaged: {name} {fault}. Use another checkpoint.")
