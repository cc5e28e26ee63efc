"""Damaged shards: what is sound is saved, what is not is named. The old directory is never written to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.example import Branch, Example, Turn
from megatron_vlm.data.repair import QUARANTINE, repair
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tar import index_tar
from megatron_vlm.data.verify import verify
from megatron_vlm.data.writer import ShardWriter
from tests.data.world import picture

SAMPLES = 40


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty samples with an image each in several tars, twenty without, and a file beside them."""
    folder, rng = tmp_path_factory.mktemp("repair") / "shards", np.random.default_rng(3)
    with ShardWriter(folder, shard_bytes=8_000) as writer:
        for number in range(SAMPLES):
            media = (writer.add_image(picture(rng, size=(16, 12))),)
            turn = Turn("", f"This is picture {number}.")
            writer.add(Example(f"s{number}", (Branch("long_caption", (turn,)),), media), "captions", "train")
        for number in range(20):
            writer.add(Example(f"t{number}", (Branch("text_sft", (Turn("a", "b"),)),)), "text", "train")
        writer.add_file("mixture.yaml", b"groups: {}\n")
    return folder


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "damaged")


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 255
    path.write_bytes(data)


def flip_content(folder: Path) -> None:
    tar = folder / "media/000001.tar"
    flip(tar, index_tar(tar)[2].offset + 5)


def flip_header(folder: Path) -> None:
    """The index still knows where the files are."""
    tar = folder / "media/000001.tar"
    flip(tar, index_tar(tar)[2].header + 3)


def cut_tar(folder: Path) -> None:
    """The index points beyond the end; what lies before the cut is there."""
    tar = folder / "media/000000.tar"
    members = index_tar(tar)
    tar.write_bytes(tar.read_bytes()[: members[3].offset + 10])


def lose_index(folder: Path) -> None:
    (folder / "media.arrow").unlink()


def garble_index(folder: Path) -> None:
    (folder / "media.arrow").write_bytes(b"ARROW1\0\0" + b"x" * 500)


def lose_offsets(folder: Path) -> None:
    (folder / "media/000000.tar.idx").unlink()


def cut_samples(folder: Path) -> None:
    path = folder / "samples/captions.train.arrow"
    path.write_bytes(path.read_bytes()[:-20])


def flip_record(folder: Path) -> None:
    path = folder / "samples/captions.train.arrow"
    flip(path, path.read_bytes().index(b"This is picture 7.") + 3)


def lose_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def change_beside(folder: Path) -> None:
    (folder / "mixture.yaml").write_bytes(b"groups: {a}\n")


@pytest.mark.parametrize(
    ("damage", "lost", "named"),
    [
        (flip_content, 1, "damaged at offset"),
        (flip_header, 0, ""),
        (cut_tar, None, "is lost"),
        (lose_index, 0, ""),
        (garble_index, 0, ""),
        (lose_offsets, 0, ""),
        (cut_samples, 0, "not whole"),
        (flip_record, 1, "does not fit its checksum"),
        (lose_manifest, 0, "manifest.json"),
        (change_beside, 0, "sha256 is not the manifest's"),
    ],
)
def test_what_is_sound_is_saved(
    built: Path, copied: Path, tmp_path: Path, damage: Callable[[Path], None], lost: int | None, named: str
) -> None:
    damage(copied)
    with pytest.raises((ValueError, AssertionError)):
        assert verify(copied) == []
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    result = repair(copied, tmp_path / "sound")
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before
    assert verify(tmp_path / "sound") == []
    old, new = Shards(built), Shards(tmp_path / "sound")
    kept = set(new.keys("captions", "train"))
    if lost is None:
        in_cut_tar = len(index_tar(built / "media/000000.tar"))
        lost = in_cut_tar - 3
        assert 0 < lost < SAMPLES
    assert len(kept) == SAMPLES - lost == result.kept - 20
    assert new.keys("text", "train") == old.keys("text", "train")
    by_key = {example.key: example for example in (old.example("captions", "train", n) for n in range(SAMPLES))}
    for number in range(len(kept)):
        example = new.example("captions", "train", number)
        assert example == by_key[example.key]
        assert new.media(example.media[0].key) == old.media(example.media[0].key)
    listed = [json.loads(line) for line in (tmp_path / "sound" / QUARANTINE).read_text().splitlines()]
    assert listed == result.left_out and bool(listed) == bool(named)
    assert not named or any(named in fault["reason"] for fault in listed)


def test_several_record_batches_before_a_cut_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vlm.data.writer.BATCH_SAMPLES", 10)
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(50):
            writer.add(Example(f"t{number}", (Branch("text_sft", (Turn("a", f"b{number}"),)),)), "text", "train")
    path = tmp_path / "shards/samples/text.train.arrow"
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"t35")])
    result = repair(tmp_path / "shards", tmp_path / "sound")
    assert Shards(tmp_path / "sound").keys("text", "train") == [f"t{number}" for number in range(30)]
    assert any("nothing more can be read" in fault["reason"] for fault in result.left_out)


def test_nothing_sound_is_an_error(copied: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "samples")
    with pytest.raises(ValueError, match="no sample was added"):
        repair(copied, tmp_path / "sound")
    assert not (tmp_path / "sound").exists()
    with pytest.raises(ValueError, match="neither manifest.json nor a folder `samples`: no shards. Check the path"):
        repair(tmp_path / "gone", tmp_path / "sound")


def test_links_are_not_followed(copied: Path, tmp_path: Path) -> None:
    path = copied / "mixture.yaml"
    kept = path.read_bytes()
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(kept)
    path.symlink_to(tmp_path / "elsewhere")
    result = repair(copied, tmp_path / "sound")
    assert [fault["file"] for fault in result.left_out] == ["mixture.yaml"]
