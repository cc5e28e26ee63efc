"""Vision tower: crops of pixels to patch features, each crop by itself.

Letters: c crops, p patches of a crop (t with the class token), d numbers of a patch.
Every rank encodes its own crops with the whole tower, which then never communicates; or the ranks of a tensor-parallel
group encode the same crops with weights sharded among them (parallel.vision=tensor).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from torch import nn

from megatron_vlm.config.architecture import VisionArchitecture
from megatron_vlm.model import linear, replicated
from megatron_vlm.model.attention_kernels import AttentionKernels
from megatron_vlm.model.full_attention import CropAttention
from megatron_vlm.model.kernels import PartConfig
from megatron_vlm.model.norm import LayerNorm


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh approximation (SigLIP)."""
    return nn.functional.gelu(x, approximate="tanh")


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by a sigmoid (CLIP)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu_tanh": gelu_tanh, "quick_gelu": quick_gelu}


def layer_spec(tokens: int, config: PartConfig, kernel: str) -> ModuleSpec:
    """A pre-norm layer: self-attention inside each crop of `tokens`, then a two-layer MLP, with biases.

    kernel: of CropAttention.
    """
    linears = linear.of(config)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=linears.norm(LayerNorm),
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.no_mask},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.normed_column,
                    core_attention=ModuleSpec(module=CropAttention, params={"tokens": tokens, "kernel": kernel}),
                    linear_proj=linears.row,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=linears.norm(LayerNorm),
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=linears.normed_column, linear_fc2=linears.row)
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=linears.keys,
        ),
    )


