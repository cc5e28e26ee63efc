"""flash-attn's `flash_attn_varlen_func` in plain torch: its arguments, their meaning and what it refuses.

Written from the documentation of flash-attn 2: cu_seqlens are int32 starts with the end behind them, queries and keys
are packed without gaps, causal is aligned to the bottom right corner, only 16-bit numbers are taken.
"""

from __future__ import annotations

import torch

HALF = (torch.float16, torch.bfloat16)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    """q (all queries, h, d), k and v (all keys, heads that divide h, d) -> (all queries, h, d)."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in HALF and dropout_p == 0.0
    assert q.shape[2] % 8 == 0 and q.shape[2] <= 256 and q.shape[1] % k.shape[1] == 0 and k.shape == v.shape
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    for starts, tensor, most in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
        assert starts.dtype == torch.int32 and starts.is_contiguous() and starts[0] == 0 and starts[-1] == len(tensor)
        assert isinstance(most, int) and most == starts.diff().max()
    repeat = q.shape[1] // k.shape[1]
    scale = q.shape[2] ** -0.5 if softmax_scale is None else softmax_scale
    outs = []
    for query, key, value in zip(
        q.split(cu_seqlens_q.diff().tolist()),
        *(x.split(cu_seqlens_k.diff().tolist()) for x in (k, v)),
        strict=True,
    ):
        key, value = (x.float().repeat_interleave(repeat, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query.float(), key) * scale
        if causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(key) - len(query))
            scores = scores.masked_fill(hidden, -torch.inf)
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(outs).to(q.dtype)
