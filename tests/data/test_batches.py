"""Rows to global batches: alike in cost, each with the mixture's shares; a pure function of the place in the stream."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_vlm.data.batches import _others, arrange
from megatron_vlm.data.loader import Loader, Share, Step
from tests.data.world import ARCH, build, config

RATES, GROUPS = (0.4, 0.3, 0.2, 0.1), (0, 0, 1, 1)


def window(rows: int, seed: int) -> tuple[list[int], np.ndarray]:
    """Rows of 1 to 8 samples of four data sets; one of the last set costs much, so costs tell what is inside."""
    rng = np.random.default_rng(seed)
    samples = np.stack([rng.multinomial(count, RATES) for count in rng.integers(1, 9, rows)])
    costs = 1000 + samples @ [20, 25, 40, 200] + rng.integers(0, 300, rows)
    return costs.tolist(), samples


def chi_square(samples: np.ndarray) -> float:
    counts, shares = samples.sum(axis=0), np.asarray(RATES)
    return float(((counts - shares * counts.sum()) ** 2 / (shares * counts.sum())).sum())


@pytest.mark.parametrize("sizes", [[32] * 8, [11, *[32] * 7, 21], [8, 8, 16, 32, 32]])
def test_batches_are_even_and_fair(sizes: list[int]) -> None:
    costs, samples = window(sum(sizes), 0)
    order = arrange(costs, samples, RATES, GROUPS, sizes, 8, random.Random(1))
    assert sorted(order) == list(range(len(costs)))
    ends = np.cumsum(sizes)[:-1]

    def unevenness(rows: list[int]) -> float:
        return float(np.mean([max(part) / np.mean(part) for part in np.split(np.asarray(costs)[rows], ends)]))

    parts = np.split(np.asarray(order), ends)
    assert all((np.diff(part) > 0).all() for part in parts)
    assert unevenness(order) - 1 < 0.7 * (unevenness(list(range(len(costs)))) - 1)
    # 3 degrees of freedom: 10 % of random batches lie beyond 6.25. Sorted by cost alone, batches are far off.
    assert all(chi_square(samples[part]) < 6.25 for part in parts)
    ranked = np.split(np.argsort(costs), ends)
    assert max(chi_square(samples[part]) for part in ranked) > 16
    assert order == arrange(costs, samples, RATES, GROUPS, sizes, 8, random.Random(1))


def test_one_data_set_is_sorted_by_cost_alone() -> None:
    costs, samples = window(64, 2)
    whole = samples.sum(axis=1, keepdims=True)
    order = arrange(costs, np.hstack([whole, 0 * whole]), (1.0, 0.0), (0, 1), [16] * 4, 8, random.Random(0))
    spreads = [np.ptp(part) for part in np.split(np.asarray(costs)[order], 4)]
    assert sum(spreads) < 1.6 * np.ptp(costs)


def test_batches_hold_about_as_many_samples() -> None:
    """Sorted by cost alone, one would hold a third of the usual number, where each sample costs the same."""
    counts = np.random.default_rng(0).integers(1, 9, 64)
    samples = np.stack([counts, 0 * counts], axis=1)
    order = arrange((1000 * counts).tolist(), samples, (1.0, 0.0), (0, 1), [16] * 4, 8, random.Random(0))
    held = counts[order].reshape(4, 16).sum(axis=1)
    assert (abs(held / held.mean() - 1) < 0.5).all()


def test_the_dearest_of_the_others() -> None:
    """Guessed wrong, exchanges go round in circles until their limit."""
    for costs, others in (([5, 2, 1], [2, 5, 5]), ([3, 1, 3], [3, 3, 3]), ([4], [0])):
        assert _others(np.asarray(costs, dtype=float)).tolist() == others


@pytest.mark.parametrize("sizes", [[64], [40, 24]])
def test_too_little_to_tell_leaves_rows_where_they_are(sizes: list[int]) -> None:
    costs, samples = window(64, 3)
    few = np.zeros_like(samples)
    few[::16, 0] = 1
    given = samples if len(sizes) == 1 else few
    assert arrange(costs, given, RATES, GROUPS, sizes, 8, random.Random(0)) == list(range(64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    build(folder)
    return folder


def steps(settings, count: int, share: Share | None = None, state: dict | None = None) -> list[Step]:
    loader = Loader(settings, ARCH, share or Share(crops=False), state=state)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


@pytest.mark.parametrize("ramp", [{}, {"rampup_steps": 6, "rampup_from": 4, "rampup_by": 2}])
def test_the_loader_takes_the_same_rows_in_even_steps(folder: Path, ramp: dict[str, int]) -> None:
    """Every row of the windows once, on any number of ranks, and the same stream from any step on."""
    balanced = config(folder, window=64, balance_batches=3, train={"micro_batch": 1, **ramp})
    plain, found = steps(config(folder, window=64, train={"micro_batch": 1, **ramp}), 9), steps(balanced, 9)
    assert [step.next_window for step in found] == [step.next_window for step in plain]
    assert [step.rows for step in found] != [step.rows for step in plain]
    last = found[-1].next_window
    for number in range(last):
        of_window = [[row for step in run for row in step.rows if row >> 24 == number] for run in (found, plain)]
        assert sorted(of_window[0]) == sorted(of_window[1])
    assert last >= 1
    for rank in range(2):
        assert [step.keys_hash for step in steps(balanced, 9, Share(rank, 2, crops=False))] == [
            step.keys_hash for step in found
        ]
    loader = Loader(balanced, ARCH, Share(crops=False))
    for number, _ in enumerate(itertools.islice(loader, 6), start=1):
        state = json.loads(json.dumps(loader.state_dict()))
        if number in (2, 5):
            assert [step.rows for step in steps(balanced, 3, state=state)] == [
                step.rows for step in found[number : number + 3]
            ]
    loader.close()
    for other in (config(folder, window=64), config(folder, window=64, balance_batches=3, train={"global_batch": 4})):
        with pytest.raises(ValueError, match="balance was '3 batches of 8 rows"):
            Loader(other, ARCH, Share(), state=state)
