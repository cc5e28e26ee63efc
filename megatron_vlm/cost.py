"""Floating-point operations of every part, as integers. No torch.

Counted are matrix products only (2 per multiply-add), as model-FLOPs utilisation is usually given: norms, softmax and
element-wise work are left out, and so is what recomputation repeats.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_vlm.config.architecture import Architecture

#: Dense bf16 operations per second, by what the device's name contains.
PEAK_FLOPS = {
    "H200": 989 * 10**12,
    "H100": 989 * 10**12,
    "H800": 989 * 10**12,
    "A100": 312 * 10**12,
    "A800": 312 * 10**12,
    "L40S": 362 * 10**12,
    "B200": 2250 * 10**12,
}


def peak_flops(device_name: str) -> int | None:
    """Peak of a device by its name, None where it is not known (a CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


@dataclass(frozen=True)
class Work:
    """What a step has to compute."""

    tokens: int
    """Tokens of the decoder, padding included."""
    pairs: int
    """Query-key pairs that the mask allows."""
    loss_tokens: int
    """Tokens whose logits are computed."""
    crops: int
    """Crops that the tower encodes."""
    windows: int
    """Windows that the connector pools (of a resampler: crops that it reads)."""
    slots: int
    """Patches in all windows, empty slots included."""


@dataclass(frozen=True)
class Flops:
    """Operations of one forward pass, by component."""

    vision: int
    connector: int
    language: int


def forward(arch: Architecture, work: Work) -> Flops:
    """Operations of a forward pass over `work`."""
    return Flops(_vision(arch, work), _connector(arch, work), _language(arch, work))


def training(arch: Architecture, work: Work, frozen: Collection[str] = ()) -> int:
    """Operations of forward and backward. Backward costs one forward for activations and one for weights.

    `frozen`: components without gradients (`model.freeze`). A frozen part needs no weight gradients, and no activation
    gradients either where nothing before it trains.
    """
    flops = forward(arch, work)
    vision, connector, language = ("vision" not in frozen), ("connector" not in frozen), ("language" not in frozen)
    # The new embedding rows train with the connector and stand before the decoder.
    return (
        flops.vision * (1 + 2 * vision)
        + flops.connector * (1 + connector + (connector or vision))
        + flops.language * (1 + language + (language or connector or vision))
    )


def _vision(arch: Architecture, work: Work) -> int:
    vision = arch.vision
    tokens = vision.patches + vision.class_token
    layer = 8 * tokens * vision.width**2 + 4 * tokens**2 * vision.width + 4 * tokens * vision.width * vision.mlp
    return work.crops * (2 * vision.patches * vision.patch_values * vision.width + arch.tower_depth * layer)


def _connector(arch: Architecture, work: Work) -> int:
    connector, hidden = arch.connector, arch.language.hidden
    inside, width, windows, slots = arch.feature_width, connector.width, work.windows, work.slots
    if connector.kind == "attention_pooling":
        attention = (
            2 * windows * inside * width + 4 * slots * inside * width + 4 * slots * width + 2 * windows * width**2
        )
        return attention + windows * (4 * width + 2 * hidden) * connector.mlp
    if connector.kind == "resampler":
        queries = windows * connector.queries
        # Per layer: attention among the queries, then over the patches (queries and output, keys and values, scores and
        # sums), and an MLP of 4 x width.
        layer = 8 * queries * width**2 + 4 * queries * connector.queries * width
        layer += 4 * queries * width**2 + 4 * slots * width**2 + 4 * connector.queries * slots * width
        layer += 16 * queries * width**2
        return 2 * slots * inside * width + connector.layers * layer + 2 * queries * width * hidden
    if connector.kind == "mlp":
        return 2 * windows * (inside + hidden) * connector.mlp
    return 2 * windows * inside * hidden


def _language(arch: Architecture, work: Work) -> int:
    language = arch.language
    query_width = language.heads * language.head_dim
    key_width = language.kv_heads * language.head_dim
    per_token = 2 * language.hidden * (2 * query_width + 2 * key_width) + 6 * language.hidden * language.mlp
    layers = language.layers * (work.tokens * per_token + 4 * work.pairs * query_width)
    return layers + 2 * work.loss_tokens * language.hidden * language.vocab_size
