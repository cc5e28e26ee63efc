"""Folders of safetensors files: hostile or broken ones are refused by name, written ones are whole or absent."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.convert import hf


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


A = entry(0, 8, [2])
HOSTILE = {
    "shorter than a length": (b"\x01\x02", "is cut"),
    "a header longer than the file": (struct.pack("<Q", 1 << 20) + b"{}", "its header has 1048576 bytes"),
    "a header of 2^63 bytes": (struct.pack("<Q", 1 << 63) + b"{}", "its header has 9223372036854775808 bytes"),
    "no JSON": ((b"{nope", b""), "its header is damaged"),
    "deep JSON": ((b"[" * 100_000, b""), "its header is damaged"),
    "a list": (([1], b""), "its header is a list"),
    "a tensor twice": ((b'{"a":%s,"a":%s}' % ((json.dumps(A).encode(),) * 2), bytes(8)), "'a' stands in it twice"),
    "no dtype": (({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)), "entry of a is damaged"),
    "a negative size": (({"a": entry(0, 8, [-2])}, bytes(8)), "entry of a is damaged"),
    "a size that is no number": (({"a": entry(0, 8, [True])}, bytes(8)), "entry of a is damaged"),
    "backwards": (({"a": entry(8, 0, [2])}, bytes(8)), "tensor a begins at byte|takes 8 bytes, but has -8"),
    "fewer bytes than the shape": (({"a": entry(0, 4, [2])}, bytes(4)), "which takes 8 bytes, but has 4"),
    "overlap": (({"a": A, "b": entry(4, 12, [2])}, bytes(12)), "tensor b begins at byte .* ends at"),
    "a gap": (({"a": A, "b": entry(12, 20, [2])}, bytes(20)), "tensor b begins at byte"),
    "beyond the end": (({"a": A}, bytes(4)), "is cut or has something behind"),
    "something behind": (({"a": A}, bytes(12)), "is cut or has something behind"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(tmp_path, name):
    content, message = HOSTILE[name]
    path = tmp_path / "model.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_raw(path, *content)
    with pytest.raises(ValueError, match=message) as raised:
        hf.Weights(tmp_path)
    assert str(path) in str(raised.value)


def test_our_reading_of_a_header_is_the_librarys(tmp_path):
    tensors = {"b": torch.randn(3, 2), "a": torch.randn(4).to(torch.bfloat16), "empty": torch.empty(0, 5)}
    save_file(tensors, tmp_path / "model.safetensors")
    weights = hf.Weights(tmp_path)
    assert {key: stored.shape for key, stored in weights.tensors.items()} == {"b": (3, 2), "a": (4,), "empty": (0, 5)}
    assert all(torch.equal(weights.read(key), value) for key, value in tensors.items())


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(ValueError, match=f"only {name}; loading a pickle could run code"):
        hf.Weights(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../outside.safetensors"}, "names '../outside.safetensors', which is not a file of the folder"),
        ({"a": "/etc/passwd"}, "not a file of the folder"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"a": "one.safetensors", "c": "one.safetensors"}, "says that c is in one.safetensors, but no file has it"),
        ({"a": "two.safetensors", "b": "one.safetensors"}, "says that a is in two.safetensors, but it is in one"),
        ({"b": "two.safetensors"}, "says|does not name|holds"),
        (["a"], "has no weight_map"),
    ],
)
def test_an_index_that_disagrees_is_refused(tmp_path, weight_map, message):
    save_file({"a": torch.zeros(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.zeros(2), "x": torch.zeros(1)}, tmp_path / "two.safetensors")
    (tmp_path / hf.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=message):
        hf.Weights(tmp_path)


def test_several_files_need_an_index(tmp_path):
    for name in ("one", "two"):
        save_file({name: torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="2 safetensors files but no model.safetensors.index.json"):
        hf.Weights(tmp_path)


def planned(tensors: dict[str, torch.Tensor]) -> list[hf.Planned]:
    return [hf.Planned(key, value.dtype, tuple(value.shape), value.clone) for key, value in tensors.items()]


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_written_folders_are_read_by_the_library(tmp_path, shard_bytes):
    tensors = {f"t{i}": torch.randn(i + 1, 3).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(6)}
    hf.write(tmp_path / "out", planned(tensors), {"config.json": "{}\n"}, shard_bytes=shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 1000 else 2)
    found = {key: value for path in files for key, value in load_file(path).items()}
    assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    # And by ourselves, index and all.
    assert hf.Weights(tmp_path / "out").tensors.keys() == tensors.keys()
    assert sorted(os.listdir(tmp_path)) == ["out"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.os, "fsync", full)
    with pytest.raises(RuntimeError, match="writing .*out failed: .*No space left on device.* Is the disk full"):
        hf.write(tmp_path / "out", planned({"a": torch.zeros(2)}), {})
    assert not list(tmp_path.iterdir())


def test_what_comes_back_from_the_disk_is_compared(tmp_path, monkeypatch):
    write = hf.os.pwrite

    def flip(file, data, at) -> int:
        changed = bytearray(data)
        changed[-1] ^= 1
        return write(file, changed, at)

    monkeypatch.setattr(hf.os, "pwrite", flip)
    with pytest.raises(RuntimeError, match="model.safetensors does not hold what was written"):
        hf.write(tmp_path / "out", planned({"a": torch.zeros(2)}), {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", [0, hf.CHECK_BYTES - 1, hf.CHECK_BYTES, 2 * hf.CHECK_BYTES + 1])
def test_every_byte_is_compared(tmp_path, place):
    """Around what is read back at once; a file that is cut is another one too."""
    data = memoryview(bytes(2 * hf.CHECK_BYTES + 2))
    path = tmp_path / "file"
    path.write_bytes(b"begin" + data)
    hf._check(path, 5, data)
    changed = bytearray(data)
    changed[place] = 1
    path.write_bytes(b"begin" + changed)
    with pytest.raises(RuntimeError, match="file does not hold what was written"):
        hf._check(path, 5, data)
    path.write_bytes(b"begin" + data[:place])
    with pytest.raises(RuntimeError, match="file does not hold what was written"):
        hf._check(path, 5, data)


def test_nothing_is_overwritten(tmp_path):
    with pytest.raises(ValueError, match="exists"):
        hf.write(tmp_path, [], {})


def test_a_tensor_of_another_shape_than_planned_stops_the_export(tmp_path):
    wrong = hf.Planned("a", torch.float32, (2,), lambda: torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"tensor a became torch.float32 \[3\]; planned torch.float32 \[2\]"):
        hf.write(tmp_path / "out", [wrong], {})
