"""Tars of strangers: what is indexed, and what is refused."""

import io
import tarfile

import numpy as np
import pytest

from megatron_vlm.data import bundle, repair
from megatron_vlm.data.example import Media
from megatron_vlm.data.tar import add_member, end_tar, index_tar, sample_headers, split_name, write_offsets
from tests.data.world import tar_bytes


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
    write_offsets(tmp_path / "x.tar.idx", sample_headers(members), end)
    assert np.fromfile(tmp_path / "x.tar.idx", dtype="<u8").tolist() == [0, members[3].header, end]
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


# Two members of 1,536 bytes each, then the end: two blocks of 512.
@pytest.mark.parametrize("keep", [200, 600, 1024 + 700, 1536, 3072, 3500, 3072 + 512, 4095])
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


def with_size(data: bytes, size: int) -> bytes:
    """The tar whose first member claims another size, as base-256 numbers can."""
    header = bytearray(data[:512])
    header[124:136] = (size % 2**96).to_bytes(12, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**40)])
def test_a_size_below_zero_leads_nobody_in_circles(tmp_path, size):
    path = tmp_path / "media" / "x.tar"
    path.parent.mkdir()
    path.write_bytes(with_size(tar_bytes({"a.jpg": b"x" * 600, "b.jpg": b"y"}), size))
    with pytest.raises(ValueError, match="x.tar"):
        index_tar(path)
    with pytest.raises(ValueError, match="x.tar cannot be read to its end"):
        list(bundle.read([path], lambda _: Media("", 1, 1), lambda _: Media("", 1, 1)))
    assert list(repair._members(tmp_path)) == []


def test_tars_joined_in_one_file_are_told(tmp_path):
    """A reader stops at the first end mark: what comes behind it would be lost in silence."""
    (path := tmp_path / "x.tar").write_bytes(tar_bytes({"a.jpg": b"x"}) + tar_bytes({"b.jpg": b"y"}))
    with pytest.raises(ValueError, match="goes on behind the end of its last member at byte 1024"):
        index_tar(path)
    with pytest.raises(ValueError, match="x.tar cannot be read to its end: it goes on"):
        list(bundle.read([path], lambda _: Media("", 1, 1), lambda _: Media("", 1, 1)))
    path.write_bytes(tar_bytes({"a.jpg": b"x"}) + bytes(10240))  # as GNU tar fills it up
    assert len(index_tar(path)) == 1
