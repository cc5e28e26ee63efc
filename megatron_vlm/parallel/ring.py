"""Tensors in turns around a ring of ranks: each rank sees those of all, and holds two at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist


class Passing:
    """A tensor on its way to the next rank of the ring, while that of the rank before arrives."""

    def __init__(self, tensor: torch.Tensor, group: dist.ProcessGroup, tag: int = 0):
        """Every rank of `group` passes on a tensor of the same shape and dtype. tag: tells apart what travels at
        once."""
        rank, ranks = group.rank(), group.size()
        self._sent = tensor.contiguous()  # kept: it is read while it travels
        self._received = torch.empty_like(self._sent)
        there, here = (dist.get_global_rank(group, place % ranks) for place in (rank + 1, rank - 1))
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, there, group, tag),
                dist.P2POp(dist.irecv, self._received, here, group, tag),
            ]
        )

    def arrived(self) -> torch.Tensor:
        """The tensor of the rank before."""
        for work in self._works:
            work.wait()
        return self._received


def turns(own: torch.Tensor, group: dist.ProcessGroup) -> Iterator[tuple[int, torch.Tensor]]:
    """Each rank of `group` and its tensor, this rank's own first, then those of the ranks before it.

    All have the shape of `own`. The next one travels while the caller works on one. Moves: a tensor to the next rank,
    ranks - 1 times.
    """
    ranks, held = group.size(), own
    for turn in range(ranks):
        coming = Passing(held, group) if turn < ranks - 1 else None
        yield (group.rank() - turn) % ranks, held
        if coming is not None:
            held = coming.arrived()
