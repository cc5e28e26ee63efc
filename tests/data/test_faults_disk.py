"""A disk that takes no more while shards are built: named, nothing half-written is left, and the build can go on."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data.example import Branch, Example, Media, Turn
from megatron_vlm.data.sets.build import build
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.verify import verify
from megatron_vlm.data.writer import ShardWriter
from tests.data.sets.published import rows
from tests.data.sets.test_table import write as publish
from tests.data.test_bundle import image
from tests.data.world import picture
from tests.test_imports import ROOT

#: Bytes that the small disk takes.
ROOM = 400_000


def built(folder: Path, out: Path, *before: str, **options: object) -> subprocess.CompletedProcess[str]:
    """The command that builds shards of `folder`'s mine.jsonl."""
    line = [sys.executable, "tools/build_shards.py", "build", str(folder / "mine.jsonl"), "--out", str(out)]
    return subprocess.run([*before, *line, "--max-bad", "1000" if before or options else "0"], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)  # fmt: skip


@pytest.fixture
def much(tmp_path: Path) -> Path:
    """A megabyte of images with captions."""
    rng, lines = np.random.default_rng(0), []
    for number in range(20):
        pixels = rng.integers(0, 256, (130, 130, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image_path": f"{number}.png", "caption": "Noise."}))
    (tmp_path / "mine.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def full_disk(disk: Path) -> list[str]:
    """What runs a command with a disk of ROOM bytes mounted at `disk`, seen by nobody else; then lists what is left.
    [] where the kernel does not let this user mount."""
    mount = f"mount -t tmpfs -o size={ROOM} tmpfs {disk}"
    script = f'{mount} && "$@"; code=$?; ls -A {disk}; exit $code'
    before = ["unshare", "--map-root-user", "--mount", "sh", "-c", script, "sh"]
    try:
        return before if subprocess.run([*before, "true"], capture_output=True).returncode == 0 else []
    except FileNotFoundError:
        return []


def test_a_full_disk_is_named_and_nothing_is_left(much: Path, tmp_path: Path) -> None:
    """A file system without room, or a limit of the kernel on the size of files where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if before := full_disk(disk):
        done = built(much, disk / "shards", *before)
        reason, left = os.strerror(errno.ENOSPC), done.stdout.split()
    else:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))  # noqa: E731
        done = built(much, disk / "shards", preexec_fn=limit)
        reason, left = os.strerror(errno.EFBIG), os.listdir(disk)
    assert done.returncode == 1 and left == []
    told = f"error: [Errno {errno.ENOSPC if before else errno.EFBIG}] {reason}: {disk / 'shards'} could not be written"
    assert told in done.stderr and "Traceback" not in done.stderr and "left out" not in done.stderr
    again = built(much, disk / "shards")
    assert again.returncode == 0 and verify(disk / "shards") == []


@pytest.mark.parametrize(
    "room", [60_000, pytest.param(2_000, marks=pytest.mark.slow), pytest.param(250_000, marks=pytest.mark.slow)]
)
def test_wherever_it_is_full(tmp_path: Path, room: int) -> None:
    """In the tar, when it is closed, in the Arrow files: the error is the same, and nothing is left."""
    script = (
        "import resource, sys; from tests.data.test_faults_disk import much_text\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, {room}))\nmuch_text(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "shards")], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip
    assert f"OSError: [Errno {errno.EFBIG}] File too large: {tmp_path / 'shards'} could not be written" in done.stderr
    assert os.listdir(tmp_path) == []


def much_text(folder: str) -> None:
    """Shards with a tar of 50 kB and Arrow files of 200 kB and more."""
    rng = np.random.default_rng(0)
    with ShardWriter(folder) as writer:
        for number in range(300):
            media = (writer.add_image(picture(rng, size=(16, 16))),) if number < 40 else ()
            writer.add(Example(f"t{number}", (Branch("text_sft", (Turn("", "x" * 800),)),), media), "text", "train")


def test_a_build_goes_on_when_there_is_room_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Downloaded sets: units that were whole are kept, and the shards are those of a build that never stopped."""
    downloads = tmp_path / "downloads"
    publish(downloads, "cosyn_chart_exp", [{**row, "image": {"bytes": image(n), "path": None}} for n, row in
                                           enumerate(rows("cosyn_chart_exp"))])  # fmt: skip
    build(["cosyn_chart_exp"], downloads, tmp_path / "whole")
    room = iter(range(1))

    def full(*arguments: object) -> Media:
        if next(room, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return store(*arguments)  # type: ignore[arg-type]

    store = ShardWriter._store
    monkeypatch.setattr(ShardWriter, "_store", full)
    with pytest.raises(OSError, match="No space left on device: .* could not be written, and nothing of it is left"):
        build(["cosyn_chart_exp"], downloads, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(ShardWriter, "_store", store)
    build(["cosyn_chart_exp"], downloads, tmp_path / "out")
    assert Shards(tmp_path / "out").hash == Shards(tmp_path / "whole").hash
