"""One block of attention with the log-sum-exp of its scores, and its gradients.

Shapes: query and output (1, h, q, d), key and value (1, k, n, d) with k dividing h, mask (q or 1, n) to add to the
scores, log-sum-exp (1, h, q) float32.
"""

from __future__ import annotations

import torch

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

#: Added to the score of a key that may not be seen. Finite, so that a run of unseen keys gives no NaN in a kernel that
#: works through keys run by run; its exponential is exactly 0 beside any score that is seen.
UNSEEN = -1e30
#: Queries whose scores `plain` holds at once.
RUN = 256
#: Numbers in the queries or keys of a head, up to which the CPU computes bf16 in float32: torch's kernel sends every
#: bf16 product through oneDNN by itself, so that heads of 64 numbers had a backward of 9 tokens 20 times as long, one
#: of 128 tokens 2.5 times, one of 512 0.84 times as long as in float32.
SHORT = 20_480


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp. causal: as many keys as queries, each sees those up to its own place; scale: of the
    scores, None = 1 / sqrt(d)."""
    if query.device.type == "cpu":
        if in_float32(query, key):
            query, key, value = query.float(), key.float(), value.float()
        return _flash(query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return plain(query, key, value, causal, mask, scale)


def backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value. `out` and `logsumexp` may be those over more keys than `key` holds: then these
    are the parts that belong to them."""
    if query.device.type == "cpu":
        if in_float32(query, key):
            gradient, query, key, value, out = (x.float() for x in (gradient, query, key, value, out))
        return _flash_backward(gradient, query, key, value, out, logsumexp, 0.0, causal, attn_mask=mask, scale=scale)
    return plain_backward(gradient, query, key, value, out, logsumexp, causal, mask, scale)


def in_float32(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether `forward` and `backward` compute in float32, and give it, although the arguments are of fewer bits."""
    if query.device.type != "cpu" or query.dtype == torch.float32:
        return False
    return max(query.shape[2], key.shape[2]) * query.shape[3] <= SHORT


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` by matrix products, RUN queries at a time: for devices whose fused kernels hide the log-sum-exp or
    take no mask."""
    outs, sums = [], []
    for first in range(0, query.shape[2], RUN):
        scores = _scores(query, key, causal, mask, scale, first)
        sums.append(scores.logsumexp(-1))
        weights = (scores - sums[-1][..., None]).exp().to(value.dtype)
        outs.append((weights @ value[:, :, None]).flatten(1, 2))
    return torch.cat(outs, 2), torch.cat(sums, 3).flatten(1, 2)


def plain_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`backward` likewise."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    grad_queries: list[torch.Tensor] = []
    grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
    for first in range(0, query.shape[2], RUN):
        run = slice(first, first + RUN)
        scores = _scores(query, key, causal, mask, scale, first)
        grouped = (1, key.shape[1], -1)
        weights = (scores - logsumexp[:, :, run].unflatten(1, grouped[1:])[..., None]).exp()
        upward = gradient[:, :, run].unflatten(1, grouped[1:])
        dot = (upward.float() * out[:, :, run].unflatten(1, grouped[1:]).float()).sum(-1, keepdim=True)
        inner = (weights * ((upward @ value[:, :, None].mT).float() - dot) * scale).to(query.dtype)
        grad_queries.append((inner @ key[:, :, None]).flatten(1, 2))
        grad_key += (inner.mT @ query[:, :, run].unflatten(1, grouped[1:])).sum(2)
        grad_value += (weights.to(upward.dtype).mT @ upward).sum(2)
    return torch.cat(grad_queries, 2), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _scores(
    query: torch.Tensor,
    key: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    scale: float | None,
    first: int,
) -> torch.Tensor:
    """Scores of RUN queries from `first` on, (1, k, h / k, RUN, n) float32, masked."""
    part = query[:, :, first : first + RUN].unflatten(1, (key.shape[1], -1))
    scores = (part @ key[:, :, None].mT).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores + (mask if len(mask) == 1 else mask[first : first + RUN])
    if causal:
        place = torch.arange(first, first + part.shape[3], device=query.device)
        hidden = torch.arange(key.shape[2], device=query.device) > place[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores
