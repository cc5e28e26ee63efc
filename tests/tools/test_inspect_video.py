"""Looking at videos: frames with their places marked."""

import numpy as np

from megatron_vlm.data.example import Branch, Clip, Example, Point, Points, Tracks, Turn
from megatron_vlm.data.shards import Shards
from megatron_vlm.data.writer import ShardWriter
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
    assert "games" in capsys.readouterr().out
    page = (tmp_path / "look" / "index.html").read_text()
    assert "0.5 1 500 750;1.0 1 250 750" in page and "1.5 1 750 750" in page
    assert len([*(tmp_path / "look").glob("*.png")]) == inspect_data.SHOWN_FRAMES
    shards = Shards(tmp_path / "shards")
    shown = [np.asarray(one).astype(int) for one in inspect_data.pictures(shards, shards.example("games", "train", 0))]
    ring = np.array([int(inspect_data.COLORS[0][i : i + 2], 16) for i in (1, 3, 5)])
    found = [(np.abs(one - ring).sum(2) < 30).sum() for one in shown]
    assert sorted(count > 20 for count in found) == [False] * 6 + [True] * 2
