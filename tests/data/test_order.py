"""The order of samples is a pure function: closed-form counts, every sample once a visit, any window alone."""

import time

from megatron_vlm.data.order import Draw, MixtureOrder, OnePassOrder

NAMES, SIZES, RATES = ("a", "b", "c", "d"), (100, 37, 5, 9), (0.6, 0.3, 0.1, 0.0)


def order(seed: int = 0) -> MixtureOrder:
    return MixtureOrder(NAMES, SIZES, RATES, seed)


def test_counts_follow_the_rates_within_one():
    for now in (0, 1, 17, 1000, 10**9):
        for count, rate in zip(order().counts(now), RATES, strict=True):
            assert abs(count - now * rate) <= 1 + now * 2**-40


def test_windows_follow_each_other_without_a_gap():
    draws = [draw for window in range(50) for draw in order().window(window, 32)]
    assert abs(len(draws) - 50 * 32) <= len(NAMES)
    for source, size in enumerate(SIZES):
        mine = sorted((draw.visit, draw.place) for draw in draws if draw.source == source)
        whole = len(mine) // size
        assert mine[: whole * size] == [(visit, index) for visit in range(whole) for index in range(size)]
        assert len(set(mine)) == len(mine)
    assert not any(draw.source == 3 for draw in draws)


def test_a_window_needs_no_earlier_one():
    assert order().window(7, 64) == order().window(7, 64)
    assert order().window(7, 64) != order(seed=1).window(7, 64)
    # The same draws whatever the size of the windows.
    assert sorted(order().window(0, 64) + order().window(1, 64)) == sorted(order().window(0, 128))


def test_the_millionth_window_is_as_near_as_the_first():
    large = MixtureOrder(("a", "b"), (10**9, 50_000), (0.7, 0.3), 0)
    start = time.perf_counter()
    draws = large.window(1_000_000, 4096)
    assert time.perf_counter() - start < 1
    assert abs(len(draws) - 4096) <= 2 and len(set(draws)) == len(draws)


def test_visits_have_different_orders():
    only = MixtureOrder(("a",), (20,), (1.0,), 0)
    # Windows of one draw: a longer one is shuffled anew.
    visits = [[only.window(20 * visit + number, 1)[0].place for number in range(20)] for visit in range(3)]
    assert all(sorted(visit) == list(range(20)) for visit in visits)
    assert len(set(map(tuple, visits))) == 3


def test_data_sets_of_one_size_have_orders_and_phases_of_their_own():
    twins = MixtureOrder(tuple("abcdefgh"), (20,) * 8, (1 / 8,) * 8, 0)
    windows = [twins.window(number, 1) for number in range(160)]
    orders = [[draw.place for draws in windows for draw in draws if draw.source == source] for source in range(8)]
    assert len(set(map(tuple, orders))) == 8
    # With one phase, eight data sets would be drawn from at once, and then none for seven windows.
    assert max(map(len, windows)) < 8 and sum(map(bool, windows)) > 80


def test_one_pass_has_every_sample_once_and_ends():
    once = OnePassOrder(NAMES, SIZES, RATES, 0)
    draws, window = [], 0
    while (found := once.window(window, 10)) is not None:
        draws += found
        window += 1
    assert sorted(draws) == [Draw(s, i, 0) for s, size in enumerate(SIZES) if RATES[s] for i in range(size)]
    # While no set is used up, the rates are the mixture's.
    first = [draw.source for draw in draws[:40]]
    assert [first.count(source) for source in range(3)] == [24, 12, 4]
    assert sorted(first[:4]) == [0, 0, 0, 1], "from the first draw on"
