"""Traces of chosen steps by torch's profiler: RUN/profile/step-0000012-rank-00003.json, for chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

FOLDER = "profile"


@contextmanager
def traced(folder: Path, step: int, steps: tuple[int, ...]) -> Iterator[None]:
    """Trace a block of `step` if that is one of `steps`: operators with shapes, and kernels where there is a GPU."""
    if step not in steps:
        yield
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        yield
    (folder / FOLDER).mkdir(exist_ok=True)
    profile.export_chrome_trace(str(folder / FOLDER / f"step-{step:07d}-rank-{dist.get_rank():05d}.json"))
