"""A disk that fills up during a run: a real file system, of a few megabytes."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_vlm.config import load
from megatron_vlm.parallel.pool import Pool
from megatron_vlm.train import __main__ as command
from tests.data import world as data
from tests.train import kills


@pytest.fixture
def small(tmp_path) -> Iterator[Callable[[float], Path]]:
    """`small(megabytes)` is the folder that a file system of that size is mounted on; again: its new size."""
    folder = tmp_path / "small"
    folder.mkdir()

    def mount(*options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this user may mount no file system of its own: {done.stderr.strip()}")

    def sized(megabytes: float) -> Path:
        mount("-o", f"{'remount,' if folder.is_mount() else ''}size={int(megabytes * 1e6)}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("asynchronous", [True, False], ids=["background", "waited for"])
def test_a_full_disk_ends_the_run_with_numbers_and_it_goes_on_when_there_is_space(tmp_path, small, pool, asynchronous):
    """Room for one checkpoint and a half: the second one breaks off. Two ranks, dropout on."""
    data.build(tmp_path, sizes={"captions": 30, "pointing": 15, "text": 10})
    run = small(1000) / "run"
    whole, full = (kills.settings(tmp_path, folder, "dp2", steps=6, every=2) for folder in (tmp_path / "whole", run))
    whole, full = (
        dataclasses.replace(each, checkpoint=dataclasses.replace(each.checkpoint, asynchronous=asynchronous))
        for each in (whole, full)
    )
    pool(2).run(kills.train, whole, timeout_s=120)
    kept = tmp_path / "whole" / "checkpoints"
    one, frozen = size_of(kept / "iter_0000006"), size_of(kept / "frozen")
    small((1.5 * one + frozen) / 1e6)
    mine = Pool(2)  # its processes are spoiled by the failure
    with pytest.raises(RuntimeError, match="there is no checkpoint of step 4: "):
        mine.run(kills.train, full, timeout_s=120)
    told = json.loads((run / "exit.json").read_text())
    assert told["outcome"] == "failed" and 4 <= told["step"] <= 6
    numbers = r"The disk is full: ([\d.]+) of ([\d.]+) MB are free at \S+, a checkpoint takes about ([\d.]+) MB"
    found = re.search(numbers, told["reason"])
    assert found and "there is no checkpoint of step 4" in told["reason"], told
    free, size, needed = map(float, found.groups())
    assert needed == pytest.approx(one / 1e6, rel=0.1) and free < needed < size
    assert free == pytest.approx(size - (one + frozen) / 1e6, rel=0.1)  # what was half-written is gone
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["frozen", "iter_0000002", "latest"]
    small(1000)
    mine.run(kills.train, full, timeout_s=120)
    mine.close()
    assert kills.differences(run, tmp_path / "whole", 6) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("megabytes", "what"), [(6.0, "there is no checkpoint of step 2: "), (0.03, "No space left on")]
)
def test_the_command_ends_with_1_and_one_paragraph(tmp_path, small, capsys, megabytes, what):
    """At the save; or before, at a line of a log."""
    data.build(tmp_path, sizes={"captions": 12, "pointing": 6, "text": 4})
    run = small(megabytes) / "run"
    (tmp_path / "recipe.yaml").write_text(load.dump(kills.settings(tmp_path, run, "dp2", steps=2, every=2)))
    assert command.main([str(tmp_path / "recipe.yaml")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and what in said and "Traceback" not in said
    assert re.search(
        r"\nThe disk is full: [\d.]+ of [\d.]+ MB are free at .*Make space and start the same command", said
    )
    # Frozen weights were whole already.
    assert {path.name for path in run.glob("checkpoints/*")} <= {"frozen"}
    assert {path.name for path in run.glob("checkpoints/frozen/*") if path.name.startswith(".")} == set()
