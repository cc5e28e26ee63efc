"""Operators with a backward of their own (norm, SwiGLU, rotary embedding, linear) against autograd on formulas."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_vlm.parallel.layout import Layout
from tests.model import tiny

DTYPES = {"float32": (torch.float32, 1e-5), "bf16": (torch.bfloat16, 0.06)}


def agree(found, expected, inputs: list[torch.Tensor], tolerance: float) -> None:
    """Outputs and gradients, those of the formula computed in float32."""
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(found, inputs, upstream.to(found.dtype))
    theirs = torch.autograd.grad(expected, inputs, upstream.to(expected.dtype))
    for one, other in zip((found, *ours), (expected, *theirs), strict=True):
        assert one.dtype == found.dtype
        scale = other.float().abs().max()
        assert scale > 0
        worst = (one.float() - other.float()).abs().max() / scale
        print(f"{worst:.1e}")
        assert worst < tolerance


def made(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype, tolerance", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(7, 2, 24), (5, 1, 3, 16)])
def test_rms_norm(one_rank, shape, dtype, tolerance):
    from megatron_vlm.model.norm import _RmsNorm

    x, weight = made(shape, dtype), made(shape[-1:], dtype, 2)
    x32 = x.float()
    expected = weight.float() * x32 / (x32.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    agree(_RmsNorm.apply(x, weight, 1e-6), expected, [x, weight], tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES.values(), ids=DTYPES)
def test_swiglu(one_rank, dtype, tolerance):
    from megatron_vlm.model.activation import _SwiGlu

    x = made((6, 2, 40), dtype)
    gate, up = x.float().chunk(2, -1)
    agree(_SwiGlu.apply(x), nn.functional.silu(gate) * up, [x], tolerance)


@pytest.mark.parametrize("dtype, tolerance", DTYPES.values(), ids=DTYPES)
def test_rotary(one_rank, dtype, tolerance):
    """Each pair (i, i + d/2) of a head is a complex number, turned by position x theta^(-2i/d)."""
    from megatron_vlm.model import rotary

    x = made((6, 2, 3, 16), dtype)
    positions = torch.tensor([[0, 1, 2, 3, 0, 700], [5, 6, 0, 1, 2, 3]])
    found = rotary._rotate(x, rotary.table(positions, 1e4, 16, dtype))
    angles = positions.t()[..., None] / 1e4 ** (torch.arange(0, 16, 2) / 16)
    turned = torch.complex(*x.float().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)[:, :, None]
    agree(found, torch.cat([turned.real, turned.imag], -1), [x], tolerance)


def test_attention_without_angles_is_refused(one_rank):
    from megatron_vlm.model import rotary

    with pytest.raises(AssertionError, match="lends the angles"):
        rotary._rotate(torch.ones(2, 1, 1, 4), None)


def test_a_rank_alone_computes_what_megatrons_layer_does(one_rank):
    """Both kinds, with a bias: inside the product here, handed to the caller there."""
    from megatron.core import tensor_parallel

    from megatron_vlm.model.build import build

    (model,) = build(tiny.config(tiny.ARCH), Layout(1))
    layer = model.vision.blocks[0].layers[0].mlp
    nn.init.normal_(layer.linear_fc1.bias)
    nn.init.normal_(layer.linear_fc2.bias)
    for linear, whole in (
        (layer.linear_fc1, tensor_parallel.ColumnParallelLinear),
        (layer.linear_fc2, tensor_parallel.RowParallelLinear),
    ):
        x = made((5, 1, linear.weight.shape[1]), torch.float32)
        found, left = linear(x)
        expected, bias = whole.forward(linear, x)
        assert left is None and bias is linear.bias
        agree(found, expected + bias, [x, linear.weight, linear.bias], 1e-5)


def test_crops_in_one_sequence_do_not_see_each_other(one_rank):
    from megatron_vlm.model.full_attention import CropAttention, FullAttention

    query, key, value = (made((3 * 5, 1, 2, 8), torch.float32, seed) for seed in range(3))
    found = CropAttention(None, 5)(query, key, value, None)
    # Megatron's order: tokens, crops, heads.
    apart = [x.unflatten(0, (3, 5))[:, :, 0].transpose(0, 1) for x in (query, key, value)]
    expected = FullAttention(None)(*apart, None).transpose(0, 1).flatten(0, 1)[:, None]
    agree(found, expected, [query, key, value], 1e-5)


@pytest.mark.parametrize("bias", [True, False])
def test_products_of_onednn_are_torchs(monkeypatch, one_rank, bias):
    """With gradients, whatever this processor is; and what is small stays torch's."""
    from megatron_vlm.model import products

    monkeypatch.setattr(products, "_amd_with_avx512", lambda: True)
    x, weight = made((130, 2, 96), torch.float32), made((192, 96), torch.float32, 1)
    inputs = [x, weight, *([made((192,), torch.float32, 2)] if bias else [])]
    found = products.linear(*inputs)
    assert type(found.grad_fn).__name__ == "_LinearBackward"
    agree(found, nn.functional.linear(*inputs), inputs, 1e-5)
    (of_sum,) = torch.autograd.grad(products.linear(*inputs).sum(), x)
    torch.testing.assert_close(of_sum, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(products.linear(*inputs), found)
    assert products.linear(x[:3], weight).grad_fn.name() != "_LinearBackward"
