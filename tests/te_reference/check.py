"""One process of the checks in test_te_reference.py: `check.py FOLDER STORE WORLD RANK`; prints findings as JSON.

FOLDER: where stub.PACKAGES were installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.te_reference import stub  # noqa: E402

folder, store, world, rank = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
stub.install(folder)

from megatron_vlm.parallel import cpu  # noqa: E402

cpu.enable("cpu")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_vlm.config.schema import DataConfig, Fp8Config, KernelsConfig  # noqa: E402
from megatron_vlm.model import build, state  # noqa: E402
from megatron_vlm.parallel import groups  # noqa: E402
from megatron_vlm.parallel.layout import Layout  # noqa: E402
from tests.model import layouts, tiny  # noqa: E402

#: Every kind of parameter, and sizes that FP8 takes at TP 2.
ARCH = dataclasses.replace(tiny.ARCH, language=dataclasses.replace(tiny.LANGUAGE, qkv_bias=True, mlp=96))
#: torch.AdamW: TE's fused one has kernels of its own.
SPECS = {spec: {"kernels": KernelsConfig(spec=spec, optimizer="torch")} for spec in ("local", "transformer_engine")}


def both(parallel: dict[str, Any], arch: Any = ARCH, **options: Any) -> dict[str, dict[str, Any]]:
    """A step of either spec on this layout."""
    return {spec: step(parallel, sections, arch, **options) for spec, sections in SPECS.items()}


def step(parallel: dict[str, Any], sections: dict[str, Any], arch: Any = ARCH, **options: Any) -> dict[str, Any]:
    """One step: loss, gradients and initial weights of this rank."""
    try:
        return layouts.step(
            arch, Layout(world, tensor=parallel.get("tensor", 1)), parallel, {"sections": sections, **options}
        )
    finally:
        groups.destroy()


def gathered(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What every rank found."""
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, found)
    return everyone


