"""Rotary position embedding of query and key heads, applied where Megatron's attention normalises them.

Megatron's own computes cosines and sines in every layer, for queries and for keys, and copies its result once more.
Letters: t tokens, b rows, h heads, d numbers in a head.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vlm.model.norm import TorchRMSNorm


def table(positions: torch.Tensor, theta: float, size: int, dtype: torch.dtype) -> torch.Tensor:
    """Cosines and sines for explicit positions (b, t): (2, t, b, 1, 1, size / 2) in `dtype`, for heads of `size`."""
    # float32 whatever the model's dtype: bf16 cannot hold positions beyond 256.
    pairs = torch.arange(0, size, 2, dtype=torch.float32, device=positions.device)
    angles = positions.t()[..., None].float() / theta ** (pairs / size)
    return torch.stack([angles.cos(), angles.sin()]).to(dtype)[:, :, :, None, None]


class Rotary(nn.Module):
    """Turns each head by the angles of its token. In Megatron's slot for a norm of heads."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__()
        #: What `table` gave for the tokens at hand: DecoderLayer lends it for the time of its forward.
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(t, b, h, d) -> the same."""
        return _rotate(x, self.table)


class NormedRotary(TorchRMSNorm):
    """RMSNorm of each head (Qwen3), then the turn."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float):
        super().__init__(config, hidden_size, eps)
        #: As in Rotary.
        self.table: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(t, b, h, d) -> the same."""
        return _rotate(super().forward(x), self.table)


def _rotate(x: torch.Tensor, cos_sin: torch.Tensor | None) -> torch.Tensor:
    assert cos_sin is not None, "DecoderLayer lends the angles before its attention runs"
    return _Rotate.apply(x, cos_sin) if torch.is_grad_enabled() else _turn(x, cos_sin, 1)


class _Rotate(torch.autograd.Function):
    """The first half of a head is the real, the second the imaginary part."""

    @staticmethod
    def forward(ctx, x, cos_sin):
        ctx.save_for_backward(cos_sin)
        return _turn(x, cos_sin, 1)

    @staticmethod
    def backward(ctx, gradient):
        (cos_sin,) = ctx.saved_tensors
        return _turn(gradient, cos_sin, -1), None


def _turn(x: torch.Tensor, cos_sin: torch.Tensor, sense: int) -> torch.Tensor:
    cos, sin = cos_sin.unbind()
    halves = x.unflatten(-1, (2, -1))
    out = halves * cos
    (real, imaginary), (first, second) = out.unbind(-2), halves.unbind(-2)
    real.addcmul_(second, sin[..., 0, :], value=-sense)
    imaginary.addcmul_(first, sin[..., 0, :], value=sense)
    return out.flatten(-2)
