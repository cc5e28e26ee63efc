"""Self-contained tars are read back equal; tars made elsewhere are read, and harm nobody."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from megatron_vlm.data import bundle, export
from megatron_vlm.data.example import Branch, Example, Media, Point, Points, Tracks, Turn
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.writer import ShardWriter
from tests.data.clips import clip, steady
from tests.data.world import picture, tar_bytes


def image(seed: int) -> bytes:
    return picture(np.random.default_rng(seed), "PNG", (8, 6))


@pytest.fixture
def built(tmp_path: Path) -> Shards:
    """A caption, eleven images in one sample, places, a video with tracks, text."""
    with ShardWriter(tmp_path / "shards") as writer:
        pictures = tuple(writer.add_image(image(number)) for number in range(11))
        film = writer.add_video(clip(steady(10)))
        track = Tracks("car", ((Point(0.0, 0.5, 0.5), Point(0.5, 0.6, 0.5)),))
        for key, media, style, answer in (
            ("a/one", pictures[:1], "long_caption", "One."),
            ("a/many", pictures, "user_qa", "Many."),
            ("b", pictures[:2], "multi_image_pointing", Points("cups", (Point(2, 0.25, 0.75),))),
            ("film", (film,), "video_point_track_per_frame", track),
            ("text", (), "text_sft", "Text."),
        ):
            writer.add(Example(key, (Branch(style, (Turn("What?", answer),)),), media, {"id": key}), "mixed", "train")
    return Shards(tmp_path / "shards")


def read(*tars: Path, tmp_path: Path) -> tuple[dict[str, Example], dict[str, str]]:
    """(samples by key, faults by name) of tars; media go to a writer that is then given up."""
    samples, faults = {}, {}
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "given_up") as writer:
        for name, sample in bundle.read(list(tars), writer.add_image, writer.add_video):
            if isinstance(sample, ValueError):
                faults[name] = str(sample)
            else:
                samples[sample.key] = sample
        raise KeyboardInterrupt
    return samples, faults


def test_what_was_written_is_read_back_equal(built: Shards, tmp_path: Path) -> None:
    tars = export.write(built, "mixed", tmp_path / "tars")
    samples, faults = read(*tars, tmp_path=tmp_path)
    assert not faults
    written = [built.example("mixed", "train", number) for number in range(5)]
    assert samples == {example.key: example for example in written}


def foreign(tmp_path: Path, files: dict[str, bytes], name: str = "foreign.tar") -> Path:
    """A tar as other programs write it, with any names."""
    path = tmp_path / name
    with tarfile.open(path, "w") as tar:
        for member, data in files.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_tars_made_elsewhere_are_read(tmp_path: Path) -> None:
    asked = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]}
    path = foreign(tmp_path, {
        "000.jpg": image(0), "000.txt": b"A caption.",
        "001.png": image(1), "001.json": json.dumps({"caption": "Another.", "url": "x", "similarity": 0.3}).encode(),
        "dir/my photo (2).jpeg": image(2), "dir/my photo (2).caption": b"Third.",
        "003.jpg": image(3), "003.json": json.dumps(asked).encode(),
        "004.json": json.dumps({"text": "Only text."}).encode(),
        "005.mp4": clip(steady(6)), "005.txt": b"A film.",
        "006.jpg": image(4), "006.txt": b"Told beside facts.", "006.json": b'{"url": "x", "width": 640}',
        "\udcff.jpg": image(5), "\udcff.txt": b"A name that is not UTF-8.",
    })  # fmt: skip
    samples, faults = read(path, tmp_path=tmp_path)
    assert not faults and len(samples) == 8
    assert samples["006"].branches[0].turns[0].answer == "Told beside facts."
    assert samples["000"].branches[0].turns[0].answer == "A caption."
    assert samples["001"].branches[0].turns[0].answer == "Another."
    (third,) = [sample for key, sample in samples.items() if key.startswith("dir_my_photo")]
    assert third.branches[0].turns[0].answer == "Third."
    assert samples["003"].branches[0].turns == (Turn("What?", "A cat."),)
    assert samples["004"].branches[0].style == "text_sft"
    assert samples["005"].branches[0].style == "video_long_caption"


def written_by_webdataset(tmp_path: Path) -> list[Path]:
    """Seven samples of images, captions and JSON in shards of three, as webdataset's own writers make them."""
    with webdataset.ShardWriter(str(tmp_path / "wds-%06d.tar"), maxcount=3, verbose=0) as sink:
        for number in range(6):
            pixels = np.full((6, 8, 3), 40 * number, dtype=np.uint8)
            told = {"caption": f"Picture {number}."} if number % 2 else {"question": "Which?", "answer": f"{number}."}
            sink.write({"__key__": f"part/{number:04d}", "jpg" if number % 3 else "png": pixels, "json": told})
    with webdataset.TarWriter(str(tmp_path / "single.tar")) as sink:
        sink.write({"__key__": "only", "jpg": np.zeros((6, 8, 3), np.uint8), "txt": "A caption.", "cls": 3})
    return sorted(tmp_path.glob("*.tar"))


def test_shards_written_by_webdataset_are_read(tmp_path: Path) -> None:
    tars = written_by_webdataset(tmp_path)
    assert len(tars) == 3
    samples, faults = read(*tars, tmp_path=tmp_path)
    assert not faults and len(samples) == 7
    for number in range(6):
        sample = samples[f"part/{number:04d}"]
        assert (sample.media[0].width, sample.media[0].height) == (8, 6)
        (turn,) = sample.branches[0].turns
        assert turn == (Turn("", f"Picture {number}.") if number % 2 else Turn("Which?", f"{number}."))
    assert samples["only"].branches[0].turns[0].answer == "A caption."


