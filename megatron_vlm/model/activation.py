"""SwiGLU for Megatron's MLP, in the slot for an activation module: keeps its input alone for backward."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

_silu_backward = torch.ops.aten.silu_backward.grad_input


class SwiGlu(MegatronModule):
    """silu(gate) x up of the two halves of the last dimension."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 2 x width) [gate; up] -> (..., width)."""
        return _SwiGlu.apply(x)


class _SwiGlu(torch.autograd.Function):
    """As one function because autograd would keep three tensors and add 0 to one half, as Megatron's MLP does."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.mul(gradient, nn.functional.silu(gate), out=grad_up)
        _silu_backward(gradient * up, gate, grad_input=grad_gate)
        return out
