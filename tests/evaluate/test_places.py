import itertools
import math
import random

import numpy as np
import pytest

from megatron_vlm.data.masks import packed
from megatron_vlm.data.points import Place
from megatron_vlm.evaluate.places import counting, pointing, video_pointing
from megatron_vlm.evaluate.regions import Region, Spot, paired

SQUARE = [(100, 100)]


def circle(x: float, y: float, radius: float = 0.1, at: float = 1) -> Region:
    return Region(x, y, at, (Spot(at, x, y, radius),))


def masked(x: float, y: float, rows: slice, columns: slice) -> Region:
    mask = np.zeros((100, 100), bool)
    mask[rows, columns] = True
    return Region(x, y, 1, (Spot(1, x, y, mask=packed(mask)),))


def test_a_greedy_matching_would_lose_a_pair():
    # The first place reaches both objects and is nearer to the one that the second reaches alone.
    said = [Place(1, 1, 0.5, 0.5), Place(1, 2, 0.42, 0.5)]
    wanted = [circle(0.5, 0.5), circle(0.58, 0.5, 0.09)]
    assert pointing(said, wanted, SQUARE)["F1"] == (4, 4)
    assert pointing(said[:1], wanted, SQUARE)["F1"] == (2, 3)


def test_hits_are_the_most_of_all_orders():
    rng = random.Random(0)
    for _ in range(200):
        said = [Place(1, n, rng.random(), rng.random()) for n in range(rng.randint(0, 4))]
        wanted = [circle(rng.random(), rng.random(), rng.uniform(0.1, 0.6)) for _ in range(rng.randint(0, 4))]
        padded = [(p.x, p.y) for p in said] + [(9.0, 9.0)] * len(wanted)
        best = max(
            sum(math.dist(place, (w.x, w.y)) <= w.spots[0].radius for place, w in zip(order, wanted, strict=False))
            for order in itertools.permutations(padded, len(wanted))
        )
        assert pointing(said, wanted, SQUARE)["precision"] == (best, len(said))


def test_with_masks_the_nearest_pairing_decides_whether_it_hits_or_not():
    # The place lies in the second mask, but nearer to the first object's point: Molmo2 counts a miss.
    wanted = [masked(0.4, 0.5, slice(45, 55), slice(35, 45)), masked(0.9, 0.5, slice(45, 55), slice(50, 95))]
    said = [Place(1, 1, 0.52, 0.5)]
    assert pointing(said, wanted, SQUARE)["recall"] == (0, 2)
    assert pointing([*said, Place(1, 2, 0.4, 0.5)], wanted, SQUARE)["recall"] == (2, 2)


def test_places_belong_to_their_image_and_sizes_to_theirs():
    wanted = [circle(0.5, 0.5, 0.1, at=1), circle(0.5, 0.5, 0.1, at=2)]
    sizes = [(100, 100), (200, 100)]
    assert pointing([Place(1, 1, 0.5, 0.5), Place(1, 2, 0.5, 0.5)], wanted, sizes)["F1"] == (2, 4)
    # A tenth of the longer side, 20 pixels, is a fifth of the height.
    assert pointing([Place(2, 1, 0.5, 0.69)], wanted[1:], sizes)["F1"] == (2, 2)
    assert pointing([Place(2, 1, 0.61, 0.5)], wanted[1:], sizes)["F1"] == (0, 2)
    assert pointing([Place(3, 1, 0.5, 0.5)], [], sizes) == {
        "F1": (0, 1), "precision": (0, 1), "recall": (0, 0), "F1 by question": (0.0, 1),
    }  # fmt: skip


def test_nothing_wanted_and_nothing_said_is_right():
    assert pointing([], [], SQUARE)["F1 by question"] == (1.0, 1)


def test_video_points_need_the_right_object_time_and_place():
    seen = tuple(Spot(t, 0.2 + t / 10, 0.5, 0.05) for t in (1.0, 1.5, 2.0))
    wanted = [Region(0.3, 0.5, 1.0, seen)]

    def scores(*said: Place) -> dict[str, tuple[float, float]]:
        return dict(video_pointing(said, wanted, (100, 100), 4.0))

    assert scores(Place(1.0, 1, 0.3, 0.5))["F1"] == (2, 2) and scores(Place(1.0, 1, 0.3, 0.5))["time"] == (1, 1)
    later = scores(Place(2.0, 1, 0.4, 0.5))  # there too, but not the moment that was asked for
    assert later["F1"] == (2, 2) and later["time"] == (0, 1)
    assert scores(Place(2.0, 1, 0.3, 0.5))["F1"] == (0, 2)  # it has gone
    assert scores(Place(3.0, 1, 0.5, 0.5))["F1"] == (0, 2)  # nothing is known of that moment
    assert scores()["F1 by question"] == (0.0, 1)


def test_counts_are_exact_close_and_by_bin():
    assert counting(3, 3) == {"accuracy": (1, 1), "close": (1, 1), "count 0 to 5": (1, 1)}
    assert counting(41, 44)["close"] == (1, 1) and counting(40, 44)["close"] == (0, 1)  # 1 + floor(2.2)
    assert counting(7, 6) == {"accuracy": (0, 1), "close": (1, 1), "count 6 to 10": (0, 1)}
    assert "count 26 or more" in counting(26, 26) and counting(None, 1)["close"] == (0, 1)


def test_pairing_is_scipys_on_distances():
    assert sorted(paired([(0, 0), (5, 5)], [(5, 4), (0, 1), (9, 9)])) == [(0, 1), (1, 0)]
    assert paired([], [(1, 1)]) == [] == paired([(1, 1)], [])


@pytest.mark.parametrize("count", [2000])
def test_a_thousand_places_are_enough(count):
    said = [Place(1, n, 0.5, 0.5) for n in range(count)]
    assert pointing(said, [circle(0.5, 0.5)], SQUARE)["precision"] == (1, count)