def compared(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Names and shapes, initial weights, losses and gradients of the two."""
    ranks = {spec: gathered(one) for spec, one in found.items()}
    local, te = ({what: layouts.assemble(ranks[spec], what) for what in ("weights", "gradients")} for spec in SPECS)
    losses = [sum(one["loss"] for one in ranks[spec]) for spec in SPECS]
    parts = [{(key, shape, start, tuple(v.shape)) for key, shape, start, v in found[spec]["weights"]} for spec in SPECS]
    return {
        "same names and shapes": parts[0] == parts[1],
        "tensors": len(parts[0]),
        "same weights": all(torch.equal(local["weights"][key], values) for key, values in te["weights"].items()),
        "loss": abs(losses[0] - losses[1]) / abs(losses[0]),
        "gradients": layouts.worst(te["gradients"], local["gradients"]),
    }


@contextmanager
def built(change: Callable[[Any], None]) -> Iterator[None]:
    """Models get other norm weights than ones, the same for both specs, and then `change`."""
    original = build.build

    def changed(config: Any, layout: Layout) -> list[Any]:
        models = original(config, layout)
        for shard in state.shards(models):
            if shard.data.dim() == 1 and "norm" in shard.key and shard.key.endswith("weight"):
                generator = torch.Generator().manual_seed(zlib.crc32(shard.key.encode()))
                shard.data.data.copy_(1 + 0.3 * torch.randn(shard.data.shape, generator=generator))
        if config.kernels.spec != "local":
            for module in (module for model in models for module in model.modules()):
                change(module)
        return models

    build.build = changed
    try:
        yield
    finally:
        build.build = original


def marks(parallel: dict[str, Any]) -> bool:
    """Whether both specs tell Megatron the same of each parameter: sharded, summed, averaged over which ranks."""
    names = ("tensor_model_parallel", "sequence_parallel", "average_gradients_across_tp_domain")
    found = []
    for sections in SPECS.values():
        layout = Layout(world, tensor=world)
        groups.initialize(layout, seed=0, timeout_s=50)
        models = build.build(tiny.config(ARCH, parallel=parallel, sections=sections), layout)
        found.append(
            {shard.key: [bool(getattr(shard.data, name, False)) for name in names] for shard in state.shards(models)}
        )
        groups.destroy()
    return found[0] == found[1]


def swap_norms(module: Any) -> None:
    """The norm before attention in the place of the one before the MLP."""
    if hasattr(module, "self_attention") and hasattr(module, "mlp"):
        one, other = module.self_attention.linear_qkv.layer_norm_weight, module.mlp.linear_fc1.layer_norm_weight
        one.data, other.data = other.data.clone(), one.data.clone()


def swap_gate_and_up(module: Any) -> None:
    """[gate; up] as [up; gate]."""
    if getattr(module, "linear_fc1", None) is not None and module.config.gated_linear_unit:
        weight = module.linear_fc1.weight
        weight.data = torch.cat(weight.data.chunk(2)[::-1])


def centre_norms(module: Any) -> None:
    """Weights of norms taken for what is added to 1."""
    if hasattr(module, "zero_centered_gamma"):
        module.zero_centered_gamma = True


def trained(
    precision: str, sections: dict[str, Any], steps: int = 8, recompute: str = "none", shadowed: dict | None = None
) -> tuple[list[float], list[str]]:
    """Losses of steps on one batch, and the linear layers that computed in FP8. shadowed: filled after two steps."""
    from megatron_vlm.train import optim, shadow
    from megatron_vlm.train.step import Stepper

    layout = Layout(world, tensor=world)
    parallel = {"tensor": world, "sequence": world > 1}
    config = tiny.config(
        ARCH,
        parallel=parallel,
        precision=precision,
        recompute=recompute,
        sections=SPECS["transformer_engine"] | sections,
    )
    groups.initialize(layout, seed=0, timeout_s=50)
    try:
        models = optim.wrap(build.build(config, layout), config)
        stepper = Stepper(models, optim.build(models, config), config, ("test",))
        batch = tiny.batch(ARCH, [0], layout.crop_rank(rank), layout.crop_ranks)
        losses = []
        for step in range(1, steps + 1):
            losses.append(stepper.train([batch], step).loss)
            if shadowed is not None and step == 2:
                shadowed |= shadow.errors(stepper, [batch])
        used = [
            name.removeprefix("module.")
            for name, module in models[0].named_modules()
            if getattr(module, "fp8_meta", {}).get("recipe") is not None and getattr(module, "fp8", False)
        ]
        return losses, used
    finally:
        groups.destroy()


def encoder() -> dict[str, Any]:
    """The tower alone in FP8, trained: which layers were, and the loss before and after its 8-bit weights are thrown
    away, which are those of the last step if the two are equal."""
    from megatron_vlm.config.schema import ComponentOptimConfig, OptimConfig
    from megatron_vlm.train import optim
    from megatron_vlm.train.step import Stepper

    rates = ComponentOptimConfig(lr=1e-2, min_lr=1e-2)
    sections = {"fp8": Fp8Config(components=("vision",)), "optim": OptimConfig(vision=rates)}
    config = tiny.config(ARCH, precision="fp8", sections=SPECS["transformer_engine"] | sections)
    groups.initialize(Layout(1), seed=0, timeout_s=50)
    try:
        (model,) = build.build(config, Layout(1))
        with torch.no_grad():
            for parameter in model.parameters():  # as in layouts.step: else images hardly count
                parameter.mul_(8 if parameter.dim() > 1 else 1)
        models = optim.wrap([model], config)
        stepper = Stepper(models, optim.build(models, config), config, ("test",))
        batch = tiny.batch(ARCH, [0])
        losses = [stepper.train([batch], step).loss for step in range(1, 4)]
        used = [name for name, module in model.named_modules() if getattr(module, "fp8", False) is True]
        seen = [stepper.evaluate(iter([[batch]])).loss]
        for module in model.modules():
            getattr(module, "_fp8_workspaces", {}).clear()
        seen.append(stepper.evaluate(iter([[batch]])).loss)
        return {"losses": losses, "layers": used, "evaluated": seen}
    finally:
        groups.destroy()


def resumed(directory: Path) -> dict[str, Any]:
    """Delayed scaling: three steps, a checkpoint, held-out rows, three more steps; and these again from the checkpoint,
    with what that says of scales and without. Losses of the three, and whether they ended with the first one's scales.
    "moved to": on other layouts, whose scales each rank has loaded as they are in the checkpoint, and how far off the
    next loss is.
    """
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    from megatron_vlm.checkpoint import load, save, sharded
    from megatron_vlm.checkpoint.snapshot import Snapshot
    from megatron_vlm.model import scaling
    from megatron_vlm.train import optim
    from megatron_vlm.train.step import Stepper

    layout = Layout(world, tensor=world)
    fp8 = Fp8Config(recipe="delayed", first_layers_bf16=0, last_layers_bf16=0)
    parallel = {"tensor": world, "sequence": world > 1}
    sections = SPECS["transformer_engine"] | {"fp8": fp8}
    config = tiny.config(ARCH, parallel=parallel, precision="fp8", sections=sections)
    losses, scales = {}, {}
    found: dict[str, Any] = {"losses": losses}
    for run in ("whole", "resumed", "without scales"):
        groups.initialize(layout, seed=0, timeout_s=50)
        models = optim.wrap(build.build(config, layout), config)
        optimizer = optim.build(models, config)
        stepper, snapshot = Stepper(models, optimizer, config, ("test",)), Snapshot()
        batch = tiny.batch(ARCH, [0], layout.crop_rank(rank), layout.crop_ranks)
        options = {"models": models, "optimizer": optimizer, "config": config}
        if run == "whole":
            for step in (1, 2, 3):
                stepper.train([batch], step)
            save.save(directory, step=3, state={}, **options)
            saved = {name: state.clone() for name, state in scaling.delayed(models)}
            snapshot.take(models, optimizer)
            stepper.evaluate(iter([[batch]]))  # leaves no trace
        else:
            load.load(directory / "iter_0000003", **options)
        if run == "without scales":
            scaling.begin(models)
        losses[run] = [stepper.train([batch], step).loss for step in (4, 5, 6)]
        scales[run] = {name: state.clone() for name, state in scaling.delayed(models)}
        if run == "whole":
            taken = snapshot.contents()[sharded.SCALES]
            found["in the background"] = all(torch.equal(taken[name].data, state) for name, state in saved.items())
            found["moved"] = sum(not torch.equal(scales[run][name], state) for name, state in saved.items())
            found["keys"] = sorted(each.key for each in taken.values())
        groups.destroy()
    for run in ("resumed", "without scales"):
        found[run] = all(torch.equal(scales["whole"][name], state) for name, state in scales[run].items())
    moves = (("pipeline", Layout(world, pipeline=world)), ("data", Layout(world))) if world > 1 else ()
    for name, layout in moves:
        parallel = {"pipeline": layout.pipeline}
        config = tiny.config(ARCH, parallel=parallel, precision="fp8", sections=sections)
        config = dataclasses.replace(config, data=DataConfig(sequence_length=batch.tokens.shape[1]))
        FP8GlobalStateManager.reset()  # it would exchange over the groups of before, which no run changes
        groups.initialize(layout, seed=0, timeout_s=50)
        models = optim.wrap(build.build(config, layout), config)
        optimizer = optim.build(models, config)
        load.load(directory / "iter_0000003", models=models, optimizer=optimizer, config=config)
        same = [name for name, state in scaling.delayed(models) if torch.equal(saved[name], state)]
        # Every data-parallel rank the same row: the mean of one.
        loss = Stepper(models, optimizer, config, ("test",)).train([tiny.batch(ARCH, [0])], 4).loss
        found.setdefault("moved to", {})[name] = {"scales": gathered(same), "off": abs(loss / losses["whole"][0] - 1)}
        groups.destroy()
    return found


@contextmanager
def reference_recipe() -> Iterator[None]:
    """FP8 by Transformer Engine's pure-torch quantizer, which scales as `tensorwise` does."""
    original = build.fp8
    factory = (
        "transformer_engine.pytorch.custom_recipes.quantization_current_scaling.current_scaling_ref_quantizer_factory"
    )

    def custom(config: Any, component: str) -> dict[str, Any]:
        found = original(config, component)
        return found and found | {"fp8_recipe": "custom", "fp8_quantizer_factory": factory}

    build.fp8 = custom
    try:
        yield
    finally:
        build.fp8 = original


def checkpoints(directory: Path) -> dict[str, Any]:
    """Saved by one spec and loaded by the other, with its optimizer, and saved again: tensors that changed."""
    from megatron_vlm.checkpoint import load, save
    from tests.checkpoint import test_vlm
    from tests.checkpoint.test_load import differing

    layout = Layout(world, tensor=world)
    found = {}
    for first, second in (("local", "transformer_engine"), ("transformer_engine", "local")):
        for number, spec in enumerate((first, second)):
            config = test_vlm.settings(layout, world > 1, (), "float32")
            config = dataclasses.replace(config, **SPECS[spec])
            models, optimizer = test_vlm.build(config, layout, seed=1 + number)
            options = {"models": models, "optimizer": optimizer, "config": config}
            if number:
                load.load(directory / first / "iter_0000001", **options)
            else:
                test_vlm.step(models, optimizer, 1)
            written = save.save(
                directory / spec if not number else directory / f"{first}-{second}", step=1, state={}, **options
            )
            groups.destroy()
        found[f"{first} to {second}"] = differing(directory / first / "iter_0000001", written)
    return found


def main() -> dict[str, Any]:
    """What this world can tell."""
    found: dict[str, Any] = {}
    parallel = {"tensor": world, "vision": "tensor"} if world > 1 else {}
    with built(lambda module: None):
        found["layers"] = compared(both(parallel))
        if world > 1:
            found["same marks"] = marks({"tensor": world, "sequence": True})
            found["sequence parallel"] = compared(both({"tensor": world, "sequence": True}))
        else:
            for kind in ("mlp", "resampler", "linear"):
                found[kind] = compared(both({}, dataclasses.replace(ARCH, connector=tiny.connector(kind).connector)))
    found["checkpoints"] = checkpoints(Path(store).with_suffix(".checkpoints"))
    if world == 1:
        for mutation in (swap_norms, swap_gate_and_up, centre_norms):
            with built(mutation):
                found[mutation.__name__] = compared(both({}))
    found["bf16"], _ = trained("bf16", {})
    found["delayed"] = resumed(Path(store).with_suffix(".delayed"))
    with reference_recipe():
        found["fp8"], found["fp8 layers"] = trained("fp8", {"fp8": Fp8Config()})
        found["shadow"] = {}
        found["fp8 shadowed"], _ = trained("fp8", {"fp8": Fp8Config()}, 4, shadowed=found["shadow"])
        if world == 1:
            found["fp8 recomputed"], _ = trained("fp8", {"fp8": Fp8Config()}, 3, "full")
            found["encoder"] = encoder()
    return found


if __name__ == "__main__":
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    result = main()
    if rank == 0:
        print(json.dumps(result))
    dist.destroy_process_group()
