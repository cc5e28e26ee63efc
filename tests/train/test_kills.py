"""SIGKILL at random moments: the run that goes on afterwards is the run that was never killed."""

import random

import pytest

from megatron_vlm.parallel.pool import Pool
from tests.data import world as data
from tests.train import kills


@pytest.mark.slow
def test_a_run_killed_three_times_is_bit_for_bit_the_run_that_never_was(tmp_path, pool):
    """On two ranks, one of the kills in a save. The full sweep: benchmarks/kill_sweep.py."""
    data.build(tmp_path)
    whole, killed = (kills.settings(tmp_path, tmp_path / name, "dp2", steps=9, every=2) for name in ("whole", "killed"))
    pool(2).run(kills.train, whole, timeout_s=120)
    chance = random.Random(1)
    mine = Pool(2)
    done = [kills.kill(mine, killed, "dp2", chance, aimed) for aimed in ("moment", "save", "moment")]
    assert any(one is not None and one.aimed == "save" for one in done)
    mine.run(kills.train, killed, timeout_s=120)
    mine.close()
    assert kills.differences(tmp_path / "killed", tmp_path / "whole", 9) == []
    assert kills.steps(tmp_path / "killed", "metrics") == list(range(1, 10))
