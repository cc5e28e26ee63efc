"""Cross-entropy and z-loss of chosen tokens over a vocabulary sharded across tensor-parallel ranks.

Logits exist for one chunk of tokens at a time. Letters: k loss tokens, v rows of the head
on this rank, h hidden.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_vlm.model.products import product


def token_losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    z_loss: float,
    chunk: int,
    group: dist.ProcessGroup,
) -> torch.Tensor:
    """Cross-entropy + z_loss x logsumexp^2 of each token.

    hidden: (k, h), the same on all ranks of `group`; weight: (v, h), this rank's contiguous share of the head's rows;
    targets: (k,) int64 ids; chunk: tokens whose logits are in memory at once. Out: (k,) float32, the same on all ranks.
    k may be 0. The gradient of hidden is this rank's share: the caller's mapping (copy to, or gather from, the
    tensor-parallel region) adds the shares up. Moves: two all-reduces of k numbers a chunk.
    """
    wants = torch.is_grad_enabled()
    return _TokenLosses.apply(
        hidden, weight, targets, z_loss, chunk, group, wants and hidden.requires_grad, wants and weight.requires_grad
    )


class _TokenLosses(torch.autograd.Function):
    """Forward also computes what backward then only has to scale, while the logits are there.

    A token's gradient of hidden is its upstream gradient times a vector that forward can know: so that is kept, k x h
    numbers. The weight's gradient sums over tokens: it needs each one's gradient of the logits. Those of the last chunk
    are kept (its backward usually comes next, when they would be in memory anyway), those of others computed again.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, chunk, group, want_hidden, want_weight):
        logsumexp = hidden.new_empty(len(hidden), dtype=torch.float32)
        target_logits = torch.zeros_like(logsumexp)
        unit = torch.empty_like(hidden) if want_hidden else None
        grad_logits = None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            grad_logits = None
            logits = product(hidden[part], weight)
            local, ours = _local_targets(targets[part], weight, group)
            largest = logits.amax(-1).float()
            wanted = logits.gather(1, local[:, None])[:, 0].float().masked_fill(~ours, 0)
            shares = logits.softmax(-1, dtype=torch.float32)
            del logits
            # Of this rank's rows of the head; then of all. The largest share is never too small for a logarithm.
            local_sums = largest - shares.amax(-1).log()
            logsumexp[part], target_logits[part] = _over_ranks(local_sums, wanted, group)
            if not (want_hidden or want_weight):
                continue
            if group.size() > 1:
                shares *= (local_sums - logsumexp[part]).exp()[:, None]
            grad_logits = _unit_gradient(shares, logsumexp[part], local, ours, z_loss).to(weight.dtype)
            del shares
            if unit is not None:
                unit[part] = product(grad_logits, weight.t())
        ctx.save_for_backward(hidden, weight, targets, logsumexp, unit, grad_logits if want_weight else None)
        ctx.z_loss, ctx.chunk, ctx.group, ctx.want_weight = z_loss, chunk, group, want_weight
        return logsumexp - target_logits + z_loss * logsumexp.square()

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, targets, logsumexp, unit, kept = ctx.saved_tensors
        grad_hidden = None if unit is None else (unit * gradient[:, None]).to(unit.dtype)
        if not ctx.want_weight:
            return grad_hidden, *[None] * 7
        scaled = (hidden * gradient[:, None]).to(hidden.dtype)
        if 0 < len(hidden) <= ctx.chunk:
            return grad_hidden, product(kept.t(), scaled.t()), *[None] * 6
        grad_weight = torch.zeros_like(weight)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad_logits = kept
            if start + ctx.chunk < len(hidden):
                shares = product(hidden[part], weight).float().sub_(logsumexp[part, None]).exp_()
                local, ours = _local_targets(targets[part], weight, ctx.group)
                grad_logits = _unit_gradient(shares, logsumexp[part], local, ours, ctx.z_loss).to(weight.dtype)
            grad_weight.addmm_(grad_logits.t(), scaled[part])
        return grad_hidden, grad_weight, *[None] * 6


def _unit_gradient(
    shares: torch.Tensor, logsumexp: torch.Tensor, local: torch.Tensor, ours: torch.Tensor, z_loss: float
) -> torch.Tensor:
    """Gradient of each token's loss by its logits. shares: (n, v) their softmax, which is overwritten."""
    if z_loss:
        shares.mul_((1 + 2 * z_loss * logsumexp)[:, None])
    return shares.scatter_add_(1, local[:, None], -ours.to(shares.dtype)[:, None])


def _over_ranks(
    local_sums: torch.Tensor, wanted: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp over all ranks' rows, and the target's logit, from those of each rank (0 where it is elsewhere)."""
    if group.size() == 1:
        return local_sums, wanted
    maximum = local_sums.clone()
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
    sums = torch.stack([(local_sums - maximum).exp(), wanted])
    dist.all_reduce(sums, op=dist.ReduceOp.SUM, group=group)
    return maximum + sums[0].log(), sums[1]


def _local_targets(
    targets: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each target in this rank's share of the head (0 where it is not here), and whether it is here."""
    local = targets - group.rank() * len(weight)
    ours = (local >= 0) & (local < len(weight))
    return local.masked_fill(~ours, 0), ours
