"""What the ranks that share the weights of tower and connector (parallel.vision=tensor) tell each other.

As Megatron's sharded layers do it: the second of a pair of layers adds up its output in forward, the first the gradient
of its input in backward; a layer alone gathers its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.plan.layers import Load


@dataclass(frozen=True)
class Talk:
    """`count` calls over `numbers` numbers each."""

    kind: str
    numbers: int
    count: int
    what: str


def sharded(arch: Architecture, frozen: frozenset[str], load: Load, *, recomputed: bool) -> Iterator[Talk]:
    """Of one micro-batch on one rank. recomputed: layers run forward again in backward."""
    if load.crops:
        yield from _vision(arch, "vision" not in frozen, load, recomputed)
    if load.windows:
        yield from _connector(arch, frozen, load, recomputed)


def _vision(arch: Architecture, trains: bool, load: Load, recomputed: bool) -> Iterator[Talk]:
    vision = arch.vision
    numbers = load.crops * (vision.patches + vision.class_token) * vision.width
    layers = arch.tower_depth
    runs = 1 + (recomputed and trains)
    yield Talk("all_reduce", numbers, 2 * layers * runs, "tower's layers")
    yield Talk("all_reduce", numbers, 2 * layers * trains, "tower's layers, backward")


def _connector(arch: Architecture, frozen: frozenset[str], load: Load, recomputed: bool) -> Iterator[Talk]:
    connector, hidden, inside, n = arch.connector, arch.language.hidden, arch.feature_width, load.windows
    trains = "connector" not in frozen
    back = trains or "vision" not in frozen
    if connector.kind == "resampler":
        yield from _resampler(arch, load, trains, back, recomputed and back)
        return
    if connector.kind == "attention_pooling":
        yield Talk("all_reduce", n * connector.width, 1, "pooled vectors")
        yield Talk("all_reduce", n * hidden, 1, "image features")
        yield Talk("all_reduce", n * inside, back, "queries of the pooling, backward")
        yield Talk("all_reduce", n * load.slots * inside, back, "keys and values of the pooling, backward")
        yield Talk("all_reduce", n * connector.width, back, "pooled vectors, backward")
        return
    kind = "all_reduce" if connector.kind == "mlp" else "all_gather"
    yield Talk(kind, n * hidden, 1, "image features")
    yield Talk("all_reduce", n * inside, back, "image features, backward")


def _resampler(arch: Architecture, load: Load, trains: bool, back: bool, recomputed: bool) -> Iterator[Talk]:
    connector, inside = arch.connector, arch.feature_width
    patches, rows = load.crops * arch.vision.patches, load.windows * connector.queries
    width, layers = connector.width, connector.layers
    yield Talk("all_gather", patches * width, 1, "patches as the resampler reads them")
    yield Talk("all_reduce", patches * inside, back, "patches, backward")
    yield Talk("all_reduce", rows * width, 3 * layers * (1 + recomputed), "resampler's layers")
    # The first layer's self-attention and queries see learned vectors alone: no gradient goes there if they are frozen.
    yield Talk("all_reduce", rows * width, (3 * layers - 2 * (not trains)) * back, "resampler's layers, backward")
    yield Talk("all_reduce", load.windows * load.slots * width, layers * back, "patches of the resampler, backward")
    yield Talk("all_gather", rows * arch.language.hidden, 1, "image features")
    yield Talk("all_reduce", rows * width, back, "image features, backward")
