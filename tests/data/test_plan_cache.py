"""Ranks that share planned windows: each window is planned once, and the rows are those of a rank alone."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.config.schema import RunConfig
from megatron_vlm.data import plan_cache, stored
from megatron_vlm.data.loader import Loader, Share, Step
from megatron_vlm.data.plan_cache import PlanCache
from tests.data.damage import spoil_record
from tests.data.world import ARCH, build, config

STEPS, RANKS = 9, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder, sizes={"captions": 30, "pointing": 20, "text": 10, "videos": 4})
    mixture = (folder / "mixture.yaml").read_text().replace("[text]", "[text, videos]")
    (folder / "mixture.yaml").write_text(mixture)
    return folder


def settings(folder: Path, run: Path, **data):
    options = {"window": 20, "balance_batches": 2, "bad_samples": "skip"} | data
    return dataclasses.replace(config(folder, **options, train={"micro_batch": 1}), run=RunConfig(dir=str(run)))


def alone(folder: Path, rank: int) -> list[Step]:
    loader = Loader(settings(folder, folder, plan_cache=""), ARCH, Share(rank, RANKS, crops=False))
    try:
        return list(itertools.islice(loader, STEPS))
    finally:
        loader.close()


def together(
    folder: Path, run: Path, ranks: range = range(RANKS), **data
) -> tuple[Sequence[Sequence[Step]], list[int]]:
    """The steps of some of the ranks, which run side by side, and the windows that they planned."""
    loaders = [
        Loader(settings(folder, run), ARCH, Share(rank, RANKS, rank=rank, ranks=RANKS, crops=False)) for rank in ranks
    ]
    streams = [iter(loader) for loader in loaders]
    with ThreadPoolExecutor(len(loaders)) as pool:  # step by step, as the ranks of a run
        steps = list(zip(*[list(pool.map(next, streams)) for _ in range(STEPS)], strict=True))
    for loader in loaders:
        loader.close()
        loader._cache._pool.shutdown()  # a window that is being planned is written yet
    return steps, sorted(number for loader in loaders for number in loader._cache.planned)


def same(found: Step, wanted: Step) -> bool:
    """All that is known of a step, and every array of this rank's part of it."""
    facts = [field.name for field in dataclasses.fields(Step) if field.name not in ("micro_batches", "planned")]
    return all(getattr(found, name) == getattr(wanted, name) for name in facts) and all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name))
        for one, other in zip(found.micro_batches, wanted.micro_batches, strict=True)
        for field in dataclasses.fields(one)
    )


def equal(found: Sequence[Sequence[Step]], wanted: Sequence[Sequence[Step]]) -> bool:
    return all(same(*pair) for pairs in zip(found, wanted, strict=True) for pair in zip(*pairs, strict=True))


@pytest.fixture(autouse=True)
def impatient(monkeypatch) -> None:
    monkeypatch.setattr(plan_cache, "PATIENCE_S", 3.0)


@pytest.fixture(scope="module")
def wanted(folder: Path) -> list[list[Step]]:
    return [alone(folder, rank) for rank in range(RANKS)]


def test_each_window_is_planned_once_and_gives_the_same_rows(folder, wanted, tmp_path) -> None:
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "of-other-settings-000000001.plan").write_bytes(b"")
    found, planned = together(folder, tmp_path)
    assert equal(found, wanted)
    used = wanted[0][-1].next_window
    assert used >= plan_cache.BEHIND and len(planned) == len(set(planned)) and set(range(used + 1)) <= set(planned)
    left = sorted(int(path.stem.rpartition("-")[2]) for path in (tmp_path / "plans").iterdir())
    assert set(left) < set(planned), "old windows and other streams' are removed"
    again, planned = together(folder, tmp_path)
    assert equal(again, wanted) and not set(planned) & set(left), "what is there already is not planned again"
    other = settings(folder, tmp_path, seed=1)
    loader = Loader(other, ARCH, Share(rank=1, ranks=2))
    assert not loader._cache.path(0).exists()
    loader.close()


def test_samples_that_cannot_be_planned_are_shared_too(folder, tmp_path) -> None:
    damaged = shutil.copytree(folder, tmp_path / "damaged")
    spoil_record(damaged / "shards", "captions", "train", "captions-3")
    wanted, (found, _) = alone(damaged, 0), together(damaged, tmp_path)
    assert any(step.skipped for step in wanted) and equal(found[:1], [wanted])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-9],
        lambda data: data[:500] + bytes([data[500] ^ 1]) + data[501:],
        *(pytest.param(each, marks=pytest.mark.slow) for each in (lambda data: data[:100], lambda data: b"")),
    ],
)
def test_damaged_files_are_planned_again(folder, wanted, tmp_path, damage) -> None:
    together(folder, tmp_path)
    files = sorted((tmp_path / "plans").iterdir())
    sound = [path.read_bytes() for path in files]
    for path, data in zip(files, sound, strict=True):
        path.write_bytes(damage(data))
        with pytest.raises(ValueError, match="is cut or damaged"):
            stored.read(path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, _ = together(folder, tmp_path)
    assert equal(found, wanted) and any("The window is planned again." in str(one.message) for one in said)


def test_a_rank_that_waits_in_vain_plans_for_itself(folder, wanted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(plan_cache, "PATIENCE_S", 0.2)
    with pytest.warns(UserWarning, match=r"rank 2 waited 0 s for .* which rank 0 should have written"):
        found, planned = together(folder, tmp_path, range(2, 3))
    assert equal(found, wanted[2:3]) and set(range(wanted[0][-1].next_window + 1)) <= set(planned)


def test_a_full_disk_hinders_nobody(folder, wanted, tmp_path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plan_cache, "PATIENCE_S", 0.1)
    monkeypatch.setattr(stored, "write", full)
    with pytest.warns(UserWarning, match="could not be shared with other ranks: .*No space left"):
        found, _ = together(folder, tmp_path)
    assert equal(found, wanted)


def test_another_identity_has_other_files(folder, tmp_path) -> None:
    names = {
        PlanCache(None, tmp_path, {"seed": 1} | change, rank=0, ranks=2).path(3).name
        for change in ({}, {"seed": 2}, {"sequence_length": 8})
    }
    assert len(names) == 3


@pytest.mark.parametrize("changed", ["data/pack.py", "data/sets/group.py", "config/geometry.py", "cost.py"])
def test_other_code_has_other_files(tmp_path, monkeypatch, changed) -> None:
    """A plan of an older version is another plan."""
    root = Path(plan_cache.__file__).parents[1]
    for name in ("config", "data"):
        shutil.copytree(root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "cost.py", tmp_path)
    before = plan_cache.digest({"seed": 1})
    monkeypatch.setattr(plan_cache, "__file__", str(tmp_path / "data/plan_cache.py"))
    assert plan_cache.digest({"seed": 1}) == before, "wherever the code lies"
    with (tmp_path / changed).open("a") as code:
        code.write("\n")
    assert plan_cache.digest({"seed": 1}) != before
