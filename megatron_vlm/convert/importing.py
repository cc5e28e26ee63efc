"""Hugging Face weights -> a checkpoint of the trainer, for any layout. One process, no GPU, one tensor at a time.

The model is built without memory (torch's meta device): it says which tensors a checkpoint has. The table of names says
where each comes from. Nothing is read before every source tensor has a use and every target a source.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_vlm.checkpoint import save, sharded
from megatron_vlm.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megatron_vlm.convert import configs
from megatron_vlm.convert.entries import Shape
from megatron_vlm.convert.hf import CONFIG, read_json
from megatron_vlm.convert.lazy import Lazy
from megatron_vlm.convert.plan import OWN, Source, plan, with_head
from megatron_vlm.model.build import build
from megatron_vlm.parallel import groups
from megatron_vlm.parallel.layout import Layout

PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}


@contextmanager
def alone() -> Iterator[None]:
    """torch.distributed and Megatron's groups for this process alone, without a launcher, a port or a GPU.

    parallel.cpu.enable("cpu") must have been called before Megatron was imported. Groups that exist already serve too.
    """
    # Megatron of its own defaults; nobody who converts can act on that.
    warnings.filterwarnings("ignore", "full scope is deprecated", UserWarning)
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        groups.initialize(Layout(1))
        yield
    finally:
        groups.destroy()
        dist.destroy_process_group()


def parts(
    language: str | Path,
    vision: str | Path,
    *,
    connector: str = "",
    vision_layers: tuple[int, ...] | None = None,
    preset: str = "",
    connector_weights: str | Path = "",
) -> tuple[ModelConfig, list[Source]]:
    """The settings and sources of a model from a language model and a vision tower.

    connector_weights: a connector and new rows as `export --format parts` wrote them; empty = new ones.
    """
    text = Source.open(language, "qwen")
    tower_fields = read_json(Path(vision) / CONFIG)
    preprocessor = Path(vision) / "preprocessor_config.json"
    kind, tower = configs.vision(
        tower_fields, str(Path(vision) / CONFIG), read_json(preprocessor) if preprocessor.is_file() else None
    )
    wanted = {"vision": tower, "language": configs.language(text.config, str(Path(language) / CONFIG))}
    given = ModelConfig(connector=connector, vision_layers=vision_layers)
    model, _ = configs.settings(wanted, given, ("qwen",), preset, ignore=("language.new_rows",))
    own = [Source.open(connector_weights, OWN)] if connector_weights else []
    return model, [text, Source.open(vision, kind), *own]


def molmo2(directory: str | Path, *, preset: str = "") -> tuple[ModelConfig, list[Source]]:
    """The settings and source of a Molmo2 model in either format."""
    form, arch = configs.molmo2(read_json(Path(directory) / CONFIG), str(Path(directory) / CONFIG))
    source = Source.open(directory, form)
    arch = with_head(source, arch)
    wanted = {"vision": arch.vision, "connector": arch.connector, "language": arch.language}
    model, _ = configs.settings(wanted, ModelConfig(), ("molmo2",), preset)
    return model, [source]


def bring(
    model: ModelConfig,
    sources: Sequence[Source],
    out: str | Path,
    *,
    precision: str = "",
    seed: int = 6198,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write the checkpoint `out`/iter_0000000 of a model from its sources; its path.

    precision: bf16 or float32; empty = bf16 where all sources are, else float32, which loses nothing.
    seed:      of the weights that no source has. progress: told bytes done and in all.
    Raises ValueError before anything is written where sources and model do not fit (see `plan`).
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is not empty. Give a directory that does not exist.")
    all_bf16 = all(stored.dtype == "BF16" for source in sources for stored in source.weights.tensors.values())
    precision = precision or ("bf16" if all_bf16 else "float32")
    text = sources[0].weights.directory
    tokenizer = str(text.resolve()) if (text / "tokenizer.json").is_file() else ""
    config = Config(
        model=model, train=TrainConfig(seed=seed, precision=precision), data=DataConfig(tokenizer=tokenizer)
    )
    with alone():
        models, shapes = empty_model(config)
        made = plan(configs.architecture(model), sources, shapes, seed)
        dtype = PRECISIONS[precision]
        total = sum(torch.Size(shape).numel() * dtype.itemsize for shape in shapes.values())
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        return save.save(
            out,
            models=models,
            optimizer=None,
            step=0,
            config=config,
            state={"lineage": made.lineage()},
            strategy=Lazy(made.make, dtype, advance),
        )


def empty_model(config: Config) -> tuple[list[Any], dict[str, Shape]]:
    """The models of a configuration without memory, and the shapes of their checkpoint's tensors."""
    with torch.device("meta"):
        models = build(config, Layout(1))
    tensors = sharded.tensors(sharded.build(models, None, is_loading=False))
    return models, {tensor.key: tuple(tensor.global_shape) for tensor in tensors}
