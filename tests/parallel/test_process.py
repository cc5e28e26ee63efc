"""Which GPU is a process's own."""

from __future__ import annotations

import pytest

from megatron_vlm.parallel.process import own_device


@pytest.mark.parametrize("local_rank, devices, own", [(0, 1, 0), (3, 8, 3), (7, 8, 7), (5, 1, 0)])
def test_own_device(local_rank, devices, own):
    """The last: SLURM shows each task its own GPU only (--gpus-per-task)."""
    assert own_device(local_rank, devices) == own


def test_more_processes_than_gpus():
    with pytest.raises(ValueError, match="process 4 of this node sees 4 GPUs: start one process for each"):
        own_device(4, 4)
