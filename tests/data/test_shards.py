"""A directory of shards: written whole or not at all, read at random, damage named."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import webdataset

from megatron_vlm.data.digests import Digests
from megatron_vlm.data.example import Branch, Example, Media, Turn
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.verify import verify
from megatron_vlm.data.writer import ShardWriter
from tests.data.damage import rewrite, write
from tests.data.world import picture


def sample(key: str, *media: Media) -> Example:
    return Example(key, (Branch("long_caption", (Turn("", f"This is {key}."),)),), tuple(media))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """300 samples over several tars; every fourth shares the image before it."""
    folder, rng, files = tmp_path_factory.mktemp("shards") / "shards", np.random.default_rng(5), {}
    with ShardWriter(folder, shard_bytes=50_000) as writer:
        media = None
        for number in range(300):
            if number % 4 != 3:
                data = picture(rng, size=(8, 9))
                media = writer.add_image(data)
                files[media.key] = data
            assert writer.add_image(data) == media, "stored once, however often it is added"
            writer.add(sample(f"s/{number}", media), "captions", "train" if number < 290 else "test")
        writer.add(sample("t"), "text", "train")
        writer.add_file("tokenizer.json", b"{}")
    return folder, files


@pytest.fixture
def copied(built, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(built[0], tmp_path / "copy")


def test_reads_what_was_written(built):
    folder, files = built
    shards = Shards(folder)
    assert shards.datasets == ("captions", "text")
    assert shards.splits("captions") == ("test", "train")
    assert [shards.count("captions", split) for split in ("train", "test", "none")] == [290, 10, 0]
    for number in (289, 0, 7):
        example = shards.example("captions", "train", number)
        assert example.key == f"s/{number}" and example.branches == sample(example.key).branches
        assert (example.media[0].width, example.media[0].height) == (8, 9)
    assert shards.keys("captions", "test") == [f"s/{number}" for number in range(290, 300)]
    assert all(shards.media(key) == data for key, data in files.items())
    assert shards.manifest["media"]["count"] == len(files) == 225, "the same file again is stored once"
    assert shards.file("tokenizer.json").read_bytes() == b"{}"
    assert verify(folder) == []


def test_digests_are_found_whatever_their_slots():
    """Against a dict; many share their first bytes, so that they meet in the table."""
    rng, known, table = np.random.default_rng(0), {}, Digests(16)
    for number in range(1500):
        digest = bytes([number % 7]) + bytes(7) + rng.bytes(8) if number % 2 else rng.bytes(16)
        assert table.find(digest) == known.get(digest, -1) == -1
        known[digest] = table.add(digest)
        assert known[digest] == number == table.find(digest)
    assert len(table) == 1500 and all(table.find(digest) == row for digest, row in known.items())
    assert table[17] in known and bytes(table.data()) == b"".join(known)


def test_a_key_that_ends_in_zero_bytes_is_found(tmp_path):
    rng, data = np.random.default_rng(0), b""
    while not hashlib.sha256(data).hexdigest().endswith("00"):
        data = picture(rng, "BMP", (2, 2)) if not data else data + b"\0"
    with ShardWriter(tmp_path / "shards") as writer:
        media = writer.add_image(data)
        writer.add(sample("a", media), "captions", "train")
    assert Shards(tmp_path / "shards").media(media.key) == data


def test_plain_webdataset_opens_the_tars(built):
    folder, files = built
    tars = [str(path) for path in sorted((folder / "media").glob("*.tar"))]
    assert len(tars) > 1
    found = {item["__key__"]: item["jpg"] for item in webdataset.WebDataset(tars, shardshuffle=False)}
    assert found == files


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name) as writer:
            writer.add(sample("x", writer.add_image(picture(np.random.default_rng(1)))), "captions", "train")
    assert Shards(tmp_path / "a").hash == Shards(tmp_path / "b").hash


def test_a_pickled_reader_opens_anew(built):
    copy = pickle.loads(pickle.dumps(Shards(built[0])))
    assert copy.example("captions", "train", 3).key == "s/3"


def test_a_failed_build_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "shards") as writer:
        writer.add(sample("a"), "text", "train")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_vlm.data.writer.write_offsets", full)
    with pytest.raises(OSError, match="No space"), ShardWriter(tmp_path / "shards") as writer:
        writer.add(sample("a", writer.add_image(picture(np.random.default_rng(0)))), "captions", "train")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["mkdir", "rename"])
def test_a_disk_that_is_full_at_once_leaves_nothing(tmp_path, monkeypatch, name):
    whole = getattr(os, name)

    def full(path, *rest, **options):
        if name == "rename" or Path(path).name == "samples":
            raise OSError(28, "No space left on device")
        return whole(path, *rest, **options)

    monkeypatch.setattr(os, name, full)
    with pytest.raises(OSError, match="No space"), ShardWriter(tmp_path / "shards"):
        raise AssertionError("nothing can be written")
    assert os.listdir(tmp_path) == []


def test_what_killed_builds_left_goes_with_the_next_and_what_lives_stays(tmp_path):
    killed = "import os, sys; from megatron_vlm.data.writer import ShardWriter\n"
    killed += "with ShardWriter('shards'), ShardWriter('other'): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", killed], cwd=tmp_path, timeout=60)
    assert len(os.listdir(tmp_path)) == 2
    with ShardWriter(tmp_path / "shards") as first, ShardWriter(tmp_path / "shards") as second:
        assert len(list(tmp_path.glob("shards.partial-*"))) == 2 and len(list(tmp_path.glob("other.partial-*"))) == 1
        for writer in (first, second):
            writer.add(sample("a"), "text", "train")
    assert len(list(tmp_path.glob("*.partial-*"))) == 1
    assert Shards(tmp_path / "shards").count("text", "train") == 1


def test_the_same_build_twice_at_once(tmp_path):
    first, second = ShardWriter(tmp_path / "shards"), ShardWriter(tmp_path / "shards")
    with first, second:
        for writer in (first, second):
            writer.add(sample("a"), "text", "train")
    assert os.listdir(tmp_path) == ["shards"]


def test_directories_in_the_way(built, copied, tmp_path):
    with pytest.raises(ValueError, match="exists already. Choose another --out; --overwrite replaces shards."):
        ShardWriter(copied)
    with ShardWriter(copied, overwrite=True) as writer:
        writer.add(sample("only"), "text", "train")
    assert Shards(copied).datasets == ("text",)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="exists already.*it holds no shards, and only shards are replaced"):
        ShardWriter(tmp_path / "mine", overwrite=True)


def test_bad_samples_are_not_written(tmp_path):
    foreign = Media("0" * 64, 8, 9)
    with ShardWriter(tmp_path / "shards") as writer:
        writer.add(sample("a"), "text", "train")
        for example, dataset, split, complaint in (
            (sample("a"), "text", "train", "used twice"),
            (sample("../b"), "text", "train", "sample key"),
            (sample("b"), "te/xt", "train", "cannot name"),
            (sample("b"), "text", "..", "cannot name"),
            (sample("b", foreign), "text", "train", "neither add_image nor add_video returned"),
        ):
            with pytest.raises(ValueError, match=complaint):
                writer.add(example, dataset, split)
        with pytest.raises(ValueError, match="no readable header"):
            writer.add_image(b"#EXTM3U\nhttp://example.com/x.jpg")
        with pytest.raises(ValueError, match="cannot name"):
            writer.add_file("../x", b"")
    assert Shards(tmp_path / "shards").keys("text", "train") == ["a"]


def test_an_empty_build_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no sample"), ShardWriter(tmp_path / "shards"):
        pass


def test_unknown_names(built):
    shards = Shards(built[0])
    with pytest.raises(ValueError, match="no data set 'photos'; it has captions, text"):
        shards.count("photos", "train")
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        shards.example("text", "test", 0)
    with pytest.raises(ValueError, match="is not in"):
        shards.media("ab" * 32)
    with pytest.raises(ValueError, match="holds no manifest.json"):
        Shards(built[0] / "media")
    with pytest.raises(ValueError, match="holds no 'x'"):
        shards.file("x")


@pytest.mark.parametrize(
    "name", ["media/000001.tar", "media/000000.tar.idx", "media.arrow", "samples/text.train.arrow"]
)
def test_missing_cut_and_linked_files_are_named(copied, name):
    path = copied / name
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(ValueError, match=f"{name} has .* it was cut"):
        Shards(copied)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        Shards(copied)
    (copied / "elsewhere").write_bytes(data)
    path.symlink_to(copied / "elsewhere")
    with pytest.raises(ValueError, match=f"{name} is not a regular file"):
        Shards(copied)


def edit(folder, change) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_manifest_and_files_must_agree(copied):
    edit(copied, lambda manifest: manifest["datasets"]["text"]["train"].update(samples=2))
    with pytest.raises(ValueError, match="holds 1 samples, the manifest says 2"):
        Shards(copied).example("text", "train", 0)
    edit(copied, lambda manifest: manifest["media"].update(count=3))
    with pytest.raises(ValueError, match="lists 225 files, the manifest 3"):
        Shards(copied)
    edit(copied, lambda manifest: manifest["files"].update({"../../etc/passwd": {"size": 1, "sha256": ""}}))
    with pytest.raises(ValueError, match="refused"):
        Shards(copied)
    edit(copied, lambda manifest: manifest.update(format=99))
    with pytest.raises(ValueError, match="format 99"):
        Shards(copied)
    (copied / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="not a manifest"):
        Shards(copied)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("files"),
        lambda manifest: manifest.update(files=[]),
        lambda manifest: manifest["files"].update({"media.arrow": 3}),
        lambda manifest: manifest["files"]["media.arrow"].pop("sha256"),
        lambda manifest: manifest.update(datasets=["text"]),
        lambda manifest: manifest["datasets"]["text"].update(train={}),
        lambda manifest: manifest["datasets"]["text"]["train"].update(samples=-1),
        lambda manifest: manifest["datasets"].update({"../../etc": {"passwd": {"samples": 1}}}),
        lambda manifest: manifest.update(media={"shards": None, "count": 225}),
        lambda manifest: manifest["media"]["shards"].append("../../etc/passwd"),
    ],
)
def test_a_manifest_of_another_form_is_refused(copied, change):
    edit(copied, change)
    with pytest.raises(ValueError, match="manifest.json"):
        Shards(copied)


def test_manifest_nested_too_deeply(copied):
    (copied / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a manifest"):
        Shards(copied)


def column(name, *values):
    """A change of a table: another column, with these values first."""

    def change(table):
        kept = table.column(name).to_pylist()
        array = pa.array([*values, *kept[len(values) :]], type=table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), name, array)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (column("offset", -512), "lies outside shard"),
        (column("offset", 2**62), "lies outside shard"),
        (column("size", 2**63 - 1), "lies outside shard"),  # offset + size is below zero in 64 bits
        (column("shard", -1), "lies outside shard"),
        (column("shard", 99), "lies outside shard"),
        (column("size", None), "'size' lacks values"),
        (lambda table: table.drop_columns(["size"]), "has no column size"),
        (lambda table: table.set_column(0, "key", pa.array(["x"] * len(table))), "column 'key' is string"),
    ],
)
def test_an_index_that_lies_is_refused(copied, change, message):
    rewrite(copied, "media.arrow", change)
    with pytest.raises(ValueError, match=message):
        Shards(copied)


@pytest.mark.parametrize(
    "record",
    [
        "",
        "[]",
        "{}",
        "[" * 100_000,
        '{"key": 3, "media": [[]], "branches": []}',
        '{"key": "t", "media": [], "branches": [{"style": "x", "turns": [[1]]}]}',
    ],
)
def test_a_record_that_is_no_sample_is_named(copied, record):
    """With the right checksum: a stranger's, not a damaged one."""

    def change(table):
        checksum = pa.array([zlib.crc32(record.encode())], type=pa.uint32())
        return table.set_column(1, "record", pa.array([record])).set_column(2, "checksum", checksum)

    rewrite(copied, "samples/text.train.arrow", change)
    with pytest.raises(ValueError, match="text.train.arrow, sample 0: the record is no sample"):
        Shards(copied).example("text", "train", 0)


