"""What the model computes for a micro-batch, in the units that `cost` prices."""

from __future__ import annotations

import numpy as np

from megatron_vlm import cost
from megatron_vlm.batch import PREFIX_BRANCH, Batch


def work_of(batch: Batch) -> cost.Work:
    """Tokens, query-key pairs, loss tokens, crops, windows and their slots of one micro-batch."""
    pairs = _pairs(batch)
    crops = sum(batch.crop_counts)
    windows, slots = batch.windows.shape[0], batch.windows.numel()
    return cost.Work(batch.tokens.numel(), pairs, int((batch.loss_weights != 0).sum()), crops, windows, slots)


def _pairs(batch: Batch) -> int:
    """Query-key pairs that the mask allows: causal inside an example, the image block both ways, no other branch."""
    # In numpy, whose calls on short rows take a third of the time of torch's.
    examples, branches, vision = (x.numpy() for x in (batch.examples, batch.branches, batch.is_vision))
    used = examples >= 0
    rows = np.arange(len(examples))[:, None]
    numbers = (rows * (1 + examples.max(initial=-1)) + examples)[used]
    branches = branches[used]
    inside = branches != PREFIX_BRANCH
    tokens, images, in_branches = (np.bincount(numbers[each]) for each in (slice(None), vision[used], inside))
    widest = 1 + branches[inside].max(initial=0)
    by_branch = np.bincount(numbers[inside] * widest + branches[inside])
    causal = (tokens * (tokens + 1) // 2).sum()
    back = (images * (images - 1) // 2).sum()
    hidden = ((in_branches**2).sum() - (by_branch**2).sum()) // 2
    return int(causal + back - hidden)
