"""Layer specs: which module stands in which slot of Megatron's decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_vlm.config.architecture import LanguageArchitecture
from megatron_vlm.model import linear
from megatron_vlm.model.activation import SwiGlu
from megatron_vlm.model.attention import PackedAttention
from megatron_vlm.model.attention_kernels import AttentionKernels
from megatron_vlm.model.dropout import BiasDropoutAdd, DropoutSettings
from megatron_vlm.model.kernels import PartConfig
from megatron_vlm.model.norm import RMSNorm
from megatron_vlm.model.rotary import NormedRotary, Rotary
from megatron_vlm.parallel import context


def decoder_layer(
    arch: LanguageArchitecture,
    config: PartConfig,
    dropout: DropoutSettings,
    attention: AttentionKernels | None = None,
) -> ModuleSpec:
    """A pre-norm decoder layer: attention under the mask rule, then SwiGLU.

    Attention, rotary embedding, SwiGLU and dropout are ours whatever `config.kernels.spec` is.
    """
    linears = linear.of(config)
    add = ModuleSpec(module=BiasDropoutAdd, params={"settings": dropout})
    heads = NormedRotary if arch.qk_norm else Rotary
    return ModuleSpec(
        module=DecoderLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=linears.norm(RMSNorm),
            self_attention=ModuleSpec(
                module=SelfAttention,
                # Only a label here: PackedAttention has its own rule.
                params={"attn_mask_type": AttnMaskType.arbitrary},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.normed_column,
                    core_attention=ModuleSpec(module=PackedAttention, params={"kernels": attention}),
                    linear_proj=linears.row,
                    q_layernorm=heads,
                    k_layernorm=heads,
                ),
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=linears.norm(RMSNorm),
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=linears.normed_column, activation_func=SwiGlu, linear_fc2=linears.row
                ),
            ),
            mlp_bda=add,
            sharded_state_dict_keys_map=linears.keys,
        ),
    )


class DecoderLayer(TransformerLayer):
    """Megatron's layer, which also tells its two dropouts which tokens it holds, and its heads their angles.

    Both come with each call (the marks in the place of `attention_mask`, the table of rotary.py in the place of
    `rotary_pos_emb`), so a recomputed or interleaved call does what the first one did.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.self_attn_bda.site = 2 * self.layer_number
        self.mlp_bda.site = 2 * self.layer_number + 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLayer.forward; TransformerBlock calls it with keywords."""
        if self.training and self.mlp_bda.settings.active:
            tokens = self._tokens(kwargs["attention_mask"])
            self.self_attn_bda.tokens = self.mlp_bda.tokens = tokens
        heads = (self.self_attention.q_layernorm, self.self_attention.k_layernorm)
        table = kwargs.pop("rotary_pos_emb")
        for each in heads:
            each.table = table
        try:
            return super().forward(*args, **kwargs)
        finally:
            for each in heads:
                each.table = None

    def _tokens(self, marks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Marks (5, b, s) of the row -> marks (5, t, b) and indices (t,) of the tokens that this rank holds."""
        marks = marks.transpose(1, 2)
        index = torch.arange(marks.shape[1], device=marks.device)
        groups = [self.pg_collection.cp] + [self.pg_collection.tp] * self.config.sequence_parallel
        for group in groups:
            marks, index = context.chunk(marks, 1, group), context.chunk(index, 0, group)
        return marks, index
