"""Dropout of the decoder's residual branches that does not depend on the layout.

Whether a channel is dropped is a hash of (seed, row, place in the row, layer, sub-layer, channel), so every rank,
chunk, recomputation and layout draws the same mask, without a random generator. The place in the row stands for
example, branch and position; row numbers are unique in a run and stand for the step. Letters: t tokens at hand, b rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from megatron_vlm.model.mask import Mark

_BITS = 31
_MASK = (1 << _BITS) - 1


@dataclass(frozen=True)
class DropoutSettings:
    """How much is dropped. Where both apply, the larger probability counts."""

    seed: int
    residual: float
    """Probability at every token."""
    response: float
    """Probability at tokens with a loss."""

    @property
    def active(self) -> bool:
        return self.residual > 0 or self.response > 0


class BiasDropoutAdd(nn.Module):
    """Megatron's bias-dropout-add slot: residual + dropout(output + bias).

    The layer tells it the places of its tokens before each forward (see DecoderLayer), also when it is recomputed.
    """

    def __init__(self, settings: DropoutSettings):
        super().__init__()
        self.settings = settings
        #: Marks (5, t, b) and indices (t,) of the tokens at hand, and the number of this sub-layer in the model.
        self.tokens: tuple[torch.Tensor, torch.Tensor] | None = None
        self.site = 0

    def forward(self, training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        """The function that Megatron's layer then calls with (output, bias), residual and a probability of its own."""
        return self._drop_and_add if training and self.settings.active else _add

    def _drop_and_add(
        self, output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, _: float
    ) -> torch.Tensor:
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        assert self.tokens is not None, "DecoderLayer gives the tokens before its sub-layers run"
        scale, threshold, keys = self._per_token(*self.tokens)
        kept = draw(keys, output.shape[-1]) >= threshold
        return torch.addcmul(residual, output, kept * scale.to(output.dtype))

    def _per_token(self, marks: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """1 / (1 - p), the number below which a draw is dropped, and the hash key, each (t, b, 1)."""
        settings = self.settings
        at_response = max(settings.residual, settings.response)
        p = torch.where(marks[Mark.RESPONSE].bool(), at_response, settings.residual)[..., None]
        key = _mix(torch.full_like(marks[Mark.ROW], settings.seed & _MASK) + self.site * 0x3C6EF372)
        key = _mix(key ^ (marks[Mark.ROW] & _MASK))
        key = _mix(key ^ (marks[Mark.ROW] >> _BITS & _MASK))
        key = _mix(key ^ index[:, None])
        return 1 / (1 - p), (p * (1 << _BITS)).to(torch.int32), key.to(torch.int32)[..., None]


def _add(output_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, _: float) -> torch.Tensor:
    output, bias = output_with_bias
    return residual + (output if bias is None else output + bias)


def draw(keys: torch.Tensor, channels: int) -> torch.Tensor:
    """Uniform integers in [0, 2^31): keys (t, b, 1) int32 -> (t, b, channels) int32."""
    channel = _mix(torch.arange(1, channels + 1, dtype=torch.int64, device=keys.device) * 0x1E3779B1).to(torch.int32)
    x = keys ^ channel
    # Two rounds of multiply and shift. In 32 bits products wrap, which is what spreads the bits; signs are cut off.
    for factor, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 16)):
        x = x * factor & _MASK
        x = x ^ x >> shift
    return x


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Spread the bits of integers (int64) over [0, 2^31)."""
    x = x & _MASK
    for factor, shift in ((0x2C1B3C6D, 15), (0x297A2D39, 16), (0x31848BAB, 14)):
        x = (x ^ x >> shift) * factor & _MASK
    return x ^ x >> 15
