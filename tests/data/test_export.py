"""Exported tars: webdataset, wids and Megatron-Energon open whole samples of them, as they are.

Energon lives in an environment of its own, which its test makes with pip. Only torch, numpy, Pillow and webdataset come
from the environment that runs the tests: two hundred megabytes less to fetch.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import webdataset
import wids
import yaml

from megatron_vlm.data import bundle, export
from megatron_vlm.data.example import Branch, Example, Point, Points, Tracks, Turn, to_json
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.writer import ShardWriter
from tests.data.clips import clip, steady
from tests.data.world import picture

#: Keys that the readers would not find under their own name: too long for them, or taken for their own.
LONG = "folder/" + "long_" * 30 + "key"
HIDDEN = "__hidden__/key"
ENERGON = "megatron-energon==7.4.1"
#: What it imports beside torch, numpy, Pillow and webdataset.
NEEDS = ("braceexpand", "click", "filetype", "mfusepy", "multi-storage-client", "pyyaml", "rapidyaml", "s3fs", "tqdm")
READER = Path(__file__).with_name("energon_reader.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Train: a caption, eleven images in one sample, places, a film with tracks, text, odd keys. Two splits more."""
    folder = tmp_path_factory.mktemp("export") / "shards"
    with ShardWriter(folder) as writer:
        pictures = tuple(
            writer.add_image(picture(np.random.default_rng(number), "PNG", (8, 6))) for number in range(11)
        )
        photo = writer.add_image(picture(np.random.default_rng(50), size=(64, 48)))
        film = writer.add_video(clip(steady(10)))
        track = Tracks("car", ((Point(0.0, 0.5, 0.5), Point(0.5, 0.6, 0.5)),))
        for key, media, style, answer in (
            ("a/one", (photo,), "long_caption", "One."),
            ("a/many", pictures, "user_qa", "Many."),
            ("b", pictures[:2], "multi_image_pointing", Points("cups", (Point(2, 0.25, 0.75),))),
            ("film", (film,), "video_point_track_per_frame", track),
            ("text", (), "text_sft", "Text."),
            (LONG, (photo,), "long_caption", "Long."),
            (HIDDEN, (photo,), "long_caption", "Hidden."),
        ):
            writer.add(Example(key, (Branch(style, (Turn("What?", answer),)),), media, {"id": key}), "mixed", "train")
        for split in ("validation", "test"):
            writer.add(Example("x", (Branch("long_caption", (Turn("", split),)),), (photo,)), "mixed", split)
    return Shards(folder)


