"""LayerNorm and RMSNorm for Megatron's layer specs, on any device and with sequence parallelism.

Megatron's own wrapper of torch's norms refuses sequence parallelism; its fused norms need apex or Transformer Engine.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn


class _Norm(nn.Module):
    """Scale (and shift) over the last dimension.

    Each rank normalises its own part of a sequence-parallel sequence, so the weights' gradients are partial sums there:
    the attribute `sequence_parallel` makes Megatron add them up over the tensor-parallel ranks.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, bias: bool):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype)) if bias else None
        )
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel


class LayerNorm(_Norm):
    """Zero mean, unit variance, then weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__(config, hidden_size, eps, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> the same shape and dtype; statistics in float32."""
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(_Norm):
    """Unit mean square, then weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__(config, hidden_size, eps, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> the same shape and dtype.

        Statistics in float32, the product with the weight in the model's dtype: the order in which Qwen3 was trained.
        """
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)
