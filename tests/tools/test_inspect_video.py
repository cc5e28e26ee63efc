"""Looking at videos: frames with their places marked."""

import re

import numpy as np
import pytest

from megatron_vlm.data.example import Branch, Clip, Example, Point, Points, Tracks, Turn
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.writer import ShardWriter
from megatron_vlm.evaluate import draw
from tests.data.clips import clip, steady
from tools import inspect_data

TRACK = Tracks("ball", ((Point(0.5, 0.5, 0.75), Point(1.0, 0.25, 0.75)),))


def test_frames_of_a_video_are_drawn(tmp_path, capsys):
    with ShardWriter(tmp_path / "shards") as writer:
        film = writer.add_video(clip(steady(30)))
        branches = (
            Branch("video_point_track_per_frame", (Turn("ball", TRACK),)),
            Branch("video_point", (Turn("goal", Points("goal", (Point(1.5, 0.75, 0.75),))),)),
        )
        writer.add(Example("a", branches, (film,), clip=Clip(0.2, 2.4)), "games", "train")
    inspect_data.main([str(tmp_path / "shards"), "--num-samples", "1", "--out", str(tmp_path / "look")])
    assert re.search(r"games +train +1 +2 +0 +1 +2\.2 ", capsys.readouterr().out), "branches, images, videos, seconds"
    page = (tmp_path / "look" / "index.html").read_text()
    assert "0.5 1 500 750;1.0 1 250 750" in page and "1.5 1 750 750" in page
    assert len([*(tmp_path / "look").glob("*.png")]) == inspect_data.SHOWN_FRAMES
    shards = Shards(tmp_path / "shards")
    shown = [np.asarray(one).astype(int) for one in inspect_data.pictures(shards, shards.example("games", "train", 0))]
    ring = np.array([int(draw.COLORS[0][i : i + 2], 16) for i in (1, 3, 5)])
    found = [(np.abs(one - ring).sum(2) < 30).sum() for one in shown]
    assert sorted(count > 20 for count in found) == [False] * 6 + [True] * 2


def test_a_name_that_is_no_directory_and_no_data_set_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(inspect_data, "build", lambda: tmp_path / "shards")
    with ShardWriter(tmp_path / "shards") as writer:
        writer.add(Example("a", (Branch("text_sft", (Turn("Hi", "Hello."),)),)), "talk", "train")
    inspect_data.main(["talk", "--num-samples", "0"])
    with pytest.raises(SystemExit, match="nowhere is no directory of shards, and none of the sample data's sets: talk"):
        inspect_data.main(["nowhere"])
