"""A checkpoint written without Megatron is the one that Megatron writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_vlm.checkpoint import unpickle, verify
from megatron_vlm.convert import hf, writing
from megatron_vlm.parallel.layout import Layout
from tests.convert import world


def saved_again(source: Path, out: Path, preset: str) -> Path:
    """Load a checkpoint with Megatron and let it write the same weights."""
    from megatron_vlm.checkpoint import load, save
    from megatron_vlm.config.schema import Config, ModelConfig
    from megatron_vlm.convert import answers
    from megatron_vlm.model.build import build

    with answers.alone():
        config = Config(model=ModelConfig(preset=preset, freeze=()))
        models = build(config, Layout(1))
        state = load.load(source, models=models, config=config)
        return save.save(out, models=models, optimizer=None, step=0, config=config, state=state)


@pytest.mark.parametrize("preset", ["like_8b", "like_4b"])
def test_it_is_what_megatron_writes(tmp_path, monkeypatch, preset):
    from megatron_vlm.convert.stored import Checkpoint

    monkeypatch.setattr(writing, "FILE_BYTES", 100_000)
    source = world.folder(world.molmo2(world.PRESETS[preset]), tmp_path / "source")
    ours = world.bring(source, tmp_path / "ours")
    theirs = saved_again(ours, tmp_path / "theirs", preset)
    assert len(list(ours.glob("*.distcp"))) > 3 and ours.name == theirs.name
    assert (ours.parent / "latest").read_text() == (theirs.parent / "latest").read_text()
    for name in ("architecture.json", "state.json", "metadata.json"):
        assert json.loads((ours / name).read_text()) == json.loads((theirs / name).read_text())
    assert torch.load(ours / "common.pt") == torch.load(theirs / "common.pt")
    one, other = (unpickle.read_metadata(path, verify.files(path)) for path in (ours, theirs))
    assert vars(one).keys() == vars(other).keys() and one.version == other.version
    assert one.planner_data == other.planner_data
    left, right = Checkpoint(ours), Checkpoint(theirs)
    assert left.shapes == right.shapes and left.dtypes == right.dtypes
    for key in left.shapes:
        stored = one.state_dict_metadata[key].properties, other.state_dict_metadata[key].properties
        assert stored[0] == stored[1] and torch.equal(left.read(key), right.read(key)), key


def test_a_tensor_of_another_shape_than_planned_leaves_nothing(tmp_path):
    wrong = hf.Planned("a", torch.float32, (2,), lambda: torch.zeros(3))
    with pytest.raises(RuntimeError, match=r"tensor a became torch.float32 \[3\]; planned torch.float32 \[2\]"):
        writing.write(tmp_path / "out", [wrong], {})
    assert not list((tmp_path / "out").iterdir())
