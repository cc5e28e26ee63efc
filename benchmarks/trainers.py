"""The two trainers that benchmarks compare: this project's step and a plain one around `transformers`, same weights."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_vlm.batch import Batch
from megatron_vlm.config import presets
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.config.schema import Config, ModelConfig, OptimConfig, TrainConfig
from megatron_vlm.parallel import cpu
from megatron_vlm.parallel.layout import Layout

TINY = presets.PRESETS["tiny"]
#: About 14 million parameters.
SMALL = Architecture(
    dataclasses.replace(TINY.vision, image_size=112, width=192, heads=6, mlp=768, layers=4),
    dataclasses.replace(TINY.connector, taps=(3, 1), width=192, heads=6, mlp=1024),
    dataclasses.replace(TINY.language, hidden=384, layers=6, heads=6, kv_heads=3, head_dim=64, mlp=1152,
                        vocab_size=8192),
)  # fmt: skip
REAL = presets.PRESETS["qwen3_0.6b"]
#: The real widths, vocabulary and pictures of Qwen3-0.6B with SigLIP2 so400m, two layers of each.
WIDE = Architecture(
    dataclasses.replace(REAL.vision, layers=2),
    dataclasses.replace(REAL.connector, taps=(1, 0)),
    dataclasses.replace(REAL.language, layers=2),
)
ARCHITECTURES = {"tiny": TINY, "small": SMALL, "0.6B widths": WIDE}
#: As the recipes have it: tables of random weights train, those of a language model that exists do not.
FREEZE: dict[str, tuple[str, ...]] = {"tiny": (), "small": (), "0.6B widths": ("base_embeddings",)}
LEARNING_RATE = 1e-4


@contextmanager
def alone() -> Iterator[None]:
    """Megatron on the CPU in this process, with groups of one."""
    import torch.distributed as dist

    cpu.enable("cpu")
    from megatron_vlm.parallel import groups

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        groups.initialize(Layout(1))
        try:
            yield
        finally:
            groups.destroy()
            dist.destroy_process_group()


def config(arch: Architecture, freeze: tuple[str, ...], precision: str) -> Config:
    """Settings of a run of `arch`, which becomes the preset `benchmark`. No z-loss, as transformers has none."""
    presets.PRESETS["benchmark"] = arch
    rates = {name: {"lr": LEARNING_RATE, "min_lr": LEARNING_RATE} for name in ("vision", "connector", "language")}
    optim = OptimConfig(schedule="constant")
    optim = dataclasses.replace(
        optim, **{name: dataclasses.replace(getattr(optim, name), **rate) for name, rate in rates.items()}
    )
    return Config(
        model=ModelConfig(preset="benchmark", freeze=freeze),
        train=TrainConfig(precision=precision, z_loss=0.0, global_batch=1, micro_batch=1),
        optim=optim,
    )


Step = Callable[[], float]


def ours(settings: Config, load: Callable[[Any], None]) -> Callable[[list[Batch]], Step]:
    """A trainer whose weights `load` copies into the model; it gives steps on micro-batches, which return the loss."""
    from megatron_vlm.model.build import build
    from megatron_vlm.train import optim
    from megatron_vlm.train.step import Stepper

    models = build(settings, Layout(1))
    load(models[0])
    wrapped = optim.wrap(models, settings)
    trainer = Stepper(wrapped, optim.build(wrapped, settings), settings, ("benchmark",))
    return lambda micro_batches: lambda: trainer.train(micro_batches, 1).loss


def theirs(model: Any, *, autocast: bool) -> Callable[[dict[str, torch.Tensor]], Step]:
    """The same of a model of transformers: AdamW (torch's fused one) after clipping the norm of all gradients."""
    step = accumulated(model, autocast=autocast)
    return lambda inputs: lambda: step([inputs])


def accumulated(model: Any, *, autocast: bool = False) -> Callable[[list[dict[str, torch.Tensor]]], float]:
    """A step over several batches of a model of transformers, whose gradients add up; gives the last loss."""
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0, fused=True)

    def step(batches: list[dict[str, torch.Tensor]]) -> float:
        with cpu.direct():  # what sends Megatron's CUDA calls to the CPU costs nothing here
            optimizer.zero_grad()
            for inputs in batches:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(**inputs, use_cache=False).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            return loss.item()

    return step


def molmo2(arch: Architecture, freeze: tuple[str, ...]) -> Any:
    """transformers' Molmo2 of this architecture in float32, random weights, the same parts frozen."""
    from tests.model import reference

    model = reference.molmo2(arch)
    if arch.language.tied_head:  # Molmo2 has a head of its own: the same numbers
        with torch.no_grad():
            model.lm_head.weight.copy_(model.model.language_model.embed_tokens.weight[: arch.language.vocab_size])
    return _frozen(model, freeze)


def qwen3(arch: Architecture, freeze: tuple[str, ...]) -> Any:
    """transformers' Qwen3 of this architecture's decoder."""
    from tests.model.reference import randomize
    from tests.model.test_language import transformers_model

    model = transformers_model(arch.language)
    randomize(model)
    return _frozen(model, freeze)


def _frozen(model: Any, freeze: tuple[str, ...]) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.2)  # spread 0.03: losses near those of a model at its start
            if "base_embeddings" in freeze and ("embed_tokens" in name or "lm_head" in name):
                parameter.requires_grad_(False)
    return model


def load_into(model: Any) -> Callable[[Any], None]:
    """Copies the weights of transformers' model into ours."""
    from tests.model.decoders import load_decoder
    from tests.model.reference import load_molmo2

    text = not hasattr(model.model, "vision_tower")
    weights = model.state_dict()
    return lambda own: load_decoder(own.language, weights) if text else load_molmo2(own, model)
