"""Rules that settings must keep, each stated once with its numbers. Types and names are `load.py`'s business.

A rule is a generator of messages; none means kept. `check` gathers all of them, so that one start shows every mistake.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

from megatron_vlm.config import duration, fp8, geometry, presets
from megatron_vlm.config.architecture import COMPONENTS, Architecture
from megatron_vlm.config.context import head_ranks
from megatron_vlm.config.keys import keys
from megatron_vlm.config.schema import Config

Rule = Callable[[Config, Architecture, int], Iterator[str]]

#: Values that a setting may have.
CHOICES: dict[str, tuple[str, ...]] = {
    "run.device": ("auto", "cpu", "cuda"),
    "run.resume": ("auto", "never", "must"),
    "parallel.context_method": ("auto", "ulysses", "gather", "ring"),
    "parallel.vision": ("data", "tensor"),
    "data.prompts": ("style_and_length", "style"),
    "data.bad_samples": ("stop", "skip"),
    "data.loss_weighting": ("uniform", "root_subsegments", "root_tokens"),
    "train.precision": ("float32", "bf16", "fp8"),
    "train.recompute": ("none", "selective", "full"),
    "fp8.recipe": tuple(fp8.MULTIPLE),
    "fp8.format": ("hybrid", "e4m3"),
    "kernels.spec": ("auto", "local", "transformer_engine"),
    "kernels.norm": ("auto", "torch", "apex", "transformer_engine"),
    "kernels.optimizer": ("auto", "torch", "apex", "transformer_engine"),
    "kernels.gradients": ("auto", "separate", "fused"),
    "kernels.attention": ("auto", "blocks", "flex", "flash"),
    "guard.not_finite": ("stop", "skip", "rollback"),
    "guard.spike": ("off", "note", "stop", "skip", "rollback"),
    "optim.schedule": ("cosine", "linear", "constant", "wsd"),
    "optim.clip_by": ("component", "global"),
}
#: Smallest value of a number, where 0 is not the smallest.
AT_LEAST: dict[str, float] = {
    "parallel.tensor": 1,
    "parallel.pipeline": 1,
    "parallel.virtual_pipeline": 1,
    "parallel.context": 1,
    "data.sequence_length": 1,
    "data.window": 1,
    "data.balance_batches": 1,
    "train.steps": 1,
    "train.global_batch": 1,
    "train.micro_batch": 1,
    "train.logit_chunk": 1,
    "guard.history": 20,
    "guard.loss_deviations": 1,
    "guard.norm_deviations": 1,
    "log.every": 1,
}
#: What a checkpoint remembers of the data beside settings (see data/identity.py).
DATA_NAMES = ("manifest", "mixture", "tokenizer", "split", "geometry", "videos", "balance", "high_resolution_crops")
#: Probabilities, shares and decay rates: less than 1.
BELOW_ONE = (
    "data.bad_ceiling",
    "train.residual_dropout",
    "train.response_dropout",
    "optim.betas",
    *(f"optim.{component}.betas" for component in COMPONENTS),
)


def check(config: Config, world_size: int) -> None:
    """Raises one ValueError with every rule that the settings break on `world_size` processes."""
    broken = list(_values(config))
    if not broken:
        # The other rules divide by these values.
        arch = presets.architecture(config.model)
        broken = [message for rule in RULES for message in rule(config, arch, world_size)]
    if len(broken) == 1:
        raise ValueError(broken[0])
    if broken:
        raise ValueError(f"{len(broken)} settings do not fit:\n" + "\n".join(f"  - {message}" for message in broken))


def _values(config: Config) -> Iterator[str]:
    """Rules that one setting keeps or breaks alone."""
    for name in keys():
        value = reduce(getattr, name.split("."), config)
        if name in CHOICES and value not in CHOICES[name]:
            yield f"{name}={value!r} does not exist; choose one of {', '.join(CHOICES[name])}."
        for number in _numbers(value):
            least = AT_LEAST.get(name, 0)
            if not math.isfinite(number) or number < least:
                yield f"{name}={value} must be at least {least}, and finite."
            elif name in BELOW_ONE and number >= 1:
                yield f"{name}={value} must be less than 1."


def _accept(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    for name in config.run.accept:
        if name not in keys() and name not in DATA_NAMES:
            yield (
                f"run.accept names {name!r}, which is no setting and none of {', '.join(DATA_NAMES)}; the refusal to "
                "resume lists what to write."
            )


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _world(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    p = config.parallel
    model = p.tensor * p.pipeline * p.context
    if world < 1:
        yield f"{world} processes are no run; needed: 1 or more."
        return
    if world % model:
        yield (
            f"{world} processes cannot be divided into models of {model} processes (parallel.tensor={p.tensor} x "
            f"parallel.pipeline={p.pipeline} x parallel.context={p.context}); start a multiple of {model}, "
            "or make one of the three smaller."
        )
        return
    data = world // model
    rows = data * config.train.micro_batch
    if config.train.global_batch % rows:
        yield (
            f"train.global_batch={config.train.global_batch} rows cannot be dealt to {data} data-parallel ranks in "
            f"micro-batches of train.micro_batch={config.train.micro_batch}; it must be a multiple of {rows}."
        )
        return
    steps = config.train.global_batch // rows
    if p.virtual_pipeline > 1 and steps % p.pipeline:
        yield (
            f"train.global_batch={config.train.global_batch} gives {steps} micro-batches a rank; with "
            f"parallel.virtual_pipeline={p.virtual_pipeline} they must be a multiple of "
            f"parallel.pipeline={p.pipeline}: make the global batch a multiple of {rows * p.pipeline}."
        )


def _tensor(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    tensor, language = config.parallel.tensor, arch.language
    whole = (("query heads", language.heads), ("MLP width", language.mlp), ("vocabulary rows", language.vocab_size))
    for what, number in whole:
        if number % tensor:
            yield (
                f"parallel.tensor={tensor} does not divide the {number} {what} of {config.model.preset!r}; "
                f"degrees that do: {_divisors(number)}."
            )
    if language.kv_heads % tensor and tensor % language.kv_heads:
        yield (
            f"parallel.tensor={tensor} neither divides nor is a multiple of the {language.kv_heads} key and value "
            f"heads of {config.model.preset!r}."
        )
    if config.parallel.sequence and tensor == 1:
        yield "parallel.sequence=true shards over tensor-parallel ranks, but parallel.tensor=1; raise it or drop this."


def _vision(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    tensor, vision, connector = config.parallel.tensor, arch.vision, arch.connector
    if config.parallel.vision != "tensor":
        return
    sharded = [("heads of the vision tower", vision.heads), ("MLP width of the vision tower", vision.mlp)]
    if connector.kind == "attention_pooling":
        sharded += [("heads of the connector", connector.heads), ("MLP width of the connector", connector.mlp)]
    elif connector.kind == "mlp":
        sharded += [("MLP width of the connector", connector.mlp)]
    else:
        sharded += [("numbers in a hidden state of the decoder", arch.language.hidden)]
    if connector.kind == "resampler":
        sharded += [("heads of the connector", connector.heads)]
    for what, number in sharded:
        if number % tensor:
            yield (
                f"parallel.vision=tensor with parallel.tensor={tensor}, which does not divide the {number} {what} of "
                f"{config.model.preset!r}; degrees that do: {_divisors(number)}. Or set parallel.vision=data."
            )


def _divisors(number: int) -> str:
    """Degrees up to 64 that divide a number."""
    return ", ".join(str(degree) for degree in range(1, 65) if number % degree == 0)


def _context(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    p, language = config.parallel, arch.language
    heads, kv_heads = language.heads // p.tensor, max(1, language.kv_heads // p.tensor)
    most = head_ranks(p, language)
    if p.context_method == "ulysses" and most != p.context:
        yield (
            f"parallel.context_method=ulysses cannot deal the {heads} query heads and {kv_heads} key and value heads "
            f"of a rank ({language.heads} and {language.kv_heads} / parallel.tensor={p.tensor}) to parallel.context="
            f"{p.context} ranks, only to {most} of them. Set parallel.context={most}, or parallel.context_method=auto, "
            "which gathers keys and values among the rest."
        )


def _sequence(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    p, length = config.parallel, config.data.sequence_length
    parts = p.context * (p.tensor if p.sequence else 1)
    if length % parts:
        by = f"parallel.context={p.context}" + (f" x parallel.tensor={p.tensor}" if p.sequence else "")
        yield (
            f"data.sequence_length={length} is not a multiple of {parts} ({by}); the nearest that are: "
            f"{length // parts * parts} and {-(-length // parts) * parts}."
        )
    if length > arch.language.max_positions:
        yield (
            f"data.sequence_length={length} is longer than the {arch.language.max_positions} positions that "
            f"{config.model.preset!r} was made for."
        )


def _pipeline(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    p, layers = config.parallel, arch.language.layers
    chunks = p.pipeline * p.virtual_pipeline
    if p.virtual_pipeline > 1 and p.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline={p.virtual_pipeline} interleaves pipeline stages, but parallel.pipeline=1; "
            "raise it or drop this."
        )
    if not p.pipeline_layers and layers % chunks:
        yield (
            f"{layers} decoder layers cannot be divided evenly over {chunks} pipeline chunks "
            f"(parallel.pipeline={p.pipeline} x parallel.virtual_pipeline={p.virtual_pipeline}); "
            f"give the layers of each in parallel.pipeline_layers, {chunks} numbers whose sum is {layers}."
        )
    if p.pipeline_layers and (len(p.pipeline_layers) != chunks or sum(p.pipeline_layers) != layers):
        yield (
            f"parallel.pipeline_layers={list(p.pipeline_layers)} has {len(p.pipeline_layers)} numbers with the sum "
            f"{sum(p.pipeline_layers)}; needed are {chunks} (pipeline stages x virtual stages) with the sum {layers}, "
            f"the decoder layers of {config.model.preset!r}."
        )


def _crops(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    data = config.data
    if data.max_crops < 1 + data.image_crops:
        yield (
            f"data.max_crops={data.max_crops} is less than one image can have: the whole image and "
            f"data.image_crops={data.image_crops} high-resolution crops are {1 + data.image_crops}."
        )
    tokens = geometry.most_tokens(geometry.image_geometry(arch, data.image_crops))
    if tokens >= data.sequence_length:
        yield (
            f"data.sequence_length={data.sequence_length} cannot hold the {tokens} tokens that one image of "
            f"data.image_crops={data.image_crops} high-resolution crops can have, and text; lengthen the row or allow "
            "fewer crops."
        )


def _frames(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    data = config.data
    if data.frames_per_second <= 0:
        yield f"data.frames_per_second={data.frames_per_second}; needed more than 0."
    if data.max_frames > data.max_crops:
        yield (
            f"data.max_frames={data.max_frames} is more than data.max_crops={data.max_crops}, and a frame is a crop; "
            "set it lower, or to 0 for as many as fit."
        )
    # Start, end and at least four tokens of a time stamp (`0.0 `) beside the placeholders.
    least = geometry.frame_layout(geometry.image_geometry(arch, 0)).placeholders + 6
    if data.max_frames * least >= data.sequence_length:
        yield (
            f"data.sequence_length={data.sequence_length} cannot hold data.max_frames={data.max_frames} frames of at "
            f"least {least} tokens, and text; lengthen the row, show fewer frames, or raise model.video_pool."
        )


def _time(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    if not config.run.time_limit:
        return
    try:
        if not duration.seconds(config.run.time_limit):
            yield f"run.time_limit={config.run.time_limit!r} leaves no time; leave it empty for no limit."
    except ValueError as error:
        yield f"run.time_limit={error}"


def _training(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    unknown = [name for name in config.model.freeze if name not in COMPONENTS]
    if unknown:
        yield f"model.freeze names {', '.join(unknown)}, which does not exist; choose from {', '.join(COMPONENTS)}."
    if {"vision", "connector", "language"} <= set(config.model.freeze):
        yield f"model.freeze={list(config.model.freeze)} leaves nothing to train."
    for component in COMPONENTS:
        optim = config.optim.of(component)
        if component not in config.model.freeze and optim.min_lr > optim.lr:
            yield f"optim.{component}.min_lr={optim.min_lr} is above optim.{component}.lr={optim.lr}."
        clip_norm = getattr(config.optim, component).clip_norm
        if clip_norm is not None and config.optim.clip_by == "global":
            yield f"optim.{component}.clip_norm={clip_norm} has no meaning with optim.clip_by=global."
    decay, steps = config.optim.decay_steps, config.train.steps
    if (config.optim.schedule == "wsd") != (decay > 0):
        yield f"optim.decay_steps={decay} with optim.schedule={config.optim.schedule}: only wsd has some."
    if decay > steps:
        yield f"optim.decay_steps={decay} are more than train.steps={steps}."


def _rampup(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    train, p = config.train, config.parallel
    if not train.rampup_steps:
        return
    grows = train.global_batch - train.rampup_from
    if not train.rampup_from or not train.rampup_by or grows <= 0 or grows % train.rampup_by:
        yield (
            f"train.rampup_from={train.rampup_from} does not grow to train.global_batch={train.global_batch} by "
            f"train.rampup_by={train.rampup_by} rows at a time."
        )
        return
    once = max(1, world // (p.tensor * p.pipeline * p.context)) * train.micro_batch
    once *= p.pipeline if p.virtual_pipeline > 1 else 1
    for name in ("rampup_from", "rampup_by"):
        if getattr(train, name) % once:
            yield f"train.{name}={getattr(train, name)} must be a multiple of {once}, what all ranks take at once."


def _tasks(config: Config, arch: Architecture, world: int) -> Iterator[str]:
    names, p = ", ".join(config.eval.tasks), config.parallel
    if names and not config.eval.every:
        yield f"eval.tasks names {names}, but eval.every=0 evaluates never; set eval.every, or name no tasks."
    unable = (
        (p.context > 1, f"parallel.context={p.context}"),
        (p.sequence, "parallel.sequence=true"),
        (p.virtual_pipeline > 1, f"parallel.virtual_pipeline={p.virtual_pipeline}"),
        (p.vision == "tensor" and p.tensor > 1, "parallel.vision=tensor"),
    )
    spread = [words for broken, words in unable if broken]
    if names and spread:
        yield (
            f"eval.tasks names {names}, but answers are not decoded with {' and '.join(spread)}. Leave eval.tasks "
            "empty and score checkpoints with tools/evaluate.py, which loads those of any layout."
        )


RULES: tuple[Rule, ...] = (
    fp8.problems,
    _accept,
    _world,
    _tensor,
    _vision,
    _context,
    _sequence,
    _pipeline,
    _crops,
    _frames,
    _time,
    _training,
    _rampup,
    _tasks,
)
