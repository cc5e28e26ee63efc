import itertools
import math
import random

import pytest

from megatron_vlm.evaluate.score import Pointing, Share, matched, same_answer


def test_wilson_interval_of_published_numbers():
    # Newcombe (1998), table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
    assert Share(81, 263).interval == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert Share(0, 20).interval == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert Share(9673, 9673).interval[1] == pytest.approx(1.0)
    assert math.isnan(Share(0, 0).value)


def test_a_greedy_matching_would_lose_a_pair():
    # The first found place reaches both targets, the second only the first target.
    assert matched([(0.0, 0.0), (-1.0, 0.0)], [(0.0, 0.0), (1.0, 0.0)], [1.0, 1.0]) == 2
    assert matched([(0.0, 0.0)], [(0.0, 0.0), (1.0, 0.0)], [1.0, 1.0]) == 1


def test_matching_is_the_best_of_all_orders():
    rng = random.Random(0)
    for _ in range(200):
        found = [(rng.random(), rng.random()) for _ in range(rng.randint(0, 4))]
        wanted = [(rng.random(), rng.random()) for _ in range(rng.randint(0, 4))]
        radii = [rng.uniform(0.1, 0.6) for _ in wanted]
        padded = found + [(9.0, 9.0)] * len(wanted)
        best = max(
            sum(math.dist(place, target) <= radius for place, target, radius in zip(order, wanted, radii, strict=False))
            for order in itertools.permutations(padded, len(wanted))
        )
        assert matched(found, wanted, radii) == best


def test_f1_is_over_all_places_together():
    score = Pointing(hits=3, found=4, wanted=6)
    assert (score.precision, score.recall, score.f1) == (0.75, 0.5, 0.6)
    assert Pointing(0, 0, 5).f1 == 0.0


def test_answers_are_compared_without_case_and_full_stop():
    assert (
        same_answer(" Yes.\n", "yes") and same_answer("light blue", "Light blue") and not same_answer("yes no", "yes")
    )
