"""What the model computes for a micro-batch, in the units that `cost` prices."""

from __future__ import annotations

import torch

from megatron_vlm import cost
from megatron_vlm.batch import PREFIX_BRANCH, Batch


def work_of(batch: Batch) -> cost.Work:
    """Tokens, query-key pairs, loss tokens, crops, windows and their slots of one micro-batch."""
    pairs = int(_pairs(batch))
    crops = sum(batch.crop_counts)
    windows, slots = batch.windows.shape[0], batch.windows.numel()
    return cost.Work(batch.tokens.numel(), pairs, int((batch.loss_weights != 0).sum()), crops, windows, slots)


def _pairs(batch: Batch) -> torch.Tensor:
    """Query-key pairs that the mask allows: causal inside an example, the image block both ways, no other branch."""
    used = batch.examples >= 0
    rows = torch.arange(len(batch.examples), device=used.device)[:, None].expand_as(batch.examples)
    examples = (rows * (1 + int(batch.examples.max())) + batch.examples)[used].long()
    vision = torch.bincount(examples[batch.is_vision[used]])
    branches = batch.branches[used]
    inside = branches != PREFIX_BRANCH
    tokens = torch.bincount(examples)
    widest = 1 + int(torch.where(inside, branches, 0).max()) if len(branches) else 1
    by_branch = torch.bincount(examples[inside] * widest + branches[inside])
    in_branches = torch.bincount(examples[inside])
    causal = (tokens * (tokens + 1) // 2).sum()
    back = (vision * (vision - 1) // 2).sum()
    hidden = ((in_branches**2).sum() - (by_branch**2).sum()) // 2
    return causal + back - hidden
