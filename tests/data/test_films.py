"""The sample data's clips: places are on the objects that the frames show, words are true, held-out pairs stay out."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from megatron_vlm.data import video
from megatron_vlm.data.bundled import clips, film_texts, footage, objects
from megatron_vlm.data.bundled.clips import FPS, SECONDS, SIDE, Moving
from megatron_vlm.data.example import Points, Tracks

GROUND = [("grass", "grass")]
SCENERY = {"grass": Image.fromarray(np.random.default_rng(0).integers(60, 90, (100, 120, 3), dtype=np.uint8))}
KEYS = [f"train/{number}" for number in range(12)]


def plans(wanted: str = "train") -> list[clips.Film]:
    return [clips.plan(key, GROUND, wanted) for key in KEYS]


@pytest.mark.parametrize("film", plans()[:4], ids=lambda film: film.key)
def test_tracks_lie_on_the_objects_of_the_frames(film: clips.Film) -> None:
    data = clips.paint(film, SCENERY)
    found = video.scan(data, name=film.key)
    assert (found.width, found.height) == (SIDE, SIDE)
    assert found.timeline.seconds == pytest.approx(SECONDS, abs=0.01) and found.timeline.seekable
    for one in film.objects:
        track = one.track()
        assert track, "an object that is nowhere visible"
        frames = video.read(data, found.timeline, [at for at, _, _ in track], name=film.key)
        for (_, x, y), pixels in zip(track, frames, strict=True):
            shown = pixels[int(y * SIDE), int(x * SIDE)].astype(int)
            assert np.abs(shown - objects.COLORS[one.color]).max() < 60, (one, x, y, shown)


def test_words_fit_the_ways() -> None:
    way = Moving("red", "star", 16, (0.0, 0.0), (40.0, 2.0), 1.5, 3.0)
    assert way.direction == "to the right"
    assert [place[0] for place in way.track()] == [1.5, 2.0, 2.5]
    assert Moving("red", "star", 16, (0.0, 40.0), (0.0, 0.0), 0.0, 4.0).direction == "up"
    assert Moving("red", "star", 16, (40.0, 0.0), (0.0, 40.0), 0.0, 4.0).direction == "down and to the left"
    assert Moving("red", "star", 16, (4.0, 0.0), (0.0, 4.0), 0.0, 4.0).direction == ""
    film = clips.Film("a", "grass", "grass", (0, 0, 1, 1), (way,))
    long, short = (branch.turns[0].answer for branch in film_texts.captions(film))
    assert long == (
        "The video shows one object, on a photograph of grass. A red star moves to the right, comes at 1.5 s and is "
        "gone from 3.0 s on."
    )
    assert short == "A red star to the right."
    asked = {branch.turns[0].prompt: branch.turns[0].answer for branch in film_texts.questions(film)}
    assert asked == {
        "Which way does the red star go?": "To the right.",
        "Is the red star there from the beginning?": "No, from 1.5 s on.",
        "How many objects does the video show?": "One.",
    }
    (branch,) = film_texts.points(film)
    assert isinstance(branch.turns[0].answer, Points) and branch.turns[0].answer.points[0].at == 1.5


def test_objects_never_meet() -> None:
    for film in plans():
        for number, one in enumerate(film.objects):
            for other in film.objects[number + 1 :]:
                for frame in range(SECONDS * FPS):
                    (left, top), (x, y) = one.square(frame / FPS), other.square(frame / FPS)
                    assert (
                        left + one.diameter <= x
                        or x + other.diameter <= left
                        or (top + one.diameter <= y or y + other.diameter <= top)
                    )


def test_held_out_pairs_are_asked_for_in_the_test_split_only() -> None:
    for film in plans():
        assert not {(one.color, one.kind) for one in film.objects} & objects.HELD_OUT_PAIRS
    for film in plans("held_out"):
        asked = film_texts.labels(film, held_out=True)
        assert asked and all((one.color, one.kind) in objects.HELD_OUT_PAIRS for _, members in asked for one in members)
        for branch in film_texts.tracks(film, held_out=True):
            assert isinstance(branch.turns[0].answer, Tracks) and branch.turns[0].answer.label != "objects"
    assert len({film.info()["objects"][0][0] for film in plans()}) > 2, "keys decide what is shown"  # type: ignore[index]


def test_footage_has_a_place_for_every_half_second_of_its_parts() -> None:
    lengths = {"bunny": 5.28, "carphone": 4.0}
    for shot in footage.SHOTS:
        for places in shot.tracks.values():
            assert len(places) == int(lengths[shot.name] * clips.RATE - 0.01) + 1
            assert all(0 < x < 1 and 0 < y < 1 for x, y in places)
    assert {shot.split for shot in footage.SHOTS} == {"train", "validation", "test"}
