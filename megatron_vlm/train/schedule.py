"""Learning rates as a pure function of the step. Numbers only: `optim.py` writes them into the optimizer."""

from __future__ import annotations

import math

from megatron_vlm.config.schema import ComponentOptimConfig

SCHEDULES = ("cosine", "linear", "constant")


def learning_rate(component: ComponentOptimConfig, schedule: str, step: int, steps: int) -> float:
    """Learning rate of optimizer step `step` (from 1) in a run of `steps`.

    Linear from 0 over the first `warmup_steps`, the peak at the last of them; then from the peak to `min_lr` at the
    last step, along half a cosine, along a line, or (`constant`) not at all.
    Raises ValueError for a schedule that does not exist.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"optim.schedule={schedule!r} does not exist; choose one of {', '.join(SCHEDULES)}.")
    peak, floor, warmup = component.lr, component.min_lr, component.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if schedule == "constant" or steps <= warmup:
        return peak
    progress = min((step - warmup) / (steps - warmup), 1.0)
    if schedule == "linear":
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
