"""What can be said without looking: by hand."""

from megatron_vlm.data.example import Branch, Example, Point, Points, Tracks, Turn
from megatron_vlm.evaluate import tasks
from megatron_vlm.evaluate.baseline import Usual, guesses


def said(style: str, prompt: str, answer: object) -> Branch:
    return Branch(style, (Turn(prompt, answer),))  # type: ignore[arg-type]


def test_the_most_frequent_answer_to_the_same_question_else_of_the_style():
    usual = Usual([
        said("user_qa", "Red?", "no"), said("user_qa", "Red?", "no"), said("user_qa", "Red?", "yes"),
        *[said("user_qa", "What?", "cat")] * 3, said("long_caption", "", "A cat sits."),
    ])  # fmt: skip
    assert usual.answer(said("user_qa", "Red?", "yes"), film=False) == "no"
    assert usual.answer(said("user_qa", "Where?", "here"), film=False) == "cat"
    assert usual.answer(said("long_caption", "", "x"), film=False) == "A cat sits."
    assert usual.answer(said("transcript", "", "x"), film=False) == ""


def test_places_are_the_usual_number_at_the_medians_from_the_left():
    def places(*pairs: tuple[float, float]) -> Branch:
        return said("pointing", "cups", Points("cups", tuple(Point(1, x, y) for x, y in pairs)))

    usual = Usual([places((0.9, 0.1), (0.1, 0.2)), places((0.3, 0.4), (0.7, 0.3)), places((0.5, 0.5))])
    asked = said("pointing", "dogs", Points("dogs", ()))
    assert usual.answer(asked, film=False) == '<points coords="1 1 200 300 2 800 200">dogs</points>'
    counted = usual.answer(said("point_count", "dogs", Points("dogs", ())), film=False)
    assert counted.endswith("shows a total of 2.")


def test_tracks_are_at_the_medians_of_each_moment():
    def track(*points: tuple[float, float, float]) -> Branch:
        answer = Tracks("car", (tuple(Point(*point) for point in points),))
        return said("video_point_track_per_frame", "car", answer)

    usual = Usual([track((0.0, 0.2, 0.2), (0.5, 0.4, 0.2)), track((0.0, 0.4, 0.4)), track((0.0, 0.3, 0.9))])
    # At 0.5 s only one of three is seen.
    found = usual.answer(track((0.0, 0.0, 0.0)), film=True)
    assert found == '<tracks coords="0.0 1 300 400">car</tracks>'


def test_a_set_without_a_training_split_has_the_usual_answers_of_the_one_it_is_like():
    class Shards:
        datasets = ("pointing", "pointing_new", "pixmo_points_eval")

        def count(self, dataset: str, split: str) -> int:
            return 1 if (dataset, split) == ("pointing", "train") else 0

        def example(self, dataset: str, split: str, index: int) -> Example:
            return Example("a", (said("pointing", "cups", Points("cups", (Point(1, 0.25, 0.5),))),), ())

    asked = [Example("b", (said("pointing", "boats", Points("boats", ())),), ())]
    assert guesses(Shards(), tasks.find("pointing_new"), asked) == [['<points coords="1 1 250 500">boats</points>']]
    assert guesses(Shards(), tasks.find("pixmo_points_eval"), asked) is None
