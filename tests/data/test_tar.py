"""Tars of strangers: what is indexed, and what is refused."""

import io
import tarfile

import numpy as np
import pytest

from megatron_vlm.data.tar import add_member, end_tar, index_tar, read_offsets, split_name, tar_bytes, write_offsets


def stranger(path, *members: tarfile.TarInfo, data: bytes = b"x" * 700):
    """A tar made by tarfile with the given headers; regular files get `data`."""
    with tarfile.open(path, "w") as tar:
        for member in members:
            member.size = len(data) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
    return path


def info(name: str, type: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = type, link
    return member


def test_index_finds_the_bytes(tmp_path):
    files = {"a/b.jpg": b"one", "c.0.png": b"", "d_-.json": b"y" * 1000}
    path = tmp_path / "x.tar"
    path.write_bytes(tar_bytes(files))
    data = path.read_bytes()
    members = index_tar(path)
    assert {f"{m.key}.{m.extension}": data[m.offset : m.offset + m.size] for m in members} == files
    with tarfile.open(path) as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == files


def test_offsets_are_those_of_samples(tmp_path):
    path, members = tmp_path / "x.tar", []
    with path.open("wb") as stream:
        for name in ("a.0.jpg", "a.1.jpg", "a.json", "b.jpg"):
            members.append(add_member(stream, name, b"z" * 600))
        end = end_tar(stream)
    write_offsets(tmp_path / "x.tar.idx", members, end)
    assert read_offsets(tmp_path / "x.tar.idx").tolist() == [0, members[3].header, end]
    assert (tmp_path / "x.tar.idx").stat().st_size == 24
    assert index_tar(path) == members


@pytest.mark.parametrize(
    "name", ["/etc/x.jpg", "../x.jpg", "a/../x.jpg", "x", "x.", ".jpg", "a b.jpg", "a//b.jpg", "ä.jpg"]
)
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="refused"):
        split_name(name)
    with pytest.raises(ValueError, match="refused"):
        index_tar(stranger(tmp_path / "x.tar", info(name)))


@pytest.mark.parametrize("type", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE])
def test_only_regular_files(tmp_path, type):
    with pytest.raises(ValueError, match="not a regular file"):
        index_tar(stranger(tmp_path / "x.tar", info("a.jpg", type, link="/etc/passwd")))


def test_a_name_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="twice"):
        index_tar(stranger(tmp_path / "x.tar", info("a.jpg"), info("a.jpg")))


@pytest.mark.parametrize("keep", [200, 600, 1024 + 700, 1536, 3072, 3500])
def test_a_cut_tar_is_refused(tmp_path, keep):
    path = stranger(tmp_path / "x.tar", info("a.jpg"), info("b.jpg"))
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="x.tar"):
        index_tar(path)


def test_a_size_beyond_the_file_is_refused(tmp_path):
    member = info("a.jpg")
    member.size = 1 << 40
    path = tmp_path / "x.tar"
    path.write_bytes(member.tobuf() + b"x" * 5120)
    with pytest.raises(ValueError, match="cut"):
        index_tar(path)


def test_links_to_tars_are_refused(tmp_path):
    stranger(tmp_path / "x.tar", info("a.jpg"))
    (tmp_path / "y.tar").symlink_to(tmp_path / "x.tar")
    with pytest.raises(ValueError, match="not a regular file"):
        index_tar(tmp_path / "y.tar")


def test_equal_content_gives_equal_bytes():
    assert tar_bytes({"a.jpg": b"1"}) == tar_bytes({"a.jpg": b"1"})
    assert np.frombuffer(tar_bytes({"a.jpg": b"1"}), dtype=np.uint8).size % 512 == 0