def test_an_arrow_file_whose_values_lie_outside_it_is_refused(copied):
    """Read as it says, a text would begin or end anywhere in memory, and the process with it."""
    path = copied / "samples/captions.train.arrow"
    with pa.memory_map(str(path)) as source:
        whole = source.read_buffer()
        ends = pa.ipc.open_file(pa.BufferReader(whole)).get_batch(0).column("record").buffers()[1]
    write(path, ends.address - whole.address + 4, b"\xff\xff\xff\x7f")
    with pytest.raises(ValueError, match="'record' has a text that ends before it begins"):
        Shards(copied).keys("captions", "train")


def test_flipped_bytes_in_an_arrow_file_end_no_process(copied):
    path, random = copied / "samples/text.train.arrow", np.random.default_rng(0)
    sound, refused = path.read_bytes(), 0
    for _ in range(100):
        data = bytearray(sound)
        for place in random.integers(len(data), size=2):
            data[place] = random.integers(256)
        path.write_bytes(data)
        try:
            assert Shards(copied).example("text", "train", 0).key
        except ValueError:
            refused += 1
    assert 0 < refused < 100  # some bytes are of other samples, or of padding


def test_a_compressed_arrow_file_is_refused(copied):
    """It could hold any number of bytes in a few."""
    name = "samples/text.train.arrow"
    rewrite(copied, name, lambda table: table, compression="zstd")
    with pytest.raises(ValueError, match="is compressed"):
        Shards(copied).example("text", "train", 0)


