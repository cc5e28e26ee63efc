"""Frozen weights are written once, every checkpoint refers to them, and whoever reads one gets them."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_vlm.checkpoint import unpickle, verify, whole
from megatron_vlm.config.schema import CheckpointConfig
from megatron_vlm.parallel.layout import Layout
from tests.checkpoint import toy
from tests.checkpoint.test_load import check_same_everywhere, differing, tensors
from tests.checkpoint.test_save import flip
from tests.checkpoint.test_unpickle import Touch, sign

TENSOR, DATA = Layout(2, tensor=2), Layout(2)
EMBEDDING = "embedding.word_embeddings.weight"
FROZEN = ("embedding", "layers")


def settings(keep: int = 0) -> Any:
    return toy.config(checkpoint=CheckpointConfig(keep=keep))


def train(directory: Path, steps: int) -> list[float]:
    """Save after each step; the losses."""
    from megatron_vlm.checkpoint import save

    models, optimizer = toy.build(TENSOR, frozen=FROZEN)
    losses = []
    for number in range(1, steps + 1):
        losses.append(toy.step(models, optimizer, number, TENSOR))
        save.save(directory, models=models, optimizer=optimizer, step=number, config=settings(), state={})
    return losses


def resume(layout: Layout, directory: Path, steps: int) -> tuple[list[float], list[str]]:
    """Go on in `directory` to `steps`, and save; losses, and what the first save after loading has other."""
    from megatron_vlm.checkpoint import load, save

    models, optimizer = toy.build(layout, frozen=FROZEN, seed=99)
    record = load.read(directory)
    load.load(directory, models=models, optimizer=optimizer)
    common: dict[str, Any] = {"models": models, "optimizer": optimizer, "config": settings(), "state": {}}
    again = save.save(directory, step=steps + 1, **common)
    changed = differing(record.path, again)
    losses = [toy.step(models, optimizer, number, layout) for number in range(record.step + 1, steps + 1)]
    save.save(directory, step=steps, **common)
    return losses, changed


@pytest.fixture(scope="module")
def trained(pool, tmp_path_factory) -> tuple[Path, list[float]]:
    """Checkpoints after steps 1 to 4, not to be changed; the losses."""
    directory = tmp_path_factory.mktemp("frozen")
    return directory, pool(2).run(train, directory, 4)[0]


@pytest.fixture
def copy(trained, tmp_path) -> Path:
    """Those after steps 1 and 2."""
    target = shutil.copytree(trained[0], tmp_path / "copy")
    for step in (3, 4):
        shutil.rmtree(target / f"iter_000000{step}")
    (target / "latest").write_text("iter_0000002\n")
    return target


def part(directory: Path) -> Path:
    (found,) = (directory / "frozen").iterdir()
    return found


def test_they_are_written_once(trained):
    directory, _ = trained
    own, beside = (unpickle.read_metadata(path, verify.files(path)) for path in (directory / "iter_0000004",
                                                                                part(directory)))  # fmt: skip
    held = set(beside.state_dict_metadata)
    assert EMBEDDING in held and any("layers" in name for name in held) and not any("optim" in name for name in held)
    assert not held & set(own.state_dict_metadata) and "output_layer.weight" in own.state_dict_metadata
    for path in directory.glob("iter_*"):
        assert verify.folders(path) == [path, part(directory)]
        verify.verify(path)


@pytest.mark.parametrize("layout", [TENSOR, pytest.param(DATA, marks=pytest.mark.slow)], ids=["same", "other"])
def test_resume_goes_on_exactly_and_refers_to_the_same(pool, trained, copy, layout):
    before = part(copy)
    for losses, changed in pool(2).run(resume, layout, copy, 4):
        assert changed == []
        assert losses == (trained[1][2:] if layout is TENSOR else pytest.approx(trained[1][2:], abs=1e-6))
    assert part(copy) == before
    if layout is TENSOR:
        paths = trained[0] / "iter_0000004", copy / "iter_0000004"
        assert pool(2).run(check_same_everywhere, *paths) == [[], []]


def load(path: Path, layout: Layout = DATA) -> None:
    from megatron_vlm.checkpoint import load

    models, _ = toy.build(layout, seed=99)
    load.load(path, models=models)


def test_damage_is_named(pool, copy):
    file = part(copy) / "__1_0.distcp"
    flip(file)
    with pytest.raises(ValueError, match=rf"{part(copy)} is damaged: the contents of __1_0.distcp are not what"):
        verify.verify(copy / "iter_0000002")
    with pytest.raises(RuntimeError, match="ValueError:.*contents of __1_0.distcp are not what was written"):
        pool(2).run(load, copy, timeout_s=20)
    # Another part in its place, whole in itself.
    sign(part(copy))
    with pytest.raises(ValueError, match=f"{part(copy)} is damaged: its manifest is not the one that .*iter_0000002"):
        verify.verify(copy / "iter_0000002")


def test_a_checkpoint_that_was_copied_alone_says_what_is_missing(pool, trained, tmp_path):
    alone = shutil.copytree(trained[0] / "iter_0000004", tmp_path / "alone" / "iter_0000004")
    name = f"frozen/{part(trained[0]).name}"
    with pytest.raises(RuntimeError, match=f"ValueError:.*{alone} is without its frozen weights.*Copy {name} there.*"
                                           "ckpt.py whole"):  # fmt: skip
        pool(2).run(load, alone)
    shutil.copytree(trained[0] / name, alone.parent / name)
    pool(2).run(load, alone)


def same_tensors(one: Path, other: Path) -> bool:
    left, right = tensors(one), tensors(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_made_whole_it_needs_nothing_beside_it(pool, trained, tmp_path):
    made = whole.whole(trained[0] / "iter_0000004", tmp_path / "out")
    assert sorted(path.name for path in made.parent.iterdir()) == ["iter_0000004", "latest"]
    assert verify.folders(made) == [made]
    verify.verify(made)
    assert pool(2).run(same_tensors, trained[0] / "iter_0000004", made) == [True, True]
    pool(2).run(load, made, TENSOR)
    with pytest.raises(ValueError, match="iter_0000004 exists"):
        whole.whole(trained[0] / "iter_0000004", tmp_path / "out")


def test_a_hostile_part_is_refused(pool, copy, tmp_path):
    """Its maker's manifests are in order."""
    mark = tmp_path / "ran"
    hostile, path = part(copy), copy / "iter_0000002" / "manifest.json"
    (hostile / ".metadata").write_bytes(pickle.dumps(Touch(mark)))
    sign(hostile)
    reference = verify.reference(hostile)
    hostile.rename(verify.frozen_path(copy, reference))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frozen": reference}))
    verify.verify(copy / "iter_0000002")
    with pytest.raises(RuntimeError, match=r"ValueError: \S+/.metadata asks for pathlib.\S+|builtins.getattr"):
        pool(2).run(load, copy)
    assert not mark.exists()
    for name in ("../../x", "", 7, "A" * 64):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"frozen": name}))
        with pytest.raises(ValueError, match="manifest.json is damaged"):
            verify.verify(copy / "iter_0000002")


