"""One's own videos: JSONL lines of every form -> shards -> tokens; what a bad line is told. Videos are made here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from megatron_vlm.config import presets
from megatron_vlm.config.schema import Config
from megatron_vlm.data import tokens
from megatron_vlm.data.example import Clip, Point, Points, Subtitle, Tracks, Turn
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.tree import TreeSettings, tokenize
from tests.data.clips import HEIGHT, WIDTH, clip, steady
from tools import build_shards

BALL = [[[8, 12, 0.0], [16, 12, 0.5], [32, 24, 1.0]], [[64, 48, 1.0]]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A video of 3 s and an image."""
    (tmp_path / "v.mp4").write_bytes(clip(steady(30)))
    Image.new("RGB", (40, 20), "red").save(tmp_path / "red.png")
    return tmp_path


def write(folder: Path, *lines: object) -> None:
    (folder / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def build(folder: Path) -> Shards:
    build_shards.main(["build", str(folder / "mine.jsonl"), "--out", str(folder / "shards")])
    return Shards(folder / "shards")


def test_every_form_of_a_video_line_arrives(folder: Path) -> None:
    write(
        folder,
        {"video_path": "v.mp4", "caption": "Blocks flicker."},
        {"video_path": "v.mp4", "question": "What flickers?", "answer": "Blocks."},
        {"video_path": "v.mp4", "label": "goals", "points": [[16, 12, 0.5], [32, 24, 2.0]]},
        {"video_path": "v.mp4", "label": "goals", "points": [], "style": "video_point_count"},
        {"video_path": "v.mp4", "label": "the ball", "tracks": BALL, "rate": 2},
        {"video_path": "v.mp4", "start": 1.0, "end": 2.5, "subtitles": [[0.0, 0.5, "Go!"]], "branches": [
            {"caption": "Less.", "style": "video_short_caption"},
            {"label": "goals", "points": [[50, 100, 1.0]], "unit": "percent"}]},
        {"video_path": "v.mp4", "conversations": [{"from": "human", "value": "<video>\nWhat?"},
                                                  {"from": "gpt", "value": "Blocks."}]},
        {"image_paths": ["red.png", "red.png"], "label": "red", "points": [[10, 5], [20, 10, 2]]},
    )  # fmt: skip
    shards = build(folder)
    samples = [shards.example("mine", "train", index) for index in range(shards.count("mine", "train"))]
    assert [[branch.style for branch in sample.branches] for sample in samples] == [
        ["video_long_caption"], ["user_qa"], ["video_point"], ["video_point_count"], ["video_point_track_per_frame"],
        ["video_short_caption", "video_point"], ["user_qa"], ["pointing"],
    ]  # fmt: skip
    film = samples[0].video
    assert film is not None and (film.width, film.height, film.seconds) == (WIDTH, HEIGHT, pytest.approx(3.0, abs=0.1))
    assert all(sample.media == (film,) for sample in samples[:7]), "the file is stored once"
    assert samples[2].branches[0].turns[0].answer == Points("goals", (Point(0.5, 0.25, 0.25), Point(2.0, 0.5, 0.5)))
    assert samples[3].branches[0].turns[0].answer == Points("goals", ())
    assert samples[4].clip == Clip(rate=2)
    assert samples[4].branches[0].turns[0].answer == Tracks(
        "the ball", ((Point(0.0, 0.125, 0.25), Point(0.5, 0.25, 0.25), Point(1.0, 0.5, 0.5)), (Point(1.0, 1.0, 1.0),))
    )
    assert samples[5].clip == Clip(1.0, 2.5, subtitles=(Subtitle(0.0, 0.5, "Go!"),))
    assert samples[5].branches[1].turns[0].answer == Points("goals", (Point(1.0, 0.5, 1.0),))
    assert samples[6].branches[0].turns == (Turn("What?", "Blocks."),)
    assert samples[7].branches[0].turns[0].answer == Points("red", (Point(1, 0.25, 0.25), Point(2, 0.5, 0.5)))
    build_shards.main(["verify", str(folder / "shards")])


def test_lines_become_tokens_with_their_times_and_subtitles(folder: Path) -> None:
    write(
        folder,
        {"video_path": "v.mp4", "label": "the ball", "tracks": BALL, "rate": 2},
        {"video_path": "v.mp4", "start": 1.0, "end": 2.5, "subtitles": [[0.0, 0.5, "Go!"]], "caption": "Less."},
    )
    shards = build(folder)
    (folder / "tokenizer.json").write_bytes(tokens.train(["a video of a ball"] * 9, vocab_size=2048).encode())
    config = Config()
    arch = presets.architecture(config.model)
    tokenizer = tokens.Tokenizer.load(str(folder / "tokenizer.json"), arch.language)
    settings = TreeSettings.of(config.data, tokenizer, arch)
    tracked, cut = (tokenize(shards.example("mine", "train", index), "mine", 0, settings) for index in (0, 1))
    said = tokenizer.decode(
        [token for token, weight in zip(tracked.targets, tracked.loss_weights, strict=True) if weight]
    )
    assert '<tracks coords="0.0 1 125 250;0.5 1 250 250;1.0 1 500 500 2 1000 1000">the ball</tracks>' in said.replace(
        "\t", ";"
    )
    assert cut.layouts[0].times == (0.0, 0.5, 1.0, 1.5) and "0.0 - 0.5 Go!" in cut.layouts[0].subtitles
    assert cut.layouts[0].start == 1.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"video_path": "none.mp4", "caption": "x"}, "none.mp4"),
        ({"video_path": "red.png", "caption": "x"}, "red.png: video .* no container that is read"),
        ({"video_path": "v.mp4", "image_path": "red.png", "caption": "x"}, "either image_path or video_path"),
        ({"video_path": ["v.mp4"], "caption": "x"}, "video_path must be a file name"),
        ({"video_path": "v.mp4", "label": "a", "points": [[1, 2]]}, r"must be \[x, y, seconds\] in a video"),
        ({"video_path": "v.mp4", "label": "a", "points": [[1, 2, 9]]}, "is at 9 s; the clip lasts 2.94 s"),
        (
            {"video_path": "v.mp4", "label": "a", "points": [[65, 2, 1]]},
            "outside the frame: x to 64, y to 48 in pixels",
        ),
        ({"video_path": "v.mp4", "label": "a", "tracks": BALL}, 'tracks need "rate"'),
        (
            {"video_path": "v.mp4", "label": "a", "tracks": BALL, "rate": 1},
            "at 0.5 s, but with rate 1 frames are shown",
        ),
        ({"video_path": "v.mp4", "label": "a", "tracks": [[]], "rate": 2}, "for each object"),
        ({"video_path": "v.mp4", "label": "a", "tracks": [[[1, 2, 1], [1, 2, 0.5]]], "rate": 2}, "sort by time"),
        ({"video_path": "v.mp4", "label": "a", "tracks": [[[1, 2, 1], [3, 2, 1]]], "rate": 2}, "sort by time"),
        ({"image_path": "red.png", "label": "a", "tracks": BALL}, "tracks need a video_path"),
        ({"image_path": "red.png", "caption": "x", "start": 1.0}, "start need a video_path"),
        ({"video_path": "v.mp4", "caption": "x", "start": 4.0}, "lies outside the video"),
        ({"video_path": "v.mp4", "caption": "x", "start": "1"}, "start must be a time in seconds"),
        ({"video_path": "v.mp4", "caption": "x", "start": None}, "start must be a time in seconds"),
        ({"video_path": "v.mp4", "caption": "x", "rate": 0.5}, "rate must be a whole number"),
        ({"video_path": "v.mp4", "caption": "x", "rate": 10**400}, "rate must be a whole number"),
        ({"video_path": "v.mp4", "caption": "x", "subtitles": [["a", 1, "b"]]}, "subtitles must be a list"),
    ],
)
def test_bad_video_line_is_named_and_nothing_is_written(folder: Path, line: object, message: str) -> None:
    write(folder, {"video_path": "v.mp4", "caption": "x"}, line)
    with pytest.raises(SystemExit, match=message) as stop:
        build(folder)
    assert str(stop.value).startswith("error: ") and "mine.jsonl:2: " in str(stop.value)
    assert not (folder / "shards").exists()
