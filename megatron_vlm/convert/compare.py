"""Two checkpoints of any kind side by side: architecture, every tensor, and what they answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_vlm.config import presets
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.convert import configs, probe
from megatron_vlm.convert.entries import Shape, entries
from megatron_vlm.convert.hf import CONFIG, DTYPES, read_json
from megatron_vlm.convert.plan import Source, has, plan, with_head
from megatron_vlm.convert.stored import Checkpoint
from megatron_vlm.data.tokens import Tokenizer

#: Which part of a model a format holds; the others hold all.
PART = {"qwen": "language", "siglip": "vision", "clip": "vision"}


@dataclasses.dataclass(frozen=True)
class Side:
    """One of the two: a checkpoint of the trainer, or a folder of Hugging Face."""

    path: Path
    form: str
    parts: Mapping[str, Any]
    """Its architecture's parts by name, as far as it has them."""
    tensors: Mapping[str, tuple[Shape, torch.dtype | str]]
    """Shape and dtype by its own key."""
    read: Callable[[str], torch.Tensor]
    source: Source | None
    tokenizer: str = ""
    """tokenizer.json or its folder, where the side says one."""

    @classmethod
    def open(cls, path: str | Path) -> Side:
        """A folder with a config.json that names a model type is one of Hugging Face, anything else a checkpoint."""
        path = Path(path)
        fields = read_json(path / CONFIG) if (path / CONFIG).is_file() else {}
        if "model_type" not in fields:
            found = Checkpoint(path)
            parts = {name: getattr(found.arch, name) for name in ("vision", "connector", "language")}
            tensors = {key: (shape, found.dtypes[key]) for key, shape in found.shapes.items()}
            tokenizer = found.record.config.get("data", {}).get("tokenizer", "")
            return cls(found.path, "megatron", parts, tensors, found.read, None, tokenizer)
        where = str(path / CONFIG)
        if fields["model_type"] == "molmo2":
            form, arch = configs.molmo2(fields, where)
            source = Source.open(path, form)
            arch = with_head(source, arch)
            parts = {name: getattr(arch, name) for name in ("vision", "connector", "language")}
        elif fields["model_type"] in ("qwen2", "qwen3"):
            form, parts = "qwen", {"language": configs.language(fields, where)}
            source = Source.open(path, form)
        else:
            form, tower = configs.vision(fields, where)
            parts, source = {"vision": tower}, Source.open(path, form)
        tensors = {
            key: (source.shape(key), DTYPES.get(dtype, dtype))
            for key, name in source.keys.items()
            for dtype in [source.weights.tensors[name].dtype]
        }
        tokenizer = str(path) if (path / "tokenizer.json").is_file() else ""
        return cls(path, form, parts, tensors, source.read, source, tokenizer)

    def as_megatron(
        self, other: Side
    ) -> tuple[dict[str, tuple[Shape, torch.dtype | str]], Callable[[str], torch.Tensor]]:
        """Its tensors under the names of our checkpoints. Parts that this side lacks are taken from the other.

        ValueError where tensors are missing, unknown or of another shape than its config.json says.
        """
        if self.source is None:
            return dict(self.tensors), self.read
        tiny = presets.PRESETS["tiny"]
        arch = Architecture(
            **{
                name: self.parts.get(name, other.parts.get(name, getattr(tiny, name)))
                for name in ("vision", "connector", "language")
            }
        )
        part = PART.get(self.form)
        shapes: dict[str, Shape] = {}
        dtypes: dict[str, torch.dtype | str] = {}
        for entry in entries(arch):
            if self.form in entry.cells and part in (None, entry.part) and not entry.copy:
                for key, shape in entry.stored("megatron").items():
                    if has(self.form, entry, key):
                        shapes[key] = shape
                        stored = next(iter(entry.stored(self.form)))
                        dtypes[key] = self.tensors[stored][1] if stored in self.tensors else "missing"
        made = plan(arch, [self.source], shapes, 0)
        return {key: (shape, dtypes[key]) for key, shape in shapes.items()}, made.make


