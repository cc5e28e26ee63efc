"""Who plans which window, where several ranks need the same: each window is planned by one of them and read by all.

    cache = PlanCache(planner, folder, identity, rank=3, ranks=16)
    rows = cache.window(17)

Rank w % ranks plans window w, some windows ahead of its own need, and puts it into a file whose name is the hash of all
that the plan is a function of. The others wait for the file. What does not come in time, or is damaged, a rank plans
itself: the rows are the same.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from megatron_vlm.data import stored
from megatron_vlm.data.plan import Planner, Row
from megatron_vlm.data.stored import StoredRow

#: Windows that a rank plans ahead of the one in use, if they are its own.
AHEAD = 4
#: Windows whose files stay behind the one in use: ranks are not all in the same step.
BEHIND = 6
#: Seconds for which a rank waits for a window of another one. Once it was in vain, it waits no more.
PATIENCE_S = 60.0
_POLL_S = 0.05
#: Code that a plan depends on: with other code it is another plan.
_CODE = ("config", "data", "cost.py")


class PlanCache:
    """The windows of one stream, planned once among the ranks. Thread-safe for one caller.

    identity: all settings that the stream depends on. own: the folder is of this stream alone; files of others are
    left-overs, and removed. planned: windows that this rank planned.
    """

    def __init__(
        self, planner: Planner, folder: Path, identity: Mapping[str, Any], *, rank: int, ranks: int, own: bool = False
    ) -> None:
        self._planner, self._folder, self._rank, self._ranks = planner, folder, rank, ranks
        self._name = digest(identity)
        folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="plan ahead")
        self._own: dict[int, Future[None]] = {}
        self._closed = threading.Event()
        self._patience_s = PATIENCE_S
        self.planned: list[int] = []
        if own and rank == 0:
            for path in folder.glob("*.plan"):
                if not path.name.startswith(f"{self._name}-"):
                    path.unlink(missing_ok=True)

    def window(self, number: int) -> Sequence[Row | StoredRow] | None:
        """The rows of a window, whoever planned it; None after the last one of a single pass.

        Raises ValueError as Planner.plan does.
        """
        for ahead in range(number, number + AHEAD + 1):
            if ahead % self._ranks == self._rank and ahead not in self._own:
                self._own[ahead] = self._pool.submit(self._make, ahead)
        for behind in [done for done in self._own if done < number]:
            del self._own[behind]
        self._remove(number - BEHIND)
        if number in self._own:
            self._own[number].result()
        return self._found(number) or self._plan(number)

    def close(self) -> None:
        """Stop waiting and planning ahead."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def path(self, number: int) -> Path:
        """The file of a window."""
        return self._folder / f"{self._name}-{number:09d}.plan"

    def _make(self, number: int) -> None:
        """Plan a window of this rank's own into its file, unless a sound one is there."""
        if self._read(number) is None:
            self._plan(number)

    def _plan(self, number: int) -> list[Row] | None:
        rows = self._planner.plan(number)
        self.planned.append(number)
        if rows is not None:
            try:
                stored.write(self.path(number), rows)
            except OSError as error:  # a full disk: the others plan for themselves
                warnings.warn(f"window {number} could not be shared with other ranks: {error}", stacklevel=2)
        return rows

    def _found(self, number: int) -> list[StoredRow] | None:
        """The window from its file; waits for one that another rank is to plan."""
        owner, path = number % self._ranks, self.path(number)
        until = time.monotonic() + self._patience_s
        while not path.exists() and owner != self._rank and self._is_wanted():
            if self.path(number + self._ranks).exists():  # its owner has gone on: it was here, and was removed
                break
            if time.monotonic() >= until:
                self._give_up(number, owner)
                break
            time.sleep(_POLL_S)
        return self._read(number)

    def _give_up(self, number: int, owner: int) -> None:
        if self._patience_s:
            warnings.warn(
                f"rank {self._rank} waited {self._patience_s:.0f} s for {self.path(number)}, which rank {owner} should "
                "have written. It plans for itself from now on. Do all ranks see the same directory? Set "
                "data.plan_cache to one, or to nothing.",
                stacklevel=2,
            )
        self._patience_s = 0.0

    def _is_wanted(self) -> bool:
        """The run goes on: a program that ends waits for its threads."""
        return not self._closed.is_set() and threading.main_thread().is_alive()

    def _read(self, number: int) -> list[StoredRow] | None:
        """The window's rows; None where there is no file, or a damaged one."""
        try:
            return stored.read(self.path(number))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            warnings.warn(f"{error} The window is planned again.", stacklevel=2)
            return None

    def _remove(self, before: int) -> None:
        """Rank 0 removes this stream's windows before that one."""
        if self._rank == 0:
            for path in self._folder.glob(f"{self._name}-*.plan"):
                if int(path.stem.rpartition("-")[2]) < before:
                    path.unlink(missing_ok=True)


def digest(identity: Mapping[str, Any]) -> str:
    """Of a stream's settings, and of the code that plans."""
    code = hashlib.sha256()
    root = Path(__file__).parents[1]
    for name in _CODE:
        place = root / name
        for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
            code.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    words = json.dumps([identity, code.hexdigest()], sort_keys=True)
    return hashlib.sha256(words.encode()).hexdigest()[:32]
