"""Whether the sizes of what train.precision=fp8 computes in FP8 allow it. Integers only.

The policy: the decoder's linear layers, but for its first and last layers; everything else (vision tower, connector,
embeddings, norms, attention, head and loss) stays in bf16. A crop's patches are why the tower does: 729 is odd, and its
MLP of 4,304 does not divide by 16 over more than one tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.schema import Config

#: What rows and columns of a product must divide by. Transformer Engine's products take 16 (rows 8; its documentation
#: asks for 16); a block of mxfp8 has 32 numbers, one of blockwise 128.
MULTIPLE = {"tensorwise": 16, "delayed": 16, "mxfp8": 32, "blockwise": 128}
COMPONENTS = ("language", "vision")


def problems(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    """What keeps this model from training in FP8 on this layout; nothing where train.precision is another."""
    fp8 = config.fp8
    if fp8.shadow_every and (config.train.precision != "fp8" or "language" not in fp8.components):
        yield f"fp8.shadow_every={fp8.shadow_every} compares decoder layers in FP8 with bf16, but none is in FP8."
    if config.train.precision != "fp8":
        return
    unknown = [name for name in fp8.components if name not in COMPONENTS]
    if unknown or not fp8.components:
        yield (
            f"fp8.components={list(fp8.components)}: choose from {', '.join(COMPONENTS)}. Connectors are computed in "
            "bf16; train.precision=bf16 is for a run without FP8."
        )
        return
    kept = fp8.first_layers_bf16 + fp8.last_layers_bf16
    if fp8.recipe == "delayed" and kept:
        yield (
            f"fp8.recipe=delayed scales all layers by one history and cannot leave {kept} in bf16; set "
            "fp8.first_layers_bf16=0 fp8.last_layers_bf16=0, or take fp8.recipe=tensorwise."
        )
    if fp8.recipe == "delayed" and "vision" in fp8.components:
        yield (
            "fp8.recipe=delayed exchanges its scales over the ranks, and one without images has none of the tower's; "
            "leave vision out of fp8.components, or take fp8.recipe=tensorwise."
        )
    if fp8.format == "e4m3" and fp8.recipe in ("tensorwise", "delayed"):
        yield f"fp8.recipe={fp8.recipe} with fp8.format=e4m3: gradients need the range of e5m2; set fp8.format=hybrid."
    if "language" in fp8.components and kept >= arch.language.layers:
        yield (
            f"fp8.first_layers_bf16={fp8.first_layers_bf16} and fp8.last_layers_bf16={fp8.last_layers_bf16} leave none "
            f"of the decoder's {arch.language.layers} layers in FP8."
        )
    fewest = min(config.parallel.pipeline_layers or (arch.language.layers // _chunks(config),))
    if max(fp8.first_layers_bf16, fp8.last_layers_bf16) > fewest:
        yield (
            f"fp8.first_layers_bf16={fp8.first_layers_bf16} or fp8.last_layers_bf16={fp8.last_layers_bf16} is more "
            f"than the {fewest} layers of a pipeline chunk: Megatron looks for them in the first and the last one."
        )
    needed = MULTIPLE[fp8.recipe]
    for component in fp8.components:
        sizes = _language(config, arch) if component == "language" else _vision(config, arch)
        wrong = [
            f"{what} {size} (= {size // needed} x {needed} + {size % needed})" for what, size in sizes if size % needed
        ]
        if wrong:
            yield (
                f"fp8.recipe={fp8.recipe} needs multiples of {needed}, but the {component}'s products have "
                f"{'; '.join(wrong)}. {_REMEDY[component]}"
            )


_REMEDY = {
    "language": "Change data.sequence_length, parallel.tensor or parallel.context, or take another fp8.recipe.",
    "vision": "Leave vision out of fp8.components: it is computed in bf16 then.",
}


def _chunks(config: Config) -> int:
    return config.parallel.pipeline * config.parallel.virtual_pipeline


def _language(config: Config, arch: Architecture) -> Iterator[tuple[str, int]]:
    """Sizes of the decoder's products on one rank: rows, then widths of inputs and outputs."""
    p, decoder = config.parallel, arch.language
    split = p.context * (p.tensor if p.sequence else 1)
    yield (
        f"rows on a rank ({config.data.sequence_length} x {config.train.micro_batch} tokens / {split})",
        (config.data.sequence_length * config.train.micro_batch // split),
    )
    yield "width", decoder.hidden
    yield "query, key and value width", (decoder.heads + 2 * decoder.kv_heads) * decoder.head_dim // p.tensor
    yield "attention width", decoder.heads * decoder.head_dim // p.tensor
    yield f"MLP width ({decoder.mlp} / {p.tensor})", decoder.mlp // p.tensor


def _vision(config: Config, arch: Architecture) -> Iterator[tuple[str, int]]:
    """The same of the tower; a rank may have any number of crops, so one crop's rows must do."""
    vision = arch.vision
    ranks = config.parallel.tensor if config.parallel.vision == "tensor" else 1
    yield "rows of a crop", vision.patches + vision.class_token
    yield "width", vision.width
    yield "attention width", vision.width // ranks
    yield f"MLP width ({vision.mlp} / {ranks})", vision.mlp // ranks
