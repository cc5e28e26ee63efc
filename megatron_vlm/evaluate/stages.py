"""A forward pass through the pipeline stages of a model, without gradients, and what its ranks agree on.

Every rank that holds a part of the model calls these functions, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.parallel import groups


def through(model: Any, tokens: int, forward: Callable[[], torch.Tensor]) -> torch.Tensor | None:
    """What `forward` gives on the last stage; None on the others, which hand it to the next one.

    model: this stage's VlmModel. tokens: t of the hidden states (t, 1, hidden) that go from stage to stage.
    """
    group = groups.pipeline()
    if not model.pre_process:
        config = model.config
        hidden = torch.empty(
            tokens, 1, config.hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        dist.recv(hidden, group=group, group_src=group.rank() - 1)
        model.set_input_tensor(hidden)
    out = forward()
    if model.post_process:
        return out
    dist.send(out.contiguous(), group=group, group_dst=group.rank() + 1)
    return None


def agree(chosen: Sequence[int] | None, count: int, device: torch.device | str) -> list[int]:
    """The tokens that the first rank of the last stage chose, on every rank. chosen: None before the last stage."""
    group = groups.model()
    if group.size() == 1:
        assert chosen is not None, "a model on one rank is its own last stage"
        return list(chosen)
    ids = torch.tensor(chosen if chosen is not None else [0] * count, device=device)
    # Megatron counts the ranks of a model with the tensor-parallel ones fastest.
    dist.broadcast(ids, group=group, group_src=group.size() - groups.tensor().size())
    return ids.tolist()
