"""The table of names with sizes and layer numbers filled in, and what it does with tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_vlm.config.architecture import Architecture
from megatron_vlm.convert import layout, names
from megatron_vlm.convert.names import Cell

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """A row with sizes and layer number filled in. `cells` have whole keys."""

    part: str
    shapes: tuple[Shape, ...]
    cells: Mapping[str, Cell]
    groups: int
    """Heads (key-value heads of the decoder), for interleaving."""
    patch_size: int
    copy: bool
    """A tied head: its megatron key is that of the embedding, which another entry fills."""

    def stored(self, form: str) -> dict[str, Shape]:
        """Tensors of this entry in a format, with their shapes."""
        cell = self.cells[form]
        if cell.layout == "each":
            return {key: shape for key, shape in zip(cell.keys, self.shapes, strict=True) if key}
        (key,) = cell.keys
        if cell.layout == "kernel":
            width, values = self.shapes[0]
            return {key: (width, values // self.patch_size**2, self.patch_size, self.patch_size)}
        return {key: (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])}

    def parts(self, form: str, read: Callable[[str], torch.Tensor]) -> list[torch.Tensor | None]:
        """The parts, from the tensors of a format; None where the format does not have one."""
        cell = self.cells[form]
        if cell.layout == "each":
            return [read(key) if key else None for key in cell.keys]
        whole, rows = read(cell.keys[0]), [shape[0] for shape in self.shapes]
        if cell.layout == "kernel":
            return [layout.from_kernel(whole)]
        if cell.layout == "joined":
            return list(layout.split(whole, rows, cell.order))
        return list(layout.separate(whole, rows, self.groups))

    def tensors(self, form: str, parts: Sequence[torch.Tensor | None]) -> dict[str, torch.Tensor]:
        """The tensors of a format, from the parts. A part that is None gives none."""
        cell = self.cells[form]
        if cell.layout == "each":
            return {key: part for key, part in zip(cell.keys, parts, strict=True) if key and part is not None}
        known = [part for part in parts if part is not None]
        assert len(known) == len(parts), f"{cell.keys[0]} needs all its parts"
        if cell.layout == "kernel":
            return {cell.keys[0]: layout.to_kernel(known[0], self.patch_size)}
        if cell.layout == "joined":
            return {cell.keys[0]: layout.join(known, cell.order)}
        return {cell.keys[0]: layout.interleave(known, self.groups)}


def entries(arch: Architecture) -> list[Entry]:
    """The table for one architecture: every tensor that its checkpoints have, but those of connectors other than
    attention_pooling, which no other format knows."""
    return list(_entries(arch))


def _entries(arch: Architecture) -> Iterator[Entry]:
    sizes, properties = _sizes(arch), _properties(arch)
    counts = {"": 1, "language": arch.language.layers, "vision": arch.tower_depth}
    groups = {"language": arch.language.kv_heads, "vision": arch.vision.heads, "connector": arch.connector.heads}
    for section in names.TABLE:
        for index in range(counts[section.layers]):
            prefixes = {form: prefix.format(i=index) for form, prefix in section.prefixes.items()}
            for row in section.rows:
                if row.only and row.only not in properties:
                    continue
                cells = {form: _whole(cell, prefixes[form]) for form, cell in row.cells.items()}
                shapes = tuple(tuple(sizes[letter] for letter in shape.split()) for shape in row.shapes.split(","))
                copy = section is names.HEAD and arch.language.tied_head
                if copy:
                    cells["megatron"] = names.each(names.EMBEDDING)
                yield Entry(section.part, shapes, cells, groups[section.part], arch.vision.patch_size, copy)


def _whole(cell: Cell, prefix: str) -> Cell:
    return Cell(tuple(prefix + key if key else "" for key in cell.keys), cell.layout, cell.order)


def _sizes(arch: Architecture) -> dict[str, int]:
    language, vision, connector = arch.language, arch.vision, arch.connector
    return {
        "d": language.hidden,
        "q": language.heads * language.head_dim,
        "k": language.kv_heads * language.head_dim,
        "h": language.head_dim,
        "m": language.mlp,
        "v": language.vocab_size,
        "n": language.new_rows,
        "w": vision.width,
        "f": vision.mlp,
        "s": vision.patches + vision.class_token,
        "x": vision.patch_values,
        "t": arch.feature_width,
        "c": connector.width,
        "p": connector.mlp,
    }


def _properties(arch: Architecture) -> set[str]:
    flags = {
        "qk_norm": arch.language.qk_norm,
        "qkv_bias": arch.language.qkv_bias,
        "patch_bias": arch.vision.patch_bias,
        "class_token": arch.vision.class_token,
        "pre_norm": arch.vision.pre_norm,
        "post_norm": arch.vision.post_norm and not arch.connector.taps,
        "attention_pooling": arch.connector.kind == "attention_pooling",
    }
    return {name for name, value in flags.items() if value}
