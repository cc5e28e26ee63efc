"""Learning rates as a pure function of the step. Numbers only: `optim.py` writes them into the optimizer."""

from __future__ import annotations

import math

from megatron_vlm.config.rules import CHOICES
from megatron_vlm.config.schema import ComponentOptimConfig


def learning_rate(component: ComponentOptimConfig, schedule: str, step: int, steps: int, decay_steps: int = 0) -> float:
    """Learning rate of optimizer step `step` (from 1) in a run of `steps`.

    Linear from 0 over the first `warmup_steps`, the peak at the last of them; then from the peak to `min_lr` at the
    last step, along half a cosine, along a line, not at all (`constant`), or along a line over the last `decay_steps`
    only (`wsd`).
    Raises ValueError for a schedule that does not exist.
    """
    if schedule not in (known := CHOICES["optim.schedule"]):
        raise ValueError(f"optim.schedule={schedule!r} does not exist; choose one of {', '.join(known)}.")
    peak, floor, warmup = component.lr, component.min_lr, component.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if schedule == "constant" or steps <= warmup:
        return peak
    if schedule == "wsd":
        # No later than from the end of the warm-up.
        decays = min(decay_steps, steps - warmup)
        return peak if step <= steps - decays else floor + (peak - floor) * max(steps - step, 0) / decays
    progress = min((step - warmup) / (steps - warmup), 1.0)
    if schedule == "linear":
        return peak + (floor - peak) * progress
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2
