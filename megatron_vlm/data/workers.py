"""Who decodes: threads of this process, or processes that hand over whole micro-batches in shared memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import forkserver
from types import FrameType

import torch
import torch.multiprocessing  # noqa: F401  (teaches multiprocessing to pass tensors through shared memory)

from megatron_vlm.batch import Batch
from megatron_vlm.data.collate import Collator, MicroBatch
from megatron_vlm.data.faults import Fault
from megatron_vlm.data.parent import end_with_parent

#: Threads that decode images side by side where there are no worker processes.
THREADS = 4
_TO_THE_TRAINER = {signal.SIGTERM, signal.SIGUSR1}
#: How long a worker goes on after SIGTERM.
_LEAVE_S = 60.0

_collator: Collator | None = None

#: A batch, and what of it could not be read.
Made = tuple[Batch, tuple[Fault, ...]]


class Workers:
    """Makes batches in the background, in the order asked for.

    workers: processes; 0 = threads.
    """

    def __init__(self, collator: Collator, workers: int) -> None:
        if workers < 0:
            raise ValueError(f"data.workers={workers}; needed 0 (threads) or more processes.")
        self._collator = collator
        self._images: ThreadPoolExecutor | None = None
        self._pool: Executor
        if workers:
            _start_server()
            # Not forked from this process, which holds threads and maybe a GPU.
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context("forkserver"),
                initializer=_start,
                initargs=(collator,),
            )
        else:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="collate")
            threads = min(THREADS, os.cpu_count() or 1)
            self._images = ThreadPoolExecutor(threads, thread_name_prefix="decode")

    def submit(self, micro_batch: MicroBatch) -> Future[Made]:
        """The batch of these rows, later; see Collator.attempt."""
        if self._images is None:
            return self._pool.submit(_made, micro_batch)
        return self._pool.submit(self._collator.attempt, micro_batch, self._images.map)

    def close(self) -> None:
        """Stop; batches not yet begun are given up."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._images is not None:
            self._images.shutdown(wait=True, cancel_futures=True)


def _start_server() -> None:
    """Start the server that workers are forked from, deaf to the signals that a job's launcher sends to every process.

    They ask the trainer to stop at a step boundary, and it needs its workers until then.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_THE_TRAINER)  # inherited
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_later(number: int, frame: FrameType | None) -> None:
    """SIGTERM also comes from the pool, which clears up after a worker that died: so not deaf for ever."""
    timer = threading.Timer(_LEAVE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()


def _start(collator: Collator) -> None:
    global _collator
    end_with_parent()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_later)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_THE_TRAINER)
    torch.set_num_threads(1)
    _collator = collator


def _made(micro_batch: MicroBatch) -> Made:
    assert _collator is not None
    return _collator.attempt(micro_batch)
