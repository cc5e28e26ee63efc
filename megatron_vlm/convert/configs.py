"""Hugging Face's config.json -> our Architecture. Whatever our model would compute otherwise is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from megatron_vlm.config.architecture import (
    Architecture,
    ConnectorArchitecture,
    LanguageArchitecture,
    VisionArchitecture,
)
from megatron_vlm.config.presets import CLIP_VIT_L_336, HALF, PRESETS, architecture
from megatron_vlm.config.schema import ModelConfig

Fields = Mapping[str, Any]
#: Fields of an architecture that weights do not depend on: two models that differ only in them are the same here.
NOT_IN_WEIGHTS = frozenset(
    ["language.max_positions", "init_std", "vision.layers", "connector.image_pool", "connector.video_pool"]
)
#: What transformers takes where a config.json is silent.
_VISION_DEFAULTS: dict[str, dict[str, Any]] = {
    "siglip": {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "clip": {"patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
}
_VISION_SIZES = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224
}  # fmt: skip
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu"}


def _is(where: str, fields: Fields, **wanted: Any) -> None:
    """Each field, if it is there, must have the value (or one of a tuple of values) that our model computes with."""
    for name, value in wanted.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if name in fields and fields[name] not in allowed:
            raise ValueError(
                f"{where}: {name} is {fields[name]!r}; this trainer computes with {' or '.join(map(repr, allowed))} "
                "only, so the model cannot be converted."
            )


def _need(where: str, fields: Fields, name: str) -> Any:
    if name not in fields:
        raise ValueError(f"{where} does not say {name}. Is it the config.json of this model?")
    return fields[name]


def _theta(where: str, fields: Fields) -> float:
    """The base of the rotary frequencies; scaled ones are refused."""
    rope = fields.get("rope_parameters") or {}
    for scaling in (rope, fields.get("rope_scaling") or {}):
        _is(where, scaling, rope_type="default", type="default")
    theta = rope.get("rope_theta", fields.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{where} does not say rope_theta. Is it the config.json of this model?")
    return float(theta)


def language(fields: Fields, where: str) -> LanguageArchitecture:
    """A Qwen3 or Qwen2.5 language model. ValueError for any other, and for what our decoder does not compute."""
    kind = fields.get("model_type")
    if kind not in ("qwen3", "qwen2"):
        raise ValueError(
            f"{where} is a {kind!r} model. Language models of model_type qwen3 and qwen2 (Qwen2.5) are converted; OLMo "
            "and others are not."
        )
    _is(where, fields, hidden_act="silu", use_sliding_window=False, attention_bias=False)
    heads, hidden = _need(where, fields, "num_attention_heads"), _need(where, fields, "hidden_size")
    return LanguageArchitecture(
        hidden=hidden,
        layers=_need(where, fields, "num_hidden_layers"),
        heads=heads,
        kv_heads=_need(where, fields, "num_key_value_heads"),
        head_dim=fields.get("head_dim") or (128 if kind == "qwen3" else hidden // heads),
        mlp=_need(where, fields, "intermediate_size"),
        vocab_size=_need(where, fields, "vocab_size"),
        new_rows=128,
        tied_head=fields.get("tie_word_embeddings", False),
        rope_theta=_theta(where, fields),
        norm_eps=fields.get("rms_norm_eps", 1e-6),
        qk_norm=kind == "qwen3",
        qkv_bias=kind == "qwen2",
        max_positions=fields.get("max_position_embeddings", 32_768),
    )


def vision(fields: Fields, where: str, preprocessor: Fields | None = None) -> tuple[str, VisionArchitecture]:
    """A SigLIP or CLIP vision tower: (`siglip` or `clip`, its architecture).

    fields: of the whole model or of its vision part. preprocessor: preprocessor_config.json, for mean and std.
    """
    fields = fields.get("vision_config", fields)
    kind = str(fields.get("model_type", "")).removesuffix("_vision_model")
    if kind not in _VISION_DEFAULTS:
        raise ValueError(
            f"{where} is a {fields.get('model_type')!r} model. Vision towers of siglip (SigLIP, SigLIP2 of fixed "
            "resolution) and clip are converted."
        )
    fields = {**_VISION_SIZES, **_VISION_DEFAULTS[kind], **fields}
    _is(where, fields, hidden_act=tuple(ACTIVATIONS), num_channels=3)
    clip = kind == "clip"
    usual = (CLIP_VIT_L_336.mean, CLIP_VIT_L_336.std) if clip else (HALF, HALF)
    mean, std = (
        tuple((preprocessor or {}).get(name) or value)
        for name, value in zip(("image_mean", "image_std"), usual, strict=True)
    )
    patch = fields["patch_size"]
    return kind, VisionArchitecture(
        # Pixels beyond the last whole patch are never seen.
        image_size=fields["image_size"] // patch * patch,
        patch_size=patch,
        width=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        mlp=fields["intermediate_size"],
        layers=fields["num_hidden_layers"],
        activation=ACTIVATIONS[fields["hidden_act"]],
        norm_eps=fields["layer_norm_eps"],
        class_token=clip,
        pre_norm=clip,
        post_norm=not clip,
        patch_bias=not clip,
        mean=mean,
        std=std,
    )


def molmo2(fields: Fields, where: str) -> tuple[str, Architecture]:
    """A Molmo2 model: (`native` or `hub`, its architecture). `tied_head` is not known from here: False."""
    if fields.get("model_type") != "molmo2":
        raise ValueError(f"{where} is a {fields.get('model_type')!r} model, not molmo2.")
    hub = "vit_config" in fields
    text, adapter = _need(where, fields, "text_config"), _need(where, fields, "adapter_config")
    tower = _need(where, fields, "vit_config" if hub else "vision_config")
    _is(where, text, hidden_act="silu", qk_norm_type="qwen3", use_qk_norm=True, norm_after=False)
    layers = list(range(text["num_hidden_layers"]))
    _is(where, text, rope_scaling_layers=(None, layers), attention_bias=False, qkv_bias=False)
    _is(where, adapter, hidden_act="silu", attention_bias=True, mlp_bias=False, pooling_attention_mask=True)
    _is(where, adapter, image_feature_dropout=0.0, attention_dropout=0.0)
    _is(where, tower, hidden_act=tuple(ACTIVATIONS), attention_bias=True, num_channels=3)
    size = tower.get("image_default_input_size") or tower.get("image_size") or [378, 378]
    patch = tower.get("image_patch_size") or tower.get("patch_size") or 14
    if len(set(size)) > 1:
        raise ValueError(f"{where}: crops of {size} pixels are not square, so the model cannot be converted.")
    for part, width in ((tower, tower["hidden_size"]), (adapter, adapter["hidden_size"])):
        heads = part["num_attention_heads"]
        _is(where, part, num_key_value_heads=heads, head_dim=width // heads)
    _is(where, adapter, text_hidden_size=text["hidden_size"])
    _is(where, tower, image_num_pos=(size[0] // patch) ** 2, num_position_embeddings=((size[0] // patch) ** 2, None))
    taps = tuple(
        tap % tower["num_hidden_layers"] for tap in adapter.get("vit_layers", adapter.get("vision_feature_layer"))
    )
    arch = Architecture(
        VisionArchitecture(
            image_size=size[0] // patch * patch, patch_size=patch, width=tower["hidden_size"],
            heads=tower["num_attention_heads"], mlp=tower["intermediate_size"], layers=tower["num_hidden_layers"],
            activation=ACTIVATIONS[tower.get("hidden_act", "gelu_pytorch_tanh")],
            norm_eps=tower.get("layer_norm_eps", 1e-6), class_token=False, pre_norm=False, post_norm=True,
            patch_bias=True, mean=HALF, std=HALF,
        ),
        ConnectorArchitecture(
            kind="attention_pooling", taps=taps, image_pool=2, video_pool=3, width=adapter["hidden_size"],
            heads=adapter["num_attention_heads"], mlp=adapter["intermediate_size"], queries=0, layers=0,
        ),
        LanguageArchitecture(
            hidden=text["hidden_size"], layers=text["num_hidden_layers"], heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"], head_dim=text["head_dim"], mlp=text["intermediate_size"],
            vocab_size=text["vocab_size"], new_rows=text["additional_vocab_size"], tied_head=False,
            rope_theta=_theta(where, text), norm_eps=text.get("rms_norm_eps", text.get("layer_norm_eps", 1e-6)),
            qk_norm=True, qkv_bias=False, max_positions=text.get("max_position_embeddings", 36_864),
        ),
    )  # fmt: skip
    return ("hub" if hub else "native"), arch


def differences(one: Any, other: Any, prefix: str = "", ignore: Collection[str] = ()) -> list[str]:
    """Fields in which two architectures (or parts of them) differ, but for NOT_IN_WEIGHTS and `ignore`:
    `name: one / other`."""
    found: list[str] = []
    for field in dataclasses.fields(one):
        left, right, name = getattr(one, field.name), getattr(other, field.name), prefix + field.name
        if dataclasses.is_dataclass(left):
            found += differences(left, right, f"{name}.", ignore)
        elif left != right and name not in NOT_IN_WEIGHTS and name not in ignore:
            found.append(f"{name}: {left!r} / {right!r}")
    return found


def settings(
    wanted: Mapping[str, Any],
    given: ModelConfig,
    first: Iterable[str] = (),
    preset: str = "",
    ignore: Collection[str] = (),
) -> tuple[ModelConfig, Architecture]:
    """The `model` settings that describe a model, and its architecture.

    wanted: its parts by name (vision, connector, language), as found in the source.
    given:  connector and vision_layers that the user asked for.
    first:  beginnings of preset names to try first, where several fit. preset: the one to take.
    ignore: fields that the source does not decide.
    Raises ValueError with the preset that comes nearest and the fields in which it differs.
    """
    if preset and preset not in PRESETS:
        raise ValueError(f"--preset {preset} is not a preset; choose one of {', '.join(PRESETS)}.")
    order = sorted(PRESETS, key=lambda name: not name.startswith(tuple(first)))
    best: tuple[list[str], str] | None = None
    for name in [preset] if preset else order:
        model = dataclasses.replace(given, preset=name)
        if "connector" in wanted and wanted["connector"].taps != PRESETS[name].connector.taps:
            model = dataclasses.replace(model, vision_layers=wanted["connector"].taps)
        try:
            arch = architecture(model)
        except ValueError:
            continue
        different = [
            line
            for part, value in wanted.items()
            for line in differences(value, getattr(arch, part), f"{part}.", ignore)
        ]
        if not different:
            return model, arch
        if best is None or len(different) < len(best[0]):
            best = different, name
    if best is None:
        return given, architecture(dataclasses.replace(given, preset=preset or order[0]))
    raise ValueError(
        f"no preset is this model. The nearest, {best[1]}, differs in (source / preset): {'; '.join(best[0])}. "
        "Add a preset to config/presets.py, or check the source's config.json."
    )
