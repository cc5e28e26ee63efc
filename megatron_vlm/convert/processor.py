"""What stands beside the weights of a Molmo2 export: tokenizer with the new tokens, image and video processor, chat
template, generation config."""

from __future__ import annotations

import json
from typing import Any

from megatron_vlm.config.architecture import NEW_TOKENS, Architecture, VisionArchitecture
from megatron_vlm.config.geometry import image_geometry
from megatron_vlm.config.schema import DataConfig
from megatron_vlm.data.tokens import Tokenizer

#: Ids between the tokenizer's last and the model's first new token need a name, or new tokens would get lower ids.
FILLER = "|<EXTRA_TOKENS_{}>|"
END, PAD = "<|im_end|>", "<|endoftext|>"

#: The conversation as the trainer writes it: images first (numbered if several), then turns; `style` may stand beside
#: a text, as in training. An answer ends with <|im_end|>, and so does, once more, the turn before a further question.
CHAT_TEMPLATE = """\
{%- set count = namespace(images=0, shown=0) -%}
{%- for message in messages if message.content is not string -%}
{%- for item in message.content if item.type == 'image' -%}
{%- set count.images = count.images + 1 -%}
{%- endfor -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages if message.content is not string -%}
{%- for item in message.content if item.type in ('image', 'video') -%}
{%- if item.type == 'video' -%}
{{- '<|video|>' -}}
{%- else -%}
{%- set count.shown = count.shown + 1 -%}
{%- if count.images > 1 -%}
{{- 'Image ' ~ count.shown -}}
{%- endif -%}
{{- '<|image|>' -}}
{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{%- if not loop.first -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{{- '<|im_start|>user\\n' -}}
{%- else -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for item in message.content if item.type == 'text' -%}
{%- if item.style -%}
{{- item.style ~ ': ' -}}
{%- endif -%}
{{- item.text -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- if message.role == 'user' -%}
{{- '\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def tokenizer_files(setting: str, arch: Architecture) -> dict[str, str]:
    """Tokenizer, its config, chat template and generation config, by file name.

    setting: tokenizer.json, a directory with it, or `sample`. Raises ValueError where it does not fit the model.
    """
    if not setting:
        raise ValueError("the checkpoint does not say which tokenizer is the model's. Give one with --tokenizer.")
    try:
        tokenizer = Tokenizer.load(setting, arch.language)
    except ValueError as error:
        raise ValueError(f"the model's tokenizer: {error} Give one with --tokenizer.") from None
    definition = json.loads(tokenizer.definition)
    # Those that an export has added are added again.
    added = [token for token in definition["added_tokens"] if token["content"] not in NEW_TOKENS]
    definition["added_tokens"] = added
    ids = {token["id"] for token in added} | set(definition["model"]["vocab"].values())
    used = max(ids) + 1
    if len(ids) != used:
        raise ValueError(
            f"tokenizer {setting} has ids up to {used - 1} but only {len(ids)} tokens: with ids left out in between, "
            "the new tokens cannot be given theirs."
        )
    filler = [FILLER.format(number) for number in range(arch.language.vocab_size - used)]
    added += [_added(used + number, token) for number, token in enumerate([*filler, *NEW_TOKENS])]
    definition["truncation"] = definition["padding"] = None
    pad = PAD if PAD in tokenizer.names else END
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "Molmo2Processor",
        "bos_token": END,
        "eos_token": END,
        "pad_token": pad,
        "unk_token": None,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "image_token": "<|image|>",
        "video_token": "<|video|>",
        "model_max_length": arch.language.max_positions,
        "padding_side": "left",
        "extra_special_tokens": {"image_token": "<|image|>", "video_token": "<|video|>"},
    }
    generation = {
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.names[pad],
        "do_sample": False,
    }
    return {
        "tokenizer.json": json.dumps(definition, ensure_ascii=False) + "\n",
        "tokenizer_config.json": _json(config),
        "chat_template.jinja": CHAT_TEMPLATE,
        "generation_config.json": _json(generation),
    }


def _added(number: int, token: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": token, **flags, "special": True}


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _pixels(arch: VisionArchitecture) -> dict[str, Any]:
    return {
        "size": {"height": arch.image_size, "width": arch.image_size},
        "patch_size": arch.patch_size,
        "image_mean": list(arch.mean),
        "image_std": list(arch.std),
        "resample": 2,  # bilinear
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "rescale_factor": 1 / 255,
    }


def processor_files(arch: Architecture, data: DataConfig) -> dict[str, str]:
    """Configs of Molmo2's processor classes, by file name, with crops and frames as `data` had them in training."""
    geometry = image_geometry(arch, data.image_crops)
    image = {
        "image_processor_type": "Molmo2ImageProcessor",
        "processor_class": "Molmo2Processor",
        **_pixels(arch.vision),
        # The class always adds high-resolution crops; where training had none, the model card says how to leave them
        # out.
        "max_crops": max(1, data.image_crops),
        "overlap_margins": [geometry.margin, geometry.margin],
        "pooling_size": [arch.connector.image_pool] * 2,
    }
    video = {
        "video_processor_type": "Molmo2VideoProcessor",
        "processor_class": "Molmo2Processor",
        **_pixels(arch.vision),
        "pooling_size": [arch.connector.video_pool] * 2,
        "num_frames": data.max_frames or data.max_crops,
        # The class declares a whole number, and takes any.
        "max_fps": int(data.frames_per_second) if data.frames_per_second % 1 == 0 else data.frames_per_second,
    }
    both = {
        "processor_class": "Molmo2Processor",
        "image_use_col_tokens": True,
        "use_single_crop_col_tokens": False,
        "use_single_crop_start_token": True,
        "video_use_col_tokens": False,
        "use_frame_special_tokens": True,
    }
    return {
        "preprocessor_config.json": _json(image),
        "video_preprocessor_config.json": _json(video),
        "processor_config.json": _json(both),
    }


def tower_preprocessor(arch: VisionArchitecture) -> dict[str, Any]:
    """preprocessor_config.json of a vision tower alone."""
    kind = "CLIPImageProcessor" if arch.class_token else "SiglipImageProcessor"
    fields = _pixels(arch)
    del fields["patch_size"]
    return {"image_processor_type": kind, **fields}
