"""Saving: whole or not at all, in this process, and damage is found before anything is loaded."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_vlm.checkpoint import verify
from megatron_vlm.config.schema import CheckpointConfig
from megatron_vlm.parallel.layout import Layout
from tests.checkpoint import toy


def write(directory: Path, steps: tuple[int, ...], kept: CheckpointConfig) -> list[str]:
    """Save at each step; names in the directory afterwards."""
    import psutil
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from megatron_vlm.checkpoint import save

    models, optimizer = toy.build(Layout(2, tensor=2))
    config = toy.config(checkpoint=kept)
    for step in steps:
        path = save.save(directory, models=models, optimizer=optimizer, step=step, config=config, state={"step": step})
        assert path == directory / f"iter_{step:07d}"
    assert not psutil.Process().children() and filesystem_async._results_queue is None, "saving started a process"
    dist.barrier()
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory) -> Path:
    """One checkpoint, not to be changed."""
    directory = tmp_path_factory.mktemp("saved")
    pool(2).run(write, directory, (4,), CheckpointConfig())
    return directory / "iter_0000004"


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """One checkpoint, to be damaged."""
    return shutil.copytree(saved, tmp_path / saved.name)


def test_keeps_the_newest_and_starts_no_process(pool, tmp_path):
    names = ["iter_0000002", "iter_0000003", "latest"]
    assert pool(2).run(write, tmp_path, (1, 2, 3), CheckpointConfig(keep=2)) == [names, names]


def test_every_file_is_in_the_manifest(saved):
    entries = verify.read_manifest(saved)["files"]
    assert set(entries) == set(verify.files(saved)) >= {".metadata", "common.pt", "state.json", "architecture.json"}
    verify.verify(saved)


def fail(directory: Path, where: str, rank: int) -> str:
    """Save once, then again with a failure planted on one rank; what this rank raised."""
    from megatron_vlm.checkpoint import save

    models, optimizer = toy.build(Layout(2, tensor=2))
    arguments: dict[str, Any] = {"models": models, "optimizer": optimizer, "config": toy.config()}
    save.save(directory, step=1, state={}, **arguments)
    state: dict[str, Any] = {}
    module, name = {
        "manifest": (save.verify, "write_manifest"),
        "data": (save.torch_checkpoint.FileSystemWriter, "write_data"),
        "short": (save.torch_checkpoint.FileSystemWriter, "write_data"),
        "state": (None, ""),
    }[where]

    def broken(*arguments: Any, **options: Any) -> Any:
        if where != "short":
            raise OSError(28, "No space left on device")
        # A file system that loses the end of a file and says nothing.
        written = original(*arguments, **options)
        written.wait()
        (path,) = (directory / ".writing-iter_0000002").glob(f"__{rank}_*.distcp")
        os.truncate(path, path.stat().st_size - 1)
        return written

    if dist.get_rank() == rank:
        if module is None:
            state = {"tuple": (1, 2)}
        else:
            original = getattr(module, name)
            setattr(module, name, broken)
    try:
        save.save(directory, step=2, state=state, **arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        if dist.get_rank() == rank and module is not None:
            setattr(module, name, original)
    return "nothing"


@pytest.mark.parametrize(
    ("where", "rank", "message"),
    [
        ("manifest", 0, "No space left"),
        ("data", 1, "No space left"),
        ("short", 1, "was not written in full to "),
        ("state", 1, "does not come back equal from JSON"),
    ],
)
def test_failure_anywhere_fails_everywhere_and_leaves_nothing(pool, tmp_path, where, rank, message):
    for raised in pool(2).run(fail, tmp_path, where, rank):
        assert message in raised
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", "latest"]
    assert (tmp_path / "latest").read_text() == "iter_0000001\n"
    verify.verify(tmp_path / "iter_0000001")


def load(path: Path) -> None:
    from megatron_vlm.checkpoint import load

    models, optimizer = toy.build(Layout(2, tensor=2))
    load.load(path, models=models, optimizer=optimizer)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "common.pt", "architecture.json", "metadata.json"])
def test_one_changed_bit_is_found_and_the_file_named(copy, name):
    flip(copy / name)
    with pytest.raises(ValueError, match=rf"iter_0000004 is damaged: the contents of {name} are not what was written"):
        verify.verify(copy)


def test_damage_stops_loading_on_every_rank(pool, copy):
    flip(copy / "__1_0.distcp")
    # Rank 0 and rank 1 hash different files; the one that did not see it raises too, or it would wait for ever.
    with pytest.raises(RuntimeError, match="ValueError:.*is damaged: the contents of __1_0.distcp"):
        pool(2).run(load, copy, timeout_s=20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda path: (path / "extra.pt").touch(), "extra.pt does not belong there"),
        (lambda path: (path / "__0_0.distcp").write_bytes(b"short"), "__0_0.distcp has 5 bytes"),
        (lambda path: (path / "manifest.json").unlink(), "has no manifest.json"),
        (lambda path: (path / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ],
    ids=["missing", "extra", "short", "no manifest", "not JSON", "not a manifest"],
)
def test_other_damage_is_named(copy, change, message):
    change(copy)
    with pytest.raises(ValueError, match=message):
        verify.verify(copy)


def test_links_and_paths_that_leave_the_checkpoint_are_refused(copy, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(copy / "common.pt", outside)
    (copy / "common.pt").symlink_to(outside)
    with pytest.raises(ValueError, match="common.pt is not a regular file"):
        verify.verify(copy)
    text = (copy / "manifest.json").read_text()
    for name in ("../outside", "/etc/passwd", ".."):
        (copy / "manifest.json").write_text(text.replace('"common.pt"', f'"{name}"'))
        with pytest.raises(ValueError, match="not a file of the checkpoint"):
            verify.verify(copy)
