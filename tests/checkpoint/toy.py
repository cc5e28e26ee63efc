"""A small Megatron model with Megatron's distributed optimizer, to save and load: two groups, real steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from megatron_vlm.config.schema import Config
from megatron_vlm.parallel import cpu, groups
from megatron_vlm.parallel.layout import Layout

VOCABULARY, LENGTH, ROWS = 32, 8, 4
#: Learning rates of the two groups. They share wd_mult, so only lr_mult tells them apart when they are loaded.
RATES = {1.0: 1e-2, 2.0: 3e-3}


def config(**settings: Any) -> Config:
    """The settings saved beside the toy."""
    return Config(**settings)


def build(layout: Layout, *, width: int = 16, seed: int = 0, frozen: tuple[str, ...] = ()) -> tuple[list[Any], Any]:
    """(models in data-parallel wrappers, optimizer) of this rank, random weights.

    `frozen`: parameters with one of these in their names do not train.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
    from megatron.core.transformer import TransformerConfig

    groups.initialize(layout, seed=seed, timeout_s=30)
    settings = TransformerConfig(
        num_layers=2,
        hidden_size=width,
        num_attention_heads=4,
        ffn_hidden_size=2 * width,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        **cpu.TRANSFORMER_SETTINGS,
    )
    at = layout.coordinates(torch.distributed.get_rank())
    model = GPTModel(
        settings,
        get_gpt_layer_local_spec(),
        VOCABULARY,
        LENGTH,
        pre_process=at.pipeline == 0,
        post_process=at.pipeline == layout.pipeline - 1,
        position_embedding_type="none",
    )
    for name, parameter in model.named_parameters():
        if any(part in name for part in frozen):
            parameter.requires_grad = False
    wrapped = DistributedDataParallel(settings, DistributedDataParallelConfig(use_distributed_optimizer=True), model)
    in_layers = ParamKey(with_name_predicate=ParamWithNamePredicate("layers", lambda _, name: "layers" in name))
    others = ParamKey(with_name_predicate=ParamWithNamePredicate("others", lambda _, name: "layers" not in name))
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1.0, clip_grad=0.0, use_distributed_optimizer=True),
        [wrapped],
        config_overrides={in_layers: {"lr_mult": 1.0, "wd_mult": 1.0}, others: {"lr_mult": 2.0, "wd_mult": 1.0}},
    )
    for group in optimizer.param_groups:
        group["lr"] = group["max_lr"] = RATES[group["lr_mult"]]
    return [wrapped], optimizer


def step(models: list[Any], optimizer: Any, number: int, layout: Layout) -> float:
    """One optimizer step on the batch of that number, the same for every layout. The loss, on every rank."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    at = layout.coordinates(torch.distributed.get_rank())
    rows = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(number))
    mine = rows[at.data :: layout.data]
    (model,) = models
    model.zero_grad_buffer()
    optimizer.zero_grad()

    def forward(batches: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        tokens = next(batches)
        output = chunk(tokens, torch.zeros_like(tokens), None, labels=tokens.roll(-1, 1))
        return output, report

    def report(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = losses.sum()
        return total / rows.numel(), torch.zeros((), dtype=torch.int), {"sum": total.detach()}

    results = get_forward_backward_func()(
        forward_step_func=forward,
        data_iterator=iter(mine.split(1)),
        model=[model],
        num_microbatches=len(mine),
        seq_length=LENGTH,
        micro_batch_size=1,
    )
    finalize_model_grads([model])
    optimizer.step()
    total = torch.tensor(sum(float(result["sum"]) for result in results), dtype=torch.float64)
    torch.distributed.all_reduce(total)
    return total.item() / rows.numel() / layout.tensor / layout.context
