"""Connectors: from patch features to vectors of the language model's width.

Letters: m patches at hand, n windows, w patches in a window, q vectors a window gives.
Every connector is a pooling, (m, width_in) features and (n, w) windows -> (n, q, width), and a projector of the pooled
vectors. Every rank pools its own windows with the whole connector, and nothing here communicates; or the ranks of a
tensor-parallel group pool the same windows with weights sharded among them (parallel.vision=tensor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import nn

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.model import replicated
from megatron_vlm.model.activation import SwiGlu
from megatron_vlm.model.full_attention import FullAttention
from megatron_vlm.model.kernels import PartConfig
from megatron_vlm.model.linear import gathered, of
from megatron_vlm.model.pooling import WindowAttention, WindowAttentionSubmodules, WindowMean
from megatron_vlm.model.resampler import Resampler

Settings = Mapping[str, Any]


class Connector(MegatronModule):
    """A pooling and a projector."""

    def __init__(
        self,
        config: PartConfig,
        pooling: nn.Module,
        projector: nn.Module,
        vectors: int,
        groups: ProcessGroupCollection,
    ):
        """`vectors`: q, how many vectors the pooling makes of a window."""
        super().__init__(config)
        self.tp_group = groups.tp
        self.pooling, self.projector, self.vectors = pooling, projector, vectors
        replicated.mark(self, groups.tp)

    def forward(self, features: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Pool and project.

        features: (m, width_in); windows: (n, w) int64 indices into features, PAD in empty slots. Out: (n, q, hidden).
        With n = 0 the result is tied to features and parameters, so that they get zero gradients.
        """
        if not len(windows):
            empty = features.new_zeros(0, self.vectors, self.config.hidden_size)
            return replicated.anchor(empty, features, *self.parameters())
        out, bias = self.projector(self.pooling(features, windows))
        return out if bias is None else out + bias

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Megatron's, with one writer per tensor."""
        return replicated.set_replica_ids(super().sharded_state_dict(prefix, sharded_offsets, metadata), self.tp_group)


def build_connector(arch: Architecture, settings: Settings, groups: ProcessGroupCollection) -> Connector:
    """The connector that `arch.connector.kind` names.

    `settings`: TransformerConfig arguments common to all parts of the model; `groups`: groups.encoder's.
    Raises ValueError for a kind that does not exist.
    """
    kind = arch.connector.kind
    if kind not in CONNECTORS:
        raise ValueError(f"connector {kind!r} does not exist; choose one of {', '.join(CONNECTORS)}.")
    return CONNECTORS[kind](arch, settings, groups)


def _attention_config(arch: Architecture, settings: Settings, groups: ProcessGroupCollection) -> PartConfig:
    connector = arch.connector
    if connector.width % connector.heads:
        raise ValueError(f"a connector {connector.width} wide cannot have {connector.heads} heads of equal size.")
    return replicated.config(
        settings,
        groups,
        num_layers=max(1, connector.layers),
        hidden_size=connector.width,
        num_attention_heads=connector.heads,
        kv_channels=connector.width // connector.heads,
        ffn_hidden_size=4 * connector.width,
        activation_func=nn.functional.gelu,
        layernorm_epsilon=arch.vision.norm_eps,
    )


def _projector_config(
    arch: Architecture, settings: Settings, groups: ProcessGroupCollection, **sizes: Any
) -> PartConfig:
    heads = groups.tp.size()  # there is no attention; Megatron wants heads for every tensor-parallel rank
    sizes |= {"num_layers": 1, "hidden_size": arch.language.hidden, "num_attention_heads": heads}
    return replicated.config(settings, groups, **sizes)


def _mlp(config: PartConfig, width_in: int, groups: ProcessGroupCollection) -> MLP:
    linears = of(config)
    return MLP(
        config,
        MLPSubmodules(
            linear_fc1=linears.column,
            activation_func=SwiGlu if config.gated_linear_unit else None,
            linear_fc2=linears.row,
        ),
        input_size=width_in,
        ffn_hidden_size=config.ffn_hidden_size,
        tp_group=groups.tp,
    )


def attention_pooling(arch: Architecture, settings: Settings, groups: ProcessGroupCollection) -> Connector:
    """Molmo2: attention over the window from its mean, then a SwiGLU projector ([gate; up] rows) without bias."""
    attention = _attention_config(arch, settings, groups)
    linears = of(attention)
    pooling = WindowAttention(
        attention,
        WindowAttentionSubmodules(
            linear_q=linears.column,
            linear_kv=linears.column,
            core_attention=FullAttention,
            linear_proj=linears.row,
        ),
        arch.feature_width,
        groups,
    )
    config = _projector_config(
        arch,
        settings,
        groups,
        ffn_hidden_size=arch.connector.mlp,
        gated_linear_unit=True,
        activation_func=nn.functional.silu,
        use_te_activation_func=True,  # the spec's module: SwiGlu
        add_bias_linear=False,
    )
    return Connector(config, pooling, _mlp(config, arch.connector.width, groups), 1, groups)


def linear(arch: Architecture, settings: Settings, groups: ProcessGroupCollection) -> Connector:
    """The window's mean through one linear layer."""
    config = _projector_config(arch, settings, groups)
    return Connector(config, WindowMean(), gathered(config, arch.feature_width, groups.tp), 1, groups)


def mlp(arch: Architecture, settings: Settings, groups: ProcessGroupCollection) -> Connector:
    """The window's mean through two layers with GELU between them."""
    sizes = {"ffn_hidden_size": arch.connector.mlp, "activation_func": nn.functional.gelu}
    config = _projector_config(arch, settings, groups, **sizes)
    return Connector(config, WindowMean(), _mlp(config, arch.feature_width, groups), 1, groups)


def resampler(arch: Architecture, settings: Settings, groups: ProcessGroupCollection) -> Connector:
    """Learned queries over a crop's patches, then one linear layer."""
    queries = arch.connector.queries
    if queries < 1 or arch.connector.layers < 1:
        raise ValueError(
            f"a resampler needs queries and layers, but the architecture has {queries} queries and "
            f"{arch.connector.layers} layers; set both in its ConnectorArchitecture."
        )
    pooling = Resampler(_attention_config(arch, settings, groups), arch.feature_width, queries, groups)
    config = _projector_config(arch, settings, groups)
    return Connector(config, pooling, gathered(config, arch.connector.width, groups.tp), queries, groups)


CONNECTORS: dict[str, Callable[[Architecture, Settings, ProcessGroupCollection], Connector]] = {
    "attention_pooling": attention_pooling,
    "linear": linear,
    "mlp": mlp,
    "resampler": resampler,
}
