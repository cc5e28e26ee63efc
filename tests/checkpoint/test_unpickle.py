"""Checkpoints from strangers: a pickle that would run code is refused in each of the three places where one can be."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from megatron_vlm.checkpoint import unpickle, verify
from megatron_vlm.parallel.layout import Layout
from tests.checkpoint import toy


class Touch:
    """Unpickled, it creates a file: the stand-in for any code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def sign(path: Path) -> None:
    """The attacker's manifest is in order."""
    verify.write_manifest(path, {name: verify.digest(path / name) for name in verify.files(path)}, 1)


def save(directory: Path) -> None:
    from megatron_vlm.checkpoint import save

    models, _ = toy.build(Layout(1))
    save.save(directory, models=models, optimizer=None, step=1, config=toy.config(), state={})


def load(path: Path) -> None:
    from megatron_vlm.checkpoint import load

    models, _ = toy.build(Layout(1))
    load.load(path, models=models)


@pytest.fixture(scope="module")
def saved(pool, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    pool(1).run(save, directory)
    return directory / "iter_0000001"


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / saved.name)


def test_untouched_checkpoint_loads(pool, copy):
    sign(copy)
    pool(1).run(load, copy)


def test_hostile_metadata(pool, copy, tmp_path):
    mark = tmp_path / "ran"
    (copy / ".metadata").write_bytes(pickle.dumps(Touch(mark)))
    sign(copy)
    with pytest.raises(RuntimeError, match=r"ValueError: \S+/.metadata asks for pathlib.\S+|builtins.getattr"):
        pool(1).run(load, copy)
    assert not mark.exists()
    pickle.loads((copy / ".metadata").read_bytes())
    assert mark.exists(), "the attack itself must work, or this test shows nothing"


def test_hostile_common_state(pool, copy, tmp_path):
    mark = tmp_path / "ran"
    torch.save({"optimizer": Touch(mark)}, copy / "common.pt")
    sign(copy)
    with pytest.raises(RuntimeError, match="ValueError: reading checkpoint .* loading that could run code"):
        pool(1).run(load, copy)
    assert not mark.exists()
    torch.load(copy / "common.pt", weights_only=False)
    assert mark.exists()


def hostile_object(directory: Path, mark: Path, guarded: bool) -> bool:
    """Save an object that runs code where a layer's extra state would be, load it; whether the code ran."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing import ShardedObject

    from megatron_vlm.checkpoint.save import write_tensors

    def entry(value: object) -> dict[str, ShardedObject]:
        return {"state": ShardedObject("layer._extra_state", value, (1,), (0,), replica_id=0)}

    directory.mkdir()
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    write_tensors(entry(Touch(mark)), directory)
    if not guarded:
        dist_checkpointing.load(entry(None), str(directory))
        return mark.exists()
    try:
        with unpickle.only_weights():
            dist_checkpointing.load(entry(None), str(directory))
    except CheckpointException as error:
        assert "Weights only load failed" in str(error), error
        return mark.exists()
    raise AssertionError("the object was loaded")


def test_hostile_object_among_the_tensors(pool, tmp_path):
    assert pool(1).run(hostile_object, tmp_path / "unguarded", tmp_path / "mark", False) == [True]
    assert pool(1).run(hostile_object, tmp_path / "guarded", tmp_path / "mark2", True) == [False]


def write(directory: Path, data: bytes) -> Path:
    (directory / ".metadata").write_bytes(data)
    return directory


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "builtins.getattr", "torch.load", "torch.hub.load", "collections.OrderedDict.copy"],
)
def test_only_listed_names_are_resolved(tmp_path, name):
    module, _, attribute = name.partition(".")
    data = (
        b"\x80\x04\x8c"
        + bytes([len(module)])
        + module.encode()
        + b"\x8c"
        + bytes([len(attribute)])
        + attribute.encode()
    )
    with pytest.raises(ValueError, match=f"asks for {name}"):
        unpickle.read_metadata(write(tmp_path, data + b"\x93."), [])


def test_metadata_cannot_point_outside_the_checkpoint(saved, tmp_path):
    metadata = unpickle.read_metadata(saved, verify.files(saved))
    place = next(iter(metadata.storage_data.values()))
    for path in ("../x", "/etc/passwd", "unlisted.distcp"):
        place.relative_path = path
        with pytest.raises(ValueError, match=f"points to '{path}', which is not a file of the checkpoint"):
            unpickle.read_metadata(write(tmp_path, pickle.dumps(metadata)), verify.files(saved))


def test_damaged_metadata_is_named(tmp_path):
    good = pickle.dumps(Metadata({}))
    for data in (b"", good[:-5], b"\x80\x05N.", good.replace(b"Metadata", b"Metadatb")):
        with pytest.raises(ValueError, match=r"\.metadata"):
            unpickle.read_metadata(write(tmp_path, data), [])
    with pytest.raises(ValueError, match="has no .metadata"):
        unpickle.read_metadata(tmp_path / "none", [])


def test_environment_cannot_switch_the_guard_off(monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    data = io.BytesIO()
    torch.save(Touch(Path("never")), data)
    with unpickle.only_weights(), pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(io.BytesIO(data.getvalue()), weights_only=False)
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1" and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
