"""Every collective of one training step on one rank: which group, how many, how many bytes.

`tools/rehearse.py` runs a step and counts them; the two lists are the same. Bytes: of one call, the larger of what a
rank gives and what it gets (the whole tensor of an all-gather or reduce-scatter). Groups of one rank talk to nobody and
are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vlm.config import presets
from megatron_vlm.config.architecture import COMPONENTS
from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.parallel.split import even_counts
from megatron_vlm.plan import params
from megatron_vlm.plan.encoder_collectives import sharded
from megatron_vlm.plan.layers import FLOAT, Load, Settings

#: Numbers that a step adds up over data-parallel ranks before it begins: weight sum and train.step's Work, float64.
MEASURED_BYTES = 7 * 8
#: Most failed samples of a rank, and a number that tells whether all planned the same rows, twice: int64.
FAULTS_BYTES = 3 * 8


@dataclass(frozen=True)
class Collective:
    """`count` equal calls in a step."""

    kind: str
    """all_reduce, all_gather, reduce_scatter, all_to_all, broadcast or send (a receive is its partner's send)."""
    group: str
    """tensor, heads and keys (context ranks that deal heads, that gather keys), crops (those that share a
    micro-batch's), pipeline, embedding, data, weights (data x context) or world."""
    size: int
    count: int
    what: str

    @property
    def bytes(self) -> int:
        return self.size * self.count


def group_shape(group: str, layout: Layout) -> tuple[int, int]:
    """Ranks of a group, and the distance between their numbers."""
    t, c, d, p = layout.tensor, layout.context, layout.data, layout.pipeline
    return {
        "tensor": (t, 1),
        "heads": (layout.head_ranks, t),
        "keys": (layout.key_ranks, t * layout.head_ranks),
        "crops": (layout.crop_ranks, layout.vision_tensor),
        "data": (d, t * c),
        "weights": (d * c, t),
        "pipeline": (p, t * c * d),
        "embedding": (2 if p > 1 else 1, t * c * d * (p - 1)),
        "world": (layout.world, 1),
    }[group]


def of_rank(
    config: Config, layout: Layout, rank: int, settings: Settings, load: Load, sources: int = 1
) -> list[Collective]:
    """The collectives of a step on `rank`. sources: data sets of the mixture, whose losses are reported."""
    stage_index = layout.coordinates(rank).pipeline
    arch = presets.architecture(config.model)
    chunks = params.stages(arch, layout, config.parallel.pipeline_layers)[stage_index]
    micro_batches = config.train.global_batch // (layout.data * config.train.micro_batch)
    found = [item for chunk in chunks for item in _chunk(config, layout, chunk, settings, load, micro_batches)]
    found += _pipeline(config, layout, stage_index, settings, load, micro_batches)
    found += _step(config, layout, chunks, sources, settings.cuda)
    return [item for item in found if item.count and item.size and group_shape(item.group, layout)[0] > 1]


def _chunk(
    config: Config, layout: Layout, chunk: params.Stage, settings: Settings, load: Load, times: int
) -> Iterator[Collective]:
    """Forward and backward of one chunk, `times` micro-batches."""
    arch, e = presets.architecture(config.model), settings.element
    frozen, hidden = frozenset(config.model.freeze), arch.language.hidden
    row = load.rows * load.length * hidden * e
    part = load.rows * load.part * hidden * e
    if chunk.first:
        if layout.vision_tensor > 1:
            for talk in sharded(arch, frozen, load, recomputed=config.train.recompute == "full"):
                yield Collective(talk.kind, "tensor", talk.numbers * e, talk.count * times, talk.what)
        vectors = max(1, arch.connector.queries) * layout.crop_ranks * load.most_windows * hidden * e
        if load.crops:
            yield Collective("all_gather", "crops", vectors, times, "image features")
            trains = not {"vision", "connector"} <= frozen
            yield Collective("reduce_scatter", "crops", vectors, times * trains, "image features, backward")
        yield Collective("all_reduce", "tensor", row, times, "embedding")
        if settings.sequence and _wants_gradient(frozen):
            yield Collective("all_gather", "tensor", part, times, "sequence, backward of the cut")
    yield from _layers(config, layout, chunk, settings, load, times)
    if chunk.last:
        yield from _head(config, settings, load, times)


def _wants_gradient(frozen: frozenset[str]) -> bool:
    """Something before the decoder trains."""
    return not {"vision", "connector", "base_embeddings"} <= frozen


def _layers(
    config: Config, layout: Layout, chunk: params.Stage, settings: Settings, load: Load, times: int
) -> Iterator[Collective]:
    arch, e, recompute = presets.architecture(config.model), settings.element, config.train.recompute
    language, trains = arch.language, "language" not in config.model.freeze
    calls = chunk.layers * times
    again = calls * (recompute == "full")
    part = load.rows * load.part * language.hidden * e
    if settings.sequence:
        gathers = 2 * calls + 2 * again + 2 * calls * trains + 2 * calls
        yield Collective("all_gather", "tensor", part, gathers, "sequence")
        yield Collective("reduce_scatter", "tensor", part, 2 * calls + 2 * again + 2 * calls, "sequence")
    else:
        yield Collective("all_reduce", "tensor", part, 2 * calls + 2 * again + 2 * calls, "layer outputs and gradients")
    if language.kv_heads < layout.tensor:
        width = (language.heads + 2 * language.kv_heads) * language.head_dim
        size = load.rows * load.part * width * e
        yield Collective("all_gather", "tensor", size, calls + again, "keys and values of shared heads")
        yield Collective("reduce_scatter", "tensor", size, calls, "keys and values of shared heads, backward")
    heads = language.heads // layout.tensor
    kv_heads = max(1, language.kv_heads // layout.tensor)
    head = load.rows * language.head_dim * e
    line = sum(even_counts(load.length, layout.context)[: layout.head_ranks])
    spread = math.lcm(kv_heads, layout.head_ranks)
    exchanges = 2 * calls + calls * (recompute != "none")
    for what, size in (("queries and outputs", heads), ("keys and values", spread)):
        most = max(line * size // layout.head_ranks, load.part * size) * head
        yield Collective("all_to_all", "heads", most, 2 * exchanges, what)
    # Lines of ranks hold equal numbers of tokens where the row divides by the context ranks, as the rules demand.
    gathered = layout.key_ranks * line * spread // layout.head_ranks * head
    again = calls * (recompute != "none")
    if settings.ring:
        turns, pair = layout.key_ranks, 2 * gathered // layout.key_ranks
        passed = (turns - 1) * (2 * calls + again)
        yield Collective("send", "keys", pair, passed, "keys and values, in turns")
        yield Collective("send", "keys", pair // e * FLOAT, turns * calls, "gradients with keys and values")
        return
    yield Collective("all_gather", "keys", gathered, 2 * (calls + again), "keys and values")
    yield Collective("reduce_scatter", "keys", gathered, 2 * calls, "keys and values, backward")


def _head(config: Config, settings: Settings, load: Load, times: int) -> Iterator[Collective]:
    arch, e = presets.architecture(config.model), settings.element
    part = load.rows * load.part * arch.language.hidden * e
    if settings.sequence:
        yield Collective("all_gather", "tensor", part, times, "sequence, before the head")
        yield Collective("reduce_scatter", "tensor", part, times, "sequence, before the head, backward")
    else:
        chosen = load.loss_tokens * arch.language.hidden * e
        yield Collective("all_reduce", "tensor", chosen, times, "loss tokens, backward")
    chunk = min(settings.logit_chunk, load.loss_tokens)
    whole, rest = divmod(load.loss_tokens, settings.logit_chunk)
    for size, count in ((chunk, whole or 1), (rest if whole else 0, 1)):
        yield Collective("all_reduce", "tensor", size * FLOAT, times * count, "largest logits")
        yield Collective("all_reduce", "tensor", 2 * size * FLOAT, times * count, "sums over the vocabulary")


def _pipeline(
    config: Config, layout: Layout, stage: int, settings: Settings, load: Load, times: int
) -> Iterator[Collective]:
    arch = presets.architecture(config.model)
    shards = layout.tensor if settings.sequence else 1
    size = load.rows * load.part // shards * arch.language.hidden * settings.element
    last = layout.pipeline - 1
    virtual = layout.virtual_pipeline
    # With virtual stages the last stage also sends to the first, between its chunks.
    forward = virtual if stage < last else virtual - 1
    backward = virtual if stage > 0 else virtual - 1
    yield Collective("send", "pipeline", size, (forward + backward) * times, "hidden states and gradients")


def _step(config: Config, layout: Layout, chunks: list[params.Stage], sources: int, cuda: bool) -> Iterator[Collective]:
    """Once a step: numbers of the loss, reductions of gradients, gathering of weights."""
    arch = presets.architecture(config.model)
    element = 4 if config.train.precision == "float32" else 2
    report = (1 + 2 * sources) * 8
    if config.data.bad_samples == "skip":
        yield Collective("all_reduce", "world", FAULTS_BYTES, 1, "samples that could not be loaded")
    yield Collective("all_reduce", "data", MEASURED_BYTES, 1, "loss weights and work of the step")
    yield Collective("all_reduce", "weights", report, 1, "losses")
    yield Collective("all_reduce", "pipeline", report, 1, "losses")
    # float64; the base embeddings have a norm where they train.
    norms = 8 * (len(COMPONENTS) - ("base_embeddings" in config.model.freeze))
    yield Collective("all_reduce", "world", norms, 1, "gradient norms")
    yield Collective("broadcast", "world", norms + 8, 1, "loss and norms, to agree on them")
    averaged = summed = 0
    for chunk in chunks:
        parameters = params.of_stage(arch, chunk, layout.tensor, layout.vision_tensor)
        weights = layout.data * layout.context
        bucket = params.bucket_numbers(config.parallel, layout.data, weights, cuda=cuda) if chunk.first else None
        sizes = params.bucket_sizes(parameters, config.model.freeze, weights, bucket)
        for size in sizes:
            yield Collective("reduce_scatter", "weights", size * FLOAT, 1, "gradients")
            yield Collective("all_gather", "weights", size * element, 1, "weights")
        both = params.reduced_over_tensor(
            parameters,
            config.model.freeze,
            config.parallel.sequence and layout.tensor > 1,
            layout.vision_tensor,
        )
        averaged, summed = averaged + both[0], summed + both[1]
        if chunk.first != chunk.last and arch.language.tied_head and "base_embeddings" not in config.model.freeze:
            if chunk.first or chunk.last:
                table = arch.language.vocab_size // layout.tensor * arch.language.hidden
                yield Collective("all_reduce", "embedding", table * FLOAT, 1, "gradient of the tied table")
    yield Collective("all_reduce", "tensor", averaged * FLOAT, 1, "gradients of tower and connector")
    yield Collective("all_reduce", "tensor", summed * FLOAT, 1, "gradients of norms")