def tensors(one: Side, other: Side, progress: Callable[[int], None] = lambda done: None) -> Iterator[str]:
    """The differences, a line each: in architecture, missing tensors, shapes, dtypes, values (the largest difference).

    The same format: by its own names. Two formats: by the names of our checkpoints, the parts that both have.
    """
    for part in one.parts.keys() & other.parts.keys():
        ignore = ("language.new_rows", "language.tied_head") if "qwen" in (one.form, other.form) else ()
        yield from (
            f"architecture: {line}"
            for line in configs.differences(one.parts[part], other.parts[part], f"{part}.", ignore)
        )
    (left, read_left), (right, read_right) = _views(one, other)
    partial = {side.form for side in (one, other)} & PART.keys()
    for key in [*left, *(key for key in right if key not in left)]:
        progress(1)
        if key not in left or key not in right:
            if not partial or one.form == other.form:
                yield f"{key}: only in {one.path if key in left else other.path}"
            continue
        if left[key][0] != right[key][0]:
            yield f"{key}: shape {list(left[key][0])} / {list(right[key][0])}"
            continue
        a, b = read_left(key), read_right(key)
        if a.dtype != b.dtype:
            yield f"{key}: dtype {a.dtype} / {b.dtype}"
        if not torch.equal(a, b):
            apart = (a.double() - b.double()).abs().max().item()
            yield f"{key}: values differ by up to {apart:.3g} (largest value {a.double().abs().max().item():.3g})"


def _views(one: Side, other: Side) -> tuple[Any, Any]:
    if one.form == other.form:
        return (one.tensors, one.read), (other.tensors, other.read)
    return one.as_megatron(other), other.as_megatron(one)


def count(one: Side, other: Side) -> int:
    """Tensors that `tensors` will look at."""
    (left, _), (right, _) = _views(one, other)
    return len(left.keys() | right.keys())


@dataclasses.dataclass(frozen=True)
class Apart:
    """How far two models are apart on a batch."""

    logits: float
    losses: float
    places: int
    largest: float
    """Largest logit of the first model."""


def logits(one: Side, other: Side, batch: str | Path = "", tokenizer: str | Path = "") -> Apart:
    """Run both in float32: our checkpoints by our model, packed into one row; folders by transformers, one by one.

    batch: a file as convert.given describes; empty = the built-in one, images and video only where both sides have a
    vision tower. tokenizer: of the texts in `batch`; empty = that of a side. Inside `answers.alone`.
    ValueError where a side has no language model, or no tower for what the batch shows.
    """
    # Only here: they need Megatron and video decoders, which take seconds to import.
    from megatron_vlm.convert import answers, given

    for side in (one, other):
        if "language" not in side.parts:
            raise ValueError(f"{side.path} has no language model, so there are no logits to compare.")
    images = all("vision" in side.parts for side in (one, other))
    whole = next((side for side in (one, other) if "vision" in side.parts), None)
    tiny = presets.PRESETS["tiny"]
    parts = whole.parts if whole else {"vision": tiny.vision, "connector": tiny.connector, **one.parts}
    arch = Architecture(**parts)
    if batch:
        setting = tokenizer or next((side.tokenizer for side in (one, other) if side.tokenizer), "")
        if not setting:
            raise ValueError("neither side says which tokenizer is the model's. Give one with --tokenizer.")
        chosen = given.read(batch, arch, Tokenizer.load(setting, arch.language))
        if not images and any(sample.layouts for sample in chosen):
            raise ValueError(f"{batch} has images or videos, but one of the sides has no vision tower.")
    else:
        chosen = probe.samples(arch, images=images)
    first, second = (
        answers.theirs(side.path, arch, chosen) if side.source else answers.ours(side.path, chosen)
        for side in (one, other)
    )
    if first.logits.shape != second.logits.shape:
        raise ValueError(
            f"{one.path} gives logits {list(first.logits.shape)}, {other.path} {list(second.logits.shape)}: their "
            "vocabularies differ."
        )
    return Apart(
        (first.logits - second.logits).abs().max().item(),
        (first.losses(chosen) - second.losses(chosen)).abs().max().item(),
        len(first.logits),
        first.logits.abs().max().item(),
    )
