"""One table of names, read in both directions: what each weight is called, and how it is laid out, in every format.

Formats:
megatron  our checkpoints
qwen      Qwen3 and Qwen2.5 language models
siglip    SigLIP and SigLIP2 vision towers (without the prefix `vision_model.`)
clip      CLIP vision towers (likewise)
native    Molmo2 as transformers' own class names it
hub       Molmo2 as the released checkpoints name it

A row of the table stands for one or several parts (queries, keys, values; gate, up) and says for each format which
tensors hold them. Sizes: d hidden, q and k rows of all query and key heads, h head, m MLP, v vocabulary, n new rows;
w vision width, f vision MLP, s patches with class token, x numbers in a patch; t tapped width, c connector width,
p projector.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

FORMATS = ("megatron", "qwen", "siglip", "clip", "native", "hub")


@dataclass(frozen=True)
class Cell:
    """How one format stores the parts of a row: their keys, and one of the layouts
    each (a tensor per part), joined (below each other), interleaved (by group), kernel (a convolution)."""

    keys: tuple[str, ...]
    layout: str = "each"
    order: tuple[int, ...] = ()


def each(*keys: str) -> Cell:
    """One tensor per part. An empty key: this format does not have the part."""
    return Cell(keys)


def joined(key: str, *order: int) -> Cell:
    """All parts below each other, in this order."""
    return Cell((key,), "joined", order)


def interleaved(key: str) -> Cell:
    """Megatron's order by groups."""
    return Cell((key,), "interleaved")


def kernel(key: str) -> Cell:
    """A convolution over patches."""
    return Cell((key,), "kernel")


@dataclass(frozen=True)
class Row:
    """A row of the table before sizes and layer numbers are filled in."""

    shapes: str
    """Of the parts, as letters: `q d, k d, k d`."""
    cells: Mapping[str, Cell]
    only: str = ""
    """A property that the architecture must have."""


@dataclass(frozen=True)
class Section:
    """Rows with common prefixes. `{i}` in a prefix: once for each layer of `layers`."""

    part: str
    """vision, connector or language."""
    prefixes: Mapping[str, str]
    rows: tuple[Row, ...]
    layers: str = ""
    """vision or language; empty = not a layer."""


def _row(shapes: str, only: str = "", **cells: str | Cell) -> Row:
    return Row(shapes, {name: each(cell) if isinstance(cell, str) else cell for name, cell in cells.items()}, only)


def _qwen(shapes: str, megatron: str | Cell, qwen: str | Cell, hub: str | Cell, only: str = "") -> Row:
    """Of the language model, where the native names are Qwen's."""
    return _row(shapes, only, megatron=megatron, qwen=qwen, native=qwen, hub=hub)


def _tower(shapes: str, megatron: str | Cell, siglip: str | Cell, native: str | Cell, hub: str | Cell) -> Row:
    """Of the vision tower, where CLIP's names are SigLIP's."""
    return _row(shapes, megatron=megatron, siglip=siglip, clip=siglip, native=native, hub=hub)


def _qkv(suffix: str) -> Cell:
    return each(*(f"self_attn.{part}_proj.{suffix}" for part in "qkv"))


def _w(*names: str, suffix: str) -> Cell:
    return each(*(f"attention.{name}.{suffix}" for name in names))


