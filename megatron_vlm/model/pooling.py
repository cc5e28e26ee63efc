"""Pooling a window of patches into one vector.

Letters: m patches at hand, n windows, w patches in a window. Windows are (n, w) int64 indices into the m patches, PAD
in empty slots, and a window without any patch gives a finite vector.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vlm.batch import PAD


def take(features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """(m, h) features at (...) indices -> (..., h), zeros in empty slots."""
    if not len(features):
        return features.new_zeros(*windows.shape, features.shape[1])
    taken = features.index_select(0, windows.clamp(min=0).flatten()).view(*windows.shape, -1)
    return taken.masked_fill((windows == PAD)[..., None], 0)


def visible_slots(windows: torch.Tensor) -> torch.Tensor:
    """(n, w) bool, True at the slots that attention may look at.

    A window without any patch looks at its empty slots: softmax over nothing would be NaN.
    """
    valid = windows != PAD
    return valid | ~valid.any(1, keepdim=True)


class WindowMean(nn.Module):
    """The mean of a window's patches; zeros where it has none."""

    def forward(self, features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """(m, h) features, (n, w) windows -> (n, 1, h)."""
        return mean(take(features, windows.t()), windows)[:, None]


def mean(taken: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """(w, n, h) patches with zeros in empty slots, (n, w) windows -> (n, h) means over the patches that exist."""
    count = (windows != PAD).sum(1).clamp(min=1)
    return taken.sum(0) / count[:, None].to(taken.dtype)


@dataclass
class WindowAttentionSubmodules:
    """Which modules WindowAttention is made of; all but `core_attention` are linear layers."""

    linear_q: ModuleSpec | type
    linear_kv: ModuleSpec | type
    core_attention: ModuleSpec | type
    linear_proj: ModuleSpec | type


class WindowAttention(MegatronModule):
    """Cross-attention of one query, the mean of the window's patches, over those patches (Molmo2).

    Like Megatron's CrossAttention, `linear_kv` holds the key and value rows of each head side by side; unlike it, the
    input is wider (`width_in`) than the output (`config.hidden_size`). Biases everywhere, no norm, no residual.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: WindowAttentionSubmodules,
        width_in: int,
        groups: ProcessGroupCollection,
    ):
        super().__init__(config)
        self.tp_group = groups.tp
        width, self.head_size = config.hidden_size, config.kv_channels
        common = {"config": config, "init_method": config.init_method, "bias": True, "skip_bias_add": False}
        common |= {"is_expert": False}  # Transformer Engine's have no default for it
        column = {**common, "gather_output": False, "tp_group": groups.tp}
        self.linear_q = build_module(submodules.linear_q, width_in, width, **column)
        self.linear_kv = build_module(submodules.linear_kv, width_in, 2 * width, **column)
        self.core_attention = build_module(submodules.core_attention, config=config)
        self.linear_proj = build_module(
            submodules.linear_proj, width, width, **common, input_is_parallel=True, tp_group=groups.tp
        )

    def forward(self, features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """(m, width_in) features, (n, w) windows -> (n, 1, hidden_size)."""
        # Megatron's order: w and 1 are the sequence, n the batch.
        taken = take(features, windows.t())
        query, _ = self.linear_q(mean(taken, windows)[None])
        key_value, _ = self.linear_kv(taken)
        heads = query.shape[-1] // self.head_size
        key, value = key_value.unflatten(-1, (heads, 2 * self.head_size)).chunk(2, dim=-1)
        query = query.unflatten(-1, (heads, self.head_size))
        pooled = self.core_attention(query, key, value, visible_slots(windows))
        return self.linear_proj(pooled)[0].transpose(0, 1)