def change(directory: Path) -> list[list[str]]:
    """Saves with other frozen weights, then with fewer; after each, the parts that are there, by name."""
    from megatron_vlm.checkpoint import save
    from megatron_vlm.parallel import groups

    found = []

    def parts(frozen: tuple[str, ...], step: int, keep: int, models: Any = None) -> Any:
        if models is None:
            groups.destroy()
            models, _ = toy.build(DATA, frozen=frozen)
        config = settings(keep)
        save.save(directory, models=models, optimizer=None, step=step, config=config, state={})
        dist.barrier()
        found.append(sorted(path.name for path in (directory / "frozen").iterdir()))
        return models

    models = parts(("embedding",), 1, 0)
    with torch.no_grad():
        next(models[0].parameters()).add_(1)
    parts(("embedding",), 2, 0, models)
    parts(("embedding", "layers"), 3, 2)
    (directory / "iter_0000002" / "manifest.json").write_text("{")
    parts(("embedding", "layers"), 4, 0)
    return found


@pytest.mark.slow
def test_each_part_stays_as_long_as_a_checkpoint_refers_to_it(pool, tmp_path):
    """Also where weights changed in memory; and one that cannot be read may refer to any."""
    (one, two, three, four), same = pool(2).run(change, tmp_path)
    assert same == [one, two, three, four]
    assert len(one) == 1 and len(two) == 2 and set(one) < set(two)
    assert len(three) == 2 and not set(one) & set(three), "the first checkpoint is gone, and its part with it"
    assert set(three) < set(four), "the second checkpoint cannot be read"


def fail(directory: Path) -> list[str]:
    """A first save that fails while the part is written; names that are left."""
    from megatron_vlm.checkpoint import save

    models, optimizer = toy.build(DATA, frozen=("embedding",))
    original = save.torch_checkpoint.FileSystemWriter.write_data

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    save.torch_checkpoint.FileSystemWriter.write_data = full
    try:
        save.save(directory, models=models, optimizer=optimizer, step=1, config=settings(), state={})
    except save.SaveError as error:
        assert "No space left" in str(error)
    finally:
        save.torch_checkpoint.FileSystemWriter.write_data = original
    dist.barrier()
    left = sorted(path.name for path in directory.iterdir())
    dist.barrier()
    save.save(directory, models=models, optimizer=optimizer, step=1, config=settings(), state={})
    return left


def test_a_save_that_fails_or_was_killed_leaves_nothing(pool, tmp_path):
    (tmp_path / ".writing-frozen").mkdir()
    (tmp_path / "frozen" / ".removing-x").mkdir(parents=True)
    assert pool(2).run(fail, tmp_path) == [["frozen"]] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frozen", "iter_0000001", "latest"]
    assert verify.folders(tmp_path / "iter_0000001") == [tmp_path / "iter_0000001", part(tmp_path)]
