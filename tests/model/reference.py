"""transformers' towers, connectors and Molmo2 with random weights, and those weights in our modules.

By hand and not by the table of convert/: what the model's tests find is then an error of the model, and an error of
the table shows in tests/convert, where both meet. Layer by layer in forward order, so it is read beside the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from megatron_vlm.config.architecture import Architecture
from tests.torchvision import declare_operators

if TYPE_CHECKING:  # Megatron is imported once a test has redirected it to the CPU
    from megatron_vlm.model.connector import Connector
    from megatron_vlm.model.vision import VisionTower
    from megatron_vlm.model.vlm import VlmModel

declare_operators()

SIGLIP = {
    "patch": "embeddings.patch_embedding",
    "position": "embeddings.position_embedding.weight",
    "layer": "encoder.layers",
    "out": "out_proj",
    "post_norm": "post_layernorm",
}
CLIP = {**SIGLIP, "class": "embeddings.class_embedding", "pre_norm": "pre_layrnorm"}
MOLMO2 = {"patch": "patch_embedding", "position": "positional_embedding", "layer": "layers", "out": "o_proj"}


def interleave(parts: list[torch.Tensor], heads: int) -> torch.Tensor:
    """[q; k; v] rows by head: head 0 of each, head 1 of each, ..."""
    return torch.stack([part.unflatten(0, (heads, -1)) for part in parts], 1).flatten(0, 2)


@torch.no_grad()
def load_tower(tower: VisionTower, weights: Mapping[str, torch.Tensor], names: Mapping[str, str]) -> None:
    """Copy a transformers vision model's state dict into `tower`."""
    patch = weights[names["patch"] + ".weight"]
    # A convolution's (out, channel, row, column), or a linear layer's (out, values).
    tower.patch_embedding.weight.copy_(patch.permute(0, 2, 3, 1).flatten(1) if patch.dim() == 4 else patch)
    if tower.arch.patch_bias:
        tower.patch_embedding.bias.copy_(weights[names["patch"] + ".bias"])
    tower.position_embedding.copy_(weights[names["position"]])
    if tower.arch.class_token:
        tower.class_token.copy_(weights[names["class"]])
    if tower.arch.pre_norm:
        _load(tower.pre_norm, weights, names["pre_norm"])
    index = 0
    for block in tower.blocks:
        for layer in block.layers:
            prefix = f"{names['layer']}.{index}."
            _load(layer.input_layernorm, weights, prefix + "layer_norm1")
            _load(layer.pre_mlp_layernorm, weights, prefix + "layer_norm2")
            for leaf in ("weight", "bias"):
                qkv = [weights[f"{prefix}self_attn.{x}_proj.{leaf}"] for x in "qkv"]
                getattr(layer.self_attention.linear_qkv, leaf).copy_(interleave(qkv, tower.arch.heads))
            _load(layer.self_attention.linear_proj, weights, f"{prefix}self_attn.{names['out']}")
            _load(layer.mlp.linear_fc1, weights, prefix + "mlp.fc1")
            _load(layer.mlp.linear_fc2, weights, prefix + "mlp.fc2")
            index += 1
        if block.final_layernorm is not None:
            _load(block.final_layernorm, weights, names["post_norm"])


@torch.no_grad()
def load_molmo2_connector(connector: Connector, weights: Mapping[str, torch.Tensor], heads: int) -> None:
    """Copy transformers' Molmo2Adapter into an attention_pooling connector."""
    pooling, projector = connector.pooling, connector.projector
    _load(pooling.linear_q, weights, "image_pooling_2d.q_proj")
    for leaf in ("weight", "bias"):
        key_value = [weights[f"image_pooling_2d.{x}_proj.{leaf}"] for x in "kv"]
        getattr(pooling.linear_kv, leaf).copy_(interleave(key_value, heads))
    _load(pooling.linear_proj, weights, "image_pooling_2d.o_proj")
    gate, up = (weights[f"image_projector.{name}_proj.weight"] for name in ("gate", "up"))
    projector.linear_fc1.weight.copy_(torch.cat([gate, up]))
    projector.linear_fc2.weight.copy_(weights["image_projector.down_proj.weight"])


def _load(module: torch.nn.Module, weights: Mapping[str, torch.Tensor], name: str) -> None:
    module.weight.copy_(weights[name + ".weight"])
    module.bias.copy_(weights[name + ".bias"])


def pixels(crops: torch.Tensor, patch: int, mean: tuple[float, ...], std: tuple[float, ...]) -> torch.Tensor:
    """(c, p, d) uint8 crops as the normalised (c, 3, side, side) float32 images that they were cut from."""
    c, p, _ = crops.shape
    grid = round(p**0.5)
    images = crops.view(c, grid, grid, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(c, 3, grid * patch, -1)
    shape = (1, 3, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Random weights large enough that no term of a layer is negligible, biases and norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.normal_(0, 0.15, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)


def molmo2(arch: Architecture, fill: Callable[[torch.nn.Module], None] = randomize) -> Any:
    """transformers' Molmo2 of this architecture, float32, with random weights."""
    from transformers import Molmo2Config, Molmo2ForConditionalGeneration

    vision, connector, language = arch.vision, arch.connector, arch.language
    ids = {
        "image_start_token_id": "<im_start>", "image_end_token_id": "<im_end>", "image_patch_id": "<im_patch>",
        "low_res_image_start_token_id": "<low_res_im_start>", "frame_start_token_id": "<frame_start>",
        "frame_end_token_id": "<frame_end>",
    }  # fmt: skip
    config = Molmo2Config(
        vision_config={
            "hidden_size": vision.width, "intermediate_size": vision.mlp, "num_hidden_layers": max(connector.taps) + 1,
            "num_attention_heads": vision.heads, "num_key_value_heads": vision.heads,
            "head_dim": vision.width // vision.heads, "image_size": [vision.image_size] * 2,
            "patch_size": vision.patch_size,
        },
        adapter_config={
            "vision_feature_layer": list(connector.taps), "hidden_size": connector.width,
            "num_attention_heads": connector.heads, "num_key_value_heads": connector.heads,
            "head_dim": connector.width // connector.heads, "intermediate_size": connector.mlp,
            "text_hidden_size": language.hidden,
        },
        text_config={
            "hidden_size": language.hidden, "num_attention_heads": language.heads,
            "num_key_value_heads": language.kv_heads, "head_dim": language.head_dim,
            "vocab_size": language.vocab_size, "additional_vocab_size": language.new_rows,
            "num_hidden_layers": language.layers, "intermediate_size": language.mlp, "rms_norm_eps": language.norm_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": language.rope_theta},
            "max_position_embeddings": language.max_positions,
        },
        **{field: arch.token_id(name) for field, name in ids.items()},
    )  # fmt: skip
    model = Molmo2ForConditionalGeneration(config).eval()
    fill(model)
    return model


def load_molmo2(model: VlmModel, reference) -> None:
    """Copy the weights of transformers' Molmo2 into a whole model."""
    from tests.model.decoders import load_decoder

    weights = reference.state_dict()
    load_tower(model.vision, _part(weights, "model.vision_tower."), MOLMO2)
    adapter = _part(weights, "model.multi_modal_projector.")
    load_molmo2_connector(model.connector, adapter, reference.config.adapter_config.num_attention_heads)
    load_decoder(model.language, weights, "model.language_model.")


def _part(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