def test_a_size_that_is_not_the_files_is_told(copied):
    """The crops of a sample are planned by it."""
    rewrite(copied, "media.arrow", column("width", 900))
    faults = verify(copied)
    assert any("it has 8x9 pixels, not (900, 9)" in fault for fault in faults)
    assert any("has another size than it says" in fault for fault in faults)


def test_offsets_beside_a_tar_that_lie_are_told(copied):
    name = "media/000000.tar.idx"
    offsets = np.fromfile(copied / name, dtype="<i8")
    offsets[1], offsets[-1] = -512, 2**62
    offsets.tofile(copied / name)
    assert f"{name}: its offsets are not the tar's." in verify(copied)


def test_an_index_outside_its_shard_is_refused(copied):
    edit(copied, lambda manifest: manifest["media"]["shards"].pop())
    with pytest.raises(ValueError, match="lies outside shard"):
        Shards(copied)


def test_verify_names_a_flipped_byte(copied):
    path = copied / "media/000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    faults = verify(copied)
    assert any("at offset 512: the content's sha256 is another one" in fault for fault in faults)
    assert any(fault.startswith("media/000000.tar: its sha256") for fault in faults)


def test_verify_names_a_damaged_record(copied):
    path = copied / "samples/text.train.arrow"
    data = path.read_bytes()
    path.write_bytes(data.replace(b"This is t.", b"This is u."))
    assert any("record does not fit its checksum" in fault for fault in verify(copied))
