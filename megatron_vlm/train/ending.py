"""Why a run ends before its last step: a signal, the time limit, a stop file. All ranks agree at a step boundary.

Afterwards `exit.json` in the run directory says how it ended, for the script that started it (torchrun hides the exit
codes of its processes).
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil
import torch
import torch.distributed as dist

from megatron_vlm.config import duration
from megatron_vlm.config.schema import RunConfig

#: Exit code that asks for a requeue.
REQUEUE_CODE = 85
FILE = "exit.json"
#: A file of this name in the run directory ends the run; it is removed when the run has seen it.
STOP_FILE = "stop"
#: What ends a run, from the weakest to the strongest: where ranks see several, they agree on the last of them.
REASONS = ("", "stop file", "time limit", "SIGUSR1", "SIGTERM", "failed save")
SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
#: Time kept free for a save of unknown length: this share of the limit, at most so many seconds.
_UNKNOWN_SAVE = (0.05, 300.0)


@dataclass(frozen=True)
class Ending:
    """How a run ended."""

    outcome: str
    """finished (all steps done), requeue (saved; start the same command again) or failed."""
    reason: str
    step: int
    """Steps done."""

    @property
    def code(self) -> int:
        """Exit code of the process."""
        return {"finished": 0, "requeue": REQUEUE_CODE}.get(self.outcome, 1)

    def write(self, folder: Path) -> None:
        """Write exit.json, in one step."""
        temporary = folder / f".{FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        os.replace(temporary, folder / FILE)


class Watch:
    """Notes reasons to end while the `with` block runs; `agreed` tells them at a step boundary. One on every rank.

    Handlers are set in the main thread only, and taken back afterwards.
    """

    def __init__(self, run: RunConfig, folder: Path) -> None:
        self._folder = folder
        self._limit_s = duration.seconds(run.time_limit) if run.time_limit else None
        # Imports count: the limit is that of the job.
        self._began = time.monotonic() - (time.time() - psutil.Process().create_time())
        self._seen = 0
        self._step_s = self._save_s = 0.0
        self._last = time.monotonic()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def agreed(self, save_failed: bool = False) -> str:
        """The reason to end now, the same on every rank; empty = go on. Collective: one number per call."""
        now = time.monotonic()
        self._step_s, self._last = max(self._step_s, now - self._last), now
        seen = self._seen
        if self._limit_s is not None and now - self._began + self._reserve_s() >= self._limit_s:
            seen = max(seen, REASONS.index("time limit"))
        if save_failed:
            seen = REASONS.index("failed save")
        if dist.get_rank() == 0 and (self._folder / STOP_FILE).exists():
            seen = max(seen, REASONS.index("stop file"))
        number = torch.tensor(seen, device=torch.cuda.current_device())
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return REASONS[int(number)]

    def saved(self, took_s: float) -> None:
        """The last complete checkpoint took so long, and the one at the end may take as long. No step was that long."""
        self._save_s = max(self._save_s, took_s)
        self._last = time.monotonic()

    def _reserve_s(self) -> float:
        """One more step and one save."""
        share, most = _UNKNOWN_SAVE
        save_s = 1.5 * self._save_s if self._save_s else min(most, share * (self._limit_s or 0.0))
        return self._step_s + save_s

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._seen = max(self._seen, REASONS.index(signal.Signals(number).name))
