"""Cross-entropy and z-loss of chosen tokens over a vocabulary sharded across tensor-parallel ranks.

Logits exist for one chunk of tokens at a time, in forward and in backward. Letters: k loss tokens, v rows of the head
on this rank, h hidden.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


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
    return _TokenLosses.apply(hidden, weight, targets, z_loss, chunk, group)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, z_loss, chunk, group):
        logsumexp = hidden.new_empty(len(hidden), dtype=torch.float32)
        target_logits = torch.zeros_like(logsumexp)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.t()).float()
            maximum = logits.amax(-1)
            _all_reduce(maximum, dist.ReduceOp.MAX, group)
            local, ours = _local_targets(targets[part], weight, group)
            sums = torch.stack(
                [
                    (logits - maximum[:, None]).exp_().sum(-1),
                    logits.gather(1, local[:, None])[:, 0].masked_fill(~ours, 0),
                ]
            )
            _all_reduce(sums, dist.ReduceOp.SUM, group)
            logsumexp[part] = maximum + sums[0].log()
            target_logits[part] = sums[1]
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.z_loss, ctx.chunk, ctx.group = z_loss, chunk, group
        return logsumexp - target_logits + z_loss * logsumexp.square()

    @staticmethod
    def backward(ctx, gradient):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            # Logits are computed once more: keeping them would hold k x v numbers.
            grad_logits = (hidden[part] @ weight.t()).float()
            grad_logits.sub_(logsumexp[part, None]).exp_()
            grad_logits.mul_((gradient[part] * (1 + 2 * ctx.z_loss * logsumexp[part]))[:, None])
            local, ours = _local_targets(targets[part], weight, ctx.group)
            grad_logits.scatter_add_(1, local[:, None], (-gradient[part]).masked_fill(~ours, 0)[:, None])
            grad_logits = grad_logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.t(), hidden[part])
        return grad_hidden, grad_weight, None, None, None, None


def _local_targets(
    targets: torch.Tensor, weight: torch.Tensor, group: dist.ProcessGroup
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each target in this rank's share of the head (0 where it is not here), and whether it is here."""
    local = targets - group.rank() * len(weight)
    ours = (local >= 0) & (local < len(weight))
    return local.masked_fill(~ours, 0), ours


def _all_reduce(tensor: torch.Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> None:
    if group.size() > 1:
        dist.all_reduce(tensor, op=operation, group=group)
