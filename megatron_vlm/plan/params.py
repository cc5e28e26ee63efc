"""Parameters of every rank, and the buffers that data parallelism and the optimizer make of them. Integers, no torch.

The lists are those of the built model, name by name and in its order (the order decides where the buffers are padded).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.schema import ParallelConfig
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.split import even_counts

#: Numbers at whose multiples Megatron's gradient buffer lets a parameter begin.
PARAMETER_ALIGNMENT = 64
#: A bucket ends at a multiple of this and of the ranks that share it.
BUCKET_ALIGNMENT = 128
#: A bucket's numbers (Megatron's defaults): more would start late, fewer would leave the network idle.
BUCKET_NUMBERS, BUCKET_NUMBERS_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True)
class Parameter:
    """One parameter as a rank holds it."""

    name: str
    shape: tuple[int, ...]
    component: str
    """One of config.architecture.COMPONENTS."""
    own_bucket: bool = False
    """A tied table with a copy on another pipeline stage."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Stage:
    """What one pipeline chunk is made of."""

    first: bool
    """Has vision tower, connector and embedding."""
    last: bool
    """Has the final norm and the head."""
    layers: int
    """Decoder layers."""


def stages(arch: Architecture, layout: Layout, pipeline_layers: Sequence[int] = ()) -> list[list[Stage]]:
    """The chunks of every pipeline stage: `[stage][virtual stage]`.

    pipeline_layers: `parallel.pipeline_layers`, () = even. Raises ValueError where it does not fit.
    """
    counts = tuple(pipeline_layers) or even_counts(arch.language.layers, layout.chunks)
    if len(counts) != layout.chunks or sum(counts) != arch.language.layers:
        raise ValueError(
            f"parallel.pipeline_layers={list(counts)} has {len(counts)} entries with {sum(counts)} layers; needed: "
            f"{layout.chunks} entries with {arch.language.layers}."
        )
    chunks = [Stage(index == 0, index == layout.chunks - 1, count) for index, count in enumerate(counts)]
    return [chunks[stage :: layout.pipeline] for stage in range(layout.pipeline)]


@lru_cache(maxsize=256)
def of_stage(arch: Architecture, stage: Stage, tensor: int, encoder: int = 1) -> tuple[Parameter, ...]:
    """The parameters of one chunk on a rank, in the model's order.

    tensor, encoder: ranks that share each weight of the decoder, and of tower and connector.
    """
    found: list[Parameter] = []
    if stage.first:
        found += [Parameter(f"vision.{name}", shape, "vision") for name, shape in _vision(arch, encoder)]
        found += [Parameter(f"connector.{name}", shape, "connector") for name, shape in _connector(arch, encoder)]
    return (*found, *_language(arch, stage, tensor))


def bucket_numbers(parallel: ParallelConfig, data: int, weights: int, *, cuda: bool) -> int | None:
    """Numbers at which a gradient bucket of the first chunk is full; None = reductions do not overlap: one bucket.

    data, weights: data-parallel ranks, and ranks that hold the same weights (data x context).
    """
    asked = parallel.overlap_grad_reduce
    if weights == 1 or not (cuda if asked is None else asked):
        return None
    return parallel.bucket_size or max(BUCKET_NUMBERS, BUCKET_NUMBERS_PER_RANK * data)


Named = Iterator[tuple[str, tuple[int, ...]]]


def _norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _linear(name: str, width_out: int, width_in: int, bias: bool = True) -> Named:
    yield f"{name}.weight", (width_out, width_in)
    if bias:
        yield f"{name}.bias", (width_out,)


