"""Our Architecture -> the config.json that transformers and the hub's models have."""

from __future__ import annotations

from typing import Any

from megatron_vlm.config.architecture import Architecture, LanguageArchitecture, VisionArchitecture
from megatron_vlm.convert.configs import ACTIVATIONS


def _common(dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["Molmo2ForConditionalGeneration"],
        "model_type": "molmo2",
        "dtype": dtype,
        "initializer_range": 0.02,
        # The embedding has the new rows and the head has not, so they are never one tensor in these files.
        "tie_word_embeddings": False,
    }


def _molmo2_text(arch: LanguageArchitecture) -> dict[str, Any]:
    return {
        "hidden_size": arch.hidden,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.mlp,
        "vocab_size": arch.vocab_size,
        "additional_vocab_size": arch.new_rows,
        "max_position_embeddings": arch.max_positions,
        "hidden_act": "silu",
        "qk_norm_type": "qwen3",
        "norm_after": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "use_cache": True,
        "model_type": "molmo2_text",
    }


def _heads(width: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": width // heads,
    }


def native(arch: Architecture, dtype: str) -> dict[str, Any]:
    """config.json of Molmo2 for transformers' own class."""
    tower, connector, text = arch.vision, arch.connector, arch.language
    ids = {
        "image_start_token_id": "<im_start>",
        "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    return {
        **_common(dtype),
        **{field: arch.token_id(name) for field, name in ids.items()},
        "text_config": {
            **_molmo2_text(text),
            "attention_bias": False,
            "rms_norm_eps": text.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": text.rope_theta},
        },
        "vision_config": {
            **_heads(tower.width, tower.heads),
            "model_type": "molmo2_vision",
            "num_hidden_layers": arch.tower_depth,
            "intermediate_size": tower.mlp,
            "hidden_act": _activation(tower),
            "layer_norm_eps": tower.norm_eps,
            "image_size": [tower.image_size, tower.image_size],
            "patch_size": tower.patch_size,
            "num_position_embeddings": tower.patches,
            "attention_bias": True,
            "num_channels": 3,
        },
        "adapter_config": {
            **_heads(connector.width, connector.heads),
            "model_type": "molmo2_adapter",
            "vision_feature_layer": list(connector.taps),
            "intermediate_size": connector.mlp,
            "text_hidden_size": text.hidden,
            "hidden_act": "silu",
            "attention_bias": True,
            "mlp_bias": False,
        },
    }


def hub(arch: Architecture, dtype: str) -> dict[str, Any]:
    """config.json of Molmo2 as the released checkpoints have it (without their remote code, which is not needed)."""
    tower, connector, text = arch.vision, arch.connector, arch.language
    ids = {
        "image_start_token_id": "<im_start>",
        "image_end_token_id": "<im_end>",
        "image_patch_id": "<im_patch>",
        "image_high_res_id": "<im_patch>",
        "image_col_id": "<im_col>",
        "low_res_image_start_token_id": "<low_res_im_start>",
        "image_low_res_id": "<im_low>",
        "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }
    return {
        **_common(dtype),
        **{field: arch.token_id(name) for field, name in ids.items()},
        "use_frame_special_tokens": True,
        "text_config": {
            **_molmo2_text(text),
            "layer_norm_eps": text.norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": None,
            "rope_scaling_layers": None,
            "qkv_bias": False,
            "use_qk_norm": True,
        },
        "vit_config": {
            **_heads(tower.width, tower.heads),
            "model_type": "molmo2",
            "num_hidden_layers": tower.layers,
            "intermediate_size": tower.mlp,
            "hidden_act": _activation(tower),
            "layer_norm_eps": tower.norm_eps,
            "image_default_input_size": [tower.image_size, tower.image_size],
            "image_patch_size": tower.patch_size,
            "image_num_pos": tower.patches,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "float32_attention": True,
        },
        "adapter_config": {
            **_heads(connector.width, connector.heads),
            "model_type": "molmo2",
            "vit_layers": [tap - tower.layers for tap in connector.taps],
            "pooling_attention_mask": True,
            "intermediate_size": connector.mlp,
            "text_hidden_size": text.hidden,
            "hidden_act": "silu",
            "image_feature_dropout": 0.0,
            "attention_dropout": 0.0,
            "residual_dropout": 0.0,
            "float32_attention": True,
        },
    }


def qwen(arch: LanguageArchitecture, dtype: str) -> dict[str, Any]:
    """config.json of the language model alone, as Qwen3 or Qwen2.5."""
    name = "Qwen3" if arch.qk_norm else "Qwen2"
    fields = {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": name.lower(),
        "dtype": dtype,
        "hidden_size": arch.hidden,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.mlp,
        "vocab_size": arch.vocab_size,
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.norm_eps,
        "rope_theta": arch.rope_theta,
        "tie_word_embeddings": arch.tied_head,
        "hidden_act": "silu",
        "use_sliding_window": False,
    }
    if arch.qk_norm:
        fields["attention_bias"] = False
    return fields


def tower(arch: Architecture, dtype: str) -> dict[str, Any]:
    """config.json of the vision tower alone, as SigLIP or CLIP, with the layers that our model has."""
    tower = arch.vision
    kind = "CLIP" if tower.class_token else "Siglip"
    fields = {
        "architectures": [f"{kind}VisionModel"],
        "model_type": f"{kind.lower()}_vision_model",
        "dtype": dtype,
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp,
        "num_hidden_layers": arch.tower_depth,
        "num_attention_heads": tower.heads,
        "image_size": tower.image_size,
        "patch_size": tower.patch_size,
        "num_channels": 3,
        "hidden_act": _activation(tower),
        "layer_norm_eps": tower.norm_eps,
    }
    if not tower.class_token:
        fields["vision_use_head"] = False
    return fields


def _activation(arch: VisionArchitecture) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == arch.activation)
