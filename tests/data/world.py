"""A small world of synthetic data for the tests: three data sets, images of many sizes, a tokenizer of its own."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_vlm.config.presets import PRESETS
from megatron_vlm.config.schema import Config, DataConfig, TrainConfig
from megatron_vlm.data.example import Branch, Example, Point, Points, Turn
from megatron_vlm.data.tar import add_member, end_tar
from megatron_vlm.data.tokens import Tokenizer, train
from megatron_vlm.data.writer import ShardWriter
from tests.data.clips import clip, steady

ARCH = PRESETS["tiny"]
WORDS = "a red cat sits on the blue box near two green cups while one dog looks at it".split()
MIXTURE = """
groups:
  captions: {rate: 0.6, members: [captions]}
  pointing: {rate: 0.3, members: [pointing]}
  text: {rate: 0.1, members: [text]}
"""


def sentence(rng: np.random.Generator, words: int) -> str:
    return " ".join(rng.choice(WORDS, words))


def picture(rng: np.random.Generator, format: str = "JPEG", size: tuple[int, int] | None = None) -> bytes:
    """A smooth picture of a random size as a file."""
    width, height = size or rng.integers(20, 260, 2)
    pixels = np.asarray(Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height)))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    """A small tar as the writers make it."""
    stream = io.BytesIO()
    for name, data in files.items():
        add_member(stream, name, data)
    end_tar(stream)
    return stream.getvalue()


def definition() -> str:
    """A tokenizer.json."""
    rng = np.random.default_rng(0)
    return train(
        [sentence(rng, 20) for _ in range(50)] + ["user\nassistant\n long_caption: pointing: <points coords="], 400
    )


def tokenizer() -> Tokenizer:
    return Tokenizer(definition(), ARCH.language)


def examples(rng: np.random.Generator, kind: str, number: int, writer: ShardWriter) -> Example:
    key = f"{kind}-{number}"
    if kind == "text":
        turns = tuple(Turn(sentence(rng, 5), sentence(rng, 8)) for _ in range(rng.integers(1, 3)))
        return Example(key, (Branch("text_sft", turns),))
    if kind == "videos":
        film = writer.add_video(clip(steady(int(rng.integers(6, 20)), fps=4)))
        turns = (Turn(sentence(rng, 4), sentence(rng, 6)), Turn(sentence(rng, 3), sentence(rng, 5)))
        return Example(key, (Branch("video_short_answer", turns), Branch("video_short_answer", turns[1:])), (film,))
    count = 2 if rng.random() < 0.15 else 1
    media = tuple(writer.add_image(picture(rng, "PNG" if rng.random() < 0.3 else "JPEG")) for _ in range(count))
    if kind == "pointing":
        points = tuple(
            Point(int(rng.integers(1, count + 1)), *rng.random(2).tolist()) for _ in range(rng.integers(0, 4))
        )
        return Example(key, (Branch("pointing", (Turn("", Points("red cups", points)),)),), media)
    branches = [Branch("long_caption", (Turn("", sentence(rng, int(rng.integers(5, 40)))),))]
    if rng.random() < 0.5:
        branches.append(Branch("transcript", (Turn("", sentence(rng, 12)),)))
    return Example(key, tuple(branches), media)


def build(folder: Path, *, seed: int = 0, sizes: dict[str, int] | None = None) -> Path:
    """Shards, tokenizer.json and mixture.yaml in `folder`; returns the directory of shards.

    sizes: samples by kind: captions, pointing, text (the mixture's), videos.
    """
    rng = np.random.default_rng(seed)
    shards = folder / "shards"
    with ShardWriter(shards, shard_bytes=100_000) as writer:
        for kind, size in (sizes or {"captions": 60, "pointing": 30, "text": 20}).items():
            for number in range(size):
                writer.add(examples(rng, kind, number, writer), kind, "train")
            for number in range(size, size + max(1, size // 5)):
                writer.add(examples(rng, kind, number, writer), kind, "validation")
    (folder / "tokenizer.json").write_text(definition())
    (folder / "mixture.yaml").write_text(MIXTURE)
    return shards


def config(folder: Path, *, train: dict | None = None, **data) -> Config:
    """A configuration over `build`'s files: rows of 512 tokens and 12 crops, 8 rows a step."""
    defaults = {
        "manifest": str(folder / "shards"),
        "mixture": str(folder / "mixture.yaml"),
        "tokenizer": str(folder),
        "image_crops": 4,
        "max_crops": 12,
        "sequence_length": 512,
        "window": 64,
    }
    return Config(
        data=DataConfig(
            **(defaults | data),
        ),
        train=TrainConfig(**({"global_batch": 8, "micro_batch": 2} | (train or {}))),
    )
