"""From a Hugging Face folder through training to a folder that transformers answers from."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from megatron_vlm.config import load as config_load
from megatron_vlm.config.schema import Config
from megatron_vlm.data.shards import Shards
from tests.convert import world
from tests.data import world as data
from tests.torchvision import declare_operators


@pytest.mark.slow
def test_a_trained_import_answers_in_transformers_as_ours_does(tmp_path):
    declare_operators()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from megatron_vlm.checkpoint import load
    from megatron_vlm.convert import answers, exporting
    from megatron_vlm.evaluate.decode import decode
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel.layout import Layout
    from megatron_vlm.train import __main__ as command

    data.build(tmp_path)
    source = world.folder(world.molmo2(data.ARCH), tmp_path / "source")
    (source / "tokenizer.json").write_text(data.definition())
    checkpoint = world.bring(source, tmp_path / "checkpoint")

    settings = config_load.to_dict(data.config(tmp_path, sequence_length=192, max_crops=8, image_crops=2, window=32))
    recipe = {
        "run": {"dir": str(tmp_path / "run"), "device": "cpu"},
        "init": {"checkpoint": str(tmp_path / "checkpoint")},
        "data": settings["data"],
        "train": {"steps": 3, "global_batch": 4},
        "log": {"tensorboard": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert command.main([str(tmp_path / "recipe.yaml")]) == 0
    assert any("values differ" in line for line in world.differences(tmp_path / "run", checkpoint)), "it has trained"

    exporting.send(tmp_path / "run", tmp_path / "out")
    assert world.differences(tmp_path / "out", tmp_path / "run") == []
    shards = Shards(tmp_path / "shards")
    held_out = (shards.example("captions", "validation", number) for number in range(9))
    example = next(example for example in held_out if example.media)
    image = Image.open(io.BytesIO(shards.media(example.media[0].key))).convert("RGB")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "red cups", "style": "pointing"}]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    said = model.generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :]
    prompt = world.prompt(data.ARCH, data.definition(), "pointing: red cups", pixels=[np.asarray(image)], most_crops=2)
    with answers.alone(), torch.no_grad():
        (own,) = build(Config(), Layout(1))
        load.load(tmp_path / "run", models=[own])
        ((answer,),) = decode(own, [prompt], data.tokenizer(), max_new_tokens=64)
    assert said.tolist()[: len(answer)] == answer and answer
