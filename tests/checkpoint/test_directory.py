"""Names, the newest checkpoint, and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vlm.checkpoint import directory
from megatron_vlm.config.schema import CheckpointConfig


def write(folder: Path, step: int, keep: int = 0, keep_every: int = 0) -> Path:
    (directory.begin(folder, step) / "data").write_text(str(step))
    return directory.publish(folder, step, CheckpointConfig(keep=keep, keep_every=keep_every))


def held(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_checkpoint_gets_its_name_last_and_latest_follows(tmp_path):
    assert directory.latest(tmp_path / "none") is None
    directory.begin(tmp_path, 5)
    assert directory.latest(tmp_path) is None and held(tmp_path) == [".writing-iter_0000005"]
    assert write(tmp_path, 5) == tmp_path / "iter_0000005" == directory.latest(tmp_path)
    write(tmp_path, 12_345_678)
    assert (tmp_path / "latest").read_text() == "iter_12345678\n"
    assert held(tmp_path) == ["iter_0000005", "iter_12345678", "latest"]


def test_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step, keep=2)
    assert held(tmp_path) == ["iter_0000003", "iter_0000010", "latest"]
    # Back at step 4 after a resume from elsewhere: what was just written stays, whatever its number.
    write(tmp_path, 4, keep=1)
    assert held(tmp_path) == ["iter_0000004", "latest"]


def test_every_mth_is_kept_beside_the_newest(tmp_path):
    for step in range(1, 12):
        write(tmp_path, step, keep=2, keep_every=4)
    assert held(tmp_path) == ["iter_0000004", "iter_0000008", "iter_0000010", "iter_0000011", "latest"]


def test_same_step_is_replaced_and_remains_are_cleared(tmp_path):
    write(tmp_path, 3)
    (tmp_path / "iter_0000003" / "old").touch()
    (tmp_path / ".writing-iter_0000009").mkdir()
    (tmp_path / ".removing-iter_0000001-x").mkdir()
    write(tmp_path, 3)
    assert held(tmp_path) == ["iter_0000003", "latest"]
    assert held(tmp_path / "iter_0000003") == ["data"]


def test_latest_that_is_gone_falls_back_to_the_highest_step(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 7)
    (tmp_path / "latest").write_text("iter_0000003\n")
    assert directory.latest(tmp_path) == tmp_path / "iter_0000003"
    (tmp_path / "latest").write_text("iter_0000009\n")
    assert directory.latest(tmp_path) == tmp_path / "iter_0000007"


def test_latest_cannot_point_outside(tmp_path):
    write(tmp_path / "checkpoints", 3)
    write(tmp_path / "elsewhere", 9)
    (tmp_path / "checkpoints" / "latest").write_text("../elsewhere/iter_0000009\n")
    assert directory.latest(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "iter_0000003"


def test_run_directory_checkpoints_and_checkpoint_are_all_understood(tmp_path):
    path = write(tmp_path / "checkpoints", 3)
    assert directory.find(tmp_path) == directory.find(tmp_path / "checkpoints") == directory.find(path) == path
    with pytest.raises(ValueError, match="none: the directory does not exist"):
        directory.find(tmp_path / "none")
    with pytest.raises(ValueError, match="latest: it is a file. Check the path"):
        directory.find(path.parent / "latest")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither it nor its folder `checkpoints` holds iter_"):
        directory.find(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="Hugging Face format. Make a checkpoint of it with tools/convert_hf.py"):
        directory.find(tmp_path / "empty")
