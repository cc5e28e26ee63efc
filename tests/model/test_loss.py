"""Chunked, vocabulary-sharded loss against cross-entropy over whole logits."""

from __future__ import annotations

import pytest
import torch

from megatron_vlm.parallel.layout import Layout

TOKENS, HIDDEN, VOCABULARY, Z_LOSS = 23, 24, 40, 1e-2


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator)
    upstream = torch.rand(TOKENS, generator=generator)
    return hidden, weight, targets, upstream


def plain() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses and gradients of hidden and weight from whole logits."""
    hidden, weight, targets, upstream = tensors()
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden @ weight.t()
    losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    losses = losses + Z_LOSS * logits.logsumexp(-1).square()
    return losses.detach(), *torch.autograd.grad(losses, (hidden, weight), upstream)


def sharded(layout: Layout, chunk: int, tokens: int, frozen: bool) -> tuple[torch.Tensor, ...]:
    """The same by token_losses, on every tensor-parallel rank: losses, this rank's shares of the gradients."""
    from megatron_vlm.model.loss import token_losses
    from megatron_vlm.parallel import groups

    groups.initialize(layout)
    group = groups.tensor()
    hidden, weight, targets, upstream = tensors()
    hidden = hidden[:tokens].requires_grad_()
    weight = weight.chunk(group.size())[group.rank()].clone().requires_grad_(not frozen)
    losses = token_losses(hidden, weight, targets[:tokens], z_loss=Z_LOSS, chunk=chunk, group=group)
    (losses * upstream[:tokens]).sum().backward()
    assert (weight.grad is None) == frozen
    return losses.detach(), hidden.grad, torch.zeros_like(weight) if frozen else weight.grad


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("chunk", [5, 100])
def test_equals_loss_of_whole_logits(pool, world, chunk):
    ranks = pool(world).run(sharded, Layout(world, tensor=world), chunk, TOKENS, False)
    losses, grad_hidden, grad_weight = plain()
    for rank in ranks:
        torch.testing.assert_close(rank[0], losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sum(rank[1] for rank in ranks), grad_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([rank[2] for rank in ranks]), grad_weight, rtol=1e-5, atol=1e-5)


def test_frozen_head_and_no_tokens(pool):
    (found,) = pool(1).run(sharded, Layout(1), 5, TOKENS, True)
    torch.testing.assert_close(found[1], plain()[1], rtol=1e-5, atol=1e-5)
    for losses, grad_hidden, grad_weight in pool(2).run(sharded, Layout(2, tensor=2), 5, 0, False):
        assert losses.shape == (0,) and grad_hidden.shape == (0, HIDDEN)
        assert not grad_weight.any()


def test_logits_never_exceed_the_chunk(one_rank):
    from megatron_vlm.model.loss import token_losses
    from megatron_vlm.parallel import groups
    from tests.model.test_attention import Largest

    hidden, weight = torch.randn(512, 8, requires_grad=True), torch.randn(1000, 8, requires_grad=True)
    targets = torch.randint(1000, (512,))
    with Largest() as largest:
        token_losses(hidden, weight, targets, z_loss=1e-4, chunk=16, group=groups.tensor()).sum().backward()
    assert largest.numbers == 16 * 1000
