"""Megatron's linear layers, which a rank alone in its tensor-parallel group computes as one matrix product.

That adds the bias inside the product. With neighbours, or with Megatron's fused
accumulation of weight gradients (a CUDA extension), they are Megatron's to the letter.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.identity_op import IdentityOp
from torch import nn

from megatron_vlm.model import products
from megatron_vlm.model.kernels import PartConfig


@dataclass(frozen=True)
class Linears:
    """The linear layers of one spec, and the norms before two of them."""

    column: type
    row: type
    normed_column: type
    """Before which `norm` stands."""
    norm: Callable[[type], type]
    """What stands in the slot of a norm before a `normed_column`."""
    keys: dict[str, str]
    """Names in a layer -> names in checkpoints, which are those of the local spec."""


def of(config: PartConfig) -> Linears:
    """Those that `config.kernels.spec` names."""
    if config.kernels.spec == "local":
        return Linears(ColumnParallelLinear, RowParallelLinear, ColumnParallelLinear, lambda norm: norm, {})
    from megatron.core.extensions import transformer_engine as te

    return Linears(
        te.TEColumnParallelLinear,
        te.TERowParallelLinear,
        te.TELayerNormColumnParallelLinear,
        lambda norm: IdentityOp,
        {
            "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
            "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
        },
    )


class ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):
    """Rows of the weight are sharded over the tensor-parallel ranks."""

    def forward(
        self, input_: torch.Tensor, weight: torch.Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(..., in) -> (..., out of this rank), and the bias where the caller has to add it still."""
        if _alone(self):
            return products.linear(input_, self.weight if weight is None else weight, self.bias), None
        return super().forward(input_, weight, runtime_gather_output)


class RowParallelLinear(tensor_parallel.RowParallelLinear):
    """Columns of the weight are sharded over the tensor-parallel ranks."""

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(..., in of this rank) -> (..., out), and the bias where the caller has to add it still."""
        if _alone(self):
            return products.linear(input_, self.weight, self.bias), None
        return super().forward(input_)


def gathered(config: PartConfig, width_in: int, group: dist.ProcessGroup) -> ColumnParallelLinear:
    """`width_in` -> `config.hidden_size`, the whole output on every rank of the tensor-parallel `group`.

    Megatron's whatever the spec: Transformer Engine's gathers no outputs.
    """
    return ColumnParallelLinear(
        width_in,
        config.hidden_size,
        config=config,
        init_method=config.init_method,
        gather_output=True,
        tp_group=group,
    )


def mark_sharded(module: nn.Module) -> None:
    """Tell Megatron which weights of `module` are sharded: they count in the gradient norm on every rank.

    Megatron says so itself where it draws the weights, which is not here (state.initialize does).
    """
    kinds = (
        tensor_parallel.ColumnParallelLinear,
        tensor_parallel.RowParallelLinear,
        tensor_parallel.VocabParallelEmbedding,
    )
    for layer in module.modules():
        if isinstance(layer, kinds):
            layer.weight.tensor_model_parallel = True


def fuse_gradients(module: nn.Module) -> None:
    """Let linear layers add weight gradients to the float32 buffers inside their matrix products.

    Call it when Megatron's data parallelism has made the buffers (`main_grad`). Its own layers need apex's extension.
    """
    extension = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    for layer in module.modules():
        if hasattr(layer, "fuse_wgrad_accumulation"):  # Transformer Engine's
            layer.fuse_wgrad_accumulation = True
        elif extension and hasattr(layer, "gradient_accumulation_fusion"):
            layer.gradient_accumulation_fusion = True


def _alone(layer: tensor_parallel.ColumnParallelLinear | tensor_parallel.RowParallelLinear) -> bool:
    return layer.tp_group.size() == 1 and not layer.gradient_accumulation_fusion