def _column(name: str, width_out: int, width_in: int, shards: int, bias: bool = True) -> Named:
    """A linear layer whose rows are shared by `shards` ranks."""
    yield from _linear(name, width_out // shards, width_in, bias)


def _row(name: str, width_out: int, width_in: int, shards: int, bias: bool = True) -> Named:
    """A linear layer whose columns are shared by `shards` ranks."""
    yield from _linear(name, width_out, width_in // shards, bias)


def _vision(arch: Architecture, shards: int) -> Named:
    vision, taps = arch.vision, arch.connector.taps
    yield "position_embedding", (vision.patches + vision.class_token, vision.width)
    if vision.class_token:
        yield "class_token", (vision.width,)
    yield from _linear("patch_embedding", vision.width, vision.patch_values, vision.patch_bias)
    if vision.pre_norm:
        yield from _norm("pre_norm", vision.width)
    for block, count in enumerate(vision_blocks(arch)):
        for layer in range(count):
            yield from _vision_layer(f"blocks.{block}.layers.{layer}", vision.width, vision.mlp, shards)
        if not taps and vision.post_norm:
            yield from _norm(f"blocks.{block}.final_layernorm", vision.width)


def vision_blocks(arch: Architecture) -> list[int]:
    """Layers of each block of the tower, which is cut after every tap."""
    ends = sorted({tap + 1 for tap in arch.connector.taps}) or [arch.vision.layers]
    return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _vision_layer(name: str, width: int, mlp: int, shards: int) -> Named:
    yield from _norm(f"{name}.input_layernorm", width)
    yield from _row(f"{name}.self_attention.linear_proj", width, width, shards)
    yield from _column(f"{name}.self_attention.linear_qkv", 3 * width, width, shards)
    yield from _norm(f"{name}.pre_mlp_layernorm", width)
    yield from _column(f"{name}.mlp.linear_fc1", mlp, width, shards)
    yield from _row(f"{name}.mlp.linear_fc2", width, mlp, shards)


def _connector(arch: Architecture, shards: int) -> Named:
    connector, hidden, inside = arch.connector, arch.language.hidden, arch.feature_width
    width = connector.width
    if connector.kind == "attention_pooling":
        yield from _column("pooling.linear_q", width, inside, shards)
        yield from _column("pooling.linear_kv", 2 * width, inside, shards)
        yield from _row("pooling.linear_proj", width, width, shards)
        yield from _column("projector.linear_fc1", 2 * connector.mlp, width, shards, bias=False)
        yield from _row("projector.linear_fc2", hidden, connector.mlp, shards, bias=False)
    elif connector.kind == "mlp":
        yield from _column("projector.linear_fc1", connector.mlp, inside, shards)
        yield from _row("projector.linear_fc2", hidden, connector.mlp, shards)
    elif connector.kind == "linear":
        yield from _column("projector", hidden, inside, shards)
    else:
        yield "pooling.queries", (connector.queries, width)
        yield from _column("pooling.projection", width, inside, shards)
        for layer in range(connector.layers):
            yield from _resampler_layer(f"pooling.block.layers.{layer}", width, shards)
        yield from _norm("pooling.block.final_layernorm", width)
        yield from _column("projector", hidden, width, shards)


def _resampler_layer(name: str, width: int, shards: int) -> Named:
    yield from _norm(f"{name}.input_layernorm", width)
    yield from _row(f"{name}.self_attention.linear_proj", width, width, shards)
    yield from _column(f"{name}.self_attention.linear_qkv", 3 * width, width, shards)
    yield from _norm(f"{name}.pre_cross_attn_layernorm", width)
    yield from _row(f"{name}.cross_attention.linear_proj", width, width, shards)
    yield from _column(f"{name}.cross_attention.linear_q", width, width, shards)
    yield from _column(f"{name}.cross_attention.linear_kv", 2 * width, width, shards)
    yield from _norm(f"{name}.pre_mlp_layernorm", width)
    yield from _column(f"{name}.mlp.linear_fc1", 4 * width, width, shards)
    yield from _row(f"{name}.mlp.linear_fc2", width, 4 * width, shards)


def _language(arch: Architecture, stage: Stage, tensor: int) -> Iterator[Parameter]:
    language = arch.language
    table = (language.vocab_size // tensor, language.hidden)
    copied = language.tied_head and stage.first != stage.last
    if stage.first:
        yield Parameter("language.embedding.new_rows", (language.new_rows, language.hidden), "connector")
        yield Parameter("language.embedding.word_embeddings.weight", table, "base_embeddings", own_bucket=copied)
    for layer in range(stage.layers):
        for name, shape in _decoder_layer(arch, tensor):
            yield Parameter(f"language.decoder.layers.{layer}.{name}", shape, "language")
    if stage.last:
        yield Parameter("language.decoder.final_layernorm.weight", (language.hidden,), "language")
        if not language.tied_head:
            yield Parameter("language.head.weight", table, "language")
        elif not stage.first:
            yield Parameter("language.tied_head.weight", table, "base_embeddings", own_bucket=True)


def _decoder_layer(arch: Architecture, tensor: int) -> Named:
    language = arch.language
    hidden, size = language.hidden, language.head_dim
    query, key = language.heads * size, language.kv_heads * size
    yield "input_layernorm.weight", (hidden,)
    yield "self_attention.linear_proj.weight", (hidden, query // tensor)
    yield from _linear("self_attention.linear_qkv", (query + 2 * key) // tensor, hidden, language.qkv_bias)
    if language.qk_norm:
        yield "self_attention.q_layernorm.weight", (size,)
        yield "self_attention.k_layernorm.weight", (size,)
    yield "pre_mlp_layernorm.weight", (hidden,)
    yield "mlp.linear_fc1.weight", (2 * language.mlp // tensor, hidden)
    yield "mlp.linear_fc2.weight", (hidden, language.mlp // tensor)


@dataclass(frozen=True)
class Buffers:
    """What one chunk's parameters become on a rank, in numbers (not bytes).

    trained and frozen: parameters. buffer: the flat buffer of the trained ones, padding included; there is one of
    parameters and one of gradients. shard: numbers whose optimizer state this rank holds, in `pieces` parameters.
    """

    trained: int
    frozen: int
    buffer: int
    shard: int
    pieces: int

    @property
    def padding(self) -> int:
        return self.buffer - self.trained


@lru_cache(maxsize=1024)
def buffers(
    parameters: tuple[Parameter, ...], frozen: tuple[str, ...], ranks: int, rank: int, bucket: int | None = None
) -> Buffers:
    """The buffers of a chunk on data-parallel rank `rank` of `ranks` (context-parallel ranks among them).

    bucket: as in `bucket_sizes`.
    """
    shard = pieces = end = 0
    for start, end, places in _buckets(parameters, frozen, ranks, bucket):
        size = (end - start) // ranks
        low, high = start + rank * size, start + (rank + 1) * size
        for begin, stop in places:
            held = min(stop, high) - max(begin, low)
            shard += max(0, held)
            pieces += held > 0
    trained = sum(parameter.numel for parameter in parameters if parameter.component not in frozen)
    whole = sum(parameter.numel for parameter in parameters)
    return Buffers(trained, whole - trained, end, shard, pieces)


@lru_cache(maxsize=1024)
def bucket_sizes(
    parameters: tuple[Parameter, ...], frozen: tuple[str, ...], ranks: int, bucket: int | None = None
) -> tuple[int, ...]:
    """Numbers in each part of the buffer that is reduced and gathered by itself.

    bucket: numbers at which one is full, None = never.
    """
    return tuple(end - start for start, end, _ in _buckets(parameters, frozen, ranks, bucket))


@lru_cache(maxsize=1024)
def reduced_over_tensor(
    parameters: tuple[Parameter, ...], frozen: tuple[str, ...], sequence: bool, encoder: int
) -> tuple[int, int]:
    """Numbers whose gradients Megatron averages over tensor-parallel ranks (tower and connector, if `encoder`, the
    ranks that share their weights, is 1: whole on each), and numbers whose gradients it adds up (norms: of heads, and
    with sequence parallelism all of the decoder's)."""
    trained = [parameter for parameter in parameters if parameter.component not in frozen]
    whole = ("vision.", "connector.") if encoder == 1 else ()
    averaged = sum(each.numel for each in trained if each.name.startswith(whole))
    summed = sum(each.numel for each in trained if _summed(each.name, sequence))
    return averaged, summed


def _summed(name: str, sequence: bool) -> bool:
    if not name.startswith("language.decoder"):
        return False
    return "q_layernorm" in name or "k_layernorm" in name or (sequence and "layernorm" in name)


def _buckets(
    parameters: Sequence[Parameter], frozen: Collection[str], ranks: int, bucket: int | None
) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Beginning and end of each bucket in the buffer, and of the parameters in it."""
    multiple = math.lcm(ranks, BUCKET_ALIGNMENT)
    at = start = 0
    places: list[tuple[int, int]] = []
    for parameter in reversed(parameters):  # the order of backward
        if parameter.component in frozen:
            continue
        at = _up(at, PARAMETER_ALIGNMENT)
        if parameter.own_bucket and places:
            yield start, _up(at, multiple), places
            at = start = _up(at, multiple)
            places = []
        places.append((at, at + parameter.numel))
        at += parameter.numel
        if parameter.own_bucket or (bucket is not None and at - start >= bucket):
            yield start, _up(at, multiple), places
            at = start = _up(at, multiple)
            places = []
    if places:
        yield start, _up(at, multiple), places


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
