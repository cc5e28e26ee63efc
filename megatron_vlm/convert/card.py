"""Model cards of exports: what it is, where it comes from, how to load it, what to know."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_vlm.convert.stored import Checkpoint


#: For models that were trained with data.image_crops=0, which no setting of transformers' processor says.
WHOLE_IMAGE = """\
This model was trained with the whole image as its only crop. The processor adds a second one, in higher resolution,
which the model has not seen. Between processor and model, take it out again (one image):

```python
ids = inputs["input_ids"][0]
start = (ids == model.config.image_start_token_id).nonzero()[0].item()
end = (ids == model.config.image_end_token_id).nonzero()[-1].item()
kept = [place for place in range(len(ids)) if not start <= place <= end]
for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
    inputs[name] = inputs[name][:, kept]
inputs["pixel_values"] = inputs["pixel_values"][:1]
placeholders = (inputs["input_ids"] == model.config.image_patch_id).sum()
inputs["image_token_pooling"] = inputs["image_token_pooling"][:placeholders]
inputs["image_grids"][:, 2:] = 0
inputs["image_num_crops"][:] = 1
```
"""


def lineage(source: Checkpoint) -> list[str]:
    """Where the weights come from, as lines. Folder names only: a card names no path of a machine."""
    record = source.record
    run = record.config.get("run", {}).get("name", "run")
    lines = [f"- step {record.step} of run `{run}`, preset `{record.config.get('model', {}).get('preset', '?')}`"]
    start = record.config.get("init", {}).get("checkpoint", "")
    if start:
        lines.append(f"- the run started from the checkpoint `{'/'.join(Path(start).parts[-2:])}`")
    brought: dict[str, Any] = record.state.get("lineage", {})
    for origin in brought.get("sources", []):
        lines.append(
            f"- {len(origin['used'])} tensors from `{Path(origin['directory']).name}` ({origin['format']} format)"
        )
    if brought.get("drawn", {}).get("tensors"):
        drawn = brought["drawn"]
        lines.append(f"- {len(drawn['tensors'])} tensors with random initial weights, seed {drawn['seed']}")
    return lines


def _page(title: str, tags: str, *sections: tuple[str, list[str]]) -> str:
    text = f"---\nlibrary_name: transformers\n{tags}---\n\n# {title}\n"
    for heading, lines in sections:
        text += f"\n## {heading}\n\n" + "\n".join(lines) + "\n"
    return text


def molmo2(source: Checkpoint, dtype: str, image_crops: int) -> str:
    """README.md of a Molmo2 export."""
    arch = source.arch
    notes = [
        f"- weights in {dtype}; vision layers after number {arch.tower_depth - 1}, counted from 0, are not stored",
        "- the head predicts the base vocabulary only; `lm_head.weight` is "
        + ("a copy of the base rows of the embedding" if arch.language.tied_head else "a matrix of its own"),
        "- of a video the processor takes frames at even distances from the first on; in training the last frame was "
        "shown as well",
    ]
    use = [
        "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'model = AutoModelForImageTextToText.from_pretrained("PATH")',
        'processor = AutoProcessor.from_pretrained("PATH")',
        'content = [{"type": "image", "image": image}, {"type": "text", "text": "Describe this image in detail."}]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}],',
        '    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",',
        ")",
        "print(processor.decode(model.generate(**inputs, max_new_tokens=100)[0]))",
        "```",
        "",
        "No remote code is needed: the class is part of transformers (5.23 or later).",
    ]
    whole = [] if image_crops else [("Only the whole image", WHOLE_IMAGE.splitlines())]
    return _page(
        "A Molmo2 model trained with megatron_vlm",
        "pipeline_tag: image-text-to-text\n",
        ("Where it comes from", lineage(source)),
        ("Use", use),
        *whole,
        ("To know", notes),
    )


def part(source: Checkpoint, name: str, dtype: str) -> str:
    """README.md of a language model or vision tower that was taken out of a vision-language model."""
    arch = source.arch
    if name == "language":
        kind = "Qwen3" if arch.language.qk_norm else "Qwen2.5"
        notes = ["- rows of the embedding for image tokens are not part of it"]
    else:
        kind = "CLIP vision" if arch.vision.class_token else "SigLIP vision"
        notes = [
            f"- {arch.tower_depth} of the {arch.vision.layers} layers of the source: the deepest one that was read"
        ]
        if arch.connector.taps or arch.vision.class_token:
            notes.append(
                "- `post_layernorm` was not part of the model and is written as weight 1, bias 0: use `hidden_states`"
            )
    return _page(
        f"The {name} part of a vision-language model, as a {kind} model",
        "",
        ("Where it comes from", lineage(source)),
        ("To know", [f"- weights in {dtype}", *notes]),
    )


def connector(source: Checkpoint, dtype: str) -> str:
    """README.md of a connector: names and layouts of its tensors."""
    layouts = [
        "No class in transformers has this connector. `model.safetensors` holds it under the trainer's own names;",
        "`config.json` is the whole architecture. Every linear layer is y = x W^T + b, W of shape (out, in).",
        "",
        "- `language.embedding.new_rows`: embeddings of the image tokens, ids from the vocabulary's size on",
        "- `connector.projector.*`: the projector. `linear`: one layer. `mlp`: `linear_fc1`, GELU, `linear_fc2`.",
        "  `attention_pooling`: SwiGLU without biases, `linear_fc1` = gate rows, then up rows",
        "- `connector.pooling.linear_kv`: head by head, the head's key rows, then its value rows (k, v, k, v, ...)",
        "- `connector.pooling.queries`, `connector.pooling.projection.*`: the resampler's queries, and its input layer",
        "- `connector.pooling.block.layers.{i}.*`: a pre-norm layer: self-attention among the queries (`linear_qkv`:",
        "  head by head query, key and value rows), cross-attention to the patches (`linear_q`, `linear_kv`), GELU MLP",
    ]
    tensors = [
        f"| `{key}` | {list(shape)} |"
        for key, shape in source.shapes.items()
        if key.startswith("connector.") or key == "language.embedding.new_rows"
    ]
    return _page(
        f"A {source.arch.connector.kind} connector",
        "",
        ("Where it comes from", lineage(source)),
        ("Layout", [*layouts, "", f"Weights in {dtype}.", "", "| tensor | shape |", "|---|---|", *tensors]),
    )
