"""Which tensor of a checkpoint comes from which tensor of which folder. Every source tensor once, every target once."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.convert import names
from megatron_vlm.convert.entries import Entry, Shape, entries
from megatron_vlm.convert.hf import CONFIG, DTYPES, Weights, read_json
from megatron_vlm.model.initial import initial
from megatron_vlm.plan import params

#: The form of a folder with our own names and layouts: a connector that no class in transformers has.
OWN = "own"
#: Rows compared at once where a stored head must equal the embedding.
ROWS = 8192


@dataclass(frozen=True)
class Source:
    """A folder in one of the formats of the table."""

    form: str
    weights: Weights
    keys: Mapping[str, str]
    """The table's keys -> the keys in the files, which may have a prefix more or less."""
    config: Mapping[str, Any]

    @classmethod
    def open(cls, directory: str | Path, form: str) -> Source:
        """Read and check the folder's headers and its config.json."""
        weights = Weights(directory)
        found = list(weights.tensors)
        if form == "qwen" and not any(key.startswith("model.") for key in found):
            keys = {key if key.startswith("lm_head.") else f"model.{key}": key for key in found}
        elif form in ("siglip", "clip"):
            keys = {key.removeprefix("vision_model."): key for key in found}
        else:
            keys = {key: key for key in found}
        return cls(form, weights, keys, read_json(weights.directory / CONFIG))

    def read(self, key: str) -> torch.Tensor:
        """A tensor by the table's key."""
        return self.weights.read(self.keys[key])

    def shape(self, key: str) -> Shape:
        return self.weights.tensors[self.keys[key]].shape


@dataclass
class Plan:
    """Where every tensor of a checkpoint comes from."""

    arch: Architecture
    seed: int
    shapes: dict[str, Shape]
    """Tensors that the model needs."""
    origins: dict[str, tuple[Source, Entry | None]] = field(default_factory=dict)
    """Those with a source; without an entry of the table where the source has our own names."""
    drawn: list[str] = field(default_factory=list)
    """Those with initial weights."""
    dropped: dict[str, dict[str, str]] = field(default_factory=dict)
    """Source tensors without a place, by folder, with the reason."""

    def lineage(self) -> dict[str, Any]:
        """The manifest: every source tensor once, every target once."""
        sources = {id(source): source for source, _ in self.origins.values()}.values()
        used: dict[str, dict[str, list[str]]] = {}
        for target, (source, entry) in self.origins.items():
            for key in entry.stored(source.form) if entry else [target]:
                used.setdefault(str(source.weights.directory), {}).setdefault(source.keys[key], []).append(target)
        return {
            "sources": [
                {
                    "directory": str(source.weights.directory),
                    "format": source.form,
                    "files": {name: (source.weights.directory / name).stat().st_size for name in source.weights.files},
                    "config": dict(source.config),
                    "used": used[str(source.weights.directory)],
                    "dropped": self.dropped[str(source.weights.directory)],
                }
                for source in sources
            ],
            "drawn": {"seed": self.seed, "tensors": self.drawn},
        }

    def make(self, target: str) -> torch.Tensor:
        """The whole value of a target, in the source's dtype."""
        if target not in self.origins:
            drawn = initial(target, self.shapes[target], self.seed, self.arch.init_std)
            return torch.ones(self.shapes[target]) if drawn is None else drawn
        source, entry = self.origins[target]
        if entry is None:
            return source.read(target)
        return entry.tensors("megatron", entry.parts(source.form, source.read))[target]


def tensors(arch: Architecture) -> dict[str, Shape]:
    """The tensors of a checkpoint of this model, by name. The table has all but other connectors than Molmo2's."""
    whole = params.of_stage(arch, params.Stage(first=True, last=True, layers=arch.language.layers), 1)
    shapes = {
        key: shape for entry in entries(arch) if not entry.copy for key, shape in entry.stored("megatron").items()
    }
    return shapes | {each.name: each.shape for each in whole if each.name.startswith("connector.")}


def plan(arch: Architecture, sources: Sequence[Source], shapes: Mapping[str, Shape], seed: int) -> Plan:
    """Find the source of every tensor. Reads only heads that must equal embeddings.

    Raises ValueError that names the tensor and both sides: a tensor that is missing, without a place, of another shape
    or dtype; a head that should equal the embedding and does not.
    """
    made = Plan(arch, seed, dict(shapes))
    table = entries(arch)
    for source in sources:
        if source.form == OWN:
            _take_own(source, made)
            continue
        mine = [entry for entry in table if source.form in entry.cells]
        _check(source, mine, arch, made)
        for entry in mine:
            if entry.copy:
                _check_head(source, entry, table)
                continue
            for target in entry.stored("megatron"):
                if has(source.form, entry, target):
                    assert target not in made.origins, f"{target} has two sources"
                    made.origins[target] = source, entry
    for target, shape in shapes.items():
        if target in made.origins:
            continue
        if not target.startswith(("connector.", names.NEW_ROWS)):
            raise ValueError(f"no source holds {target} {list(shape)} of the model. Give the folder that does.")
        made.drawn.append(target)
    for target, (source, origin) in made.origins.items():
        if origin is not None and shapes.get(target) != origin.stored("megatron")[target]:
            raise ValueError(
                f"{target} is {origin.stored('megatron')[target]} from {source.weights.directory}, but the model has "
                f"{shapes.get(target, 'no such tensor')}."
            )
    return made


