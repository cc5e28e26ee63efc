"""Faults in what data are made of: files, rows, tars and indexes. Each is named; none is passed over in silence."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest

from megatron_vlm.config.geometry import image_geometry
from megatron_vlm.data.collate import Collator, MicroBatch
from megatron_vlm.data.example import Branch, Example, Media, Turn
from megatron_vlm.data.plan import Row, Sample
from megatron_vlm.data.sets import units
from megatron_vlm.data.sets.build import build
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tar import index_tar
from megatron_vlm.data.tree import TreeSettings, tokenize
from megatron_vlm.data.verify import verify
from megatron_vlm.data.writer import ShardWriter
from tests.data import world
from tests.data.clips import clip, steady
from tests.data.damage import place, rewrite, write
from tests.data.sets.published import rows
from tests.data.sets.test_table import write as publish
from tests.data.test_bundle import foreign, image, read
from tests.data.test_video import long_video
from tools import build_shards

GEOMETRY = image_geometry(world.ARCH, 4)
SETTINGS = TreeSettings(world.tokenizer(), GEOMETRY, "style_and_length", "uniform", 512, 12, 0, max_frames=8)


def captioned(key: str, *media: Media) -> Example:
    return Example(key, (Branch("long_caption", (Turn("", "A red cat sits."),)),), media)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Five captions."""
    rng = np.random.default_rng(0)
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(5):
            writer.add(captioned(f"s{number}", writer.add_image(world.picture(rng))), "captions", "train")
    assert verify(tmp_path / "shards") == []
    return tmp_path / "shards"


def attempt(folder: Path, *, skips: bool) -> tuple[str, ...]:
    """What the collator says of the samples of `captions`, in one row."""
    opened = Shards(folder)
    samples = []
    for index in range(opened.count("captions", "train")):
        example = opened.example("captions", "train", index)
        content = tokenize(example, "captions", 0, SETTINGS)
        samples.append(Sample(f"captions/{example.key}", 0, tuple(media.key for media in example.media), content))
    collator = Collator(opened, GEOMETRY, 2048, skips)
    batch, faults = collator.attempt(MicroBatch((Row(0, tuple(samples), 0),), 0, 1, True))
    assert len(batch.crops) == sum(sample.content.crops for sample in samples)
    return tuple(map(str, faults))


def test_an_unsorted_index_is_told(shards: Path) -> None:
    rewrite(shards, "media.arrow", lambda table: table.take([0, 1, 2, 4, 3]))
    assert any("media.arrow: " in fault and "the index is unsorted" in fault for fault in verify(shards))
    assert any("the index does not lead to it" in fault for fault in verify(shards))
    faults = attempt(shards, skips=True)
    assert len(faults) == 2 and all("(media.arrow, no entry " in fault for fault in faults)


def test_a_key_twice_in_the_index_is_told(shards: Path) -> None:
    rewrite(shards, "media.arrow", lambda table: table.take([0, 1, 1, 3, 4]))
    faults = verify(shards)
    assert any("has a key twice" in fault for fault in faults)
    assert any("the index does not lead to it" in fault for fault in faults)


def test_a_file_that_no_tar_holds_is_told(shards: Path) -> None:
    """Zeros from the last header on are an end of the tar like any other."""
    tar = shards / "media/000000.tar"
    last = index_tar(tar)[-1]
    write(tar, last.header, bytes(tar.stat().st_size - last.header))
    assert "the tars hold 4 files, the manifest says 5." in verify(shards)


def test_a_sample_key_twice_is_told(shards: Path) -> None:
    rewrite(shards, "samples/captions.train.arrow", lambda table: table.take([0, 1, 2, 3, 1]))
    assert verify(shards) == ["captions.train: key 's1' stands twice."]


