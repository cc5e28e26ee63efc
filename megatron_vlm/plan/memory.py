"""Memory of a rank: weights, gradients, optimizer state, activations, buffers, and the most of them at once. Bytes.

Static memory is exact (tests compare it with built models). Activations follow the operators one by one (parts.py), as
torch's allocator is asked for them; what the allocator wastes, and the CUDA context, are `hardware.RESERVED`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_vlm.config import presets
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.schema import Config
from megatron_vlm.parallel.layout import Layout
from megatron_vlm.plan import params, tape
from megatron_vlm.plan.layers import FLOAT, INDEX, Load, Settings
from megatron_vlm.plan.parts import Parts
from megatron_vlm.plan.tape import Profile

#: Bytes of a number. FP8 weights are cast from bf16 ones step by step; what is kept of activations counts as bf16.
ELEMENT = {"float32": 4, "bf16": 2, "fp8": 2}
#: Rows whose attention plans the model keeps, and the float32 numbers of masks it keeps per token of them.
PLANNED_ROWS, MASK_NUMBERS = 16, 512


@dataclass(frozen=True)
class Static:
    """What a rank holds from start to end."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Segment:
    """Equal parts that run one after the other."""

    name: str
    """vision, connector, decoder or head."""
    profile: Profile
    count: int = 1


@dataclass(frozen=True)
class Activations:
    """Of one micro-batch on one chunk."""

    kept: dict[str, int]
    """Bytes between forward and backward, by part."""
    peak: int
    """Most bytes while forward and backward run."""
    forward_peak: int

    @property
    def total(self) -> int:
        return sum(self.kept.values())


@dataclass(frozen=True)
class Memory:
    """A rank's memory."""

    static: Static
    activations: dict[str, int]
    """Kept between forward and backward, by part, of all micro-batches in flight."""
    in_flight: int
    """Micro-batches (of one chunk) whose activations are kept at once."""
    working: int
    """Most bytes beyond those that forward, backward, reductions or the optimizer need while they run."""
    buffers: int
    """Batches, masks, shared buffers."""

    @property
    def peak(self) -> int:
        """Most bytes at once."""
        return self.static.total + self.buffers + sum(self.activations.values()) + self.working


def static(config: Config, layout: Layout, rank: int, *, cuda: bool) -> Static:
    """What `rank` holds."""
    model, chosen, element = config.model, config.parallel.pipeline_layers, ELEMENT[config.train.precision]
    bucket = params.bucket_numbers(config.parallel, layout.data, layout.data * layout.context, cuda=cuda)
    return _static(presets.architecture(model), layout, chosen, model.freeze, element, rank, bucket)


@lru_cache(maxsize=1024)
def _static(
    arch: Architecture,
    layout: Layout,
    chosen: tuple[int, ...],
    freeze: tuple[str, ...],
    element: int,
    rank: int,
    bucket: int | None,
) -> Static:
    at = layout.coordinates(rank)
    chunks = params.stages(arch, layout, chosen)[at.pipeline]
    parameters = gradients = optimizer = 0
    for chunk in chunks:
        buffer = params.buffers(
            params.of_stage(arch, chunk, layout.tensor, layout.vision_tensor),
            freeze,
            layout.data * layout.context,
            at.context + layout.context * at.data,
            bucket if chunk.first else None,
        )
        parameters += (buffer.buffer + buffer.frozen) * element
        gradients += buffer.buffer * FLOAT
        # Two moments, a float32 copy of weights that are not float32 themselves, and a step count per tensor.
        moments = 2 * FLOAT + (FLOAT if element != FLOAT else 0)
        optimizer += buffer.shard * moments + buffer.pieces * FLOAT
    return Static(parameters, gradients, optimizer)


