"""Weights that a run does not train: written once, beside its checkpoints, which refer to them by hash.

checkpoints/frozen/<hash>/       a part: tensors in the checkpoints' format with a manifest of their own
checkpoints/iter_*/manifest.json names it by the SHA-256 of that manifest

A parameter remembers the part that it was written to or loaded from, so that only the first save of a run writes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.metadata import Metadata

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.checkpoint import sharded, verify
from megatron_vlm.checkpoint.sharded import State

#: Attribute of a parameter: (reference to a part, the parameter's version then).
_NOTE = "_stored_in_frozen_part"


@dataclass(frozen=True)
class Held:
    """The frozen parameters of this rank."""

    parameters: list[torch.nn.Parameter]
    dtypes: dict[str, torch.dtype]
    """By the names of their tensors in checkpoints."""


def split(contents: State) -> tuple[State, State]:
    """Sharded contents of a checkpoint as (frozen parameters, all else)."""
    return sharded.divide(contents, _frozen)


def _frozen(entry: Any) -> bool:
    data = entry.data if isinstance(entry, ShardedTensor | ShardedTensorFactory) else None
    return isinstance(data, torch.nn.Parameter) and not data.requires_grad


def held(frozen: State) -> Held:
    """What is in one half of `split`. To be asked before that is written or loaded, when Megatron replaces entries."""
    parameters = [entry.data for value in frozen.values() for entry in value.values()]
    return Held(parameters, {tensor.key: tensor.dtype for tensor in sharded.tensors(frozen)})


def note(mine: Held, reference: str) -> None:
    """These parameters are what the part holds."""
    for parameter in mine.parameters:
        setattr(parameter, _NOTE, (reference, parameter._version))


def note_loaded(mine: Held, metadata: Metadata, reference: str) -> None:
    """The same after loading, unless this run freezes other parameters, or has them in another dtype. Collective."""
    everywhere: list[dict[str, torch.dtype]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine.dtypes)
    stored = {name: entry.properties.dtype for name, entry in metadata.state_dict_metadata.items()}
    if {name: dtype for each in everywhere for name, dtype in each.items()} == stored:
        note(mine, reference)


def noted(directory: Path, mine: Held, group: dist.ProcessGroup | None) -> str:
    """The reference to the part in `directory` that holds these parameters of all ranks; empty = there is none.

    Collective. A parameter that was changed since it was noted is in none.
    """
    notes = [getattr(parameter, _NOTE, ("", -1)) for parameter in mine.parameters]
    known = {
        name if version == each._version else "" for (name, version), each in zip(notes, mine.parameters, strict=True)
    }
    known = {name if verify.is_frozen(directory, name) else "" for name in known}
    everywhere: list[set[str]] = [set()] * dist.get_world_size()
    dist.all_gather_object(everywhere, known, group=group)
    found = set().union(*everywhere)
    return found.pop() if len(found) == 1 else ""


def publish(directory: Path, writing: Path) -> str:
    """Give a part that was written and checked its name; the reference to it."""
    reference = verify.reference(writing)
    final = verify.frozen_path(directory, reference)
    final.parent.mkdir(exist_ok=True)
    writing.rename(final)
    names.sync(final.parent)
    names.sync(directory)
    return reference


def sweep(directory: Path) -> None:
    """Remove the parts that no checkpoint in `directory` refers to."""
    folder = directory / verify.FROZEN
    if not folder.is_dir():
        return
    try:
        references = [verify.read_manifest(path).get("frozen") for path in names.complete(directory)]
    except ValueError:
        return  # a damaged checkpoint may refer to any of them
    kept = {verify.frozen_path(directory, reference) for reference in references if reference}
    for path in folder.iterdir():
        if path not in kept:
            names.remove(path)
