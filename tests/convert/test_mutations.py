"""Every way to get a conversion wrong that we could think of fails loudly, and names the tensor and both sides."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_vlm.convert import names
from tests.convert import world

#: Keys of the hub's format.
ATT = "model.transformer.blocks.1.self_attn.att_proj.weight"
FF = "model.transformer.blocks.1.mlp.ff_proj.weight"
NORM = "model.transformer.blocks.2.ff_norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Molmo2 in the hub's format, not to be changed."""
    return world.folder(world.molmo2(world.ARCH), tmp_path_factory.mktemp("mutations") / "hub", hub=True)


@pytest.fixture
def copy(source, tmp_path) -> Path:
    """One to be changed."""
    return shutil.copytree(source, tmp_path / "copy")


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory) -> Path:
    return world.bring(source, tmp_path_factory.mktemp("mutations") / "checkpoint")


def change(folder: Path, **to: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors, keys with `/` for dots."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for key, value in to.items():
        tensors.pop(key, None)
        if value is not None:
            tensors[key] = value.contiguous()
    save_file(tensors, file)


def tensor(folder: Path, key: str) -> torch.Tensor:
    return load_file(folder / "model.safetensors")[key]


IMPORTS = {
    "dropped": (lambda t: {NORM: None}, rf"copy \(hub\): tensor {NORM} \[48\] is missing"),
    "renamed": (
        lambda t: {NORM: None, NORM.replace("ff_norm", "ffn_norm"): t[NORM]},
        r"ff_norm.weight \[48\] is missing. Is it .*ffn_norm.weight, which has no place",
    ),
    "added": (lambda t: {"model.extra": t[NORM]}, r"1 tensors have no place .* the first is model.extra \[48\]"),
    "a layer too many": (
        lambda t: {NORM.replace(".2.", ".4."): t[NORM]}, r"first is model.transformer.blocks.4.ff_norm.weight \[48\]",
    ),
    "another shape": (lambda t: {FF: t[FF][:-1]}, rf"tensor {FF} is \[159, 48\], the model needs \[160, 48\]"),
    "transposed": (lambda t: {FF: t[FF].t()}, r"ff_proj.weight is \[48, 160\], the model needs \[160, 48\]"),
    "vocabulary one short": (
        lambda t: {"lm_head.weight": t["lm_head.weight"][:-1]},
        r"tensor lm_head.weight is \[319, 48\], the model needs \[320, 48\]",
    ),
    "embedding one too many": (
        lambda t: {"model.transformer.wte.embedding": torch.cat([t["model.transformer.wte.embedding"]] * 2)[:321]},
        r"wte.embedding is \[321, 48\], the model needs \[320, 48\]",
    ),
    "integers": (lambda t: {NORM: t[NORM].int()}, "ff_norm.weight is I32; BF16, F16, F32 are converted"),
}  # fmt: skip


@pytest.mark.parametrize("name", IMPORTS)
def test_import_refuses(copy, tmp_path, name):
    changes, message = IMPORTS[name]
    change(copy, **changes(load_file(copy / "model.safetensors")))
    with pytest.raises(ValueError, match=message):
        world.bring(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_import_refuses_a_cut_file(copy, tmp_path, kept):
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: int(kept * len(data))])
    with pytest.raises(ValueError, match=r"model.safetensors is cut .*the file has \d+"):
        world.bring(copy, tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "field", "value", "message"),
    [
        ("text_config", "rope_theta", 2e4, "language.rope_theta: 20000.0 / 10000.0"),
        ("text_config", "layer_norm_eps", 1e-5, "language.norm_eps: 1e-05 / 1e-06"),
        ("text_config", "num_key_value_heads", 4, "language.kv_heads: 4 / 2"),
        ("text_config", "vocab_size", 321, "language.vocab_size: 321 / 320"),
        ("text_config", "rope_scaling", {"rope_type": "yarn"}, "rope_type is 'yarn'; this trainer computes with"),
        ("text_config", "norm_after", True, "norm_after is True"),
        ("text_config", "qk_norm_type", "olmo", "qk_norm_type is 'olmo'"),
        ("text_config", "hidden_act", "gelu", "hidden_act is 'gelu'"),
        ("text_config", "qkv_bias", True, "qkv_bias is True"),
        ("adapter_config", "pooling_attention_mask", False, "pooling_attention_mask is False"),
        ("vit_config", "num_attention_heads", 4, "num_key_value_heads is 2|head_dim is 16"),
    ],
)
def test_import_refuses_another_config(copy, tmp_path, part, field, value, message):
    fields = json.loads((copy / "config.json").read_text())
    fields[part][field] = value
    (copy / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        world.bring(copy, tmp_path / "out")


def test_swapped_taps_are_another_model(copy, source, tmp_path):
    """The same shapes in another order: not refused, since both are models, but not taken for the other."""
    fields = json.loads((copy / "config.json").read_text())
    fields["adapter_config"]["vit_layers"].reverse()
    (copy / "config.json").write_text(json.dumps(fields))
    swapped = world.bring(copy, tmp_path / "out")
    assert "architecture: connector.taps: (0, 1) / (1, 0)" in world.differences(swapped, source)
    assert world.apart(swapped, copy) < 1e-4 < world.apart(swapped, source)


VERIFIED = {
    "gate and up swapped": (
        lambda t: {FF: t[FF].roll(80, 0)},
        "layers.1.mlp.linear_fc1.weight: values differ by up to",
    ),
    "queries and keys exchanged": (
        lambda t: {ATT: torch.cat([t[ATT][32:64], t[ATT][:32], t[ATT][64:]])},
        "layers.1.self_attention.linear_qkv.weight: values differ",
    ),
    "keys and values exchanged": (
        lambda t: {ATT: torch.cat([t[ATT][:64], t[ATT][96:], t[ATT][64:96]])},
        "layers.1.self_attention.linear_qkv.weight: values differ",
    ),
    "one value": (lambda t: {NORM: t[NORM] + (torch.arange(48) == 7) * 1e-3}, "values differ by up to 0.001"),
    "fp16": (lambda t: {key: value.half() for key, value in t.items()}, "dtype torch.float16 / torch.float32"),
}


@pytest.mark.parametrize("name", VERIFIED)
def test_verify_finds(copy, checkpoint, name):
    changes, line = VERIFIED[name]
    change(copy, **changes(load_file(copy / "model.safetensors")))
    found = world.differences(copy, checkpoint)
    assert any(line in each for each in found), found
    if name != "fp16":
        assert len(found) == 1
        assert world.apart(copy, checkpoint) > 1e-4


def test_verify_finds_a_changed_theta(copy, checkpoint):
    fields = json.loads((copy / "config.json").read_text())
    fields["text_config"]["rope_theta"] = 2e4
    (copy / "config.json").write_text(json.dumps(fields))
    assert world.differences(copy, checkpoint) == ["architecture: language.rope_theta: 20000.0 / 10000.0"]
    assert world.apart(copy, checkpoint) > 1e-3


def test_verify_finds_bf16_exported_as_fp16(source, tmp_path):
    from megatron_vlm.convert import exporting

    checkpoint = world.bring(source, tmp_path / "checkpoint", precision="bf16")
    exporting.send(checkpoint, tmp_path / "out")
    assert world.differences(tmp_path / "out", checkpoint) == []
    change(tmp_path / "out", **{key: value.half() for key, value in world.tensors(tmp_path / "out").items()})
    found = world.differences(tmp_path / "out", checkpoint)
    line = "language.decoder.final_layernorm.weight: dtype torch.float16 / torch.bfloat16"
    assert line in found and sum("dtype" in each for each in found) == 71


def test_code_that_comes_with_a_model_is_never_run(copy, tmp_path):
    """Neither by the conversion nor by transformers under `verify --logits`."""
    mark = tmp_path / "ran"
    (copy / "remote.py").write_text(f"open({str(mark)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    fields = json.loads((copy / "config.json").read_text())
    fields["auto_map"] = {"AutoConfig": "remote.Config", "AutoModelForImageTextToText": "remote.Model"}
    (copy / "config.json").write_text(json.dumps(fields))
    checkpoint = world.bring(copy, tmp_path / "checkpoint")
    assert world.apart(copy, checkpoint) < 1e-4
    assert not mark.exists()


def test_verify_names_what_only_one_side_has(copy, source):
    change(copy, **{NORM: None, "model.extra": torch.zeros(1)})
    found = world.differences(copy, source)
    assert sorted(line.split(" only")[0] for line in found) == ["model.extra:", f"{NORM}:"]


#: A table that is wrong: import and export agree with each other, and so do tensors compared through it.
WRONG = {
    "gate and up swapped": ("mlp.linear_fc1.weight", lambda cell: names.joined(cell.keys[0], 1, 0)),
    "not interleaved": ("self_attention.linear_qkv.weight", lambda cell: names.joined(cell.keys[0])),
}


@pytest.mark.parametrize("name", WRONG)
def test_logits_find_what_the_table_has_wrong(source, tmp_path, monkeypatch, name):
    key, wrong = WRONG[name]
    section = names.LANGUAGE_LAYER
    rows = tuple(
        names.Row(row.shapes, {**row.cells, "megatron": wrong(row.cells["megatron"])}, row.only)
        if row.cells["megatron"].keys == (key,)
        else row
        for row in section.rows
    )
    bad = names.Section(section.part, section.prefixes, rows, section.layers)
    monkeypatch.setattr(names, "TABLE", tuple(bad if each is section else each for each in names.TABLE))
    checkpoint = world.bring(source, tmp_path / "checkpoint")
    assert world.differences(source, checkpoint) == []
    assert world.apart(source, checkpoint) > 1e-2


def test_disk_full_while_importing_leaves_nothing(source, tmp_path, monkeypatch):
    from megatron_vlm.convert import hf

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.os, "fsync", full)
    with pytest.raises(RuntimeError, match="No space left on device.*Is the disk full"):
        world.bring(source, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))


