"""An export is a whole model for transformers: processor, chat template, greedy answers, with no code of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vlm.checkpoint import verify
from megatron_vlm.data.tokens import Tokenizer
from tests.convert import world
from tests.torchvision import declare_operators

QUESTION = "Point to the red star."
#: Heights and widths: tilings 1x1 and 1x3, then 4x2.
IMAGES = {"two images": [(40, 50), (60, 190)], "one image": [(230, 100)], "none": []}
CROPS = 8


@pytest.fixture(scope="module", params=["transformers", "hub"])
def exported(request, tmp_path_factory) -> tuple[Path, Path]:
    """(checkpoint, folder)."""
    from megatron_vlm.convert import exporting

    base = tmp_path_factory.mktemp("export")
    source = world.folder(world.molmo2(world.ARCH, seed=3), base / "source")
    checkpoint = world.bring(source, base / "checkpoint")
    exporting.send(checkpoint, base / "out", request.param)
    return checkpoint, base / "out"


def same_answer(exported: tuple[Path, Path], inputs: Any, mine: Any) -> None:
    """64 greedy tokens of transformers' model equal ours."""
    from transformers import AutoModelForImageTextToText

    from megatron_vlm.checkpoint import load
    from megatron_vlm.config.schema import Config, ModelConfig
    from megatron_vlm.convert import answers
    from megatron_vlm.evaluate.decode import decode
    from megatron_vlm.model.build import build
    from megatron_vlm.parallel.layout import Layout

    checkpoint, folder = exported
    assert inputs["input_ids"][0].tolist() == [*mine.prefix, *mine.questions[0]]
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    said = model.eval().generate(**inputs, max_new_tokens=64)[0, inputs["input_ids"].shape[1] :].tolist()
    tokenizer = Tokenizer(world.tokenizer(), world.ARCH.language)
    with answers.alone():
        (own,) = build(Config(model=ModelConfig(preset="like_8b")), Layout(1))
        load.load(checkpoint, models=[own])
        ((answer,),) = decode(own, [mine], tokenizer, max_new_tokens=64)
    assert said == answer and len(answer) == 64 and len(set(answer)) > 4


@pytest.mark.parametrize("name", IMAGES)
def test_processor_and_greedy_answer_are_ours(exported, name):
    declare_operators()
    from transformers import AutoProcessor

    draw = np.random.default_rng(1)
    pixels = [draw.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in IMAGES[name]]
    content = [{"type": "image", "image": Image.fromarray(image)} for image in pixels]
    message = {"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}
    processor = AutoProcessor.from_pretrained(exported[1])
    inputs = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    mine = world.prompt(world.ARCH, world.tokenizer(), QUESTION, pixels=pixels, most_crops=CROPS)
    if pixels:
        assert torch.equal(inputs["image_token_pooling"], torch.from_numpy(mine.windows))
        torch.testing.assert_close(inputs["pixel_values"], torch.from_numpy(mine.crops).float() / 127.5 - 1)
    same_answer(exported, inputs, mine)


def test_a_video_goes_through_the_processor_as_ours_does(exported):
    declare_operators()
    from transformers import AutoProcessor

    draw = np.random.default_rng(2)
    film = draw.integers(0, 256, (24, 48, 64, 3), dtype=np.uint8)  # 2.4 s of ten frames a second
    content = [{"type": "video", "video": film}, {"type": "text", "text": QUESTION}]
    processor = AutoProcessor.from_pretrained(exported[1])
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt", video_metadata=[{"fps": 10.0, "total_num_frames": 24, "duration": 2.4}],
    )  # fmt: skip
    shown = [0, 6, 12, 18]
    assert inputs["video_grids"].tolist() == [[4, 2, 2]]
    times = [number / 10 for number in shown]
    mine = world.prompt(world.ARCH, world.tokenizer(), QUESTION, frames=film[shown], times=times)
    assert torch.equal(inputs["video_token_pooling"], torch.from_numpy(mine.windows))
    torch.testing.assert_close(inputs["pixel_values_videos"], torch.from_numpy(mine.crops).float() / 127.5 - 1)
    same_answer(exported, inputs, mine)


def with_settings(checkpoint: Path, out: Path, **data: Any) -> Path:
    """A copy of a checkpoint whose run had other settings of `data`."""
    copy = shutil.copytree(checkpoint, out / checkpoint.name)
    fields = json.loads((copy / "config.json").read_text())
    fields["data"].update(data)
    (copy / "config.json").write_text(json.dumps(fields))
    verify.write_manifest(copy, {name: verify.digest(copy / name) for name in verify.files(copy)}, 0)
    return copy


