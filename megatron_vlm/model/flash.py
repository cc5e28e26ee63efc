"""flash-attn for what is plain: rows without images and branches (causal), crops of the vision tower (full).

One call serves all runs of a micro-batch, whatever their lengths. The call itself stands in one function, `call`: it
cannot run without a GPU, so the tests put a plain implementation with the same signature in its place. Letters: b rows,
s tokens in a row, q queries (all of the row or a part of it), h query heads, k key-value heads, d numbers in a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_vlm.batch import PAD
from megatron_vlm.model import attention_kernels
from megatron_vlm.model.mask import Mark


@dataclass(frozen=True)
class Runs:
    """Runs of queries, one after the other, each against its own run of keys."""

    cu_queries: torch.Tensor
    """(n + 1,) int32: where each run's queries begin, and where the last ones end."""
    cu_keys: torch.Tensor
    """The same of its keys."""
    most_queries: int
    """Queries of the longest run."""
    most_keys: int
    """Keys of the longest run."""


def call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, runs: Runs, *, causal: bool, scale: float | None
) -> torch.Tensor:
    """Query (all queries, h, d), key and value (all keys, k, d) -> (all queries, h, d).

    causal: the last query of a run sees all of its keys, each earlier one a key less. scale: of the scores, None =
    1 / sqrt(d).
    """
    function = attention_kernels.flash_function()
    assert function is not None, "attention_kernels.choose has found flash-attn"
    out = function(
        query,
        key,
        value,
        cu_seqlens_q=runs.cu_queries,
        cu_seqlens_k=runs.cu_keys,
        max_seqlen_q=runs.most_queries,
        max_seqlen_k=runs.most_keys,
        softmax_scale=scale,
        causal=causal,
    )
    return out[0] if isinstance(out, tuple) else out  # early versions of 3 give the log-sum-exp too


def plain(marks: torch.Tensor) -> bool:
    """Whether every token of the rows (marks: (5, b, s)) sees all that stands before it in its example, and no more."""
    example, branch, vision = marks[Mark.EXAMPLE], marks[Mark.BRANCH], marks[Mark.VISION]
    # A query sees the keys of its own and of larger branches (mask.visible): all before it, if the numbers only fall.
    falls = (branch[:, 1:] <= branch[:, :-1]) | (example[:, 1:] != example[:, :-1])
    return not bool(vision.any()) and bool(falls.all())


class FlashRows:
    """What the queries at [first, last) of a micro-batch's plain rows see."""

    def __init__(self, marks: torch.Tensor, first: int, last: int):
        """`marks`: (5, b, s) int64, for which `plain` holds. Padding is a run of its own, whose output is dropped."""
        queries, keys, self._keys = [], [], []
        for example in marks[Mark.EXAMPLE].cpu():
            spans = [(start, end) for start, end in _spans(example) if start < last and end > first]
            queries += [min(end, last) - max(start, first) for start, end in spans]
            keys += [min(end, last) - start for start, end in spans]
            self._keys.append((spans[0][0] if spans else first, last))
        self.runs = _runs(queries, keys, marks.device)
        padding = (marks[Mark.EXAMPLE, :, first:last] == PAD).t()[..., None, None]
        self._padding = padding if bool(padding.any()) else None

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None = None
    ) -> torch.Tensor:
        """Query (q, b, h, d), key and value (s, b, k, d) -> (q, b, h, d); padding gives zeros."""
        key, value = (
            torch.cat([x[start:end, row] for row, (start, end) in enumerate(self._keys)]) for x in (key, value)
        )
        rows = query.transpose(0, 1).flatten(0, 1)
        out = call(rows, key, value, self.runs, causal=True, scale=scale)
        out = out.unflatten(0, (query.shape[1], -1)).transpose(0, 1)
        return out if self._padding is None else out.masked_fill(self._padding, 0)


def attend_crops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, tokens: int, scale: float | None
) -> torch.Tensor:
    """(crops x tokens, heads, d), keys and values alike -> the same; each crop sees itself."""
    runs = crop_runs(len(query) // tokens, tokens, query.device)
    return call(query, key, value, runs, causal=False, scale=scale)


def crop_runs(crops: int, tokens: int, device: torch.device) -> Runs:
    """Runs of crops that stand one after the other."""
    starts = torch.arange(0, (crops + 1) * tokens, tokens, dtype=torch.int32, device=device)
    return Runs(starts, starts, tokens, tokens)


def _spans(example: torch.Tensor) -> list[tuple[int, int]]:
    """Where each run of one number begins and ends, padding included."""
    ends = torch.unique_consecutive(example, return_counts=True)[1].cumsum(0).tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _runs(queries: list[int], keys: list[int], device: torch.device) -> Runs:
    lengths = (torch.tensor([0, *each], dtype=torch.int32) for each in (queries, keys))
    cu_queries, cu_keys = (each.cumsum(0, dtype=torch.int32).to(device) for each in lengths)
    return Runs(cu_queries, cu_keys, max(queries, default=0), max(keys, default=0))
