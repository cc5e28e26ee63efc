"""Attention of the vision tower and the connectors: every query sees every key of its own crop or window."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_vlm.model import block_kernels, flash

#: Batches of one call: CUDA kernels count them in the dimension of their grid that ends at 65,535. A micro-batch of
#: small windows has more.
BATCHES = 32_768


class FullAttention(nn.Module):
    """Megatron's `core_attention` slot with every key visible to every query.

    Megatron's own module asks for CUDA buffers, and its ViT layer spec is causal without saying so.
    `attention_mask`, if given, is bool (batch, keys), False at keys that nobody sees; a row needs one True.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **unused: Any):
        super().__init__()
        self.scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **unused: Any,
    ) -> torch.Tensor:
        """(queries, batch, heads, size), keys and values alike -> (queries, batch, heads x size)."""
        queries, keys, values = (x.permute(1, 2, 0, 3).split(BATCHES) for x in (query, key, value))
        masks = [None] * len(queries) if attention_mask is None else attention_mask[:, None, None, :].split(BATCHES)
        parts = [_attend(*part, self.scale) for part in zip(queries, keys, values, masks, strict=True)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.permute(2, 0, 1, 3).flatten(2)


class CropAttention(nn.Module):
    """The same slot for crops that stand one after the other in one sequence: each of `tokens` sees its own crop.

    One sequence, because Megatron's order (sequence before batch) would have every product copy what it reads.
    kernel: torch or flash (attention_kernels.Kernels.crops).
    """

    def __init__(
        self,
        config: TransformerConfig,
        tokens: int,
        softmax_scale: float | None = None,
        kernel: str = "torch",
        **unused: Any,
    ):
        super().__init__()
        self.tokens, self.scale, self.kernel = tokens, softmax_scale, kernel

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **unused: Any,
    ) -> torch.Tensor:
        """(crops x tokens, 1, heads, size), keys and values alike -> (crops x tokens, 1, heads x size)."""
        if self.kernel == "flash":
            out = flash.attend_crops(query[:, 0], key[:, 0], value[:, 0], self.tokens, self.scale)
            return out.flatten(1)[:, None]
        query, key, value = (x.unflatten(0, (-1, self.tokens))[:, :, 0].transpose(1, 2) for x in (query, key, value))
        out = _attend(query, key, value, None, self.scale)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)[:, None]


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """Query (batch, heads, queries, size), key and value (batch, heads, keys, size), visible None or bool (batch, 1, 1,
    keys) -> (batch, heads, queries, size)."""
    if block_kernels.in_float32(query, key):
        return _InFloat32.apply(query, key, value, visible, scale)
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)


class _InFloat32(torch.autograd.Function):
    """As one function because autograd would keep the float32 copies for backward."""

    @staticmethod
    def forward(ctx, query, key, value, visible, scale):
        mask = None
        if visible is not None:
            mask = torch.zeros(visible.shape).masked_fill_(~visible, block_kernels.UNSEEN)
        out, logsumexp = block_kernels.forward(query, key, value, False, mask, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, logsumexp, mask)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, logsumexp, mask = ctx.saved_tensors
        grads = block_kernels.backward(gradient, query, key, value, out, logsumexp, False, mask, ctx.scale)
        return *(each.to(gradient.dtype) for each in grads), None, None