def test_the_card_says_how_to_show_only_the_whole_image(exported, tmp_path):
    """The card's own code, run: data.image_crops=0 has no setting in transformers' processor."""
    declare_operators()
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from megatron_vlm.convert import exporting

    checkpoint = with_settings(exported[0], tmp_path, image_crops=0)
    exporting.send(checkpoint, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Only the whole image" not in (exported[1] / "README.md").read_text()
    code = text.split("## Only the whole image")[1].split("```python")[1].split("```")[0]
    pixels = np.random.default_rng(3).integers(0, 256, (230, 100, 3), dtype=np.uint8)
    content = [{"type": "image", "image": Image.fromarray(pixels)}, {"type": "text", "text": QUESTION}]
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    before = len(inputs["input_ids"][0])
    exec(code, {"inputs": inputs, "model": AutoModelForImageTextToText.from_pretrained(tmp_path / "out")})
    mine = world.prompt(world.ARCH, world.tokenizer(), QUESTION, pixels=[pixels], most_crops=0)
    assert len(inputs["input_ids"][0]) < before and torch.equal(
        inputs["image_token_pooling"], torch.from_numpy(mine.windows)
    )
    same_answer((checkpoint, tmp_path / "out"), inputs, mine)


def test_videos_get_the_frames_that_training_gave_them(exported, tmp_path):
    from megatron_vlm.convert import exporting

    checkpoint = with_settings(exported[0], tmp_path, max_frames=5, frames_per_second=1.0)
    exporting.send(checkpoint, tmp_path / "out")
    fields = json.loads((tmp_path / "out" / "video_preprocessor_config.json").read_text())
    assert (fields["num_frames"], fields["max_fps"]) == (5, 1)


def test_chat_template_writes_turns_as_training_does(exported):
    declare_operators()
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(exported[1])
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "How many?", "style": "vqa2"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
        {"role": "user", "content": [{"type": "text", "text": "Where?"}]},
    ]
    ids = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    tokenizer = Tokenizer(world.tokenizer(), world.ARCH.language)
    turns = [tokenizer.user_turn("vqa2: How many?", first=True), tokenizer.encode("two"), [tokenizer.eos]]
    expected = [tokenizer.bos, *sum(turns, []), *tokenizer.user_turn("Where?", first=False)]
    assert list(ids["input_ids"][0]) == expected


def test_tokens_have_the_ids_of_the_model(exported):
    declare_operators()
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    _, folder = exported
    tokenizer, arch = AutoTokenizer.from_pretrained(folder), world.ARCH
    config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    ours = Tokenizer(world.tokenizer(), arch.language)
    assert tokenizer.convert_tokens_to_ids("<im_patch>") == config.image_patch_id == arch.token_id("<im_patch>")
    assert tokenizer.convert_tokens_to_ids("<|video|>") == arch.token_id("<|video|>")
    assert len(tokenizer) == arch.language.vocab_size + 10
    assert tokenizer.eos_token_id == generation.eos_token_id == ours.eos == tokenizer.bos_token_id
    text = "Point to the red star — 12 cats."
    assert tokenizer.encode(text, add_special_tokens=False) == ours.encode(text)


def test_the_card_says_where_the_weights_come_from(exported):
    text = (exported[1] / "README.md").read_text()
    assert "tensors from `source` (native format)" in text and "preset `like_8b`" in text
    assert str(exported[0].parent) not in text


def test_models_that_are_no_molmo2_say_why(tmp_path):
    from megatron_vlm.convert import exporting, importing

    language = world.folder(world.qwen(world.CLIP), tmp_path / "language")
    vision = world.folder(world.tower(world.CLIP), tmp_path / "vision")
    checkpoint = importing.bring(*importing.parts(language, vision), tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"connector is mlp; .*class token.*; .*Qwen2.5.*--format parts"):
        exporting.send(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exporting.send(checkpoint, tmp_path / "parts", "parts")
    assert "`linear_fc1`, GELU, `linear_fc2`" in (tmp_path / "parts" / "connector" / "README.md").read_text()
    assert json.loads((tmp_path / "parts" / "connector" / "config.json").read_text())["connector"]["kind"] == "mlp"


def test_a_tokenizer_that_does_not_fit_is_refused(exported, tmp_path):
    from megatron_vlm.convert import exporting
    from megatron_vlm.data import tokens

    (tmp_path / "tokenizer.json").write_text(tokens.train(["a b c d e f g h i j k l " * 50 + "abc" * 99] * 9, 2000))
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["added_tokens"][-1]["id"] += 200
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(ValueError, match="tokenizer.*ids up to"):
        exporting.send(exported[0], tmp_path / "out", tokenizer=str(tmp_path))
