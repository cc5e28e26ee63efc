"""LayerNorm and RMSNorm for Megatron's layer specs, on any device and with sequence parallelism.

Megatron's own wrapper of torch's norms refuses sequence parallelism, and its wrapper of apex knows no RMSNorm.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vlm.model.kernels import PartConfig


class LayerNorm:
    """Zero mean, unit variance, then weight and bias: by the package that `config.kernels.norm` names."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> Any:
        """The module; its parameters are `weight` and `bias` whoever made it."""
        return _build(config, hidden_size, eps, TorchLayerNorm, "FusedLayerNorm")


class RMSNorm:
    """Unit mean square, then weight: likewise."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> Any:
        """The module; its parameter is `weight` whoever made it."""
        return _build(config, hidden_size, eps, TorchRMSNorm, "FusedRMSNorm")


def _build(config: TransformerConfig, hidden_size: int, eps: float, own: Any, apex_name: str) -> Any:
    package = config.kernels.norm if isinstance(config, PartConfig) else "torch"
    if package == "torch":
        return own(config, hidden_size, eps)
    if package == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm(config, hidden_size, eps)  # LayerNorm or RMSNorm by config.normalization
    from apex import normalization

    made = getattr(normalization, apex_name)(hidden_size, eps=eps).to(config.params_dtype)
    for parameter in made.parameters():
        parameter.sequence_parallel = config.sequence_parallel
    return made


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


class TorchLayerNorm(_Norm):
    """Zero mean, unit variance, then weight and bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__(config, hidden_size, eps, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> the same shape and dtype; statistics in float32."""
        return nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class TorchRMSNorm(_Norm):
    """Unit mean square, then weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6):
        super().__init__(config, hidden_size, eps, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden_size) -> the same shape and dtype.

        Statistics in float32, the product with the weight in the model's dtype: the order in which Qwen3 was trained.
        """
        if not torch.is_grad_enabled():  # an autograd function takes longer than the norm of a few tokens
            return _rms(x, self.weight, self.eps)[0]
        return _RmsNorm.apply(x, self.weight, self.eps)


def _rms(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm, and what each vector was multiplied with (float32)."""
    x32 = x.float()
    scale = torch.linalg.vector_norm(x32, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x32 * scale).to(x.dtype).mul_(weight), scale


class _RmsNorm(torch.autograd.Function):
    """As one function because autograd would keep float32 copies of x, two of them in bf16."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        out, scale = _rms(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        product = gradient * normed
        dot = (product @ weight.float())[..., None]
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = product.flatten(0, -2).sum(0).to(weight.dtype)
        del product
        along = (gradient * weight).float()
        return torch.addcmul(along, normed, dot, value=-1 / x.shape[-1]).mul_(scale).to(x.dtype), grad_weight, None
