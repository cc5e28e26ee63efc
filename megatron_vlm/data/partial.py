"""Directories that appear whole or not at all: made under another name beside their own, and renamed."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def partial(directory: Path) -> Iterator[Path]:
    """A new directory beside `directory`, for the caller to fill and rename; gone when the block ends otherwise.

    Those that killed processes of this machine left for the same `directory` go too: their locks went with them. Where
    the file system has no locks, they stay.
    """
    start = f"{directory.name}.partial-{socket.gethostname()}-"
    directory.parent.mkdir(parents=True, exist_ok=True)
    for left in directory.parent.glob(f"{glob.escape(start)}*"):
        with suppress(OSError), _locked(left):
            shutil.rmtree(left, ignore_errors=True)
    path = directory.with_name(start + uuid.uuid4().hex[:12])
    unlocked = path.with_name(f".{path.name}")  # nobody looks for this name
    unlocked.mkdir()
    try:
        with _locked(unlocked, needed=False):
            unlocked.rename(path)
            yield path
    finally:
        for left in (unlocked, path):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _locked(directory: Path, *, needed: bool = True) -> Iterator[None]:
    """Hold the lock of a directory. If `needed`, raises OSError where another process has it, or there are no locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if needed:
                raise
        yield
    finally:
        os.close(descriptor)
