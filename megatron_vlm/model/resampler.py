"""Resampler: learned queries that look at all patches of a crop.

Letters: m patches at hand, n crops, w patches of a crop, q queries.
"""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import (
    CrossAttention,
    CrossAttentionSubmodules,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import nn

from megatron_vlm.model import linear
from megatron_vlm.model.full_attention import FullAttention
from megatron_vlm.model.kernels import PartConfig
from megatron_vlm.model.norm import LayerNorm
from megatron_vlm.model.pooling import take, visible_slots


def layer_spec(config: PartConfig, groups: ProcessGroupCollection) -> ModuleSpec:
    """A pre-norm layer: self-attention among the queries, cross-attention to the patches, MLP."""
    linears = linear.of(config)
    # CrossAttention does not hand its groups to these two layers, which then would take Megatron's global ones.
    column = partial(linears.column, tp_group=groups.tp)
    full = {"attn_mask_type": AttnMaskType.no_mask}
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=linears.norm(LayerNorm),
            self_attention=ModuleSpec(
                module=SelfAttention,
                params=full,
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.normed_column, core_attention=FullAttention, linear_proj=linears.row
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_cross_attn_layernorm=LayerNorm,
            cross_attention=ModuleSpec(
                module=CrossAttention,
                params=full,
                submodules=CrossAttentionSubmodules(
                    linear_q=column, linear_kv=column, core_attention=FullAttention, linear_proj=linears.row
                ),
            ),
            cross_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=linears.norm(LayerNorm),
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=linears.normed_column, linear_fc2=linears.row)
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=linears.keys,
        ),
    )


class Resampler(MegatronModule):
    """Projects patches to `config.hidden_size`; `queries` learned vectors then read them through a TransformerBlock."""

    def __init__(self, config: PartConfig, width_in: int, queries: int, groups: ProcessGroupCollection):
        super().__init__(config)
        self.tp_group = groups.tp
        self.queries = nn.Parameter(torch.empty(queries, config.hidden_size, dtype=config.params_dtype))
        self.projection = linear.gathered(config, width_in, groups.tp)
        layers = [layer_spec(config, groups)] * config.num_layers
        self.block = TransformerBlock(
            config, TransformerBlockSubmodules(layers, LayerNorm), post_layer_norm=True, pg_collection=groups
        )

    def forward(self, features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """(m, width_in) features, (n, w) windows, one per crop -> (n, q, hidden_size)."""
        patches = take(self.projection(features)[0], windows.t())
        queries = self.queries[:, None].expand(-1, len(windows), -1).contiguous()
        read = self.block(queries, attention_mask=None, context=patches, context_mask=visible_slots(windows))
        return read.transpose(0, 1)
