"""The commands of tools/build_shards.py over shards that are there: dataset, import, export, repair, stats."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_vlm.data import mixture
from megatron_vlm.data.sets.source import stored_name
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.verify import verify
from tests.data.sets.published import WEB, rows
from tests.data.sets.test_table import picture, write
from tools import build_shards

ROOT = Path(__file__).parents[2]


@pytest.fixture
def downloads(tmp_path: Path) -> Path:
    folder = tmp_path / "downloads"
    for name in ("pixmo_cap", "cosyn_point", "tulu4"):
        write(folder, name, rows(name))
    for number in range(3):
        path = folder / stored_name(f"{WEB}{number}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    return folder


def dataset(downloads: Path, out: Path, *more: str) -> Shards:
    names = ["pixmo_cap", "cosyn_point", "tulu4"]
    build_shards.main(["dataset", *names, "--source", str(downloads), "--out", str(out), "--workers", "1", *more])
    return Shards(out)


def test_downloaded_sets_become_shards(downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (downloads / stored_name(f"{WEB}1.jpg")).unlink()
    shards = dataset(downloads, tmp_path / "shards", "--max-left-out", "0.5", "--mixture", "molmo2_sft")
    told = capsys.readouterr()
    assert "pixmo_cap: left out 1 missing; listed in" in told.err
    assert re.search(r"pixmo_cap +train +2 samples", told.out) and "5 images and videos, 1 lines left out" in told.out
    found = mixture.load(shards.file("mixture.yaml"))
    assert [group.name for group in found.groups] == ["demo", "image_pointing", "text"]
    released = {member.name: member for member in mixture.load("molmo2_sft").members}
    assert [member.name for member in found.members] == ["pixmo_cap", "cosyn_point", "tulu4"]
    assert all(member == released[member.name] for member in found.members)
    dataset(downloads, tmp_path / "shards", "--max-left-out", "0.5", "--mixture", "molmo2_sft")
    assert "made of these files already" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="max-left-out allows 20%"):
        dataset(downloads, tmp_path / "strict")
    with pytest.raises(SystemExit, match="has none of pixmo_cap"):
        build_shards.main(["dataset", "pixmo_cap", "--source", str(downloads), "--out", str(tmp_path / "x"),
                           "--mixture", "sample"])  # fmt: skip
    with pytest.raises(SystemExit, match="2"):
        build_shards.main(["build", "a.jsonl", "--out", str(tmp_path / "out"), "--shard-mb", "0"])
    assert "0 is not a number of at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="a.jsonl is not there. Check the name."):
        build_shards.main(["build", "a.jsonl", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="did you mean pixmo_cap"):
        build_shards.main(["dataset", "pixmo_capp", "--source", str(downloads), "--out", str(tmp_path / "x")])


#: The command with its arguments, killed when the n-th sample has been handed to a writer.
KILLED = """
import os, signal, sys
from megatron_vlm.data.writer import ShardWriter
from tools import build_shards

add, left = ShardWriter.add, int(sys.argv[1])
def last(*arguments):
    global left
    add(*arguments)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
ShardWriter.add = last
build_shards.main(sys.argv[2:])
"""


def test_a_build_that_is_killed_goes_on(downloads: Path, tmp_path: Path) -> None:
    """Killed in the second of three parts, then while they are put together: nothing stands half under its name, what
    was whole is not made again, and the shards are those of a build that was never stopped."""
    out, work = tmp_path / "shards", tmp_path / "shards.work"
    command = ["dataset", "pixmo_cap", "cosyn_point", "tulu4", "--source", str(downloads), "--workers", "1"]

    def kill(samples: int) -> dict[str, int]:
        """The parts that are whole then, and what tells one directory from another."""
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(samples), *command, "--out", str(out)],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL and not out.exists(), done.stderr
        parts = [path for path in (work / "units").iterdir() if ".partial" not in path.name]
        assert [fault for path in parts for fault in verify(path)] == []
        return {path.name: path.stat().st_ino for path in parts}

    first, all_parts = kill(4), kill(6)
    assert list(first) == ["pixmo_cap.train.000000"] and len(all_parts) == 3
    assert all_parts.items() >= first.items(), "what was whole is kept"
    assert dataset(downloads, out).hash == dataset(downloads, tmp_path / "whole").hash
    assert not work.exists()


def test_shards_go_out_and_come_back(downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = dataset(downloads, tmp_path / "shards")
    build_shards.main(["export", str(shards.directory), "--out", str(tmp_path / "tars"), "--datasets", "cosyn_point"])
    (tar,) = (Path(line) for line in capsys.readouterr().out.splitlines() if line.endswith(".tar"))
    build_shards.main(["import", str(tar), "--dataset", "again", "--out", str(tmp_path / "again")])
    again = Shards(tmp_path / "again")
    assert again.count("again", "train") == 3
    for number in range(3):
        example = again.example("again", "train", number)
        assert example == shards.example("cosyn_point", "train", number)
        assert again.media(example.media[0].key) == shards.media(example.media[0].key)
    assert yaml.safe_load(again.file("mixture.yaml").read_text())["groups"]["all"]["members"] == ["again"]


def test_repair_saves_and_tells(downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = dataset(downloads, tmp_path / "shards")
    damaged = shutil.copytree(shards.directory, tmp_path / "damaged")
    tar = damaged / "media/000000.tar"
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(SystemExit, match="repair"):
        build_shards.main(["verify", str(damaged)])
    assert re.search(r"media/000000.tar: [0-9a-f]{64} at offset 512: the content's sha256", capsys.readouterr().err)
    with pytest.raises(SystemExit, match="2 faults, listed above and in .*quarantine.jsonl; 6 samples are saved"):
        build_shards.main(["repair", str(damaged), "--out", str(tmp_path / "sound")])
    assert "damaged at offset 512" in capsys.readouterr().err
    build_shards.main(["verify", str(tmp_path / "sound")])


def test_stats_are_counted(downloads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = dataset(downloads, tmp_path / "shards")
    capsys.readouterr()
    build_shards.main(["stats", str(shards.directory)])
    told = capsys.readouterr().out
    assert re.search(r"cosyn_point +train +3 +3 +3 +\d+ +\d+ +cosyn_point 3\n", told)
    assert re.search(r"tulu4 +train +1 +1 +0 ", told)
    assert "6 media files in 1 tars" in told
