"""How many rows a step has: the batch may grow at the start of a run. A pure function of the step's number."""

from __future__ import annotations

from megatron_vlm.config.schema import TrainConfig


def rows(train: TrainConfig, step: int) -> int:
    """Packed rows of step `step` (from 1): from `train.rampup_from` to `train.global_batch` in equal parts of
    `train.rampup_steps` steps, each `train.rampup_by` rows more than the one before."""
    if not train.rampup_steps:
        return train.global_batch
    increments = (train.global_batch - train.rampup_from) // train.rampup_by
    done = min(increments, (step - 1) * (increments + 1) // train.rampup_steps)
    return train.global_batch if step > train.rampup_steps else train.rampup_from + done * train.rampup_by