@pytest.fixture(scope="module")
def exported(built: Shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the data set; train lies in several tars."""
    out = tmp_path_factory.mktemp("exported")
    tars = export.write(built, "mixed", out, shard_bytes=3_000)
    folder = out / "mixed"
    assert sorted(tars) == sorted(folder.glob("*.tar")) and len(tars) > 4
    assert not list(out.glob("*partial*"))
    return folder


def examples(built: Shards, split: str = "train") -> dict[str, Example]:
    """Samples of a split by their record."""
    return {to_json(one): one for one in (built.example("mixed", split, n) for n in range(built.count("mixed", split)))}


def check(built: Shards, sample: dict[str, bytes], example: Example) -> None:
    """A sample as a reader gives it, {ending: bytes}: nothing is missing, nothing is too much, every byte is there."""
    assert sample.pop("json") == to_json(example).encode()
    assert {int(name.partition(".")[0]): data for name, data in sample.items()} == {
        number: built.media(media.key) for number, media in enumerate(example.media)
    }
    assert {name.partition(".")[2] for name in sample} <= {"png", "jpg", "mp4"}


def test_webdataset_opens_whole_samples(built: Shards, exported: Path) -> None:
    left = examples(built)
    tars = [str(path) for path in sorted(exported.glob("train-*.tar"))]
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        files = {name: data for name, data in sample.items() if not name.startswith("__")}
        check(built, files, left.pop(files["json"].decode()))
    assert not left


def test_wids_opens_whole_samples_at_random(built: Shards, exported: Path) -> None:
    left = examples(built)
    # The tars lie where its cache looks for them, so that it copies none.
    shards = wids.ShardListDataset(str(exported / "train.json"), cache_dir=str(exported), transformations=[])
    assert len(shards) == len(left)
    for index in reversed(range(len(shards))):
        files = {name[1:]: data.read() for name, data in shards[index].items() if name.startswith(".")}
        check(built, files, left.pop(files["json"].decode()))
    assert not left
    shards.close()


def test_keys_that_readers_would_not_find_stand_in_the_json(built: Shards, exported: Path, tmp_path: Path) -> None:
    tars = sorted(exported.glob("train-*.tar"))
    keys = {sample["__key__"] for sample in webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)}
    assert {"a/one", "a/many", "b", "film", "text"} < keys and len(keys) == 7 and not {LONG, HIDDEN} & keys
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path / "given_up") as writer:
        read = [sample for _, sample in bundle.read(tars, writer.add_image, writer.add_video)]
        raise KeyboardInterrupt
    assert {sample.key: sample for sample in read} == {one.key: one for one in examples(built).values()}


def test_what_energon_reads_beside_the_tars(built: Shards, exported: Path) -> None:
    counts = json.loads((exported / ".nv-meta/.info.json").read_text())["shard_counts"]
    splits = yaml.safe_load((exported / ".nv-meta/split.yaml").read_text())["split_parts"]
    assert set(splits) == {"train", "val", "test"} and sorted(counts) == sorted(sum(splits.values(), []))
    assert {name: sum(counts[tar] for tar in tars) for name, tars in splits.items()} == {
        "train": 7,
        "val": 1,
        "test": 1,
    }
    for tar, count in counts.items():
        offsets = np.fromfile(exported / f"{tar}.idx", dtype="<u8")
        assert len(offsets) == count + 1 and offsets[0] == 0 and offsets[-1] < (exported / tar).stat().st_size


def test_a_folder_in_the_way_is_kept(built: Shards, exported: Path) -> None:
    before = sorted(path.name for path in exported.iterdir())
    with pytest.raises(ValueError, match="exists already"):
        export.write(built, "mixed", exported.parent)
    assert sorted(path.name for path in exported.iterdir()) == before


def test_an_export_that_fails_leaves_nothing(built: Shards, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_vlm.data.export.write_offsets", full)
    with pytest.raises(OSError, match="No space"):
        export.write(built, "mixed", tmp_path)
    assert not list(tmp_path.iterdir())


def install(python: Path, *arguments: str) -> None:
    """pip, run by this environment for another. Skips, saying why, where no package index answers."""
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    unreachable = ("Failed to establish a new connection", "Temporary failure in name resolution", "timed out",
                   "No matching distribution found for")  # fmt: skip
    if done.returncode and any(words in done.stderr for words in unreachable):
        pytest.skip(f"no package index serves {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    assert not done.returncode, done.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of the environment that holds Energon."""
    folder = tmp_path_factory.mktemp("energon")
    venv.create(folder)
    python = folder / "bin" / "python"
    install(python, *NEEDS)
    install(python, "--no-deps", ENERGON)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "running.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return python


def read(python: Path, folder: Path, split: str, *, training: bool) -> list[dict]:
    command = [str(python), str(READER), str(folder), split, str(int(training))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert not done.returncode, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split", "training"), [("train", "train", False), ("train", "train", True), ("val", "validation", False),
                                    ("test", "test", False)]
)  # fmt: skip
def test_energon_opens_whole_samples(
    built: Shards,
    exported: Path,
    python: Path,
    name: str,
    split: str,
    training: bool,
) -> None:
    found = read(python, exported, name, training=training)
    examples = [built.example("mixed", split, number) for number in range(built.count("mixed", split))]
    expected = [[sha256(to_json(one).encode()), *(media.key for media in one.media)] for one in examples]
    members = []
    for sample in found:
        assert sample["subflavors"] == {"dataset": "mixed"}
        record = sample["members"].pop("json")
        # A stored file's key is its sha256; a member is called by its number and its kind.
        files = sorted(sample["members"].items(), key=lambda item: int(item[0].partition(".")[0]))
        members.append([record, *(data for _, data in files)])
    assert (sorted(members) == sorted(expected)) if training else (members == expected)
