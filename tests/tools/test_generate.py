"""The generation command: which media go together, and that files of one's own are read as those of shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.config.geometry import image_geometry
from megatron_vlm.data.example import Branch, Clip, Example, Turn
from megatron_vlm.data.media import Files
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tree import TreeSettings
from megatron_vlm.data.writer import ShardWriter
from megatron_vlm.evaluate import tasks
from tests.data import world
from tests.data.clips import clip, steady
from tools import generate


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give a question, or --sample"),
        (["what?", "--sample", "pointing"], "give a question, or --sample"),
        (["--sample", "pointing", "--image", "a.jpg"], "brings its own media"),
        (["what?", "--image", "a.jpg", "--video", "v.mp4"], "images or a video, not both"),
        (["what?", "--image", "a.jpg", "--rate", "2"], "are about a --video"),
        (["--sample", "pointing", "--count", "0"], "--count 0: needed 1 or more"),
        (["what?", "--max-new-tokens", "-1"], "--max-new-tokens -1: needed 1 or more"),
        (["what?", "--draw", "a.png"], "needs an --image or a --video"),
        (["what?", "--image", "a.jpg", "--draw", "a.mp4"], r"ends in .png or .jpg"),
        (["what?", "--video", "v.mp4", "--draw", "out"], r"ends in .png or .mp4"),
    ],
)
def test_words_that_do_not_go_together(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        generate.arguments(["--checkpoint", "run", *words])
    assert stop.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_files_that_cannot_be_used_are_named_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    (tmp_path / "v.mp4").write_bytes(clip(steady(30)))
    for words, message in (
        (["--image", "none.png"], "--image none.png: there is no such file"),
        (["--video", str(tmp_path / "red.png")], "no container that is read"),
        (["--image", str(tmp_path / "v.mp4")], "v.mp4"),
        (["--video", str(tmp_path / "v.mp4"), "--start", "9"], "lies outside the video"),
    ):
        assert generate.main(["--checkpoint", str(tmp_path / "no run"), "what?", *words]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error


def test_files_of_ones_own_give_the_prompt_of_shards(tmp_path: Path) -> None:
    settings = TreeSettings(
        world.tokenizer(), image_geometry(world.ARCH, 4), "style", "uniform", 512, 12, 0, max_frames=8
    )
    film, picture = clip(steady(30)), tmp_path / "a.png"
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(picture)
    with ShardWriter(tmp_path / "shards") as writer:
        stored = writer.add_video(film)
        image = writer.add_image(picture.read_bytes())
        branch = (Branch("user_qa", (Turn("What?", "It."),)),)
        writer.add(Example("v", branch, (stored,), clip=Clip(0.5, 2.5, 2)), "mine", "test")
        writer.add(Example("w", branch, (image, image)), "mine", "test")
    shards, files = Shards(tmp_path / "shards"), Files()
    for index, own in enumerate(
        (
            Example("asked", (), (files.add_video(film, name="v"),), clip=Clip(0.5, 2.5, 2)),
            Example("asked", (), (files.add_image(picture.read_bytes(), name="a"),) * 2),
        )
    ):
        wanted = tasks.prompt(shards.example("mine", "test", index), shards, settings)
        found = tasks.asked(own, files, ["What?"], settings)
        assert (found.prefix, found.questions) == (wanted.prefix, wanted.questions)
        assert np.array_equal(found.crops, wanted.crops) and np.array_equal(found.windows, wanted.windows)
        assert len(found.crops) > 1
