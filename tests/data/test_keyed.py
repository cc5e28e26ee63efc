"""Keyed choices: the same everywhere, and permutations that are permutations."""

import pytest

from megatron_vlm.data.keyed import Permutation, generator, key


def test_keys_are_known_numbers():
    """Written down: a change of these numbers reorders every run."""
    assert key(0, "captions", "a", 0, "prompt") == 1541022426047589232
    assert [Permutation(10, 0, "captions", 0, "order")(place) for place in range(10)] == [2, 7, 0, 3, 4, 9, 6, 1, 8, 5]
    assert generator(1, "a").random() == 0.24332290071385831


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_every_place_once(size):
    permutation = Permutation(size, "a", size)
    assert sorted(permutation(place) for place in range(size)) == list(range(size))


def test_keys_and_visits_give_other_orders():
    orders = {
        tuple(Permutation(50, seed, visit)(place) for place in range(50)) for seed in range(5) for visit in range(5)
    }
    assert len(orders) == 25


def test_the_order_is_not_the_identity_and_spreads():
    permutation = Permutation(10_000, 3)
    places = [permutation(place) for place in range(10_000)]
    assert sum(place == found for place, found in enumerate(places)) < 10
    # The first tenth reaches all tenths of the set about evenly.
    tenths = [sum(found * 10 // 10_000 == tenth for found in places[:1000]) for tenth in range(10)]
    assert min(tenths) > 60 and max(tenths) < 140


def test_outside_places_are_refused():
    with pytest.raises(ValueError, match="outside"):
        Permutation(5, 0)(5)
    with pytest.raises(ValueError, match="0 things"):
        Permutation(0, 0)
