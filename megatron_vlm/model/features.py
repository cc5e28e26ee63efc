"""Image features of a micro-batch, its crops dealt to the ranks of a group: TP x CP, or CP where tower and connector
are sharded over the tensor-parallel ranks.

Letters: c crops of this rank, p patches in a crop, n windows of the whole micro-batch, w patches in a window, q vectors
a window gives, T tensor-parallel and C context-parallel ranks, G ranks of the group.
Each rank encodes its own crops. A window is pooled where its first patch was encoded; patches of other ranks that it
needs travel there (windows of 2 x 2 patches that straddle two crops), then the pooled vectors, as wide as the language
model and fewer than the patches, are gathered.

Gradients. Let g be the loss's gradient with respect to all features, as one process has it. After the merge every
rank cuts out its context chunk of the row, so rank (t, c) has g at the placeholders of chunk c and 0 elsewhere, for
every t (with sequence parallelism too: the backward of its scatter gathers over the tensor-parallel ranks). The
gather's backward sums over the group, G = T x C: T x g at the vectors that a rank pooled. From there on each rank
differentiates what it computed itself, and the exchange returns the gradients of foreign patches to their rank. Over
the G ranks, the gradients of a parameter thus add up to T times the one of a single process. DistributedDataParallel
sums over data and context ranks, and `average_gradients_across_tp_domain` (replicated.py) averages over the
tensor-parallel ranks: T x g / T = g. In bf16 the sum over the group loses nothing where T is a power of two: chunks of
other context ranks are zeros. With sharded weights G = C: the sum is g, on each of the T ranks that pooled these
vectors together, as Megatron's sharded layers want it; what they hold whole (norms, position table) gets the same
gradient on each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import all_to_all, gather_from_sequence_parallel_region

from megatron_vlm.batch import PAD
from megatron_vlm.model.connector import Connector
from megatron_vlm.model.vision import VisionTower


@dataclass(frozen=True)
class Plan:
    """What one rank sends, receives and pools. All ranks make theirs from the same windows, without talking.

    send:     (k,) int64. This rank's patches that others need, by receiving rank, then by patch.
    sent:     how many of them go to each rank.
    received: how many patches come from each rank; they are put behind this rank's own.
    windows:  (n', w) int64. The windows that this rank pools, as indices into own and received patches; PAD if empty.
    most:     windows of the rank that pools most.
    order:    (n,) int64. Place of each window among those of all ranks, each rank's padded to `most`.
    travels:  some rank of the group sends something.
    """

    send: torch.Tensor
    sent: list[int]
    received: list[int]
    windows: torch.Tensor
    most: int
    order: torch.Tensor
    travels: bool


def plan(windows: torch.Tensor, crop_counts: Sequence[int], patches: int, rank: int) -> Plan:
    """The plan of `rank`.

    windows: (n, w) int64 on the CPU, patches counted over the whole micro-batch; crop_counts: crops of each rank;
    patches: patches in a crop. Raises ValueError where a window names a patch that no rank has.
    """
    ranks = len(crop_counts)
    counts = torch.tensor(crop_counts) * patches
    ends = counts.cumsum(0)
    start, end, total = int(ends[rank] - counts[rank]), int(ends[rank]), int(ends[-1])
    if windows.numel() and not PAD <= int(windows.min()) <= int(windows.max()) < total:
        raise ValueError(
            f"windows name patches {int(windows.min())} to {int(windows.max())}, but the micro-batch has "
            f"{sum(crop_counts)} crops of {patches} patches = {total}. Were they made for another crop or patch size?"
        )
    if not len(windows):
        windows = windows.new_empty(0, max(1, windows.shape[1]))
    valid = windows != PAD
    owner = torch.searchsorted(ends, windows, right=True)
    first = owner.gather(1, valid.int().argmax(1, keepdim=True))[:, 0]
    pooler = first.where(valid.any(1), torch.zeros_like(first))

    # Patches that travel, each once per receiving rank, sorted by receiver and patch (so by sender too).
    foreign = valid & (owner != pooler[:, None])
    keys = torch.unique((pooler[:, None] * total + windows)[foreign])
    to, patch = keys // max(total, 1), keys % max(total, 1)
    source = torch.searchsorted(ends, patch, right=True)
    arriving = patch[to == rank]

    mine = windows[pooler == rank]
    own = (mine >= start) & (mine < end)
    local = torch.where(own, mine - start, end - start + torch.searchsorted(arriving, mine))

    pooled = torch.bincount(pooler, minlength=ranks)
    most = int(pooled.max())
    by_rank = pooler.argsort(stable=True)
    before = (pooled.cumsum(0) - pooled)[pooler[by_rank]]
    order = torch.empty_like(by_rank)
    order[by_rank] = pooler[by_rank] * most + torch.arange(len(windows)) - before
    return Plan(
        send=patch[source == rank] - start,
        sent=torch.bincount(to[source == rank], minlength=ranks).tolist(),
        received=torch.bincount(source[to == rank], minlength=ranks).tolist(),
        windows=local.where(mine != PAD, PAD),
        most=most,
        order=order,
        travels=len(keys) > 0,
    )


def encode(
    tower: VisionTower,
    connector: Connector,
    crops: torch.Tensor,
    windows: torch.Tensor,
    crop_counts: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Features of all image placeholders of a micro-batch, in their order: (n x q, hidden), the same on every rank.

    crops, windows and crop_counts as in Batch; `group`: groups.crops, None = a process alone. Every rank of the
    group calls it, and its backward, also without crops or windows. A frozen tower runs without autograd.
    Raises ValueError where the crops at hand are not those that crop_counts announces.
    """
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    if len(crop_counts) != ranks or crop_counts[rank] != len(crops):
        raise ValueError(
            f"rank {rank} of {ranks} holds {len(crops)} crops, but the batch deals {tuple(crop_counts)} crops. The "
            "loader's share must be made for the crop ranks of this layout."
        )
    trains = any(parameter.requires_grad for parameter in tower.parameters())
    with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
        features = tower(crops).flatten(0, 1)  # (c x p, width)
    if group is None or ranks == 1:
        return connector(features, windows).flatten(0, 1)

    todo = plan(windows.cpu(), crop_counts, tower.arch.patches, rank)
    if todo.travels:
        sent = features.index_select(0, todo.send.to(features.device))
        features = torch.cat([features, all_to_all(group, sent, todo.received, todo.sent)])
    pooled = connector(features, todo.windows.to(features.device))  # (n', q, hidden)
    if not len(windows):
        return pooled.flatten(0, 1)
    padded = torch.nn.functional.pad(pooled, (0, 0, 0, 0, 0, todo.most - len(pooled)))
    # "Tensor-parallel output": Megatron's word for a backward that sums over the group.
    gathered = gather_from_sequence_parallel_region(padded, tensor_parallel_output_grad=True, group=group)
    return gathered.index_select(0, todo.order.to(gathered.device)).flatten(0, 1)
