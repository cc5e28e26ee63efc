"""Small transformers models with random weights, and folders of them as they come from a hub."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.config import presets
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.geometry import Layout, VideoLayout, frame_layout, image_geometry, image_layout
from megatron_vlm.data import crops, tokens
from megatron_vlm.data.prefix import prefix_tokens
from megatron_vlm.data.tokens import Tokenizer
from tests.model import reference, tiny
from tests.torchvision import declare_operators

#: Room for a byte-level tokenizer.
LANGUAGE = dataclasses.replace(tiny.LANGUAGE, vocab_size=320)
#: The 8B is like ARCH (a head of its own), the 4B like TIED.
ARCH = dataclasses.replace(tiny.ARCH, language=LANGUAGE, connector=dataclasses.replace(tiny.CONNECTOR, taps=(1, 0)))
TIED = dataclasses.replace(ARCH, language=dataclasses.replace(LANGUAGE, tied_head=True))
CLIP = dataclasses.replace(
    ARCH,
    language=dataclasses.replace(LANGUAGE, qk_norm=False, qkv_bias=True, tied_head=True),
    vision=dataclasses.replace(
        tiny.VISION, activation="quick_gelu", norm_eps=1e-5, class_token=True, pre_norm=True, post_norm=False,
        patch_bias=False, mean=presets.CLIP_VIT_L_336.mean, std=presets.CLIP_VIT_L_336.std,
    ),
    connector=dataclasses.replace(tiny.CONNECTOR, kind="mlp", taps=(1,)),
)  # fmt: skip
PRESETS = {"like_8b": ARCH, "like_4b": TIED, "qwen2.5_like": CLIP}


def molmo2(arch: Architecture, seed: int = 0) -> Any:
    """transformers' Molmo2 of an architecture, float32, weights large enough for every term to count."""
    model = reference.molmo2(arch, lambda model: randomize(model, seed))
    if arch.language.tied_head:
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight[: arch.language.vocab_size])
    return model


def randomize(model: Any, seed: int = 0) -> Any:
    """Random weights of a size that keeps every layer's output near that of its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
            parameter.normal_(0, spread, generator=generator)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


@cache
def tokenizer() -> str:
    """A tokenizer.json with fewer ids than the models have rows."""
    return tokens.train(["Point to the red star. How many are there? A photo of two cats. " * 3], 300)


def folder(model: Any, path: Path, *, hub: bool = False, shard: str = "5GB") -> Path:
    """The model and a tokenizer as a folder: with its class's own names, or the hub's."""
    model.save_pretrained(path, save_original_format=hub, max_shard_size=shard)
    if hub:
        _hub_config(path / "config.json")
        _hub_embedding(path, model.config.text_config.vocab_size)
    (path / "tokenizer.json").write_text(tokenizer())
    return path


def _hub_embedding(path: Path, rows: int) -> None:
    """transformers 5.23 saves the two embedding tables cut in the middle, and not after the base rows."""
    (file,) = path.glob("*.safetensors")
    tensors = load_file(file)
    keys = [f"model.transformer.wte.{name}" for name in ("embedding", "new_embedding")]
    whole = torch.cat([tensors[key] for key in keys])
    tensors.update(zip(keys, (whole[:rows].clone(), whole[rows:].clone()), strict=True))
    save_file(tensors, file)


def _hub_config(path: Path) -> None:
    """Rewrite transformers' config.json as the released checkpoints have it."""
    fields = json.loads(path.read_text())
    text, tower, adapter = fields["text_config"], fields.pop("vision_config"), fields["adapter_config"]
    theta = text.pop("rope_parameters")["rope_theta"]
    text |= {"rope_theta": theta, "rope_scaling": None, "rope_scaling_layers": None, "use_qk_norm": True}
    text |= {"layer_norm_eps": text.pop("rms_norm_eps"), "qkv_bias": text.pop("attention_bias")}
    size, layers = tower.pop("image_size"), tiny.VISION.layers
    tower |= {"image_default_input_size": size, "image_patch_size": tower.pop("patch_size")}
    # The released config counts the layers of the source tower; the last ones are not stored.
    tower |= {"num_hidden_layers": layers, "image_num_pos": tower.pop("num_position_embeddings")}
    adapter["vit_layers"] = [tap - layers for tap in adapter.pop("vision_feature_layer")]
    adapter |= {"pooling_attention_mask": True, "image_feature_dropout": 0.0}
    path.write_text(json.dumps({**fields, "vit_config": tower}))


