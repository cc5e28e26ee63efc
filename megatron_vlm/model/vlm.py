"""The whole model, or the part of it that one pipeline stage holds.

Letters: b rows in a micro-batch, s tokens in a row, t tokens in this context rank's chunk of the row (with sequence
parallelism, the hidden states of t / TP of them), n x q image placeholders, k chosen tokens.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_vlm.batch import Batch
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.model import features, mask, state
from megatron_vlm.model.connector import Connector
from megatron_vlm.model.language import Language
from megatron_vlm.model.loss import token_losses
from megatron_vlm.model.vision import VisionTower
from megatron_vlm.parallel import context, cpu


class VlmModel(MegatronModule):
    """Vision tower and connector (first stage only), and this stage's part of the decoder."""

    #: Megatron's schedules ask for it.
    model_type = None

    def __init__(
        self,
        arch: Architecture,
        *,
        vision: VisionTower | None,
        connector: Connector | None,
        language: Language,
        groups: ProcessGroupCollection,
        crop_group: dist.ProcessGroup,
        z_loss: float,
        logit_chunk: int,
        vp_stage: int | None,
    ):
        """`language` knows whether this is the first or the last stage; vision and connector belong to the first.
        `crop_group`: ranks among which crops are dealt."""
        super().__init__(language.config)
        self.arch = arch
        self.vision, self.connector, self.language = vision, connector, language
        self.tp_group, self.context_group, self.crop_group = groups.tp, groups.cp, crop_group
        self.z_loss, self.logit_chunk = z_loss, logit_chunk
        self.vp_stage = vp_stage
        self.pre_process = language.decoder.pre_process
        self.post_process = language.decoder.post_process
        self.share_embeddings_and_output_weights = arch.language.tied_head

    def encode(self, batch: Batch) -> torch.Tensor:
        """Features (n x q, hidden) of the images, in the order of their placeholders. First stage only."""
        assert self.vision is not None and self.connector is not None, "only the first stage sees images"
        return features.encode(
            self.vision, self.connector, batch.crops, batch.windows, batch.crop_counts, self.crop_group
        )

    def forward(
        self, batch: Batch, logits_at: torch.Tensor | None = None, images: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run this stage on a micro-batch.

        `images`: what `encode` gave for it, where it is known already (generation); its crops are not looked at then.

        Out, before the last stage: hidden states (t, b, hidden) for the next one. On the last: (b, t) float32,
        cross-entropy + z_loss x logsumexp^2 where the loss weight is not 0 (not multiplied by it), else 0. With
        `logits_at` ((k,) int64, places in the flattened (b, s)): their logits, (k, vocab_size) float32, on every rank.
        Raises ValueError where placeholders and image features differ in number.
        """
        with cpu.direct():
            return self._forward(batch, logits_at, images)

    def _forward(self, batch: Batch, logits_at: torch.Tensor | None, images: torch.Tensor | None) -> torch.Tensor:
        hidden = None
        if self.pre_process:
            assert self.language.embedding is not None
            # 1. Encode crops, pool and project.
            images = self.encode(batch) if images is None else images
            # 2. Embed ids.
            hidden = self.language.embedding(batch.tokens)
            # 3. Add image features at their placeholders.
            hidden = add_features(hidden, batch.tokens == self.arch.token_id("<im_patch>"), images)
            # 4. Keep this rank's part of the row.
            hidden = self._own_part(hidden)
        # 5. Decode.
        positions = context.chunk(batch.positions, 1, self.context_group)
        hidden = self.language.decode(hidden, mask.marks(batch), positions)
        if not self.post_process:
            return hidden
        # 6. Loss.
        if logits_at is not None:
            return self._logits(hidden, logits_at, batch.tokens.shape)
        return self._losses(hidden, batch)

    def _own_part(self, hidden: torch.Tensor) -> torch.Tensor:
        """(b, s, hidden), the same on all ranks -> (t, b, hidden), or this tensor-parallel rank's part of it."""
        hidden = context.chunk(hidden.transpose(0, 1), 0, self.context_group).contiguous()
        if self.config.sequence_parallel:
            hidden = scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        if self.config.recompute_granularity == "full" and not hidden.requires_grad and torch.is_grad_enabled():
            # Recomputed layers get gradients only if their input asks for one; frozen embeddings do not.
            hidden = hidden.detach().requires_grad_(any(p.requires_grad for p in self.language.parameters()))
        return hidden

    def _losses(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        weights = context.chunk(batch.loss_weights, 1, self.context_group)
        targets = context.chunk(batch.targets, 1, self.context_group)
        chosen = weights.flatten().nonzero()[:, 0]
        found = token_losses(
            self._select(hidden, chosen),
            self._head(),
            targets.flatten()[chosen],
            z_loss=self.z_loss,
            chunk=self.logit_chunk,
            group=self.tp_group,
        )
        # Without a loss token this is 0 of nothing, yet tied to the model: backward runs on every rank.
        losses = torch.zeros(weights.numel(), dtype=torch.float32, device=weights.device)
        return losses.index_copy(0, chosen, found).view_as(weights)

    def _logits(self, hidden: torch.Tensor, places: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Logits of chosen places of the whole rows; each context rank gives those in its chunk."""
        ours = context.chunk(torch.arange(shape.numel(), device=places.device).view(shape), 1, self.context_group)
        found = ours.flatten()[:, None] == places
        where, which = found.nonzero().unbind(1)
        part = (self._select(hidden, where) @ self._head().t()).float()
        logits = part.new_zeros(len(places), part.shape[1]).index_copy(0, which, part)
        if self.context_group.size() > 1:
            dist.all_reduce(logits, group=self.context_group)
        return gather_from_tensor_model_parallel_region(logits, group=self.tp_group)

    def _select(self, hidden: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Hidden states (t, b, hidden) at `chosen` places of the flattened (b, t) -> (k, hidden) on all TP ranks.

        In backward the shares of the tensor-parallel ranks are added up.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True, group=self.tp_group)
        selected = hidden.transpose(0, 1).flatten(0, 1).index_select(0, chosen)
        if self.config.sequence_parallel:
            return selected
        return copy_to_tensor_model_parallel_region(selected, group=self.tp_group)

    def _head(self) -> nn.Parameter:
        weight = self.language.head_weight
        assert weight is not None, "the last stage has a head"
        return weight

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Hidden states from the stage before; Megatron's schedules call it before forward."""
        if isinstance(input_tensor, list):
            (input_tensor,) = input_tensor
        self.language.decoder.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> nn.Parameter | None:
        """This stage's copy of a tied table, for Megatron's reduction between first and last stage."""
        return self.language.embedding_weight if self.pre_process else self.language.head_weight

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Parameters under the names that checkpoints hold, the same for every layout (see state.py)."""
        assert not sharded_offsets, "a model is not part of a larger tensor"
        metadata = state.metadata(metadata)
        return state.tidy(super().sharded_state_dict(prefix, (), metadata), prefix, self.language, metadata)


def add_features(embedded: torch.Tensor, placeholders: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Embeddings (b, s, hidden) plus image features (n x q, hidden) where `placeholders` (b, s) is True, in order.

    Raises ValueError where the numbers differ.
    """
    places = placeholders.flatten().nonzero()[:, 0]
    if len(places) != len(images):
        raise ValueError(
            f"the micro-batch has {len(places)} image placeholders, but its crops give {len(images)} features. "
            "Were the rows made for another connector, pooling window or crop size than the model's?"
        )
    # Also with nothing to add: the connector's backward runs on every rank.
    return embedded.flatten(0, 1).index_add(0, places, images.to(embedded.dtype)).view_as(embedded)
