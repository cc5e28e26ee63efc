"""Names of parameters in checkpoints, and initial weights that do not depend on the layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

from megatron_vlm.model.initial import initial
from megatron_vlm.model.language import Language


def metadata(given: dict | None) -> dict:
    """Megatron's checkpoint metadata, with a key for each layer (`layers.7.…`) and not one tensor for all layers."""
    return {**ensure_metadata_has_dp_cp_group(given), "non_homogeneous_layers": True}


def tidy(state: ShardedStateDict, prefix: str, language: Language, metadata: dict) -> ShardedStateDict:
    """Drop the extra states of linear layers; a tied head stands under the name of the embedding.

    Extra states are empty but for Transformer Engine's delayed scaling, whose history is a pickle that it would open:
    in a checkpoint from a stranger that could be anything. scaling.py has it as tensors.
    """
    state = {
        key: value
        for key, value in state.items()
        if not (isinstance(value, ShardedObject) and key.endswith("_extra_state"))
    }
    if language.tied_head is not None:
        key = f"{prefix}language.tied_head.weight"
        group = metadata["dp_cp_group"]
        state[key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=language.tied_head.weight,
            key=f"{prefix}language.embedding.word_embeddings.weight",
            # 1: the copy; the first stage's is number 0 and gets saved.
            replica_id=(1, 0, group.rank()),
            allow_shape_mismatch=True,
            tp_group=language.tp_group,
            dp_cp_group=group,
        )
    return state


def shards(models: Iterable[MegatronModule]) -> Iterator[ShardedTensor]:
    """This rank's part of every parameter; `data` is a view of the parameter itself."""
    for model in models:
        for value in model.sharded_state_dict().values():
            if isinstance(value, ShardedTensorFactory):
                yield from value.build()
            elif isinstance(value, ShardedTensor):
                yield value


@torch.no_grad()
def initialize(models: Iterable[MegatronModule], seed: int, std: float) -> None:
    """Random weights: matrices and embeddings normal(0, std), biases 0, norms as built (1).

    std = 0 means 1 / sqrt(inputs), an embedding's inputs being its width, and sines for the positions of patches.

    Each parameter is drawn whole from a generator keyed by (seed, checkpoint name), and the rank keeps its part: the
    same model for every layout. Costs the memory of the largest parameter in float32.
    """
    for shard in shards(models):
        if shard.data.is_meta:
            continue
        whole = initial(shard.key, shard.global_shape, seed, std)
        if whole is not None:
            ends = zip(shard.global_offset, shard.local_shape, strict=True)
            shard.data.copy_(whole[tuple(slice(start, start + size) for start, size in ends)])
