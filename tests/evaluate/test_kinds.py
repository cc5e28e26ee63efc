"""Every kind of answer: right, wrong and unreadable words; any bytes give a verdict, in linear time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vlm.data.example import Branch, Clip, Example, Media, Point, Points, Tracks, Turn
from megatron_vlm.data.masks import packed
from megatron_vlm.evaluate import kinds, tasks
from megatron_vlm.evaluate.kinds import KINDS, Question

CUPS = Points("cups", (Point(1, 0.2, 0.3), Point(1, 0.7, 0.7)))
JUMP = Points("jump", (Point(1.0, 0.5, 0.5),))
CAR = Tracks("car", ((Point(0.0, 0.5, 0.5), Point(0.5, 0.6, 0.5)),))
MC = "Which?\nA. a cat\nB. a dog"
IMAGE, FILM = {"sizes": ((100, 100),), "radius": 0.05}, {"sizes": ((100, 100),), "radius": 0.05, "seconds": 4.0}
#: kind -> question, words that are right, words that are wrong, words that are unreadable.
CASES = {
    "answer": (Question("?", "A cat."), "a cat", "a dog", " "),
    "vqa": (Question("?", "2", {"answers": {"?": ["2"] * 8 + ["two dogs"] * 2}}), "Two", "dogs", ""),
    "relaxed": (Question("?", "100"), "104", "106", ""),
    "anls": (Question("?", "Coca Cola"), "coca cola", "fanta", ""),
    "choice": (Question(MC, "B. a dog"), "(b)", "a cat", "C"),
    "choice or words": (Question(MC, "B", {"category": "pets"}), "B", "A", "perhaps"),
    "number": (Question("?", "1.5", {"forms": {"?": ["float", 1]}}), "It costs $1.48.", "1.6", "much"),
    "count": (Question("cups", CUPS), "There are 2 cups.", "Three.", "many"),
    "pointing": (
        Question("cups", CUPS, **IMAGE),
        '<points coords="1 1 201 301 2 700 700">cups</points>',
        '<points coords="1 1 901 301">cups</points>',
        "over there",
    ),
    "in mask": (
        Question("cups", CUPS, {"masks": {"cups": [[[1, *packed(np.eye(10, dtype=bool))]]]}}, ((10, 10),)),
        '<points coords="1 1 250 250 2 950 950">cups</points>',
        '<points coords="1 1 250 250 2 950 150">cups</points>',
        "there",
    ),
    "video pointing": (
        Question("jump", JUMP, **FILM),
        '<points coords="1.0 1 500 500">jump</points>',
        '<points coords="3.0 1 500 500">jump</points>',
        "it jumps",
    ),
    "tracking": (
        Question("car", CAR, **FILM),
        '<tracks coords="0.0 1 500 500;0.5 1 600 500">car</tracks>',
        '<tracks coords="0.0 1 100 100">car</tracks>',
        "it drives",
    ),
    "caption": (Question("", "Two red cups. A blue box."), "A blue box. Two red cups.", "A dog.", ""),
}


def test_every_kind_has_a_case_and_every_task_a_kind():
    assert set(CASES) == set(KINDS)
    assert {task.kind for task in tasks.TASKS.values()} <= set(KINDS)
    assert all(name == task.name for name, task in tasks.TASKS.items())


@pytest.mark.parametrize("name", KINDS)
def test_three_outcomes(name):
    question, right, wrong, nothing = CASES[name]
    found = [kinds.verdict(KINDS[name], question, said) for said in (right, wrong, nothing)]
    assert [one.outcome for one in found] == ["right", "wrong", "not scored"]
    assert found[0].value == 1.0 and found[2].value == 0.0  # it stays in the count, and earns nothing
    assert found[2].reason == KINDS[name].complaint


@pytest.mark.parametrize("name", ["pointing", "tracking", "choice", "count"])
def test_a_truth_that_does_not_do_is_not_the_models_fault(name):
    lacking = {
        "pointing": (Question("cups", CUPS, sizes=((100, 100),)), "truth: nothing says how near a place must be"),
        "tracking": (Question("car", "a car", **FILM), "truth: the truth has no tracks"),
        "choice": (Question(MC, "Z"), "truth: the truth names none of the question's options"),
        "count": (Question("cups", "some"), "truth: the truth names no number"),
    }
    question, reason = lacking[name]
    found = kinds.verdict(KINDS[name], question, CASES[name][1])
    assert (found.outcome, found.scores, found.reason) == ("not scored", {}, reason)


def test_the_objects_of_the_sample_data_say_how_near():
    scene = {"objects": [["red", "cup", 0.2, 0.3, 0.1], ["red", "cup", 0.7, 0.7, 0.05]]}
    said = '<points coords="1 1 290 300 2 760 700">cups</points>'  # 0.09 of 0.1 off, 0.06 of 0.05 off
    assert kinds.verdict(KINDS["pointing"], Question("cups", CUPS, scene, ((50, 50),)), said).scores["F1"] == (2, 4)
    film = {"objects": [["red", "car", 0.04, [[0.0, 0.5, 0.5], [0.5, 0.6, 0.5], [1.0, 0.7, 0.5]]]]}
    question = Question("car", CAR, film, ((50, 50),), 4.0)
    assert kinds.verdict(KINDS["tracking"], question, CASES["tracking"][1]).value == 1.0
    late = Question("car", Points("car", (Point(0.5, 0.6, 0.5),)), film, ((50, 50),), 4.0)
    assert kinds.verdict(KINDS["video pointing"], late, '<points coords="1.0 1 700 500">car</points>').value == 1.0


def test_a_question_takes_sizes_seconds_and_rate_from_the_sample():
    video = Media("0" * 64, 64, 48, "video", seconds=9.0, fps=6.0, frames=54)
    branch = Branch("video_point_track_per_frame", (Turn("car", CAR),))
    question = kinds.of(Example("a", (branch,), (video,), {"x": 1}, Clip(1.0, 5.0, rate=3)), branch, radius=0.1)
    assert (question.sizes, question.seconds, question.rate) == (((64, 48),), 4.0, 3)
    assert (question.info, question.radius, question.wanted) == ({"x": 1}, 0.1, CAR)


def test_an_unknown_task_is_named_with_the_nearest():
    with pytest.raises(ValueError, match="there is no task 'docqa'; did you mean .*doc_qa"):
        tasks.find("docqa")


PIECES = st.sampled_from(
    ['<points coords="', "<tracks", 'coords="', "1 1 103 540", "0.5 2 999 1000", ";", "\t", '">', "</points>",
     "<point ", 'x="10"', " y='5.5'", "x1=", "There are ", "shows a total of ", "9" * 30, "A.", "(b)", "answer",
     "1,000", "%", " "]
)  # fmt: skip
ANY = st.one_of(st.binary(max_size=200).map(lambda b: b.decode("utf-8", "replace")), st.text(max_size=120),
                st.lists(PIECES, max_size=20).map("".join))  # fmt: skip


@settings(max_examples=100)
@given(said=ANY)
def test_any_bytes_give_a_verdict(said):
    for name, (question, *_) in CASES.items():
        found = kinds.verdict(KINDS[name], question, said)
        assert found.outcome in ("right", "wrong", "not scored")
        assert all(0 <= part <= whole for part, whole in found.scores.values())


#: What patterns are slow on: beginnings without an end, long runs of digits, blanks and separators.
HARD = ["<points ", "<point 1,1,", '<points coords="', '<points coords="1 ' + "1" * 50, "1", "1 1 100 100 ", "\t", "; ",
        "x=1 ", "x1111", " ", ",", "1,", ".", "!", "answer ", "(", "There are ", "a cat. ", "[1,"]  # fmt: skip


@pytest.mark.parametrize("piece", HARD)
def test_words_are_read_in_linear_time(piece):
    def seconds(size: int) -> float:
        said = (piece * (size // len(piece) + 1))[:size]
        began = time.process_time()
        for name, (question, *_) in CASES.items():
            KINDS[name].parse(said, question)
        return time.process_time() - began

    times = [min(seconds(size) for _ in range(3)) for size in (4_000, 16_000)]
    # Linear gives 4, quadratic 16; a few milliseconds are noise.
    assert times[1] < 8 * times[0] + 0.02, times
