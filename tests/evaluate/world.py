"""A small run with tasks to score: shards with test splits, a model of one step, media and a prompt that do not do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from megatron_vlm.config.schema import Config, LogConfig, RunConfig
from megatron_vlm.data.example import Branch, Example, Point, Points, Turn
from megatron_vlm.data.writer import ShardWriter
from tests.data import world as data

MIXTURE = "groups: {all: {rate: 1.0, members: [vqa, pointing]}}"


def shards(folder: Path, *, samples: int = 12, broken: bool = False) -> Path:
    """`vqa` (two questions about each image), `pointing` and `captions`, train, validation and test; media in one tar.

    broken: the media of vqa's test sample 3 are no image, and its sample 5 asks for more than any context.
    """
    rng = np.random.default_rng(4)
    with ShardWriter(folder / "shards") as writer:
        for split in ("train", "validation", "test"):
            for number in range(samples):
                media = writer.add_image(data.picture(rng, "PNG", (56, 56)))
                key = f"{split}-{number}"
                words = "cat " * 60_000 if broken and split == "test" and number == 5 else "What is it?"
                turns = ((words, ("cat", "dog", "cat")[number % 3]), ("Is it red?", "yes"))
                branches = tuple(Branch("user_qa", (Turn(*turn),)) for turn in turns)
                writer.add(Example(key, branches, (media,)), "vqa", split)
                x, y = rng.random(2).tolist()
                info = {"objects": [["red", "cup", x, y, 0.1]]}
                points = Branch("pointing", (Turn("cups", Points("cups", (Point(1, x, y),))),))
                writer.add(Example(key, (points,), (media,), info), "pointing", split)
                caption = Branch("long_caption", (Turn("", "A cup stands here. It is red."),))
                writer.add(Example(key, (caption,), (media,)), "captions", split)
    if broken:
        _spoil(folder / "shards")
    (folder / "tokenizer.json").write_text(data.definition())
    (folder / "mixture.yaml").write_text(MIXTURE)
    return folder / "shards"


def _spoil(folder: Path) -> None:
    """Overwrite the pixels of one test image, in its place."""
    from megatron_vlm.data.shards import Shards

    stored = Shards(folder)
    media = stored.example("vqa", "test", 3).media[0]
    content = stored.media(media.key)
    for path in folder.glob("**/*.tar"):
        tar = path.read_bytes()
        if content in tar:
            path.write_bytes(tar.replace(content, b"no image" + b"\0" * (len(content) - 8)))


def config(folder: Path, **train: int) -> Config:
    settings = data.config(
        folder, sequence_length=192, max_crops=8, image_crops=0, window=16, prompts="style",
        train={"steps": 1, "global_batch": 2, "micro_batch": 1} | train,
    )  # fmt: skip
    return dataclasses.replace(
        settings,
        run=RunConfig(dir=str(folder / "run"), device="cpu"),
        log=LogConfig(every=1000, tensorboard=False),
    )
