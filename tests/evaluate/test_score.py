import math

import numpy as np
import pytest

from megatron_vlm.evaluate.score import Share, bootstrap, judged, summary, unknown, unreadable


def test_wilson_interval_of_published_numbers():
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
    assert Share(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Share(0, 20).interval == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert Share(9673, 9673).interval[1] == pytest.approx(1.0)
    assert math.isnan(Share(0, 0).value)


def test_three_outcomes_are_counted_and_the_models_faults_stay_in_the_count():
    right, wrong = judged({"accuracy": (1, 1)}), judged({"accuracy": (0.25, 1)})
    babble = unreadable({"accuracy": (0, 1)}, "the answer names no number")
    down = unknown("the judge did not answer")
    found = summary([[right], [wrong], [babble], [down], [down]])
    assert (found["right"], found["wrong"], found["questions"]) == (1, 1, 5)
    assert found["not_scored"] == {"the answer names no number": 1, "the judge did not answer": 2}
    assert found["scores"]["accuracy"]["value"] == pytest.approx(1.25 / 3)


def test_scores_are_shares_of_all_parts_together():
    f1 = summary([[judged({"F1": (2, 3)}), judged({"F1": (0, 5)})], [judged({"F1": (4, 4)})]])["scores"]["F1"]
    assert (f1["value"], f1["parts"], f1["wholes"]) == (0.5, 6, 12) and f1["interval"] == "bootstrap over images"
    assert summary([])["scores"] == {} and judged({"F1": (0, 0)}).outcome == "right"


def test_single_right_or_wrong_answers_have_wilsons_interval():
    images = [[judged({"accuracy": (int(n < 81), 1)})] for n in range(263)]
    score = summary(images)["scores"]["accuracy"]
    assert (score["low"], score["high"]) == pytest.approx((0.2553, 0.3662), abs=5e-5) and score["interval"] == "Wilson"


def test_answers_that_are_all_alike_are_not_certain():
    score = summary([[judged({"accuracy": (0, 1)})] * 3] * 20)["scores"]["accuracy"]
    assert score["high"] == pytest.approx(0.1611, abs=5e-5) and score["interval"] == "Wilson, an image counted once"


def test_bootstrap_covers_about_95_percent_and_knows_that_answers_about_an_image_go_together():
    rng = np.random.default_rng(1)
    covered = widths = 0
    for trial in range(25):
        chances = rng.choice([0.2, 0.9], 80)  # easy and hard images, five questions each: 0.55 on average
        hits = rng.binomial(5, chances)
        low, high = bootstrap(np.stack([hits, np.full(80, 5)], axis=1).astype(float), seed=trial)
        covered += low <= 0.55 <= high
        widths += high - low
    alone = Share(220, 400).interval
    assert 21 <= covered <= 25 and widths / 25 > 1.5 * (alone[1] - alone[0])
