"""Errors that every rank learns of: a rank that fails alone would leave the others waiting in the next collective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def together(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run a block without collectives on every rank; if it raises on one, every rank raises.

    group: of all ranks, to agree over; a thread beside training needs one of its own. None = the default group.

    The failing rank raises its own error. The others raise ValueError where that is what failed (RuntimeError
    otherwise) with the rank and its message.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    answers: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    mine = None if failure is None else (isinstance(failure, ValueError), f"{type(failure).__name__}: {failure}")
    dist.all_gather_object(answers, mine, group=group)
    if failure is not None:
        raise failure
    for rank, answer in enumerate(answers):
        if answer is not None:
            by_user, text = answer
            raise (ValueError if by_user else RuntimeError)(f"{what} failed on rank {rank}: {text}")