def test_compressed_shards_are_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar.gz")) as sink:
        sink.write({"__key__": "a", "png": np.zeros((6, 8, 3), np.uint8), "txt": "A caption."})
    samples, faults = read(tmp_path / "a.tar.gz", tmp_path=tmp_path)
    assert set(samples) == {"a"} and not faults
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "a.tar.gz").read_bytes()[:-20])
    with pytest.raises(ValueError, match="cut.tar.gz cannot be read to its end"):
        read(tmp_path / "cut.tar.gz", tmp_path=tmp_path)


def test_a_sample_too_large_for_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed tar of some kilobytes can hold a file, or many of one sample, of any size."""
    monkeypatch.setattr(bundle, "MAX_SAMPLE_BYTES", 100_000)
    path = tmp_path / "bomb.tar.gz"
    plain = foreign(tmp_path, {"a.jpg": bytes(10**6), "a.txt": b"x", "b.0.jpg": bytes(60_000), "b.1.jpg": bytes(60_000),
                               "b.json": b'{"text": "x"}', "c.png": image(0), "c.txt": b"Good."})  # fmt: skip
    path.write_bytes(gzip.compress(plain.read_bytes()))
    samples, faults = read(path, tmp_path=tmp_path)
    assert set(samples) == {"c"} and len(faults) == 2
    assert all("more than 100000 bytes: refused" in words for words in faults.values())


class Harm:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_pickles_are_refused_and_never_read(tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    data = pickle.dumps(Harm(harm))
    path = foreign(tmp_path, {
        "a.jpg": image(0), "a.txt": b"x", "a.pyd": data, "b.jpg": image(1), "b.txt": b"x", "b.pth": data,
        "c.jpg": image(2), "c.txt": b"x", "c.features.PKL": data, "d.jpg": image(3), "d.txt": b"Good.",
    })  # fmt: skip
    samples, faults = read(path, tmp_path=tmp_path)
    assert set(samples) == {"d"} and len(faults) == 3
    for name, words in faults.items():
        assert "is a pickle, which can run code when it is read: refused" in words, name
    assert not harm.exists()
    pickle.loads(data)  # it would have done harm
    assert harm.exists()


def test_links_in_a_tar_are_left_alone(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(secret)
            tar.addfile(info)
            info = tarfile.TarInfo(name.replace("txt", "png"))
            info.size = len(image(0))
            tar.addfile(info, io.BytesIO(image(0)))
    samples, faults = read(path, tmp_path=tmp_path)
    assert not samples and len(faults) == 2
    assert all("is no regular file: refused" in words for words in faults.values())


def test_a_name_twice_in_a_sample_is_an_error(tmp_path: Path) -> None:
    path = foreign(tmp_path, {"a.jpg": image(0), "a.JPG": image(1)})
    with pytest.raises(ValueError, match="cannot be read to its end: a.JPG: duplicate file name"):
        list(bundle.read([path], lambda _: Media("", 1, 1), lambda _: Media("", 1, 1)))


def test_samples_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    path = foreign(tmp_path, {
        "a.jpg": image(0), "b.jpg": b"no picture", "b.txt": b"x", "c.jpg": image(1), "c.json": b"{broken",
        "d.jpg": image(2), "d.txt": b"Good.", "e.json": b"[1]", "f.jpg": image(3), "f.json": b'{"width": 3}',
        "g.json": json.dumps({"media": [["0" * 64, 1, 1, "image"]], "branches": [], "key": "g"}).encode(),
        "h.json": b'{"text":' + b"[" * 100_000, "i.json": b'{"text": "one", "text": "two"}',
        "j.mp4": b"", "j.txt": b"x",
        "k.one.jpg": image(4), "k.one.txt": b"A key with a dot: webdataset's ends at the first.",
        "l.json": b'{"text": "half \\ud800"}', "m.jpg": b"", "m.txt": b"x",
        "n.json": b'{"key": "n", "media": [], "branches": [{"style": 3, "turns": [[]]}]}',
        "o.txt": b"\xff", "o.jpg": image(5),
    })  # fmt: skip
    samples, faults = read(path, tmp_path=tmp_path)
    assert set(samples) == {"d", "l"}, "l cannot be written, which the writer tells"
    assert {name.partition(":")[2]: words for name, words in faults.items()}.keys() == set("abcefghijkmno")
    words = " ".join(faults.values())
    for part in ("needed a JSON object, or an image", "no readable header", "not a list", "its media are not those",
                 "nested too deeply", "'text' stands in it twice", "it has one.jpg, one.txt"):  # fmt: skip
        assert part in words


def test_names_that_leave_the_folder_do_no_harm(tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    path = foreign(
        tmp_path, {"../../evil.jpg": image(0), "../../evil.txt": b"x", "/abs.jpg": image(1), "/abs.txt": b"y"}
    )
    samples, _ = read(path, tmp_path=tmp_path)
    assert len(samples) == 2 and not any(".." in key or key.startswith("/") for key in samples)
    assert sorted(tmp_path.iterdir()) == sorted([*before, path])


@pytest.mark.parametrize("name", ["pipe:touch harm", "http://127.0.0.1/x.tar", "none.tar"])
def test_only_files_are_opened(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="addresses and commands are refused"):
        list(bundle.read([Path(name)], lambda _: Media("", 1, 1), lambda _: Media("", 1, 1)))
    assert not any(tmp_path.iterdir())


def test_a_cut_tar_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(tar_bytes({"a.jpg": image(0) * 50, "a.txt": b"x"})[:1500])
    with pytest.raises(ValueError, match="cannot be read to its end"):
        list(bundle.read([path], lambda _: Media("", 1, 1), lambda _: Media("", 1, 1)))
