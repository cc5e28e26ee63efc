"""Tower and connector, which are spread over ranks otherwise than the decoder: what Megatron has to know about them.

Either every tensor-parallel rank holds them whole: then they are built with process groups of one rank, so Megatron's
modules take each rank for the only one. Or (parallel.vision=tensor) they are sharded, with the real group: Megatron's
modules then do all that is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from megatron_vlm.model.kernels import PartConfig
from megatron_vlm.model.linear import mark_sharded


def config(settings: Mapping[str, Any], groups: ProcessGroupCollection, **sizes: Any) -> PartConfig:
    """The configuration of such a part: `settings` are common to all parts of the model; `groups`: of the part.

    The part's sizes and degrees of parallelism win over the settings.
    """
    own: dict[str, Any] = {
        "tensor_model_parallel_size": groups.tp.size(),
        "pipeline_model_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": None,
        "context_parallel_size": 1,
        "sequence_parallel": False,
        "bias_activation_fusion": False,  # Megatron fuses none of their activations with a bias
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "normalization": "LayerNorm",
        "add_bias_linear": True,
        "gated_linear_unit": False,
    }
    if settings.get("recompute_granularity") == "full":
        # Layer by layer: the blocks between two taps are short and need not divide by a larger number.
        own |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    return PartConfig(**{**settings, **own, **sizes})


def mark(module: nn.Module, group: dist.ProcessGroup) -> None:
    """Tell Megatron how the parameters of `module` are spread; `group`: the tensor-parallel ranks that share them.

    Whole on every rank (a group of one), their gradients differ between tensor-parallel ranks (each rank encodes other
    crops) and are averaged over them; see features.py for the sum. They count once in the gradient norm, although
    Megatron's linear layers call themselves sharded.
    """
    if group.size() > 1:
        mark_sharded(module)
        return
    for parameter in module.parameters():
        parameter.average_gradients_across_tp_domain = True
        parameter.tensor_model_parallel = False


def set_replica_ids(state: ShardedStateDict, group: dist.ProcessGroup) -> ShardedStateDict:
    """Let one tensor-parallel rank write each tensor of `state`: alone in their `group`, all of them claim to be it."""
    if group.size() > 1:
        return state
    rank = parallel_state.get_tensor_model_parallel_rank()
    for value in nested_values(state):
        if isinstance(value, ShardedBase):
            value.replica_id = (0, rank, value.replica_id[-1])
    return state


def anchor(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """`out`, as if computed from `inputs`, with exactly zero gradients for them.

    For a rank that has nothing to compute: its parameters still get gradients (overlapped reductions wait for each of
    them) and the collectives behind `inputs` still run in its backward.
    """
    needed = [x for x in inputs if x.requires_grad]
    return _Anchor.apply(out, *needed) if needed else out


class _Anchor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*inputs)
        return out.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # One zero seen through strides 0: no second copy of the parameters.
        return grads[0], *(x.new_zeros(()).expand(x.shape) for x in ctx.saved_tensors)
