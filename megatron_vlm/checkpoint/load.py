"""Read a checkpoint back, checked before anything in it is used, on any parallel layout."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.checkpoint import frozen, sharded, unpickle, verify
from megatron_vlm.checkpoint.agree import together
from megatron_vlm.checkpoint.directory import latest as latest
from megatron_vlm.checkpoint.record import Record as Record
from megatron_vlm.checkpoint.record import read as read
from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.model import scaling


def load(
    directory: str | Path,
    *,
    models: Sequence[Any],
    optimizer: Any | None = None,
    config: Config | None = None,
    verified: bool = False,
) -> dict[str, Any]:
    """Fill `models`, and `optimizer` if given, from the checkpoint at `directory`; gives `state` as it was saved.

    directory: a checkpoint, a directory of checkpoints or a run directory (then the newest).
    optimizer: None = weights only. If one exists already, call its `reload_model_params()` afterwards: it holds float32
               copies of the weights.
    config:    settings of this run; a checkpoint of another architecture is then refused with the fields that differ.
    verified:  `newest_sound` has just found it whole; files are not read twice.
    Every rank calls it. The layout may differ from the one that saved. Files are verified first; pickles are read by
    allow-list. Raises ValueError, on every rank, that names the file, field or tensor at fault; the models may be
    half-filled only if a disk fails while they are read.
    """
    with together("reading the checkpoint"):
        record = read(directory)
        if not verified:
            verify.verify(record.path, part=dist.get_rank(), parts=dist.get_world_size())
        if config is not None:
            check_architecture(record, config)
        folders = unpickle.read_folders(record.path)
    contents = sharded.build(models, optimizer, is_loading=True)
    needed = {tensor.key: tuple(tensor.global_shape) for tensor in sharded.tensors(contents)}
    everywhere: list[dict[str, tuple[int, ...]]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everywhere, needed)
    stored = {
        name: tuple(entry.size)
        for _, metadata in folders
        for name, entry in metadata.state_dict_metadata.items()
        if hasattr(entry, "size")
    }
    if optimizer is None:
        stored = {name: shape for name, shape in stored.items() if not name.startswith(sharded.OPTIMIZER)}
    wanted = {name: shape for each in everywhere for name, shape in each.items()}
    fp8 = sharded.SCALES_KEYS
    scales = {name: wanted.pop(name) for name in list(wanted) if name.startswith(fp8)}
    if any(stored.get(name) != shape for name, shape in scales.items()):
        contents.pop(sharded.SCALES, None)  # a run that had none, in bf16 for instance: they are seen anew
        scaling.begin(models)
    stored = {name: shape for name, shape in stored.items() if not name.startswith(fp8)}
    _check_tensors(record.path, wanted, stored)
    reading = sharded.plain_errors(f"reading checkpoint {record.path}", "Use another checkpoint.", ValueError)
    beside = {name for _, metadata in folders[1:] for name in metadata.state_dict_metadata}
    shared, own = sharded.divide(contents, lambda entry: any(each.key in beside for each in sharded.tensors([entry])))
    mine = frozen.held(frozen.split(contents)[0])
    moments = [tensor.data for tensor in sharded.tensors(contents.get("optimizer", {}))]
    with unpickle.only_weights(), reading:
        loaded = dist_checkpointing.load(own, str(record.path))
        for path, _ in folders[1:]:
            for name, tensors in dist_checkpointing.load(shared, str(path)).items():
                loaded.setdefault(name, {}).update(tensors)
    for index, model in enumerate(models):
        bare, found = sharded.unwrap(model), loaded.get(f"model{index}", {})
        # None: Transformer Engine's layers keep what they have.
        extra = {name: None for name in bare.state_dict() if name.endswith("_extra_state")}
        bare.load_state_dict(extra | found, strict=True)
    for name, tensor in scaling.delayed(models) if sharded.SCALES in loaded else ():
        tensor.copy_(loaded[sharded.SCALES][name])
    for path, metadata in folders[1:]:
        frozen.note_loaded(mine, metadata, verify.reference(path))
    if optimizer is not None and sharded.trains(optimizer):
        sharded.fill_optimizer(optimizer, loaded["optimizer"], moments)
    return record.state


def newest_sound(directory: Path) -> tuple[Path | None, list[str]]:
    """The latest checkpoint of `directory` that is whole, or the newest before it that is; None where none is there.

    Beside it, what is wrong with those passed over. Every rank reads its share and all come to the same answer.
    Raises ValueError where there are checkpoints and none is whole.
    """
    latest = names.latest(directory)
    if latest is None:
        return None, []
    faults: list[str] = []
    known: set[Path] = set()
    for path in [latest, *(path for path in reversed(names.complete(directory)) if path != latest)]:
        try:
            with together("verifying a checkpoint"):
                verify.verify(path, part=dist.get_rank(), parts=dist.get_world_size(), known=known)
                read(path)
            return path, faults
        except ValueError as error:
            faults.append(str(error))
    raise ValueError(f"no checkpoint in {directory} is whole:" + "".join(f"\n  - {fault}" for fault in faults))


def check_architecture(record: Record, config: Config) -> None:
    """Raises ValueError with the fields in which the checkpoint's model and the one of `config` differ.

    How many patches are pooled does not count: no weight knows of it.
    """
    wanted = _flat(json.loads(json.dumps(dataclasses.asdict(presets.architecture(config.model)))))
    found = _flat(record.architecture)
    different = [
        f"{name} is {found.get(name, 'not set')!r} there and {wanted.get(name, 'not set')!r} here"
        for name in dict.fromkeys([*found, *wanted])
        if found.get(name) != wanted.get(name) and name not in ("connector.image_pool", "connector.video_pool")
    ]
    if different:
        raise ValueError(
            f"checkpoint {record.path} holds another model: {'; '.join(different)}. Set model.preset and "
            f"model.connector as in the run that wrote it (preset {record.config.get('model', {}).get('preset')!r})."
        )


def _check_tensors(path: Path, needed: dict[str, tuple[int, ...]], stored: dict[str, tuple[int, ...]]) -> None:
    """Raises ValueError unless the checkpoint holds exactly the tensors that are needed, in the same shapes."""
    missing = [name for name in needed if name not in stored]
    unused = [name for name in stored if name not in needed]
    reshaped = [name for name in needed if name in stored and stored[name] != needed[name]]
    faults = []
    if missing:
        faults.append(f"{len(missing)} tensors are missing in it (first: {missing[0]})")
    if unused:
        faults.append(f"{len(unused)} tensors in it have no place in this run (first: {unused[0]})")
    if reshaped:
        first = reshaped[0]
        faults.append(
            f"{len(reshaped)} tensors have other shapes (first: {first}, {stored[first]} there, {needed[first]} here)"
        )
    if not faults:
        return
    advice = "Set the model up as in the run that wrote it."
    if all(name.startswith(sharded.OPTIMIZER) for name in missing + unused + reshaped):
        advice = (
            "The optimizer's state does not fit: resume with the same model.freeze, or start a new run from these "
            "weights with init.checkpoint."
        )
    raise ValueError(f"checkpoint {path} does not fit: {'; '.join(faults)}. {advice}")


def _flat(fields: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