def qwen(arch: Architecture, seed: int = 1) -> Any:
    """transformers' Qwen3 or Qwen2.5 of an architecture's language model."""
    declare_operators()
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    text = arch.language
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if text.qk_norm else (Qwen2ForCausalLM, Qwen2Config)
    return randomize(
        kind(
            config(
                hidden_size=text.hidden, num_hidden_layers=text.layers, num_attention_heads=text.heads,
                num_key_value_heads=text.kv_heads, head_dim=text.head_dim, intermediate_size=text.mlp,
                vocab_size=text.vocab_size, rms_norm_eps=text.norm_eps, tie_word_embeddings=text.tied_head,
                rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
            )
        ),
        seed,
    ).eval()  # fmt: skip


def tower(arch: Architecture, seed: int = 2) -> Any:
    """transformers' SigLIP or CLIP of an architecture's vision tower, with layers that nobody reads."""
    declare_operators()
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    vision = arch.vision
    kind, config = (
        (CLIPVisionModel, CLIPVisionConfig) if vision.class_token else (SiglipVisionModel, SiglipVisionConfig)
    )
    return randomize(
        kind(
            config(
                hidden_size=vision.width, intermediate_size=vision.mlp, num_hidden_layers=vision.layers,
                num_attention_heads=vision.heads, image_size=vision.image_size + 6, patch_size=vision.patch_size,
                layer_norm_eps=vision.norm_eps,
            )
        ),
        seed,
    ).eval()  # fmt: skip


def bring(folder: Path, out: Path, **options: Any) -> Path:
    """A Molmo2 folder as a checkpoint."""
    from megatron_vlm.convert import importing

    return importing.bring(*importing.molmo2(folder), out, **options)


def differences(one: Path, other: Path) -> list[str]:
    """What `verify` prints."""
    from megatron_vlm.convert import compare

    return list(compare.tensors(compare.Side.open(one), compare.Side.open(other)))


def apart(one: Path, other: Path, batch: str | Path = "") -> float:
    """What `verify --logits` prints: the largest difference of a logit."""
    from megatron_vlm.convert import answers, compare

    with answers.alone():
        return compare.logits(compare.Side.open(one), compare.Side.open(other), batch).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by the library and not by ours."""
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same_bytes(one: Path, other: Path) -> None:
    """The same tensors, bit for bit."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype and torch.equal(value, right[key]), key


def prompt(
    arch: Architecture,
    definition: str,
    question: str,
    *,
    pixels: Sequence[np.ndarray] = (),
    frames: Sequence[np.ndarray] = (),
    times: Sequence[float] = (),
    most_crops: int = 8,
) -> Any:
    """What our own generation starts from: images, or the frames of a video shown at `times`, and a question.

    definition: a tokenizer.json.
    """
    from megatron_vlm.evaluate.prompt import Prompt

    geometry, tokenizer = image_geometry(arch, most_crops), Tokenizer(definition, arch.language)
    layouts: list[Layout] = [image_layout(image.shape[1], image.shape[0], geometry) for image in pixels]
    cut = [crops.cut(image, layout, geometry) for image, layout in zip(pixels, layouts, strict=True)]
    if len(frames):
        layouts.append(VideoLayout(tuple(times), 0.0, frame_layout(geometry)))
        cut += [crops.cut(frame, frame_layout(geometry), geometry.frame) for frame in frames]
    empty = np.empty((0, arch.vision.patches, arch.vision.patch_values), np.uint8)
    return Prompt(
        prefix_tokens(tuple(layouts), tokenizer)[0].tolist(),
        [tokenizer.user_turn(question, first=True)],
        np.concatenate([empty, *cut]),
        crops.row_windows(layouts, geometry),
    )
