"""The checkpoints of one run, one after the other, written in a thread beside training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.checkpoint import record, save
from megatron_vlm.checkpoint.agree import together
from megatron_vlm.checkpoint.snapshot import Snapshot
from megatron_vlm.config.schema import Config


class Saver:
    """Writes checkpoints into `directory`. Every rank makes one, and calls it in the same order.

    With `checkpoint.asynchronous`, `save` copies the state to host memory and returns; a thread writes the copy, by the
    same code and as carefully as a save that one waits for. Its collectives are over groups of its own. Python's other
    work goes on meanwhile: copying, writing and hashing are done outside the interpreter's lock.
    """

    def __init__(self, directory: Path, config: Config) -> None:
        self._directory, self._config = directory, config
        self._asynchronous = config.checkpoint.asynchronous
        self._group = dist.new_group(backend="gloo") if self._asynchronous else None
        self._snapshot = Snapshot()
        self._checked = False
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.took_s = 0.0
        """How long the last complete save took, in the background or not."""

    def save(
        self, *, models: Sequence[Any], optimizer: Any | None, step: int, state: dict[str, Any], wait: bool = False
    ) -> None:
        """Save the state of `step`; the arguments are those of `save.save`. Waits until the save before has ended.

        wait: return when the checkpoint is there. So does the first save of a process: Megatron's check that every part
        of every tensor is written once needs the groups that training uses.
        Raises what a save raises; one that fails in the background raises at the next call, or in `finish`.
        """
        self.finish()
        began = time.monotonic()
        if wait or not self._asynchronous or not self._checked:
            save.save(self._directory, models=models, optimizer=optimizer, step=step, config=self._config, state=state)
            self._checked = True
            self.took_s = time.monotonic() - began
            return
        with together("preparing the checkpoint"):
            documents = record.documents(self._config, state)
        self._snapshot.take(models, optimizer)
        device = torch.cuda.current_device()

        def write() -> None:
            torch.cuda.set_device(device)  # a thread begins with the node's first GPU
            contents = self._snapshot.contents()
            save.write(self._directory, contents, documents, step, self._config.checkpoint, group=self._group)
            self.took_s = time.monotonic() - began

        self._thread = threading.Thread(target=self._guarded, args=(write,), name="save", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a save in the background has failed; `finish` raises its error."""
        return self._error is not None

    def abandon(self, error: BaseException) -> None:
        """The run fails of `error`: wait for a save in the background, and tell there what became of it.

        A process that ended at once would leave half a checkpoint, and often both fail of the same full disk.
        """
        try:
            self.finish()
        except BaseException as other:
            if other is not error:
                error.add_note(" ".join([f"Before that, {other}", *getattr(other, "__notes__", ())]))

    def finish(self) -> None:
        """Wait for the save in the background. Raises its error, on every rank."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _guarded(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:
            self._error = error
