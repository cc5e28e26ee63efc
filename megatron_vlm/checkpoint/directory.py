"""A directory of checkpoints: names, the newest one, what is kept. Knows nothing of what is inside a checkpoint.

checkpoints/iter_0000100/        one checkpoint, complete: it gets this name last
checkpoints/latest               text file with the name of the newest
checkpoints/frozen/              weights that they share; see `frozen.py`
checkpoints/.writing-iter_*      being written, or left by a process that died; the next save removes it
checkpoints/.removing-*          being removed
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from pathlib import Path

from megatron_vlm.config.schema import CheckpointConfig

LATEST = "latest"
_NAME = re.compile(r"iter_(\d{7,})")


def name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"iter_{step:07d}"


def step(path: Path) -> int:
    """The step in a checkpoint's name; -1 for a directory of another name (one that a converter wrote, say)."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def complete(directory: Path) -> list[Path]:
    """The complete checkpoints in `directory`, oldest first."""
    if not directory.is_dir():
        return []
    return sorted((path for path in directory.iterdir() if path.is_dir() and step(path) >= 0), key=step)


def latest(directory: str | Path) -> Path | None:
    """The newest checkpoint in `directory`, or None where there is none.

    That is the one which the file `latest` names. If it names one that is gone (a process died while it replaced that
    checkpoint), the one with the highest step.
    """
    directory = Path(directory)
    try:
        named = (directory / LATEST).read_text(encoding="utf-8").strip()
    except (FileNotFoundError, NotADirectoryError):
        named = ""
    found = complete(directory)
    return next((path for path in found if path.name == named), found[-1] if found else None)


def find(directory: str | Path) -> Path:
    """The checkpoint meant by `directory`: itself, the newest in it, or the newest in its `checkpoints`.

    Raises ValueError where there is none.
    """
    directory = Path(directory)
    if not directory.is_dir():
        why = "it is a file" if directory.exists() else "the directory does not exist"
        raise ValueError(f"there is no checkpoint at {directory}: {why}. Check the path.")
    if (directory / ".metadata").is_file() or step(directory) >= 0:
        return directory
    found = latest(directory) or latest(directory / "checkpoints")
    if found is None and (directory / "config.json").is_file():
        raise ValueError(
            f"there is no checkpoint at {directory}: it looks like a model in Hugging Face format. Make a checkpoint "
            "of it with tools/convert_hf.py import."
        )
    if found is None:
        raise ValueError(
            f"there is no checkpoint at {directory}: neither it nor its folder `checkpoints` holds iter_* directories. "
            "Give a checkpoint, a directory of checkpoints or a run directory."
        )
    return found


def begin(directory: Path, step: int) -> Path:
    """An empty directory to write the checkpoint of `step` into. Clears away what dead processes left."""
    directory.mkdir(parents=True, exist_ok=True)
    for left in (*directory.glob(".writing-*"), *directory.glob(".removing-*")):
        shutil.rmtree(left, ignore_errors=True)
    writing = writing_path(directory, step)
    writing.mkdir()
    return writing


def writing_path(directory: Path, step: int) -> Path:
    """Where `begin` lets the checkpoint of `step` be written."""
    return directory / f".writing-{name(step)}"


def publish(directory: Path, step: int, kept: CheckpointConfig) -> Path:
    """Give a written checkpoint its name, make it the latest, and remove those that `kept` does not keep."""
    final = directory / name(step)
    if final.exists():
        # Of an earlier run that came so far and was taken back to an older checkpoint.
        remove(final)
    os.rename(writing_path(directory, step), final)
    sync(directory)
    replacement = directory / f".{LATEST}-{uuid.uuid4().hex}"
    replacement.write_text(final.name + "\n", encoding="utf-8")
    os.replace(replacement, directory / LATEST)
    sync(directory)
    for old in superseded([path for path in complete(directory) if path != final], kept):
        remove(old)
    return final


def superseded(others: list[Path], kept: CheckpointConfig) -> list[Path]:
    """Those of the checkpoints beside the newest, oldest first, that `kept` does not keep."""
    if not kept.keep:
        return []
    old = others[: max(0, len(others) + 1 - kept.keep)]
    return [path for path in old if not kept.keep_every or step(path) % kept.keep_every]


def remove(path: Path) -> None:
    """Remove a checkpoint; at no moment does half of it stand under its name."""
    hidden = path.with_name(f".removing-{path.name}-{uuid.uuid4().hex}")
    os.rename(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def room(directory: Path, needed: int) -> str:
    """How full the file system is, for a person.

    needed: bytes of a checkpoint; 0 = not known.
    """
    try:
        usage = shutil.disk_usage(directory)
    except OSError as error:
        return f"How much is free at {directory} is not known: {error}."
    words = f"{usage.free / 1e6:,.1f} of {usage.total / 1e6:,.1f} MB are free at {directory}"
    words += f", a checkpoint takes about {needed / 1e6:,.1f} MB" if needed else ""
    full = usage.free < max(needed, 1e6)
    advice = " Make space and start the same command again: it goes on from the last checkpoint."
    return f"{'The disk is full: ' if full else ''}{words}.{advice if full else ''}"


def sync(directory: Path) -> None:
    """Names reach the disk before the next step relies on them."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