def test_damaged_checkpoints_are_not_exported(checkpoint, tmp_path):
    from megatron_vlm.convert import exporting

    copied = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    data = bytearray((copied / "__0_0.distcp").read_bytes())
    data[len(data) // 2] ^= 1
    (copied / "__0_0.distcp").write_bytes(data)
    with pytest.raises(ValueError, match="contents of __0_0.distcp are not what was written"):
        exporting.send(copied, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused_by_name(tmp_path):
    from megatron_vlm.convert import importing

    language = world.folder(world.qwen(world.ARCH), tmp_path / "language")
    vision = world.folder(world.tower(world.ARCH), tmp_path / "vision")
    for folder, kind in ((language, "olmo3"), (vision, "dinov2")):
        fields = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**fields, "model_type": kind}))
        with pytest.raises(ValueError, match=f"config.json is a '{kind}' model"):
            importing.parts(language, vision)
        (folder / "config.json").write_text(json.dumps(fields))


def test_of_a_tower_only_layers_that_nobody_reads_are_left_out(tmp_path):
    from megatron_vlm.convert import importing

    language = world.folder(world.qwen(world.ARCH), tmp_path / "language")
    vision = world.folder(world.tower(world.ARCH), tmp_path / "vision")
    key = next(key for key in world.tensors(vision) if "encoder.layers.0." in key)
    more = key[: key.index("layers.0.")] + "layers.0.more.weight"
    change(vision, **{more: torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"1 tensors have no place in the model; the first is {more}"):
        importing.bring(*importing.parts(language, vision), tmp_path / "out")


def test_a_head_that_should_be_tied_is_compared(tmp_path):
    from megatron_vlm.convert import importing

    language = world.folder(world.qwen(world.TIED), tmp_path / "language")
    vision = world.folder(world.tower(world.TIED), tmp_path / "vision")
    embedding = tensor(language, "model.embed_tokens.weight")
    # Some Qwen files store the copy.
    change(language, **{"lm_head.weight": embedding})
    importing.bring(*importing.parts(language, vision), tmp_path / "fine")
    changed = embedding.clone()
    changed[-1, -1] += 1
    change(language, **{"lm_head.weight": changed})
    with pytest.raises(ValueError, match="lm_head.weight differs from the base rows of the embedding"):
        importing.bring(*importing.parts(language, vision), tmp_path / "out")
