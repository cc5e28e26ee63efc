"""A checkpoint of the trainer -> folders that transformers (and what builds on it) loads with no code of ours."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from megatron_vlm.checkpoint import directory, verify
from megatron_vlm.config import load as config_load
from megatron_vlm.config.architecture import Architecture
from megatron_vlm.convert import card, describe, hf, names, processor
from megatron_vlm.convert.entries import Entry
from megatron_vlm.convert.entries import entries as table
from megatron_vlm.convert.hf import CONFIG, SHARD_BYTES, Planned
from megatron_vlm.data.tokens import Tokenizer

if TYPE_CHECKING:
    from megatron_vlm.convert.stored import Checkpoint

FORMATS = ("transformers", "hub", "parts", "language", "vision")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TORCH_NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}
Progress = Callable[[int, int], None]


def send(
    checkpoint: str | Path,
    out: str | Path,
    form: str = "transformers",
    *,
    dtype: str = "",
    tokenizer: str = "",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
    verifying: Future[None] | None = None,
) -> None:
    """Write a checkpoint's weights to the folder `out`.

    form:      transformers (Molmo2, native names), hub (Molmo2, names of the released checkpoints), parts (language
               model, vision tower and connector, each in a folder), language or vision (one of them alone).
    dtype:     bf16 or fp32; empty = as stored.
    tokenizer: tokenizer.json or its directory; empty = the one that the checkpoint's run used.
    verifying: `verify.verify` of the checkpoint where that has begun; the folder gets its name after it.
    Raises ValueError where Molmo2's classes cannot hold the model, `out` exists, or the checkpoint is damaged.
    """
    out = Path(out)
    if form not in FORMATS:
        raise ValueError(f"--format {form} does not exist; choose one of {', '.join(FORMATS)}.")
    if out.exists():
        raise ValueError(f"{out} exists. Give a directory that does not, or remove this one.")
    path = directory.find(checkpoint)
    with ThreadPoolExecutor(1) as thread:
        verifying = verifying or thread.submit(verify.verify, path)
        try:
            # It imports half of torch: beside the first hashes.
            from megatron_vlm.convert.stored import Checkpoint

            source = Checkpoint(path, verify_first=False)
            wanted = DTYPES[dtype] if dtype else None
            folder = _Folder(source, wanted, shard_bytes, progress, verifying.result)
            _send(source, out, form, wanted, tokenizer, folder)
        except Exception:
            # Where the checkpoint is damaged, that is the reason.
            verifying.result()
            raise


@dataclass
class _Folder:
    """Writes the folders of one export, and tells how far it is."""

    source: Checkpoint
    wanted: torch.dtype | None
    shard_bytes: int
    progress: Progress
    ready: Callable[[], None]
    done: int = 0

    def __call__(self, path: Path, tensors: list[Planned], documents: dict[str, str]) -> None:
        """Write one."""
        numbers = {key: torch.Size(shape).numel() for key, shape in self.source.shapes.items()}
        kind = self.wanted or next(iter(self.source.dtypes.values()))
        total = max(sum(numbers.values()) * kind.itemsize, self.done + sum(each.bytes for each in tensors))

        def advance(count: int) -> None:
            self.done += count
            self.progress(self.done, total)

        hf.write(path, tensors, documents, shard_bytes=self.shard_bytes, progress=advance, ready=self.ready)


def _send(
    source: Checkpoint, out: Path, form: str, wanted: torch.dtype | None, tokenizer: str, folder: _Folder
) -> None:
    arch = source.arch
    name = _TORCH_NAMES[wanted or source.dtypes["language.decoder.final_layernorm.weight"]]
    data = config_load.from_dict(source.record.config, f"in the checkpoint {source.path}").data
    tokenizer = tokenizer or data.tokenizer
    if form in ("language", "vision"):
        folder(out, *_single(source, form, wanted, name, tokenizer))
        return
    if form == "parts":
        _parts(source, out, folder, wanted, name, tokenizer)
        return
    _check_molmo2(arch)
    which = "native" if form == "transformers" else "hub"
    config = describe.native(arch, name) if which == "native" else describe.hub(arch, name)
    documents = {
        CONFIG: _json(config),
        **processor.tokenizer_files(tokenizer, arch),
        **processor.processor_files(arch, data),
        "README.md": card.molmo2(source, name, data.image_crops),
    }
    folder(out, _planned(source, which, table(arch), wanted), documents)


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"


def _check_molmo2(arch: Architecture) -> None:
    """Raises ValueError with what Molmo2's classes in transformers do not compute."""
    faults = {
        f"its connector is {arch.connector.kind}": arch.connector.kind != "attention_pooling",
        "its connector reads the last vision layer after its norm": not arch.connector.taps,
        "its vision tower has a class token (CLIP)": arch.vision.class_token,
        "its language model has no norm on queries and keys (Qwen2.5)": not arch.language.qk_norm,
    }
    found = [fault for fault, is_so in faults.items() if is_so]
    if found:
        raise ValueError(
            f"this model is no Molmo2: {'; '.join(found)}. Export it with --format parts: language model, vision tower "
            "and connector in a folder each."
        )


