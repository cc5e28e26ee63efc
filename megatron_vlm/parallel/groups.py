"""Process groups of a run: Megatron's, made once, and groups for tower and connector, whose ranks differ."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_vlm.parallel.layout import Layout

_single: dist.ProcessGroup | None = None
_heads: dist.ProcessGroup | None = None
_keys: dist.ProcessGroup | None = None


def initialize(layout: Layout, *, backend: str = "gloo", seed: int = 0, timeout_s: float = 600.0) -> None:
    """Make Megatron's process groups for `layout` and seed every random generator.

    torch.distributed must be initialised with `layout.world` ranks (ValueError otherwise). Every rank calls it.
    `timeout_s` bounds every collective of these groups. The default generators get `seed` on all ranks; Megatron's
    tracker adds states of its own per tensor-parallel rank.
    """
    global _single, _heads, _keys
    if not dist.is_initialized() or dist.get_world_size() != layout.world:
        found = dist.get_world_size() if dist.is_initialized() else "no"
        raise ValueError(
            f"the layout is for {layout.world} processes, but torch.distributed has {found} processes; "
            "call torch.distributed.init_process_group first, with the world size of the layout."
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        context_parallel_size=layout.context,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        distributed_timeout_minutes=timeout_s / 60,  # whole minutes by its signature; it takes fractions
        # Gloo twins serve checkpoints of GPU runs; over gloo the groups themselves do.
        create_gloo_process_groups=True,
    )
    timeout = timedelta(seconds=timeout_s)

    def own(groups: Iterable[Sequence[int]]) -> dist.ProcessGroup:
        """The one with this rank. Every rank takes part in making every group."""
        made = [(ranks, dist.new_group(list(ranks), timeout=timeout, backend=backend)) for ranks in groups]
        return next(group for ranks, group in made if dist.get_rank() in ranks)

    _single = own([rank] for rank in range(layout.world))
    # Megatron makes such groups too (hierarchical context parallelism), but needs a package for it that we do not.
    if layout.key_ranks == 1:
        _heads, _keys = context(), _single
    elif layout.head_ranks == 1:
        _heads, _keys = _single, context()
    else:
        _heads, _keys = own(layout.context_groups(heads=True)), own(layout.context_groups(heads=False))
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def destroy() -> None:
    """Drop Megatron's groups and our own. torch.distributed itself stays initialised."""
    global _single, _heads, _keys
    parallel_state.destroy_model_parallel()
    _single = _heads = _keys = None


def megatron() -> ProcessGroupCollection:
    """All of Megatron's groups of this rank, for parts that are sharded.

    `hcp` (hierarchical context parallelism) holds two: the context ranks that deal heads among themselves, and those
    that gather each other's keys.
    """
    groups = ProcessGroupCollection.use_mpu_process_groups()
    assert _heads is not None and _keys is not None, "groups.initialize has not been called"
    groups.hcp = [_heads, _keys]
    return groups


def replicated() -> ProcessGroupCollection:
    """Groups for a part that every rank holds whole: tensor, context and pipeline groups of this rank alone.

    The data-parallel groups are Megatron's own.
    """
    groups = megatron()
    single = this_rank()
    for name in ("tp", "cp", "pp", "mp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp"):
        setattr(groups, name, single)
    return groups


def encoder(layout: Layout) -> ProcessGroupCollection:
    """Groups for tower and connector: each rank has them whole, or shares their weights with its tensor-parallel
    ranks."""
    groups = replicated()
    if layout.vision == "tensor":
        for name in ("tp", "mp", "tp_cp", "expt_tp", "tp_ep", "tp_ep_pp"):
            setattr(groups, name, tensor())
    return groups


def crops(layout: Layout) -> dist.ProcessGroup:
    """Ranks among which the crops of one micro-batch are dealt, in the order of Layout.crop_rank."""
    return context() if layout.vision == "tensor" else tensor_and_context()


def this_rank() -> dist.ProcessGroup:
    """The group of this rank alone."""
    assert _single is not None, "groups.initialize has not been called"
    return _single


def tensor() -> dist.ProcessGroup:
    """Ranks that share each layer's weights."""
    return parallel_state.get_tensor_model_parallel_group()


def context() -> dist.ProcessGroup:
    """Ranks that share one row."""
    return parallel_state.get_context_parallel_group()


def pipeline() -> dist.ProcessGroup:
    """Stages of one model."""
    return parallel_state.get_pipeline_model_parallel_group()


def model() -> dist.ProcessGroup:
    """Ranks that hold one model together: its pipeline stages, tensor-parallel neighbours first."""
    return parallel_state.get_model_parallel_group()


def tensor_and_context() -> dist.ProcessGroup:
    """Ranks that share the rows of one micro-batch, tensor-parallel neighbours first."""
    return parallel_state.get_tensor_and_context_parallel_group()


def data() -> dist.ProcessGroup:
    """Copies of the model that read different rows."""
    return parallel_state.get_data_parallel_group()


def data_and_context() -> dist.ProcessGroup:
    """Ranks that hold the same shard of the weights: their gradients are summed."""
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def add_up(numbers: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """`numbers` summed over the group, in place. A rank alone has the sum already: gloo takes 0.1 ms to say so."""
    if group.size() > 1:
        dist.all_reduce(numbers, group=group)
    return numbers
