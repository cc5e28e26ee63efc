"""Matrix products by the faster of the two libraries that torch has for a CPU.

torch gives float32 products to MKL, which leaves AVX-512 unused on processors of AMD. oneDNN, to which it gives bf16,
uses it: 2048 x 64 times 64 x 384 take 0.42 ms instead of 0.91, 256 x 1024 times 1024 x 3072 take 7.1 instead of 15.8,
in the same float32. Everywhere else this is torch's own operator.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import nn

#: Multiplications below which it does not matter: a call of oneDNN costs 15 microseconds, the first of a shape 250.
LEAST = 4_000_000


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., in) times weight (out, in) transposed, plus bias (out,): torch.nn.functional.linear."""
    if not _by_onednn(x, weight):
        return nn.functional.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() else product(x, weight, bias)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The same without autograd."""
    if not _by_onednn(x, weight):
        return nn.functional.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """The operator of oneDNN has no backward of its own."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        gradient = gradient.contiguous()  # of a sum it is one number with strides of 0, which oneDNN does not know
        flat = gradient.flatten(0, -2)
        return (
            product(gradient, weight.t()) if wants_x else None,
            product(flat.t(), x.flatten(0, -2).t()) if wants_weight else None,
            flat.sum(0) if wants_bias else None,
        )


def _by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() * weight.shape[0] < LEAST:
        return False
    return _amd_with_avx512()


@cache
def _amd_with_avx512() -> bool:
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    known = torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.backends.mkldnn.is_available()
    return known and "AuthenticAMD" in described
