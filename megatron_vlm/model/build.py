"""From settings to models: Megatron configurations, stages, freezing, initial weights."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.presets import architecture
from megatron_vlm.config.schema import Config
from megatron_vlm.model import attention_kernels, kernels, state
from megatron_vlm.model.connector import build_connector
from megatron_vlm.model.dropout import DropoutSettings
from megatron_vlm.model.kernels import PartConfig
from megatron_vlm.model.language import Language
from megatron_vlm.model.vision import VisionTower
from megatron_vlm.model.vlm import VlmModel
from megatron_vlm.parallel import cpu, groups
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.split import even_counts

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


def build(config: Config, layout: Layout) -> list[VlmModel]:
    """The models of this rank, one per virtual stage, with initial weights from `train.seed` and components frozen.

    groups.initialize(layout) must have been called. Raises ValueError for settings that no model fits.
    """
    arch = architecture(config.model)
    settings = _common_settings(config)
    language_config = _language_config(arch, config, layout, settings)
    sharded = groups.megatron()
    stages = [
        _stage(arch, config, layout, settings, language_config, sharded, virtual)
        for virtual in range(layout.virtual_pipeline)
    ]
    state.initialize(stages, config.train.seed, arch.init_std)
    for stage in stages:
        freeze(stage, config.model.freeze)
        if not cpu.enabled():
            stage.cuda()
    return stages


def component_of(name: str) -> str:
    """The component that a parameter belongs to, by its name in VlmModel: one of config.architecture.COMPONENTS.

    The new embedding rows train with the connector; both copies of a tied table are base embeddings.
    """
    if name.startswith("language.embedding.new_rows"):
        return "connector"
    if name.startswith(("language.embedding.", "language.tied_head.")):
        return "base_embeddings"
    component = name.split(".", 1)[0]
    assert component in ("vision", "connector", "language"), name
    return component


def freeze(model: VlmModel, components: tuple[str, ...]) -> None:
    """Stop the parameters of `components` from training."""
    for name, parameter in model.named_parameters():
        if component_of(name) in components:
            parameter.requires_grad_(False)


def layers_per_chunk(config: Config, layers: int, layout: Layout) -> tuple[int, ...]:
    """Decoder layers of every pipeline chunk, in the order in which a row passes them.

    Raises ValueError where parallel.pipeline_layers does not name every chunk or does not add up.
    """
    chosen = config.parallel.pipeline_layers
    if not chosen:
        return even_counts(layers, layout.chunks)
    if len(chosen) != layout.chunks or sum(chosen) != layers:
        raise ValueError(
            f"parallel.pipeline_layers={list(chosen)} has {len(chosen)} entries with {sum(chosen)} layers; needed: "
            f"{layout.chunks} (pipeline {layout.pipeline} x virtual_pipeline {layout.virtual_pipeline}) with {layers}."
        )
    return tuple(chosen)


def _stage(
    arch: Architecture,
    config: Config,
    layout: Layout,
    settings: dict[str, Any],
    language_config: PartConfig,
    sharded: ProcessGroupCollection,
    virtual: int,
) -> VlmModel:
    chunk = virtual * layout.pipeline + sharded.pp.rank()
    # A frozen tower too stands on the first stage alone. Run ahead of the pipeline by all stages it would gain nothing
    # where it does 7 % of the work, 3 % where it does 15 %, and the features of a whole step would have to be kept
    # (benchmarks/results/encode_ahead.md); uneven layers (parallel.pipeline_layers) do more.
    first, last = chunk == 0, chunk == layout.chunks - 1
    vp_stage = virtual if layout.virtual_pipeline > 1 else None
    encoder = groups.encoder(layout)
    train, attention = config.train, attention_kernels.of(config)
    return VlmModel(
        arch,
        vision=VisionTower(arch.vision, arch.connector.taps, settings | fp8(config, "vision"), encoder, attention)
        if first
        else None,
        connector=build_connector(arch, settings, encoder) if first else None,
        language=Language(
            arch.language,
            language_config,
            sharded,
            DropoutSettings(train.seed, train.residual_dropout, train.response_dropout),
            layers=layers_per_chunk(config, arch.language.layers, layout)[chunk],
            pre_process=first,
            post_process=last,
            vp_stage=vp_stage,
            attention=attention,
        ),
        groups=sharded,
        crop_group=groups.crops(layout),
        z_loss=train.z_loss,
        logit_chunk=train.logit_chunk,
        vp_stage=vp_stage,
    )


def _common_settings(config: Config) -> dict[str, Any]:
    """PartConfig arguments that all parts of the model share."""
    if config.train.precision not in DTYPES:
        raise ValueError(f"train.precision={config.train.precision!r} is not one of {', '.join(DTYPES)}.")
    dtype = DTYPES[config.train.precision]
    settings: dict[str, Any] = {
        "kernels": kernels.choose(config),
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        # state.initialize draws every weight, whatever the layout.
        "perform_initialization": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        # Losses are sums over tokens; the loop divides by the weights of the whole global batch.
        "calculate_per_token_loss": True,
        **(cpu.TRANSFORMER_SETTINGS if cpu.enabled() else {}),
    }
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    if config.train.recompute not in recompute:
        raise ValueError(f"train.recompute={config.train.recompute!r} is not one of {', '.join(recompute)}.")
    return {**settings, **recompute[config.train.recompute]}


def fp8(config: Config, component: str) -> dict[str, Any]:
    """PartConfig arguments for the layers of a component that are computed in FP8 (config/fp8.py)."""
    policy = config.fp8
    if config.train.precision != "fp8" or component not in policy.components:
        return {}
    first, last = (policy.first_layers_bf16, policy.last_layers_bf16) if component == "language" else (0, 0)
    return {
        "fp8": policy.format,
        "fp8_recipe": policy.recipe,
        "first_last_layers_bf16": first + last > 0,
        "num_layers_at_start_in_bf16": first,
        "num_layers_at_end_in_bf16": last,
        # Megatron tells a model that a step begins by the decoder's configuration; without FP8 there, the tower would
        # go on with the 8-bit weights of its first step.
        "disable_parameter_transpose_cache": component != "language",
    }


def _language_config(arch: Architecture, config: Config, layout: Layout, settings: dict[str, Any]) -> PartConfig:
    """The decoder's configuration, which is also the one that Megatron's schedules read."""
    decoder = arch.language
    stages: list[list[str]] = [["decoder"] * count for count in layers_per_chunk(config, decoder.layers, layout)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    pipeline: dict[str, Any] = {}
    if layout.pipeline > 1:
        pipeline = {"pipeline_model_parallel_layout": stages}
    if layout.virtual_pipeline > 1:
        pipeline["virtual_pipeline_model_parallel_size"] = layout.virtual_pipeline
    return PartConfig(
        **settings,
        **pipeline,
        **fp8(config, "language"),
        num_layers=decoder.layers,
        hidden_size=decoder.hidden,
        num_attention_heads=decoder.heads,
        num_query_groups=decoder.kv_heads,
        kv_channels=decoder.head_dim,
        ffn_hidden_size=decoder.mlp,
        normalization="RMSNorm",
        layernorm_epsilon=decoder.norm_eps,
        qk_layernorm=True,  # what specs.py puts there, a norm or not: newer Megatron-core asks before it builds it
        add_bias_linear=False,
        add_qkv_bias=decoder.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        use_te_activation_func=True,  # Megatron's name for: the spec says which module; ours is activation.SwiGlu
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        cp_comm_type="p2p" if config.parallel.context_method == "ring" else None,  # read by PackedAttention
        # Megatron refuses it without tensor parallelism, where it means nothing.
        sequence_parallel=config.parallel.sequence and layout.tensor > 1,
    )
