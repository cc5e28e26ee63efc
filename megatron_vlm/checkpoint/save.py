"""Write a checkpoint: complete and checked under its name, or not there at all."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_format

from megatron_vlm.checkpoint import directory as names
from megatron_vlm.checkpoint import frozen, record, sharded, unpickle, verify
from megatron_vlm.checkpoint.agree import together
from megatron_vlm.config.schema import CheckpointConfig, Config


class SaveError(OSError):
    """A checkpoint could not be written. Those before it are as they were."""


def save(
    directory: str | Path,
    *,
    models: Sequence[Any],
    optimizer: Any | None,
    step: int,
    config: Config,
    state: dict[str, Any],
) -> Path:
    """Write `directory`/iter_<step>, make it the latest, give its path. Every rank calls it with the same arguments.

    models:    one per virtual pipeline stage, in data-parallel wrappers or not.
    optimizer: Megatron's optimizer; None = weights only.
    state:     what else a resume needs, the same on all ranks, as JSON can hold it (ValueError otherwise).
    Writes under another name, reads every byte back, then renames; removes checkpoints that `config.checkpoint` does
    not keep. Frozen parameters are written only if no part beside the checkpoints holds them. An error on any rank is
    an error on all, and leaves earlier checkpoints and `latest` as they were.
    """
    with together("preparing the checkpoint"):
        documents = record.documents(config, state)
    contents = sharded.build(models, optimizer, is_loading=False)
    return write(Path(directory), contents, documents, step, config.checkpoint)


def write(
    directory: Path,
    contents: dict[str, Any],
    documents: dict[str, str],
    step: int,
    kept: CheckpointConfig,
    *,
    group: dist.ProcessGroup | None = None,
) -> Path:
    """Write sharded `contents` and the text files `documents` as the checkpoint of `step`. Collective over `group`.

    group: of all ranks; None = the default group, and Megatron checks that every part of every tensor is written by
    exactly one rank. (With a group of its own, in a thread, it cannot: its check uses the default group.)
    """
    rank, needed = dist.get_rank(), 0
    try:
        with together("preparing the checkpoint", group):
            if rank == 0:
                names.begin(directory, step)
        needed = _bytes(contents, group)
        frozen_contents, contents = frozen.split(contents)
        reference = _store_frozen(directory, frozen_contents, step, group)
        needed = _bytes(contents, group)
        writing = names.writing_path(directory, step)
        _write_contents(writing, contents, documents, group)
        _check_written(writing, step, group, reference)
        with together("publishing the checkpoint", group):
            if rank == 0:
                names.publish(directory, step, kept)
                frozen.sweep(directory)
            return directory / names.name(step)
    except BaseException as error:
        if rank == 0:
            shutil.rmtree(names.writing_path(directory, step), ignore_errors=True)
        if isinstance(error, RuntimeError | OSError):
            failed = SaveError(f"there is no checkpoint of step {step}: {error} Earlier ones are untouched.")
            if rank == 0:  # which has just removed what was half-written
                failed.add_note(names.room(directory, needed))
            raise failed from error
        raise


def write_tensors(tensors: Any, directory: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write this rank's share of a sharded state in Megatron's torch_dist format. Collective over `group`.

    By torch's own writer in this process: Megatron's starts a manager process, which imports the main script again, and
    one process per file: seconds for a model that is written in milliseconds.
    """
    flat, _, _ = torch_format._replace_state_dict_keys_with_sharded_keys(tensors, True)
    torch_checkpoint.save(
        torch_format.mcore_to_pyt_state_dict(flat, False),
        storage_writer=torch_checkpoint.FileSystemWriter(directory),
        planner=torch_format.MCoreSavePlanner(flatten_state_dict=False),
        process_group=group,
    )


def _bytes(tensors: Any, group: dist.ProcessGroup | None) -> int:
    """What the tensors of a sharded state take on disk, each part counted once over all ranks. Collective."""
    found = sum(
        each.data.nbytes
        for each in sharded.tensors(tensors)
        if each.data is not None and is_main_replica(each.replica_id)
    )
    shares = [0] * dist.get_world_size()
    dist.all_gather_object(shares, found, group=group)
    return sum(shares)


def _store_frozen(directory: Path, contents: dict[str, Any], step: int, group: dist.ProcessGroup | None) -> str:
    """The reference to the part with these frozen parameters, which is written if there is none. Collective.

    Empty where no rank has any.
    """
    anywhere = [False] * dist.get_world_size()
    dist.all_gather_object(anywhere, bool(contents), group=group)
    mine = frozen.held(contents)
    reference = frozen.noted(directory, mine, group) if any(anywhere) else ""
    if reference or not any(anywhere):
        return reference
    writing = directory / ".writing-frozen"
    try:
        with together("preparing the checkpoint", group):
            if dist.get_rank() == 0:
                writing.mkdir()
        _write_contents(writing, contents, {}, group)
        _check_written(writing, step, group)
        with together("publishing the frozen weights", group):
            published = [frozen.publish(directory, writing) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(published, src=0, group=group)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(writing, ignore_errors=True)
    frozen.note(mine, published[0])
    return published[0]


def _write_contents(
    writing: Path, contents: dict[str, Any], documents: dict[str, str], group: dist.ProcessGroup | None
) -> None:
    """Write sharded `contents`, in Megatron's format, and text files into a directory. Collective over `group`."""
    with sharded.plain_errors(f"writing checkpoint {writing}", "Is the disk full?", RuntimeError):
        # Megatron's dist_checkpointing.save is these four parts, but leaves the other ranks waiting where rank 0
        # cannot write the common one (which Megatron-core 0.19 reads under this name, and would write elsewhere).
        tensors, common = save_preprocess(contents, validate_access_integrity=group is None)
        with together("writing the checkpoint", group):
            if dist.get_rank() == 0:
                torch.save(common, writing / "common.pt")
                save_config(CheckpointingConfig("torch_dist", 1), str(writing))
                for name, text in documents.items():
                    (writing / name).write_text(text, encoding="utf-8")
        write_tensors(tensors, writing, group)


def _check_written(writing: Path, step: int, group: dist.ProcessGroup | None, reference: str = "") -> None:
    """Read every file back, each rank its share, and write the manifest. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    with together("reading the checkpoint back", group):
        found = verify.files(writing)
        digests = {name: verify.digest(writing / name) for name in found[rank::world]}
    gathered: list[dict[str, Any]] = [{}] * world
    dist.all_gather_object(gathered, digests, group=group)
    with together("checking the checkpoint", group):
        if rank == 0:
            every = {name: digest for part in gathered for name, digest in part.items()}
            metadata = unpickle.read_metadata(writing, every)
            for index, place in metadata.storage_data.items():
                if place.offset + place.length > every[place.relative_path]["bytes"]:
                    raise RuntimeError(f"{index.fqn} was not written in full to {writing / place.relative_path}.")
            verify.write_manifest(writing, every, step, reference)
