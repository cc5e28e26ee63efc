"""Which of the ranks that share a row deal attention heads among themselves, and which gather keys. Integers only."""

from __future__ import annotations

import math

from megatron_vlm.config.architecture import LanguageArchitecture
from megatron_vlm.config.schema import ParallelConfig


def head_ranks(parallel: ParallelConfig, language: LanguageArchitecture) -> int:
    """Context ranks among which attention deals its heads (Ulysses). The parallel.context / head_ranks ranks that then
    have the same heads gather keys and values, or pass them around.

    The largest divisor of parallel.context for which each rank gets whole query heads and the key and value heads that
    go with them; 1 where parallel.context_method is gather or ring.
    """
    if parallel.context_method in ("gather", "ring"):
        return 1
    heads, kv_heads = (max(1, count // parallel.tensor) for count in (language.heads, language.kv_heads))
    divisors = (n for n in range(parallel.context, 0, -1) if parallel.context % n == 0)
    return next((n for n in divisors if heads % math.lcm(kv_heads, n) == 0), 1)
