"""Samples as JSON, and what is refused before it reaches a shard."""

import dataclasses

import pytest

from megatron_vlm.data.example import Branch, Example, Media, Point, Points, Turn, from_json, to_json

PHOTO = Media("0" * 64, 640, 480)
CAPTION = Branch("long_caption", (Turn("", "A cat."),))


def pointing(*points: Point, media: tuple[Media, ...] = (PHOTO,)) -> Example:
    return Example("a", (Branch("pointing", (Turn("cups", Points("cups", points)),)),), media)


@pytest.mark.parametrize(
    "example",
    [
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
    ],
)
def test_bad_samples_are_refused(example, complaint):
    with pytest.raises(ValueError, match=complaint):
        example.check()


def test_points_need_a_label():
    turn = Turn("cups", Points(" ", ()))
    with pytest.raises(ValueError, match="no label"):
        dataclasses.replace(pointing(), branches=(Branch("pointing", (turn,)),)).check()
