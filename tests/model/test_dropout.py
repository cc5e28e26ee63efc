"""Dropout: the right share of channels at the right tokens, the same mask wherever and whenever it is drawn."""

from __future__ import annotations

import pytest
import torch

from tests.model import tiny


def dropped(residual: float, response: float, *, rows=(0, 1), site: int = 4, seed: int = 3, channels: int = 512):
    """(share kept and scale applied, marks): what the slot adds to zeros for outputs of one, (t, b, channels)."""
    from megatron_vlm.model.dropout import BiasDropoutAdd, DropoutSettings
    from megatron_vlm.model.mask import marks

    slot = BiasDropoutAdd(DropoutSettings(seed, residual, response))
    slot.site = site
    found = marks(tiny.batch(tiny.ARCH, list(rows))).transpose(1, 2)
    slot.tokens = (found, torch.arange(found.shape[1]))
    shape = (*found.shape[1:], channels)
    return slot(True, False)((torch.ones(shape), None), torch.zeros(shape), 0.0), found


def test_share_of_channels(one_rank):
    from megatron_vlm.model.mask import Mark

    out, marks = dropped(0.1, 0.4)
    response = marks[Mark.RESPONSE].bool()
    for tokens, p in ((~response, 0.1), (response, 0.4)):
        kept = out[tokens]
        assert kept.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        deviation = (p * (1 - p) / kept.numel()) ** 0.5
        assert (kept == 0).float().mean().item() == pytest.approx(p, abs=4 * deviation)
        # No channel and no token is favoured: shares spread as those of independent draws do.
        for dim in (0, 1):
            shares = (kept == 0).float().mean(dim)
            expected = (p * (1 - p) / kept.shape[dim]) ** 0.5
            assert shares.std().item() == pytest.approx(expected, rel=0.25)


def test_response_only(one_rank):
    from megatron_vlm.model.mask import Mark

    out, marks = dropped(0.0, 0.5)
    assert (out[~marks[Mark.RESPONSE].bool()] == 1).all()
    assert (out == 0).any()


def test_masks_are_keyed(one_rank):
    mask = dropped(0.5, 0.0)[0] == 0
    assert torch.equal(mask, dropped(0.5, 0.0)[0] == 0)
    others = [dropped(0.5, 0.0, seed=4)[0], dropped(0.5, 0.0, site=5)[0], dropped(0.5, 0.0, rows=(2, 3))[0]]
    others.append(dropped(0.5, 0.0)[0].flip(0))
    others.append(dropped(0.5, 0.0, rows=(1 << 31, (1 << 31) + 1))[0])  # numbers of rows have more than 31 bits
    for other in others:
        # Independent masks agree on half of the channels.
        assert ((other == 0) == mask).float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_each_sub_layer_draws_its_own_mask(one_rank):
    from megatron_vlm.model.build import build
    from megatron_vlm.model.dropout import BiasDropoutAdd
    from megatron_vlm.parallel.layout import Layout

    (model,) = build(tiny.config(tiny.ARCH, residual_dropout=0.1), Layout(1))
    sites = [module.site for module in model.modules() if isinstance(module, BiasDropoutAdd)]
    assert len(set(sites)) == len(sites) == 2 * tiny.ARCH.language.layers


def test_bias_residual_and_evaluation(one_rank):
    from megatron_vlm.model.dropout import BiasDropoutAdd, DropoutSettings

    slot = BiasDropoutAdd(DropoutSettings(0, 0.5, 0.0))
    output, bias, residual = torch.randn(3, 1, 4), torch.randn(4), torch.randn(3, 1, 4)
    torch.testing.assert_close(slot(False, False)((output, bias), residual, 0.5), output + bias + residual)
