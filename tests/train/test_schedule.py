import math

import pytest

from megatron_vlm.config.schema import ComponentOptimConfig
from megatron_vlm.train.schedule import learning_rate

VISION = ComponentOptimConfig(lr=6e-6, min_lr=6e-7, warmup_steps=2000)
CONNECTOR = ComponentOptimConfig(lr=2e-4, min_lr=2e-5, warmup_steps=200)


def test_molmo2_stage_1_rates_at_hand_computed_steps():
    # Linear from 0 to the peak at the last warm-up step, then half a cosine down to a tenth at step 31,000.
    assert learning_rate(CONNECTOR, "cosine", 1, 31_000) == pytest.approx(1e-6)
    assert learning_rate(CONNECTOR, "cosine", 200, 31_000) == pytest.approx(2e-4)
    assert learning_rate(CONNECTOR, "cosine", 15_600, 31_000) == pytest.approx(1.1e-4)  # half way: the mean
    assert learning_rate(CONNECTOR, "cosine", 31_000, 31_000) == pytest.approx(2e-5)
    assert learning_rate(VISION, "cosine", 1000, 31_000) == pytest.approx(3e-6)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert learning_rate(VISION, "cosine", 2000 + 29_000 // 4, 31_000) == pytest.approx(6e-6 * quarter)


def test_linear_and_constant():
    assert learning_rate(CONNECTOR, "linear", 5200, 10_200) == pytest.approx(1.1e-4)
    assert learning_rate(CONNECTOR, "linear", 10_200, 10_200) == pytest.approx(2e-5)
    assert learning_rate(CONNECTOR, "constant", 100, 10_200) == pytest.approx(1e-4)
    assert learning_rate(CONNECTOR, "constant", 10_200, 10_200) == pytest.approx(2e-4)


def test_wsd_stays_at_the_peak_and_falls_at_the_end():
    rates = [learning_rate(CONNECTOR, "wsd", step, 10_000, 1000) for step in (100, 200, 9000, 9500, 10_000, 10_001)]
    assert rates == pytest.approx([1e-4, 2e-4, 2e-4, 1.1e-4, 2e-5, 2e-5])
    # More decay than there is room for: it begins at the end of the warm-up.
    assert learning_rate(CONNECTOR, "wsd", 600, 1000, 900) == pytest.approx(1.1e-4)


def test_a_run_shorter_than_its_warm_up_never_leaves_it():
    assert [learning_rate(CONNECTOR, "cosine", step, 100) for step in (50, 100)] == pytest.approx([5e-5, 1e-4])


def test_a_rate_without_warm_up_starts_just_below_the_peak():
    rates = [learning_rate(ComponentOptimConfig(1.0, 0.0, 0), "linear", step, 4) for step in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.75, 0.5, 0.25, 0.0])


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'stairs' does not exist; choose one of cosine, linear, constant"):
        learning_rate(CONNECTOR, "stairs", 1, 10)
