"""Hugging Face weights -> a checkpoint of the trainer, for any layout. One process, no GPU, few tensors in memory.

The table of names says which tensors a checkpoint has and where each comes from. Nothing is read before every source
tensor has a use and every target a source. Megatron is not needed, and its start-up takes as long as all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from megatron_vlm.checkpoint import record
from megatron_vlm.config.schema import Config, DataConfig, ModelConfig, TrainConfig
from megatron_vlm.convert import configs, plan, writing
from megatron_vlm.convert.entries import Shape
from megatron_vlm.convert.hf import CONFIG, Planned, read_json
from megatron_vlm.convert.plan import OWN, Source, with_head

PRECISIONS = {"bf16": torch.bfloat16, "float32": torch.float32}


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
    arch = configs.architecture(model)
    shapes = plan.tensors(arch)
    made = plan.plan(arch, sources, shapes, seed)
    dtype = PRECISIONS[precision]
    total = sum(torch.Size(shape).numel() * dtype.itemsize for shape in shapes.values())
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    def planned(key: str, shape: Shape) -> Planned:
        return Planned(key, dtype, shape, lambda: made.make(key).to(dtype))

    return writing.write(
        out,
        [planned(key, shape) for key, shape in shapes.items()],
        record.documents(config, {"lineage": made.lineage()}),
        progress=advance,
    )