def _take_own(source: Source, made: Plan) -> None:
    """A connector and new rows under our own names and layouts."""
    where = source.weights.directory
    made.dropped[str(where)] = {}
    for key in source.keys:
        if source.shape(key) != made.shapes.get(key):
            raise ValueError(
                f"{where}: {key} is {list(source.shape(key))}, the model has {made.shapes.get(key, 'no such tensor')}. "
                "Choose connector, vision layers and preset as in the model that it was exported from."
            )
        made.origins[key] = source, None
    missing = [key for key in made.shapes if key.startswith("connector.") and key not in source.keys]
    if missing:
        raise ValueError(f"{where}: {missing[0]} {list(made.shapes[missing[0]])} of the connector is missing.")


def has(form: str, entry: Entry, target: str) -> bool:
    """Whether the format holds the part that fills `target`: Qwen has no new rows."""
    cell = entry.cells[form]
    return cell.layout != "each" or all(cell.keys) or bool(cell.keys[entry.cells["megatron"].keys.index(target)])


def _check(source: Source, mine: list[Entry], arch: Architecture, made: Plan) -> None:
    expected = {key: shape for entry in mine for key, shape in entry.stored(source.form).items()}
    optional = {key for entry in mine if entry.copy for key in entry.stored(source.form)}
    where = source.weights.directory
    dropped = {
        key: reason
        for key in source.keys
        if key not in expected and (reason := _drop_reason(source.form, key, arch.tower_depth))
    }
    made.dropped[str(where)] = {source.keys[key]: reason for key, reason in dropped.items()}
    unknown = [key for key in source.keys if key not in expected and key not in dropped]
    for key, shape in expected.items():
        if key not in source.keys and key not in optional:
            near = difflib.get_close_matches(key, unknown, 1)
            hint = f" Is it {source.keys[near[0]]}, which has no place in the model?" if near else ""
            raise ValueError(f"{where} ({source.form}): tensor {key} {list(shape)} is missing.{hint}")
    if unknown:
        raise ValueError(
            f"{where} ({source.form}): {len(unknown)} tensors have no place in the model; the first is "
            f"{source.keys[unknown[0]]} {list(source.shape(unknown[0]))}. Is this the model that its config.json says?"
        )
    for key, shape in expected.items():
        if key not in source.keys:
            continue
        stored = source.weights.tensors[source.keys[key]]
        if stored.shape != shape:
            raise ValueError(
                f"{where} ({source.form}): tensor {source.keys[key]} is {list(stored.shape)}, the model needs "
                f"{list(shape)}."
            )
        if stored.dtype not in DTYPES:
            raise ValueError(
                f"{where} ({source.form}): tensor {source.keys[key]} is {stored.dtype}; {', '.join(DTYPES)} are "
                "converted."
            )


def _drop_reason(form: str, key: str, layers: int) -> str:
    for pattern, reason in names.DROPPED[form]:
        if re.fullmatch(pattern, key):
            layer = re.match(r"encoder\.layers\.(\d+)\.", key)
            if layer is None or int(layer.group(1)) >= layers:
                return reason
    return ""


def _check_head(source: Source, entry: Entry, table: list[Entry]) -> None:
    """A stored head of a model with a tied one must be the embedding, bit for bit."""
    (head,) = entry.stored(source.form)
    if head in source.keys and not _tied(source, head, table):
        raise ValueError(
            f"{source.weights.directory}: {source.keys[head]} differs from the base rows of the embedding, but the "
            "model has a tied head. Choose a preset with a head of its own."
        )


def _tied(source: Source, head: str, table: Sequence[Entry]) -> bool:
    """Whether a stored head equals the base rows of the embedding."""
    embedding = next(entry for entry in table if names.NEW_ROWS in entry.stored("megatron"))
    key, rows = next(iter(embedding.stored(source.form))), embedding.shapes[0][0]
    one, other = source.read(head), source.read(key)
    # In pieces: the pages of a mapped file are dropped as others are read.
    return all(torch.equal(one[at : at + ROWS], other[at : min(at + ROWS, rows)]) for at in range(0, rows, ROWS))


def with_head(source: Source, arch: Architecture) -> Architecture:
    """The architecture of a Molmo2 folder, its head tied where none is stored or the stored one is the embedding."""
    tied = "lm_head.weight" not in source.keys or _same_head(source, arch)
    return dataclasses.replace(arch, language=dataclasses.replace(arch.language, tied_head=tied))


def _same_head(source: Source, arch: Architecture) -> bool:
    table = entries(arch)
    embedding = next(entry for entry in table if names.NEW_ROWS in entry.stored("megatron"))
    stored = embedding.stored(source.form)
    rows = arch.language.vocab_size
    fits = all(key in source.keys and source.shape(key) == shape for key, shape in stored.items())
    # Where shapes are wrong, `plan` says so.
    return fits and source.shape("lm_head.weight")[:1] == (rows,) and _tied(source, "lm_head.weight", table)
