"""Load a trained model from a checkpoint of any parallel layout, and ask it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_vlm.checkpoint import load as checkpoint
from megatron_vlm.config import load as config_load
from megatron_vlm.config import presets, rules
from megatron_vlm.config.schema import Config
from megatron_vlm.data import manifest as manifests
from megatron_vlm.data.example import Example
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tokens import Tokenizer
from megatron_vlm.data.tree import TreeSettings
from megatron_vlm.evaluate import tasks
from megatron_vlm.evaluate.decode import decode
from megatron_vlm.model.build import build
from megatron_vlm.model.vlm import VlmModel
from megatron_vlm.parallel.layout import Layout


@dataclass(frozen=True)
class Trained:
    """A model with what belongs to it."""

    config: Config
    model: VlmModel
    tree: TreeSettings
    device: torch.device
    path: Path
    step: int

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the run that trained it."""
        return self.tree.tokenizer


def load(checkpoint_path: str | Path, *, trained: bool = True, tensor: int = 1, pipeline: int = 1) -> Trained:
    """The model of a checkpoint, of a folder of checkpoints or of a run (the newest), or this rank's part of it.

    The groups of this layout exist, data-parallel copies for what it leaves of the world; it need not be the one that
    saved.
    trained: False leaves the random weights that the run began with: what it could do before training.
    Raises ValueError where there is no checkpoint, or it does not hold the model that its settings describe.
    """
    record = checkpoint.read(checkpoint_path)
    config = config_load.from_dict(record.config, f"in the checkpoint {record.path}")
    config = config.alone()
    parallel = dataclasses.replace(config.parallel, tensor=tensor, pipeline=pipeline)
    # Scores during training have rules of their own about layouts.
    config = dataclasses.replace(config, parallel=parallel, eval=dataclasses.replace(config.eval, tasks=()))
    rules.check(config, tensor * pipeline)  # a copy of the model: what trains it divides a batch among the copies
    arch = presets.architecture(config.model)
    checkpoint.check_architecture(record, config)
    (model,) = build(config, Layout(dist.get_world_size(), tensor, pipeline=pipeline))
    if trained:
        checkpoint.load(record.path, models=[model], config=config)
    tree = TreeSettings.of(config.data, Tokenizer.load(config.data.tokenizer, arch.language), arch)
    device = torch.device(torch.cuda.current_device())
    return Trained(config, model, tree, device, record.path, record.step if trained else 0)


def manifest(config: Config) -> Shards:
    """The shards that the run was trained on."""
    return Shards(manifests.directory(config.data.manifest))


def answers(
    trained: Trained,
    shards: Shards,
    samples: Sequence[Example],
    max_new_tokens: int,
    progress: Callable[[int], None] = lambda finished: None,
) -> list[list[str]]:
    """The model's words for each sample and branch."""
    prompts = [tasks.prompt(one, shards, trained.tree) for one in samples]
    ids = decode(
        trained.model,
        prompts,
        trained.tokenizer,
        max_new_tokens=max_new_tokens,
        device=trained.device,
        progress=progress,
    )
    return [[trained.tokenizer.decode(answer) for answer in row] for row in ids]
