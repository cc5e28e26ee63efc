"""The contract between data, parallel, model and train: one frozen dataclass.

Letters: b rows in a micro-batch, s tokens in a row, c crops that this rank encodes, p patches in a crop,
d numbers in a patch, n windows of the whole micro-batch, w patches in a window, q vectors a window gives
(1, or the resampler's queries; n x q = image placeholders).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: `branches` of every token before the first branch: visible to all branches of its example (Molmo2's constant).
PREFIX_BRANCH = 10_000
#: `examples`, `branches`, `positions` and `sources` where a row is padded; `windows` where a slot is empty.
PAD = -1


@dataclass(frozen=True)
class Batch:
    """One micro-batch of packed rows. Every rank of a model replica holds the same batch, but for its own crops.

    tokens:       (b, s) int64. Ids; image placeholders hold the `<im_patch>` id. Padding holds 0.
    targets:      (b, s) int64. The token to predict at each place, already shifted. 0 where the weight is 0.
    loss_weights: (b, s) float32. 0 = no loss here.
    positions:    (b, s) int64. For RoPE; restart per example and per branch. PAD where padded.
    examples:     (b, s) int32. Index of the example inside its row. PAD where padded.
    branches:     (b, s) int32. PREFIX_BRANCH, or the branch's index inside its example. PAD where padded.
    is_vision:    (b, s) bool. Token belongs to the bidirectional image block of its example.
    sources:      (b, s) int32. Index of the token's data set in the mixture, for losses per data set. PAD where padded.
    crops:        (c, p, d) uint8. The crops that this rank encodes, a contiguous share of the micro-batch's crops,
                  patches in raster order, values of a patch by (row, column, channel).
    crop_counts:  for each part (Layout.crop_rank), in order, how many crops it has. Its sum is the
                  crop count of the micro-batch; the rank's first crop is the sum of the counts before it.
    windows:      (n, w) int64. Patches pooled into each q placeholders, as crop * p + patch with the crop counted
                  over the whole micro-batch; PAD in empty slots. Order: as the placeholders stand in tokens, row
                  by row.
    rows:         (b,) int64. Global number of each row in the run's order: keys dropout masks and cached masks.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    loss_weights: torch.Tensor
    positions: torch.Tensor
    examples: torch.Tensor
    branches: torch.Tensor
    is_vision: torch.Tensor
    sources: torch.Tensor
    crops: torch.Tensor
    crop_counts: tuple[int, ...]
    windows: torch.Tensor
    rows: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with every tensor on `device`."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, for asynchronous copies to a GPU."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: change(tensor) for name, tensor in tensors.items()})