class VisionTower(MegatronModule):
    """Patch embedding, learned positions, pre-norm layers; returns the hidden states of the tapped layers.

    The layers stand in a chain of TransformerBlocks that ends a block at every tap, so that recompute works inside a
    block as it always does; checkpoint keys (`layers.{i}`) do not know the cuts. Layers after the deepest tap are not
    built. Without taps the output is what transformers calls `last_hidden_state`: the last layer, after the post-norm
    where the tower has one for its patches (SigLIP; CLIP has it for the class token alone).
    """

    def __init__(
        self,
        arch: VisionArchitecture,
        taps: Sequence[int],
        settings: Mapping[str, Any],
        groups: ProcessGroupCollection,
        attention: AttentionKernels | None = None,
    ):
        """`settings`: TransformerConfig arguments common to all parts; `groups`: groups.encoder's.

        Raises ValueError for an unknown activation, heads that do not divide the width, and taps outside the tower.
        """
        _check(arch, taps)
        depth = max(taps) + 1 if taps else arch.layers
        config = replicated.config(
            settings,
            groups,
            num_layers=depth,
            hidden_size=arch.width,
            num_attention_heads=arch.heads,
            kv_channels=arch.width // arch.heads,
            ffn_hidden_size=arch.mlp,
            activation_func=ACTIVATIONS[arch.activation],
            layernorm_epsilon=arch.norm_eps,
        )
        super().__init__(config)
        self.arch, self.taps = arch, tuple(taps)
        dtype = config.params_dtype
        self.patch_embedding = nn.Linear(arch.patch_values, arch.width, bias=arch.patch_bias, dtype=dtype)
        tokens = arch.patches + arch.class_token
        self.position_embedding = nn.Parameter(torch.empty(tokens, arch.width, dtype=dtype))
        self.class_token = nn.Parameter(torch.empty(arch.width, dtype=dtype)) if arch.class_token else None
        self.pre_norm = LayerNorm(config, arch.width, arch.norm_eps) if arch.pre_norm else None
        ends = sorted({tap + 1 for tap in taps}) or [depth]
        #: First layer of each block, and the layer after its last.
        self.cuts = tuple(zip([0, *ends[:-1]], ends, strict=True))
        spec = layer_spec(tokens, config, (attention or AttentionKernels()).crops)
        post_norm = not taps and arch.post_norm
        self.blocks = nn.ModuleList(
            TransformerBlock(
                config,
                TransformerBlockSubmodules([spec] * (end - start), LayerNorm if post_norm else None),
                post_layer_norm=post_norm,
                pg_collection=groups,
            )
            for start, end in self.cuts
        )
        replicated.mark(self, groups.tp)

    @property
    def width_out(self) -> int:
        """Numbers per patch that forward returns."""
        return self.arch.width * max(1, len(self.taps))

    def forward(self, crops: torch.Tensor) -> torch.Tensor:
        """Encode crops.

        In: (c, p, d) uint8, values of a patch by (row, column, channel). Out: (c, p, width_out) in the model's dtype,
        tapped layers side by side in the order of `taps`; with c = 0, tied to the parameters so that they get zero
        gradients (a rank without images takes part in every reduction).
        """
        if not len(crops):
            empty = self.position_embedding.new_zeros(0, self.arch.patches, self.width_out)
            return replicated.anchor(empty, *self.parameters())
        # (c x t, 1, width), Megatron's (sequence, batch, hidden): one crop after the other, see CropAttention.
        hidden = self._embed(crops).flatten(0, 1)[:, None]
        tapped = {}
        for (_, end), block in zip(self.cuts, self.blocks, strict=True):
            hidden = block(hidden, attention_mask=None)
            tapped[end - 1] = hidden.view(len(crops), -1, self.arch.width)
        chosen = [tapped[tap] for tap in self.taps or (self.cuts[-1][1] - 1,)]
        return torch.cat(chosen, dim=-1)[:, self.arch.class_token :]

    def _embed(self, pixels: torch.Tensor) -> torch.Tensor:
        """(c, p, d) uint8 -> (c, t, width)."""
        c, p, _ = pixels.shape
        dtype = self.position_embedding.dtype
        # In float32: bf16 cannot tell neighbouring pixel values apart.
        mean, std = (
            torch.tensor(x, dtype=torch.float32, device=pixels.device) for x in (self.arch.mean, self.arch.std)
        )
        values = (pixels.reshape(c, p, -1, 3).float() / 255).sub_(mean).div_(std)
        hidden = self.patch_embedding(values.flatten(2).to(dtype))
        if self.class_token is not None:
            hidden = torch.cat([self.class_token.expand(c, 1, -1), hidden], dim=1)
        hidden = hidden + self.position_embedding
        return hidden if self.pre_norm is None else self.pre_norm(hidden)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Keys `patch_embedding.*`, `position_embedding`, `layers.{i}.*`, ...: the same wherever the chain is cut."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        group = self.blocks[0].tp_group
        state: ShardedStateDict = {}
        own = dict(self.named_parameters(recurse=False))
        state.update(
            make_sharded_tensors_for_checkpoint(own, prefix, tp_group=group, dp_cp_group=metadata["dp_cp_group"])
        )
        for name, module in self.named_children():
            if module is not self.blocks:
                state.update(sharded_state_dict_default(module, f"{prefix}{name}.", (), metadata, tp_group=group))
        for index, ((start, _), block) in enumerate(zip(self.cuts, self.blocks, strict=True)):
            for offset, layer in enumerate(block.layers):
                inside = f"{prefix}blocks.{index}.layers.{offset}."
                part = layer.sharded_state_dict(inside, (), metadata)
                replace_prefix_for_sharding(part, inside, f"{prefix}layers.{start + offset}.")
                state.update(part)
            if block.final_layernorm is not None:
                inside = f"{prefix}blocks.{index}.final_layernorm."
                part = sharded_state_dict_default(block.final_layernorm, inside, (), metadata, tp_group=group)
                replace_prefix_for_sharding(part, inside, f"{prefix}post_norm.")
                state.update(part)
        return replicated.set_replica_ids(state, group)


def _check(arch: VisionArchitecture, taps: Sequence[int]) -> None:
    if arch.activation not in ACTIVATIONS:
        raise ValueError(f"vision activation {arch.activation!r} is not built; choose one of {', '.join(ACTIVATIONS)}.")
    if arch.width % arch.heads:
        raise ValueError(f"a vision tower {arch.width} wide cannot have {arch.heads} heads of equal size.")
    outside = [tap for tap in taps if not 0 <= tap < arch.layers]
    if outside:
        raise ValueError(f"taps {outside} lie outside the vision tower's layers 0 to {arch.layers - 1}.")