def _planned(source: Checkpoint, form: str, entries: Iterable[Entry], wanted: torch.dtype | None) -> list[Planned]:
    """The tensors of a format. Raises ValueError where the checkpoint lacks one or has it in another shape."""
    planned = []
    for entry in entries:
        if form not in entry.cells:
            continue
        for key, shape in entry.stored("megatron").items():
            if source.shapes.get(key) != shape:
                raise ValueError(
                    f"{source.path}: {key} is {source.shapes.get(key, 'missing')}, its architecture.json makes it "
                    f"{shape}."
                )
        dtype = wanted or source.dtypes[next(iter(entry.stored("megatron")))]
        made = _Made(source, entry, form)
        planned += [Planned(key, dtype, shape, _maker(made, key, dtype)) for key, shape in entry.stored(form).items()]
    return planned


@dataclass
class _Made:
    """An entry of the table in a format. Made at the first tensor asked for, dropped with the last."""

    source: Checkpoint
    entry: Entry
    form: str
    tensors: dict[str, torch.Tensor] | None = None
    lock: Lock = field(default_factory=Lock)

    def take(self, key: str) -> torch.Tensor:
        with self.lock:
            if self.tensors is None:
                self.tensors = self.entry.tensors(self.form, self.entry.parts("megatron", self.source.read))
            return self.tensors.pop(key)


def _maker(made: _Made, key: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: made.take(key).to(dtype)


def _single(
    source: Checkpoint, part: str, wanted: torch.dtype | None, dtype: str, tokenizer: str
) -> tuple[list[Planned], dict[str, str]]:
    """The language model or the vision tower alone: (tensors, documents)."""
    arch = source.arch
    mine = [entry for entry in table(arch) if entry.part == part]
    if part == "language":
        # A tied head is not stored: the class ties it.
        tensors = _planned(source, "qwen", [entry for entry in mine if not entry.copy], wanted)
        documents = {CONFIG: _json(describe.qwen(arch.language, dtype))}
        if tokenizer:
            documents["tokenizer.json"] = Tokenizer.load(tokenizer, arch.language).definition
        return tensors, {**documents, "README.md": card.part(source, part, dtype)}
    form = "clip" if arch.vision.class_token else "siglip"
    tensors = [
        Planned(f"vision_model.{each.key}", each.dtype, each.shape, each.make)
        for each in _planned(source, form, mine, wanted)
    ]
    stored = {each.key for each in tensors}
    if "vision_model.post_layernorm.weight" not in stored:
        # The class has a last norm, which this model never had: one that changes nothing but the scale.
        kind, shape = tensors[0].dtype, (arch.vision.width,)
        for leaf, value in (("weight", 1.0), ("bias", 0.0)):
            make = _constant(shape, value, kind)
            tensors.append(Planned(f"vision_model.post_layernorm.{leaf}", kind, shape, make))
    documents = {
        CONFIG: _json(describe.tower(arch, dtype)),
        "preprocessor_config.json": _json(processor.tower_preprocessor(arch.vision)),
        "README.md": card.part(source, part, dtype),
    }
    return tensors, documents


def _constant(shape: tuple[int, ...], value: float, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: torch.full(shape, value, dtype=dtype)


def _parts(
    source: Checkpoint,
    out: Path,
    folder: _Folder,
    wanted: torch.dtype | None,
    dtype: str,
    tokenizer: str,
) -> None:
    """Three folders. The connector keeps our names and layouts, which its README explains."""
    out.parent.mkdir(parents=True, exist_ok=True)
    writing = out.with_name(f".writing-{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        for part in ("language", "vision"):
            folder(writing / part, *_single(source, part, wanted, dtype, tokenizer if part == "language" else ""))
        own = [key for key in source.shapes if key.startswith("connector.") or key == names.NEW_ROWS]
        tensors = [
            Planned(key, kind, source.shapes[key], _reader(source, key, kind))
            for key in own
            for kind in [wanted or source.dtypes[key]]
        ]
        documents = {CONFIG: _json(source.record.architecture), "README.md": card.connector(source, dtype)}
        folder(writing / "connector", tensors, documents)
        os.rename(writing, out)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _reader(source: Checkpoint, key: str, dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    return lambda: source.read(key).to(dtype)
