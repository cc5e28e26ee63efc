"""Gradients reduced bucket by bucket while the backward pass runs, in one order on all ranks.

Megatron alone starts a bucket's reduction when its parameters have their gradients. Ranks on which those come in
another order (one without images has all of its tower's at once) then reduce different buckets with each other: two
ranks, images on one, buckets of 3,000 numbers, and gloo stops at sizes that differ. A parameter without gradient would
stop the run, too. Here a bucket's turn comes after those before it, and what has not had its turn when the backward
pass ends has it then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel


class Turns:
    """Whose turn it is among the bucket groups of all chunks of a rank; Megatron's hooks report gradients to it."""

    def __init__(self, groups: Sequence[Any]) -> None:
        """groups: Megatron's bucket groups in the order of the backward pass."""
        self._groups = list(groups)
        self._of = {parameter: index for index, group in enumerate(groups) for parameter in group.params}
        self.begin()

    def begin(self) -> None:
        """A step begins: no parameter has its gradient."""
        self._ready: set[torch.nn.Parameter] = set()
        self._missing = [len(group.params) for group in self._groups]
        self._next = 0

    def register_grad_ready(self, parameter: torch.nn.Parameter, force_all_reduce: bool | None = False) -> None:
        """The parameter has its gradient of a micro-batch. Called by Megatron's hook in the backward pass."""
        index = self._of[parameter]
        if not self._groups[index].is_last_microbatch:
            return
        # It would not be in a sum that has begun.
        assert parameter not in self._ready, "a parameter got two gradients in one backward pass"
        self._ready.add(parameter)
        self._missing[index] -= 1
        while self._next < len(self._groups) and not self._missing[self._next]:
            self._start(force_all_reduce)

    def finish(self, force_all_reduce: bool | None = False) -> None:
        """The backward pass has ended: start what is left."""
        while self._next < len(self._groups):
            self._start(force_all_reduce)

    def _start(self, force_all_reduce: bool | None) -> None:
        self._groups[self._next].start_grad_sync(force_all_reduce=force_all_reduce)
        self._next += 1


class OverlappingDataParallel(DistributedDataParallel):
    """Megatron's, but its buckets take turns. Its own bookkeeping of gradients stays empty: Megatron then takes each
    step for the first, in which finishing a reduction starts it unless it has been started."""

    turns: Turns

    def zero_grad_buffer(self) -> None:
        """Before each step."""
        super().zero_grad_buffer()
        self.turns.begin()

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Wait for the sums. The first chunk that is asked starts what is left of all."""
        self.turns.finish(force_all_reduce)
        super().finish_grad_sync(force_all_reduce)


def connect(chunks: Sequence[OverlappingDataParallel]) -> None:
    """Let the buckets of a rank's chunks take turns, and none before the last micro-batch."""
    turns = Turns([group for chunk in reversed(chunks) for group in chunk.bucket_groups])
    waits = [chunk.no_sync for chunk in chunks]
    for chunk in chunks:
        chunk.turns = turns
        chunk.param_to_bucket_group = dict.fromkeys(chunk.param_to_bucket_group, turns)
        config: Any = chunk.config
        config.no_sync_func = waits if len(waits) > 1 else waits[0]
