"""Who decodes: threads of this process, or processes that hand over whole micro-batches in shared memory."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.connection import wait

import torch
import torch.multiprocessing  # noqa: F401  (teaches multiprocessing to pass tensors through shared memory)

from megatron_vlm.batch import Batch
from megatron_vlm.data.collate import Collator, MicroBatch

#: Threads that decode images side by side where there are no worker processes.
THREADS = 4

_collator: Collator | None = None


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

    def submit(self, micro_batch: MicroBatch) -> Future[Batch]:
        """The batch of these rows, later."""
        if self._images is None:
            return self._pool.submit(_made, micro_batch)
        return self._pool.submit(self._collator, micro_batch, self._images.map)

    def close(self) -> None:
        """Stop; batches not yet begun are given up."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self._images is not None:
            self._images.shutdown(wait=True, cancel_futures=True)


def _start(collator: Collator) -> None:
    global _collator
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    _collator = collator


def _end_with_parent() -> None:
    """A trainer that is killed cannot stop its workers, and they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _made(micro_batch: MicroBatch) -> Batch:
    assert _collator is not None
    return _collator(micro_batch)