def test_a_flipped_byte_is_told_with_shard_key_and_offset(shards: Path) -> None:
    key = Shards(shards).example("captions", "train", 2).media[0].key
    tar, offset, size = place(shards, key)
    data = tar.read_bytes()
    write(tar, offset + size // 2, bytes([data[offset + size // 2] ^ 1]))
    assert f"media/000000.tar: {key} at offset {offset}: the content's sha256 is another one." in verify(shards)


def test_media_that_break_when_they_are_read(tmp_path: Path) -> None:
    """What the headers did not tell: a cut image, a video whose frames are gone, one that is no video any more."""
    rng = np.random.default_rng(0)
    photo = world.picture(rng, size=(200, 160))
    with ShardWriter(tmp_path / "shards") as writer:
        sound, cut = writer.add_image(world.picture(rng)), writer.add_image(photo[: len(photo) // 2])
        empty, gone = (writer.add_video(clip(steady(frames), movflags="faststart")) for frames in (12, 20))
        for number, media in enumerate((sound, cut, empty, gone)):
            writer.add(captioned(f"s{number}", media), "captions", "train")
    folder = tmp_path / "shards"
    tar, offset, size = place(folder, empty.key)
    frames = tar.read_bytes().index(b"mdat", offset) + 4
    write(tar, frames, bytes(offset + size - frames))
    tar, offset, size = place(folder, gone.key)
    write(tar, offset, bytes(size))
    found = attempt(folder, skips=True)
    assert [fault.partition(" ")[0] for fault in found] == ["captions/s1", "captions/s2", "captions/s3"]
    assert "does not decode" in found[0] and "no frame that decodes" in found[1] and "cannot be opened" in found[2]
    with pytest.raises(ValueError, match=rf"sample captions/s1 \(media/000000.tar, {len(photo) // 2} bytes at offset"):
        attempt(folder, skips=False)


def test_a_video_of_thirty_thousand_frames_gives_the_frames_of_a_row(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards") as writer:
        film = writer.add_video(long_video(2500))
        writer.add(captioned("film", film), "captions", "train")
    assert film.frames == 30_000
    content = tokenize(Shards(tmp_path / "shards").example("captions", "train", 0), "captions", 0, SETTINGS)
    assert content.crops == 8 and len(content.tokens) <= 512
    assert attempt(tmp_path / "shards", skips=False) == ()


def test_a_video_without_frames_is_not_stored(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as out:
        added = out.add_stream("libx264", rate=25)
        added.width, added.height, added.pix_fmt = 64, 48, "yuv420p"
    path = foreign(tmp_path, {"a.mp4": stream.getvalue(), "a.txt": b"A film.", "b.png": image(1), "b.txt": b"Good."})
    samples, faults = read(path, tmp_path=tmp_path)
    assert set(samples) == {"b"} and list(faults) == ["foreign.tar:a"] and "video" in faults["foreign.tar:a"]


def test_members_that_do_not_stand_together_are_named(tmp_path: Path) -> None:
    """Unsorted: webdataset takes a sample to end where another key begins. Neither half is lost in silence."""
    path = foreign(tmp_path, {"a.png": image(0), "b.png": image(1), "a.txt": b"A.", "b.txt": b"B.", "c.png": image(2),
                              "c.txt": b"C."})  # fmt: skip
    samples, faults = read(path, tmp_path=tmp_path)
    assert set(samples) == {"c"}
    assert [name.partition(":")[2] for name in faults] == ["a", "b"]


def test_a_key_twice_keeps_both_samples(tmp_path: Path) -> None:
    tars = [foreign(tmp_path, {"a.png": image(n), "a.txt": b"Text %d." % n}, f"{n}.tar") for n in range(2)]
    samples, faults = read(*tars, tmp_path=tmp_path)
    assert set(samples) == {"a", "a-2"} and not faults


def test_a_caption_of_length_zero_is_named(tmp_path: Path) -> None:
    path = foreign(tmp_path, {"a.png": image(0), "a.txt": b"", "b.png": image(1), "b.txt": b" \n", "c.png": image(2),
                              "c.json": b'{"caption": ""}', "d.png": image(3), "d.txt": b"Good."})  # fmt: skip
    samples, faults = read(path, tmp_path=tmp_path)
    assert set(samples) == {"d"} and len(faults) == 3


def test_an_empty_caption_of_a_downloaded_set_is_counted_and_named(tmp_path: Path) -> None:
    two = [{**row, "image_url": None, "image": {"bytes": image(n), "path": None}} for n, row in
           enumerate(rows("cosyn_chart_exp"))]  # fmt: skip
    two[1]["qa_pairs"] = {"question": ["What?"], "explanation": [""], "answer": [" "]}
    publish(tmp_path / "downloads", "cosyn_chart_exp", two)
    result = build(["cosyn_chart_exp"], tmp_path / "downloads", tmp_path / "out", max_left_out=0.5)
    assert result.left_out["cosyn_chart_exp"] == {"unsound": 1} and result.samples["cosyn_chart_exp"] == 2
    (line,) = (tmp_path / "out" / units.LEFT_OUT).read_text().splitlines()
    assert json.loads(line)["where"] and json.loads(line)["error"]


@pytest.mark.parametrize("place", ["[NaN, 3]", "[Infinity, 3]", "[1e999, 3]", "[3, -1]", "[30000, 3]"])
def test_places_that_are_nowhere_are_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "a.png").write_bytes(image(0))
    (tmp_path / "mine.jsonl").write_text(f'{{"image_path": "a.png", "label": "cups", "points": [{place}]}}\n')
    with pytest.raises(SystemExit, match="mine.jsonl:1: "):
        build_shards.main(["build", str(tmp_path / "mine.jsonl"), "--out", str(tmp_path / "shards")])
    assert not (tmp_path / "shards").exists()
