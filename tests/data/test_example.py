"""Samples as JSON, and what is refused before it reaches a shard."""

import dataclasses

import pytest

from megatron_vlm.data.example import (
    Branch,
    Clip,
    Example,
    Media,
    Point,
    Points,
    Subtitle,
    Tracks,
    Turn,
    from_json,
    to_json,
)

PHOTO = Media("0" * 64, 640, 480)
FILM = Media("1" * 64, 640, 360, "video", 12.5, 29.97, 375)
CAPTION = Branch("long_caption", (Turn("", "A cat."),))
LINES = (Subtitle(0.0, 1.5, "Hello."), Subtitle(2.0, 2.5, "é\n"))


def pointing(*points: Point, media: tuple[Media, ...] = (PHOTO,)) -> Example:
    return Example("a", (Branch("pointing", (Turn("cups", Points("cups", points)),)),), media)


def tracking(*objects: tuple[Point, ...], media: tuple[Media, ...] = (FILM,), clip: Clip | None = None) -> Example:
    style = "video_point_track_per_frame"
    return Example("a", (Branch(style, (Turn("cups", Tracks("cups", objects)),)),), media, clip=clip)


@pytest.mark.parametrize(
    "example",
    [
        Example("v", (CAPTION,), (FILM,)),
        Example("v", (CAPTION,), (FILM,), {"a": 1}, Clip(1.25, 12.0, 2, LINES)),
        tracking((Point(0.0, 0.1, 0.2), Point(0.5, 0.1, 1 / 3)), (Point(0.5, 0.0, 1.0),), clip=Clip(2.0)),
        tracking(),
        pointing(Point(3.25, 0.5, 0.5), media=(FILM,)),
        Example("a/b-c_1", (CAPTION,), (PHOTO,), {"answers": ["x", 3, None]}),
        pointing(Point(1, 0.25, 1.0), Point(1, 0.0, 1 / 3)),
        pointing(),
        Example("t", (Branch("text_sft", (Turn("é\n\u2028<|im_end|>", "日本"), Turn("b", "c"))), CAPTION)),
    ],
)
def test_json_gives_the_sample_back(example):
    example.check()
    assert from_json(to_json(example)) == example
    assert "\n" not in to_json(example)


@pytest.mark.parametrize(
    ("example", "complaint"),
    [
        (Example("../a", (CAPTION,)), "sample key"),
        (Example("/a", (CAPTION,)), "sample key"),
        (Example("a//b", (CAPTION,)), "sample key"),
        (Example("a.b", (CAPTION,)), "sample key"),
        (Example("", (CAPTION,)), "sample key"),
        (Example("a\n", (CAPTION,)), "sample key"),
        (Example("a", ()), "no branch"),
        (Example("a", (Branch("s", ()),)), "no turn"),
        (Example("a", (Branch("long_caption", (Turn("", " \n"),)),)), "answer is empty"),
        (pointing(Point(1, float("nan"), 0.5)), "not finite"),
        (pointing(Point(1, float("inf"), 0.5)), "not finite"),
        (pointing(Point(1, 1.01, 0.5)), "outside the picture"),
        (pointing(Point(1, 0.5, -0.1)), "outside the picture"),
        (pointing(Point(2, 0.5, 0.5)), "names image 2; there are 1"),
        (pointing(Point(0, 0.5, 0.5)), "names image 0; there are 1"),
        (pointing(Point(13.6, 0.5, 0.5), media=(FILM,)), "not in the 12.50 s of the video"),
        (pointing(Point(-0.1, 0.5, 0.5), media=(FILM,)), "not in the 12.50 s of the video"),
        (tracking((Point(4.0, 0.5, 0.5),), clip=Clip(5.0, 7.5)), "not in the 2.50 s of the video"),
        (tracking((Point(float("nan"), 0.5, 0.5),)), "not finite"),
        (tracking((Point(0.0, 1.5, 0.5),)), "outside the picture"),
        (tracking(()), "nowhere visible"),
        (tracking((Point(1, 0.5, 0.5),), media=(PHOTO,)), "tracks need a video"),
        (Example("a", (CAPTION,), (FILM, FILM)), "2 media of kind video; needed any number of images, or one video"),
        (Example("a", (CAPTION,), (PHOTO, FILM)), "2 media of kind image and video"),
        (Example("a", (CAPTION,), (dataclasses.replace(PHOTO, kind="sound"),)), "media of kind sound"),
        (Example("a", (CAPTION,), (PHOTO,), clip=Clip(0.0)), "names a clip, but has no video"),
        (Example("a", (CAPTION,), (FILM,), clip=Clip(12.5)), "lies outside the video of 12.50 s"),
        (Example("a", (CAPTION,), (FILM,), clip=Clip(0.0, subtitles=(Subtitle(0.0, float("inf"), "x"),))), "finite"),
    ],
)
def test_bad_samples_are_refused(example, complaint):
    with pytest.raises(ValueError, match=complaint):
        example.check()


def test_points_need_a_label():
    turn = Turn("cups", Points(" ", ()))
    with pytest.raises(ValueError, match="no label"):
        dataclasses.replace(pointing(), branches=(Branch("pointing", (turn,)),)).check()
