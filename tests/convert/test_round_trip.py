"""Hugging Face -> Megatron -> Hugging Face gives every bit back, whatever layouts saved the checkpoint in between."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vlm.parallel.layout import Layout
from tests.convert import world


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    """`8b native`, `8b hub`, `4b native`, `4b hub`: an untied and a tied Molmo2 as folders, not to be changed."""
    base = tmp_path_factory.mktemp("sources")
    made = {}
    for name, arch in (("8b", world.ARCH), ("4b", world.TIED)):
        model = world.molmo2(arch)
        for form in ("native", "hub"):
            made[f"{name} {form}"] = world.folder(model, base / f"{name}-{form}", hub=form == "hub")
    return made


@pytest.mark.parametrize("name", ["8b native", "8b hub", "4b native", "4b hub"])
def test_molmo2(sources, tmp_path, name):
    from megatron_vlm.convert import exporting

    checkpoint = world.bring(sources[name], tmp_path / "checkpoint")
    for form in ("native", "hub"):
        other = f"{name.split()[0]} {form}"
        exporting.send(checkpoint, tmp_path / form, "transformers" if form == "native" else form)
        world.assert_same_bytes(tmp_path / form, sources[other])
        assert world.differences(tmp_path / form, checkpoint) == []


def resave(source: Path, out: Path, preset: str, before: Layout, after: Layout) -> None:
    """Load on one layout, save, load that on another layout, save. Runs on every rank."""
    from megatron_vlm.checkpoint import load, save
    from megatron_vlm.config import presets
    from megatron_vlm.config.schema import Config, ModelConfig, ParallelConfig
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel import groups

    presets.PRESETS.update(world.PRESETS)
    for number, layout in enumerate((before, after)):
        groups.initialize(layout, timeout_s=50)
        parallel = ParallelConfig(tensor=layout.tensor, pipeline=layout.pipeline)
        config = Config(model=ModelConfig(preset=preset), parallel=parallel)
        models = build(config, layout)
        load.load(source, models=models, config=config)
        source = save.save(out / f"{number}", models=models, optimizer=None, step=1, config=config, state={})
        groups.destroy()


LAYOUTS = {
    "tensor 2, then pipeline 2": (Layout(2, tensor=2), Layout(2, pipeline=2)),
    "pipeline 2, then tensor 2": (Layout(2, pipeline=2), Layout(2, tensor=2)),
    "tensor 2 x pipeline 2": (Layout(4, tensor=2, pipeline=2), Layout(4, tensor=2, pipeline=2)),
}


#: With every change of layout once in the fast run.
PAIRS = [
    ("8b hub", "tensor 2, then pipeline 2"),
    ("4b native", "tensor 2 x pipeline 2"),
    pytest.param("4b native", "tensor 2, then pipeline 2", marks=pytest.mark.slow),
    pytest.param("8b hub", "tensor 2 x pipeline 2", marks=pytest.mark.slow),
    pytest.param("4b native", "pipeline 2, then tensor 2", marks=pytest.mark.slow),
    pytest.param("8b hub", "pipeline 2, then tensor 2", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "layouts"), PAIRS)
def test_through_checkpoints_of_other_layouts(pool, sources, tmp_path, name, layouts):
    from megatron_vlm.convert import exporting

    before, after = LAYOUTS[layouts]
    checkpoint = world.bring(sources[name], tmp_path / "checkpoint")
    size, form = name.split()
    pool(before.world).run(resave, checkpoint, tmp_path, f"like_{size}", before, after)
    exporting.send(
        tmp_path / "1", tmp_path / "out", "transformers" if form == "native" else form,
        tokenizer=str(sources[name]),
    )  # fmt: skip
    world.assert_same_bytes(tmp_path / "out", sources[name])


@pytest.mark.parametrize("preset", ["like_8b", "like_4b", "qwen2.5_like"])
def test_language_model_and_vision_tower(tmp_path, preset):
    """As plain Qwen and SigLIP or CLIP models, with the connector in its own layout: in and out and in again."""
    from megatron_vlm.convert import exporting, importing

    arch = world.PRESETS[preset]
    language = world.folder(world.qwen(arch), tmp_path / "language")
    vision = world.folder(world.tower(arch), tmp_path / "vision")
    checkpoint = importing.bring(*importing.parts(language, vision), tmp_path / "checkpoint")
    exporting.send(checkpoint, tmp_path / "out", "parts")
    world.assert_same_bytes(tmp_path / "out" / "language", language)
    stored = world.tensors(vision)
    found = world.tensors(tmp_path / "out" / "vision")
    for key, value in found.items():
        key = key.removeprefix("vision_model.")
        # The connector reads layers before the last norm, which is not part of our model.
        expected = torch.full_like(value, key.endswith("weight")) if "post_layernorm" in key else stored[key]
        assert torch.equal(value, expected), key
    assert sum("layers.1." in key for key in found) == 16 and not any("layers.2." in key for key in found)
    out = tmp_path / "out"
    again = importing.parts(out / "language", out / "vision", connector_weights=out / "connector")
    assert world.differences(importing.bring(*again, tmp_path / "again"), checkpoint) == []


@pytest.mark.parametrize("preset", ["like_8b", "like_4b", "qwen2.5_like"])
def test_parts_load_as_plain_models(tmp_path, preset):
    """In transformers, as Qwen and SigLIP or CLIP, with nothing missing, and computing what they came from computed."""
    from transformers import AutoModel, AutoModelForCausalLM

    from megatron_vlm.convert import exporting, importing

    arch = world.PRESETS[preset]
    text, tower = world.qwen(arch), world.tower(arch)
    folders = [world.folder(text, tmp_path / "language"), world.folder(tower, tmp_path / "vision")]
    checkpoint = importing.bring(*importing.parts(*folders), tmp_path / "checkpoint")
    for part in ("language", "vision"):
        exporting.send(checkpoint, tmp_path / f"out-{part}", part)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out-language", output_loading_info=True)
    assert type(loaded) is type(text) and not any(report.values()), report
    ids = torch.arange(40)[None] * 7 % arch.language.vocab_size
    seen, report = AutoModel.from_pretrained(tmp_path / "out-vision", output_loading_info=True)
    assert type(seen) is type(tower) and not any(report.values()), report
    # The source's crops have pixels beyond the last whole patch, which nobody sees.
    side, wide = arch.vision.image_size, tower.config.image_size
    crop = torch.randn(1, 3, wide, wide, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, text(ids).logits)
        found = seen(crop[..., :side, :side], output_hidden_states=True).hidden_states
        expected = tower(crop, output_hidden_states=True).hidden_states
    deepest = max(arch.connector.taps) + 1
    assert len(found) == deepest + 1
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected[: deepest + 1], strict=True))


def test_bf16_stays_bf16_and_float32_loses_nothing(tmp_path):
    from megatron_vlm.convert import exporting

    source = world.folder(world.molmo2(world.ARCH).to(torch.bfloat16), tmp_path / "source")
    checkpoint = world.bring(source, tmp_path / "checkpoint")
    exporting.send(checkpoint, tmp_path / "same")
    world.assert_same_bytes(tmp_path / "same", source)
    exporting.send(checkpoint, tmp_path / "wide", dtype="fp32")
    exporting.send(world.bring(tmp_path / "wide", tmp_path / "checkpoint32"), tmp_path / "back", dtype="bf16")
    world.assert_same_bytes(tmp_path / "back", source)


def test_sharded_in_and_out(tmp_path):
    from megatron_vlm.convert import exporting

    model = world.molmo2(world.TIED)
    source = world.folder(model, tmp_path / "source", shard="60KB")
    assert len(list(source.glob("model-*.safetensors"))) > 3
    checkpoint = world.bring(source, tmp_path / "checkpoint")
    exporting.send(checkpoint, tmp_path / "out", shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
    world.assert_same_bytes(tmp_path / "out", source)


def test_new_weights_are_seeded_and_normal(tmp_path):
    from megatron_vlm.convert import importing
    from megatron_vlm.convert.stored import Checkpoint

    language = world.folder(world.qwen(world.ARCH), tmp_path / "language")
    vision = world.folder(world.tower(world.ARCH), tmp_path / "vision")
    paths = [
        importing.bring(*importing.parts(language, vision), tmp_path / str(number), seed=seed)
        for number, seed in enumerate((1, 1, 2))
    ]
    one, same, other = (Checkpoint(path) for path in paths)
    drawn = one.record.state["lineage"]["drawn"]["tensors"]
    assert "language.embedding.new_rows" in drawn and any(key.startswith("connector.") for key in drawn)
    assert set(drawn) == {key for key in one.shapes if key.startswith("connector.")} | {"language.embedding.new_rows"}
    for key in drawn:
        assert torch.equal(one.read(key), same.read(key))
        if key.endswith("bias"):
            assert not one.read(key).any()
        else:
            assert not torch.equal(one.read(key), other.read(key))
            assert one.read(key).std().item() == pytest.approx(0.02, rel=0.1)


def test_the_manifest_uses_every_tensor_once(tmp_path):
    from megatron_vlm.convert import importing
    from megatron_vlm.convert.stored import Checkpoint

    language = world.folder(world.qwen(world.ARCH), tmp_path / "language")
    vision = world.folder(world.tower(world.ARCH), tmp_path / "vision")
    checkpoint = Checkpoint(importing.bring(*importing.parts(language, vision), tmp_path / "checkpoint"))
    lineage = checkpoint.record.state["lineage"]
    targets = list(lineage["drawn"]["tensors"])
    for folder, origin in zip((language, vision), lineage["sources"], strict=True):
        assert sorted([*origin["used"], *origin["dropped"]]) == sorted(world.tensors(folder))
        # Queries, keys and values name the same target.
        targets += {target for names in origin["used"].values() for target in names}
    assert sorted(targets) == sorted(checkpoint.shapes)
