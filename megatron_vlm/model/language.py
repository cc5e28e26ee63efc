"""The decoder: token embeddings, a Megatron TransformerBlock, the head. Qwen3 and Qwen2.5 differ by settings only.

Letters: b rows, s tokens in a row, t tokens of this rank's part of the row.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, VocabParallelEmbedding
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from torch import nn

from megatron_vlm.config.architecture import LanguageArchitecture
from megatron_vlm.model import rotary
from megatron_vlm.model.attention_kernels import AttentionKernels
from megatron_vlm.model.dropout import DropoutSettings
from megatron_vlm.model.kernels import PartConfig
from megatron_vlm.model.linear import mark_sharded
from megatron_vlm.model.norm import RMSNorm
from megatron_vlm.model.specs import decoder_layer


class Embedding(MegatronModule):
    """Base rows sharded over the vocabulary, and the new rows, which every rank holds whole.

    Never padded: exported and converted tables have exactly the rows of the source.
    """

    def __init__(self, arch: LanguageArchitecture, config: PartConfig, groups: ProcessGroupCollection):
        super().__init__(config)
        self.vocab_size = arch.vocab_size
        self.tp_group = groups.tp
        self.word_embeddings = VocabParallelEmbedding(
            arch.vocab_size, arch.hidden, init_method=config.init_method, config=config, tp_group=groups.tp
        )
        # Each tensor-parallel rank sees all tokens here, so its gradient is whole and identical: no reduction needed.
        self.new_rows = nn.Parameter(torch.empty(arch.new_rows, arch.hidden, dtype=config.params_dtype))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Ids (b, s), those from vocab_size on in the new rows -> (b, s, hidden)."""
        new = tokens >= self.vocab_size
        base = self.word_embeddings(tokens.masked_fill(new, 0))
        fresh = nn.functional.embedding((tokens - self.vocab_size).clamp(min=0), self.new_rows)
        return torch.where(new[..., None], fresh, base)


class Language(MegatronModule):
    """One pipeline stage of the decoder: embedding on the first, its share of the layers, norm and head on the last.

    With a tied head the embedding table is the head. Where the two stand on different stages, each has a copy with the
    same weights, and Megatron adds up the gradients of the copies (its embedding group).
    """

    def __init__(
        self,
        arch: LanguageArchitecture,
        config: PartConfig,
        groups: ProcessGroupCollection,
        dropout: DropoutSettings,
        *,
        layers: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        attention: AttentionKernels | None = None,
    ):
        """`layers`: decoder layers of this stage."""
        super().__init__(config)
        self.arch = arch
        self.tp_group = groups.tp
        self.embedding = Embedding(arch, config, groups) if pre_process else None
        self.decoder = TransformerBlock(
            config,
            TransformerBlockSubmodules([decoder_layer(arch, config, dropout, attention)] * layers, RMSNorm),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        # Two names, because freezing and checkpoints treat the copy of a tied table as the table.
        self.head = _head(arch, config, groups) if post_process and not arch.tied_head else None
        self.tied_head = _head(arch, config, groups) if post_process and arch.tied_head and not pre_process else None
        self._mark()

    def _mark(self) -> None:
        mark_sharded(self)
        for weight in (self.embedding_weight, self.head_weight):
            if weight is not None:
                weight.is_embedding_or_output_parameter = True
        # Megatron's names: a `shared_embedding` has a copy on another stage, a `shared` one does not count in the
        # gradient norm because the first copy does.
        if self.arch.tied_head and self.embedding_weight is not None and self.head_weight is None:
            self.embedding_weight.shared_embedding = True
        if self.tied_head is not None:
            self.tied_head.weight.shared_embedding = self.tied_head.weight.shared = True

    @property
    def embedding_weight(self) -> nn.Parameter | None:
        """Base rows of the embedding, if this stage embeds."""
        return None if self.embedding is None else self.embedding.word_embeddings.weight

    @property
    def head_weight(self) -> nn.Parameter | None:
        """This rank's rows of the head, if this stage has it."""
        for head in (self.head, self.tied_head):
            if head is not None:
                return head.weight
        return self.embedding_weight if self.decoder.post_process else None

    def decode(self, hidden: torch.Tensor | None, marks: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run this stage's layers.

        hidden: (t, b, hidden), or None after the first stage, where set_input_tensor gives it; with sequence
        parallelism t is this tensor-parallel rank's part. marks: (5, b, s), the whole row. positions: (b, t of the
        context rank). Out: as hidden.
        """
        table = rotary.table(positions, self.arch.rope_theta, self.arch.head_dim, self.config.params_dtype)
        return self.decoder(hidden, attention_mask=marks, rotary_pos_emb=table)


def _head(arch: LanguageArchitecture, config: PartConfig, groups: ProcessGroupCollection) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        arch.hidden, arch.vocab_size, config=config, init_method=config.init_method, bias=False, tp_group=groups.tp
    )