def of_stage(config: Config, layout: Layout, stage: int, load: Load, *, cuda: bool) -> Memory:
    """The memory of a rank of pipeline stage `stage`, the one with the most crops."""
    arch = presets.architecture(config.model)
    chunks = params.stages(arch, layout, config.parallel.pipeline_layers)[stage]
    parts = Parts(arch, settings(config, layout, cuda=cuda), load, frozenset(config.model.freeze))
    rank = next(r for r in range(layout.world) if layout.coordinates(r).pipeline == stage)
    held = static(config, layout, rank, cuda=cuda)
    found = [
        activations(segments(parts, chunk, config.train.recompute), carried=tied_gradient(config, chunk, layout))
        for chunk in chunks
    ]
    flying = in_flight(config, layout, stage)
    kept: dict[str, int] = {}
    for number in range(flying):
        # Interleaved schedules send `pipeline` micro-batches through a chunk before they turn to the next one.
        for name, size in found[number // layout.pipeline % len(found)].kept.items():
            kept[name] = kept.get(name, 0) + size
    working = max(each.peak - each.total for each in found)
    after = _after_backward(config, layout, chunks)
    return Memory(held, kept, flying, max(working, after - sum(kept.values())), _buffers(config, layout, parts, flying))


def in_flight(config: Config, layout: Layout, stage: int) -> int:
    """Micro-batches of one chunk that have run forward and not yet backward, at most."""
    micro_batches = config.train.global_batch // (layout.data * config.train.micro_batch)
    ahead = layout.pipeline - stage - 1
    if layout.virtual_pipeline > 1:
        ahead = 2 * ahead + (layout.virtual_pipeline - 1) * layout.pipeline
    return min(ahead + 1, micro_batches * layout.virtual_pipeline)


def _after_backward(config: Config, layout: Layout, chunks: Sequence[params.Stage]) -> int:
    """Most bytes that reductions of whole gradients allocate: activations are gone by then."""
    arch = presets.architecture(config.model)
    joined = 0
    if layout.tensor > 1:  # Megatron copies what it averages over tensor-parallel ranks into one tensor
        joined = FLOAT * sum(
            params.reduced_over_tensor(
                params.of_stage(arch, chunk, layout.tensor, layout.vision_tensor),
                config.model.freeze,
                False,
                layout.vision_tensor,
            )[0]
            for chunk in chunks
        )
    return joined  # the fused AdamW allocates nothing


def _buffers(config: Config, layout: Layout, parts: Parts, flying: int) -> int:
    """Batches in flight, attention masks kept across layers, the tensor that sequence parallelism gathers into."""
    load, arch = parts.load, parts.arch
    tokens = load.rows * load.length
    per_token = 4 * INDEX + 3 * FLOAT + 1 + 5 * INDEX  # the batch, and the marks of its tokens
    crop = arch.vision.patches * arch.vision.patch_values
    batch = tokens * per_token + load.crops * crop + load.all_windows * load.slots * INDEX
    angles = load.rows * load.part * arch.language.head_dim * parts.e  # cosines and sines
    gathered = load.rows * load.part * arch.language.hidden * parts.e if parts.settings.sequence else 0
    received = 2 * parts.part_size if layout.pipeline > 1 else 0
    return flying * (batch + angles + received) + masks(load, PLANNED_ROWS) + gathered


def masks(load: Load, rows: int) -> int:
    """Bytes of the attention masks that the model keeps for `rows` rows, at most."""
    return rows * min(MASK_NUMBERS * load.length, load.masked // load.rows) * FLOAT


def settings(config: Config, layout: Layout, *, cuda: bool) -> Settings:
    """What decides about activations, from the settings."""
    return Settings(
        element=ELEMENT[config.train.precision],
        tensor=layout.tensor,
        vision_tensor=layout.vision_tensor,
        sequence=config.parallel.sequence and layout.tensor > 1,
        context=layout.context,
        head_ranks=layout.head_ranks,
        ring=config.parallel.context_method == "ring" and layout.key_ranks > 1,
        dropout=config.train.residual_dropout > 0 or config.train.response_dropout > 0,
        selective=config.train.recompute == "selective",
        full=config.train.recompute == "full",
        cuda=cuda,
        logit_chunk=config.train.logit_chunk,
    )


@lru_cache(maxsize=4096)
def _profile(parts: Parts, name: str, size: int, grad: bool, enabled: bool, again: bool) -> Profile:
    build = getattr(parts, name)
    return tape.recomputed(build, size, grad) if again else tape.profile(build, size, grad, enabled=enabled)


@lru_cache(maxsize=4096)
def segments(parts: Parts, stage: params.Stage, recompute: str) -> tuple[Segment, ...]:
    """The parts of a chunk in the order of forward."""
    arch, full = parts.arch, recompute == "full"
    found: list[Segment] = []

    def add(name: str, build: str, *, enabled: bool = True, again: bool = False, count: int = 1) -> None:
        while count:
            before = found[-1].profile if found else None
            size, grad = (before.result, before.trains) if before else (0, False)
            if not found and not stage.first:
                size, grad = parts.part_size, True
            made = _profile(parts, build, size, grad, enabled, again and enabled)
            # The first layer's input may want no gradient; those of the others do.
            equal = 1 if made.trains and not made.gradient else count
            found.append(Segment(name, made, equal))
            count -= equal

    if stage.first:
        trains = "vision" not in parts.frozen
        if parts.load.crops:
            add("vision", "vision_embedding", enabled=trains)
            add("vision", "vision_layer", enabled=trains, again=full, count=sum(params.vision_blocks(arch)))
            if not arch.connector.taps and arch.vision.post_norm:
                add("vision", "vision_norm", enabled=trains)
            add("vision", "vision_output", enabled=trains)
            add("connector", "connector")
            add("connector", "gather")
        add("decoder", "embedding")
    add("decoder", "decoder_layer", again=full, count=stage.layers)
    if stage.last:
        add("decoder", "final_norm")
        add("head", "head")
    return tuple(found)


def activations(found: Sequence[Segment], *, carried: int = 0) -> Activations:
    """Kept and peak bytes of segments that run forward, then backward.

    carried: bytes of a gradient that waits from the last segment's backward to the first's (a tied table).
    """
    kept: dict[str, int] = {}
    unrolled = list(_unroll(found))
    live = peak = 0
    before: list[int] = []
    for index, (name, profile) in enumerate(unrolled):
        before.append(live)
        peak = max(peak, live + profile.forward_peak)
        previous = unrolled[index - 1][1] if index else None
        held = profile.keeps_input or (previous is not None and previous.keeps_output)
        input_size = previous.output if previous else 0
        if not held:
            live -= input_size
            before[-1] = live
        elif previous is not None:
            kept[name] = kept.get(name, 0) + input_size
        live += profile.kept + profile.output
        kept[name] = kept.get(name, 0) + profile.kept
    forward_peak = peak
    for index in range(len(unrolled) - 1, -1, -1):
        profile = unrolled[index][1]
        if profile.trains:
            waits = carried if index < len(unrolled) - 1 else 0
            peak = max(peak, before[index] + profile.backward_peak + waits)
    return Activations(kept, peak, forward_peak)


def _unroll(found: Sequence[Segment]) -> Iterator[tuple[str, Profile]]:
    for segment in found:
        for _ in range(segment.count):
            yield segment.name, segment.profile


def tied_gradient(config: Config, stage: params.Stage, layout: Layout) -> int:
    """Bytes of the tied table's gradient that waits for the embedding's."""
    arch = presets.architecture(config.model)
    both = stage.first and stage.last and arch.language.tied_head
    if not both or "base_embeddings" in config.model.freeze:
        return 0
    return arch.language.vocab_size // layout.tensor * arch.language.hidden * ELEMENT[config.train.precision]
