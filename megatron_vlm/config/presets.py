"""Named architectures. A preset is data: adding one adds no class. The numbers are those of the published configs."""

from __future__ import annotations

import dataclasses

from megatron_vlm.config.architecture import (
    CONNECTORS,
    Architecture,
    ConnectorArchitecture,
    LanguageArchitecture,
    VisionArchitecture,
)
from megatron_vlm.config.schema import ModelConfig

HALF = (0.5, 0.5, 0.5)

# google/siglip2-so400m-patch14-384: 384 // 14 = 27 patches a side, so 378 pixels are used.
SIGLIP2_SO400M = VisionArchitecture(
    image_size=378, patch_size=14, width=1152, heads=16, mlp=4304, layers=27, activation="gelu_tanh",
    norm_eps=1e-6, class_token=False, pre_norm=False, post_norm=True, patch_bias=True, mean=HALF, std=HALF,
)  # fmt: skip
# openai/clip-vit-large-patch14-336.
CLIP_VIT_L_336 = VisionArchitecture(
    image_size=336, patch_size=14, width=1024, heads=16, mlp=4096, layers=24, activation="quick_gelu",
    norm_eps=1e-5, class_token=True, pre_norm=True, post_norm=False, patch_bias=False,
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711),
)  # fmt: skip
TINY_VISION = VisionArchitecture(
    image_size=64, patch_size=8, width=64, heads=4, mlp=192, layers=3, activation="gelu_tanh", norm_eps=1e-6,
    class_token=False, pre_norm=False, post_norm=True, patch_bias=True, mean=HALF, std=HALF,
)  # fmt: skip


def _qwen3(
    hidden: int, layers: int, heads: int, mlp: int, *, tied: bool, rope_theta: float = 1e6
) -> LanguageArchitecture:
    return LanguageArchitecture(
        hidden=hidden, layers=layers, heads=heads, kv_heads=8, head_dim=128, mlp=mlp, vocab_size=151_936, new_rows=128,
        tied_head=tied, rope_theta=rope_theta, norm_eps=1e-6, qk_norm=True, qkv_bias=False, max_positions=40_960,
    )  # fmt: skip


QWEN3_0_6B = _qwen3(1024, 28, 16, 3072, tied=True)
QWEN3_1_7B = _qwen3(2048, 28, 16, 6144, tied=True)
QWEN3_4B = _qwen3(2560, 36, 32, 9728, tied=True)
QWEN3_8B = _qwen3(4096, 36, 32, 12288, tied=False)
# Qwen3-4B-Instruct-2507, which Molmo2-4B starts from, has a larger base frequency.
QWEN3_4B_INSTRUCT = dataclasses.replace(QWEN3_4B, rope_theta=5e6)
QWEN2_5_0_5B = LanguageArchitecture(
    hidden=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864, vocab_size=151_936, new_rows=128,
    tied_head=True, rope_theta=1e6, norm_eps=1e-6, qk_norm=False, qkv_bias=True, max_positions=32_768,
)  # fmt: skip
TINY_LANGUAGE = LanguageArchitecture(
    hidden=64, layers=4, heads=4, kv_heads=2, head_dim=16, mlp=192, vocab_size=2048, new_rows=128,
    tied_head=False, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, qkv_bias=False, max_positions=40_960,
)  # fmt: skip


def _molmo2_connector(vision: VisionArchitecture, language: LanguageArchitecture) -> ConnectorArchitecture:
    """Molmo2's connector: layers -3 and -9 of the source tower, windows of 2x2 (image) and 3x3 (video)."""
    return ConnectorArchitecture(
        kind="attention_pooling", taps=(vision.layers - 3, vision.layers - 9), image_pool=2, video_pool=3,
        width=vision.width, heads=vision.heads, mlp=language.mlp, queries=0, layers=0,
    )  # fmt: skip


def _molmo2(language: LanguageArchitecture) -> Architecture:
    return Architecture(SIGLIP2_SO400M, _molmo2_connector(SIGLIP2_SO400M, language), language)


_CLIP_LINEAR = ConnectorArchitecture(
    kind="mlp", taps=(22,), image_pool=1, video_pool=3,
    width=CLIP_VIT_L_336.width, heads=CLIP_VIT_L_336.heads, mlp=QWEN2_5_0_5B.hidden, queries=0, layers=0,
)  # fmt: skip

PRESETS: dict[str, Architecture] = {
    "tiny": Architecture(
        TINY_VISION,
        ConnectorArchitecture(
            kind="attention_pooling", taps=(2, 0), image_pool=2, video_pool=3,
            width=TINY_VISION.width, heads=TINY_VISION.heads, mlp=TINY_LANGUAGE.mlp, queries=0, layers=0,
        ),
        TINY_LANGUAGE,
        init_std=0.0,
    ),
    "qwen3_0.6b": _molmo2(QWEN3_0_6B),
    "qwen3_1.7b": _molmo2(QWEN3_1_7B),
    "qwen3_4b": _molmo2(QWEN3_4B),
    "qwen3_8b": _molmo2(QWEN3_8B),
    "molmo2_4b": _molmo2(QWEN3_4B_INSTRUCT),
    "molmo2_8b": _molmo2(QWEN3_8B),
    "qwen2.5_0.5b_clip": Architecture(CLIP_VIT_L_336, _CLIP_LINEAR, QWEN2_5_0_5B),
}  # fmt: skip

#: Queries per crop and layers of a resampler that replaces a preset's own connector.
RESAMPLER_QUERIES = 64
RESAMPLER_LAYERS = 2


def architecture(model: ModelConfig) -> Architecture:
    """The preset with the settings of `model` applied.

    Raises ValueError for a preset or connector that does not exist, and for taps outside the tower.
    """
    if model.preset not in PRESETS:
        raise ValueError(f"model.preset={model.preset!r} is not a preset; choose one of {', '.join(PRESETS)}.")
    arch = PRESETS[model.preset]
    connector = arch.connector
    if model.connector:
        if model.connector not in CONNECTORS:
            raise ValueError(
                f"model.connector={model.connector!r} does not exist; choose one of {', '.join(CONNECTORS)}."
            )
        resampler = model.connector == "resampler"
        connector = dataclasses.replace(
            connector,
            kind=model.connector,
            queries=RESAMPLER_QUERIES if resampler else 0,
            layers=RESAMPLER_LAYERS if resampler else 0,
        )
    if model.vision_layers is not None:
        connector = dataclasses.replace(connector, taps=tuple(model.vision_layers))
    connector = dataclasses.replace(
        connector,
        image_pool=model.image_pool or connector.image_pool,
        video_pool=model.video_pool or connector.video_pool,
    )
    outside = [tap for tap in connector.taps if not 0 <= tap < arch.vision.layers]
    if outside:
        raise ValueError(
            f"model.vision_layers names layers {outside}, but the tower of {model.preset!r} has layers "
            f"0 to {arch.vision.layers - 1}."
        )
    return dataclasses.replace(arch, connector=connector)