LANGUAGE_LAYER = Section(
    "language",
    {
        "megatron": "language.decoder.layers.{i}.",
        "qwen": "model.layers.{i}.",
        "native": "model.language_model.layers.{i}.",
        "hub": "model.transformer.blocks.{i}.",
    },
    (
        _qwen("d", "input_layernorm.weight", "input_layernorm.weight", "attn_norm.weight"),
        _qwen(
            "q d, k d, k d",
            interleaved("self_attention.linear_qkv.weight"),
            _qkv("weight"),
            joined("self_attn.att_proj.weight"),
        ),
        _qwen(
            "q, k, k",
            interleaved("self_attention.linear_qkv.bias"),
            _qkv("bias"),
            joined("self_attn.att_proj.bias"),
            only="qkv_bias",
        ),
        _qwen(
            "h", "self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "self_attn.q_norm.weight", "qk_norm"
        ),
        _qwen(
            "h", "self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "self_attn.k_norm.weight", "qk_norm"
        ),
        _qwen("d q", "self_attention.linear_proj.weight", "self_attn.o_proj.weight", "self_attn.attn_out.weight"),
        _qwen("d", "pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "ff_norm.weight"),
        # Gate, then up; the hub has them the other way round.
        _qwen(
            "m d, m d",
            joined("mlp.linear_fc1.weight"),
            each("mlp.gate_proj.weight", "mlp.up_proj.weight"),
            joined("mlp.ff_proj.weight", 1, 0),
        ),
        _qwen("d m", "mlp.linear_fc2.weight", "mlp.down_proj.weight", "mlp.ff_out.weight"),
    ),
    layers="language",
)

LANGUAGE = Section(
    "language",
    {"megatron": "language.", "qwen": "model.", "native": "model.language_model.", "hub": "model.transformer."},
    (
        _row(
            "v d, n d",
            megatron=each("embedding.word_embeddings.weight", "embedding.new_rows"),
            qwen=each("embed_tokens.weight", ""),
            native=joined("embed_tokens.weight"),
            hub=each("wte.embedding", "wte.new_embedding"),
        ),
        _qwen("d", "decoder.final_layernorm.weight", "norm.weight", "ln_f.weight"),
    ),
)

#: With a tied head the row is a copy of the embedding, which Molmo2 stores in both formats and Qwen may or may not.
HEAD = Section(
    "language",
    dict.fromkeys(("megatron", "qwen", "native", "hub"), ""),
    (_qwen("v d", "language.head.weight", "lm_head.weight", "lm_head.weight"),),
)
EMBEDDING, NEW_ROWS = "language.embedding.word_embeddings.weight", "language.embedding.new_rows"

VISION_LAYER = Section(
    "vision",
    {
        "megatron": "vision.layers.{i}.",
        "siglip": "encoder.layers.{i}.",
        "clip": "encoder.layers.{i}.",
        "native": "model.vision_tower.layers.{i}.",
        "hub": "model.vision_backbone.image_vit.transformer.resblocks.{i}.",
    },
    tuple(
        _tower(shapes.format(" w" if suffix == "weight" else ""), *names)
        for suffix in ("weight", "bias")
        for shapes, *names in (
            (
                "w",
                f"input_layernorm.{suffix}",
                f"layer_norm1.{suffix}",
                f"layer_norm1.{suffix}",
                f"attention_norm.{suffix}",
            ),
            (
                "w{0}, w{0}, w{0}",
                interleaved(f"self_attention.linear_qkv.{suffix}"),
                _qkv(suffix),
                _qkv(suffix),
                _w("wq", "wk", "wv", suffix=suffix),
            ),
            (
                "w{0}",
                f"self_attention.linear_proj.{suffix}",
                f"self_attn.out_proj.{suffix}",
                f"self_attn.o_proj.{suffix}",
                f"attention.wo.{suffix}",
            ),
            (
                "w",
                f"pre_mlp_layernorm.{suffix}",
                f"layer_norm2.{suffix}",
                f"layer_norm2.{suffix}",
                f"ffn_norm.{suffix}",
            ),
            ("f{0}", f"mlp.linear_fc1.{suffix}", f"mlp.fc1.{suffix}", f"mlp.fc1.{suffix}", f"feed_forward.w1.{suffix}"),
            (
                "w f" if suffix == "weight" else "w",
                f"mlp.linear_fc2.{suffix}",
                f"mlp.fc2.{suffix}",
                f"mlp.fc2.{suffix}",
                f"feed_forward.w2.{suffix}",
            ),
        )
    ),
    layers="vision",
)

VISION = Section(
    "vision",
    {
        "megatron": "vision.",
        "siglip": "",
        "clip": "",
        "native": "model.vision_tower.",
        "hub": "model.vision_backbone.image_vit.",
    },
    (
        _tower(
            "w x",
            "patch_embedding.weight",
            kernel("embeddings.patch_embedding.weight"),
            "patch_embedding.weight",
            "patch_embedding.weight",
        ),
        _row(
            "w",
            "patch_bias",
            megatron="patch_embedding.bias",
            siglip="embeddings.patch_embedding.bias",
            native="patch_embedding.bias",
            hub="patch_embedding.bias",
        ),
        _tower(
            "s w",
            "position_embedding",
            "embeddings.position_embedding.weight",
            "positional_embedding",
            "positional_embedding",
        ),
        _row("w", "class_token", megatron="class_token", clip="embeddings.class_embedding"),
        # The misspelling is CLIP's.
        *(
            _row("w", "pre_norm", megatron=f"pre_norm.{suffix}", clip=f"pre_layrnorm.{suffix}")
            for suffix in ("weight", "bias")
        ),
        *(
            _row("w", "post_norm", megatron=f"post_norm.{suffix}", siglip=f"post_layernorm.{suffix}")
            for suffix in ("weight", "bias")
        ),
    ),
)


def _connector(shapes: str, megatron: str | Cell, native: str | Cell, hub: str | Cell) -> Row:
    return _row(shapes, "attention_pooling", megatron=megatron, native=native, hub=hub)


CONNECTOR = Section(
    "connector",
    {"megatron": "connector.", "native": "model.multi_modal_projector.", "hub": "model.vision_backbone."},
    (
        *(
            _connector(shapes.format(" t" if suffix == "weight" else ""), *names)
            for suffix in ("weight", "bias")
            for shapes, *names in (
                (
                    "c{0}",
                    f"pooling.linear_q.{suffix}",
                    f"image_pooling_2d.q_proj.{suffix}",
                    f"image_pooling_2d.wq.{suffix}",
                ),
                (
                    "c{0}, c{0}",
                    interleaved(f"pooling.linear_kv.{suffix}"),
                    each(f"image_pooling_2d.k_proj.{suffix}", f"image_pooling_2d.v_proj.{suffix}"),
                    each(f"image_pooling_2d.wk.{suffix}", f"image_pooling_2d.wv.{suffix}"),
                ),
                (
                    "c c" if suffix == "weight" else "c",
                    f"pooling.linear_proj.{suffix}",
                    f"image_pooling_2d.o_proj.{suffix}",
                    f"image_pooling_2d.wo.{suffix}",
                ),
            )
        ),
        _connector(
            "p c, p c",
            joined("projector.linear_fc1.weight"),
            each("image_projector.gate_proj.weight", "image_projector.up_proj.weight"),
            each("image_projector.w1.weight", "image_projector.w3.weight"),
        ),
        _connector(
            "d p", "projector.linear_fc2.weight", "image_projector.down_proj.weight", "image_projector.w2.weight"
        ),
    ),
)

TABLE = (LANGUAGE, LANGUAGE_LAYER, HEAD, VISION, VISION_LAYER, CONNECTOR)


#: Tensors of a format that have no place in our model, with the reason.
DROPPED: dict[str, tuple[tuple[str, str], ...]] = {
    "qwen": ((r".*\.rotary_emb\.inv_freq", "computed from rope_theta"),),
    "siglip": (
        (r"text_model\..*|logit_scale|logit_bias", "the text tower is not used"),
        (r"head\..*", "the pooling head is not used"),
        (r"post_layernorm\..*", "the connector reads layers before it"),
        (r"encoder\.layers\.\d+\..*", "a layer after the last one that the connector reads"),
        (r"embeddings\.position_ids", "a count from 0"),
    ),
    "clip": (
        (r"text_model\..*|logit_scale|text_projection\..*", "the text tower is not used"),
        (r"visual_projection\..*|post_layernorm\..*", "it concerns the class token only"),
        (r"encoder\.layers\.\d+\..*", "a layer after the last one that the connector reads"),
        (r"embeddings\.position_ids", "a count from 0"),
    ),
    "native": (),
    "hub": (),
}
