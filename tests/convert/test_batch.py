"""`verify --logits`: the built-in batch, and one that the user gives; against transformers to 1e-4."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from megatron_vlm.config.geometry import VideoLayout
from megatron_vlm.convert import given, probe
from megatron_vlm.data.tokens import Tokenizer
from tests.convert import world
from tests.data.clips import clip, steady

BATCH = [
    {"images": ["wide.png", "small.png"], "texts": ["Point to the red star.", "How many are there?"]},
    {"video": "clip.mp4", "texts": ["What is it? Two cats."]},
    {"texts": ["A photo of two cats."]},
]


@pytest.fixture(scope="module", params=["8b native", "8b hub", "4b native"])
def pair(request, tmp_path_factory) -> tuple[Path, Path]:
    """(folder, its checkpoint)."""
    base, (size, form) = tmp_path_factory.mktemp("batch"), request.param.split()
    arch = world.PRESETS[f"like_{size}"]
    folder = world.folder(world.molmo2(arch, seed=5), base / "folder", hub=form == "hub")
    return folder, world.bring(folder, base / "checkpoint")


@pytest.fixture(scope="module")
def batch(tmp_path_factory) -> Path:
    folder, draw = tmp_path_factory.mktemp("files"), np.random.default_rng(4)
    for name, shape in (("wide.png", (60, 190, 3)), ("small.png", (30, 40, 3))):
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / name)
    (folder / "clip.mp4").write_bytes(clip(steady(20)))
    (folder / "batch.json").write_text(json.dumps(BATCH))
    return folder / "batch.json"


def test_the_built_in_batch_has_images_videos_and_a_packed_row(pair):
    samples = probe.samples(world.ARCH)
    assert max(len(sample.layouts) for sample in samples) > 1
    assert sum(isinstance(layout, VideoLayout) for sample in samples for layout in sample.layouts) == 1
    row, places = probe.packed(world.ARCH, samples)
    assert len(row.tokens) == 1 and row.examples.max() + 1 == len(samples) and row.windows.shape[1] == 9
    assert world.apart(*pair) < 1e-4


def test_a_given_batch(pair, batch):
    assert world.apart(*pair, batch) < 1e-4


@pytest.mark.parametrize("example", [0, 1])
def test_what_is_wrong_with_the_connector_shows_in_images_and_in_videos(pair, batch, tmp_path, example):
    """The comparison could fail, by each kind of example alone."""
    folder, checkpoint = pair
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(key for key in tensors if key.endswith(("image_pooling_2d.v_proj.bias", "image_pooling_2d.wv.bias")))
    tensors[key] = tensors[key] + 1
    save_file(tensors, tmp_path / "model.safetensors")
    one = batch.with_name(f"only-{example}.json")
    one.write_text(json.dumps(BATCH[example : example + 1]))
    assert world.apart(tmp_path, checkpoint, one) > 1e-3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "is not a list of examples"),
        ('[{"text": ["a"]}]', "element 0 is .*it may have images, or a video, and texts"),
        ('[{"texts": "a"}]', "element 0: texts is 'a'; it must be a list of strings"),
        ('[{"texts": ["a"]}, {"texts": []}]', "element 1: texts is"),
        ('[{"texts": [""]}]', "has an empty text"),
        ('[{"images": ["a.png"], "video": "b.mp4", "texts": ["a"]}]', "has images and a video"),
        ('[{"images": ["gone.png"], "texts": ["a"]}]', "gone.png, which cannot be read: No such file"),
    ],
)
def test_a_batch_that_is_none_is_refused(tmp_path, text, message):
    (tmp_path / "batch.json").write_text(text)
    tokenizer = Tokenizer(world.tokenizer(), world.LANGUAGE)
    with pytest.raises(ValueError, match=message):
        given.read(tmp_path / "batch.json", world.ARCH, tokenizer)


def test_logits_without_a_tower_or_a_tokenizer(tmp_path, batch):
    language = world.folder(world.qwen(world.ARCH), tmp_path / "language")
    with pytest.raises(ValueError, match="has images or videos, but one of the sides has no vision tower"):
        world.apart(language, language, batch)
    (language / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="neither side says which tokenizer.*--tokenizer"):
        world.apart(language, language, batch)
