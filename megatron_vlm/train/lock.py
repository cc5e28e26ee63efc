"""One process at a time writes into a run directory: a lock file that names it.

`lock` holds host, process id and the process's start time, and is touched every few seconds. On the same host the
process tells whether it lives; a lock of another host is stale when it has not been touched for some beats.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

NAME = "lock"
#: Time between touches, and how many may be missed.
BEAT_S = 5.0
MISSED = 6


class Lock:
    """Holds `folder` for this process while the `with` block runs. Makes the folder, and removes it if it stays empty.

    Raises ValueError where another process holds it. Waits up to BEAT_S x MISSED for a lock of another host.
    """

    def __init__(self, folder: Path, beat_s: float = BEAT_S) -> None:
        self._folder, self._path, self._beat_s = folder, folder / NAME, beat_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._made = False

    def __enter__(self) -> Lock:
        self._made = not self._folder.exists()
        self._folder.mkdir(parents=True, exist_ok=True)
        while not self._create():
            owner = self._read()
            if owner is None:
                continue  # gone since
            if self._lives(owner):
                raise ValueError(
                    f"{self._folder} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}. Wait "
                    "until it has ended, or set run.dir to another directory."
                )
            self._clear(owner)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._path.unlink(missing_ok=True)
        if self._made:
            try:
                self._folder.rmdir()
            except OSError:
                pass  # there is something in it: the run

    def _create(self) -> bool:
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": psutil.Process().create_time()}
        try:
            handle = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(mine) + "\n")
        return True

    def _read(self, path: Path | None = None) -> dict[str, Any] | None:
        """Who holds the lock: None where it is gone; an empty dict where the file does not say."""
        try:
            owner = json.loads((path or self._path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            return {}  # being written, or its writer died
        return owner if isinstance(owner, dict) else {}

    def _lives(self, owner: dict[str, Any]) -> bool:
        if owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int):
            try:
                # A process of the same number that started at another time is another one.
                return abs(psutil.Process(owner["pid"]).create_time() - owner.get("started", 0)) < 2
            except psutil.NoSuchProcess:
                return False
        # No look into another host: is the file touched? Times are compared with each other, not with a clock here.
        try:
            before = self._path.stat().st_mtime_ns
            for _ in range(2 * MISSED):
                time.sleep(self._beat_s / 2)
                if self._path.stat().st_mtime_ns != before:
                    return True
        except FileNotFoundError:
            return False
        return False

    def _clear(self, owner: dict[str, Any]) -> None:
        """Remove the stale lock of `owner`, unless somebody else has done so and holds a new one by now."""
        aside = self._path.with_name(f".{NAME}-{uuid.uuid4().hex}")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return
        if self._read(aside) != owner:
            try:
                os.link(aside, self._path)
            except FileExistsError:
                pass
        aside.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._done.wait(self._beat_s):
            try:
                os.utime(self._path)
            except OSError:
                pass  # a file system that is away for a moment
